"""The degradations of BM 3.2, 4.1, A and of A2 4, on pictures small enough to check by hand."""
import argparse
import colorsys

import pytest
import torch
import torch.nn.functional as F

import degrade as D
from conftest import close, picture


def seed():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", D.MASKS)
@pytest.mark.parametrize("grid, ratio, unit, count", [
    ((14, 14), 0.75, 1, 147),  # BM 4.1
    ((14, 14), 0.6, 2, 120),  # A2 5.1: 30 of the 7 x 7 cells of 32 px
    ((6, 10), 0.5, 2, 32),
    ((7, 7), 0.999, 1, 48),  # one stays visible
])
def test_every_row_hides_as_many_whole_cells(kind, grid, ratio, unit, count):
    """The count is exact."""
    if kind == "center":  # a rectangle comes as near as it can
        count = {120: 4 * 33, 32: 4 * 9}.get(count, count)
    hidden = D.MASKS[kind](32, grid, ratio, unit, seed())
    assert hidden.sum(1).tolist() == [count] * 32
    cells = hidden.view(32, grid[0] // unit, unit, grid[1] // unit, unit)
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))


def test_random_and_center_mask():
    """Random is uniform. Center (BM A.3) shows 160 of 224 px."""
    share = D.random_mask(4000, 4, 0.75, generator=seed()).float().mean(0)
    assert (share - 0.75).abs().max() < 0.03
    visible = ~D.center_mask(1, 14, 0.49).view(14, 14)
    assert visible[2:12, 2:12].sum() == visible.sum() == 100
    assert (~D.random_mask(1, 10, 0.9)).sum() == 10  # .1 of 100 in floats is less


@pytest.mark.parametrize("kind, inside", [("block", False), ("hole", True)])
def test_block_shows_and_hole_hides_one_region(kind, inside):
    """The region is in one piece. Every patch is in it at times. Its aspect is 1/2 to 2."""
    region = D.MASKS[kind](2000, (9, 14), 0.75, generator=seed()).view(-1, 9, 14) == inside
    assert region.any(0).all()
    heights = region.any(2).sum(1).unique().tolist()
    assert heights == ([4, 5, 6, 7, 8] if kind == "block" else [7, 8, 9])
    for cells in region[:50]:
        left = set(map(tuple, cells.nonzero().tolist()))
        edge = [left.pop()]
        for r, c in edge:  # which grows by the neighbours
            near = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} & left
            left -= near
            edge += near
        assert not left


def test_masks_of_ones_own(monkeypatch):
    """A mask is a function that may look at the images; or it is given. zoom_in compares all. Every
    row hides as many patches.
    """
    def dark(images, ratio, patch_size):
        light = F.avg_pool2d(images.mean(1), patch_size).flatten(1)
        return light.argsort(1) < ratio * light.shape[1]

    monkeypatch.setitem(D.MASKS, "dark", dark)
    assert "dark" in D.option("mask_kind", "random")["choices"]
    view = torch.linspace(0, 1, 32)[:, None].expand(2, 3, 32, 32)
    own = (torch.arange(16) < 4).expand(2, 16)
    seen = D.degrade(view, "mask", 32, 8, mask_kind="dark", mask_ratio=0.25)
    given = D.degrade(view, "a2mim", 32, 8, hidden=own)
    assert all(torch.equal(x, own) for x in (seen.hidden, given.hidden, given.counted))
    assert D.degrade(view, "zoom_in", 32, 8, hidden=own).counted is None
    for wrong, says in ((own ^ torch.tensor([[False], [True]]), "4 to 12"), (own & False, "none"),
                        (own.long(), "2 x 16 bool"), (own[:1], "2 x 16 bool")):
        with pytest.raises(ValueError, match=says):
            D.degrade(view, "mask", 32, 8, hidden=wrong)
    with pytest.raises(ValueError, match="uint8"):
        D.degrade((view * 255).byte(), "mask", 32, 8)


@pytest.mark.parametrize("fill, color", [("mean", [7.5, 23.5]), ("zero", [0.45, 0.45])])
def test_a_fill_is_one_color_and_keeps_the_visible_pixels(fill, color):
    """A2 4: the image's mean over all its pixels; or the zero of the model's normalisation."""
    images = torch.arange(32.0).view(1, 2, 4, 4)
    want = images.clone()
    want[0, :, :2, :2] = torch.tensor(color)[:, None, None]
    hidden = torch.tensor([[True, False, False, False]])
    assert close(D.fill_hidden(images, hidden, 2, fill), want)
    rgb = D.fill_hidden(torch.ones(1, 3, 4, 4), hidden, 2, "zero")[0, :, 0, 0]
    assert close(rgb, torch.tensor([0.485, 0.456, 0.406]))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crop_resize_is_antialiased_interpolation(mode):
    images, box = picture(1, 3, 17, 23), torch.tensor([[0.0, 0, 17, 23]])
    want = F.interpolate(images, (9, 30), mode=mode, antialias=True)
    assert close(D.crop_resize(images, box, (9, 30), mode == "bicubic"), want, 2e-5)
    part = D.crop_resize(images, torch.tensor([[1.0, 2, 4, 5]]), (4, 5))
    assert close(part, images[:, :, 1:5, 2:7])


def test_zoom_in_at_the_centre_and_at_random():
    """BM A.3. 2 x 2 of 4 x 4 px become 4 x 4: weights 3/4 and 1/4 between two pixels."""
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(100, -1, -1, -1)
    row = torch.tensor([0, 0.25, 0.75, 1])
    want = row + 4 * row[:, None]  # of the corner at 0
    assert close(D.zoom_in(x, zoom_size=2), 5 + want, 1e-6)
    corner = D.zoom_in(x, 2, 2, "random", seed())[:, 0, 0, 0].round()
    assert corner.unique().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("small", [4, 3])
def test_zoom_out_mirrors_around_a_random_place(small):
    """The canvas is a window of ... c b a a b c c b a ... that has the middle a b c."""
    x = torch.arange(8.0).expand(100, 1, 8, 8)
    inner = F.interpolate(x[:1], (small, small), mode="bilinear", antialias=True)[0, 0, 0]
    mirrored = torch.cat([inner.flip(0), inner] * 4)
    want = torch.stack([mirrored[3 * small - i:][:8] for i in range(9 - small)])[:, None]
    for out in (D.zoom_out(x, small, generator=seed()), D.zoom_out(x.mT, small).mT):
        error = (out - want).abs().amax((2, 3))  # (100, places)
        assert error.amin(1).max() < 1e-5
        assert len(error.argmin(1).unique()) == 9 - small


def test_zoom_out_fills_and_sizes():
    """BM A.3: black, other images, or nothing around. Table 2: one of four sizes."""
    x = picture(2, 3, 16, 16) + 0.1
    mirror, black, other, none = (D.zoom_out(x, 8, fill, seed())
                                  for fill in ("mirror", "black", "other", "none"))
    inside = (black != 0).all(1, keepdim=True)
    assert torch.equal(black, mirror * inside)
    assert torch.equal(other, torch.where(inside, mirror, x.flip(0)))
    assert close(none, D.scaled(D.scaled(x, (8, 8)), (16, 16)))
    for side in (224, 112):
        out = D.zoom_out(torch.ones(100, 1, side, 14), "rand", "black", seed())
        sizes = out[:, 0].any(2).sum(1).unique() * 224 // side
        assert sizes.tolist() == [96, 128, 160, 192]
    assert len(D.zoom_out(torch.ones(100, 1, 4, 4), 3, "black").unique(dim=0)) == 4  # places


def test_zoom_out_among_patches_of_several_images():
    """BM A.3: "patches from other images". They are of the other three of four neighbours,
    which at the end are the last four.
    """
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 32, 32)
    out = D.zoom_out(images, 8, "other", seed(), patch_size=4).round()
    for i, x in enumerate(out):
        first = min(i // 4 * 4, 6)
        four = set(range(first, first + 4))
        assert {*x.unique().tolist()} == four  # its own inside, the others around
        assert (x == i).sum() == 8 * 8


def test_fisheye_formula():
    """A pixel at distance r of c shows what lay at r - t r^2. All agree on c and t."""
    axis = torch.linspace(-1, 1, 9)
    at = torch.stack([axis.expand(9, 9), axis[:, None].expand(9, 9)])  # (2, 9, 9): x, y
    moved = D.fisheye(at.expand(200, -1, -1, -1), (0.15, 0.25), seed()) - at
    pull = moved / moved.norm(dim=1, keepdim=True).sqrt()  # sqrt(t) (c - at)
    root = (pull[:, :1, :1, :1] - pull[:, :1, 8:, 8:]) / 2  # sqrt(t), from two corners
    c = pull[:, :, :1, :1] / root - 1
    r = (c - at).norm(dim=1, keepdim=True)
    assert close(moved, root ** 2 * r * (c - at), 1e-4)
    assert 0.15 <= root.min() ** 2 < 0.16 < 0.24 < root.max() ** 2 <= 0.25
    assert -1 <= c.min() < -0.9 < 0.9 < c.max() <= 1


def test_wave_moves_each_row_by_a_sine():
    """BM A.3: `height` W sin(2 pi y / (`length` H) + phase), round the edge: no pixel is lost."""
    line = torch.eye(16)[8].expand(3, 1, 16, 16)
    move = (D.wave(line, 0.25, 0.5, seed())[:, 0] * torch.arange(16)).sum(2) - 8
    assert close(move.roll(4, 1), -move, 1e-4)  # a period is 8 rows
    assert close(move ** 2 + move.roll(2, 1) ** 2, torch.tensor(16.0), 1e-3)
    assert not close(move[0], move[1], 0.1)
    x = picture(2, 3, 16, 16)
    assert close(D.wave(x, 0.25, 0.5).sum(3), x.sum(3), 1e-4)


def test_blur_kernels():
    """BM A.1: k x k weights ~ N(1 / k^2, 0.02^2), drawn for each image and channel."""
    point = F.pad(torch.ones(64, 3, 1, 1), [11] * 4)
    out = D.blur(point, 9, generator=seed())
    kernel = out[:, :, 7:16, 7:16].flatten(2)  # (64, 3, 81)
    assert (out != 0).sum() == kernel.numel()
    assert kernel.mean() == pytest.approx(1 / 81, abs=6e-4)
    assert kernel.std() == pytest.approx(0.02, rel=0.03)
    assert len(kernel[:, :, 0].unique()) == 64 * 3
    sides = D.blur(point, "rand", generator=seed())[:, 0].any(2).sum(1)
    assert sides.unique().tolist() == [5, 7, 9, 11]
    sums = D.blur(torch.ones(400, 1, 15, 15), "rand", generator=seed())[:, 0, 7, 7]
    assert sums.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("how, deviation", [("kaiming", 2 ** 0.5 / 5), ("xavier", 1 / 5)])
def test_other_kernels(how, deviation):
    """BM A.1: Kaiming's normal has variance 2 / 25 for 5 x 5 weights, Xavier's 2 / (25 + 25)."""
    point = F.pad(torch.ones(200, 3, 1, 1), [3] * 4)
    kernel = D.blur(point, 5, how, seed())[:, :, 1:6, 1:6]
    assert kernel.mean().abs() < 0.01
    assert kernel.std() == pytest.approx(deviation, rel=0.03)


def test_blur_keeps_channels_apart_and_repeats_the_edge():
    out = D.blur(torch.eye(3)[1].view(1, 3, 1, 1).expand(1, 3, 12, 20), 9, generator=seed())[0]
    assert close(out, out[:, 6:7, 10:11])  # each is of one colour
    assert [x != 0 for x in out[:, 6, 10].tolist()] == [False, True, False]
    x = F.pad(picture(1, 3, 12, 18), [1] * 4)
    more = D.blur(F.pad(x, [4] * 4), 9, generator=seed())[..., 4:-4, 4:-4]
    assert close(D.blur(x, 9, generator=seed()), more)


@pytest.mark.parametrize("saturation", [0, 0.3, 0.6, 1])
def test_desaturate_scales_the_saturation_of_hsv(saturation):
    x = picture(16, 3, 1, 1)
    for before, after in zip(x.flatten(1).tolist(), D.desaturate(x, saturation).flatten(1)):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after.tolist() == pytest.approx(colorsys.hsv_to_rgb(h, s * saturation, v), abs=1e-6)


def test_without_a_fill_the_encoder_drops_what_is_hidden():
    view = picture(2, 3, 32, 32)
    d = D.degrade(view, "simmim", 32, 8, seed(), fill=None)
    assert not d.filled and torch.equal(d.inputs, view) and d.hidden.any()


@pytest.mark.parametrize("task, channels, size", [
    (task, channels, size) for task in D.TASKS for channels, size in ((1, (32, 48)), (5, (48, 32)))
    if (task, channels) != ("decolor", 1)])
def test_every_task_takes_any_shape(task, channels, size):
    view = picture(4, channels, *D.view_size(task, size))
    before = view.clone()
    d = D.degrade(view, task, size, 8, seed())
    assert torch.equal(view, before)
    assert d.inputs.shape == (4, channels, *size)
    height, width = 16 + 4 * (16 + 4), 8 + round(16 * size[1] / size[0])
    for few in (1, 2, 5):
        assert D.sheet([d.inputs[:, :few]], [task]).size == (width, height)


@pytest.mark.parametrize("task, hides, name, value", [
    ("mask", 147, "mask_ratio", 0.75),
    ("zoom_in", None, "zoom_size", 160),
    ("zoom_out", None, "zoom_size", 160),
    ("distort", None, "twist", (0.20, 0.25)),
    ("blur", None, "blur_kernel", 9),
    ("decolor", None, "saturation", 0.3),
    ("mask", 147, "mask_kind", "random"),
    ("zoom_in_mask", 147, "mask_ratio", 0.75),
    ("simmim", 120, "fill", "token"),
    ("simmim", 120, "mask_unit", 2),
    ("a2mim", 120, "fill", "mean"),
])
def test_defaults_are_the_papers(task, hides, name, value):
    """BM Table 2's best, A2 5.1. What is hidden is compared, or all."""
    view = picture(1, 3, *D.view_size(task, 224))
    d, same = (D.degrade(view, task, 224, 16, seed(), **x) for x in ({}, {name: value}))
    assert all(x is y or torch.equal(x, y) for x, y in zip(d[:2], same[:2]))
    assert d.counted is d.hidden
    assert hides == (d.hidden if d.hidden is None else d.hidden.sum())


def test_larger_views():
    """BM A.1, A.2: the centre of 320 px, unscaled. Table 1: a fisheye without missing pixels."""
    view = picture(1, 3, *D.view_size("zoom_in_mask", 224))
    zoom, whole, bent = (D.degrade(view, task, 224, generator=seed())
                         for task in ("zoom_in", "zoom_in_mask", "distort"))
    center = view[:, :, 48:272, 48:272]
    assert all(torch.equal(x, center) for x in (zoom.inputs, whole.inputs, bent.target))
    assert torch.equal(bent.inputs, D.scaled(D.fisheye(view, generator=seed()), (224, 224)))
    assert torch.equal(zoom.target, D.scaled(view, (224, 224)))
    assert whole.target is view
    assert D.view_size("mask", (32, 48), 40) == (40, 60)


SETTINGS = {  # BM Table 2 and A.3
    "zoom_in": dict(zoom_size=(96, 128, 160, 192, 208), zoom_at=["random"], mask_ratio=[0.75]),
    "mask": dict(mask_kind=D.MASKS, mask_unit=[2]),
    "zoom_out": dict(zoom_size=(96, 128, 160, 192, "rand"), zoom_fill=("none", "black", "other")),
    "distort": dict(twist=[(0.15, 0.2), (0.2, 0.25), (0.25, 0.3)], warp=["wave"]),
    "blur": dict(blur_kernel=(5, 7, 9, 11, "rand"), blur_init=("kaiming", "xavier")),
    "decolor": dict(saturation=(0, 0.3, 0.6)),
    "a2mim": dict(mask_kind=["hole"]),
}


@pytest.mark.parametrize("task, name, value", [
    (task, name, value) for task in SETTINGS for name in SETTINGS[task]
    for value in SETTINGS[task][name]])
def test_a_seed_is_a_result_for_any_split_and_device(task, name, value):
    """`within` of a batch is the whole batch cut. Numbers are drawn on the CPU, used elsewhere. The
    mask stays on the CPU.
    """
    def go(view, **within):
        return D.degrade(view, task, 224, generator=seed(), **{name: value}, **within)[:4]

    view = picture(8, 3, *D.view_size(task, 224))
    device = "cuda" if torch.cuda.is_available() else "meta"  # "meta" has no numbers
    part = go(view[4:], within=(4, 8))
    places = device, "cpu", device, device
    for x, again, cut, there, place in zip(go(view), go(view), part, go(view.to(device)), places):
        if x is not None:
            assert torch.equal(x, again)
            assert close(x[4:], cut)
            assert there.device.type == place
            assert place == "meta" or close(x, there.cpu(), 1e-4)


def test_a_task_is_a_function_and_a_row(monkeypatch):
    """Its keyword arguments are options. Booleans, None and several numbers are parsed."""
    def turn(images, patch_size, flip=False, gain=None, span=(1, 2)):
        given.append((patch_size, flip, gain, *span))
        return images

    given = []
    monkeypatch.setitem(D.TASKS, "turn", D.Task(turn))
    parser = argparse.ArgumentParser()
    for name, default in D.task_settings("turn").items():
        parser.add_argument(f"--{name}", **D.option(name, default))
    for line in ("--flip True --gain 0.5 --span 3 4", "--flip False --gain None"):
        D.degrade(picture(1, 3, 32, 32), "turn", 32, 8, **vars(parser.parse_args(line.split())))
    assert given == [(8, True, 0.5, 3, 4), (8, False, None, 1, 2)]
    for wrong in ("--flip yes", "--span 3", "--saturation 1"):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong.split())


@pytest.mark.parametrize("says, task, settings", [
    ("no setting 'saturation'", "mask", dict(saturation=1)),
    ("mask ratio 1.0", "mask", dict(mask_ratio=1.0)),
    ("hides none", "mask", dict(mask_ratio=0.05, mask_kind="center")),
    ("1 are not fours", "zoom_out", dict(zoom_fill="other")),
    ("40 x 40 pixels of 32 x 32", "zoom_in_mask", dict(size=40)),
    ("grey images have no saturation", "decolor", {}),
])
def test_what_degrade_refuses(says, task, settings):
    with pytest.raises(ValueError, match=says):
        D.degrade(torch.zeros(1, 1, 32, 32), task, patch_size=8, **settings)


def test_what_is_seen_and_pasted_of_zoom_in_mask():
    """What is dropped or beyond is grey. The input replaces what is recovered where it is seen."""
    view, hidden = picture(1, 3, 12, 12), torch.tensor([[True, False, False, True]])
    d = D.degrade(view, "zoom_in_mask", 8, 4, hidden=hidden)
    visible = torch.zeros(12, 12) > 0
    visible[2:6, 6:10] = visible[6:10, 2:6] = True
    assert torch.equal(D.seen(d, 4), torch.where(visible, view, 0.5))
    assert torch.equal(D.paste_visible(-view, d, 4), torch.where(visible, view, -view))
