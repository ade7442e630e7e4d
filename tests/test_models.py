"""ViT and encoder-decoder (BM 3.2), ResNet, the mask token inside (A2 4), weights in and out."""
import argparse
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchvision

import losses
import models as M
from conftest import close, picture


def hidden(B, N):
    return picture(B, N).argsort(1) >= N // 4  # three quarters


def vit(size=16, **more):
    return M.encoder("vit_micro", size, 4, **more)


def shapes(model):
    return {name: [*x.shape] for name, x in model.state_dict().items()}


def vit_shapes(D, L, N, p):
    """Names and shapes in timm's vit_*_patch16_224, but for the head."""
    block = {"norm1": [D], "attn.qkv": [3 * D, D], "attn.proj": [D, D],
             "norm2": [D], "mlp.fc1": [4 * D, D], "mlp.fc2": [D, 4 * D]}
    layers = {f"blocks.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    layers |= {"norm": [D], "patch_embed.proj": [D, 3, p, p]}
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return weights | biases | {"cls_token": [1, 1, D], "pos_embed": [1, N + 1, D]}


def mae_shapes(D, L, d, l, N, p):
    """Names and shapes in the official MAE pre-training checkpoints."""
    decoder = {f"decoder_{name}": shape for name, shape in vit_shapes(d, l, N, p).items()
               if name.startswith(("blocks", "norm", "pos"))}
    return vit_shapes(D, L, N, p) | decoder | {
        "mask_token": [1, 1, d], "decoder_embed.weight": [d, D], "decoder_embed.bias": [d],
        "decoder_pred.weight": [p * p * 3, d], "decoder_pred.bias": [p * p * 3]}


def test_names_are_timms_maes_and_torchvisions():
    with torch.device("meta"):
        head = {"head.weight": [10, 768], "head.bias": [10]}
        assert shapes(M.encoder("vit_base", num_classes=10)) == vit_shapes(768, 12, 196, 16) | head
        pair = M.recovery_model("vit_base", decoder="8x512x16")
        assert shapes(pair) == mae_shapes(768, 12, 512, 8, 196, 16)
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
            theirs = torchvision.models.get_model(name)
            assert shapes(M.encoder(name, num_classes=1000)) == shapes(theirs)
    sizes = {name: tuple(M.MODELS[f"vit_{name}"].sizes.values())  # width, depth, heads
             for name in ("tiny", "small", "base", "large", "huge")}
    assert sizes == dict(tiny=(192, 12, 3), small=(384, 12, 6), base=(768, 12, 12),
                         large=(1024, 24, 16), huge=(1280, 32, 16))


def test_initialisation():
    """MAE's: Xavier's bounds, of a patch's projection as of a matrix; tokens of deviation .02. A
    ResNet's is torchvision's, by what goes out.
    """
    m = M.recovery_model("vit_base")
    for name, ends in (("patch_embed.proj", 768 + 768), ("blocks.0.mlp.fc1", 768 + 3072),
                       ("decoder_pred", 384 + 768)):
        w, bound = m.get_parameter(f"{name}.weight").detach(), (6 / ends) ** 0.5
        assert 0.99 * bound < w.abs().max() < 1.0001 * bound
        assert w.std() == pytest.approx(bound / 3 ** 0.5, rel=0.02)
    assert all(0.015 < token.std() < 0.025 for token in (m.cls_token, m.mask_token))
    w = M.encoder("resnet18").layer2[0].conv1.weight.detach()  # from 64 channels to 128
    assert w.std() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


normal = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_images_that_are_not_rgb_are_normalised_alike():
    model = M.encoder("vit_micro", 16, 4, 5)
    assert close(model.normalize(torch.full((1, 5, 16, 16), 0.9)), torch.tensor(2.0))


def test_vit_computes_what_torchvisions_does():
    """Same weights, same class scores: the order in qkv and in a patch, norms, GELU, cls token."""
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 256, num_classes=5).eval()
    values = [x.normal_(std=0.2) for x in theirs.state_dict().values()]
    values.insert(1, values.pop(3))  # ours has the positions before the patches
    ours = M.ViT(32, 8, 64, 3, 4, num_classes=5)
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    x = picture(4, 3, 32, 32)
    assert close(ours(x), theirs(normal(x)))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_computes_what_torchvisions_does(name):
    theirs = torchvision.models.get_model(name).eval()
    for key, x in theirs.state_dict().items():
        if "bn" in key and x.is_floating_point():
            x.uniform_(0.6, 0.9)
    ours = M.encoder(name, (64, 96), num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = picture(2, 3, 64, 96)
    want = theirs(normal(x))
    assert close(ours(x), want, 1e-4 * want.abs().max().item())


def test_positions_are_maes():
    """The column in the first half of the channels, the row in the second: sines, then cosines."""
    table = M.sincos_positions(16, (3, 5))[0]
    n, w = torch.arange(15)[:, None], 10000 ** -(torch.arange(4) / 4)
    x, y = n % 5 * w, n // 5 * w
    assert close(table[1:], torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1))
    assert not table[0].any()  # cls


def test_hidden_pixels_do_not_reach_the_encoder():
    """Of a non-square image of five channels. SimMIM's token leaves a hidden patch its place."""
    x, h = picture(2, 5, 32, 48), hidden(2, 24)
    model = M.recovery_model("vit_micro", (32, 48), 8, 5)
    pixels = h.view(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(pixels, 1 - x, x)
    assert model.encode(x, h).shape == (2, 1 + 6, 128)
    assert torch.equal(model(x, h), model(other, h))
    assert close(model(x, h & False), model(x))
    out = M.recovery_model("vit_micro", (32, 48), 8, 5, "input", "replace")(x, h | True)
    assert torch.equal(out[0], out[1])
    assert not close(out[:, 0], out[:, 1], 1e-3)


def test_mask_tokens_stand_where_the_patches_were():
    """The decoder is given visible tokens in their places, the mask token in all others."""
    model, x = M.EncoderDecoder(32, 8, 32, 1, 2, decoder=(0, 16, 2)), picture(2, 3, 32, 32)
    h = hidden(2, 16)
    tokens = model.mask_token.repeat(2, 16, 1)
    tokens[~h] = model.decoder_embed(model.encode(x, h)[:, 1:]).flatten(0, 1)
    want = model.decoder_pred(model.decoder_norm(tokens + model.decoder_pos_embed[:, 1:]))
    assert close(model(x, h), want)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("size", [(2, 2), (1, 3), (7, 8), (13, 16)])
def test_convolution_is_torchs(kernel, stride, size):
    """And its gradients, of small maps, where it is a matrix product, and of larger ones."""
    ours = M.Convolution(3, 5, kernel, stride, bias=True)
    torchs = torch.nn.Conv2d(3, 5, kernel, stride, kernel // 2)
    torchs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, torchs):
        x = picture(2, 3, *size).requires_grad_()
        y = layer(x)
        (y * picture(*y.shape)).sum().backward()
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    assert all(close(a, b) for a, b in zip(*found))


def test_bf16_changes_little():
    """Of a map two pixels wide torch's AMX kernels are wrong."""
    model, x = M.encoder("resnet18", (64, 32), 8), picture(4, 3, 64, 32)
    want = M.to_device(model, torch.device("cpu"))(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - want).abs().mean() < 0.15 * want.abs().mean()


def test_vit_pools_the_cls_token_or_the_mean():
    x, cls, mean = picture(2, 3, 16, 16), vit(), vit(pool="mean")
    assert torch.equal(cls(x), cls.encode(x)[:, 0])
    assert close(mean(x), mean.encode(x)[:, 1:].mean(1))
    half = cls.bfloat16()(picture(2, 3, 16, 24).bfloat16())  # of another size than its own
    assert half.shape == (2, 128) and half.dtype == torch.bfloat16


def test_drop_path_factors():
    """0 or 1 / (1 - r), r from 0 to `rate`, the mean 1. `within` of a batch is the whole cut."""
    def factors(batch, within=None):
        return M.drop_path(batch, 3, 0.4, torch.Generator().manual_seed(0), within)

    drop = factors(4000)
    for i, values in enumerate(([1], [0, 1 / 0.8], [0, 1 / 0.6])):
        assert drop[:, i].unique().tolist() == pytest.approx(values)
    assert close(drop.mean(0), torch.ones(3), 0.05)
    assert torch.equal(factors(3, (2, 4000)), drop[2:5])


@pytest.mark.parametrize("name, end", [
    ("vit_micro", "blocks.1.mlp.fc2.weight"), ("resnet18", "layer2.1.bn2.weight")])
def test_a_dropped_branch_adds_nothing_to_its_image(name, end):
    """As if the last layer of branch 3 were zero for image 0."""
    model, x = M.encoder(name, 32, 8).eval(), picture(2, 3, 32, 32)
    drop = torch.ones(2, model.branches)
    drop[0, 3] = 0
    got, whole = model(x, drop), model(x)
    model.state_dict()[end].zero_()
    assert close(got, torch.stack([model(x)[0], whole[1]]))


@pytest.mark.parametrize("name, side, patch, at, how", [
    *[("vit_micro", 64, 8, at, "add") for at in (0, 6)],
    *[("resnet18", 64, 8, at, "add") for at in range(5)], ("resnet18", 64, 32, 3, "add"),
    *[(*row, how) for row in (("vit_micro", 64, 8, 3), ("resnet18", 96, 12, 3))
      for how in M.TOKEN_HOWS]])
def test_the_token_enters_after_its_layer(name, side, patch, at, how):
    """A2 4: z + T * D(M). D(M) is the hidden share of each position. Or SimMIM's, or the code's."""
    model = M.recovery_model(name, (side, 96), patch, 1, at, how).eval()
    x, h = picture(1, 1, side, 96), hidden(1, math.prod(model.grid))
    pixels = h.view(1, 1, *model.grid).float()
    pixels = pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    if how == "scaled":
        model.mask_token_scale.data.mul_(0.5e6)  # from 1e-6

    def after(layer, z):
        D = F.pad(h, (1, 0))[:, :, None].float()
        if z.ndim == 4:
            D = F.interpolate(pixels, z.shape[2:], mode="area")
        kept = {"add": z, "replace": z * (1 - D), "scaled": z * (1 - D / 2)}[how]
        return kept + model.mask_token * D if layer == at else z

    want = model.predict(model.encode(x, after=after))
    assert close(model(x, h), want, 1e-4)
    assert not close(model(x, h, token=False), want, 1e-3)


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_pixel_shuffle_head(patch):
    """Its patches are those of losses.patchify."""
    model, z = M.recovery_model("resnet18", (64, 96), patch), picture(2, 512, 2, 3)
    image = F.pixel_shuffle(model.decoder_pred(z), 32)
    assert torch.equal(model.predict(z), losses.patchify(image, patch))


def test_the_middle_is_that_of_a2_5_1():
    for name, middle in dict(vit_small=5, vit_base=8, resnet18=3, resnet50=3).items():
        words = {"middle": middle, "none": None, "input": 0}
        assert {word: M.token_layer(name, word) for word in words} == words


def test_relative_positions_are_zero_at_first():
    """A2 A.2. The rows are BEiT's: offsets (dy, dx), then cls's."""
    plain, biased, x = vit(), vit(relative_positions=True), picture(2, 3, 16, 16)
    assert len(M.load_weights(biased, plain.state_dict()).missing) == 6
    assert close(plain(x), biased(x))
    assert M.relative_index((2, 2)).tolist() == [
        [11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]


def test_relative_positions_learn_in_bf16_as_in_float32():
    """Of many images, whose gradients meet in one row of the table."""
    x, h, weights = picture(64, 3, 32, 32), hidden(64, 64), torch.randn(128)
    model, tables = vit(32, relative_positions=True), []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = model.encode(x, h)
        model.zero_grad()
        (out.float()[:, 1:] * weights).mean().backward()
        tables.append(model.blocks[5].attn.relative_position_bias_table.grad)
    assert (tables[0] - tables[1]).norm() < 0.05 * tables[0].norm()


def test_relative_positions_of_visible_patches():
    """A key that nobody looks at is as good as dropped."""
    model = M.ViT(32, 8, 32, 1, 2, relative_positions=True)
    table = model.blocks[0].attn.relative_position_bias_table
    table.data = torch.cat([table.data.normal_(), torch.full((1, 2), -1e9)])
    x, h = picture(1, 3, 32, 32), hidden(1, 16)
    dropped, gone = model.encode(x, h), F.pad(h[0], (1, 0))
    model.relative_index = torch.where(gone, len(table) - 1, model.relative_index)
    assert close(dropped, model.encode(x)[:, ~gone])


def test_an_official_mae_file_loads_whole(tmp_path):
    """With decoder and argparse.Namespace. A2's takes the backbone."""
    def model(**more):
        return M.recovery_model("vit_micro", 16, 4, **more)

    shapes, file = mae_shapes(128, 6, 128, 2, 16, 4), tmp_path / "mae.pth"
    state = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    torch.save(dict(model=state, optimizer={}, args=argparse.Namespace(lr=1)), file)
    mae = model(decoder="2x128x4")
    report = M.load_weights(mae, file)
    assert not report.missing + report.unexpected + report.resized
    assert all((x == 0.01).all() for x in mae.state_dict().values())
    assert "mask_token" in M.load_weights(model(token_at=2), file).missing
    with pytest.raises(ValueError, match="--decoder"):
        M.load_weights(model(decoder="1x128x4"), file)


@pytest.mark.parametrize("name, prefix", [
    ("vit_micro", "module."), ("vit_micro", "backbone.body."), ("vit_micro", "encoder_q."),
    ("vit_micro", "_orig_mod."), ("resnet18", "encoder_q.")])
def test_prefixes_are_taken_off(name, prefix):
    """Of several networks the first is taken. A head of another shape is left out, or any."""
    model = M.encoder(name, 32, 8, num_classes=3)
    state = {key: x + 1 for key, x in model.state_dict().items()}
    file = {prefix + key: x for key, x in state.items()}
    if prefix == "encoder_q.":
        file |= {"encoder_k." + key: x for key, x in model.state_dict().items()}
    if prefix == "_orig_mod.":  # torch.compile's, also of a part
        file = {key.replace("blocks.", "blocks._orig_mod."): x for key, x in file.items()}
    for classes, head in ((3, False), (7, True)):
        other = M.encoder(name, 32, 8, num_classes=classes)
        assert len(M.load_weights(other, {"state_dict": file}, head).missing) == 2
    assert len(M.load_weights(model, {"state_dict": file}).loaded) == len(state)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name, parts", [
    ("vit_micro", ["patch_embed.proj.weight", "cls_token", "pos_embed", "norm.bias"]),
    ("resnet18", ["conv1.weight", "bn1.running_mean", "layer4.1.bn2.bias"])])
def test_what_is_not_the_backbone_is_refused(name, parts):
    """A part is missing, has another shape, or is left over; or there is no state dict."""
    model = M.encoder(name, 32, 8)
    state = model.state_dict()
    wrong = [{}, state | {"blocks.0.gamma": torch.ones(3)}]
    for part in parts:
        wrong += [state | {part: torch.ones(3, 5)}, state | {part: None}]
    for source in wrong:
        with pytest.raises(ValueError):
            M.load_weights(model, source)


def test_batch_norm_counts_the_pixels_of_every_process(monkeypatch):
    """Two processes, threads here, whose maps differ in size, as detection's do."""
    maps = [torch.rand(2, 3, 4, 4), 5 * torch.rand(2, 3, 4, 9)]
    held, both = {}, threading.Barrier(2)

    def summed(x):
        held[threading.get_ident()] = x
        both.wait(20)
        total = sum(held.values())
        both.wait(20)
        return total
    monkeypatch.setattr(M.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(M.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(M.SumOverProcesses, "apply", summed)
    norms, one = [M.BatchNorm(3), M.BatchNorm(3)], torch.nn.BatchNorm2d(3)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda norm, x: norm(x), norms, maps))
    want = one(torch.cat([x.flatten(2) for x in maps], dim=2)[..., None])
    assert close(torch.cat([x.flatten(2) for x in found], dim=2), want[..., 0])
    for name, x in one.named_buffers():
        assert all(close(norm.get_buffer(name), x) for norm in norms)


def test_positions_are_resized_from_their_grid():
    """A run's configuration says 2 x 8. They become 8 x 2."""
    state = vit((8, 32), relative_positions=True).state_dict()
    table = "blocks.5.attn.relative_position_bias_table"
    state["pos_embed"][0, 1:] = torch.arange(8.0).repeat(2)[:, None]  # the column
    state[table][:] = torch.cat([torch.arange(-7.0, 8).repeat(3), torch.full((3,), 9)])[:, None]
    model = vit((32, 8), relative_positions=True)
    run = dict(model=state, config=dict(model="vit_micro", img_size=[8, 32], patch_size=4))
    assert len(M.load_weights(model, run).resized) == 1 + 6
    own = model.state_dict()
    assert close(own["pos_embed"][0, 1:, 0], torch.tensor([1.5, 5.5] * 8))
    assert close(own[table][:, 0], torch.tensor([-5.0, 0, 5] * 15 + [9] * 3))
    rows = picture(1, 17, 8, 1)[..., 0]
    want = F.interpolate(rows[:, 1:].mT.unflatten(2, (4, 4)), (6, 6), mode="bicubic")
    assert close(M.resize_positions(rows, (4, 4), (6, 6))[:, 1:], want.flatten(2).mT)


def test_positions_of_no_run_are_a_squares_or_the_models():
    """Where they have been learned. Fixed ones tell their grid, also when they have been trained a
    little. `config` is another code's.
    """
    def resized(size, old_size, trained):
        state = vit(old_size).state_dict()
        state["pos_embed"] += trained
        held = dict(model=state, config=dict(lr=1))
        return bool(M.load_weights(vit(size), held).resized)
    assert resized((8, 32), (8, 32), 1) and not resized((16, 24), (16, 24), 1)
    with pytest.raises(ValueError, match="not of a square"):
        resized((16, 16), (16, 24), 1)
    assert not resized((8, 32), (8, 32), 0)
    assert not resized((8, 32), (8, 32), 0.1 * torch.randn(1, 17, 128))
    assert resized((8, 32), (16, 16), 0) and resized((16, 16), (16, 24), 0)


def test_mocos_small_vit_has_other_heads():
    """Its shapes are vit_small's."""
    model = M.encoder("vit_small", 16, 8)
    with pytest.raises(ValueError, match="12 heads"):
        M.load_weights(model, {f"module.base_encoder.{k}": x for k, x in
                               model.state_dict().items()})


def test_a_network_of_ones_own_may_have_a_name_that_others_have(tmp_path):
    """Elsewhere it tells of a network that is not here: tests/test_folders.py."""
    model = M.encoder("vit_micro", 32, 8)
    model.dist_token = torch.nn.Parameter(torch.ones(3))
    state = model.state_dict()
    assert "dist_token" in M.load_weights(model, state).loaded
    config = dict(model="vit_micro", img_size=[32, 32], patch_size=8)
    torch.save(dict(model=state, config=config), tmp_path / "checkpoint.pt")
    M.main(["--export", str(tmp_path), str(tmp_path / "out.pth")])
    assert "dist_token" in torch.load(tmp_path / "out.pth")


@pytest.mark.parametrize("name, at", [("vit_micro", "decoder"), ("vit_micro", 2), ("resnet18", 3)])
def test_export_is_the_plain_backbone(name, at, tmp_path):
    """It loads strictly, computes the same and is contiguous."""
    source = M.to_device(M.recovery_model(name, 32, 8, token_at=at).eval(), torch.device("cpu"))
    torch.save(dict(model=source.state_dict(), step=1), tmp_path / "checkpoint.pt")
    M.main(["--export", str(tmp_path), str(tmp_path / "out.pth")])
    state = torch.load(tmp_path / "out.pth")
    assert all(x.is_contiguous() for x in state.values())
    plain, x = M.encoder(name, 32, 8).eval(), picture(2, 3, 32, 32)
    plain.load_state_dict(state, strict=True)
    assert close(plain.encode(x), source.encode(x))


@pytest.mark.parametrize("name, held, says", [
    ("out.safetensors", ["mask_token"], "call it .pth"),
    ("out.pth", ["mask_token"], "no backbone in mask_token"),
    ("out.pth", ["conv1.0.weight", "layer1.0.conv1.weight"], "a ResNet with a deep stem")])
def test_what_export_refuses(name, held, says, tmp_path, capsys):
    torch.save({k: torch.zeros(3) for k in held}, tmp_path / "in.pth")
    with pytest.raises(SystemExit):
        M.main(["--export", str(tmp_path / "in.pth"), str(tmp_path / name)])
    assert says in capsys.readouterr().err and not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["vit_micro", "resnet18"])
def test_load_encoder(name, tmp_path):
    """A run -> features of images in [0, 1], and of no others."""
    model, x = M.recovery_model(name, 64, 8, channels=1).eval(), picture(2, 1, 64, 64)
    config = dict(model=name, img_size=[64, 64], patch_size=8)
    torch.save(dict(model=model.state_dict(), config=config), tmp_path / "checkpoint.pt")
    torch.save(model.state_dict(), tmp_path / "w")
    for encoder in (M.load_encoder(tmp_path), M.load_encoder(tmp_path / "w", **config)):
        assert torch.equal(encoder(x), model.pooled(model.encode(x)))
    for wrong in ((x * 255).byte(), x * 2, x - 0.5):
        with pytest.raises(ValueError, match="floats in \\[0, 1\\]"):
            encoder(wrong)
    for given in ({}, dict(model=name), config | dict(model="resnet50")):
        with pytest.raises(ValueError):
            M.load_encoder(tmp_path / "w", **given)
