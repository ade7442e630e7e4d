"""Pre-train an encoder by recovering damaged images: *Beyond Masking* (BM, arXiv 2203.14313), sections 3, 4.1, A, and
*Architecture-Agnostic Masked Image Modeling* (A2, arXiv 2205.13943), sections 4, 5.1, 5.4, A.1.

    python pretrain.py --task zoom_in_mask                                     a laptop's CPU, built-in data
    python pretrain.py --task a2mim --model resnet18                           the same, another task and backbone
    torchrun --nproc_per_node=2 pretrain.py --task zoom_in_mask                the same run on two processes
    torchrun --nproc_per_node=8 pretrain.py --task zoom_in_mask --data /path/to/imagenet       the paper's run
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 \\
        pretrain.py --task zoom_in_mask --data /path/to/imagenet                               on two machines

view (an augmented image batch) -> degrade (what the encoder sees, what is hidden, what is to be recovered)
-> model (patches) -> losses (a number). A run leaves checkpoint.pt, log.jsonl, config.json and pictures in --out.
The built-in data takes minutes on a CPU; the papers' runs are days on many GPUs.

Randomness is a function of (seed, step), or (seed, epoch, image) for what a loader reads, never of how the work is
split: processes, accumulation, workers and resuming do not change what is drawn.
Exit code: 0 done, 1 the run failed, 2 bad request, 130 / 143 stopped by a signal after saving.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import degrade
import losses
import models

try:                                             # the faster decoder; torchvision announces that it will go
    from torchvision.io import ImageReadMode, decode_image, read_file
    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities")
except ImportError:
    decode_image = None

# What a data set and a paper ask for when the command line does not say; a row of three keys goes over its row of two.
# A folder of images gets the paper's recipe (A2: Tables A1, 1, 2), the rest a small one that fits a CPU. lr is per 256
# images of the global batch; clip: largest norm of the gradient, 0 none; micro: the largest batch of one process.
SMALL = dict(model="vit_micro", img_size=[32], patch_size=4, batch_size=256, micro=256, lr=1.5e-3, weight_decay=0.05)
RECIPES = {
    ("folder", "BM"): dict(model="vit_base", img_size=[224], patch_size=16, epochs=300, warmup=40, batch_size=4096, micro=64,
                           lr=1.5e-4, weight_decay=0.05, betas=[0.9, 0.95], clip=0, crop=[0.2, 1.0]),
    ("folder", "A2"): dict(model="vit_base", img_size=[224], patch_size=16, epochs=300, warmup=10, batch_size=2048, micro=64,
                           lr=1e-4, weight_decay=0.05, betas=[0.9, 0.999], clip=5, crop=[0.67, 1.0]),
    ("folder", "A2", "vit_base"): dict(epochs=800),
    ("folder", "A2", "resnet"): dict(lr=1.5e-4, clip=0),
    ("shapes", "BM"): dict(**SMALL, epochs=15, warmup=0.75, betas=[0.9, 0.95], clip=0, crop=[0.5, 1.0]),
    ("shapes", "A2"): dict(**SMALL, epochs=10, warmup=0.5, betas=[0.9, 0.999], clip=5, crop=[0.67, 1.0]),
    ("small", "BM"): dict(**SMALL, epochs=12, warmup=0.6, betas=[0.9, 0.95], clip=0, crop=[0.5, 1.0]),
    ("small", "A2"): dict(**SMALL, epochs=6, warmup=0.3, betas=[0.9, 0.999], clip=5, crop=[0.67, 1.0]),
    **{(data, paper, "resnet"): dict(img_size=[64], patch_size=8, clip=0, epochs=epochs, warmup=epochs / 20)
       for data, epochs in (("shapes", 5), ("small", 3)) for paper in ("BM", "A2")},
}
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "fashion_mnist": "FashionMNIST"}
SAME_RUN = ("task", "model", "token_at", "token_how", "relative_positions", "data", "images", "img_size",
            "patch_size", "decoder", "total_steps", "warmup_steps", "batch_size", "lr", "weight_decay", "betas", "clip", "crop",
            "seed", "norm_target", "band_weight", "loss", "freq_weight", "freq_alpha", "freq_batch_mean")


def recipe_of(data, paper, model=None):
    """The row of RECIPES for --data, the paper of the task, and the model (the row's own if None), as a new dict."""
    kind = "shapes" if data == "shapes" else "small" if data in TORCHVISION else "folder"
    row = dict(RECIPES[kind, paper])
    model = model or row["model"]
    for whose in ("resnet" if model in models.RESNETS else "vit", model):
        row.update(RECIPES.get((kind, paper, whose), {}))
    return row


class BadRequest(Exception):
    """What the user asked for cannot be done. One line: the value, why, and what would do. Exit code 2.

    Empty, here and in Failure: this process stops because another one said why.
    """


class Failure(Exception):
    """The run cannot go on. One line; the last good checkpoint is intact. Exit code 1."""


class Unwritten(Failure, OSError):
    """A file could not be written. An OSError too, for callers that can say what to do about it."""


@contextlib.contextmanager
def refusing(whose=""):
    """A ValueError of degrade.py and models.py, which know no command line, becomes a BadRequest."""
    try:
        yield
    except ValueError as error:
        raise BadRequest(f"{whose}{error}")


def seeded(*key):
    """A CPU generator that depends on all the non-negative integers of `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


CROP, DAMAGE, ORDER, PICTURE, AUGMENT, LABELS = range(6)        # streams of random numbers that must not meet
MIX, DROP, LINEAR, BLOCKS = range(100, 104)                     # those of finetune.py and probe.py
CHOSEN, HIDDEN, PAIRS, CONTEXTS = range(200, 204)               # those of analyze.py


# ---------------------------------------------------------------------------------------------------
# Files: written whole or not at all
# ---------------------------------------------------------------------------------------------------

def write_whole(path, write):
    """write(file) into a neighbour of `path`, then put it in its place: a reader never meets half a file."""
    temporary = f"{path}.part"                                  # one name: what a killed run left is written over
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                    # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        why = error if isinstance(error, OSError) else "the disk may be full"
        raise Unwritten(f"could not write {path}: {why}") from error


def load_checkpoint(path):
    """A checkpoint of this project, as a dict. BadRequest when it is missing, damaged, foreign or holds code."""
    if not os.path.isfile(path):
        raise BadRequest(f"no checkpoint at {path}: give the path of a checkpoint.pt, or --resume alone to start anew")
    with refusing():
        state = models.read_weights(path)
    missing = [k for k in ("model", "optimizer", "scaler", "step", "config", "progress") if k not in state]
    if missing:
        raise BadRequest(f"{path} is not a run's checkpoint (no '{missing[0]}' in it): "
                         "--resume takes a checkpoint.pt written by this script, --weights takes plain weights")
    return state


# ---------------------------------------------------------------------------------------------------
# Data: views
# ---------------------------------------------------------------------------------------------------

def crop_boxes(u, height, width, scale):
    """RandomResizedCrop's box for each row of uniform numbers u, numpy (n, 22): (n, 4) = (top, left, height, width).

    scale: share of the area, aspect 3/4 .. 4/3 (log-uniform); the first of ten tries that fits the image counts,
    or else the largest central box of an allowed aspect. (numpy: a loader calls it for one image at a time.)
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :10])                     # (n, 10)
    aspect = np.exp((2 * u[:, 10:20] - 1) * math.log(4 / 3))
    w, h = np.maximum(1, np.rint(np.sqrt(area * aspect))), np.maximum(1, np.rint(np.sqrt(area / aspect)))
    fits = (w <= width) & (h <= height)
    rows, first, some = np.arange(len(u)), fits.argmax(1), fits.any(1)
    h = np.where(some, h[rows, first], min(height, round(width * 4 / 3)))
    w = np.where(some, w[rows, first], min(width, round(height * 4 / 3)))
    top = np.floor(np.where(some, u[:, 20], 0.5) * (height - h + 1))
    left = np.floor(np.where(some, u[:, 21], 0.5) * (width - w + 1))
    return np.stack([top, left, h, w], axis=1).astype(np.float32)


@functools.lru_cache(maxsize=2)
def _permutation(length, seed, epoch):
    return torch.randperm(length, generator=seeded(seed, ORDER, epoch))


def samples(step, batch, length, seed):
    """(epoch, index) of each image of the global batch `step`: (batch, 2) int64. Every epoch is a permutation of
    all images, and a batch may begin in one epoch and end in the next, so none is left out.
    """
    place = torch.arange(step * batch, (step + 1) * batch)
    epochs, within = place // length, place % length
    index = torch.empty_like(place)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        index[here] = _permutation(length, seed, epoch)[within[here]]
    return torch.stack([epochs, index], dim=1)


class MemorySet:
    """Images that fit in memory, (n, C, H, W) uint8 on the device, cropped and flipped there as a batch.

    labels: (n,) int64, or None; classes: their names. shown: images for the pictures of a run; the set's own by default.
    """

    def __init__(self, images, labels, device, classes=None, shown=None):
        self.images, self.labels, self.classes, self.channels = images.to(device), labels, classes, images.shape[1]
        self.shown = self.images if shown is None else shown.to(device)

    def __len__(self):
        return len(self.images)

    def keep(self, rows):
        """The set of these rows alone."""
        return MemorySet(self.images[rows.to(self.images.device)], self.labels[rows], self.images.device, self.classes)

    def batches(self, steps, batch, parts, size, scale, seed, augment=None, **_):
        """Yields (view (k, C, *size) in [0, 1], labels (k,) or None, no bad files) for every step and every part =
        (first, k) of it. augment(image (C, *size) uint8, generator) -> image, or None.
        """
        H, W = self.images.shape[2:]
        for step in steps:
            places = samples(step, batch, len(self), seed)
            u = torch.rand(batch, 23, generator=seeded(seed, CROP, step))
            box, flip = torch.from_numpy(crop_boxes(u.numpy(), H, W, scale)), u[:, 22] < 0.5
            for first, k in parts:
                rows = slice(first, first + k)
                index = places[rows, 1]
                images = self.images[index.to(self.images.device)].float() / 255
                view = degrade.crop_resize(images, box[rows].to(images.device), size, cubic=True).clamp(0, 1)
                view = torch.where(flip[rows, None, None, None].to(view.device), view.flip(3), view)
                if augment:
                    pixels = (view * 255).round().to(torch.uint8).cpu()
                    pixels = [augment(x, seeded(seed, AUGMENT, *place)) for x, place in zip(pixels, places[rows].tolist())]
                    view = torch.stack(pixels).to(view.device).float() / 255
                yield view, None if self.labels is None else self.labels[index].to(view.device), []

    def plain(self, rows, batch, size, crop=1.0, **_):
        """Yields the images of `rows` in order: their central part, `crop` of it a side, as (views, labels, no bad files)."""
        h, w = central_box(*self.images.shape[2:], size, crop)
        for index in rows.split(batch) if len(rows) else ():
            images = degrade.center_crop(self.images[index.to(self.images.device)].float() / 255, (h, w))
            box = torch.tensor([0.0, 0.0, h, w], device=images.device).expand(len(images), 4)
            views = degrade.crop_resize(images, box, size, cubic=True).clamp(0, 1)
            yield views, None if self.labels is None else self.labels[index].to(views.device), []

    def picture_views(self, n, size):
        return degrade.scaled(self.shown[:n].float() / 255, size)


class Shapes(NamedTuple):
    """The built-in data: one object on a background, what it is and where, known by construction."""
    images: torch.Tensor                # (n, 3, size, size) uint8
    labels: torch.Tensor                # (n,) int64: SHAPES' row
    masks: torch.Tensor                 # (n, size, size) bool: the object's pixels

    @property
    def boxes(self):
        """x0, y0, x1, y1 of each mask in pixels: (n, 4) float."""
        return torchvision.ops.masks_to_boxes(self.masks)


def _bar(a, b, width, height):
    return torch.minimum(width - a.abs(), height - b.abs())


# Each shape as a function of (u, v) in its own frame: positive inside, about the distance to the outline.
SHAPES = {
    "disc": lambda u, v: 0.9 - (u * u + v * v).sqrt(),
    "ring": lambda u, v: 0.24 - ((u * u + v * v).sqrt() - 0.7).abs(),
    "square": lambda u, v: _bar(u, v, 0.8, 0.8),
    "triangle": lambda u, v: 0.55 - torch.stack([v, 0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v]).amax(0),
    "cross": lambda u, v: torch.maximum(_bar(u, v, 0.28, 0.95), _bar(u, v, 0.95, 0.28)),
    "star": lambda u, v: 0.38 + 1.24 * ((torch.atan2(v, u) * 2.5 / math.pi) % 1 - 0.5).abs() - (u * u + v * v).sqrt(),
    "crescent": lambda u, v: torch.minimum(0.95 - (u * u + v * v).sqrt(), ((u - 0.45) ** 2 + v * v).sqrt() - 0.7),
    "corner": lambda u, v: torch.maximum(_bar(u + 0.55, v, 0.3, 0.9), _bar(u, v - 0.6, 0.85, 0.3)),
    "bars": lambda u, v: _bar(u.abs() - 0.55, v, 0.24, 0.9),
    "half_disc": lambda u, v: torch.minimum(1 - (u * u + (v + 0.45) ** 2).sqrt(), v + 0.45),
}


def shapes(n, size=48, seed=0, chunk=500):
    """n generated pictures, (n, 3, size, size), their ten classes in equal parts and random order.

    The label is the shape alone: colours, faint stripes, background, place, size, turn (up to 1 rad either
    way) and aspect are random. The object fills more than half of the picture's width.
    """
    generator = seeded(seed, n, size)
    labels = (torch.arange(n) % len(SHAPES))[torch.randperm(n, generator=generator)]
    u01 = torch.rand(n, 20, generator=generator)
    images, masks = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.empty(n, size, size, dtype=torch.bool)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1

    def wave(angle):                                            # the coordinate along a direction, (k, size, size)
        return axis * torch.cos(2 * math.pi * angle) + axis[:, None] * torch.sin(2 * math.pi * angle)

    for label, outline in enumerate(SHAPES.values()):
        for rows in (labels == label).nonzero()[:, 0].split(chunk):
            r = u01[rows].T[:, :, None, None]                                                  # (20, k, 1, 1)
            radius, aspect, turn = 0.62 + 0.28 * r[0], 2 ** (0.5 * r[1] - 0.25), 2 * r[2] - 1
            x, y = (axis.view(shape) - (2 * c - 1) * (1.05 - radius) for shape, c in (((1, -1), r[3]), ((-1, 1), r[4])))
            u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
            inside = outline(u / radius * aspect, v / radius / aspect) * radius * size / 2      # in pixels
            near, far, paint = (c.movedim(0, 1) for c in (r[5:8], (r[5:8] + 0.5 * r[8:11] - 0.25).clamp(0, 1), r[11:14]))
            ramp = (0.5 + wave(r[14]) / 2.84)[:, None]
            ground = near * (1 - ramp) + far * ramp                                            # (k, 3, size, size)
            middle = (near + far) / 2
            close = (paint - middle).abs().amax(1, keepdim=True) < 0.45                        # an object must show
            paint = torch.where(close, (middle + 0.5) % 1, paint)
            paint = paint + 0.06 * torch.sin(math.pi * (6 + 10 * r[16]) * wave(r[15]))[:, None]                 # stripes
            cover = (0.5 + inside).clamp(0, 1)[:, None]
            images[rows] = ((ground * (1 - cover) + paint * cover).clamp(0, 1) * 255).round().to(torch.uint8)
            masks[rows] = inside > 0
    return Shapes(images, labels, masks)


IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def read_image(path):
    """Any image file as RGB: (3, H, W) uint8, upright (EXIF). OSError, with the reason, when it cannot be read."""
    if decode_image and not path.lower().endswith(".webp"):     # it does not turn WebP upright
        with contextlib.suppress(RuntimeError):                 # Pillow reads more kinds, and says what is wrong
            image = decode_image(read_file(path), ImageReadMode.RGB, apply_exif_orientation=True)
            if image.dtype == torch.uint8 and image.ndim == 3:  # neither 16 bits nor animated
                return image
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                      # 16 bits a pixel
                pixels = np.asarray(image, dtype=np.float32) / 257
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:                                  # Pillow's plug-ins raise whatever they like
        raise OSError(f"{path}: {type(error).__name__} {error}".splitlines()[0]) from error


def shrink(image, size):
    """(3, H, W) uint8 -> (3, *size) uint8, bicubic and antialiased."""
    return F.interpolate(image[None], tuple(size), mode="bicubic", antialias=True)[0]


def central_box(height, width, size, crop=1.0):
    """(height, width) of the largest centred box with the proportions of `size`, times `crop`."""
    short = min(height / size[0], width / size[1]) * crop
    return [max(1, round(side * short)) for side in size]


def image_files(folder):
    """The paths of all images below, sorted. Links are followed, into no folder twice; a run's own pictures are no data."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        folders.sort()                                          # of two ways into a folder the same one counts everywhere
        real = os.path.realpath(where)
        if real in seen or {"config.json", "log.jsonl"} <= set(names):
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(where, name) for name in names if name.lower().endswith(IMAGE_FILES)]
    return sorted(found)


class FolderSet:
    """All images below a folder, nested or flat, read by loader processes. labelled: folder/<class>/..., else BadRequest."""
    channels = 3

    def __init__(self, folder, labelled=False):
        found = image_files(folder)
        self.labels = self.classes = None
        if labelled:
            of = [os.path.relpath(path, folder).split(os.sep) for path in found]
            loose = [path[0] for path in of if len(path) < 2]
            if loose:
                raise BadRequest(f"{os.path.join(folder, loose[0])} is in no class: labelled images are {folder}/<class>/...")
            self.classes = sorted({path[0] for path in of})
            number = {name: i for i, name in enumerate(self.classes)}
            self.labels = torch.tensor([number[path[0]] for path in of], dtype=torch.long)
        if not found:
            raise BadRequest(f"no images in {folder}: looked there and below for {' '.join(IMAGE_FILES)}")
        self.paths = np.array([os.fsencode(p) for p in found])                 # one block, not a million objects

    def __len__(self):
        return len(self.paths)

    def keep(self, rows):
        """The set of these rows alone."""
        less = copy.copy(self)
        less.paths, less.labels = self.paths[rows.numpy()], self.labels[rows]
        return less

    def path(self, index):
        return os.fsdecode(self.paths[index])

    def view(self, item, size, scale, seed, augment=None):
        """(epoch, index) -> view (3, *size) uint8, or None if there is none; the index of the image it is of; and None or
        (the file that could not be read, why).
        """
        (epoch, index), bad = item, None
        for other in range(min(100, len(self))):                # a bad image is replaced by the next good one
            place = (index + other) % len(self)
            try:
                image = read_image(self.path(place))
                break
            except OSError as error:
                bad = bad or (self.path(index), str(error))
        else:
            return None, place, bad
        u = torch.rand(1, 23, generator=seeded(seed, CROP, epoch, index)).numpy()
        top, left, h, w = crop_boxes(u, *image.shape[1:], scale)[0].astype(int).tolist()
        view = shrink(image[:, top:top + h, left:left + w], size)
        view = view.flip(2) if u[0, 22] < 0.5 else view
        return augment(view, seeded(seed, AUGMENT, epoch, index)) if augment else view, place, bad

    def central(self, index, size, crop):
        """As `view`, of the central part of the image, `crop` of it a side."""
        try:
            image = read_image(self.path(index))
        except OSError as error:
            return None, index, (self.path(index), str(error))
        return shrink(degrade.center_crop(image[None], central_box(*image.shape[1:], size, crop))[0], size), index, None

    def _load(self, read, wanted, device, workers):
        """Yields (views (k, 3, H, W) in [0, 1] of the items that could be read, or None; labels; [(bad file, why), ...])."""
        loader = torch.utils.data.DataLoader(
            Reader(read), batch_sampler=wanted, num_workers=workers, collate_fn=_stack, worker_init_fn=_worker,
            pin_memory=device.type == "cuda")                   # CUDA only: copies overlap with computing
        for views, index, bad in loader:
            views = None if views is None else views.to(device, non_blocking=True).float() / 255
            yield views, None if self.labels is None else self.labels[index].to(device), bad

    def batches(self, steps, batch, parts, size, scale, seed, device, workers, augment=None):
        """As MemorySet.batches, and the bad files met: [(path, why), ...]. Read by `workers` processes."""
        wanted = (samples(step, batch, len(self), seed)[first:first + k].tolist() for step in steps for first, k in parts)
        read = functools.partial(self.view, size=size, scale=scale, seed=seed, augment=augment)
        for (views, labels, bad), (_, k) in zip(self._load(read, wanted, device, workers), itertools.cycle(parts)):
            if views is None or len(views) < k:
                raise Failure(f"{bad[0][1]}; nor can the images after it be read: look into {os.path.dirname(bad[0][0])}")
            yield views, labels, bad

    def plain(self, rows, batch, size, crop=1.0, device=torch.device("cpu"), workers=0):
        """As MemorySet.plain; images that cannot be read are left out: views may be None."""
        read = functools.partial(self.central, size=size, crop=crop)
        return self._load(read, [part.tolist() for part in rows.split(batch)], device, workers)

    def picture_views(self, n, size):
        rows = torch.arange(min(len(self), 100 * n))            # of the first n a file may be bad
        return next(views for views, _, _ in self.plain(rows, n, size) if views is not None)


class Reader:
    """What torch's DataLoader asks for items."""

    def __init__(self, read):
        self.read = read

    def __getitem__(self, item):
        return self.read(item)


def _stack(items):
    views, index = [view for view, _, _ in items if view is not None], [i for view, i, _ in items if view is not None]
    return torch.stack(views) if views else None, index, [bad for _, _, bad in items if bad]


def _worker(_):
    for number in (signal.SIGINT, signal.SIGTERM):              # sent to the whole group; the trainer's to answer
        signal.signal(number, signal.SIG_IGN)


def load_data(config, place, split="train", labelled=False):
    """--data as a set with .channels, .labels, .classes, len(), .batches(...), .plain(...) and .picture_views(...).

    split: "train" or "val". labelled: a folder must be DIR/SPLIT/<class>/... BadRequest when there is no such data.
    """
    name, device, train = config["data"], place.device, split == "train"
    if name == "shapes":
        made = shapes(30000, seed=0) if train else shapes(5000, seed=1)
        return MemorySet(made.images, made.labels, device, list(SHAPES), shapes(20, seed=1).images if train else None)
    if name in TORCHVISION:
        kind, which = getattr(torchvision.datasets, TORCHVISION[name]), dict(train=train)
        if name == "stl10":
            which = dict(split="test" if not train else "train" if labelled else "train+unlabeled")
        trouble = ""
        for turn in (0, 1):                                     # rank 0 fetches, then the others look
            if (place.rank > 0) == turn:
                try:
                    made = kind(config["root"], download=config["download"] and not turn, **which)
                except (RuntimeError, OSError) as error:
                    trouble = (f"{name} is not in {config['root']} ({str(error).splitlines()[0]}): add --download, or --root "
                               "with the folder that holds it, for all machines")
            all_stop(trouble, place, BadRequest)
        images = torch.as_tensor(made.data)
        images = images[:, None] if images.ndim == 3 else images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(made.labels if name == "stl10" else made.targets).long()
        return MemorySet(images.contiguous(), labels, device, made.classes)
    if not os.path.isdir(name):
        raise BadRequest(f"--data {name} is neither a folder nor one of shapes, {', '.join(TORCHVISION)}")
    inner = os.path.join(name, split)
    if labelled and not os.path.isdir(inner):
        raise BadRequest(f"there is no {inner}: labelled images are {name}/train/<class>/... and {name}/val/<class>/...")
    return FolderSet(inner if os.path.isdir(inner) else name, labelled)


# ---------------------------------------------------------------------------------------------------
# Processes, precision, schedule
# ---------------------------------------------------------------------------------------------------

class Place(NamedTuple):
    """Where this process stands: rank of world, its device, and how many processes its machine has."""
    rank: int
    world: int
    device: torch.device
    per_node: int = 1


def set_up(device="auto"):
    """Join the processes torchrun started (or be the only one), divide the cores as threads (in place
    of OMP_NUM_THREADS), choose the device -> Place.
    """
    rank, world, local, per_node = (int(os.environ.get(k, d)) for k, d in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise BadRequest("--device cuda: torch sees no CUDA device here, choose --device cpu")
        if per_node > torch.cuda.device_count():
            raise BadRequest(f"{per_node} processes on a machine with {torch.cuda.device_count()} GPUs: "
                             "lower --nproc_per_node, or --device cpu")
        torch.cuda.set_device(local)                            # CUDA only: one GPU a process
        device = f"cuda:{local}"
    if device == "mps" and (world > 1 or not torch.backends.mps.is_available()):
        raise BadRequest(f"--device mps: torch sees no Metal device here, or {world} processes are too many for it, "
                         "choose --device cpu")
    torch.set_num_threads(max(1, cores() // per_node))
    with contextlib.suppress(OSError, AttributeError):          # CPU, glibc: keep freed memory. Asking the system for it
        libc = ctypes.CDLL("libc.so.6")                         # again at every operation costs a tenth of a step and more
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)      # M_MMAP_MAX, M_TRIM_THRESHOLD
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Place(rank, world, torch.device(device), per_node)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def loaders(workers, place):
    """--workers resolved: 1 on a CPU, up to 8 with a GPU."""
    return workers if workers is not None else max(1, min(8, cores() // place.per_node)) if place.device.type == "cuda" else 1


AUTOCAST = {"bf16": (torch.bfloat16, True), "fp16": (torch.float16, True), "off": (None, False)}      # dtype, enabled


def precision(amp, device):
    """--amp resolved: "auto" is bf16 where the hardware has it, else fp16 (with a gradient scaler) on a GPU, else off."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast = any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if device.type == "cpu" and fast else "off"


def learning_rate(step, total, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model, weight_decay, scale=lambda name: 1.0):
    """No weight decay on biases, norms, tokens and positions. scale(name): the factor on its learning rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            free = p.ndim <= 1 or any(word in name for word in ("_token", "pos_embed", "relative_position"))
            decay, key = 0.0 if free else weight_decay, (free, scale(name))
            groups.setdefault(key, dict(params=[], weight_decay=decay, lr_scale=key[1]))["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def sum_over_processes(values, place):
    """Sum a list of numbers over the processes. Every process calls it at the same point of the loop."""
    if place.world == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=place.device)
    dist.all_reduce(summed)
    return summed.tolist()


def all_stop(trouble, place, kind=Failure):
    """`kind` in every process if one of them has a trouble; those without say nothing. Every process calls it."""
    if sum_over_processes([float(bool(trouble))], place)[0]:
        raise kind(trouble)


class Signals:
    """SIGTERM and Ctrl-C are remembered, and answered at the end of the step. torchrun may send either twice, so
    only a second Ctrl-C, a second or more later, ends the process at once.
    """

    def __init__(self, says):
        self.received, self.when, self.says = 0, 0.0, says
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        if self.received and number == signal.SIGINT and time.monotonic() > self.when + 1:
            raise KeyboardInterrupt
        if not self.received and self.says:                     # not print, whose buffer may be in use just now
            os.write(2, b"\nsaving at the end of this step; a second Ctrl-C leaves at once, without\n")
        self.received, self.when = int(number), time.monotonic()


def lock(file):
    """Lock a file for as long as this process lives, not its loaders. ValueError when another one is at work on it."""
    with contextlib.suppress(ImportError, OSError):             # where the system has no such locks
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is at work on {file.name}: wait for its end, or give another --out")


class Log:
    """log.jsonl: a JSON object a line. Going on from `step` drops the lines after it, so each step stands once; lines: the
    ones that stay. ValueError when the file is damaged, or another process is at work on it.
    """

    def __init__(self, path, step):
        self.lines = []
        if os.path.isfile(path):
            with open(path, "r+") as file:
                lock(file)
                try:
                    every = [json.loads(text) for text in file if text.endswith("\n")]
                    self.lines = [line for line in every if line["step"] <= step]
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"{path} is damaged, a line is not of this project's: mend it, or delete it")
            write_whole(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode()))
        self.file, self.trouble = open(path, "a", buffering=1), ""
        if os.path.isfile(path):
            lock(self.file)

    def __call__(self, **line):
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:                                # said to all processes by the next save
            self.trouble = f"could not write {self.file.name}: {error}. Make room, then --resume"


# ---------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise BadRequest(f"{message} (see --help)")


def common_options(p, says, only=None):
    """The options that mean the same in every script, or `only` those of them. says: the default of each that a recipe
    settles, in words.
    """
    def o(name, help, default=None, **more):
        if only is None or name[2:] in only:
            shown = f"; default: {says.get(name[2:], default)}" if name[2:] in says or default is not None else ""
            p.add_argument(name, help=help + shown, **more, **({} if "action" in more else dict(default=default)))
    o("--data", "a folder of images, or shapes (built in), " + ", ".join(TORCHVISION), "shapes", metavar="DIR|NAME")
    o("--root", "where the torchvision sets are kept", "data")
    o("--download", "fetch the torchvision set into --root if it is not there", action="store_true")
    o("--model", "the network", choices=models.MODELS)
    o("--img_size", "input size S, or height and width", type=int, nargs="+", metavar="PX")
    o("--patch_size", "side of a ViT's patches, and of what is hidden or not", type=int, metavar="PX")
    o("--epochs", "passes over the data", type=float)
    o("--steps", "a complete run of so many optimiser steps, warm-up and decay included, whatever --epochs says", type=int)
    o("--batch_size", "images per optimiser step over all processes", type=int)
    o("--accum", "batches a step is split into on each process", type=int)
    o("--lr", "base learning rate, per 256 images of the batch", type=float)
    o("--weight_decay", "not on biases, norms, tokens and positions", type=float)
    o("--betas", "of the two running means", type=float, nargs=2, metavar=("B1", "B2"))
    o("--clip", "scale gradients down to this norm; 0: never", type=float, metavar="NORM")
    o("--warmup", "epochs of linear warm-up", type=float, metavar="EPOCHS")
    o("--crop", "area of the random crop", type=float, nargs=2, metavar=("MIN", "MAX"))
    o("--seed", "of all that is random", 0, type=int)
    o("--device", "auto: a GPU if there is one", "auto", choices=("auto", "cpu", "cuda", "mps"))
    o("--amp", "mixed precision; auto: what the device is fast at", "auto", choices=("auto", "bf16", "fp16", "off"))
    o("--workers", "loader processes for a folder", type=int)
    o("--compile", "torch.compile the model", action="store_true")
    o("--out", "the run's folder", metavar="DIR")
    o("--resume", "go on from a checkpoint; without a path from the one in --out, if it is there", nargs="?", const="auto",
      metavar="PATH")
    o("--save_every", "steps between checkpoints", type=int, metavar="STEPS")
    o("--log_every", "steps between lines of log.jsonl", 20, type=int, metavar="STEPS")
    o("--weights", "a run's folder, or weights (ours, MAE's, timm's or torchvision's names)", "none", metavar="PATH|none")


def in_words(values):
    """{whose: value} for --help: "0.75 (mask, zoom_in_mask), 0.6 (simmim, a2mim)", or the value that all share; without None."""
    whose = {v: [name for name, w in values.items() if w == v] for v in values.values()}
    return ", ".join(f"{v} ({', '.join(names)})" if len(whose) > 1 else f"{v}" for v, names in whose.items() if v is not None)


def by_recipe(recipes, option):
    """The recipes' values of an option, for --help; a row without it leaves that of the row it goes over."""
    said = {name if isinstance(name, str) else " ".join(name): row[option] for name, row in recipes.items() if option in row}
    return in_words({name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in said.items()})


DEVICE_SAYS = dict(workers="1 on a CPU, up to 8 with a GPU", steps="by --epochs",
                   accum="as few as keep each batch at 64 images or fewer (256 for the small sets)")
SAYS = dict(
    **DEVICE_SAYS,
    **{option: by_recipe(RECIPES, option) for option in ("model", "img_size", "patch_size", "epochs", "batch_size", "lr",
                                                         "weight_decay", "betas", "clip", "crop")},
    warmup="the same share of any run: 40 of 300 (A2's tasks 10 of 300, ViT-B of 800), a twentieth of a small one",
    save_every="a twentieth of the run, at least 50; with a picture",
    out="that of --resume PATH, or runs/TASK-MODEL-DATA")


def options():
    p = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
               epilog="defaults are by data (folder, shapes, small: the sets by name), the task's paper (BM, A2), the model\n\n"
                      "tasks:\n" + "\n".join(f"  {name:13} {row.about}" for name, row in degrade.TASKS.items()))
    p.add_argument("--task", default="zoom_in_mask", choices=degrade.TASKS, help="default: zoom_in_mask")
    common_options(p, SAYS)
    m = p.add_argument_group("where the mask token enters").add_argument
    m("--token_at", metavar="PLACE",
      help="decoder (a ViT's only: hidden patches are dropped, MAE), input (as 0), middle, none, or the layer or stage it "
      "follows, 0: the projection or stem; default: decoder for BM's tasks (a ResNet: middle), input for simmim, middle for "
      "a2mim; middle is ViT-S 5, ViT-B 8, stage 3")
    m("--token_how", choices=models.TOKEN_HOWS,
      help="added to the features, instead of them, or (A2's code) added to them times a learned factor that starts at 1e-6; "
      "default: add, for simmim and --fill token replace")
    m("--decoder", metavar="DEPTHxWIDTHxHEADS", help="default: 4x384x6 (BM), 2x64x2 for vit_micro; MAE's is 8x512x16")
    m("--relative_positions", action="store_true", help="a relative position bias in the ViT, learned from zero (A2 A.2)")
    l = p.add_argument_group("the loss").add_argument
    l("--loss", choices=("mse", "l1"), help="distance in pixels; default: mse, for A2's tasks l1")
    l("--norm_target", choices=("patch", "channel", "off"),
      help="target pixels normalised per patch (MAE), per patch and channel (BM's code), or plain; default: patch, for A2's "
      "tasks off")
    l("--band_weight", type=float, help="weight of the outer band in zoom_in_mask, the centre's is one minus it; default: 0.2")
    l("--freq_weight", type=float, help="lambda, weight of the focal frequency loss (A2 eq. 6); default: 0, for a2mim 0.5")
    l("--freq_alpha", type=float, help="exponent of its weighting (A2 eq. 5), 0 is no weighting; default: 1")
    l("--freq_batch_mean", action="store_true",
      help="compare spectra averaged over the images a process holds at once, as A2's code does: errors of different images "
      "cancel, and the run depends on --accum and the number of processes")
    tasks = p.add_argument_group("settings of the tasks", "default: the paper's best")
    for name, defaults in settings().items():
        default = next((v for v in defaults.values() if v is not None), None)
        several = isinstance(default, tuple)
        kind, text = degrade.SETTINGS.get(name, (type(default[0] if several else default), "a setting"))
        what = dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind)
        shown = "the paper's, at this size" if default is None else in_words(defaults)
        tasks.add_argument(f"--{name}", help=f"{text}; default: {shown}", **what, **(dict(nargs=len(default)) if several else {}))
    return p


def settings():
    """Every setting of every task: {setting: {task: default}}."""
    every = {task: degrade.task_settings(task) for task in degrade.TASKS}
    names = dict.fromkeys(name for row in every.values() for name in row)
    return {name: {task: row[name] for task, row in every.items() if name in row} for name in names}


def resolve(args, place, length, channels):
    """The command line and the data's recipe as one dict of JSON values. BadRequest for what cannot be run."""
    c, row = dict(vars(args)), degrade.TASKS[args.task]
    recipe = recipe_of(c["data"], row.paper, c["model"])
    settle(c, recipe)
    size, taken = c["img_size"], degrade.task_settings(c["task"])
    given = {k: c.pop(k) for k in settings()}
    stray = [k for k, v in given.items() if v is not None and k not in taken]
    if stray:
        raise BadRequest(f"--{stray[0]} does nothing in task {c['task']}: it takes {', '.join('--' + k for k in taken)}")
    chosen = {k: v if given[k] is None else given[k] for k, v in taken.items()}
    c["settings"] = {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}
    idle = [k for k in ("fill", "mask_kind", "mask_unit", "token_how") if (given[k] if k in given else c[k])]
    if idle and not chosen["mask_ratio"]:
        raise BadRequest(f"--{idle[0]} does nothing with mask ratio 0: add --mask_ratio 0.75, or leave it out")
    if given["twist"] and chosen["warp"] != "fisheye":
        raise BadRequest(f"--twist does nothing with --warp {chosen['warp']}: it is for the fisheye")
    _resolve_token(c, row, given["fill"])
    _resolve_loss(c, row)
    not_negative(c, "freq_weight", "freq_alpha")
    share_out(c, recipe, place, length, channels, f"{c['task']}-{c['model']}-{os.path.basename(c['data'])}")
    with refusing():                                            # one small batch through the whole request
        c["view"] = list(degrade.view_size(c["task"], size, c["settings"]["view_size"]))
        few = torch.zeros(2 - c["images_per_process"] % 2, channels, *c["view"])                # odd if the batches are
        degrade.degrade(few, c["task"], tuple(size), c["patch_size"], seeded(0), **c["settings"])
    return c


def settle(c, recipe):
    """The recipe's values where the command line gave none; --img_size as two numbers."""
    c.update((k, v) for k, v in recipe.items() if c.get(k) is None and k != "warmup")          # whose default is a share
    if len(c["img_size"]) > 2:
        raise BadRequest(f"--img_size takes one or two numbers, not {len(c['img_size'])}")
    size = c["img_size"] = [c["img_size"][0], c["img_size"][-1]]
    if min(size) < 1:
        raise BadRequest(f"--img_size {size[0]}x{size[1]} must be more than 0")
    if c["patch_size"] < 1:
        raise BadRequest(f"--patch_size {c['patch_size']} must be more than 0")
    c["data"] = os.path.normpath(c["data"]) if os.path.isdir(c["data"]) else c["data"]


def not_negative(c, *names):
    for name in names:
        if c[name] is not None and not 0 <= c[name] < math.inf:
            raise BadRequest(f"--{name} {c[name]} must not be negative, and finite")
        if name == "seed" and c[name] >= 2 ** 63:
            raise BadRequest(f"--seed {c[name]} must be below 2^63")


def share_out(c, recipe, place, length, channels, name):
    """Batch, accumulation, learning rate, steps, loader and folder (by default runs/NAME) as this run has them, into c."""
    for option in ("epochs", "steps", "batch_size", "accum", "lr", "save_every", "log_every"):
        if c[option] is not None and not 0 < c[option] < math.inf:
            raise BadRequest(f"--{option} {c[option]} must be more than 0, and finite")
    not_negative(c, "weight_decay", "seed", "workers", "warmup", "clip")
    if not 0 < c["crop"][0] <= c["crop"][1] <= 1:
        raise BadRequest(f"--crop {c['crop'][0]} {c['crop'][1]} must be 0 < MIN <= MAX <= 1")
    if not all(0 <= beta < 1 for beta in c["betas"]):
        raise BadRequest(f"--betas {c['betas'][0]} {c['betas'][1]} must be 0 <= beta < 1")
    B, world, micro, size = c["batch_size"], place.world, c.pop("micro"), c["img_size"]
    if c["accum"] is None:
        c["accum"] = next((a for a in range(1, B + 1) if B % (world * a) == 0 and B // (world * a) <= micro), 1)
    if B % (world * c["accum"]):
        raise BadRequest(f"--batch_size {B} cannot be shared by {world} processes x {c['accum']} accumulated batches: "
                         f"choose a multiple of {world * c['accum']}")
    c["images_per_process"] = B // (world * c["accum"])
    if c["model"] in models.RESNETS and world * c["images_per_process"] * size[0] * size[1] < 2 * models.ResNet.stride ** 2:
        raise BadRequest(f"batch of 1 at {size[0]}x{size[1]}: batch norm has nothing to average over in a last feature map of "
                         "1x1; choose a larger --batch_size, a smaller --accum or a larger --img_size")
    c["actual_lr"] = c["lr"] * B / 256                          # linear scaling
    c["total_steps"] = c["steps"] or math.ceil(c["epochs"] * length / B)
    if c["warmup"] is None:                                     # the recipe's share of the run
        c["warmup_steps"] = round(c["total_steps"] * recipe["warmup"] / recipe["epochs"])
    else:
        c["warmup_steps"] = round(c["warmup"] * length / B)
    c["warmup"] = c["warmup_steps"] * B / length
    c["save_every"] = c["save_every"] or max(50, c["total_steps"] // 20)
    c["workers"] = loaders(c["workers"], place)
    if c["out"] is None and c["resume"] not in (None, "auto"):
        c["out"] = os.path.dirname(os.path.abspath(going_on(c)))
    c["out"] = c["out"] or os.path.join("runs", name)
    c.update(images=length, channels=channels, processes=world, device=str(place.device), amp=precision(c["amp"], place.device))


def _resolve_token(c, row, fill):
    """Where the token enters: --token_at, else the input for --fill token, nowhere where simmim gets a colour, else the task's
    place (a ResNet's: the middle, not the decoder). What hidden patches hold: nothing for a decoder, else --fill, the task's, or
    the mean colour.
    """
    resnet, asked = c["model"] in models.RESNETS, c["token_at"]
    if fill == "token":
        at = asked or "input"
    elif fill and row.fill == "token":                          # simmim's hidden cells get a colour instead of the token (A2 5.4)
        at = asked or "none"
    else:
        at = asked or ("middle" if resnet and row.token_at == "decoder" else row.token_at)
    with refusing():
        layer = models.token_layer(c["model"], at)
    if layer in ("decoder", None) and c["token_how"]:
        raise BadRequest(f"--token_how {c['token_how']} does nothing with --token_at {at}: it is for a layer or stage")
    if layer not in ("decoder", None):
        c["token_how"] = c["token_how"] or ("replace" if fill == "token" or row.fill == "token" else "add")
    if fill == "token" and layer != 0:
        raise BadRequest(f"--fill token is the mask token at the input, --token_at {asked} puts it elsewhere: choose one of the "
                         "two, or --fill mean")
    if layer == "decoder" and fill:
        raise BadRequest(f"--fill {fill} does nothing with the token at the decoder: hidden patches are dropped; "
                         "add --token_at middle")
    if layer == 0 and fill in ("mean", "zero") and c["token_how"] == "replace" and not resnet:
        raise BadRequest(f"--fill {fill} does nothing where the token replaces a ViT's patches at the input: "
                         "add --token_at none, or --token_how add")
    if layer != "decoder" and not c["settings"]["mask_ratio"]:  # nothing is hidden: no token, nothing to fill
        c["token_at"], c["token_how"], c["settings"]["fill"] = "none", None, None
        return
    if layer == "decoder":
        c["decoder"] = c["decoder"] or "x".join(map(str, models.VITS[c["model"]][1]))
        c["settings"]["fill"] = None
    elif not fill:                                              # simmim's token in another place leaves the mean colour
        c["settings"]["fill"] = row.fill if row.fill and (row.fill != "token" or layer == 0) else "mean"
    c["token_at"] = "none" if layer is None else layer


def _resolve_loss(c, row):
    """The task's row where the command line does not say; what would do nothing is refused."""
    c["loss"], c["norm_target"] = c["loss"] or row.loss, c["norm_target"] or row.norm_target
    if c["freq_weight"] is None:
        c["freq_weight"] = row.freq_weight
    if not c["freq_weight"] and (c["freq_alpha"] is not None or c["freq_batch_mean"]):
        name = "freq_batch_mean" if c["freq_batch_mean"] else f"freq_alpha {c['freq_alpha']}"
        raise BadRequest(f"--{name} does nothing without the frequency loss: add --freq_weight 0.5")
    if c["band_weight"] is not None and (row.target != "whole" or c["settings"]["view_size"] == c["img_size"][0]):
        raise BadRequest(f"--band_weight {c['band_weight']} does nothing here: only a whole view larger than the input has an "
                         "outer band")
    c["freq_alpha"] = 1.0 if c["freq_alpha"] is None else c["freq_alpha"]
    c["band_weight"] = 0.2 if c["band_weight"] is None else c["band_weight"]
    if not 0 <= c["band_weight"] <= 1:
        raise BadRequest(f"--band_weight {c['band_weight']} is outside [0, 1]")


def build(c):
    """The model that the configuration settles, with fresh weights. ValueError for what it cannot have."""
    return models.recovery_model(c["model"], c["img_size"], c["patch_size"], c["channels"], c["token_at"],
                                 c["token_how"] or "add", c["decoder"], c["relative_positions"])


def the_loss(c):
    """The arguments of losses.recovery_loss that the configuration settles."""
    return dict(norm=c["norm_target"], band_weight=c["band_weight"], loss=c["loss"], freq_weight=c["freq_weight"],
                freq_alpha=c["freq_alpha"], freq_batch_mean=c["freq_batch_mean"])


@functools.cache
def commit():
    """The commit of this code, with -dirty where it has been edited since; None where there is no git."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True,
                              cwd=os.path.dirname(os.path.abspath(__file__)), text=True).stdout.strip() or None
    except OSError:
        return None


def hardware():
    """What this process computes on, in words."""
    if torch.cuda.is_initialized():                             # by set_up, unless --device cpu
        return torch.cuda.get_device_name()
    return f"{cores()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"


def provenance():
    """What a run should be traced back to: command, versions, hardware, commit if there is one."""
    return dict(command=" ".join(sys.argv), torch=torch.__version__, torchvision=torchvision.__version__,
                hardware=hardware(), commit=commit(), started=time.strftime("%Y-%m-%d %H:%M:%S"))


# ---------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def recover(model, view, c, generator):
    """A view (B, C, *c["view"]) in [0, 1] damaged as in the run of c, and recovered by its model -> the Degraded; the
    predictions (B, N, p p C), with the mask token and, where one enters inside the encoder, without it (A2 Fig. A3); and the
    pictures (B, C, *c["view"]) of each. The mean and contrast of normalised patches are borrowed from the view.
    """
    size, p, n = tuple(c["img_size"]), c["patch_size"], len(view)
    even = torch.cat([view, view[n - n % 2:]])                  # zoom_out's fill `other` takes images in pairs
    d = degrade.degrade(even, c["task"], size, p, generator, **c["settings"])
    d = d._make(x[:n] if torch.is_tensor(x) else x for x in d)
    inside, training = c["token_at"] not in ("decoder", "none"), model.training
    model.eval()
    with torch.autocast(view.device.type, *AUTOCAST[c["amp"]]):
        predictions = [model(d.inputs, d.hidden)] + ([model(d.inputs, d.hidden, token=False)] if inside else [])
    model.train(training)
    pictures = [losses.recovered_picture(x, model.normalize(d.target), size, p, c["norm_target"]) for x in predictions]
    return d, predictions, [model.denormalize(x) for x in pictures]


def picture_of(model, view, c, generator):
    """view | what the encoder sees | recovered, of the images (B, C, *c["view"]), two a row: a Pillow picture, or None if
    the prediction is not finite. Where a mask token enters inside the encoder, also | all that is predicted, visible
    patches too | the same without the token (A2 Fig. A3).
    """
    view = view[:len(view) // 2 * 2] if len(view) > 1 else view.expand(2, -1, -1, -1)
    d, predictions, pictures = recover(model, view, c, generator)
    if not predictions[0].isfinite().all():
        return None
    p, star = c["patch_size"], "*" if c["norm_target"] != "off" else ""
    columns = [d.target, degrade.seen(d, p), degrade.paste_visible(pictures[0], d, p)] + (pictures if len(pictures) > 1 else [])
    titles = ["view", "encoder sees", *(t + star for t in ("recovered", "all predicted", "without token"))][:len(columns)]
    note = "* each patch's mean and contrast are borrowed from the view: the loss asks for neither" if star else ""
    return degrade.sheet([x[rows] for rows in (slice(0, None, 2), slice(1, None, 2)) for x in columns], titles * 2, note)


def save(step, c, place, model, optimizer, scaler, progress, pictures):
    """checkpoint.pt and pictures {file name: Pillow picture}, by rank 0 -> what went wrong, or ""."""
    if place.rank > 0:
        return ""
    try:
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     step=step, config=c, progress=progress)
        for name, picture in pictures.items():
            write_whole(os.path.join(c["out"], name), lambda file: picture.save(file, format="PNG"))
        write_whole(os.path.join(c["out"], "checkpoint.pt"), lambda file: torch.save(state, file))
    except OSError as error:
        return f"{error}. Make room, then --resume"
    return ""


class BadFiles:
    """The images that could not be read: named once by each process, and counted by epoch over all processes."""

    def __init__(self, images, batch):
        self.images, self.batch, self.why = images, batch, {}

    def meet(self, bad):
        for path, why in bad:
            if path not in self.why:
                self.why[path] = why
                tqdm.write(f"skipped {why}", file=sys.stderr)
        return len(bad)

    def meet_few(self, bad, place):
        """meet, and Failure when more than 1% of the files cannot be read."""
        if self.meet(bad) and len(self.why) > 0.01 * self.images:
            raise Failure(f"more than 1% of {self.images} images cannot be read: mend or replace {self.listed(place)}")

    def count(self, step, now, before):
        """How many reads failed in the epoch so far: `now` in this step, `before` until it; and if that is over 1%."""
        same_epoch = step * self.batch // self.images == (step - 1) * self.batch // self.images
        count = int(now + (before if same_epoch else 0))
        return count, count > 0.01 * max(self.images, self.batch)

    def listed(self, place):
        """The files of all processes. Every process calls it."""
        lists = [list(self.why)] * place.world
        if place.world > 1:
            dist.all_gather_object(lists, list(self.why))
        files = sorted({path for paths in lists for path in paths})
        return ", ".join(files[:20]) + (f" and {len(files) - 20} more, named above" if len(files) > 20 else "")


def train(c, place, data, model, optimizer, scaler, start, progress, log, prepare, loss_of, check, measure=None, augment=None):
    """The loop: learning rate, forward, backward, step, log, save. Returns the exit code.

    What the scripts do differently: prepare(view, labels, step, (first, whole batch)) -> what the model and the loss are
    given; loss_of(net, that) -> a number; check(step), before a checkpoint -> (what is wrong with the model or "", {file
    name: picture}); measure(step), after it, unless a signal asks for haste. Every process calls them.
    """
    device, B, total, net = place.device, c["batch_size"], c["total_steps"], model
    if c["compile"]:
        model.compile()
    if place.world > 1:
        net = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    apart = getattr(net, "no_sync", contextlib.nullcontext)
    k = c["images_per_process"]
    parts = [((a * place.world + place.rank) * k, k) for a in range(c["accum"])]
    views = data.batches(range(start, total), B, parts, tuple(c["view"]), c["crop"], c["seed"], device=device,
                         workers=c["workers"], augment=augment)
    signals, bad_files, leaving = Signals(place.rank == 0), BadFiles(len(data), B), False
    since, waited, timed, speed = time.perf_counter(), 0.0, 0, 0.0
    bar = tqdm(total=total, initial=start, unit="step", disable=place.rank > 0, mininterval=1, dynamic_ncols=True)

    with bar, contextlib.closing(views):
        for step in range(start, total):
            lr = learning_rate(step, total, c["warmup_steps"], c["actual_lr"])
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            loss, bad = 0.0, 0
            for a, part in enumerate(parts):
                clock = time.perf_counter()
                view, labels, unread = next(views)
                bad += bad_files.meet(unread)
                waited += time.perf_counter() - clock
                prepared = prepare(view, labels, step, (part[0], B))
                with contextlib.nullcontext() if a == c["accum"] - 1 else apart():
                    part_loss = loss_of(net, prepared) / c["accum"]
                    scaler.scale(part_loss).backward()
                loss = loss + part_loss.detach()

            loss, told, bad = sum_over_processes([float(loss) / place.world, signals.received, bad], place)
            if not math.isfinite(loss):
                raise Failure("" if place.rank else f"the loss is {loss} at step {step + 1}, learning rate {lr:.3g}: nothing was "
                              "saved since the last checkpoint. --resume with --amp off, or begin again in another --out with a "
                              "lower --lr or a longer --warmup")
            if c["clip"]:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), c["clip"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            progress["bad"], too_many = bad_files.count(step, bad, progress["bad"])
            progress["sum"], progress["count"], timed = progress["sum"] + loss, progress["count"] + 1, timed + 1
            if (step + 1) % c["log_every"] == 0 or step + 1 == total:
                now = time.perf_counter()
                speed = timed * B / (now - since)
                log(step=step + 1, epoch=round((step + 1) * B / len(data), 4), loss=progress["sum"] / progress["count"], lr=lr,
                    images_per_s=round(speed, 1), data_wait=round(waited / (now - since), 4))
                progress.update(sum=0.0, count=0)
                since, waited, timed = now, 0.0, 0
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", images_s=f"{speed:.0f}", refresh=False)
            leaving, paused = told and step + 1 < total, time.perf_counter()
            if leaving or too_many or (step + 1) % c["save_every"] == 0 or step + 1 == total:
                count, progress["bad"] = progress["bad"], 0 if too_many else progress["bad"]       # mended files start anew
                trouble, pictures = check(step + 1)
                trouble = trouble or log.trouble or save(step + 1, c, place, model, optimizer, scaler, progress, pictures)
                all_stop(trouble and f"step {step + 1}: {trouble}; the last checkpoint is intact", place)
            if too_many:
                files = bad_files.listed(place)
                raise Failure("" if place.rank else f"{count} reads of {len(data)} images failed in this epoch, more than 1%: "
                              f"mend or replace {files}; then --resume")
            if leaving:
                break
            if measure and ((step + 1) % c["save_every"] == 0 or step + 1 == total):
                measure(step + 1)
            since += time.perf_counter() - paused               # saving and measuring are not training
    return 128 + (signals.received or signal.SIGTERM) if leaving else 0


def going_on(c):
    """The path of the checkpoint that --resume goes on from, or None."""
    if c["resume"] != "auto":
        folder = c["resume"] is not None and os.path.isdir(c["resume"])
        return os.path.join(c["resume"], "checkpoint.pt") if folder else c["resume"]
    last = c["out"] and os.path.join(c["out"], "checkpoint.pt")
    return last if last and os.path.exists(last) else None


def begin(c, place, model, optimizer, scaler, same_run):
    """Go on from --resume or start anew: -> first step, progress, open log. Writes config.json. BadRequest when --out
    holds another run, or a checkpoint was made with another value of what `same_run` names.
    """
    start, progress = 0, dict(sum=0.0, count=0, bad=0)
    last = os.path.join(c["out"], "checkpoint.pt")
    path, there = going_on(c), os.path.exists(last)
    if sum_over_processes([float(there)], place)[0] != there * place.world:             # all look before rank 0 writes
        raise BadRequest(f"the processes do not see the same {c['out']}: --out must be one folder for all machines")
    state = load_checkpoint(path) if path else None
    if there and not (path and os.path.abspath(path) == os.path.abspath(last)):
        raise BadRequest(f"{c['out']} already holds a run: --resume goes on with it, another --out keeps it, or delete it")
    if state:
        old, new = ({**x, **x.get("settings", {})} for x in (state["config"], c))
        for name in (*same_run, *c.get("settings", {})):
            if old.get(name) != new[name]:
                raise BadRequest(f"{path} was made with {name} {old.get(name)}, this command asks for {new[name]}: "
                                 "give the same, or another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and scaler.is_enabled():             # --amp may change on the way
            scaler.load_state_dict(state["scaler"])
        start, progress = state["step"], state["progress"]
    log = open_folder(c, place, lambda: Log(os.path.join(c["out"], "log.jsonl"), start))
    return start, progress, log or Log(os.devnull, start)


def open_folder(c, place, more=lambda: None):
    """--out with `more()` done, whose value is returned, and config.json in it, by rank 0. BadRequest for every process when
    it cannot be written to, or more() raises ValueError.
    """
    trouble, made = "", None
    if place.rank == 0:
        try:
            os.makedirs(c["out"], exist_ok=True)
            made, config = more(), json.dumps({**c, **provenance()}, indent=1)
            write_whole(os.path.join(c["out"], "config.json"), lambda file: file.write(config.encode()))
        except OSError as error:
            trouble = f"--out {c['out']} cannot be written to: {error}"
        except ValueError as error:
            trouble = str(error)
    all_stop(trouble, place, BadRequest)
    return made


def task_line(c, length):
    """Task, model, data and the task's settings, for the start of a run."""
    view, size, settings = c["view"], c["img_size"], [f"{k} {v}" for k, v in c["settings"].items() if v is not None]
    return (f"{c['task']}: {c['model']} on {c['data']}, {length:,} images, view {view[0]}x{view[1]} -> "
            f"input {size[0]}x{size[1]}, {', '.join(settings)}")


def loss_line(c):
    """The mask token, the loss and the optimiser, for the start of a run."""
    layer = f"after {'stage' if c['model'] in models.RESNETS else 'layer'} {c['token_at']} ({c['token_how']})"
    places = {"decoder": f"at the decoder {c['decoder']}", "none": "nowhere", 0: f"at the input ({c['token_how']})"}
    batch_mean = ", batch mean" if c["freq_batch_mean"] else ""
    frequency = f" + {c['freq_weight']:g} x focal frequency (alpha {c['freq_alpha']:g}{batch_mean})" if c["freq_weight"] else ""
    return (f"mask token {places.get(c['token_at'], layer)}, loss {c['loss']} of pixels, normalised: {c['norm_target']}"
            f"{frequency}, AdamW betas {c['betas'][0]:g} {c['betas'][1]:g}, gradient clip {c['clip'] or 'off'}"
            f"{', relative positions' if c['relative_positions'] else ''}")


def batch_line(c, length):
    """Batch, learning rate and steps with their real numbers, for the start of a run."""
    return (f"batch {c['batch_size']} = {c['images_per_process']} images x {c['processes']} processes x {c['accum']} "
            f"accumulated, learning rate {c['lr']:.3g} x {c['batch_size']}/256 = {c['actual_lr']:.3g}, {c['total_steps']} steps "
            f"({c['total_steps'] * c['batch_size'] / length:.2f} epochs), {c['warmup_steps']} of warm-up")


def device_line(c, place, start=None):
    """Device, precision, kernels, and the step a training starts from, for the start of a run."""
    kernel = f"attention {'fused' if models.fused_attention(place.device) else 'written out'}"
    if c["model"] in models.RESNETS:
        kernel = "convolutions channels-last"
    begins = "" if start is None else f", from step {start}" if start else ", from the beginning"
    seed = "" if c["seed"] is None else f"seed {c['seed']}, "   # others' classifiers are measured without one
    return (f"device {c['device']}, {torch.get_num_threads()} threads, precision {c['amp']}, {kernel}, "
            f"{seed}commit {commit() or 'none'}{begins} -> {c['out']}")


def run(args):
    """One pre-training run, from the command line's options. Returns the exit code."""
    place = set_up(args.device)
    main, device = place.rank == 0, place.device
    data = load_data(vars(args), place)
    c = resolve(args, place, len(data), data.channels)
    torch.manual_seed(c["seed"])
    with refusing():
        model = build(c)
        if c["weights"] != "none" and not going_on(c):          # whose checkpoint holds all weights
            report = models.load_weights(model, c["weights"])
            if main:
                print(report)
    if c["token_at"] == "decoder":                              # nothing hidden: DDP waits for a gradient that never comes
        model.mask_token.requires_grad_(bool(c["settings"]["mask_ratio"]))
    model = models.to_device(model, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, c["weight_decay"]), lr=c["actual_lr"], betas=tuple(c["betas"]),
                                  fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=c["amp"] == "fp16")
    start, progress, log = begin(c, place, model, optimizer, scaler, SAME_RUN)
    if main:
        print(task_line(c, len(data)), batch_line(c, len(data)), loss_line(c), device_line(c, place, start), sep="\n", flush=True)

    size, p = tuple(c["img_size"]), c["patch_size"]

    def damage(view, labels, step, part):
        return degrade.degrade(view, c["task"], size, p, seeded(c["seed"], DAMAGE, step), part, **c["settings"])

    def loss_of(net, d):
        with torch.autocast(device.type, *AUTOCAST[c["amp"]]):
            prediction = net(d.inputs, d.hidden)
        return losses.recovery_loss(prediction, model.normalize(d.target), size, p, d.counted, **the_loss(c))

    def check(step):        # a model whose own prediction is not finite is not saved: the last one is worth more
        if not main:
            return "", {}
        picture = picture_of(model, data.picture_views(8, tuple(c["view"])).to(device), c, seeded(c["seed"], PICTURE))
        if picture is None:
            return ("the model's prediction is not finite. --resume with --amp off, or begin again in another --out with a lower "
                    "--lr or a longer --warmup"), {}
        return "", {f"recovered_{step:07d}.png": picture}

    code = train(c, place, data, model, optimizer, scaler, start, progress, log, damage, loss_of, check)
    if main:
        print(stopped(code) if code else summary(c["out"]))
    return code


def stopped(code):
    return f"stopped by signal {code - 128}, saved: --resume goes on"


def summary(folder):
    """The loss over the run, in ten numbers, and where things are."""
    with open(os.path.join(folder, "log.jsonl")) as file:
        curve = [json.loads(line)["loss"] for line in file]
    tenths = [np.mean(part) for part in np.array_split(curve, min(10, len(curve)))] if curve else []
    there = sorted(os.listdir(folder))                          # no checkpoint, where a finished run was gone on with elsewhere
    pictures = [name for name in there if name.startswith("recovered_")][-1:]
    files = ", ".join(name for name in ("checkpoint.pt", "log.jsonl", "config.json", *pictures) if name in there)
    return f"loss {' '.join(f'{x:.3f}' for x in tenths)}\ndone: {folder}/{files}"


def command(run, options, argv=None):
    """What every script does around its work: options in, exit code out, one line for what went wrong."""
    name, first = os.path.basename(sys.argv[0]), os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        code = run(options().parse_args(argv))
    except (BadRequest, Failure) as error:
        code = 2 if isinstance(error, BadRequest) else 1
        if str(error) and (first or code == 1):                 # a request is wrong for all alike: say it once a machine
            print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:                                   # where nothing is trained, or it was pressed again
        if first:
            print(f"{name}: stopped by Ctrl-C", file=sys.stderr)
        return 130                                              # at once: the others may not be there to say goodbye to
    except Exception as error:                                  # its frames would keep loaders alive, which ignore SIGTERM:
        sys.excepthook(*sys.exc_info())                         # Python's exit would wait for them for ever
        traceback.clear_frames(error.__traceback__)
        return 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(command(run, options))
