"""ViT and encoder-decoder (BM 3.2, A.1; MAE), ResNet, the mask token inside (A2 4, 5.4): names, masking, weights in and out."""
import argparse
import math
import os

import pytest
import torch
import torch.nn.functional as F
import torchvision

import models as M


def hidden(B, N, seed=0):
    rank = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return rank >= N // 4


def small(**kw):
    torch.manual_seed(0)
    return M.EncoderDecoder(**{**dict(img_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_depth=1, decoder_dim=16, decoder_heads=2), **kw})


def official_mae_shapes(D=768, L=12, d=512, l=8, N=196, p=16):
    """Every name and shape of the official MAE pre-training checkpoint of ViT-B/16, decoder included."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, N + 1, D), "mask_token": (1, 1, d), "decoder_pos_embed": (1, N + 1, d),
              "patch_embed.proj.weight": (D, 3, p, p), "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,),
              "decoder_embed.weight": (d, D), "decoder_embed.bias": (d,), "decoder_norm.weight": (d,), "decoder_norm.bias": (d,),
              "decoder_pred.weight": (p * p * 3, d), "decoder_pred.bias": (p * p * 3,)}
    for prefix, width, depth in (("blocks", D, L), ("decoder_blocks", d, l)):
        for i in range(depth):
            for name, shape in {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
                                "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}.items():
                shapes[f"{prefix}.{i}.{name}.weight"], shapes[f"{prefix}.{i}.{name}.bias"] = shape, shape[:1]
    return shapes


def test_the_official_mae_checkpoint_loads_strictly():
    shapes = official_mae_shapes()
    model = M.recovery_model("vit_base", decoder="8x512x16")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    state = {k: torch.full(s, 0.01) for k, s in shapes.items()}
    assert not any(model.load_state_dict(state, strict=True))
    assert (model.decoder_blocks[7].mlp.fc2.weight == 0.01).all()


def test_the_encoder_has_timms_names_and_export_writes_them():
    wanted = {k for k in official_mae_shapes() if "decoder" not in k and k != "mask_token"} | {"head.weight", "head.bias"}
    assert set(M.encoder("vit_base", num_classes=1000).state_dict()) == wanted
    model = small()
    vit = M.ViT(32, 8, 32, 2, 2)
    vit.load_state_dict(M.export(model.state_dict()), strict=True)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(vit(x), model.encode(x)[:, 0])


def test_a_vit_computes_what_torchvisions_does():
    """The same class scores from the same weights: the order inside qkv and inside a patch, norms, GELU, where the cls token is."""
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj", "encoder.ln": "norm",
             "heads.head": "head", "encoder.layers.encoder_layer_": "blocks.", "ln_": "norm", "self_attention.in_proj_": "attn.qkv.",
             "self_attention.out_proj": "attn.proj", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    torch.manual_seed(0)
    theirs, ours = torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 256, num_classes=5).eval(), M.ViT(32, 8, 64, 3, 4, num_classes=5)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state = theirs.state_dict()
    for before, after in names.items():
        state = {k.replace(before, after): v for k, v in state.items()}
    ours.load_state_dict(state, strict=True)
    x = torch.rand(4, 3, 32, 32)
    normal = torchvision.transforms.functional.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(ours(x), theirs(normal), atol=1e-6)


def test_positions_are_maes():
    """First half of the channels: the column; each half sin then cos, frequencies 10000^(-i / (D/4)); cls: zero."""
    table = M.sincos_positions(16, (3, 5))[0]
    assert table.shape == (16, 16) and (table[0] == 0).all()
    for row in range(3):
        for column in range(5):
            for i in range(4):
                w = 10000 ** (-i / 4)
                want = (math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w))
                got = table[1 + row * 5 + column][[i, 4 + i, 8 + i, 12 + i]].tolist()
                assert got == pytest.approx(want, abs=1e-6)


def test_nothing_of_a_hidden_patch_reaches_the_encoder():
    model, h = small(), hidden(2, 16)
    x = torch.rand(2, 3, 32, 32)
    pixels = h.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(pixels, torch.rand_like(x), x)
    assert torch.equal(model.encode(x, h), model.encode(other, h)) and not torch.equal(model.encode(x), model.encode(other))
    assert model.encode(x, h).shape == (2, 1 + 4, 32)


def test_nothing_hidden_is_no_mask():
    model, x = small(), torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(x, torch.zeros(2, 16, dtype=torch.bool)), model(x), atol=1e-6)


def test_mask_tokens_stand_where_the_patches_were():
    """The decoder is given the visible tokens at their own places and the mask token at every other."""
    model, h = small(decoder_depth=0), hidden(2, 16)
    x = torch.rand(2, 3, 32, 32)
    tokens = model.encode(x, h)
    want = model.mask_token.expand(2, 16, 16).clone()
    for b in range(2):
        want[b, ~h[b]] = model.decoder_embed(tokens)[b, 1:]
    want = model.decoder_pred(model.decoder_norm(want + model.decoder_pos_embed[:, 1:]))
    assert torch.allclose(model(x, h), want, atol=1e-6)


@pytest.mark.parametrize("size, channels", [((32, 48), 3), ((48, 32), 1), ((32, 32), 5)])
def test_non_square_images_and_any_number_of_channels(size, channels):
    model = small(img_size=size, channels=channels)
    N = size[0] * size[1] // 64
    out = model(torch.rand(2, channels, *size), hidden(2, N))
    assert out.shape == (2, N, 64 * channels) and out.isfinite().all()


def test_attention_written_out_equals_torchs_kernel():
    q, k, v = torch.randn(3, 2, 2, 7, 64, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(M.attend(q, k, v), want, atol=1e-5)


def test_a_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="30x32 is not divisible by the patch size 8"):
        small(img_size=(30, 32))


def test_loading_reports_and_resizes_positions(tmp_path):
    source, path = small(), tmp_path / "w.pt"
    torch.save({"model": {"module." + k: v for k, v in source.state_dict().items()}, "step": 3}, path)
    target = M.ViT((48, 32), 8, 32, 2, 2, num_classes=7)
    report = M.load_weights(target, path)
    assert report.resized == ["pos_embed"] and report.missing == ["head.weight", "head.bias"]
    assert all(n.startswith(("decoder", "mask")) for n in report.unexpected) and "resized" in str(report)
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    same = M.resize_positions(source.pos_embed, (4, 4))
    assert torch.allclose(same, source.pos_embed, atol=1e-6)


def test_loading_leaves_a_head_of_another_shape_out():
    source, target = M.ViT(32, 8, 32, 2, 2, num_classes=5), M.ViT(32, 8, 32, 2, 2, num_classes=7)
    report = M.load_weights(target, source.state_dict())
    assert report.missing == ["head.weight", "head.bias"]


@pytest.mark.parametrize("state, says", [
    ({"conv1.weight": torch.zeros(2)}, "none of the backbone"), ({"norm.weight": torch.zeros(32)}, "none of the backbone"),
    (M.ViT(32, 8, 64, 2, 2).state_dict(), r"\(1, 1, 64\) in the weights and \(1, 1, 32\)"),
    (M.ViT(32, 8, 32, 3, 2).state_dict(), r"0 missing \(\), 12 left over \(blocks.2.norm1.weight"),
    (M.ViT(32, 8, 32, 1, 2).state_dict(), "12 missing"),
    (M.ViT(32, 8, 32, 2, 2, relative_positions=True).state_dict(), "2 left over .* the --model and --relative_positions")])
def test_loading_fails_loudly(state, says):
    with pytest.raises(ValueError, match=says):
        M.load_weights(small(), state)


def test_a_file_with_code_in_it_is_refused_and_nothing_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save({"model": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="could run code"):
        M.read_weights(tmp_path / "bad.pt")
    for text in ("hello", "# a title", "\x89PNG"):
        (tmp_path / "text.pt").write_text(text)
        with pytest.raises(ValueError, match="damaged or of another kind"):
            M.read_weights(tmp_path / "text.pt")
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "mae.pth")
    assert M.read_weights(tmp_path / "mae.pth")["args"].lr == 1
    assert not (tmp_path / "executed").exists()


def test_flops_are_those_of_the_formula():
    """2 per multiply-add: T tokens cost 24 T D^2 + 4 T^2 D a block; patches 2 N p p C D."""
    model, D, N, C = M.ViT(32, 8, 32, 2, 2), 32, 16, 3
    T = N + 1
    assert M.flops(model, torch.zeros(1, 3, 32, 32)) == 2 * (24 * T * D * D + 4 * T * T * D) + 2 * N * 64 * C * D


def test_the_command_prints_every_model_and_exports(capsys, tmp_path):
    M.main([])
    said = capsys.readouterr().out
    assert all(name in said for name in M.MODELS) and "blocks.0 (1, 50, 768)" in said and "layer4 (1, 2048, 7, 7)" in said
    for key, prefix in (("model", ""), ("state_dict", "module.")):
        torch.save({key: {prefix + k: v for k, v in small().state_dict().items()}, "step": 1}, tmp_path / "checkpoint.pt")
        M.main(["--export", str(tmp_path / "checkpoint.pt"), str(tmp_path / "vit.pth")])
        M.ViT(32, 8, 32, 2, 2).load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True), strict=True)
    with pytest.raises(SystemExit) as stop:
        M.main(["--export", str(tmp_path / "nowhere.pt"), "x"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_decoder_of_another_shape_names_the_option():
    for model, other in ((small(), small(decoder_dim=32)), (small(), small(decoder_depth=2)), (small(decoder_depth=2), small())):
        with pytest.raises(ValueError, match="--decoder"):
            M.load_weights(model, other.state_dict())


# ResNet ------------------------------------------------------------------------------------------------

def official(name, **kw):
    """torchvision's, with running statistics and affine parameters that are not all zero and one."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(**kw)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for x, (low, high) in ((m.running_mean, (-.1, .1)), (m.running_var, (.8, 1.2)), (m.weight, (.5, .9)), (m.bias, (-.2, .2))):
                torch.nn.init.uniform_(x, low, high)
    return model


@pytest.mark.parametrize("name", M.RESNETS)
def test_resnet_equals_torchvisions(name):
    """Same names, same weights: the same class scores to 1e-5, and in training the same batch statistics."""
    theirs, ours = official(name, num_classes=10), M.encoder(name, (64, 96), num_classes=10)
    assert not any(ours.load_state_dict(theirs.state_dict(), strict=True))
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = theirs.eval()(ours.normalize(x)), ours.eval()(x)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        theirs.train()(ours.normalize(x)), ours.train()(x)
    assert torch.allclose(ours.layer4[0].bn1.running_var, theirs.layer4[0].bn1.running_var, rtol=1e-4)


def test_a_checkpoint_exports_to_plain_torchvision(tmp_path):
    """torchvision takes it with only `fc` missing; and the other way in."""
    ours = M.to_device(M.recovery_model("resnet50", 64), torch.device("cpu"))
    torch.save(dict(model=ours.state_dict(), step=1), tmp_path / "checkpoint.pt")
    M.main(["--export", str(tmp_path / "checkpoint.pt"), str(tmp_path / "resnet.pth")])
    theirs = torchvision.models.resnet50()
    report = theirs.load_state_dict(torch.load(tmp_path / "resnet.pth", weights_only=True), strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"] and not report.unexpected_keys
    x = torch.rand(1, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(ours.normalize(x)), ours.eval().encode(x).mean((2, 3)), atol=1e-4)
    report = M.load_weights(M.recovery_model("resnet50", 64), torchvision.models.resnet50().state_dict())
    assert report.missing[:2] == ["mask_token", "decoder_pred.weight"] and report.unexpected == ["fc.weight", "fc.bias"]


def test_a_token_vit_exports_to_plain_timm():
    source = with_token("vit", 2, "scaled")
    plain = M.ViT(64, 8, 32, 3, 2).eval()
    plain.load_state_dict(M.export(source.state_dict()), strict=True)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(plain(x), source.encode(x)[:, 0])


def test_a_resnet_refuses_sizes_its_stages_do_not_divide():
    for size, says in ((48, "48x48 is not divisible by the stride of the last stage 32"), ((64, 96), "64x96 is not divisible by the patch size 20")):
        with pytest.raises(ValueError, match=says):
            M.recovery_model("resnet18", size, 20 if says.endswith("20") else 16)


# the mask token inside (A2 section 4) -------------------------------------------------------------------

def with_token(name, at, how="add", size=64, patch=8, **kw):
    torch.manual_seed(0)
    if name == "vit":
        return M.TokenViT(size, patch, 32, 3, 2, token_at=at, token_how=how, **kw).eval()
    return M.recovery_model(name, size, patch, token_at="none" if at is None else at, token_how=how, **kw).eval()


def trail(model, x, hidden, token=True):
    """The feature maps after layer 0 .. L, as the next layer gets them."""
    maps, encode = [], model.encode

    def recording(images, after):
        def record(l, z):
            maps.append(after(l, z))
            return maps[-1]
        return encode(images, after=record)
    model.encode = recording
    with torch.no_grad():
        model(x, hidden, token=token)
    del model.encode
    return maps


@pytest.mark.parametrize("name, layers", [("vit", 3), ("resnet18", 4)])
def test_token_at_layer_l_changes_nothing_before_l_and_only_hidden_positions_at_l(name, layers):
    """z <- z + T * D(M), after every layer or stage; 64 px, mask cells of 16 px, so that D is exact up to stage 3."""
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cells = torch.tensor([[1, 0, 0, 1] * 4, [0, 1, 1, 1] * 4], dtype=torch.bool).view(2, 1, 4, 4)
    mask = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)                               # 8 x 8 patches
    for at in range(layers + 1):
        model = with_token(name, at)
        with_it, without = (trail(model, x, mask.flatten(1), token) for token in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(with_it[:at], without[:at])) and not torch.equal(with_it[-1], without[-1])
        change = with_it[at] - without[at]
        if name == "vit":
            where = F.pad(mask.flatten(1), (1, 0))[:, :, None].float()
        else:
            side = 64 // (4 << max(0, at - 1)) if at else 16
            where = F.adaptive_avg_pool2d(cells.float(), side) if side < 4 else cells.float().repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
        assert torch.allclose(change, (model.mask_token * where).expand_as(change), atol=1e-5), at


def test_adding_replacing_and_the_authors_scaling():
    z, mask = torch.rand(1, 1 + 4, 8), torch.tensor([0., 1., 0., 1., 0.]).view(1, 5, 1)
    at = mask[0, :, 0].bool()
    for how in M.TOKEN_HOWS:
        model = M.TokenViT(16, 8, 8, 2, 2, token_at=1, token_how=how)
        T, out = model.mask_token[0, 0], model.inject(z, mask)
        wanted = {"add": z[0, at] + T, "replace": T.expand(2, -1), "scaled": 1e-6 * z[0, at] + T}[how]
        assert torch.equal(out[0, ~at], z[0, ~at]) and torch.allclose(out[0, at], wanted, atol=1e-9)
        assert ("mask_token_scale" in model.state_dict()) == (how == "scaled")


def test_simmim_replaces_the_patch_embedding_and_keeps_positions():
    """Token at the input, replacing: what was in hidden patches changes nothing; where they are does."""
    model, x = with_token("vit", 0, "replace"), torch.rand(1, 3, 64, 64)
    hidden = torch.zeros(1, 64, dtype=torch.bool)
    hidden[0, :32] = True
    other = x.clone()
    other[:, :, :32] = 0
    with torch.no_grad():
        assert torch.equal(model(x, hidden), model(other, hidden)) and not torch.equal(model(x, hidden), model(x, hidden.flip(1)))
        seen, out = trail(model, x, hidden)[0], model(x, hidden)[0]
    assert not torch.allclose(out[0], out[1], atol=1e-4)                                       # two hidden patches, two places
    assert torch.equal(seen[0, 1:33], model.mask_token[0].expand(32, -1))


@pytest.mark.parametrize("size, patch, unit", [(224, 16, 2), (64, 8, 2), (64, 16, 2), (64, 16, 1)])
def test_the_mask_at_stage_resolution_is_exact(size, patch, unit):
    """D(M): 0 or 1 at the output of stage 3, the same share hidden as in the picture, each cell in its place."""
    import degrade
    model = M.recovery_model("resnet18", size, patch)
    hidden = degrade.random_mask(3, size // patch, 0.6, unit, torch.Generator().manual_seed(0))
    mask = model.downsample(torch.zeros(3, 256, size // 16, size // 16), hidden)
    assert mask.shape == (3, 1, size // 16, size // 16) and set(mask.unique().tolist()) == {0, 1}
    pixels = degrade.patch_pixels(hidden, patch, model.grid)
    assert torch.equal(mask.bool().repeat_interleave(16, 2).repeat_interleave(16, 3), pixels)


def test_a_position_larger_than_a_cell_gets_the_hidden_share():
    model = M.recovery_model("resnet18", 32, 8)
    hidden = torch.tensor([1, 0, 0, 0] + [0, 1, 1, 1] + [1, 1, 0, 0] + [1, 1, 0, 0], dtype=torch.bool)[None]
    assert model.downsample(torch.zeros(1, 256, 2, 2), hidden).flatten().tolist() == [0.5, 0.5, 1, 0]
    model = M.recovery_model("resnet18", 96, 12)                                               # 8 columns onto 6
    hidden = (torch.arange(64) % 8 == 1)[None]
    assert torch.allclose(model.downsample(torch.zeros(1, 256, 6, 6), hidden)[0, 0, 0], torch.tensor([.25, .5, 0, 0, 0, 0]))
    model = M.recovery_model("resnet18", (64, 96), 32)                                         # 2 x 3 patches onto 4 x 1
    shares = model.downsample(torch.zeros(1, 256, 4, 1), torch.tensor([[True, False, False, True, True, False]]))
    assert shares.flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 64), (96, 32), (64, 64)])
def test_lower_precision_changes_little(size):
    """bf16 on a CPU, down to feature maps one pixel wide (where some of torch's kernels are wrong)."""
    torch.manual_seed(0)
    model, x = M.to_device(M.recovery_model("resnet18", size, 8), torch.device("cpu")), torch.rand(4, 3, *size)
    with torch.no_grad():
        want = model.train()(x, hidden(4, size[0] * size[1] // 64))
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x, hidden(4, size[0] * size[1] // 64))
    assert (got - want).abs().mean() < 0.15 * want.abs().mean()


@pytest.mark.parametrize("name, at", [("vit_tiny", 5), ("vit_small", 5), ("vit_base", 8), *((n, 3) for n in M.RESNETS)])
def test_the_papers_place_of_the_token(name, at):
    assert M.token_layer(name, "middle") == at
    for text, layer in (("none", None), ("input", 0), ("0", 0), (4, 4), ("4", 4)):
        assert M.token_layer(name, text) == layer
    for wrong in ("deep", "-1", "99"):
        with pytest.raises(ValueError, match=f"token_at {wrong}: {name} takes"):
            M.token_layer(name, wrong)


def test_pixel_shuffle_head_puts_pixels_in_their_patches():
    """The 32 x 32 pixels of position (i, j), whatever the patch size: patches as losses.patchify cuts them."""
    import losses
    for patch in (8, 16, 32):
        model = M.recovery_model("resnet18", (64, 96), patch)
        z = torch.rand(2, 512, 2, 3)
        picture = F.pixel_shuffle(model.decoder_pred(z), 32)
        assert torch.equal(model.predict(z), losses.patchify(picture, patch)) and picture.shape == (2, 3, 64, 96)
        assert torch.equal(picture[0, 1, 32 + 5, 64 + 7], model.decoder_pred(z)[0, 1024 + 5 * 32 + 7, 1, 2])


@pytest.mark.parametrize("size, channels", [((64, 96), 1), ((96, 64), 5)])
@pytest.mark.parametrize("name", ["vit_micro", "resnet18", "resnet50"])
def test_token_models_take_non_square_images_and_any_number_of_channels(name, size, channels):
    model, N = M.recovery_model(name, size, 8, channels, token_at="middle"), size[0] * size[1] // 64
    assert model(torch.rand(2, channels, *size), hidden(2, N)).shape == (2, N, 64 * channels)


def test_no_token_is_no_parameter():
    model = M.recovery_model("resnet18", 64, 8, token_at="none")
    assert not any(n.startswith("mask_token") for n in model.state_dict())
    assert torch.equal(model.eval()(torch.ones(1, 3, 64, 64), hidden(1, 64)), model(torch.ones(1, 3, 64, 64)))


def test_what_a_model_cannot_have_is_said():
    for kw, says in ((dict(name="resnet18", token_at="decoder"), "has to see every pixel"), (dict(name="resnet18", relative_positions=True, token_at=3), "has no attention"),
                     (dict(name="vit_micro", token_at=2, decoder="1x8x2"), "there is no decoder")):
        with pytest.raises(ValueError, match=says):
            M.recovery_model(img_size=64, patch_size=16, **kw)


# relative position bias (A2 A.2) -------------------------------------------------------------------------

def test_relative_index_by_hand():
    """A row for each offset (dy, dx), column fastest; cls apart."""
    index, (gh, gw) = M.relative_index((2, 3)), (2, 3)
    place = [(r, c) for r in range(gh) for c in range(gw)]
    for a, (ra, ca) in enumerate(place):
        for b, (rb, cb) in enumerate(place):
            assert index[1 + a, 1 + b] == (ra - rb + gh - 1) * 5 + ca - cb + gw - 1
    assert index[0, 1:].unique().tolist() == [15] and index[1:, 0].unique().tolist() == [16] and index[0, 0] == 17


def test_relative_positions_start_at_zero_and_add_to_the_scores():
    torch.manual_seed(0)
    plain, x = M.ViT(32, 8, 32, 2, 2).eval(), torch.rand(2, 3, 32, 32)
    biased = M.ViT(32, 8, 32, 2, 2, relative_positions=True).eval()
    report = M.load_weights(biased, plain.state_dict())
    assert [n.split(".")[-1] for n in report.missing] == ["relative_position_bias_table"] * 2
    assert torch.allclose(plain(x), biased(x), atol=1e-6)
    torch.nn.init.normal_(biased.blocks[0].attn.relative_position_bias_table)
    assert not torch.allclose(plain(x), biased(x), atol=1e-3)
    q, k, v = torch.randn(3, 2, 2, 17, 16)
    bias = F.embedding(M.relative_index((4, 4))[None], torch.randn(52, 2)).permute(0, 3, 1, 2)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert torch.allclose(M.attend(q, k, v, bias), want, atol=1e-5)


def test_dropped_patches_keep_their_relative_positions():
    """Of what is visible, each pair has the bias of its places in the picture: keys that nobody may look at are as good as dropped."""
    torch.manual_seed(0)
    model = small(relative_positions=True, depth=1)
    table = model.blocks[0].attn.relative_position_bias_table
    torch.nn.init.normal_(table)
    x, h = torch.rand(1, 3, 32, 32), hidden(1, 16)
    dropped = model.encode(x, h)
    index = model.relative_index.clone()
    table.data = torch.cat([table.data, torch.full((1, 2), -1e9)])
    model.relative_index = torch.where(F.pad(h[0], (1, 0))[None, :], len(table) - 1, index)
    assert torch.allclose(dropped, model.encode(x)[:, ~F.pad(h[0], (1, 0))], atol=1e-5)


def test_relative_position_tables_are_resized():
    sideways = torch.cat([torch.arange(-3., 4).repeat(7), torch.zeros(3)])[:, None]                   # the bias is dx, whatever dy
    assert torch.allclose(M.resize_relative(sideways, (6, 4))[:-3, 0], torch.arange(-3., 4).repeat(11), atol=1e-5)
    source = M.ViT(32, 8, 32, 1, 2, relative_positions=True)
    torch.nn.init.normal_(source.blocks[0].attn.relative_position_bias_table)
    table = source.blocks[0].attn.relative_position_bias_table.data
    assert torch.allclose(M.resize_relative(table, (4, 4)), table, atol=1e-6)
    target = M.ViT((48, 32), 8, 32, 1, 2, relative_positions=True)
    report = M.load_weights(target, source.state_dict())
    name = "blocks.0.attn.relative_position_bias_table"
    assert name in report.resized and target.state_dict()[name].shape == (11 * 7 + 3, 2)
    assert torch.equal(target.state_dict()[name][-3:], table[-3:])
    assert torch.allclose(target.state_dict()[name][5 * 7 + 3], table[3 * 7 + 3], atol=1e-6)     # offset (0, 0) stays


# weights between the two ways of recovering ---------------------------------------------------------------

def test_a_backbone_goes_from_one_way_of_recovering_to_the_other():
    pairs = [(small(decoder_dim=d), M.TokenViT(32, 8, 32, 2, 2)) for d in (16, 32)]             # 32: every shape agrees
    for source, target in [pair[::step] for pair in pairs for step in (1, -1)]:
        before = target.mask_token.clone()
        report = M.load_weights(target, source.state_dict())
        assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
        assert torch.equal(target.mask_token, before) and "mask_token" in report.unexpected
        assert {"mask_token", "decoder_pred.weight"} <= set(report.missing) and not any(n.startswith("blocks") for n in report.missing)
