"""Images in, damaged images out: the degradations of *Beyond Masking* (BM, arXiv 2203.14313),
sections 3.2, 4.1, 4.2, A, and the filled masks of *Architecture-Agnostic Masked Image Modeling*
(A2, arXiv 2205.13943), section 4.

A task is one function (what happens to the picture) and one row of TASKS (its defaults: which
patches are hidden, how large the view is). `degrade` puts the two together. Everything works on a
float32 batch, on any device.

    python degrade.py                  one picture of every task, on a drawn scene  -> tasks.png
    python degrade.py photo.jpg        the same on your image

B batch, C channels, S model input size, V view size (>= S), p patch size, N = (S/p)^2 patches.
hidden (B, N) bool: True = the encoder does not see this patch. Images are RGB (or C channels) in
[0, 1]. Random functions take a torch.Generator, on the CPU: every device gets the same numbers.
within = (first, total): the images are rows first .. first + B of a batch of `total`, and get the
same numbers however that is split over processes. None: they are the whole batch.
"""
import argparse
import ast
import functools
import inspect
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F


def check(right, message=""):
    """A request that cannot be carried out ends here; the scripts say it in one line."""
    if not right:
        raise ValueError(message)


def pair(size):
    """An int or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def moved(x, device):
    """x on the device. A copy to CUDA is from pinned memory, and is not waited for. One to Apple's
    GPU is: x might be freed before it is read.
    """
    cuda = torch.device(device).type == "cuda" and not x.is_cuda
    return (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)


def random_numbers(batch, *shape, generator=None, within=None, draw=torch.rand):
    """Uniform numbers in [0, 1), or those of another `draw`: (batch, *shape)."""
    first, total = within or (0, batch)
    return draw(total, *shape, generator=generator)[first:first + batch]


def call(function, values, *first):
    """function(*first, ...) with those of `values` that it has a parameter for."""
    names = inspect.signature(function).parameters
    return function(*first, **{name: values[name] for name in names if name in values})


# --- (m) Which patches are hidden ---

def cells_of(grid, ratio, unit):
    """Rows and columns of mask cells, and how many stay visible: floor(cells (1 - ratio)) as in
    MAE, one at least.
    """
    rows, columns = pair(grid)
    check(unit > 0 and rows % unit == columns % unit == 0, f"mask cells of {unit} patches do not "
          f"tile {rows}x{columns} patches: choose another --mask_unit")
    check(0 <= ratio < 1, f"mask ratio {ratio} is outside [0, 1)")
    cells = rows // unit * (columns // unit)
    return rows // unit, columns // unit, max(1, math.floor(cells * (1 - ratio) + 1e-6))


def patches_of(cells, unit):
    """(B, rows, columns) cells, each unit x unit patches -> (B, N) patches."""
    return cells.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)


def random_mask(batch, grid, ratio, unit=1, generator=None, device=None, within=None):
    """Random cells are hidden, the same number in every image: (batch, N) bool. BM 4.2, 'random'.

    grid: patches per side, int or (rows, columns). ratio in [0, 1). unit: patches a mask cell spans
    per side (A2 masks 32 px cells over 16 px patches: 2).
    """
    rows, columns, visible = cells_of(grid, ratio, unit)
    numbers = random_numbers(batch, rows * columns, generator=generator, within=within)
    seen = numbers.argsort(1)[:, :visible]
    cells = torch.ones_like(numbers, dtype=torch.bool).scatter_(1, seen, False)
    return patches_of(cells.view(batch, rows, columns), unit).to(device)


def block_mask(batch, grid, ratio, unit=1, generator=None, device=None, within=None, hole=False):
    """One region stays visible, BM 4.2, 'block'; or (hole) is hidden, A2's inpainting:
    (batch, N) bool. Arguments: random_mask's.

    It is a rectangle of random place and aspect (1/2 .. 2). Its last column may be shorter, so that
    the number is exact.
    """
    rows, columns, visible = cells_of(grid, ratio, unit)
    count = rows * columns - visible if hole else visible
    u = random_numbers(batch, 4, generator=generator, within=within)[:, :, None, None]
    height = (count ** 0.5 * 2 ** (u[:, 0] - 0.5)).round()
    height = height.clamp(max(1, math.ceil(count / columns)), max(1, min(rows, count)))
    width = ((count + height - 1) / height).floor()  # the ceiling (number / tensor is rounded)
    r = torch.arange(rows)[:, None] - (u[:, 1] * (rows - height + 1)).floor()  # (B, r, 1)
    c = torch.arange(columns) - (u[:, 2] * (columns - width + 1)).floor()  # (B, 1, c)
    inside = (r >= 0) & (r < height) & (c >= 0) & (c * height + r < count)
    # turned round in half of the images: otherwise the cut would be at the same corner in all
    inside = torch.where(u[:, 3] < 0.5, inside, inside.flip(1, 2))
    return patches_of(inside == hole, unit).to(device)


def center_mask(batch, grid, ratio, unit=1, generator=None, device=None, within=None):
    """The central rectangle stays visible: (batch, N) bool. BM A.3, task (a). Each side is the
    picture's times the root of the visible share, rounded.

    BM's inner 160 of 224 px is --mask_ratio 0.49: 10 x 10 of 14 x 14 patches.
    """
    rows, columns, visible = cells_of(grid, ratio, unit)
    h, w = (max(1, round(n * (visible / (rows * columns)) ** 0.5)) for n in (rows, columns))
    cells = torch.ones(batch, rows, columns, dtype=torch.bool)
    cells[:, (rows - h) // 2:(rows + h) // 2, (columns - w) // 2:(columns + w) // 2] = False
    return patches_of(cells, unit).to(device)


# A mask function is given what it has parameters for: batch, grid, ratio, unit, generator, within,
# and images (B, C, S, S) and patch_size, if it is to look at what it hides.
MASKS = {"random": random_mask, "block": block_mask,
         "hole": functools.partial(block_mask, hole=True), "center": center_mask}


def patch_pixels(patches, p, size):
    """(B, N) bool of patches -> (B, 1, H, W) bool of pixels. size: (H, W)."""
    H, W = size
    return patches_of(patches.view(-1, H // p, W // p), p).view(-1, 1, H, W)


# What the models' normalisation takes to zero: ImageNet's mean colour, 0.45 for other channels.
ZERO = (0.485, 0.456, 0.406)


def fill_hidden(images, hidden, p, fill="mean"):
    """Hidden patches (B, N) filled with one colour: (B, C, H, W). A2 4.

    "mean": the image's own mean over all its pixels, visible and hidden. "zero": what is zero after
    normalisation. "token": the same; the model puts its mask token there.
    # differs from the authors' code: one of its two paths fills the visible patches instead.
    """
    C = images.shape[1]
    color = images.mean((2, 3), keepdim=True)
    if fill != "mean":
        color = torch.tensor(ZERO if C == 3 else [0.45] * C).view(C, 1, 1)
        color = moved(color, images.device)
    return torch.where(patch_pixels(hidden, p, images.shape[2:]), color, images)


# --- Resampling ---

def resample_matrix(start, length, source, n, cubic):
    """The matrices (B, n, source) that resize `length` of `source` pixels, from `start` on, to n.

    start, length: (B,). Antialiased: the filter widens by length / n where that is above 1.
    """
    step = length[:, None] / n  # (B, 1)
    read = start[:, None] + length[:, None] * ((torch.arange(n, device=start.device) + 0.5) / n)
    x = (read[:, :, None] - (torch.arange(source, device=start.device) + 0.5)).abs()
    x = x / step.clamp(min=1)[:, :, None]
    weight = (1 - x).clamp(min=0)
    if cubic:  # Keys, a = -1/2, as Pillow
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((2.5 - 0.5 * x) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weight / weight.sum(2, keepdim=True)


def crop_resize(images, box, size, cubic=False):
    """Read box (B, 4) = (top, left, height, width), in pixels, of each image (B, C, H, W) at
    size = (h, w): (B, C, h, w), two matrix products an image. Its edge blends with what is beyond.
    """
    top, left, height, width = box.unbind(1)
    rows = resample_matrix(top, height, images.shape[2], size[0], cubic)
    columns = resample_matrix(left, width, images.shape[3], size[1], cubic)
    return rows[:, None] @ (images @ columns.transpose(1, 2)[:, None])


def center_crop(images, size):
    """The central size = (h, w) of (B, C, H, W). ValueError where it is larger."""
    h, w = pair(size)
    top, left = ((n - m) // 2 for n, m in zip(images.shape[2:], (h, w)))
    check(min(top, left) >= 0, f"{h} x {w} pixels of {images.shape[2]} x {images.shape[3]}")
    return images[:, :, top:top + h, left:left + w]


def scaled(images, size):
    """(B, C, H, W) -> (B, C, *size), bilinear, antialiased where it shrinks."""
    same = images.shape[2:] == tuple(size)
    return images if same else F.interpolate(images, size, mode="bilinear", antialias=True)


def at_height(height, whole):
    """(height, width) in the proportions of `whole`, in whole pixels, at least one."""
    return max(1, round(height)), max(1, round(height * whole[1] / whole[0]))


# --- (a) - (e) What happens to the picture ---

def zoom_height(zoom_size, height):
    """zoom_size, or 160 / 224 of a picture's height (BM 4.1)."""
    if zoom_size is None:
        return height * 160 / 224
    check(zoom_size != "rand" and 1 <= zoom_size <= height,
          f"zoom size {zoom_size} is not one of 1 .. {height}, the picture's height")
    return zoom_size


def unchanged(images):
    """The picture as it is: masking alone."""
    return images


def zoom_in(images, size=None, zoom_size=None, zoom_at="center", generator=None, within=None):
    """(a) A zoom_size high part of the picture fills the canvas: (B, C, *size). BM 4.1.

    size: (h, w) of the result, default the picture's own. zoom_size: pixels of the picture, default
    160 / 224 of it, or `size` where it is not the picture's (BM A.1: no rescaling).
    zoom_at: "center", or "random" (BM A.3: worse).
    # differs from the authors' code: a larger view has two terms there, as it has here in
    # zoom_in_mask with mask_ratio 0.
    """
    whole = images.shape[2:]
    size = pair(size or whole)
    region = at_height(zoom_height(zoom_size, whole[0]), whole)
    if zoom_size is None and size != whole:
        region = size
    if zoom_at == "center":
        return scaled(center_crop(images, region), size)
    room = torch.tensor([n - m + 1 for n, m in zip(whole, region)])
    u = random_numbers(len(images), 2, generator=generator, within=within)
    box = torch.cat([(u * room).floor(), torch.tensor(region).expand(len(images), 2)], dim=1)
    return crop_resize(images, moved(box, images.device), size)


def others_patches(images, p, generator, within):
    """Each p x p patch from another image, one of the three others of four in a row: (B, C, H, W).
    So a batch may be split into fours.
    """
    B, _, H, W = images.shape
    whole = not within or B == within[1]
    check(B > 1 and (whole or B % 4 == 0),
          f"zoom fill 'other' takes patches of four images: {B} are not fours")
    u = random_numbers(B, -(-H // p), -(-W // p), generator=generator, within=within)
    own = torch.arange(B).view(B, 1, 1)
    n = min(B, 4)
    first = (own // 4 * 4).clamp(max=B - n)
    which = first + (own - first + 1 + (u * (n - 1)).long()) % n  # (B, h, w)
    which = moved(which, images.device).repeat_interleave(p, 1).repeat_interleave(p, 2)[:, :H, :W]
    y, x = (torch.arange(n, device=images.device) for n in (H, W))
    return images.movedim(1, 3)[which, y[:, None], x].movedim(3, 1)


def zoom_out(images, zoom_size=None, zoom_fill="mirror", generator=None, within=None,
             patch_size=16):
    """(b) The picture shrunk to zoom_size and put at a random place on the canvas: (B, C, H, W).
    BM 4.1, A.3.

    zoom_size: pixels high, default 160 / 224 of the picture; "rand": 96, 128, 160 or 192 / 224 in
    each image. zoom_fill, the rest of the canvas: "mirror" reflects the picture continuously;
    "black"; "other": patches of other images; "none": the shrunk picture is stretched to the
    canvas (our reading: BM A.3 does not say how 160 px become 14 x 14 tokens).
    # differs from the authors' code: it compares with the view at zoom_size.
    """
    B, C, H, W = images.shape
    u = random_numbers(B, 3, generator=generator, within=within)
    heights = torch.tensor([96.0, 128.0, 160.0, 192.0])[(u[:, 0] * 4).long()] * H / 224
    if zoom_size != "rand":
        heights = torch.full((B,), float(zoom_height(zoom_size, H)))
    around = images.new_zeros(B, 1, 1, 1)  # black
    if zoom_fill == "other":
        around = others_patches(images, patch_size, generator, within)

    canvas = torch.empty_like(images)
    for height in heights.round().unique().tolist():
        rows = (heights.round() == height).nonzero()[:, 0]
        h, w = at_height(height, (H, W))
        there = moved(rows, images.device)
        small = scaled(images[there], (h, w))  # (b, C, h, w)
        # where each canvas row and column is in the small picture, and its mirror image inside
        y = torch.arange(H) - (u[rows, 1] * (H - h + 1)).floor().long()[:, None]  # (b, H)
        x = torch.arange(W) - (u[rows, 2] * (W - w + 1)).floor().long()[:, None]  # (b, W)
        y, x = (moved(i, images.device) for i in (y, x))
        inside = ((y >= 0) & (y < h))[:, None, :, None] & ((x >= 0) & (x < w))[:, None, None, :]
        y, x = (torch.minimum(i % (2 * n), -(i + 1) % (2 * n)) for i, n in ((y, h), (x, w)))
        index = (y[:, :, None] * w + x[:, None, :]).flatten(1)[:, None]
        out = small.flatten(2).gather(2, index.expand(-1, C, -1)).view(-1, C, H, W)
        if zoom_fill == "none":
            out = scaled(small, (H, W))
        elif zoom_fill != "mirror":
            out = torch.where(inside, out, around[there])
        canvas[there] = out
    return canvas


def fisheye(images, twist=(0.20, 0.25), generator=None, within=None):
    """(c) Fisheye about a random centre: (B, C, H, W). BM 4.1; the formula is its code's.

    The canvas is [-1, 1]^2, the centre c uniform on it, the twist t uniform between two bounds. A
    pixel at distance r from c shows what lay at r - t r^2. So what is farther than 1 / (4 t) is not
    shown, and from r = 1 / (2 t) on the picture comes back mirrored. With what leaves the canvas
    57% of the picture is lost (BM's text: "a small portion").
    # differs from the authors' code: there t is .15 to .25, and zeros are around the picture.
    """
    B, _, H, W = images.shape
    check(0 <= twist[0] <= twist[1] <= 1,
          f"twist {twist[0]} {twist[1]} is not 0 <= smallest <= largest <= 1")
    u = moved(random_numbers(B, 3, generator=generator, within=within), images.device)
    c = 2 * u[:, None, None, :2] - 1
    t = (twist[0] + (twist[1] - twist[0]) * u[:, 2]).view(B, 1, 1, 1)
    x, y = (torch.linspace(-1, 1, n, device=images.device) for n in (W, H))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)
    offset = c - grid  # (B, H, W, 2)
    grid = grid + offset * offset.norm(dim=3, keepdim=True) * t
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def wave(images, height=0.05, length=0.5, generator=None, within=None):
    """(c), BM A.3: a horizontal wave, (B, C, H, W). Each row moves sideways by height * W * sin,
    round the edge. A wave is length * H long, its phase random. The paper gives neither number.
    """
    B, C, H, W = images.shape
    phase = random_numbers(B, 1, generator=generator, within=within)
    angle = 2 * math.pi * (torch.arange(H) / (length * H) + phase)
    shift = moved(height * W * torch.sin(angle), images.device)[:, None, :, None]
    x = torch.arange(W, device=images.device) + shift  # (B, 1, H, W)
    low = x.floor().long()
    fraction = x - low
    left, right = (images.gather(3, (i % W).expand(-1, C, -1, -1)) for i in (low, low + 1))
    return left * (1 - fraction) + right * fraction


def distort(images, warp="fisheye", twist=(0.20, 0.25), generator=None, within=None):
    """(c) A distorted picture: warp "fisheye" or "wave"."""
    if warp == "wave":
        return wave(images, generator=generator, within=within)
    return fisheye(images, twist, generator, within)


def blur(images, blur_kernel=9, blur_init="normal", generator=None, within=None):
    """(d) Each channel convolved with a random k x k kernel, (B, C, H, W). BM 4.1, A.1.

    Weights ~ N(1 / k^2, 0.02^2), as in its code, one kernel per image and channel. Sums wander
    around 1, so values may leave [0, 1]. BM's pictures show a stronger blur than that. Edges are
    repeated. blur_kernel: odd, or "rand": 5, 7, 9 or 11 for each image. blur_init "kaiming":
    weights ~ N(0, 2 / k^2), "xavier": N(0, 1 / k^2) (BM A.1: worse than no pre-training).
    # differs from the authors' code: theirs mixes the channels, has a bias, is of normalised
    # pixels, and changes the picture's size.
    """
    B, C, H, W = images.shape
    check(blur_kernel == "rand" or blur_kernel > 0 and blur_kernel % 2,
          f"blur kernel {blur_kernel} is not odd: choose 5, 7, 9, 11, rand")
    k = 11 if blur_kernel == "rand" else blur_kernel
    sides = torch.full((B,), float(k))
    if blur_kernel == "rand":
        sides = 5 + 2 * (random_numbers(B, generator=generator, within=within) * 4).floor()
    noise = random_numbers(B, C, k, k, generator=generator, within=within, draw=torch.randn)
    near = (torch.arange(k) - k // 2).abs() <= (sides[:, None] - 1) / 2  # (B, k): inside
    sides = sides.view(B, 1, 1, 1)
    kernel = 1 / sides ** 2 + 0.02 * noise
    if blur_init != "normal":
        kernel = noise * dict(kaiming=2 ** 0.5, xavier=1.0)[blur_init] / sides
    kernel = kernel * near[:, None, :, None] * near[:, None, None, :]
    padded = F.pad(images, [k // 2] * 4, mode="replicate").reshape(1, B * C, H + k - 1, -1)
    kernel = moved(kernel.view(B * C, 1, k, k), images.device).to(images.dtype)
    return F.conv2d(padded, kernel, groups=B * C).view(B, C, H, W)


def desaturate(images, saturation=0.3):
    """(e) Saturation, in HSV, times a number in [0, 1]: (B, C, H, W). BM 4.1. 0: grey.

    In HSV a channel is max(R, G, B) * (1 - S * something of the hue): scaling S moves it towards
    the maximum.
    # differs from the authors' code: it weighs the channels at random.
    """
    check(images.shape[1] > 1, "grey images have no saturation: choose another task")
    check(0 <= saturation <= 1, f"saturation {saturation} is outside 0 .. 1")
    value = images.amax(1, keepdim=True)
    return value + (images - value) * saturation


# --- The table of tasks ---

class Task(NamedTuple):
    """picture: images in, images out. Its keyword arguments are options, but for GIVEN.

    zoom: V / S, how much larger the view is than the input. target(view, size): the view at S, its
    centre, or all of it at V (a centre and a band term). compare: "hidden" patches or "all". fill
    None: the encoder drops hidden patches. paper: whose training recipe it is. The rest are
    defaults of options.
    """
    picture: Callable
    mask_ratio: float = 0.0
    mask_unit: int = 1
    zoom: float = 1.0
    target: Callable = scaled
    compare: str = "all"
    fill: str | None = None
    token_at: str = "decoder"
    loss: str = "mse"
    norm_target: str = "patch"
    freq_weight: float = 0.0
    paper: str = "BM"


TASKS = {
    "mask": Task(unchanged, 0.75, compare="hidden"),  # (m)
    # differs from the authors' code: it also masks 75% in (a) and (b). The paper masks nothing.
    "zoom_in": Task(zoom_in),
    "zoom_out": Task(zoom_out),
    "distort": Task(distort, target=center_crop),
    "blur": Task(blur),
    "decolor": Task(desaturate),
    # (m)+(a): the masked centre of a larger view; all of the view is recovered.
    # differs from the authors' code: its views are 288 pixels.
    "zoom_in_mask": Task(center_crop, 0.75, zoom=320 / 224, target=lambda view, size: view,
                         compare="hidden"),
    "simmim": Task(unchanged, 0.6, 2, compare="hidden", fill="token", token_at="input", loss="l1",
                   norm_target="off", paper="A2"),
    "a2mim": Task(unchanged, 0.6, 2, compare="hidden", fill="mean", token_at="middle", loss="l1",
                  norm_target="off", freq_weight=0.5, paper="A2"),
}

# What `degrade` gives to a picture function that has a parameter for it. The others are options.
GIVEN = ("size", "patch_size", "generator", "within")


def number_or_rand(text):
    return text if text == "rand" else int(text)


def literal(text):
    """What an option's text says in Python: True, None, 3, 0.5. Any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# How the command line reads a setting, and its help. A setting may do without.
SETTINGS = {
    "mask_ratio": (float, "share of the patches that are hidden, in [0, 1)"),
    "mask_unit": (int, "patches a mask cell spans per side; A2's 32 px are 2 patches of 16"),
    "mask_kind": (MASKS, "random patches hidden; all hidden but one block; one hole hidden; "
                  "all hidden but the centre"),
    "fill": (("mean", "zero", "token"), "what hidden patches hold, if the encoder keeps them: the "
             "mean colour, the zero of the normalisation, or the mask token"),
    "view_size": (int, "height of the view, the input's or an even number more; None: the task's"),
    "zoom_size": (number_or_rand, "zoom_in: pixels of the view that fill the canvas; zoom_out: "
                  "those it is shrunk to, or rand"),
    "zoom_at": (("center", "random"), "where zoom_in looks"),
    "zoom_fill": (("mirror", "none", "black", "other"), "what surrounds the picture in zoom_out"),
    "warp": (("fisheye", "wave"), "kind of distortion"),
    "twist": (float, "smallest and largest twist of the fisheye"),
    "blur_kernel": (number_or_rand, "side of the blur kernel, odd, or rand"),
    "blur_init": (("normal", "kaiming", "xavier"), "how its weights are drawn"),
    "saturation": (float, "what the saturation is multiplied with, 0 .. 1"),
}


def task_settings(name):
    """The settings a task takes and their defaults: {name: value}."""
    row = TASKS[name]
    shared = dict(mask_ratio=row.mask_ratio, mask_unit=row.mask_unit, mask_kind="random",
                  fill=row.fill, view_size=None)
    own = list(inspect.signature(row.picture).parameters.values())[1:]
    return {**shared, **{q.name: q.default for q in own if q.name not in GIVEN}}


def option(name, default):
    """The arguments of argparse's add_argument for a setting."""
    several = isinstance(default, tuple)
    one = default[0] if several else default
    kind = literal if one is None or isinstance(one, bool) else type(one)
    kind, text = SETTINGS.get(name, (kind, "a setting of this task"))
    how = dict(type=kind) if callable(kind) else dict(choices=kind)
    if isinstance(one, bool):
        how.update(choices=(True, False))
    if several:
        how.update(nargs=len(default))
    return dict(how, default=default, help=text)


def view_size(task, size, view_size=None):
    """(h, w) of the task's view for an input of `size`. V - S is even: the centre is whole pixels.
    """
    size = pair(size)
    zoom = TASKS[task].zoom
    if view_size is not None:
        check(view_size >= size[0] and (view_size - size[0]) % 2 == 0,
              f"view size {view_size} is not {size[0]} or larger by an even number")
        zoom = view_size / size[0]
    return tuple(side + 2 * round(side * (zoom - 1) / 2) for side in size)


class Degraded(NamedTuple):
    """What a task makes of a view."""
    inputs: torch.Tensor  # (B, C, S, S) what the encoder is given
    hidden: torch.Tensor | None  # (B, N) bool, True = not seen by the encoder; drawn on the CPU
    target: torch.Tensor  # (B, C, S, S), or (B, C, V, V) where it is all of the view
    counted: torch.Tensor | None  # (B, N) bool, the patches that are compared; None = all
    filled: bool = False  # True: hidden patches hold a fill. False: the encoder drops them


def degrade(view, task, size=None, patch_size=16, generator=None, within=None, hidden=None,
            **settings):
    """A view (B, C, V, V) in [0, 1] -> Degraded, by the row `task` of TASKS.

    size: the input's S or (h, w), the view's by default. hidden (B, N) bool: a mask of one's own,
    of as many patches in every image. settings: as in task_settings(task), but for view_size, which
    is the view's. Without a `fill` hidden patches stay in `inputs`: the network has to drop them.
    """
    values = task_settings(task)
    row = TASKS[task]
    for name, value in settings.items():
        check(name in values, f"task {task} has no setting '{name}', but {', '.join(values)}")
        kind, _ = SETTINGS.get(name, (str, ""))
        allowed = [value] if callable(kind) else [None, *kind]
        check(value in allowed, f"{name} '{value}' is not one of {', '.join(map(str, allowed))}")
    values.update(settings)
    size = pair(size or view.shape[2:])
    grid = tuple(side // patch_size for side in size)
    check(view.is_floating_point(), f"a view is floats in [0, 1], not {view.dtype}")
    given = dict(size=size, patch_size=patch_size, generator=generator, within=within)

    # the picture
    inputs = scaled(call(row.picture, {**values, **given}, view), size)

    # which of its patches are hidden, and what is put there
    if hidden is None and values["mask_ratio"]:
        hidden = call(MASKS[values["mask_kind"]], dict(
            given, images=inputs, batch=len(view), grid=grid, ratio=values["mask_ratio"],
            unit=values["mask_unit"]))
    if hidden is not None:
        right = hidden.dtype == torch.bool and hidden.shape == (len(view), math.prod(grid))
        check(right, f"a mask is {len(view)} x {math.prod(grid)} bool, not {hidden.dtype} "
              f"{tuple(hidden.shape)}")
        least, most = hidden.sum(1).aminmax()
        check(least == most, f"a mask hides as many patches in every image, not {least} to {most}")
        check(most, f"mask ratio {values['mask_ratio']} hides none of the cells of "
              f"{values['mask_unit']} patches a side: choose a larger one, or 0")
    there = None if hidden is None else moved(hidden, view.device)
    filled = hidden is not None and values["fill"] is not None
    if filled:
        inputs = fill_hidden(inputs, there, patch_size, values["fill"])

    # what is to be recovered
    target = row.target(view, size)
    counted = there if row.compare == "hidden" else None
    return Degraded(inputs, hidden, target, counted, filled)


# --- Pictures ---

def read_image(path):
    """An image file as RGB, upright (EXIF): (3, H, W) uint8. 16 bits of grey are scaled to 8.

    ValueError where the range of its values is not known: floats, 32 bits, 12 bits or fewer in 16.
    """
    import numpy
    from PIL import Image, ImageOps  # comes with torchvision
    with open(path, "rb") as file, Image.open(file) as image:  # by name Pillow may mmap it
        wide = image.mode == "F" or image.mode == "I" and image.format != "PNG"
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            pixels = numpy.array(image)
            check(not wide and not 0 < pixels.max() < 4096, f"the range of its {image.mode} values "
                  "is not known: save 8 bits, or 16 that reach 65535")
            image = Image.fromarray((pixels / 257).astype(numpy.uint8))
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def onto(canvas, picture):
    """`picture` in the middle of a copy of `canvas`."""
    canvas = canvas.clone()
    center_crop(canvas, picture.shape[2:])[:] = picture
    return canvas


def seen(d, p):
    """What the encoder sees of Degraded `d`, within the target. Dropped patches are grey."""
    picture = d.inputs
    if d.hidden is not None and not d.filled:
        hidden = d.hidden.to(picture.device)
        picture = torch.where(patch_pixels(hidden, p, picture.shape[2:]), 0.5, picture)
    return onto(torch.full_like(d.target, 0.5), picture)


def paste_visible(recovered, d, p):
    """`recovered` (B, C, V, V), with the input in the patches that are not compared."""
    if d.counted is None:
        return recovered
    size = d.inputs.shape[2:]
    pixels = patch_pixels(d.counted, p, size)
    return onto(recovered, torch.where(pixels, center_crop(recovered, size), d.inputs))


def sheet(columns, titles, note="", side=128):
    """Columns of images (B, C, H, W) under titles, a row an image, as a Pillow picture. Of more
    channels the first three are shown, of two the first.
    """
    from PIL import Image, ImageDraw  # comes with torchvision
    B, _, H, W = columns[0].shape
    gap = 4
    top = 16
    width = round(side * W / H)
    bottom = top + B * (side + gap)
    page = torch.ones(3, bottom + (top if note else 0), gap + len(columns) * (width + gap))
    for i, images in enumerate(columns):
        images = images[:, :3 if images.shape[1] > 2 else 1].detach().float().cpu()
        if H < side:
            images = F.interpolate(images, (side, width), mode="nearest-exact")
        for j, picture in enumerate(scaled(images, (side, width)).clamp(0, 1)):
            y = top + j * (side + gap)
            x = gap + i * (width + gap)
            page[:, y:y + side, x:x + width] = picture
    page = Image.fromarray((page * 255).round().byte().permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        pen.text((gap + i * (width + gap), 2), title, "black")
    pen.text((gap, bottom), note, "black")
    return page


def example_picture(size):
    """A sun, a hill and a house, to show tasks on: (1, 3, size, size)."""
    x = (torch.arange(size) + 0.5) / size
    y = x[:, None]
    picture = torch.stack([0.45 + 0.5 * y, 0.7 + 0.2 * y, 1 - 0.25 * y])
    for where, color in (
        ((x - 0.78) ** 2 + (y - 0.2) ** 2 < 0.01, (1.0, 0.85, 0.2)),
        (y > 0.6 + 0.08 * torch.sin(7 * x), (0.4, 0.65, 0.3)),
        (((x - 0.38).abs() < 0.16) & ((y - 0.62).abs() < 0.14), (0.85, 0.45, 0.35)),
        ((y > 0.3 + 0.9 * (x - 0.38).abs()) & (y < 0.49), (0.5, 0.2, 0.2)),
    ):
        picture = torch.where(where, torch.tensor(color).view(3, 1, 1), picture)
    return picture[None]


def main(argv=None):
    parser = argparse.ArgumentParser(description="One picture of every task.", allow_abbrev=False)
    parser.add_argument("image", nargs="?", help="an image file; default: a drawn scene")
    parser.add_argument("--out", default="tasks.png", help="default: tasks.png")
    args = parser.parse_args(argv)
    photo = example_picture(512)
    try:
        if args.image:
            photo = read_image(args.image)[None].float() / 255
            photo = center_crop(photo, min(photo.shape[2:]))
        columns = []
        for name in TASKS:
            view = scaled(photo, view_size(name, 224)).clamp(0, 1)
            d = degrade(view, name, 224, 16, torch.Generator().manual_seed(0))
            shown = [scaled(x, (224, 224)) for x in (view, seen(d, 16), d.target)]
            columns.append(torch.cat(shown))
        note = "rows: the view; what the encoder sees; what is to be recovered"
        sheet(columns, list(TASKS), note, side=160).save(args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"degrade.py: {error}\n")
    print(f"wrote {args.out!a}: {', '.join(TASKS)}")


if __name__ == "__main__":
    main()
