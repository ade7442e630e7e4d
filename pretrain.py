"""Pre-train an encoder: damage an image, learn to recover it.

    python pretrain.py                                    a laptop's CPU, built-in pictures
    python pretrain.py --task a2mim --model resnet18      another task, another network
    python pretrain.py --task blur --help                 the options and defaults of one task
    torchrun --nproc_per_node=8 pretrain.py --task zoom_in_mask --data /path/to/imagenet
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 \\
        pretrain.py --data /path/to/imagenet              the same on two machines

BM is *Beyond Masking* (arXiv 2203.14313, sections 3, 4.1, A), A2 is *Architecture-Agnostic Masked
Image Modeling* (arXiv 2205.13943, sections 4, 5.1, 5.4, A.1). The built-in pictures take minutes
on a CPU, the papers' runs days on many GPUs.

A step is four lines of main():  view -> degrade -> model -> loss.  Everything else in this file
feeds it (data), shares it (processes, precision), or keeps it (checkpoint, log, picture).

What is random is a function of (seed, step), not of the number of processes, accumulation, loader
workers or resuming.

Exit code: 0 done, 1 the run failed, 2 bad request, 130 or 143 stopped by a signal.
"""
import argparse
import atexit
import copy
import ctypes
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

# torch reads both at its import. GOMP_SPINCOUNT is how long its threads wait awake: libgomp's own
# number makes a run beside other programs half as fast. OMP_NUM_THREADS is how many there are:
# torchrun sets it to 1 for several processes. Without it torch takes one a core, of Apple's the
# fast ones, and `set_up` shares them out.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" and os.environ.get("OMP_NUM_THREADS") == "1":
    del os.environ["OMP_NUM_THREADS"]

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import degrade
import losses
import models
from degrade import check


def main(argv=None):
    # options, processes, data
    args = options(argv)
    process = set_up(args.device)
    device = process.device
    on_first = process.rank == 0
    data = load_data(args, process)
    settle(args, process, data)
    size = tuple(args.img_size)
    p = args.patch_size

    # the model and its optimiser
    torch.manual_seed(args.seed)
    model = models.recovery_model(args.model, size, p, data.channels, args.token_at,
                                  args.token_how, args.decoder, args.relative_positions)
    if args.weights != "none" and not args.origin:
        report = models.load_weights(model, args.weights)
        if on_first:
            print(report)
    model = models.to_device(model, device)
    if args.token_at == "decoder":  # DDP waits for the gradient of every parameter
        model.mask_token.requires_grad_(args.settings["mask_ratio"] > 0)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), args.peak_lr,
                                  betas=tuple(args.betas), fused=True)
    amp = precision(args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # where the run stands
    state = dict(model=model, optimizer=optimizer, scaler=scaler)  # what is saved and loaded
    start, recent = begin(args, process, state)  # recent: the losses since the last line of the log
    # `model` itself, which draws pictures of other sizes, is not compiled
    net = torch.compile(model, mode=compile_mode(args), disable=not args.compile)
    net = DistributedDataParallel(net) if process.world > 1 else net
    loss_function = torch.compile(loss_of, disable=not args.compile)
    shown = pictures_to_show(args, process, data)
    if on_first:
        print(describe(args, process, data, model, start), flush=True)

    first_rows, wanted = micro_batches(args, process, start)
    views = data.batches(wanted, tuple(args.view), args.crop, args.seed, device, args.workers)
    bar = tqdm(total=args.total, initial=start, unit="step", disable=not on_first, mininterval=1)
    received = remember_signals(on_first)
    clock = time.perf_counter()
    timed = 0  # steps since `clock`
    waited = 0.0  # seconds waited for data
    unread = []  # losses and norms, still on the device
    for step in range(start, args.total):
        # the learning rate
        lr = learning_rate(step, args.total, args.warmup_steps, args.peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # the gradient, in args.accum micro-batches
        loss = 0.0
        for a, row in enumerate(first_rows):
            asked = time.perf_counter()
            view, _ = next(views)  # (k, C, V, V) in [0, 1], rows row .. row + k of the batch
            waited += time.perf_counter() - asked
            with net.no_sync() if process.world > 1 and a < args.accum - 1 else nullcontext():
                d = degrade.degrade(view, args.task, size, p, seeded(args.seed, DAMAGE, step),
                                    within=(row, args.batch_size), **args.settings)
                with amp():
                    prediction = net(d.inputs, d.hidden)  # (k, N, p p C)
                micro_loss = loss_function(model, prediction, d, args) / args.accum
                scaler.scale(micro_loss).backward()
            loss = loss + micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = clipped_norm(model, args.clip)

        # how all processes stand; what cannot go on stops here, before it is saved
        timed += 1
        done = step + 1
        unread.append(torch.stack([loss, norm]))
        found, leaving = agree(unread, received, done, args, data, process)
        recent += found

        # the step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        speed = timed * args.batch_size / (time.perf_counter() - clock)
        if found:
            bar.set_postfix(loss=f"{found[-1]:.4f}", lr=f"{lr:.2e}", images_s=f"{speed:.0f}",
                            refresh=False)
        bar.update()

        # log, save, leave
        if due(done, args.log_every, args):
            log(args, process, step=done, epoch=done * args.batch_size / len(data), lr=lr,
                loss=float(np.mean(recent)), grad_norm=float(norm), images_per_s=round(speed, 1),
                data_wait=round(waited / (time.perf_counter() - clock), 4))
            recent = []
            clock = time.perf_counter()
            timed = 0
            waited = 0.0
        if leaving or due(done, args.save_every, args):
            paused = time.perf_counter()
            save(done, args, process, state, recent, recovery_sheet(model, shown, args, amp))
            clock += time.perf_counter() - paused  # saving is not training
        if leaving and done < args.total:
            return leave(received, process)
    bar.close()
    if on_first:
        print(f"done: {args.out}")


# --- Recipes ---

# What a paper asks for on ImageNet. warmup_share: of the run. lr: per 256 images of the batch.
# clip 0: none. BM's batch and warm-up are those of its launch scripts.
# at_once: the most images a process holds, the rest of its batch is accumulated. 256 at 224 pixels
# take 10 GB of a GPU for zoom_in_mask of vit_base, 13 for a2mim of resnet50; more for a ViT that
# keeps all patches.
# differs from the authors' code: A2's has half this lr for ViTs, and steps for the cosine; for a
# ResNet-50 crops of .8 to 1. BM's cosine ends at 1e-5, and so does A2's for a ResNet-50; ours at 0.
BOTH = dict(model="vit_base", img_size=[224], patch_size=16, epochs=300, batch_size=2048,
            at_once=256)
PAPERS = {
    "BM": dict(BOTH, warmup_share=20 / 300, lr=1.5e-4, betas=[0.9, 0.95], clip=0.0,
               crop=[0.2, 1.0]),
    "A2": dict(BOTH, warmup_share=10 / 300, lr=1e-4, betas=[0.9, 0.999], clip=5.0,
               crop=[0.67, 1.0]),
}
# The same for small sets and a CPU. A ResNet wants larger pictures.
SMALL = dict(model="vit_micro", img_size=[32], patch_size=4, lr=1.5e-3, batch_size=256,
             warmup_share=0.05)
SMALL_MAPS = dict(SMALL, img_size=[64], patch_size=8)
SMALL_EPOCHS = {("drawn", "BM"): 15, ("drawn", "A2"): 10, ("drawn", "maps"): 5,
                ("named", "BM"): 12, ("named", "A2"): 6, ("named", "maps"): 3}
BUILT_IN = ("shapes", "scenes")
SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10",
        "fashion_mnist": "FashionMNIST"}


def kind_of(data):
    """The kind of --data, for recipe and loading."""
    if data in BUILT_IN or data in SETS:
        return "drawn" if data in BUILT_IN else "named"
    check(os.path.isdir(data), f"--data {data} is no folder, nor one of {', '.join(BUILT_IN)}, "
          f"{', '.join(SETS)}")
    return "folder"


def recipe(chosen):
    """The defaults for what is read first: the paper's, then what differs for a network, a small
    set, a small size, and the number of images in a folder.
    """
    data = chosen.data
    model = chosen.model
    kind = kind_of(data)
    paper = degrade.TASKS[chosen.task].paper
    maps = model is not None and not models.MODELS[model].family.tokens
    defaults = dict(PAPERS[paper], recipe=f"{paper}'s", fitted=None)
    if paper == "A2" and maps:
        defaults.update(lr=1.5e-4, clip=0.0)
    elif paper == "A2" and model in (None, "vit_base"):
        defaults.update(epochs=800, warmup_share=10 / 800)
    if kind != "folder":
        epochs = SMALL_EPOCHS[kind, "maps" if maps else paper]
        defaults.update(SMALL_MAPS if maps else SMALL, epochs=epochs)
    if is_small(data, model, chosen.img_size):
        defaults.update(lr=SMALL["lr"], recipe=f"{paper}'s, small")
        if paper == "BM":
            defaults["crop"] = [0.5, 1.0]
    defaults["model"] = model or defaults["model"]
    if kind == "folder":
        files, _ = image_files(inner(data, "train"), False, tuple(chosen.only or ()))
        defaults = for_size(defaults, len(files), chosen.batch_size)
    return defaults


def is_small(data, model, img_size):
    """Whether data, model or pictures are too small for ImageNet's learning rate and crops."""
    return kind_of(data) != "folder" or model == SMALL["model"] or max(img_size or [96]) < 96


def for_size(defaults, images, batch=None):
    """The recipe for so many images: a batch of at most a 32nd of them, a power of two from 64 on,
    and 5,000 steps or more. ImageNet gets the paper's. batch: that of the command line.
    """
    own = min(defaults["batch_size"], max(64, 2 ** int(math.log2(images / 32))))
    asked = dict(defaults, batch_size=batch or own)
    epochs = max(defaults["epochs"], math.ceil(5000 * asked["batch_size"] / images))
    if epochs != defaults["epochs"] or not batch and own != defaults["batch_size"]:
        asked["fitted"] = f"fitted to {images:,} images"
    return dict(asked, epochs=epochs)


# --- Options ---

class Parser(argparse.ArgumentParser):
    """Defaults in the help, and one line for what is wrong."""

    def __init__(self, **more):
        wide = functools.partial(argparse.ArgumentDefaultsHelpFormatter, width=100,
                                 max_help_position=32)
        super().__init__(**more, allow_abbrev=False, formatter_class=wide,
                         usage="%(prog)s [options]")

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


# Types of options. argparse makes "invalid positive value: '-1'" of a function's name.
def positive_int(text):
    check(int(text) > 0)
    return int(text)


def positive(text):
    check(0 < float(text) < math.inf)
    return float(text)


def not_negative(text):
    check(0 <= float(text) < math.inf)
    return float(text)


def share(text):
    check(0 <= float(text) <= 1)
    return float(text)


def natural(text):
    check(int(text) >= 0)
    return int(text)


def file_of_names(path):
    names = Path(path).read_text("utf-8-sig").split("\n") if os.path.isfile(path) else []
    names = [name.strip() for name in names if name.strip()]
    check(names)
    return names


def first_options(o):
    """What is read first in every script, beside --data and --model."""
    o("--img_size", type=positive_int, nargs="+", help="side of the input, or height and width")
    o("--classes", dest="only", type=file_of_names, metavar="FILE", help="these class "
      "folders alone, one a line")


def batch_option(o):
    o("--batch_size", type=positive_int, help="images per step, over all processes")


def training_options(o):
    """What every training has. The recipe gives the defaults."""
    o("--epochs", type=positive, help="passes over the data")
    o("--steps", type=positive_int, help="a whole run of so many steps, instead of --epochs")
    o("--warmup", type=not_negative, help="epochs of it; None: the recipe's share of the run")
    o("--accum", type=positive_int, help="micro-batches of a process; None: as few as fit")
    o("--lr", type=positive, help="per 256 images of the batch")
    o("--weight_decay", type=not_negative, help="not on biases, norms, tokens, positions")
    o("--betas", type=share, nargs=2, help="of the optimiser's running means")
    o("--clip", type=not_negative, help="largest norm of the gradient, 0: any")
    o("--crop", type=positive, nargs=2, help="area of the random crop (dense heads: scale)")
    o("--save_every", type=positive_int, help="steps; None: a twentieth of the run, 200 at least")
    o("--log_every", type=positive_int, default=20, help="steps")
    o("--compile", action="store_true", help="by torch.compile")
    o("--resume", nargs="?", const="auto", metavar="PATH",
      help="go on from a checkpoint; without PATH from that of --out, if it is there")


def machine_options(o):
    """What every script has: where it reads and computes, and the seed."""
    o("--root", default="data", help="where torchvision keeps its sets")
    o("--download", action="store_true", help="fetch the set into --root")
    o("--seed", type=natural, default=0, help="of all that is random")
    o("--device", choices=("cuda", "cpu", "mps"), help="where to compute",
      default="cuda" if torch.cuda.is_available() else "cpu")
    o("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision; "
      "auto: what the device is fast at")
    o("--workers", type=natural, default=min(8, cores()) if torch.cuda.is_available() else 1,
      help="loader processes for a folder")


def options(argv=None):
    """The command line. What settles the defaults of the rest is read first."""
    first = Parser(add_help=False)
    o = first.add_argument
    o("--task", default="zoom_in_mask", choices=degrade.TASKS, metavar="TASK",
      help=", ".join(degrade.TASKS))
    o("--data", default="shapes", help="a folder of images, shapes or scenes (built in), "
      + ", ".join(SETS))
    o("--model", choices=models.MODELS, metavar="MODEL", help=", ".join(models.MODELS))
    first_options(o)
    batch_option(o)
    chosen, _ = first.parse_known_args(argv)
    row = degrade.TASKS[chosen.task]
    defaults = recipe(chosen)
    network = models.MODELS[defaults["model"]]

    p = Parser(parents=[first], description=(__doc__ or "").split("\n")[0])
    o = p.add_argument
    o("--patch_size", type=positive_int, help="side of a ViT's patch, and of what is hidden")
    o("--token_at", metavar="PLACE", help="where the mask token enters: decoder, input, middle, "
      "none, or the layer or stage it follows")
    o("--token_how", choices=models.TOKEN_HOWS, default="replace" if row.fill == "token" else "add",
      help="added to the features, instead of them, or (A2's code) added to scaled ones")
    o("--decoder", metavar="DEPTHxWIDTHxHEADS", help="MAE's is 8x512x16")
    o("--relative_positions", action="store_true", help="a bias in the ViT, learned from zero: A2 "
      "has it where detection or segmentation follows")
    o("--loss", choices=losses.PIXEL_LOSS, default=row.loss, help="the pixel loss")
    o("--norm_target", choices=("patch", "channel", "off"), default=row.norm_target,
      help="each target patch normalised: whole, by channel, or not")
    o("--band_weight", type=share, default=0.5, help="of the outer band of a view that is larger "
      "than the input (BM A.2)")
    o("--freq_weight", type=not_negative, default=row.freq_weight,
      help="lambda of the focal frequency loss (A2 eq. 6)")
    o("--freq_alpha", type=not_negative, default=1.0, help="exponent of its weights, 0: none")
    o("--freq_batch_mean", action="store_true", help="spectra averaged over the images a process "
      "holds, as in A2's code; the run then depends on how a batch is split")
    o("--weights", default="none", metavar="PATH", help="weights to begin with")
    o("--out", type=folder_path, help="None: runs/TASK-MODEL-DATA[-seedSEED]")
    training_options(o)
    machine_options(o)
    settings = degrade.task_settings(chosen.task)
    group = p.add_argument_group(f"the settings of {chosen.task}")
    for name, default in settings.items():
        group.add_argument(f"--{name}", **degrade.option(name, default))

    # a network without a decoder keeps all patches, and gets the token in the middle
    decoder = "decoder" if network.decoder else "middle"
    p.set_defaults(**defaults, weight_decay=0.05, decoder=network.decoder,
                   token_at=decoder if row.token_at == "decoder" else row.token_at)
    args = p.parse_args(argv)
    args.changed = {name for name, value in vars(args).items() if value != p.get_default(name)}
    args.settings = {name: vars(args).pop(name) for name in settings}
    return args


def settle(args, process, data):
    """What follows from the options and the data: where the token enters, what hidden patches hold,
    the view, the share of each process, the folder.
    """
    settings = args.settings
    network = models.MODELS[args.model]
    layer = models.token_layer(args.model, args.token_at)
    fill = settings["fill"]
    if layer == "decoder":
        fill = None  # hidden patches are dropped
    elif not settings["mask_ratio"]:
        layer = fill = None  # nothing is hidden
    elif fill is None or fill == "token" and layer != 0:
        fill = "mean"
    check(settings["fill"] in (fill, degrade.TASKS[args.task].fill), f"--fill {settings['fill']} "
          f"does nothing with --token_at {args.token_at} and --mask_ratio {settings['mask_ratio']}")
    if layer != "decoder" and args.decoder == network.decoder:
        args.decoder = None  # the default, where there is none
    args.token_at = "none" if layer is None else layer
    settings["fill"] = fill
    args.freq = [args.freq_weight, args.freq_alpha, args.freq_batch_mean]
    share_out(args, process, data)
    args.view = degrade.view_size(args.task, args.img_size, settings["view_size"])

    # options that would do nothing are refused; a target of the input's size has no outer band
    target = degrade.TASKS[args.task].target(torch.empty(1, 1, *args.view), tuple(args.img_size))
    changed = vars(args).pop("changed")
    for cause, idle, names in (
            ("with --mask_ratio 0", not settings["mask_ratio"], {"mask_kind", "mask_unit"}),
            ("with --warp wave", settings.get("warp") == "wave", {"twist"}),
            (f"with {args.model}, where nothing is hidden", network.decoder is None
             and not settings["mask_ratio"], {"token_at"}),
            (f"with --token_at {args.token_at}", layer in ("decoder", None), {"token_how"}),
            ("with --freq_weight 0", not args.freq_weight, {"freq_alpha", "freq_batch_mean"}),
            ("without an outer band", [*target.shape[2:]] == args.img_size, {"band_weight"})):
        for name in changed & names:
            check(not idle, f"--{name} does nothing {cause}")
    seed = f"-seed{args.seed}" * (args.seed > 0)
    settle_folder(args, f"{args.task}-{args.model}-{Path(args.data).absolute().name}{seed}")


def share_out(args, process, data):
    """The batch as args.micro_batch images x processes x args.accum, the steps, the rate."""
    args.img_size = two_sides(args.img_size)
    most = math.inf if getattr(args, "head", "") == "segment" else 1  # --crop is a scale there
    check(args.crop[0] <= args.crop[1] <= most, f"--crop {args.crop}: a smaller and a larger share")
    batch = args.batch_size
    world = process.world
    ways = [args.accum] if args.accum else range(1, batch + 1)
    ways = [a for a in ways if batch % (world * a) == 0]
    check(ways, f"--batch_size {batch} cannot be shared by {world} processes x --accum "
          f"{args.accum or 1}: choose a multiple")
    args.accum = next((a for a in ways if batch // (world * a) <= args.at_once), ways[-1])
    args.micro_batch = batch // (world * args.accum)
    args.peak_lr = args.lr * batch / 256  # linear scaling
    args.contents = data.contents
    args.total = args.steps or math.ceil(args.epochs * len(data) / batch)
    warmup = args.total * args.warmup_share
    if args.warmup is not None:
        warmup = args.warmup * len(data) / batch
    args.warmup_steps = round(warmup)
    args.save_every = args.save_every or max(200, args.total // 20)


def two_sides(img_size):
    """--img_size, one or two numbers, as [height, width]."""
    check(len(img_size) < 3, f"--img_size takes one or two numbers, not {len(img_size)}")
    return [img_size[0], img_size[-1]]


def folder_path(text):
    return Path(text).expanduser()


def settle_folder(args, name):
    """args.out: --out, or the folder of --resume PATH, or runs/NAME. args.origin: the checkpoint
    to go on from, or None.
    """
    if args.resume in (None, "auto"):
        args.out = args.out or Path("runs", name)
        last = args.out / "checkpoint.pt"
        args.origin = last if args.resume and last.exists() else None
    else:
        path = folder_path(args.resume)
        args.origin = path / "checkpoint.pt" if path.is_dir() else path
        args.out = args.out or args.origin.parent
    check(kind_of(args.data) != "folder" or args.out.resolve() != Path(args.data).resolve(),
          f"--out {args.out} is the folder of --data: give another")


def describe(args, process, data, model, start):
    """The first lines of a run: recipe, real numbers, what is set."""
    config = config_of(args)
    config.update(config.pop("settings", {}), **provenance())
    config = ", ".join(f"{k} {v}" for k, v in config.items()
                       if k != "classes" and v is not None and v is not False)
    recipe = f"{args.recipe}, {args.fitted}" if args.fitted else args.recipe
    parameters = sum(x.numel() for x in model.parameters())
    return (f"{args.model} ({parameters:,} parameters) on {args.data} by the recipe {recipe}: "
            f"{data.found}\n"
            f"{args.total} steps of {args.batch_size} images = {args.micro_batch} x "
            f"{process.world} processes x {args.accum}, learning rate {args.lr:g} x "
            f"{args.batch_size} / 256 = {args.peak_lr:.3g}, {args.warmup_steps} steps of warm-up, "
            f"from step {start}\n" + textwrap.fill(config, 100)
            + f"\nonly {args.total} steps: little is learnt" * (args.total < 300))


# --- Processes, precision, schedule ---

# Streams of random numbers that must not meet in a script; the other scripts' are 100 and above.
CROP, DAMAGE, ORDER, PICTURE, AUGMENT, LABELS = range(6)


def seeded(*key):
    """A CPU generator that depends on the integers of `key`, at most four. Zeros at its end do not
    count.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


class Process(NamedTuple):
    """This process among the others."""
    rank: int
    world: int
    device: torch.device


class Failed(Exception):
    """The run cannot go on: one line. It is empty where another process says it."""


THREADS = torch.get_num_threads()  # in some versions more than the cores this process may use


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def set_up(device):
    """Join the processes that torchrun started, or be the only one -> Process."""
    rank, world, local, here = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    backend = "gloo"
    if device == "cuda":
        gpus = torch.cuda.device_count()
        check(gpus, "--device cuda: no GPU is found here")
        check(here <= gpus or here == world,
              f"--nproc_per_node={here}: this machine has {gpus} GPUs")
        if here <= gpus:
            backend = "cpu:gloo,cuda:nccl"  # what is on the CPU waits for no GPU
        device = f"cuda:{local % gpus}"  # on one machine more processes than GPUs share them
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked for
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, min(THREADS, cores()) // here))
    if sys.platform == "linux":  # keep freed memory: asking for it again takes a tenth of a step
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    if world > 1:
        check(device != "mps", "--device mps: one process, start it with python")
        dist.init_process_group(backend)
    return Process(rank, world, torch.device(device))


def sum_over_processes(values, process):
    """A list of numbers, summed over the processes. All come here at the same point."""
    if process.world == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


def gather(value, process):
    """The values of all processes as a list. All come here at the same point."""
    values = [value] * process.world
    if process.world > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_0(write, process, kind=Failed, said="cannot write, what was there before stays"):
    """write() in the first process. When it cannot, `kind` of error ends all of them."""
    trouble = ""
    if process.rank == 0:
        try:
            write()
        except OSError as error:
            trouble = f"{said}: {error}"
        except RuntimeError as error:  # torch.save's, in which the disk's own is hidden
            trouble = f"{said}: {error.__context__ or error}"
    trouble = gather(trouble, process)[0]
    if trouble:
        raise kind("" if process.rank else trouble)


PRECISIONS = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)


def precision(args, device):
    """What begins torch.autocast, in `with amp():`, at the precision of --amp. auto becomes what
    the hardware is fast at.
    """
    if args.amp == "auto" and device.type == "cuda":
        args.amp = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    elif args.amp == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        args.amp = "bf16" if device.type == "cpu" and fast else "off"
    kind = PRECISIONS[args.amp]
    return functools.partial(torch.autocast, device.type, kind, enabled=args.amp != "off")


def loss_of(model, prediction, d, args):
    """losses.recovery_loss of a prediction (B, N, p p C) for Degraded `d`, by a run's options."""
    return losses.recovery_loss(
        prediction, model.normalize(d.target), tuple(args.img_size), args.patch_size, d.counted,
        args.norm_target, args.band_weight, args.loss, args.freq)


def compile_mode(args):
    """Of torch.compile. On a GPU CUDA graphs: to launch kernels one by one can take longer than to
    run them. Not with micro-batches, whose gradients would be overwritten, nor several processes.
    """
    whole = args.micro_batch == args.batch_size
    return "reduce-overhead" if args.device == "cuda" and whole else "default"


def learning_rate(step, total, warmup, peak, schedule="cosine", drops=()):
    """Linear warm-up, then half a cosine, or a line, down to 0; or ("step") a tenth after each of
    `drops`, shares of the run.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "step":
        return peak * 0.1 ** sum(step >= drop * total for drop in drops)
    if schedule == "linear":
        return peak * (total - step) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model, weight_decay, scale=lambda name: 1.0):
    """No weight decay on biases, norms, tokens and positions. scale(name): for layer decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            free = p.ndim <= 1 or any(w in name for w in ("_token", "pos_embed", "relative"))
            groups.setdefault((free, scale(name)), []).append(p)
    return [dict(params=groups[free, factor], weight_decay=0.0 if free else weight_decay,
                 lr_scale=factor) for free, factor in sorted(groups)]


def clipped_norm(model, clip):
    """The norm of the gradient, which is scaled down to `clip` where that is not 0."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm


def due(done, every, args):
    """Whether what happens every so many steps, and after the last, happens after step `done`."""
    return done % every == 0 or done == args.total


def agree(unread, received, done, args, data, process):
    """The losses of the steps in `unread`, means over the processes, and whether one of these was
    sent a signal. Reading waits for a GPU: there it is done only before a log line, a checkpoint,
    or leaving; in other steps: [], False.

    unread: the loss and the gradient's norm (2,) of each step up to `done`. Failed when one of them
    is not finite (fp16's scaler leaves out a step of such a norm), or when more than 1% of this
    epoch's images could not be read.
    """
    wanted = process.device.type != "cuda" or due(done, args.log_every, args) \
        or due(done, args.save_every, args)
    if not wanted and not sum_over_processes([len(received)], process)[0]:
        return [], False
    epoch = (done - 1) * args.batch_size // len(data)
    bad = sum(last >= epoch for last in data.bad.values())
    mine, norms = torch.stack(unread, dim=1).tolist()
    unread.clear()
    mine = [loss / process.world for loss in mine]
    leaving, bad, *found = sum_over_processes([len(received), bad, *mine], process)
    refuse_bad(data, bad, process)
    for step, (loss, norm) in enumerate(zip(found, norms), done - len(found) + 1):
        if not math.isfinite(loss) or not (math.isfinite(norm) or args.amp == "fp16"):
            raise Failed("" if process.rank else f"step {step}: the loss is {loss}, the gradient's "
                         f"norm {norm:.3g}; the last checkpoint is intact: --resume with --amp "
                         "off, or begin again with a lower --lr or a longer --warmup")
    return found, leaving > 0


def refuse_bad(data, bad, process):
    """Failed when `bad` images, over all processes, are more than 1%. One that two processes met
    counts once.
    """
    if bad > 0.01 * len(data):
        files = sorted({what for names in gather(list(data.bad), process) for what in names})
        bad = min(bad, len(files))
    if bad > 0.01 * len(data):
        raise Failed("" if process.rank else f"{bad:.0f} of {len(data):,} images cannot be read, "
                     f"more than 1%: mend or replace {'; '.join(files[:20])}")


# --- Data: which images, and views of them ---

@functools.lru_cache(maxsize=2)
def order(length, seed, epoch):
    return torch.randperm(length, generator=seeded(seed, ORDER, epoch))


def samples(step, batch, length, seed):
    """(epoch, index) of each image of the global batch `step`: (batch, 2). Every epoch is a
    permutation of all images. A batch may begin in one epoch and end in the next.
    """
    position = torch.arange(step * batch, (step + 1) * batch)
    epochs = position // length
    index = torch.empty_like(position)
    for epoch in epochs.unique().tolist():
        index[epochs == epoch] = order(length, seed, epoch)[position[epochs == epoch] % length]
    return torch.stack([epochs, index], dim=1)


def micro_batches(args, process, start):
    """The first rows of this process's micro-batches in a batch; and for `batches` all that follow
    from step `start` on: (step, batch, its rows) ...
    """
    k = args.micro_batch
    first_rows = [(a * process.world + process.rank) * k for a in range(args.accum)]
    return first_rows, ((step, args.batch_size, slice(first, first + k))
                        for step in range(start, args.total) for first in first_rows)


def crop_boxes(u, height, width, scale):
    """RandomResizedCrop's box for each row of uniform numbers u (n, 22): top, left, height, width.

    The first of ten tries that fits the image, or else the largest central box. All at once:
    torchvision's takes 0.8 ms an image, as long as a step of the small ViT.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :10])
    aspect = np.exp((2 * u[:, 10:20] - 1) * math.log(4 / 3))
    w = np.maximum(1, np.rint(np.sqrt(area * aspect)))
    h = np.maximum(1, np.rint(np.sqrt(area / aspect)))
    fits = (w <= width) & (h <= height)
    rows = np.arange(len(u))
    first = fits.argmax(1)
    fitting = fits.any(1)
    h = np.where(fitting, h[rows, first], min(height, round(width * 4 / 3)))
    w = np.where(fitting, w[rows, first], min(width, round(height * 4 / 3)))
    top = np.floor(np.where(fitting, u[:, 20], 0.5) * (height - h + 1))
    left = np.floor(np.where(fitting, u[:, 21], 0.5) * (width - w + 1))
    return np.stack([top, left, h, w], axis=1).astype(np.float32)


def central(height, width, size, crop):
    """(height, width) of the largest centred box with the proportions of `size`, times `crop`."""
    short = min(height / size[0], width / size[1]) * crop
    return [max(1, round(side * short)) for side in size]


class MemorySet:
    """Images in memory, (n, C, H, W) uint8, cropped and flipped on the device as a batch.
    name: what they are, for `contents`, which a run that goes on must find again.
    """
    bad = {}  # all can be read

    def __init__(self, images, labels, classes, name):
        check(images.dtype == torch.uint8, f"images are uint8, not {images.dtype}")
        self.images = images
        self.labels = labels
        self.classes = classes
        self.name = name
        self.channels = images.shape[1]
        self.contents = f"{name} {len(labels)}"
        self.found = f"{len(labels):,} images"

    def __len__(self):
        return len(self.labels)

    def keep(self, rows):
        """The set of these rows alone."""
        images = self.images[rows.to(self.images.device)]
        return MemorySet(images, self.labels[rows], self.classes, self.name)

    def get(self, index, device):
        there = self.images.device
        images = self.images[degrade.moved(index, there)]
        return degrade.moved(images, device).float() / 255

    def batches(self, wanted, size, scale, seed, device, workers=0, augment=None):
        """wanted: (step, batch, rows of it) ... -> view (k, C, *size), labels (k,) for each.
        augment(image uint8, generator) -> image.
        """
        for step, batch, rows in wanted:
            places = samples(step, batch, len(self), seed)[rows]
            u = torch.rand(batch, 23, generator=seeded(seed, CROP, step))[rows]
            box = torch.from_numpy(crop_boxes(u.numpy(), *self.images.shape[2:], scale))
            images = self.get(places[:, 1], device)
            box = degrade.moved(box, device)
            view = degrade.crop_resize(images, box, size, cubic=True).clamp(0, 1)
            turned = degrade.moved(u[:, 22] < 0.5, device).view(-1, 1, 1, 1)
            view = torch.where(turned, view.flip(3), view)
            if augment:
                pixels = (view * 255).round().to(torch.uint8).cpu()
                pixels = [augment(image, seeded(seed, AUGMENT, *place))
                          for image, place in zip(pixels, places.tolist())]
                view = torch.stack(pixels).to(device).float() / 255
            yield view, degrade.moved(self.labels[places[:, 1]], device)

    def plain(self, rows, batch, size, device, workers=0, crop=1.0):
        """The images of `rows` in order, the central `crop` of each side: views, labels ..."""
        h, w = central(*self.images.shape[2:], size, crop)
        for index in rows.split(batch):
            images = degrade.center_crop(self.get(index, device), (h, w))
            box = torch.tensor([0.0, 0.0, h, w], device=device).expand(len(images), 4)
            views = degrade.crop_resize(images, box, size, cubic=True).clamp(0, 1)
            yield views, self.labels[index].to(device)


def coco_file(data, split):
    """The annotations of a split in COCO's layout, DIR/annotations/instances_SPLIT2017.json (or the
    first that begins so), or None.
    """
    names = sorted(Path(data, "annotations").glob(f"instances_{split}*.json"))
    return max(names, key=lambda path: path.stem == f"instances_{split}2017", default=None)


def inner(data, split):
    """A folder's own folder for a split (also in ADE20K's and COCO's layouts), or all of it.
    Without `val`, `train` is a class if a folder beside it has images.
    """
    file = coco_file(data, split)
    if file:
        name = file.stem.removeprefix("instances_")
        places = [os.path.join(data, x) for x in (name, f"images/{name}", split)]
        return next((place for place in places if os.path.isdir(place)), data)
    ade = os.path.join(data, "images", dict(train="training", val="validation")[split])
    if os.path.isdir(ade) and os.path.isdir(os.path.join(data, "annotations")):
        return ade  # its annotations are pictures too
    folder = os.path.join(data, split)
    if not os.path.isdir(folder):
        return data
    if os.path.isdir(os.path.join(data, "val")):
        return folder
    for other in next(os.walk(data, onerror=unreadable))[1]:
        if not is_hidden(other) and other not in ("train", "test"):
            names = next(os.walk(os.path.join(data, other), onerror=unreadable))[2]
            if any(name.lower().endswith(IMG_FILES) for name in names):
                return data
    return folder


IMG_FILES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".avif")


def is_hidden(name):
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def unreadable(error):
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


@functools.lru_cache(maxsize=4)
def image_files(folder, labelled=False, only=()):
    """The names of all images below a folder, or `only` some folders in it, sorted and relative to
    it; and in words what was left out. Links are followed. No folder is read twice, but for two
    classes if labelled.
    """
    found = []
    seen = set()
    passed = 0
    others = 0
    absent = set()
    for where, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        hidden = {name for name in folders + names if is_hidden(name)}
        folders[:] = sorted(set(folders) - hidden)
        inside = os.path.relpath(where, folder)
        if only and inside == ".":
            absent = {*only} - {*folders}
            names = []
            folders[:] = sorted({*only} & {*folders})
        real = os.path.realpath(where)
        here = real, inside.split(os.sep)[0] * labelled  # and its class, "." of the root
        run = {"config.json", "log.jsonl"} <= set(names)  # its own pictures
        if run or {here, (real, ".")} & seen:
            folders.clear()
            continue
        seen.add(here)
        passed += len(hidden)
        images = {name for name in set(names) - hidden if name.lower().endswith(IMG_FILES)}
        others += len(set(names) - hidden - images)
        found += [os.fsencode(os.path.normpath(os.path.join(inside, name))) for name in images]
    check(found, f"no images below {folder}{' in the folders of --classes' * bool(only)}, {others} "
          f"files of other kinds: looked for {' '.join(IMG_FILES)}")
    left = [f"{passed:,} hidden or system names passed over"] * bool(passed)
    left += [f"{others:,} files of other kinds left out"] * bool(others)
    left += [f"of --classes are not there: {', '.join(sorted(absent)[:5])}"] * bool(absent)
    return np.array(sorted(found)), ", ".join(left)  # one block, not a million objects


def ignore_signals(_):
    """For loaders: a signal is sent to all of a group, and the trainer answers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class FolderSet(Dataset):
    """All images below a folder, read by loader processes. labelled: folder/<class>/... only."""
    channels = planes = 3  # of the images; of what is read
    collate = None  # the loader's own

    def __init__(self, folder, labelled=False, classes=None, only=None):
        self.folder = folder
        self.bad = {}  # what cannot be read, its last epoch
        self.names, left = image_files(folder, labelled, tuple(only or ()))
        self.found = f"{len(self.names):,} images in {folder}" + f" ({left})" * bool(left)
        of = [os.path.dirname(os.fsdecode(name)).split("/")[0] if labelled else ""
              for name in self.names.tolist()]
        check(not labelled or "" not in of,
              f"some images are in no class: labelled images are {folder}/<class>/...")
        self.classes = classes or sorted({*of})
        more = sorted({*of} - {*self.classes})
        check(not more, f"{folder} has classes that are not trained on: {', '.join(more[:5])}")
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[name] for name in of])

    def __len__(self):
        return len(self.names)

    @property
    def contents(self):
        return f"{len(self)} {hashlib.sha1(self.names).hexdigest()[:12]}"

    def keep(self, rows):
        """The set of these rows alone."""
        less = copy.copy(self)
        less.names = self.names[rows.numpy()]
        less.labels = self.labels[rows]
        less.found = f"{len(rows):,} of {self.found}"
        return less

    def __getitem__(self, item):
        """(index, epoch or -1 for the central part, ...) -> view (3, *size) uint8, index, epoch,
        what could not be read. The next good image replaces a bad one; a central part is left out.
        """
        index, epoch, size, scale, seed, augment = item
        unread = ""
        for k in range(1 if epoch < 0 else 100):
            position = (index + (k if k < 5 else k ** 3)) % len(self)  # all of a folder may be bad
            try:
                image = self.read(position)
                break
            except Exception as error:  # Pillow's plug-ins raise whatever they like
                unread = unread or f"{self.path(position)}: {error}"
        else:
            return torch.zeros(self.planes, *size, dtype=torch.uint8), -1, epoch, unread
        view = self.view(image, index, epoch, size, scale, seed)
        if augment:
            view = augment(view, seeded(seed, AUGMENT, epoch, index))
        return view, position, epoch, unread

    def path(self, index):
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def read(self, index):
        return degrade.read_image(self.path(index))

    def view(self, image, index, epoch, size, scale, seed):
        """A random crop of (C, H, W), or for epoch -1 the central part `scale`: (C, *size)."""
        H, W = image.shape[1:]
        if epoch < 0:
            view = degrade.center_crop(image[None], central(H, W, size, scale))
        else:
            u = torch.rand(1, 23, generator=seeded(seed, CROP, epoch, index)).numpy()
            top, left, h, w = crop_boxes(u, H, W, scale)[0].astype(int)
            view = image[None, :, top:top + h, left:left + w]
        view = F.interpolate(view, size, mode="bicubic", antialias=True)[0]
        return view.flip(2) if epoch >= 0 and u[0, 22] < 0.5 else view

    def skip(self, what, epoch):
        """What cannot be read is named once, and remembered with its last epoch."""
        if what not in self.bad:
            tqdm.write(f"skipped {what}", file=sys.stderr)
        self.bad[what] = epoch

    def _load(self, items, device, workers):
        loader = DataLoader(self, batch_sampler=items, num_workers=workers,
                            pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
                            collate_fn=self.collate)
        for view, index, epoch, unread in loader:
            for what, last in zip(unread, epoch.tolist()):
                if what:
                    self.skip(what, last)
            if index.min() < 0:
                if epoch.max() >= 0:
                    raise Failed(f"{list(self.bad)[-1]}; nor can 99 others be read")
                view = view[index >= 0]
                index = index[index >= 0]
            if len(index):
                yield self.to_device(view, device), degrade.moved(self.labels[index], device)

    def to_device(self, view, device):
        return degrade.moved(view, device).float() / 255

    def batches(self, wanted, size, scale, seed, device, workers=0, augment=None):
        """As MemorySet.batches."""
        return self._load(([(i, epoch, size, scale, seed, augment) for epoch, i in
                            samples(step, batch, len(self), seed)[rows].tolist()]
                           for step, batch, rows in wanted), device, workers)

    def plain(self, rows, batch, size, device, workers=0, crop=1.0):
        """As MemorySet.plain; an image that cannot be read is left out."""
        return self._load([[(i, -1, size, crop, 0, None) for i in part.tolist()]
                           for part in rows.split(batch) if len(part)], device, workers)


def load_data(args, process, split="train", labelled=False, classes=None):
    """--data as a set with .channels, .labels, .classes, .batches(...), .plain(...). split: "train"
    or "val". labelled: a folder must be DIR/SPLIT/<class>/..., of `classes` where they are known.
    """
    train = split == "train"
    kind = kind_of(args.data)
    check(kind == "folder" or not args.only, f"--classes: {args.data} is no folder")
    if kind == "drawn":
        check(args.data == "shapes" or not labelled,
              f"--data {args.data}: its images have no class of their own, choose another --data")
        drawn = built_in(args.data, train)
        return MemorySet(drawn, drawn.labels, list(SHAPES), f"{args.data} {split}")
    if kind == "named":
        which = dict(train=train)
        if args.data == "stl10":
            seen = "train" if labelled else "train+unlabeled"
            which = dict(split=seen if train else "test")
        read = functools.partial(getattr(torchvision.datasets, SETS[args.data]), args.root, **which)
        on_rank_0(lambda: read(download=args.download), process, ValueError,  # it fetches for all
                  f"--data {args.data} cannot be read from --root {args.root}"
                  + " (--download fetches it)" * (not args.download))
        made = read()
        images = torch.as_tensor(made.data, device=process.device)
        if images.ndim == 3:  # grey
            images = images[:, None]
        elif images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(made.targets if hasattr(made, "targets") else made.labels).long()
        return MemorySet(images, labels, made.classes, f"{args.data} {split}")

    folder = inner(args.data, split)
    only = args.only
    if not train and not labelled:  # to look at
        folder = inner(args.data, "train") if folder == args.data else folder
        only = [name for name in only or () if os.path.isdir(os.path.join(folder, name))]
    check(folder != args.data or not labelled,
          f"there is no {args.data}/{split}: labelled images are DIR/train/<class>/... and "
          "DIR/val/<class>/...")
    data = FolderSet(folder, labelled, classes, only)
    same_copies(data, folder, process)
    return data


def same_copies(data, folder, process):
    """The images of a set are the same for all processes, by count and names."""
    copies = gather(data.contents, process)
    check(len(set(copies)) == 1, f"processes see other images in {folder}, by count and names: "
          + ", ".join(f"rank {rank} {contents}" for rank, contents in enumerate(copies)))


def pictures_to_show(args, process, data):
    """Eight views (8, C, *args.view) of images that are not trained on, if --data has such."""
    val = load_data(args, process, "val")
    val.bad = data.bad  # a bad image is named once
    views = val.plain(torch.arange(min(3200, len(val))), 32, tuple(args.view), process.device)
    views = next(views, ([],))[0]  # of the first 32, if they can be read
    check(len(views), f"none of the first images of {args.data} can be read")
    return views[torch.arange(8) % len(views)]


# --- The built-in pictures ---

def _bar(a, b, width, height):
    return torch.minimum(width - a.abs(), height - b.abs())


# A shape in its own frame (u, v): positive inside, about the distance to the outline.
SHAPES = {
    "disc": lambda u, v: 0.9 - (u * u + v * v).sqrt(),
    "ring": lambda u, v: 0.24 - ((u * u + v * v).sqrt() - 0.7).abs(),
    "square": lambda u, v: _bar(u, v, 0.8, 0.8),
    "triangle": lambda u, v: 0.55 - torch.stack(
        [v, 0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v]).amax(0),
    "cross": lambda u, v: torch.maximum(_bar(u, v, 0.28, 0.95), _bar(u, v, 0.95, 0.28)),
    "star": lambda u, v: 0.38 + 1.24 * (
        (torch.atan2(v, u) * 2.5 / math.pi) % 1 - 0.5).abs() - (u * u + v * v).sqrt(),
    "crescent": lambda u, v: torch.minimum(0.95 - (u * u + v * v).sqrt(),
                                           ((u - 0.45) ** 2 + v * v).sqrt() - 0.7),
    "corner": lambda u, v: torch.maximum(_bar(u + 0.55, v, 0.3, 0.9),
                                         _bar(u, v - 0.6, 0.85, 0.3)),
    "bars": lambda u, v: _bar(u.abs() - 0.55, v, 0.24, 0.9),
    "half_disc": lambda u, v: torch.minimum(1 - (u * u + (v + 0.45) ** 2).sqrt(), v + 0.45),
}


class Drawn:
    """n generated pictures, (n, 3, size, size) uint8, each drawn when it is first asked for: one of
    ten shapes on a ground. The label is the shape alone: colours, faint stripes, background,
    position, size, turn and aspect are random. The object fills about half of the width or more.
    """
    device = torch.device("cpu")
    dtype = torch.uint8

    def __init__(self, n, size=48, seed=0):
        generator = seeded(seed, n, size)
        self.labels = (torch.arange(n) % len(SHAPES))[torch.randperm(n, generator=generator)]
        self.numbers = torch.rand(n, 20, generator=generator)
        self.undrawn(n, 3, size)

    def undrawn(self, n, channels, size):
        """Room for n pictures, none of which is drawn yet."""
        # the aspect, here: a power's last bit depends on how many are computed at once
        self.numbers[..., 1] = 2 ** (0.5 * self.numbers[..., 1] - 0.25)
        self.shape = (n, 3, size, size)
        self.images = torch.empty(n, channels, size, size, dtype=torch.uint8)
        self.done = torch.zeros(n, dtype=torch.bool)

    def draw(self, rows):
        """These rows of `images`, drawn anew."""
        for label, outline in enumerate(SHAPES.values()):
            for few in rows[self.labels[rows] == label].split(50):  # they fit the cache
                r = self.numbers[few].T[:, :, None, None]  # (20, k, 1, 1)
                shape = outline, r, 0.62 + 0.28 * r[0]
                self.images[few] = draw_shapes([shape], self.shape[2])[0]

    def drawn(self, rows):
        """The images of these rows, with all their channels."""
        missing = rows[~self.done[rows]]
        self.draw(missing)
        self.done[missing] = True
        return self.images[rows]

    def __getitem__(self, rows):
        return self.drawn(rows)[:, :3]


class Scenes(Drawn):
    """n generated scenes of one to four shapes on a ground. images (n, 4, size, size) uint8: the
    fourth channel says which shape is seen, 0 the ground. kinds (n, 4): their numbers in SHAPES.
    """

    def __init__(self, n, size=96, seed=0):
        generator = seeded(seed, n, size, 4)
        self.counts = torch.randint(1, 5, (n,), generator=generator)
        self.kinds = torch.randint(len(SHAPES), (n, 4), generator=generator)
        self.numbers = torch.rand(n, 4, 20, generator=generator)
        self.labels = torch.zeros(n).long()
        self.undrawn(n, 4, size)

    def draw(self, rows):
        outlines = [*SHAPES.values()]
        for i in rows.tolist():
            shapes = []
            for kind, row in zip(self.kinds[i, :self.counts[i]], self.numbers[i]):
                r = row[:, None, None, None]  # (20, 1, 1, 1)
                shapes.append((outlines[kind], r, 0.2 + 0.4 * r[0]))
            self.images[i] = torch.cat(draw_shapes(shapes, self.shape[2]), dim=1)[0]


def built_in(data, train):
    """The pictures of `shapes` or `scenes`, to train on or to measure."""
    if data == "scenes":
        return Scenes(10000 if train else 500, seed=int(not train))
    return Drawn(30000 if train else 5000, seed=int(not train))


def draw_shapes(shapes, size):
    """k pictures (k, 3, size, size) uint8 of shapes on a ground, later ones in front, and which is
    seen at each pixel, (k, 1, size, size) uint8: 1 and on, 0 the ground. A shape: its outline,
    random numbers r (20, k, 1, 1), its radius (k, 1, 1).
    """
    axis = (torch.arange(size) + 0.5) / size * 2 - 1

    def along(angle):  # the coordinate in a direction, in turns
        angle = 2 * math.pi * angle
        return axis * torch.cos(angle) + axis[:, None] * torch.sin(angle)

    # the ground is a ramp between two colours
    r = shapes[0][1]
    near = r[5:8].movedim(0, 1)  # (k, 3, 1, 1)
    far = (near + 0.5 * r[8:11].movedim(0, 1) - 0.25).clamp(0, 1)
    ramp = (0.5 + along(r[14]) / 2.84)[:, None]
    picture = near * (1 - ramp) + far * ramp
    middle = (near + far) / 2
    seen = torch.zeros(len(picture), 1, size, size, dtype=torch.uint8)

    for number, (outline, r, radius) in enumerate(shapes, 1):
        # how far each pixel is inside the shape, in pixels
        aspect = r[1]
        turn = 2 * r[2] - 1
        x = axis - (2 * r[3] - 1) * (1.05 - radius)
        y = axis[:, None] - (2 * r[4] - 1) * (1.05 - radius)
        u = x * turn.cos() + y * turn.sin()
        v = y * turn.cos() - x * turn.sin()
        inside = outline(u / radius * aspect, v / radius / aspect) * radius * size / 2
        inside = inside[:, None]  # (k, 1, size, size)

        # its colour, which shows on the middle of the ramp, and its stripes
        paint = r[11:14].movedim(0, 1)
        close = (paint - middle).abs().amax(1, keepdim=True) < 0.45
        paint = torch.where(close, (middle + 0.5) % 1, paint)
        stripes = 0.06 * torch.sin(math.pi * (6 + 10 * r[16]) * along(r[15]))[:, None]
        cover = (0.5 + inside).clamp(0, 1)
        picture = picture * (1 - cover) + (paint + stripes) * cover
        seen[inside > 0] = number
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8), seen


# --- What a run leaves ---

def write_whole(path, write):
    """write(file) beside `path`, then in its place: no reader meets half a file."""
    beside = Path(f"{path}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def config_of(args):
    """The options and what follows from them, as JSON has them."""
    return json.loads(json.dumps(vars(args), default=str))


def provenance():
    """What a run can be traced back to."""
    git = subprocess.run("git describe --always --dirty --abbrev=40 '--exclude=*'", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    hardware = f"{cores()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_initialized():
        hardware = torch.cuda.get_device_name()
    return dict(command=" ".join(sys.argv), torch=torch.__version__, hardware=hardware,
                commit=git.stdout.strip())


def write_config(args):
    """config.json in --out, which is made."""
    args.out.mkdir(parents=True, exist_ok=True)
    config = {**config_of(args), **provenance()}
    write_text(args.out / "config.json", json.dumps(config, indent=1))


# What may differ when a run goes on. The path of the data may, the images not: their names are
# compared, as `contents`.
MAY_CHANGE = ("out", "resume", "origin", "device", "workers", "amp", "micro_batch", "accum",
              "at_once", "save_every", "log_every", "compile", "download", "root", "data",
              "fitted")


def begin(args, process, state):
    """Open --out, and go on from args.origin -> the first step, the losses not yet in the log.
    state: {name: what has a state_dict()}.
    """
    start = 0
    recent = []
    lines = []
    last = args.out / "checkpoint.pt"
    log_file = args.out / "log.jsonl"
    mine = args.origin and args.origin.resolve() == last.resolve()
    check(len(set(gather(last.exists(), process))) == 1, f"not all processes see the same "
          f"{args.out}: --out must be one folder for all machines")
    check(mine or not last.exists(), f"{args.out} already holds a run: --resume goes on with it, "
          "another --out keeps it")
    if args.origin:
        old = models.read_weights(args.origin)
        check({*state, "step", "config", "recent"} <= {*old}, f"{args.origin} is no checkpoint of "
              "this script: --resume takes one, --weights takes plain weights")
        # what was trained on first: other options may follow from it
        now, then = ({"contents": None, **c, **c.get("settings", {}), "settings": None}
                     for c in (config_of(args), old["config"]))
        for name, value in now.items():
            before = then.get(name)
            check(name in MAY_CHANGE or before == value, f"{args.origin} was made with {name} "
                  f"{before}, this command asks for {value}: give the same, or begin another run "
                  f"in another --out with --weights {args.origin.parent}")
        for name, part in state.items():
            if old[name]:  # a scaler's may be empty
                part.load_state_dict(old[name])
        start = old["step"]
        recent = old["recent"]
    beside = args.origin and args.origin.resolve().parent == args.out.resolve()
    if beside:  # each step stands once, and whole
        try:
            lines = [json.dumps(line) + "\n" for line in read_log(args.out)
                     if line["step"] <= start]
        except (ValueError, TypeError, KeyError):
            check(False, f"{log_file} is damaged: mend it, or delete it")

    def write():
        write_config(args)
        write_text(log_file, "".join(lines))
    on_rank_0(write, process, ValueError)
    return start, recent


def save(step, args, process, state, recent, picture=None):
    """checkpoint.pt, and a picture of what is recovered."""
    def write():
        if picture:
            name = args.out / f"recovered_{step:07d}.png"
            write_whole(name, lambda file: picture.save(file, "PNG"))
        now = {name: part.state_dict() for name, part in state.items()}
        now.update(step=step, config=config_of(args), recent=recent)
        write_whole(args.out / "checkpoint.pt", lambda file: torch.save(now, file))
    on_rank_0(write, process)


def log(args, process, **line):
    """A line of log.jsonl. JSON has no infinity, which fp16's first norms may be."""
    line = {k: v if math.isfinite(v) else None for k, v in line.items()}

    def write():
        with open(args.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    on_rank_0(write, process)


def read_log(folder):
    """The whole lines of log.jsonl, as dicts. A killed run may leave half a line, or no log."""
    file = Path(folder, "log.jsonl")
    lines = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@torch.no_grad()
def recover(model, view, args, generator, amp, token=True):
    """Views (B, C, V, V), damaged as in training -> Degraded, the prediction (B, N, p p C), and the
    recovered pictures (B, C, V, V). token False: without the mask token (A2 Fig. A3).

    The mean and contrast of normalised patches are borrowed from the view.
    """
    size = tuple(args.img_size)
    p = args.patch_size
    training = model.training
    d = degrade.degrade(view, args.task, size, p, generator, **args.settings)
    model.eval()
    with amp():
        prediction = model(d.inputs, d.hidden, **({} if token else dict(token=False)))
    model.train(training)
    picture = losses.recovered_picture(prediction, model.normalize(d.target), size, p,
                                       args.norm_target)
    return d, prediction, model.denormalize(picture)


def recovery_sheet(model, view, args, amp):
    """View | what the encoder sees | recovered, two images a row, as a Pillow picture. Where a
    token enters inside the encoder, also | all that is predicted | the same without the token (A2
    Fig. A3). Failed when the prediction is not finite: such a model is not saved.
    """
    d, prediction, picture = recover(model, view, args, seeded(args.seed, PICTURE), amp)
    if not prediction.isfinite().all():
        raise Failed("the model's prediction is not finite, the last checkpoint stays: --resume "
                     "with --amp off, or begin again with a lower --lr")
    p = args.patch_size
    columns = {"view": d.target, "encoder sees": degrade.seen(d, p),
               "recovered": degrade.paste_visible(picture, d, p)}
    if args.token_at not in ("decoder", "none"):
        columns["all predicted"] = picture
        generator = seeded(args.seed, PICTURE)
        columns["without token"] = recover(model, view, args, generator, amp, token=False)[2]
    borrowed = "each patch's mean and contrast are borrowed from the view"
    two_a_row = [x[rows::2] for rows in (0, 1) for x in columns.values()]
    return degrade.sheet(two_a_row, [*columns] * 2, borrowed if args.norm_target != "off" else "")


# --- Signals and exit codes ---

def remember_signals(says):
    """{number: when} of the SIGTERMs and Ctrl-Cs received from now on. The loop saves and leaves
    after its step. A second Ctrl-C leaves at once, if a second has passed: torchrun may send the
    first one twice. It sends the second one as SIGTERM.
    """
    received = {}

    def remember(number, _):
        if time.monotonic() > received.get(signal.SIGINT, math.inf) + 1:
            raise KeyboardInterrupt
        if not received and says:  # not print, whose buffer may be in use just now
            os.write(2, b"\nsaving after this step; a second Ctrl-C leaves at once, without\n")
        received.setdefault(number, time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return received


def leave(received, process):
    """The exit code of a run that has saved because of a signal, to any of the processes."""
    number = next(iter(received), signal.SIGTERM)
    if process.rank == 0:
        print(f"stopped by signal {number:d}, saved: --resume goes on")
    return 128 + number


# What torch says, and what to do about it.
FEWER = "fewer images at once (--accum, --batch_size), or a lower --img_size"
WAYS_OUT = {
    "shared memory": "/dev/shm is too small for the loaders: --workers 0, or docker's --shm-size",
    "C++ compiler": "leave out --compile",
    "out of memory": FEWER,
    "to allocate": FEWER,
    "by peer": "another process ended, see what it says",
    "Read-only file system": "give another --out",
    "No space left on device": "make room, or give another --out",
}


@atexit.register
def end_loaders():
    """multiprocessing ends loaders by SIGTERM, which they ignore, and then waits for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises when a loader is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def command(main, argv=None):
    """main()'s exit code. What was refused (2), failed (1) or interrupted (130) gets one line, an
    unknown error (1) its traceback.
    """
    line = ""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that it cannot encode
    try:
        code = main(argv) or 0
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        # what refuses is a line with `raise`; int("x") is an accident, as is a loader's error,
        # which is raised again with its Traceback in the text
        by_hand = traceback.extract_tb(error.__traceback__)[-1].line.startswith("raise")
        if isinstance(error, KeyboardInterrupt):
            code = 130
            line = "stopped by Ctrl-C, without saving" if first else ""
        elif isinstance(error, (Failed, FloatingPointError)):
            code = 1
            line = str(error)
        elif isinstance(error, ValueError) and by_hand and "Traceback" not in str(error):
            code = 2
            line = str(error) if first else ""  # it is refused, by all processes alike
        else:
            code = 1
            line = next((f"{str(error).splitlines()[0]}: {way}" for sign, way in WAYS_OUT.items()
                         if sign in str(error)), "")
            if not line:
                traceback.print_exc()
        traceback.clear_frames(error.__traceback__)  # the progress bar ends above the line
    if line:
        print(f"{Path(sys.argv[0]).name}: {line.splitlines()[-1]}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(command(main))
