"""ViT and encoder-decoder (BM 3.2, A.1; MAE): names, positions, masking, weights in and out."""
import argparse
import math
import os

import pytest
import torch

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
    model = M.encoder_decoder("vit_base", decoder="8x512x16")
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


def test_features_in_eval_are_deterministic():
    model, x = small().eval(), torch.rand(2, 3, 32, 32)
    assert torch.equal(model.encode(x), model.encode(x))


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
    (M.ViT(32, 8, 64, 2, 2).state_dict(), r"\(1, 1, 64\) in the weights and \(1, 1, 32\)")])
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
    assert all(name in said for name in M.MODELS) and "(1, 50, 768)" in said
    torch.save(dict(model=small().state_dict(), step=1), tmp_path / "checkpoint.pt")
    M.main(["--export", str(tmp_path / "checkpoint.pt"), str(tmp_path / "vit.pth")])
    M.ViT(32, 8, 32, 2, 2).load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True), strict=True)
    with pytest.raises(SystemExit) as stop:
        M.main(["--export", str(tmp_path / "nowhere.pt"), "x"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_decoder_of_another_shape_names_the_option():
    with pytest.raises(ValueError, match="--decoder"):
        M.load_weights(small(), small(decoder_dim=32).state_dict())
