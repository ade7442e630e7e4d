"""BM sections 3.2, 4.1, A.1 - A.3: each degradation, on pictures small enough to check by hand."""
import colorsys
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import degrade as D

def seed(n=0):
    return torch.Generator().manual_seed(n)


# (m) hidden patches ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", D.MASKS)
@pytest.mark.parametrize("grid, ratio, unit, hidden", [
    (14, 0.75, 1, 147), (14, 0.6, 2, 120), (8, 0.75, 1, 48), ((6, 10), 0.5, 2, 32), (4, 0.0, 1, 0), (7, 0.999, 1, 48)])
def test_every_row_hides_exactly_the_same_number(kind, grid, ratio, unit, hidden):
    """14x14 at 75%: 147. A2's 32 px cells: 30 of 7x7 (60%), 120 patches. A centred rectangle comes as near as it can."""
    if kind == "center":
        hidden = {120: 4 * (49 - 4 * 4), 32: 4 * (15 - 2 * 3)}.get(hidden, hidden)
    m = D.MASKS[kind](32, grid, ratio, unit, seed())
    gh, gw = D.pair(grid)
    assert m.shape == (32, gh * gw) and m.dtype == torch.bool
    assert m.sum(1).tolist() == [hidden] * 32


def test_random_mask_is_uniform_and_blocks_are_whole_cells():
    m = D.random_mask(4000, 4, 0.75, generator=seed()).float().mean(0)
    assert (m - 0.75).abs().max() < 0.03
    cells = D.random_mask(8, 8, 0.6, unit=2, generator=seed()).view(8, 4, 2, 4, 2)
    assert (cells == cells[:, :, :1, :, :1]).all()


def test_block_mask_leaves_one_contiguous_region_visible():
    for visible in ~D.block_mask(64, (9, 14), 0.75, generator=seed(1)).view(64, 9, 14):
        reached = torch.zeros_like(visible)
        reached[tuple(visible.nonzero()[0])] = True
        for _ in range(40):                                     # grow over the visible neighbours
            grown = F.max_pool2d(reached[None].float(), 3, 1, 1)[0] > 0
            side = F.pad(reached, (1, 1, 1, 1))
            cross = side[:-2, 1:-1] | side[2:, 1:-1] | side[1:-1, :-2] | side[1:-1, 2:] | reached
            reached = grown & cross & visible
        assert (reached == visible).all()
    for grid in (14, (9, 14)):                                  # it may lie anywhere, the corners too, and most often in the middle
        gh, gw = D.pair(grid)
        share = (~D.block_mask(4000, grid, 0.75, generator=seed(1))).float().mean(0).view(gh, gw)
        assert share.min() > 0 and share[gh // 2, gw // 2] > 0.5


def test_center_mask_shows_the_inner_block():
    visible = ~D.center_mask(1, 14, 0.49).view(14, 14)
    assert visible[2:12, 2:12].all() and visible.sum() == 100


@pytest.mark.parametrize("arguments, says", [((4, 14, 1.0), "outside"), ((4, 14, -0.1), "outside"), ((4, 14, 0.5, 3), "tile")])
def test_masks_refuse(arguments, says):
    with pytest.raises(ValueError, match=says):
        D.random_mask(*arguments)


# resampling --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cubic", [False, True])
def test_crop_resize_equals_torch_antialiased_interpolation(cubic):
    x = torch.rand(2, 3, 17, 23, generator=seed())
    box = torch.tensor([[0.0, 0, 17, 23]] * 2)
    for size in ((9, 11), (30, 40)):
        want = F.interpolate(x, size, mode="bicubic" if cubic else "bilinear", antialias=True)
        assert torch.allclose(D.crop_resize(x, box, size, cubic), want, atol=2e-5)


# (a) ---------------------------------------------------------------------------------------------------

def test_zoom_in_by_hand():
    """The central 2x2 of 4x4 at twice its size: bilinear weights 3/4 and 1/4 between the two pixel centres."""
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1:3, 1:3] = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    row = torch.tensor([0, 0.25, 0.75, 1.0])
    assert torch.allclose(D.zoom_in(x, zoom_size=2)[0, 0], row[None, :] + 2 * row[:, None], atol=1e-6)


def test_zoom_in_of_a_larger_view_is_its_centre_unscaled():
    """BM A.1: crop 320, pick the central 224."""
    x = torch.rand(2, 3, 320, 320, generator=seed())
    assert torch.equal(D.zoom_in(x, size=224), x[:, :, 48:272, 48:272])
    d = D.degrade(x, "zoom_in", 224)
    assert torch.equal(d.inputs, x[:, :, 48:272, 48:272]) and d.target.shape == (2, 3, 224, 224) and d.counted is None


def test_zoom_in_default_is_160_of_224_and_random_centres_differ():
    x = torch.rand(3, 3, 224, 224, generator=seed())
    assert torch.equal(D.zoom_in(x), D.zoom_in(x, zoom_size=160))
    same = x[:1].expand(3, -1, -1, -1)
    a = D.zoom_in(same, zoom_size=100, zoom_at="random", generator=seed())
    assert not torch.equal(a[0], a[1])
    for wrong in (225, 0, "rand"):
        with pytest.raises(ValueError, match=f"zoom size {wrong}"):
            D.zoom_in(x, zoom_size=wrong)


# (b) ---------------------------------------------------------------------------------------------------

def test_zoom_out_by_hand():
    """8 px shrunk to 4: source pixel centres at 1 and 3 px ... of a triangle filter two pixels wide."""
    x = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    inner = [(0.75 * 0 + 0.75 * 1 + 0.25 * 2) / 1.75, 2.5, 4.5, (0.75 * 7 + 0.75 * 6 + 0.25 * 5) / 1.75]
    across, down = D.zoom_out(x, 4, generator=seed(2))[0, 0], D.zoom_out(x.mT, 4, generator=seed(2))[0, 0].T
    for out, u in ((across, torch.rand(1, 3, generator=seed(2))[0, 2]), (down, torch.rand(1, 3, generator=seed(2))[0, 1])):
        first = int(u * 5)
        mirrored = [*inner[::-1], *inner, *inner[::-1]][4 - first:12 - first]
        assert torch.allclose(out, torch.tensor(mirrored).expand(8, 8), atol=1e-5)


@pytest.mark.parametrize("size", [96, 128, 160, 192, "rand"])
def test_zoom_out_mirror_is_continuous_at_the_seam(size):
    """No step of the canvas is larger than the largest step inside the shrunk picture."""
    y = torch.linspace(0, 1, 224)
    x = (y[:, None] + y[None, :] ** 2).expand(4, 1, 224, 224)
    out = D.zoom_out(x, zoom_size=size, generator=seed(3))
    steepest = 1.1 * (224 / (96 if size == "rand" else size)) * 2 / 223
    assert out.diff(dim=2).abs().max() < steepest and out.diff(dim=3).abs().max() < steepest


def test_zoom_out_whole_canvas_is_the_identity():
    x = torch.rand(2, 3, 12, 20, generator=seed())
    assert torch.allclose(D.zoom_out(x, zoom_size=12, generator=seed()), x, atol=1e-6)


def test_zoom_out_fills():
    x = torch.rand(2, 3, 16, 16, generator=seed()) + 0.1
    mirror, black, other, none = (D.zoom_out(x, 8, fill, seed(2)) for fill in ("mirror", "black", "other", "none"))
    inside = (black != 0).all(1, keepdim=True)
    assert inside.sum((1, 2, 3)).tolist() == [64, 64]
    assert torch.equal(mirror[inside.expand_as(x)], black[inside.expand_as(x)])
    assert torch.equal(other, torch.where(inside, mirror, x.flip(0)))
    assert torch.allclose(none, D.scaled(D.scaled(x, (8, 8)), (16, 16)))
    with pytest.raises(ValueError, match="even"):
        D.zoom_out(x[:1], 8, "other", seed())
    with pytest.raises(ValueError, match="outside"):
        D.zoom_out(x, 17)


# (c) ---------------------------------------------------------------------------------------------------

def test_fisheye_with_twist_zero_is_the_identity():
    x = torch.rand(3, 3, 9, 13, generator=seed())
    assert torch.allclose(D.fisheye(x, (0, 0), seed()), x, atol=1e-5)


def test_fisheye_by_formula():
    """A pixel at distance r of the centre c shows what lay at r - t r^2 on the same ray: read off two ramps."""
    y, x = torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8)
    ramps = torch.stack([x[None, :].expand(8, 8), y[:, None].expand(8, 8)])[None]
    out, u = D.fisheye(ramps, (0.1, 0.4), seed(4))[0], torch.rand(1, 3, generator=seed(4))[0]
    (cx, cy), t = (2 * u[:2] - 1).tolist(), 0.1 + 0.3 * u[2].item()
    for i in range(8):
        for j in range(8):
            r = math.hypot(x[j] - cx, y[i] - cy)
            shrink = (r - t * r * r) / r
            assert out[0, i, j].item() == pytest.approx(cx + (x[j].item() - cx) * shrink, abs=1e-5)
            assert out[1, i, j].item() == pytest.approx(cy + (y[i].item() - cy) * shrink, abs=1e-5)


def test_fisheye_of_a_larger_view():
    """BM A.3: distort 288, resize to 224, recover the central 224."""
    x = torch.rand(1, 3, 288, 288, generator=seed())
    d = D.degrade(x, "distort", 224, 16, seed(), view_size=288)
    assert torch.equal(d.target, x[:, :, 32:256, 32:256])
    assert torch.equal(d.inputs, D.scaled(D.fisheye(x, generator=seed()), (224, 224)))


def test_wave_moves_each_row_round_the_edge():
    """No pixel is missing: each row keeps its sum; by hand, a shift of one pixel where the sine is 1."""
    x = torch.rand(2, 3, 16, 16, generator=seed())
    out = D.wave(x, generator=seed(1))
    assert torch.allclose(out.sum(3), x.sum(3), atol=1e-4) and not torch.allclose(out, x, atol=0.05)
    phase = torch.rand(2, 1, generator=seed(1))[0, 0].item()
    shift = 2 / 16 * 16 * math.sin(2 * math.pi * (3 / 8 + phase))
    row, at = x[0, 0, 3], 5 + shift
    low = math.floor(at)
    want = row[low % 16] * (1 - at + low) + row[(low + 1) % 16] * (at - low)
    assert D.wave(x, height=2 / 16, generator=seed(1))[0, 0, 3, 5].item() == pytest.approx(want.item(), abs=1e-5)


# (d) ---------------------------------------------------------------------------------------------------

def test_blur_by_hand():
    """Each channel with its own kernel ~ N(1/9, 0.02^2), edges repeated: written out on 8x8."""
    x = torch.rand(2, 3, 8, 8, generator=seed())
    out = D.blur(x, 3, seed(1))
    after = seed(1)
    kernel = 1 / 9 + 0.02 * torch.randn(2, 3, 3, 3, generator=after)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    for b, c, i, j in [(0, 0, 0, 0), (0, 1, 3, 4), (1, 2, 7, 7), (1, 0, 0, 5)]:
        assert out[b, c, i, j].item() == pytest.approx((padded[b, c, i:i + 3, j:j + 3] * kernel[b, c].numpy()).sum(), abs=1e-5)


def test_blur_keeps_channels_apart_and_the_size():
    x = torch.zeros(1, 3, 12, 20)
    x[0, 1] = 1
    out = D.blur(x, 9, seed())
    assert out.shape == x.shape and out[0, 0].abs().sum() == 0 and out[0, 2].abs().sum() == 0 and out[0, 1].abs().min() > 0


def test_blur_rand_draws_a_size_for_each_image():
    x = torch.zeros(64, 1, 23, 23)
    x[:, :, 11, 11] = 1
    sizes = (D.blur(x, "rand", seed()) != 0).any(3).sum((1, 2))
    assert sorted(set(sizes.tolist())) == [5, 7, 9, 11]
    with pytest.raises(ValueError, match="odd"):
        D.blur(x, 4)


# (e) ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("saturation", [0.0, 0.3, 0.6, 1.0])
def test_desaturate_equals_hsv_there_and_back(saturation):
    x = torch.rand(1, 3, 4, 4, generator=seed(), dtype=torch.float64)
    out = D.desaturate(x, saturation)
    for i in range(4):
        for j in range(4):
            h, s, v = colorsys.rgb_to_hsv(*x[0, :, i, j].tolist())
            assert out[0, :, i, j].tolist() == pytest.approx(colorsys.hsv_to_rgb(h, s * saturation, v), abs=1e-9)
    if saturation == 0:
        assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 1], out[:, 2])


# the integrated task -----------------------------------------------------------------------------------

def test_zoom_in_mask_is_the_geometry_of_bms_appendix():
    """BM A.2: the central 224 of a 320 view is the input, unscaled; 147 of 196 patches hidden; all of the view is the target."""
    assert D.view_size("zoom_in_mask", 224) == (320, 320)
    x = torch.rand(2, 3, 320, 320, generator=seed())
    d = D.degrade(x, "zoom_in_mask", 224, 16, seed())
    assert torch.equal(d.inputs, x[:, :, 48:272, 48:272]) and torch.equal(d.target, x)
    assert "zoom_size" not in D.task_settings("zoom_in_mask")      # the centre is as it is, or its patches would mean others
    assert d.hidden.sum(1).tolist() == [147, 147] and torch.equal(d.counted, d.hidden)


# fill (A2 section 4) ---------------------------------------------------------------------------------

def test_mean_fill_takes_all_pixels_and_leaves_the_visible_ones():
    """Hidden patches get the mean RGB of the image, over visible and hidden pixels alike; by hand on 4 x 4."""
    x = torch.arange(32.).view(1, 2, 4, 4) / 32
    hidden = torch.tensor([[True, False, False, False]])
    out = D.fill_hidden(x, hidden, 2)
    for c in range(2):
        assert torch.allclose(out[0, c, :2, :2], torch.full((2, 2), float(x[0, c].mean())))
    visible = ~D.patch_pixels(hidden, 2, (2, 2)).expand_as(x)
    assert torch.equal(out[visible], x[visible]) and not torch.equal(out, x)


@pytest.mark.parametrize("channels", [1, 3])
def test_zero_fill_is_zero_after_the_models_normalisation(channels):
    import models
    x, hidden = torch.rand(2, channels, 32, 32), torch.rand(2, 16) < 0.5
    pixels = D.patch_pixels(hidden, 8, (4, 4)).expand_as(x)
    model = models.ViT(32, 8, 32, 1, 2, channels)
    for fill in ("zero", "token"):
        assert model.normalize(D.fill_hidden(x, hidden, 8, fill))[pixels].abs().max() < 1e-6
    with pytest.raises(ValueError, match="unknown fill 'noise'"):
        D.fill_hidden(x, hidden, 8, "noise")


def test_a2mim_hides_60_percent_in_cells_of_32_px():
    """A2 5.1: 224 px are 7 x 7 cells of 2 x 2 patches, 30 of the 49 hidden (19 visible, rounded down as MAE does)."""
    view = torch.rand(3, 3, 224, 224, generator=seed())
    for task in ("a2mim", "simmim"):
        d = D.degrade(view, task, generator=seed())
        cells = d.hidden.view(3, 7, 2, 7, 2)
        assert (d.hidden.sum(1) == 30 * 4).all() and (cells.any(4).any(2) == cells.all(4).all(2)).all()
        assert d.filled and torch.equal(d.counted, d.hidden) and torch.equal(d.target, view)
    pixels = D.patch_pixels(d.hidden, 16, (14, 14)).expand_as(view)
    filled = D.degrade(view, "a2mim", generator=seed()).inputs
    assert torch.equal(filled[~pixels], view[~pixels])
    for b in range(3):
        assert torch.allclose(filled[b, 1][pixels[b, 1]], view[b, 1].mean())


def test_the_defaults_are_the_papers_best():
    """BM Table 2: 160 of 224, twist .20-.25, 9x9, saturation 30%; MAE's 75%, of which only hidden patches are compared."""
    x = torch.rand(4, 3, 56, 56, generator=seed())
    for task, settings in (("zoom_in", dict(zoom_size=40)), ("zoom_out", dict(zoom_size=40)), ("distort", dict(twist=(0.20, 0.25))),
                           ("blur", dict(blur_kernel=9)), ("decolor", dict(saturation=0.3)), ("mask", dict(mask_ratio=0.75))):
        default, given = D.degrade(x, task, 56, 4, seed()), D.degrade(x, task, 56, 4, seed(), **settings)
        assert torch.equal(default.inputs, given.inputs) and default.counted is default.hidden
    heights = (D.zoom_out(torch.ones(200, 1, 224, 8), "rand", "black", seed())[:, 0] != 0).any(2).sum(1)
    assert sorted(set(heights.tolist())) == [96, 128, 160, 192]


# every task --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", D.TASKS)
@pytest.mark.parametrize("channels, size", [(3, (32, 32)), (1, (32, 48)), (5, (48, 32))])
def test_shapes_for_non_square_images_and_other_channels(task, channels, size):
    view = torch.rand(4, channels, *D.view_size(task, size), generator=seed())
    before = view.clone()
    d = D.degrade(view, task, size, 8, seed())
    assert d.inputs.shape == (4, channels, *size) and torch.equal(view, before)
    assert d.hidden is None or d.hidden.shape == (4, size[0] * size[1] // 64)
    assert d.inputs.isfinite().all() and D.seen(d, 8).shape == d.target.shape == D.paste_visible(d.target, d, 8).shape


SETTINGS = [                                                    # BM Table 2 and A.3
    *[("zoom_in", dict(zoom_size=s)) for s in (96, 128, 160, 192, 208)], ("zoom_in", dict(zoom_at="random")),
    ("zoom_in", dict(view_size=320)), ("mask", dict(mask_kind="block")), ("mask", dict(mask_kind="center", mask_ratio=0.49)),
    *[("zoom_out", dict(zoom_size=s)) for s in (96, 128, 160, 192, "rand")],
    *[("zoom_out", dict(zoom_fill=f)) for f in ("none", "black", "other")],
    *[("distort", dict(twist=t)) for t in ((0.15, 0.2), (0.2, 0.25), (0.25, 0.3))],
    ("distort", dict(warp="wave")), ("distort", dict(view_size=288)),
    *[("blur", dict(blur_kernel=k)) for k in (5, 7, 9, 11, "rand")], *[("decolor", dict(saturation=s)) for s in (0, 0.3, 0.6)],
    ("zoom_in", dict(mask_ratio=0.75)), ("zoom_out", dict(mask_ratio=0.75)), ("zoom_in_mask", dict(mask_ratio=0.6, mask_unit=2)),
]


@pytest.mark.parametrize("task, settings", SETTINGS, ids=lambda x: str(x))
def test_every_setting_of_table_2_and_a3(task, settings):
    """It runs, the same seed gives the same result, another seed another one where the task is random; and a part
    of a batch is damaged as it is within the whole."""
    size = (224, 224)
    view = torch.rand(4, 3, *D.view_size(task, size, settings.get("view_size")), generator=seed())
    a, b, other = (D.degrade(view, task, size, 16, seed(s), **settings) for s in (7, 7, 8))
    part = D.degrade(view[2:], task, size, 16, seed(7), (2, 4), **settings)
    for x, y, z in zip(a[:4], b, part):
        assert (x is None and y is None and z is None) or (torch.equal(x, y) and torch.allclose(x[2:].float(), z.float(), atol=1e-5))
    fixed = task in ("decolor",) or (task == "zoom_in" and settings.get("zoom_at") != "random" and "mask_ratio" not in settings) \
        or settings.get("mask_kind") == "center" or settings.get("zoom_fill") == "none"
    changed = not torch.equal(a.inputs, other.inputs) or (a.hidden is not None and not torch.equal(a.hidden, other.hidden))
    assert changed != fixed


@pytest.mark.parametrize("call, says", [
    (lambda x: D.degrade(x, "sharpen"), "unknown task 'sharpen'"), (lambda x: D.degrade(x, "mask", saturation=1), "no setting 'saturation'"),
    (lambda x: D.view_size("zoom_in", 32, 16), "view size 16"), (lambda x: D.view_size("zoom_in", 32, 33), "view size 33"),
    (lambda x: D.degrade(x, "zoom_in", 64, 8), "smaller than"), (lambda x: D.zoom_in(x, (64, 64)), "smaller than"),
    (lambda x: D.degrade(x, "mask", patch_size=8, mask_kind="center", mask_ratio=0.05), "hides none")])
def test_what_degrade_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.zeros(2, 3, 32, 32))


def test_the_demo_writes_one_picture_with_every_task(tmp_path, capsys):
    from PIL import Image
    D.main(["--out", str(tmp_path / "a.png")])
    Image.open(tmp_path / "a.png").resize((300, 200)).save(tmp_path / "photo.jpg")
    D.main([str(tmp_path / "photo.jpg"), "--out", str(tmp_path / "b.png"), "--size", "64"])
    said = capsys.readouterr().out
    assert Image.open(tmp_path / "b.png").width == len(D.TASKS) * 68 + 4 and all(task in said for task in D.TASKS)
    (tmp_path / "bad.jpg").write_text("no picture")
    for wrong in ([str(tmp_path / "bad.jpg")], ["--size", "100"], ["--size", "32"], ["--size", "0"], ["--out", str(tmp_path / "nowhere/x.png")]):
        with pytest.raises(SystemExit) as stop:
            D.main(wrong)
        assert stop.value.code == 2
