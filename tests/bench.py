"""How fast is it? Images per second, and as a share of the peak of matrix products beside it.

    python tests/bench.py                most of it, about twenty minutes on 2 CPU cores
    python tests/bench.py step profile   only these, of: step a2mim finetune dense analyze profile
                                         degrade input processes attention memory budget compile

A figure is the median of several repetitions after warm-up, with the lowest and the highest. The
last line is one JSON object of all. FLOPs are those of the matrix products and convolutions of a
forward pass, counted by torch's FlopCounterMode, a multiply-add as two: a block of T tokens of
width D has 24 T D^2 + 4 T^2 D. A training step has three times as many: forward, the gradient of
inputs, the gradient of weights. The peak is that of square matrices of 2048 a side, on a GPU 8192.
"""
import functools
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from statistics import median

import numpy as np
import claims  # it finds the others
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, io, transforms

import analyze
import degrade
import finetune
import losses
import models
import pretrain

process = pretrain.set_up("cuda" if torch.cuda.is_available() else "cpu")
device, figures, asked = process.device, {}, pretrain.options([])
amp = pretrain.precision(asked, device)
dtype = pretrain.PRECISIONS[asked.amp]


def seconds(work, n=10 if device.type == "cuda" else 1):
    """Of one of n in a row. A GPU is not waited for in between, as in training."""
    start = time.perf_counter()
    for _ in range(n):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def in_turn(repeat, *works):
    """Seconds of each work, in turn, after warm-up: (repeat, works)."""
    return [[*map(seconds, works)] for _ in range(repeat + 1)][1:]


def clock(work, repeat):
    return [s for s, in in_turn(repeat, work)]


def report(name, values, unit="", note=""):
    found = dict(median=median(values), low=min(values), high=max(values))
    figures[name] = {k: round(v, 4) for k, v in found.items()} | dict(unit=unit, note=note)
    print(f"{name:60}", *figures[name].values(), flush=True)


def report_speed(name, n, seconds, note=""):
    report(name, [n / s for s in seconds], "images/s", note)


def report_ratio(name, pairs):
    report(name, [b / a for a, b in pairs], "x")


SIDE = 8192 if device.type == "cuda" else 2048


def products(dtype):
    a, b = torch.randn(2, SIDE, SIDE, device=device).to(dtype)
    return lambda: [a @ b for _ in range(5)]


def compare(label, ours, what, other, repeat):
    """A step of shape[0] images, `flop` each, another step, and the peak, in turn."""
    peak, one, two = zip(*in_turn(repeat, products(dtype), ours, other))
    report(f"{label}: peak {asked.amp}", [10 * SIDE ** 3 / 1e9 / s for s in peak], "GFLOP/s")
    report_speed(label, ours.shape[0], one, f"{ours.flop / 1e9:.2f} GFLOPs an image")
    share = ours.flop * ours.shape[0] / (10 * SIDE ** 3)
    report(f"{label}: share of peak", [share * p / s for p, s in zip(peak, one)])
    report_ratio(f"{label}: {what}, time", zip(one, two))


N = 256 if device.type == "cuda" else 32
PAPER = f"--data .github --batch_size {N} --model "  # a folder has the paper's sizes
VIT_B, RESNET = f"ViT-B/16 at 224, batch {N}", f"ResNet-50 at 224, batch {N}"
SMALL = "small ViT, 32 px"
NETWORKS = {VIT_B: PAPER + "vit_base", f"ViT-S/16 at 224, batch {N}": PAPER + "vit_small",
            RESNET: PAPER + "resnet50", f"{SMALL}, batch 256": "--model vit_micro",
            "ResNet-18, 64 px, batch 256": "--model resnet18"}
# what settling a command line asks of data
DATA = pretrain.MemorySet(torch.empty(0, 3, 1, 1, dtype=torch.uint8), range(10 ** 6), range(10), "")


def flops(model, *inputs):
    """FLOPs of a forward pass, an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / len(inputs[0])


def training_step(model, args, loss, view, forward, kind="adamw", decay=1):
    """The other half of a training loop. forward: FLOPs."""
    scale = finetune.layer_scale(model, decay)
    groups = pretrain.parameter_groups(model, args.weight_decay, scale)
    optimizer = finetune.OPTIMIZERS[kind](groups, lr=1e-4, betas=tuple(args.betas))

    def step():
        loss().backward()
        pretrain.clipped_norm(model, args.clip)
        optimizer.step()
        optimizer.zero_grad()
    step.shape, step.flop = view.shape, 3 * forward
    return step


def make_step(flags, to_device=models.to_device):
    """The core of pretrain.main's loop on random views, as the command line `flags` settles it."""
    args = pretrain.options(shlex.split(flags))
    pretrain.settle(args, process, DATA)
    size, p = tuple(args.img_size), args.patch_size
    model = to_device(models.recovery_model(
        args.model, size, p, 3, args.token_at, args.token_how, args.decoder), device)
    view = torch.rand(args.batch_size, 3, *args.view, device=device)

    net = torch.compile(model, mode=pretrain.compile_mode(args), disable=not args.compile)
    loss_function = torch.compile(pretrain.loss_of, disable=not args.compile)

    def damaged(view):
        return degrade.degrade(view, args.task, size, p, pretrain.seeded(1), **args.settings)

    def loss():
        d = damaged(view)
        with amp():
            prediction = net(d.inputs, d.hidden)
        return loss_function(model, prediction, d, args)
    forward = flops(model, *damaged(view[:2])[:2])
    return training_step(model, args, loss, view, forward)


def step():
    """Beyond Masking."""
    for label, flags, repeat in ((f"{VIT_B}, mask", NETWORKS[VIT_B], 15),
                                 ("default small model, batch 256, mask", "", 30)):
        mask, joined = (make_step(f"--task {task} {flags}") for task in ("mask", "zoom_in_mask"))
        compare(label, mask, "zoom_in_mask / mask", joined, repeat)


def a2mim():
    """A2MIM, and its frequency loss."""
    for label, flags in [*NETWORKS.items()][1:]:
        without, with_it = (make_step(f"--task a2mim --freq_weight {weight} {flags}")
                            for weight in (0, 0.5))
        compare(f"{label}, a2mim without frequency loss", without, "with / without", with_it, 9)
        x, y = torch.rand(2, *with_it.shape, device=device)
        found = in_turn(5, with_it, lambda: losses.focal_frequency(
            x.requires_grad_(), y, y[:, :1] < 0.6).backward())
        report_ratio(f"{label}: frequency loss alone / step", found)


def finetune_():
    """By the papers' recipes; frozen features; RandAugment."""
    for label, classes, flags in (
            (f"ViT-B/16, deit, batch {N}", 1000, f"{NETWORKS[VIT_B]} --recipe deit"),
            (f"ResNet-50, rsb_a3 at 160, batch {N}", 1000, NETWORKS[RESNET]),
            (f"{SMALL}, batch 64", 10, "")):
        args, _, _ = finetune.options(flags.split())
        finetune.settle(args, process, DATA)
        n = args.batch_size
        model = models.to_device(models.encoder(
            args.model, args.img_size, args.patch_size, 3, classes, pool=args.pool), device)
        view = torch.rand(n, 3, *args.img_size, device=device)
        labels = torch.full((n, classes), 1 / classes, device=device)
        drop = models.drop_path(n, model.branches, args.drop_path, pretrain.seeded(0))

        def loss():
            images, targets = finetune.mix(view, labels, args.mixup, args.cutmix,
                                           np.random.default_rng(0))
            with amp():
                scores = model(images, drop.to(device) if args.drop_path else None)
            return finetune.class_loss(scores, targets, args)

        def features():
            model.eval()
            with torch.no_grad(), amp():
                model.pooled(model.encode(view))
            model.train()
        step = training_step(model, args, loss, view, flops(model, view[:2]), args.optimizer,
                             args.layer_decay)
        compare(f"fine-tuning: {label}", step, "frozen features / step", features, 7)
    picture = torch.zeros(3, 224, 224, dtype=torch.uint8)
    found = clock(lambda: [finetune.augmented(picture, pretrain.seeded(i), 9, 0.5, 0)
                           for i in range(20)], 5)
    report_speed("RandAugment at 224, one image at a time", 20, found)


def dense():
    """Segmentation and detection, by the papers' recipes and the small ones."""
    for label, n, size, classes, flags in (
            ("ViT-B/16, segment at 512", 2, (512, 512), 150, "--recipe ade_bm --model vit_base"),
            ("ViT-B/16, detect at 800 x 1216", 1, (800, 1216), 80,
             "--recipe coco_bm --model vit_base"),
            ("small ViT, segment at 48", 32, (48, 48), 11, ""),
            ("small ViT, detect at 64", 16, (64, 64), 10, "")):
        head = "detect" if "detect" in label else "segment"
        data = pretrain.MemorySet(DATA.images, DATA.labels, range(classes), "")
        args, _, _ = finetune.options(["--head", head, *flags.split()])
        finetune.settle(args, process, data)
        model = models.to_device(finetune.with_head(args, None, data, False), device)
        encoder = next(part for part in model.modules() if isinstance(part, models.Encoder))
        view = torch.rand(n, 3, *size, device=device)
        labels, more = torch.zeros(n, *size, dtype=torch.long, device=device), []
        if head == "detect":
            boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.5, 0.9, 0.9]]).to(device)
            truth = dict(boxes=boxes * torch.tensor([*size, *size]).to(device).flip(0),
                         labels=torch.tensor([1, 2], device=device),
                         masks=torch.ones(2, *size, dtype=torch.uint8, device=device))
            more = [[truth] * n]

        def loss():
            with amp():
                scores = model(view, None, *more)
            return finetune.LOSSES[head](scores, labels, args)

        def maps():
            with torch.no_grad(), amp():
                encoder.maps(view)
        step = training_step(model, args, loss, view, flops(model, view, None, *more),
                             args.optimizer, args.layer_decay)
        compare(label, step, "the encoder's maps / step", maps, 5)


@torch.no_grad()
def analyze_():
    """Passes of interactions and of feature maps."""
    for label, name, S, p, pairs, contexts, n in (
            ("ViT-S/16 at 224", "vit_small", 224, 16, 2, 10, 16),
            ("ResNet-50 at 224", "resnet50", 224, 16, 2, 10, 16),
            (SMALL, "vit_micro", 32, 4, 8, 60, 64)):
        model = models.to_device(models.encoder(name, S, p, num_classes=10).eval(), device)
        views, players = torch.rand(n, 3, S, S, device=device), (S // p) ** 2
        label_of, near = torch.tensor([0], device=device), analyze.near_pairs((S // p, S // p))

        orders = [0, players // 2, players - 2]

        def interactions(at_once=pairs, groups=(orders,)):
            with amp():
                f = analyze.game(model, views[:1], label_of, p, views[0, :, 0, 0])
                for some in near[:pairs].split(at_once):
                    for few in groups:
                        analyze.interactions(f, players, some, few, contexts, pretrain.seeded(0))

        def maps(look=analyze.log_amplitude):
            with amp():
                analyze.feature_maps(model, views, look)
        interactions.flop = maps.flop = flops(model, views)
        interactions.shape = [pairs * 4 * (2 + contexts)]  # two orders have one context
        maps.shape = views.shape
        compare(f"interaction: {label}", interactions, "one pair and order at a time / ours",
                lambda: interactions(1, [[m] for m in orders]), 5)  # as the published script
        compare(f"fourier: {label}", maps, "variance / fourier",
                lambda: maps(analyze.spatial_variance), 5)


def memory():
    """What the choices of models.to_device and models.Convolution rest on."""
    for B, C, out, side, k in ((256, 512, 512, 2, 3), (256, 512, 3072, 2, 1),
                               (32, 512, 512, 7, 3), (32, 512, 2048, 7, 1)):
        x = torch.randn(B, C, side, side, device=device, requires_grad=True)
        both = [layer.to(device, memory_format=torch.channels_last) for layer in (
            models.Convolution(C, out, k), torch.nn.Conv2d(C, out, k, padding=k // 2))]

        def passes(layer):
            with amp():
                y = layer(x.contiguous(memory_format=torch.channels_last))
            y.sum().backward()
        label = f"{k}x{k}, {C} -> {out}, of {B} maps of {side} x {side}"
        report_ratio(f"{label}: torch's / ours, time",
                     in_turn(7, *(functools.partial(passes, layer) for layer in both)))
    for label in (RESNET, "ResNet-18, 64 px, batch 256"):
        both = (make_step(f"--task a2mim {NETWORKS[label]}", how)
                for how in (models.to_device, torch.nn.Module.to))
        report_ratio(f"{label}: contiguous / channels-last, time", in_turn(5, *both))


# By their names, of a CPU's operations and a GPU's kernels. A kernel that torch.compile made of
# several operations is in the rest.
PARTS_OF_A_STEP = {
    "cpu": ("matrix products: mm linear convolution", "casts and copies: copy_ cat clone",
            "attention: softmax attention", "layer norm: layer_norm", "GELU: gelu",
            "optimiser: adamw"),
    "cuda": ("matrix products: gemm nvjet cutlass splitk", "attention: sdpa flash fmha",
             "optimiser: multi_tensor"),
}


def profile():
    gpu = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    for more in ("", "--compile")[:1 + gpu]:
        work = make_step(f"--task mask {NETWORKS[VIT_B]} {more}")
        label = f"ViT-B/16 step {more}".strip()
        whole, = clock(work, 1)
        with torch.profiler.profile() as p:
            seconds(work, 1)
        events = [(e.key.lower(), getattr(e, f"self_{'device' if gpu else 'cpu'}_time_total"))
                  for e in p.key_averages()
                  if e.device_type == kind and not e.key.startswith("Optimizer.")]  # a span
        busy = rest = sum(t for _, t in events)
        for group in PARTS_OF_A_STEP[device.type]:
            group, keys = group.split(": ")
            part = sum(t for name, t in events if any(k in name for k in keys.split()))
            rest -= part
            report(f"{label}: {group}", [part / busy], "of the time")
        report(f"{label}: the rest", [rest / busy], "of the time")
        report(f"{label}: all of these", [busy / 1e3], "ms", f"of {1e3 * whole:.1f}")


def degrade_():
    for task in degrade.TASKS:
        view = torch.rand(64, 3, *degrade.view_size(task, 224), device=device)
        found = clock(lambda: degrade.degrade(view, task, 224, 16, pretrain.seeded(0)), 7)
        report_speed(f"degrade {task}, 224 px, batch 64", 64, found)


def photo(path, height, width):
    """Write a JPEG, as soft and as noisy as a photograph."""
    soft = F.interpolate(torch.randn(1, 3, 48, 48), (height, width), mode="bicubic")[0]
    picture = 128 + 50 * soft + 4 * torch.randn(3, height, width)
    io.write_jpeg(picture.clamp(0, 255).byte(), str(path), 90)


def input_():
    """JPEGs to views on one thread, and torchvision's pipeline on Pillow images."""
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/class")
        for i in range(200):
            photo(f"{folder}/class/{i}.jpg", 375, 500)
        usual = datasets.ImageFolder(folder, transforms.Compose([
            transforms.RandomResizedCrop(224, (0.2, 1), interpolation=3),  # bicubic
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(models.IMAGENET_MEAN, models.IMAGENET_STD)]))
        ours, how = pretrain.FolderSet(folder), (0, (224, 224), (0.2, 1.0), 0, None)
        a, b = zip(*in_turn(5, lambda: [ours[(i, *how)] for i in range(200)], lambda: [*usual]))
    report_speed("input: files to views, one thread", 200, a, "JPEG, 500x375")
    report_speed("input: the usual pipeline", 200, b)
    report_ratio("input: ours / usual", zip(a, b))


def processes():
    """The default run in its first epoch, in which the pictures are drawn."""
    speeds, waits = {1: [], 2: []}, []
    with tempfile.TemporaryDirectory() as folder:
        for i, n in enumerate((1, 2) * 3):
            argv = ["torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "pretrain.py",
                    "--steps", "120", "--out", f"{folder}/{i}"]
            subprocess.run([sys.executable, "-m", *argv], check=True, capture_output=True)
            lines = pretrain.read_log(argv[-1])[1:]
            speeds[n].append(median(line["images_per_s"] for line in lines))
            waits += [line["data_wait"] for line in lines if n == 2]
    report("default run, one process, two threads", speeds[1], "images/s")
    report("default run, two processes", speeds[2], "images/s")
    report_ratio("default run, two processes / one", zip(*speeds.values()))
    report("default run, two processes: share of time waiting for data", waits)


def attention():
    """What models.attend's choice rests on. Images x heads x tokens x width."""
    def written(q, k, v):
        return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3) @ v
    for shape in ("256 4 17 32", "256 2 65 32", "32 12 50 64", "64 12 197 64"):
        q = torch.randn(3, *map(int, shape.split()), device=device, dtype=dtype, requires_grad=True)
        both = (lambda f=f: f(*q).sum().backward()
                for f in (written, F.scaled_dot_product_attention))
        report_ratio(f"attention {shape.replace(' ', ' x ')}: fused / written, time",
                     in_turn(9, *both))


def budget():
    """Of claims.py's pre-trainings by the tasks, without reading data, on one thread."""
    args = claims.options([])
    for data in claims.SETS:
        made = [claims.jobs(args, data, task, 0)[0] for task in degrade.TASKS
                if not claims.absent(data, task)]
        found = in_turn(5, *(make_step(shlex.join(job.argv[1:])) for job in made))
        rounds = [[s * job.right["steps"] for s, job in zip(row, made)] for row in found]
        for job, whole in zip(made, zip(*rounds)):
            report(f"budget, {data}: {job.folder.name.split('-')[1]}", whole, "s")
        report_ratio(f"budget, {data}: largest / smallest", [(min(s), max(s)) for s in rounds])


def compile_():
    """What --compile adds to a step."""
    for label, flags in ((f"{VIT_B}, mask", f"--task mask {NETWORKS[VIT_B]}"),
                         (f"{VIT_B}, zoom_in_mask", f"--task zoom_in_mask {NETWORKS[VIT_B]}"),
                         (f"ViT-B/16 at 224, batch {2 * N}, mask",
                          f"--task mask {NETWORKS[VIT_B]} --batch_size {2 * N} --accum 1"),
                         (f"{RESNET}, a2mim", f"--task a2mim {NETWORKS[RESNET]}"),
                         ("default small model, mask", "--task mask")):
        torch.compiler.reset()  # a second size in a process would be compiled for any size
        plain, fast = (make_step(f"{flags} {more}") for more in ("", "--compile"))
        report(f"{label}: compiling", [seconds(fast, 1)], "s")
        compare(f"{label}, compiled", fast, "as it is / compiled", plain, 5)


PARTS = {part.__name__.strip("_"): part for part in (
    step, a2mim, finetune_, dense, analyze_, profile, degrade_, input_, processes, attention,
    memory, budget, compile_)}

if __name__ == "__main__":
    os.chdir(claims.ROOT)
    chosen = sys.argv[1:] or [*PARTS][:9]
    if not {*chosen} <= {*PARTS}:
        sys.exit(f"bench.py: choose of {', '.join(PARTS)}")
    about = pretrain.provenance() | dict(precision=asked.amp)
    print(about, flush=True)
    threads = torch.get_num_threads()
    for name in chosen:
        torch.set_num_threads(1 if name in ("input", "budget") else threads)
        PARTS[name]()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated()
    report("peak memory", [most / 2 ** 30], "GiB")
    print(json.dumps(about | figures))
