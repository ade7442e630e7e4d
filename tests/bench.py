"""How fast is it? Images per second, and as a share of the matrix-product peak measured in the same run.

    python tests/bench.py                most of it, about twenty minutes on 2 CPU cores
    python tests/bench.py step profile   only these: step a2mim finetune analyze profile degrade input processes attention
                                         memory budget compile

Every figure is the median of several timed repetitions after warm-up, its spread (lowest - highest) beside it.
FLOPs of a training step: three times the forward pass (forward, gradient of inputs, gradient of weights), of which
torch's counter counts the matrix products, two FLOPs a multiply-add. For T tokens of width D a block's forward
takes 24 T D^2 + 4 T^2 D, a patch projection 2 N p p C D. The last line is one JSON object with every figure.
"""
import glob
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import analyze
import degrade
import finetune
import losses
import models
import pretrain
import table1

place = pretrain.set_up()
device, figures = place.device, {}
amp = pretrain.precision("auto", device)


def clock(work, repeat, warm_up=1):
    """Seconds of each of `repeat` calls, after warm-up."""
    times = []
    for i in range(warm_up + repeat):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[warm_up:]


def report(name, values, unit, note=""):
    middle = statistics.median(values)
    figures[name] = dict(median=round(middle, 4), low=round(min(values), 4), high=round(max(values), 4), unit=unit,
                         **({"note": note} if note else {}))
    print(f"{name:44} {middle:10.3f} {unit}  ({min(values):.3f} - {max(values):.3f}) {note}", flush=True)
    return middle


def peak(dtype, n=2048):
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return [2 * n ** 3 / s / 1e9 for s in clock(lambda: a @ b, 15, 3)]


def make_step(*flags, compiled=False, channels_last=True):
    """The core of pretrain.train on one batch of random views, as the command line `flags` settle it -> the step, its
    images, and the FLOPs it takes an image.
    """
    c = pretrain.resolve(pretrain.options().parse_args(list(flags)), place, 10 ** 6, 3)
    S, patch, batch = tuple(c["img_size"]), c["patch_size"], c["batch_size"]
    model = pretrain.build(c)
    model = models.to_device(model, device) if channels_last else model.to(device)
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(model, 0.05), lr=1e-4, betas=tuple(c["betas"]), fused=True)
    view = torch.rand(batch, 3, *c["view"], device=device)
    few = degrade.degrade(view[:2], c["task"], S, patch, pretrain.seeded(0), **c["settings"])
    forward = models.flops(model, few.inputs, few.hidden) / 2
    if compiled:
        model.compile()

    def step():
        d = degrade.degrade(view, c["task"], S, patch, pretrain.seeded(1), **c["settings"])
        with torch.autocast(device.type, *pretrain.AUTOCAST[amp]):
            prediction = model(d.inputs, d.hidden)
        losses.recovery_loss(prediction, model.normalize(d.target), S, patch, d.counted, **pretrain.the_loss(c)).backward()
        if c["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, batch, 3 * forward


def paper(model, *flags):
    """A model at the paper's size, batch 32: the flags of make_step."""
    return "--data", "/a/folder", "--model", model, "--batch_size", "32", *flags


def compare(label, ours, other, what, repeat, key=None):
    """Two steps and the peak, measured in turn so that a slow minute hits all alike."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    (one, batch, flop), (two, _, _) = ours, other
    seconds, slower, shares, peaks = [], [], [], []
    for i in range(repeat + 1):
        top, a, b = statistics.median(peak(dtype)), clock(one, 1, 0)[0], clock(two, 1, 0)[0]
        if i:
            seconds.append(a), slower.append(b / a), shares.append(flop * batch / a / 1e9 / top), peaks.append(top)
    report(f"{label}: peak {amp}", peaks, "GFLOP/s")
    report(f"{label}", [batch / s for s in seconds], "images/s", f"{flop / 1e9:.2f} GFLOPs an image")
    report(f"{label}: share of peak", shares, "")
    report(f"{label}: {what}", slower, "")
    if key:
        figures.setdefault("_step_seconds", {})[key] = statistics.median(seconds) / batch


def step():
    """Training steps of Beyond Masking against the peak."""
    report("peak float32, GFLOP/s", peak(torch.float32), "GFLOP/s")
    for label, flags, repeats, key in (("ViT-B/16 at 224, batch 32", paper("vit_base"), 15, "vit_base"),
                                       ("default small model, batch 256", (), 30, None)):
        mask, joined = (make_step(*flags, "--task", task) for task in ("mask", "zoom_in_mask"))
        compare(f"{label}, mask", mask, joined, "zoom_in_mask / mask, time", repeats, key)


def a2mim():
    """Training steps of A2MIM against the peak, and what the frequency loss adds to them."""
    for label, flags in (("ViT-S/16 at 224, batch 32", paper("vit_small")),
                         ("ResNet-50 at 224, batch 32", paper("resnet50")),
                         ("small ViT, 32 px, batch 256", ("--model", "vit_micro")),
                         ("ResNet-18, 64 px, batch 256", ("--model", "resnet18"))):
        task = ("--task", "a2mim", "--freq_weight")
        without, with_it = (make_step(*flags, *task, weight) for weight in ("0", "0.5"))
        compare(f"{label}, a2mim without frequency loss", without, with_it, "with / without, time", 9)
        B, C, side = (32, 3, 224) if "224" in label else (256, 3, 64 if "64" in label else 32)
        x, y = (torch.rand(B, C, side, side, device=device, requires_grad=r) for r in (True, False))
        hidden = torch.rand(B, 1, side, side, device=device) < 0.6
        whole = clock(make_step(*flags, *task, "0.5")[0], 3)
        alone = clock(lambda: losses.focal_frequency(x, y, hidden).backward(), 9, 2)
        report(f"{label}: frequency loss alone / step", [t / statistics.median(whole) for t in alone], "")


def finetuning():
    """Fine-tuning steps by the papers' recipes against the peak, features of a frozen encoder, RandAugment."""
    for label, flags in (("ViT-B/16, deit, batch 32", paper("vit_base")),
                         ("ResNet-50, rsb_a3 at 160, batch 32", paper("resnet50")),
                         ("small ViT, 32 px, batch 64", ("--data", "shapes", "--model", "vit_micro"))):
        batch, classes = (64, 10) if "64" in label else (32, 1000)
        nothing = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        data = pretrain.MemorySet(nothing, None, device, [str(i) for i in range(classes)])
        c = finetune.resolve(finetune.options().parse_args(list(flags)), place, data, 1000)
        model = finetune.load_model(dict(c, channels=3), None, place, len(data.classes))[0]
        optimizer = finetune.optimizer_of(c, model)
        prepare, loss_of = finetune.step_of(c, model, len(data.classes), device)
        view, labels = torch.rand(batch, 3, *c["img_size"], device=device), torch.zeros(batch, dtype=torch.long, device=device)

        def train():
            loss_of(model, prepare(view, labels, 0, (0, batch))).backward()
            if c["clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), c["clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def features():
            with torch.no_grad(), torch.autocast(device.type, *pretrain.AUTOCAST[amp]):
                model.pooled(model.encode(view))
        forward = models.flops(model, view[:2]) / 2
        compare(f"fine-tuning: {label}", (train, batch, 3 * forward), (features, batch, forward),
                "frozen features / step, time", 7)
    picture = (torch.rand(3, 224, 224) * 255).byte()
    seconds = clock(lambda: [finetune.rand_augment(picture, pretrain.seeded(i), 9, 0.5) for i in range(20)], 5)
    report("RandAugment at 224, one image at a time", [20 / s for s in seconds], "images/s")


def analyses():
    """Forward passes of the interactions against the peak, lower precision beside float32; the passes of the feature maps."""
    for label, name, size, p in (("ViT-S/16 at 224", "vit_small", 224, 16), ("ResNet-50 at 224", "resnet50", 224, 16),
                                 ("small ViT, 32 px", "vit_micro", 32, 4)):
        model = models.to_device(models.encoder(name, size, p, num_classes=10, pool="mean").eval(), device)
        image, base = torch.rand(1, 3, size, size, device=device), torch.full((3,), 0.5, device=device)
        n, label_of = (size // p) ** 2, torch.zeros(1, dtype=torch.long, device=device)
        pairs, contexts = analyze.near_pairs((size // p, size // p))[:2 if size > 32 else 8], 10 if size > 32 else 60
        passes, forward = len(pairs) * 4 * (2 + contexts), models.flops(model, image)  # orders 0 and n - 2 have one context

        def interactions(precision):
            with torch.inference_mode():
                f = analyze.game(analyze.scored(model, precision, device), image, label_of, p, base)
                analyze.interactions(f, n, pairs, [0, n // 2, n - 2], contexts, pretrain.seeded(0))
        low, full = ((lambda precision=precision: interactions(precision), passes, forward) for precision in (amp, "off"))
        compare(f"interaction: {label}", low, full, f"float32 / {amp}, time", 5)
        views = torch.rand(16 if size > 32 else 64, 3, size, size, device=device)

        def maps(look):
            with torch.inference_mode(), torch.autocast(device.type, *pretrain.AUTOCAST[amp]):
                analyze.feature_maps(model, views, look)
        spectrum, spread = ((lambda look=look: maps(look), len(views), forward)
                            for look in (analyze.log_amplitude, analyze.spatial_variance))
        compare(f"fourier: {label}", spectrum, spread, "variance / fourier, time", 5)


def memory_format():
    """Channels-last against contiguous memory: what models.to_device's choice rests on."""
    for label, flags in (("ResNet-50 at 224, batch 32", paper("resnet50")),
                         ("ResNet-18, 64 px, batch 256", ("--model", "resnet18"))):
        last, first = (make_step("--task", "a2mim", *flags, channels_last=on)[0] for on in (True, False))
        clock(last, 1), clock(first, 1)
        ratios = [clock(first, 1, 0)[0] / clock(last, 1, 0)[0] for _ in range(5)]
        report(f"{label}: contiguous / channels-last, time", ratios, "x")


def profile():
    """What a step of ViT-B/16 spends its time on."""
    from torch.profiler import ProfilerActivity, profile
    work, _, _ = make_step(*paper("vit_base", "--task", "mask"))
    work()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        work()
    groups = {"matrix products": ("mm", "addmm", "bmm", "linear", "convolution"), "casts and copies": ("copy_", "cat", "clone"),
              "softmax": ("softmax",), "layer norm": ("layer_norm",), "GELU": ("gelu",), "optimiser": ("fused_adamw",)}
    events = [(e.key, e.self_cpu_time_total) for e in p.key_averages()]
    whole, rest = sum(t for _, t in events), 1.0
    for group, keys in groups.items():
        share = sum(t for name, t in events if any(k in name.lower() for k in keys)) / whole
        rest -= share
        report(f"ViT-B/16 step: {group}", [share], "of the time")
    report("ViT-B/16 step: the rest", [rest], "of the time")


def degradations():
    """Each task at 224 px, batch 64: images/s, and its share of a ViT-B/16 step where that was measured."""
    base = figures.get("_step_seconds", {}).get("vit_base")
    for task in degrade.TASKS:
        view = torch.rand(64, 3, *degrade.view_size(task, 224), device=device)
        seconds = clock(lambda: degrade.degrade(view, task, 224, 16, pretrain.seeded(0)), 7, 2)
        note = f"{statistics.median(seconds) / 64 / base:.1%} of a ViT-B/16 step" if base else ""
        report(f"degrade {task}, 224 px, batch 64", [64 / s for s in seconds], "images/s", note)


def input_pipeline():
    """JPEGs of 500 x 375 to uint8 views, on one thread, beside the usual torchvision pipeline on Pillow images."""
    from PIL import Image
    from torchvision import datasets, transforms
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/class")
        made = pretrain.shapes(200, seed=1).images.float()
        for i in range(0, 200):                                 # soft noise brings the files to the size of photographs
            picture = F.interpolate(made[i:i + 1] + 25 * torch.randn(1, 3, 48, 48), (375, 500), mode="bicubic")
            picture += 4 * torch.randn(1, 3, 375, 500)
            Image.fromarray(picture[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(f"{folder}/class/{i}.jpg", quality=90)
        size = statistics.mean(os.path.getsize(f) for f in glob.glob(f"{folder}/class/*"))
        usual = datasets.ImageFolder(folder, transforms.Compose([
            transforms.RandomResizedCrop(224, (0.2, 1), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(models.IMAGENET_MEAN, models.IMAGENET_STD)]))
        ours = pretrain.FolderSet(folder)
        a, b = [], []
        for _ in range(6):
            a += clock(lambda: [ours.view((0, i), (224, 224), (0.2, 1.0), 0) for i in range(200)], 1, 0)
            b += clock(lambda: [usual[i] for i in range(200)], 1, 0)
        report("input: files to views, one thread", [200 / s for s in a[1:]], "images/s", f"JPEG, 500x375, {size / 1e3:.0f} kB")
        report("input: the usual pipeline", [200 / s for s in b[1:]], "images/s")
        report("input: ours / usual", [y / x for x, y in zip(a[1:], b[1:])], "x")
    torch.set_num_threads(threads)


def processes():
    """The default run on two processes against one with two threads, in turn; and how long it waits for data."""
    speeds = {1: [], 2: []}
    waits = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(3):
            for n in speeds:
                torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
                start = [sys.executable, *(torchrun if n > 1 else [])]
                out = f"{folder}/{turn}-{n}"
                subprocess.run([*start, "pretrain.py", "--task", "zoom_in_mask", "--steps", "120", "--out", out], check=True,
                               cwd=Path(pretrain.__file__).parent, capture_output=True)
                lines = [json.loads(line) for line in open(f"{out}/log.jsonl")][1:]
                speeds[n].append(statistics.median(line["images_per_s"] for line in lines))
                waits += [line["data_wait"] for line in lines]
    report("default run, one process, two threads", speeds[1], "images/s")
    report("default run, two processes", speeds[2], "images/s")
    report("default run, two processes / one", [b / a for a, b in zip(speeds[1], speeds[2])], "x")
    report("default run: share of time waiting for data", waits, "")


def attention():
    """Written-out attention against the fused kernel: what models.attend's choice rests on."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    written = lambda q, k, v: (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3) @ v
    for batch, heads, tokens, d in ((256, 4, 17, 32), (256, 2, 65, 32), (8, 12, 50, 64), (32, 12, 50, 64), (128, 12, 50, 64),
                                    (8, 6, 197, 64), (32, 6, 197, 64), (64, 6, 197, 64), (64, 12, 197, 64)):
        q = torch.randn(3, batch, heads, tokens, d, device=device, dtype=dtype, requires_grad=True)
        ratio = []
        for _ in range(5):
            a, b = (statistics.median(clock(lambda: f(*q).sum().backward(), 3))
                    for f in (written, F.scaled_dot_product_attention))
            ratio.append(b / a)
        report(f"attention {batch} x {heads} heads x {tokens} x {d}: fused / written, time", ratio, "")


def budget():
    """The budget of tests/table1.py: how long the steps of each task take on one thread, in turn, without reading data."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for data in table1.DATA:
        args = table1.options().parse_args(["--data", data, "--seeds", "1", "--out", "x"])
        made = {task: table1.jobs(args, task, 0)[0] for task, _ in table1.encoders(args) if task != "none"}
        steps = {task: make_step(*job.argv[1:])[0] for task, job in made.items()}
        rounds = [{task: clock(step, 1, 0)[0] * made[task].steps for task, step in steps.items()} for _ in range(6)][1:]
        for task in made:
            report(f"budget, {data}: {task}", [seconds[task] for seconds in rounds], "s")
        report(f"budget, {data}: largest / smallest", [max(s.values()) / min(s.values()) for s in rounds], "x")
    torch.set_num_threads(threads)


def compiled():
    """What --compile adds to a ViT-B/16 step."""
    (plain, _, _), start = make_step(*paper("vit_base", "--task", "mask")), time.perf_counter()
    fast, _, _ = make_step(*paper("vit_base", "--task", "mask"), compiled=True)
    fast()
    report("ViT-B/16: compiling", [time.perf_counter() - start], "s")
    plain()
    report("ViT-B/16: --compile, speed", [clock(plain, 1, 0)[0] / clock(fast, 1, 0)[0] for _ in range(5)], "x")


PARTS = dict(step=step, a2mim=a2mim, finetune=finetuning, analyze=analyses, profile=profile, degrade=degradations,
             input=input_pipeline, processes=processes, attention=attention, memory=memory_format, budget=budget,
             compile=compiled)

if __name__ == "__main__":
    chosen = sys.argv[1:] or [name for name in PARTS if name not in ("attention", "memory", "budget", "compile")]
    if unknown := [name for name in chosen if name not in PARTS]:
        sys.exit(f"bench.py: no part '{unknown[0]}': choose of {', '.join(PARTS)}")
    hardware = f"{pretrain.hardware()}, {platform.machine()}"
    print(f"torch {torch.__version__}, {hardware}, {torch.get_num_threads()} threads, precision {amp}", flush=True)
    for name in chosen:
        PARTS[name]()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2 ** 30
    report("peak memory", [memory], "GiB")
    figures.pop("_step_seconds", None)
    print(json.dumps(dict(torch=torch.__version__, hardware=hardware, precision=amp, **figures)))
