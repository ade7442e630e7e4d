"""Images in, damaged images out: the degradations of *Beyond Masking* (BM, arXiv 2203.14313), sections 3.2, 4.1, A,
and the filled masks of *Architecture-Agnostic Masked Image Modeling* (A2, arXiv 2205.13943), section 4.

A task is one function (what happens to the picture) and one row of TASKS (its defaults; which patches are hidden;
how large the view is). `degrade` puts the two together. Everything works on a float32 batch, on any device.

    python degrade.py                  one picture of every task, on a drawn scene  -> tasks.png
    python degrade.py photo.jpg        the same on your image

B batch, C channels, S model input size, V view size (>= S), p patch size, N = (S/p)^2 patches.
hidden (B, N) bool: True = the encoder does not see this patch. Images are RGB (or N channels) in [0, 1].
Random functions take a torch.Generator (on the CPU, so that every device draws alike) and `part` = (first, total):
"this batch is rows first .. first + B of a batch of `total`". Numbers are drawn for the whole of it and cut, so the
result does not depend on how a batch is shared out among processes. None: the batch is the whole.
"""
import argparse
import inspect
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F


def pair(size):
    """An int or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def draw(batch, *shape, generator=None, part=None, device=None, normal=False):
    """Uniform numbers in [0, 1) (or standard normal ones), (batch, *shape): rows first .. of `part`'s total."""
    first, total = part or (0, batch)
    numbers = (torch.randn if normal else torch.rand)(total, *shape, generator=generator)
    return numbers[first:first + batch].to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------
# (m) Which patches are hidden
# ---------------------------------------------------------------------------------------------------

def _cells(grid, ratio, unit):
    """Rows and columns of mask cells, and how many stay visible: floor(cells (1 - ratio)), as in MAE."""
    gh, gw = pair(grid)
    if unit < 1 or gh % unit or gw % unit:
        raise ValueError(f"mask cells of {unit} patches do not tile a grid of {gh}x{gw} patches: choose a divisor")
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} is outside [0, 1)")
    rows, columns = gh // unit, gw // unit
    return rows, columns, max(1, math.floor(rows * columns * (1 - ratio) + 1e-6))


def _patches(cells, rows, columns, unit):
    """(B, rows * columns) cells -> (B, N) patches, each cell unit x unit of them."""
    return cells.view(-1, rows, columns).repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)


def random_mask(batch, grid, ratio, unit=1, generator=None, device=None, part=None):
    """Random cells hidden, the same number in every row: (batch, N) bool. BM 4.1 (m), 'random'.

    grid: patches per side, int or (rows, columns). ratio in [0, 1). unit: patches a mask cell spans per side
    (A2 masks 32 px cells over 16 px patches: 2). ValueError when unit does not divide the grid.
    """
    rows, columns, visible = _cells(grid, ratio, unit)
    rank = draw(batch, rows * columns, generator=generator, part=part).argsort(1).argsort(1)
    return _patches(rank >= visible, rows, columns, unit).to(device)


def block_mask(batch, grid, ratio, unit=1, generator=None, device=None, part=None):
    """One contiguous region stays visible, the rest is hidden: (batch, N) bool. BM 4.2, 'block'.

    The region is a rectangle of random place and aspect (1/2 .. 2), its last column cut short where the
    exact number asks for it. Arguments as in random_mask.
    """
    rows, columns, visible = _cells(grid, ratio, unit)
    u = draw(batch, 4, generator=generator, part=part)
    height = (visible ** 0.5 * 2 ** (u[:, 0] - 0.5)).round().clamp(math.ceil(visible / columns), min(rows, visible))
    width = ((visible + height - 1) / height).floor()                                  # the ceiling (number / tensor is rounded)
    top, left = (u[:, 1] * (rows - height + 1)).floor(), (u[:, 2] * (columns - width + 1)).floor()
    r = torch.arange(rows)[:, None] - top[:, None, None]                               # (B, rows, 1)
    c = torch.arange(columns)[None, :] - left[:, None, None]                           # (B, 1, columns)
    h, w = height[:, None, None], width[:, None, None]
    seen = (r >= 0) & (r < h) & (c >= 0) & (c < w) & (c * h + r < visible)
    seen = torch.where(u[:, 3, None, None] < 0.5, seen, seen.flip(1, 2))               # or one corner would never be seen
    return _patches(~seen.flatten(1), rows, columns, unit).to(device)


def center_mask(batch, grid, ratio, unit=1, generator=None, device=None, part=None):
    """The central rectangle stays visible, the outer patches are hidden: (batch, N) bool. BM A.3, task (a).

    BM's inner 160 of 224 px is --mask_ratio 0.49: 10 x 10 of 14 x 14 patches. Arguments as in random_mask.
    """
    rows, columns, visible = _cells(grid, ratio, unit)
    h, w = (max(1, round(side * (visible / (rows * columns)) ** 0.5)) for side in (rows, columns))
    seen = torch.zeros(rows, columns, dtype=torch.bool)
    seen[(rows - h) // 2:(rows + h) // 2, (columns - w) // 2:(columns + w) // 2] = True
    return _patches(~seen.flatten()[None].expand(batch, -1), rows, columns, unit).to(device)


MASKS = {"random": random_mask, "block": block_mask, "center": center_mask}


def patch_pixels(patches, p, grid):
    """(B, N) bool of patches -> (B, 1, H, W) bool of pixels."""
    return patches.view(-1, 1, *grid).repeat_interleave(p, 2).repeat_interleave(p, 3)


# What the models' normalisation takes to zero: the mean colour of ImageNet. Other than three channels: 0.45 each.
ZERO = (0.485, 0.456, 0.406)
FILLS = ("mean", "zero", "token")


def fill_hidden(images, hidden, p, fill="mean"):
    """Hidden patches (B, N) filled with one colour, the visible pixels untouched: (B, C, H, W). A2 section 4.

    "mean": the image's own mean over all its pixels, visible and hidden, each channel alone. "zero": what is zero
    after normalisation. "token": the same; the model then puts its mask token there.
    # differs from the authors' code: one of its two paths fills the visible patches and keeps the hidden ones.
    """
    if fill not in FILLS:
        raise ValueError(f"unknown fill '{fill}': choose one of {', '.join(FILLS)}")
    C = images.shape[1]
    zero = torch.tensor(ZERO if C == 3 else [0.45] * C, device=images.device).view(1, C, 1, 1)
    color = images.mean((2, 3), keepdim=True) if fill == "mean" else zero
    return torch.where(patch_pixels(hidden, p, [side // p for side in images.shape[2:]]), color, images)


# ---------------------------------------------------------------------------------------------------
# Resampling
# ---------------------------------------------------------------------------------------------------

def _weights(centers, stretch, length, cubic):
    """Interpolation matrix (B, out, length) of an antialiased filter.

    centers (B, out): where each output pixel's centre falls on the source, in pixels from its edge.
    stretch (B, 1): source pixels per output pixel; above 1 the filter widens with it, so nothing aliases.
    """
    distance = (centers[:, :, None] - (torch.arange(length, device=centers.device) + 0.5)).abs()
    x = distance / stretch.clamp(min=1)[:, :, None]
    if cubic:                                                                          # Keys, a = -1/2, as Pillow
        w = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
    else:
        w = (1 - x).clamp(min=0)
    return w / w.sum(2, keepdim=True)


def resample(images, y, x, stretch_y, stretch_x, cubic=False):
    """Read (B, C, H, W) at rows y (B, h) and columns x (B, w): (B, C, h, w), two matrix products an image.

    Coordinates are in pixels from the upper left edge, pixel i's centre at i + 0.5; stretch as in _weights.
    """
    B, C, H, W = images.shape
    rows, columns = _weights(y, stretch_y, H, cubic), _weights(x, stretch_x, W, cubic)
    return rows[:, None] @ (images @ columns.transpose(1, 2)[:, None])


def crop_resize(images, box, size, cubic=False):
    """Read box (B, 4) = (top, left, height, width), in pixels, of each image at size = (h, w): (B, C, h, w). Its edge blends
    with what lies beyond it.
    """
    def along(start, length, n):
        steps = (torch.arange(n, device=images.device) + 0.5) / n
        return start[:, None] + length[:, None] * steps, length[:, None] / n
    (y, stretch_y), (x, stretch_x) = along(box[:, 0], box[:, 2], size[0]), along(box[:, 1], box[:, 3], size[1])
    return resample(images, y, x, stretch_y, stretch_x, cubic)


def center_crop(images, size):
    """The central size = (h, w) of (B, C, H, W)."""
    (H, W), (h, w) = images.shape[2:], pair(size)
    return images[:, :, (H - h) // 2:(H - h) // 2 + h, (W - w) // 2:(W - w) // 2 + w]


def scaled(images, size):
    """(B, C, H, W) -> (B, C, *size), bilinear, antialiased where it shrinks."""
    same = tuple(images.shape[2:]) == tuple(size)
    return images if same else F.interpolate(images, size, mode="bilinear", antialias=True)


def _at_size(pixels, size):
    """A height in pixels as (height, width) in the proportions of `size`; at least one pixel."""
    return max(1, round(pixels)), max(1, round(pixels * size[1] / size[0]))


# ---------------------------------------------------------------------------------------------------
# (a) - (e) What happens to the picture
# ---------------------------------------------------------------------------------------------------

def unchanged(images):
    """The picture as it is: masking alone."""
    return images


def zoom_in(images, size=None, zoom_size=None, zoom_at="center", generator=None, part=None):
    """(a) A zoom_size high part of the picture fills the canvas, the rest is discarded: (B, C, *size). BM 4.1.

    size: (h, w) of the result, the picture's own by default. zoom_size: pixels of the picture; default 160 / 224
    of it, or, when the picture is larger than the result, `size` (BM A.1: no rescaling). zoom_at: "center", or
    "random" (BM A.3: worse, as what is to be recovered is anyone's guess). ValueError for a size that does not fit.
    """
    whole = tuple(images.shape[2:])
    size = pair(size or whole)
    if size[0] > whole[0] or size[1] > whole[1]:
        raise ValueError(f"a {whole[0]}x{whole[1]} view is smaller than the {size[0]}x{size[1]} asked for")
    if zoom_size is not None and (zoom_size == "rand" or not 1 <= zoom_size <= whole[0]):
        raise ValueError(f"zoom size {zoom_size} is not one of 1 .. {whole[0]}, the height of the view")
    part_size = size if zoom_size is None and size != whole else _at_size(zoom_size or whole[0] * 160 / 224, whole)
    if zoom_at == "center":
        return scaled(center_crop(images, part_size), size)
    room = torch.tensor([whole[0] - part_size[0] + 1, whole[1] - part_size[1] + 1])
    corner = (draw(len(images), 2, generator=generator, part=part) * room).floor()
    box = torch.cat([corner, torch.tensor(part_size).expand(len(images), 2)], dim=1)
    return crop_resize(images, box.to(images.device), size)


def zoom_out(images, zoom_size=None, zoom_fill="mirror", generator=None, part=None):
    """(b) The picture shrunk to zoom_size and put at a random place on the canvas: (B, C, H, W). BM 4.1, A.3.

    zoom_size: pixels high, default 160 / 224 of the picture, or "rand": 96, 128, 160 or 192 / 224 of it, drawn
    for each image. zoom_fill, the rest of the canvas: "mirror" reflects the picture, so that the whole is
    continuous; "black"; "other" shows another image of the batch; "none": there is no rest, the shrunk picture
    is stretched to the canvas (BM A.3 does not say how 160 px become 14 x 14 tokens: this is our reading).
    """
    B, _, H, W = images.shape
    if zoom_size not in (None, "rand") and not 1 <= zoom_size <= H:
        raise ValueError(f"zoom size {zoom_size} is outside 1 .. {H}, the height of the canvas")
    u = draw(B, 3, generator=generator, part=part)
    if zoom_size == "rand":
        height = (torch.tensor([96.0, 128.0, 160.0, 192.0]) * H / 224)[(u[:, 0] * 4).long()].round()
    else:
        height = torch.full((B,), H * 160 / 224 if zoom_size is None else float(zoom_size)).round()
    width = (height * W / H).round().clamp(min=1)
    if zoom_fill == "none":
        out = torch.empty_like(images)
        for h in height.unique().tolist():
            rows = (height == h).to(images.device)
            out[rows] = scaled(scaled(images[rows], _at_size(h, (H, W))), (H, W))
        return out
    top, left = (u[:, 1] * (H - height + 1)).floor(), (u[:, 2] * (W - width + 1)).floor()
    y = (torch.arange(H) + 0.5 - top[:, None]) * H / height[:, None]                   # where each canvas row reads
    x = (torch.arange(W) + 0.5 - left[:, None]) * W / width[:, None]
    mirrored = [(length - ((t % (2 * length)) - length).abs()).to(images.device) for t, length in ((y, H), (x, W))]
    canvas = resample(images, *mirrored, (H / height)[:, None].to(images.device), (W / width)[:, None].to(images.device))
    if zoom_fill == "mirror":
        return canvas
    inside = (((y > 0) & (y < H))[:, None, :, None] & ((x > 0) & (x < W))[:, None, None, :]).to(images.device)
    if zoom_fill == "black":
        return canvas * inside
    if B % 2:
        raise ValueError(f"zoom fill 'other' pairs the images of a batch: {B} is odd, choose an even batch per process")
    return torch.where(inside, canvas, images[torch.arange(B) ^ 1])                    # the neighbour's picture


def fisheye(images, twist=(0.20, 0.25), generator=None, part=None):
    """(c) Fisheye about a random centre: (B, C, H, W). BM 4.1; the formula is its code's.

    The canvas is [-1, 1] x [-1, 1], the centre c uniform on it, the twist t uniform between two bounds. A
    pixel at distance r from the centre shows what lay at distance r - t r^2; t = 0 changes nothing. So what is farther
    than 1 / (4 t) from the centre is not shown, and from r = 1 / (2 t) outwards the picture comes back mirrored.
    """
    B, _, H, W = images.shape
    if not 0 <= twist[0] <= twist[1] <= 1:
        raise ValueError(f"twist {twist[0]} {twist[1]} is not 0 <= smallest <= largest <= 1")
    u = draw(B, 3, generator=generator, part=part, device=images.device)
    center, t = 2 * u[:, None, None, :2] - 1, twist[0] + (twist[1] - twist[0]) * u[:, 2].view(B, 1, 1, 1)
    y, x = torch.linspace(-1, 1, H, device=images.device), torch.linspace(-1, 1, W, device=images.device)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=2)               # (H, W, 2) as (x, y)
    offset = center - grid                                                             # (B, H, W, 2)
    grid = grid + offset * offset.norm(dim=3, keepdim=True) * t
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def wave(images, height=0.05, length=0.5, generator=None, part=None):
    """(c), BM A.3: a horizontal wave, (B, C, H, W). Each row moves sideways by height * W * sin, round the edge, so
    that no pixel is missing. length: of a wave, as a share of H; its phase is random. The paper gives neither.
    """
    B, C, H, W = images.shape
    phase = draw(B, 1, generator=generator, part=part)
    shift = height * W * torch.sin(2 * math.pi * (torch.arange(H) / (length * H) + phase))     # (B, H)
    x = (torch.arange(W) + shift[:, :, None]).to(images.device)                                # (B, H, W)
    low, fraction = x.floor().long(), (x - x.floor())[:, None]
    read = [images.gather(3, (i % W)[:, None].expand(-1, C, -1, -1)) for i in (low, low + 1)]
    return read[0] * (1 - fraction) + read[1] * fraction


def distort(images, warp="fisheye", twist=(0.20, 0.25), generator=None, part=None):
    """(c) A distorted picture: warp "fisheye" (see there) or "wave"."""
    if warp == "wave":
        return wave(images, generator=generator, part=part)
    return fisheye(images, twist, generator, part)


def blur(images, blur_kernel=9, generator=None, part=None):
    """(d) Each channel convolved with a k x k kernel drawn afresh, (B, C, H, W); edges are repeated. BM 4.1, A.1.

    Weights ~ N(1 / k^2, 0.02^2), as in its code, one kernel per image and channel; sums wander around 1, so values may
    leave [0, 1]. blur_kernel: odd, or "rand": 5, 7, 9 or 11, drawn for each image.
    # differs from the authors' code: theirs mixes the channels and changes the picture's size; this is the text.
    """
    B, C, H, W = images.shape
    if blur_kernel != "rand" and (blur_kernel < 1 or blur_kernel % 2 == 0):
        raise ValueError(f"blur kernel {blur_kernel} is not an odd number: choose 5, 7, 9, 11 or rand")
    k = 11 if blur_kernel == "rand" else blur_kernel
    sides = 5 + 2 * (draw(B, generator=generator, part=part) * 4).floor() if blur_kernel == "rand" else torch.full((B,), float(k))
    noise = 0.02 * draw(B, C, k, k, generator=generator, part=part, normal=True)
    near = (torch.arange(k) - k // 2).abs() <= (sides[:, None] - 1) / 2                # (B, k): inside the kernel
    kernel = (1 / sides.view(B, 1, 1, 1) ** 2 + noise) * near[:, None, :, None] * near[:, None, None, :]
    padded = F.pad(images, [k // 2] * 4, mode="replicate").view(1, B * C, H + k - 1, W + k - 1)
    return F.conv2d(padded, kernel.view(B * C, 1, k, k).to(images), groups=B * C).view(B, C, H, W)


def desaturate(images, saturation=0.3):
    """(e) Saturation, in HSV, times a number in [0, 1]: (B, C, H, W). BM 4.1.

    HSV has value = max(R, G, B) and each channel at value * (1 - S * something of the hue), so scaling S moves
    every channel towards the value: no conversion there and back is needed. 0: grey; one channel stays as it is.
    """
    if not 0 <= saturation <= 1:
        raise ValueError(f"saturation {saturation} is outside 0 .. 1")
    value = images.amax(1, keepdim=True)
    return value + (images - value) * saturation


# ---------------------------------------------------------------------------------------------------
# The table of tasks
# ---------------------------------------------------------------------------------------------------

class Task(NamedTuple):
    """picture: images in, images out; its keyword arguments (but size, generator, part) become options.

    view: V / S, how much larger the view is than the input. target: "view" (brought to S), its "center" (S x S)
    or the "whole" of it at V (the loss then has a centre and a band term). compare: "hidden" patches or "all".
    The rest are the defaults of what the model and the loss make of it: what fills the hidden patches (None: nothing,
    the encoder drops them), where the mask token enters, the distance, the target's normalisation, the weight of the
    frequency loss, and whose training recipe it is.
    """
    picture: Callable
    about: str
    mask_ratio: float = 0.0
    mask_unit: int = 1
    view: float = 1.0
    target: str = "view"
    compare: str = "all"
    fill: str | None = None
    token_at: str = "decoder"
    loss: str = "mse"
    norm_target: str = "patch"
    freq_weight: float = 0.0
    paper: str = "BM"


TASKS = {
    "mask": Task(unchanged, "(m) random patches are hidden", mask_ratio=0.75, compare="hidden"),
    # differs from the authors' code: theirs also masks 75% in (a) and (b); the paper's tasks mask nothing.
    "zoom_in": Task(zoom_in, "(a) the centre fills the canvas"),
    "zoom_out": Task(zoom_out, "(b) shrunk, put somewhere, mirrored around"),
    "distort": Task(distort, "(c) fisheye about a random centre", target="center"),
    "blur": Task(blur, "(d) random 9x9 kernel on each channel"),
    "decolor": Task(desaturate, "(e) saturation x 0.3"),
    "zoom_in_mask": Task(center_crop, "(m)+(a) the masked centre of a larger view; all of the view is recovered",
                         mask_ratio=0.75, view=320 / 224, target="whole", compare="hidden"),
    "simmim": Task(unchanged, "hidden cells replaced by the mask token at the input", mask_ratio=0.6, mask_unit=2,
                   compare="hidden", fill="token", token_at="input", loss="l1", norm_target="off", paper="A2"),
    "a2mim": Task(unchanged, "hidden cells filled with the mean colour, mask token added in the middle", mask_ratio=0.6,
                  mask_unit=2, compare="hidden", fill="mean", token_at="middle", loss="l1", norm_target="off", freq_weight=0.5,
                  paper="A2"),
}


def number_or_rand(text):
    return text if text == "rand" else int(text)


# How each setting is read from the command line, and what it means. One that is not here: the type of its default.
SETTINGS = {
    "mask_ratio": (float, "share of the patches that are hidden, in [0, 1)"),
    "mask_unit": (int, "patches a mask cell spans per side; A2's 32 px are 2 patches of 16"),
    "mask_kind": (tuple(MASKS), "random patches hidden; or all but one block; or all but the central block"),
    "fill": (FILLS, "what hidden patches are filled with: the image's mean colour, the normalisation's zero, or the mask token "
                    "at the input; a2mim, and any task whose encoder keeps its hidden patches: mean"),
    "view_size": (int, "height of the view in pixels; above the input's, the task works on the larger picture"),
    "zoom_size": (number_or_rand, "zoom_in: pixels of the view that fill the canvas; zoom_out: pixels the view is shrunk to, "
                                  "or rand"),
    "zoom_at": (("center", "random"), "where zoom_in looks"),
    "zoom_fill": (("mirror", "none", "black", "other"), "what surrounds the shrunk picture of zoom_out"),
    "warp": (("fisheye", "wave"), "kind of distortion"),
    "twist": (float, "smallest and largest twist of the fisheye"),
    "blur_kernel": (number_or_rand, "side of the blur kernel, odd, or rand"),
    "saturation": (float, "what the saturation is multiplied with, 0 .. 1"),
}


def task_settings(name):
    """The settings a task takes and their defaults: {name: value}. ValueError for an unknown task."""
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    row = TASKS[name]
    own = inspect.signature(row.picture).parameters.values()
    shared = dict(mask_ratio=row.mask_ratio, mask_unit=row.mask_unit, mask_kind="random", fill=row.fill, view_size=None)
    own = {p.name: p.default for p in own if p.default is not p.empty and p.name not in ("size", "generator", "part")}
    return {**shared, **own}


def view_size(task, size, view_size=None):
    """(h, w) of the view the task wants for an input of `size`: V - S is even, so that the centre is whole pixels."""
    size = pair(size)
    if view_size is not None and (view_size < size[0] or (view_size - size[0]) % 2):
        raise ValueError(f"view size {view_size} is not the input's {size[0]} or larger by an even number")
    view = TASKS[task].view if view_size is None else view_size / size[0]
    return tuple(side + 2 * round(side * (view - 1) / 2) for side in size)


class Degraded(NamedTuple):
    """What a task makes of a view. counted: the patches that are compared, None = all. hidden: None = none."""
    inputs: torch.Tensor                # (B, C, S, S) what the encoder is given
    hidden: torch.Tensor | None         # (B, N) bool, True = the encoder does not see this patch
    target: torch.Tensor                # (B, C, S, S), or (B, C, V, V) for a "whole" target
    counted: torch.Tensor | None        # (B, N) bool
    filled: bool = False                # True: hidden patches of `inputs` hold a fill. False: the encoder drops them


def degrade(view, task, size=None, patch_size=16, generator=None, part=None, **settings):
    """A view (B, C, V, V) in [0, 1] -> Degraded, by the row `task` of TASKS.

    size: the input's S or (h, w), the view's by default. settings: as in task_settings(task); None = default.
    ValueError for an unknown task or setting, a value out of its range, or a size the patches do not divide.
    """
    row, values = TASKS.get(task), task_settings(task)
    unknown = [k for k in settings if k not in values]
    if unknown:
        raise ValueError(f"task {task} has no setting '{unknown[0]}': it takes {', '.join(values)}")
    values.update((k, v) for k, v in settings.items() if v is not None)
    size = pair(size or tuple(view.shape[2:]))
    if any(v < s for v, s in zip(view.shape[2:], size)):
        raise ValueError(f"a {view.shape[2]}x{view.shape[3]} view is smaller than the input's {size[0]}x{size[1]}")

    if any(side < patch_size or side % patch_size for side in size):
        raise ValueError(f"image size {size[0]}x{size[1]} is not divisible by the patch size {patch_size}: "
                         "choose multiples of it")
    hidden = None
    if values["mask_ratio"]:
        grid = tuple(side // patch_size for side in size)
        hidden = MASKS[values["mask_kind"]](len(view), grid, values["mask_ratio"], values["mask_unit"], generator, part=part)
        if not hidden[0].any():
            unit = values["mask_unit"]
            raise ValueError(f"mask ratio {values['mask_ratio']} hides none of {grid[0] // unit}x{grid[1] // unit} cells of "
                             f"{unit}x{unit} patches: choose a larger one, or 0, or smaller cells or patches")
        hidden = hidden.to(view.device, non_blocking=True)
    values.update(size=size, generator=generator, part=part)
    inputs = row.picture(view, **{k: values[k] for k in inspect.signature(row.picture).parameters if k in values})
    target = {"view": scaled, "center": center_crop, "whole": lambda view, size: view}[row.target](view, size)
    inputs, filled = scaled(inputs, size), hidden is not None and values["fill"] is not None
    inputs = fill_hidden(inputs, hidden, patch_size, values["fill"]) if filled else inputs
    return Degraded(inputs, hidden, target, hidden if row.compare == "hidden" else None, filled)


# ---------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------

def _onto(canvas, picture):
    """`picture` in the middle of a copy of `canvas`; itself when both are of one size."""
    canvas = canvas.clone()
    center_crop(canvas, tuple(picture.shape[2:]))[:] = picture
    return canvas


def seen(d, p):
    """What the encoder sees of Degraded `d`, to look at: dropped patches grey, in its place within the target."""
    picture = d.inputs
    if d.hidden is not None and not d.filled:
        picture = torch.where(patch_pixels(d.hidden, p, [side // p for side in picture.shape[2:]]), 0.5, picture)
    return _onto(torch.full_like(d.target, 0.5), picture)


def paste_visible(recovered, d, p):
    """`recovered` (B, C, V, V) with the input put back where the loss asked for nothing: visible, uncompared patches."""
    if d.counted is None:
        return recovered
    size = tuple(d.inputs.shape[2:])
    pixels = patch_pixels(d.counted, p, [side // p for side in size])
    return _onto(recovered, torch.where(pixels, center_crop(recovered, size), d.inputs))


def sheet(columns, titles, note="", side=128):
    """Columns of images (B, C, H, W) under their titles, one row an image, as a Pillow picture."""
    from PIL import Image, ImageDraw                            # comes with torchvision; only pictures need it
    count, ratio = len(columns[0]), columns[0].shape[3] / columns[0].shape[2]
    width, gap, top = round(side * ratio), 4, 16
    page = Image.new("RGB", (len(columns) * (width + gap) + gap, top + count * (side + gap) + (top if note else 0)), "white")
    pen = ImageDraw.Draw(page)
    for x, (images, title) in enumerate(zip(columns, titles)):
        pen.text((gap + x * (width + gap), 2), title, fill="black")
        pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1)
        for y, picture in enumerate(pixels.expand(-1, -1, -1, 3).numpy()):
            smooth = Image.Resampling.NEAREST if picture.shape[0] < side else Image.Resampling.LANCZOS
            page.paste(Image.fromarray(picture).resize((width, side), smooth), (gap + x * (width + gap), top + y * (side + gap)))
    pen.text((gap, top + count * (side + gap)), note, fill="black")
    return page


def drawn_scene(size):
    """A picture to show tasks on when none is given: (1, 3, size, size), hills, a sun, a house and a fence."""
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    picture = torch.stack([0.45 + 0.5 * y, 0.7 + 0.2 * y, 1 - 0.25 * y])
    for where, color in (
        (((x - 0.78) ** 2 + (y - 0.2) ** 2) < 0.01, (1.0, 0.85, 0.2)),
        (y > 0.55 + 0.08 * torch.sin(7 * x), (0.35, 0.6, 0.35)),
        (y > 0.72 + 0.06 * torch.sin(5 * x + 2), (0.5, 0.7, 0.25)),
        (((x - 0.38).abs() < 0.16) & ((y - 0.62).abs() < 0.14), (0.85, 0.45, 0.35)),
        ((y > 0.3 + 0.9 * (x - 0.38).abs()) & (y < 0.49), (0.5, 0.2, 0.2)),
        (((x - 0.38).abs() < 0.04) & ((y - 0.68).abs() < 0.08), (0.35, 0.25, 0.2)),
        (((x * 16) % 1 < 0.3) & ((y - 0.88).abs() < 0.07), (0.95, 0.93, 0.88)),
    ):
        picture = torch.where(where, torch.tensor(color).view(3, 1, 1), picture)
    return picture[None]


def main(argv=None):
    parser = argparse.ArgumentParser(description="One picture of every task.", allow_abbrev=False)
    parser.add_argument("image", nargs="?", help="an image file; default: a drawn scene")
    parser.add_argument("--out", default="tasks.png", help="default: tasks.png")
    parser.add_argument("--size", type=int, default=224, help="input size in pixels, a multiple of 32, "
                        "A2's mask cell, 64 or more; default: 224")
    args = parser.parse_args(argv)
    if args.size < 64 or args.size % 32:
        parser.exit(2, f"degrade.py: --size {args.size} is not a multiple of 32, 64 or more\n")
    if args.image:
        import numpy
        from PIL import Image, ImageOps
        try:
            photo = numpy.array(ImageOps.exif_transpose(Image.open(args.image)).convert("RGB"))
        except (OSError, Image.DecompressionBombError) as error:
            parser.exit(2, f"degrade.py: {args.image} is not an image that can be read: {error}\n")
        photo = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        photo = center_crop(photo, min(photo.shape[2:]))
    else:
        photo = drawn_scene(512)
    columns = []
    for name in TASKS:
        try:
            view = scaled(photo, view_size(name, args.size)).clamp(0, 1)
            d = degrade(view, name, args.size, 16, torch.Generator().manual_seed(0))
        except ValueError as error:
            parser.exit(2, f"degrade.py: {error}\n")
        columns.append(torch.cat([scaled(x, (args.size, args.size)) for x in (view, seen(d, 16), d.target)]))
    page = sheet(columns, list(TASKS), "rows: the view; what the encoder sees; what is to be recovered", side=min(args.size, 160))
    try:
        page.save(args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"degrade.py: {args.out} cannot be written: {error}\n")
    print(f"wrote {args.out}: {', '.join(TASKS)}")


if __name__ == "__main__":
    main()
