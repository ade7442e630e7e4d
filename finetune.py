"""Fine-tune an encoder end to end with labels, or measure a classifier.

    python finetune.py --weights runs/zoom_in_mask-vit_micro-shapes --labels 100
    python finetune.py --weights none --labels 100                      random weights, to compare
    torchrun --nproc_per_node=8 finetune.py --weights RUN --data /path/to/imagenet
    python finetune.py --weights FINE_TUNED_RUN --eval                  only measure
    python finetune.py --weights RUN --head segment                     a class for every pixel
    torchrun --nproc_per_node=8 finetune.py --weights RUN --head segment --data /path/to/ade20k

--weights is a folder that pretrain.py left (model, sizes and data are then that run's), a file with
timm's, MAE's or torchvision's names, or none. Images are DIR/train/<class>/... and
DIR/val/<class>/..., or a set by name; for --head segment the built-in `scenes`, ten minutes on two
cores, or a folder like ADE20K's. BM sections 4.2, 4.4; A2 sections 5.2, 5.3, A.1, A.3, Table A2.

The last line is JSON, also saved as result.json: top-1 and top-5, or mean IoU and pixel accuracy,
in %, and the images measured.
"""
import functools
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import degrade
import models
import pretrain
from pretrain import (LABELS, check, learning_rate, load_data, not_negative, parameter_groups,
                      positive_int, precision, seeded, share, sum_over_processes)

MIX, DROP = 100, 101  # further streams of random numbers


def main(argv=None):
    # options, processes, data
    args, weights, run = options(argv)
    process = pretrain.set_up(args.device)
    device, on_first, amp = process.device, process.rank == 0, precision(args, process.device)
    if args.head == "segment":
        data, val = pixel_data(args, process)
    else:
        data, val = labelled_data(args, process, not args.eval, run.get("classes"))
    settle(args, process, data)
    evaluate = MEASURES[args.head]

    # the encoder with a fresh head; --eval keeps its head
    torch.manual_seed(args.seed)
    model = with_head(args, weights, data, on_first)
    model = models.to_device(model, device)
    if args.eval:
        return report(args, process, evaluate(model, val, args, process, amp))

    # its optimiser, and where the run stands
    groups = parameter_groups(model, args.weight_decay, layer_scale(model, args.layer_decay))
    optimizer = OPTIMIZERS[args.optimizer](groups, lr=args.peak_lr, betas=tuple(args.betas))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)  # what is saved and loaded
    start, recent = pretrain.begin(args, process, state)
    net = pretrain.parallel(model, args.compile, process)
    if on_first:
        print(pretrain.describe(args, process, data, start), flush=True)

    first_rows, wanted = pretrain.micro_batches(args, process, start)
    views = data.batches(wanted, tuple(args.img_size), args.crop, args.seed, device, args.workers,
                         augmentation(*args.rand_augment, args.random_erasing))
    bar = tqdm(total=args.total, initial=start, unit="step", disable=not on_first, mininterval=1)
    received, result = pretrain.remember_signals(on_first), {}
    if start and start % args.save_every == 0 and not measured(args, start):
        result = evaluate(model, val, args, process, amp)  # a signal came before it
        pretrain.log(args, process, step=start, epoch=start * args.batch_size / len(data), **result)
    clock, timed, waited = time.perf_counter(), 0, 0.0
    for step in range(start, args.total):
        # the learning rate
        lr = learning_rate(step, args.total, args.warmup_steps, args.peak_lr, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # the gradient, in args.accum micro-batches
        loss = 0.0
        for a, row in enumerate(first_rows):
            asked = time.perf_counter()
            view, labels = next(views)  # (k, C, H, W) in [0, 1], (k,) or (k, H, W)
            waited += time.perf_counter() - asked
            drop = None
            if args.drop_path:
                drop = models.drop_path(len(view), model.branches, args.drop_path,
                                        seeded(args.seed, DROP, step),
                                        (row, args.batch_size)).to(device)
            if args.head == "classify":
                labels = F.one_hot(labels, len(data.classes)).float()  # (k, classes)
                view, labels = mix(view, labels, args.mixup, args.cutmix,
                                   np.random.default_rng((args.seed, MIX, step)))
            with net.no_sync() if process.world > 1 and a < args.accum - 1 else nullcontext():
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    scores = net(view, drop)
                micro_loss = LOSSES[args.head](scores, labels, args) / args.accum
                scaler.scale(micro_loss).backward()
            loss = loss + micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = pretrain.clipped_norm(model, args.clip)

        # how all processes stand; what cannot go on stops here, before the weights
        loss, leaving = pretrain.agree(loss, norm, received, step, args, data, process)

        # the step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        recent.append(loss)
        timed, done = timed + 1, step + 1
        speed = timed * args.batch_size / (time.perf_counter() - clock)
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", images_s=f"{speed:.0f}", refresh=False)
        bar.update()

        # log, measure, save, leave
        epoch = done * args.batch_size / len(data)
        if done % args.log_every == 0 or done == args.total:
            pretrain.log(args, process, step=done, epoch=epoch, lr=lr, loss=float(np.mean(recent)),
                         grad_norm=float(norm), images_per_s=round(speed, 1),
                         data_wait=round(waited / (time.perf_counter() - clock), 4))
            recent, clock, timed, waited = [], time.perf_counter(), 0, 0.0
        paused = time.perf_counter()  # what follows is not training
        at_checkpoint = done % args.save_every == 0 or done == args.total
        if at_checkpoint and not leaving:
            result = evaluate(model, val, args, process, amp)
            pretrain.log(args, process, step=done, epoch=epoch, **result)
        if at_checkpoint or leaving:
            pretrain.save(done, args, process, state, recent)
        clock += time.perf_counter() - paused
        if leaving and done < args.total:
            return pretrain.leave(received, process)
    bar.close()
    report(args, process, result or evaluate(model, val, args, process, amp))
    if args.head == "segment":
        pretrain.on_rank_0(lambda: pixel_sheet(model, val, args, device, amp), process)


# --- Recipes and options ---

# The columns of A2's Table A2; BM 4.2's, and where that is silent its code's; a recipe for a CPU.
# lr is per 256 images, rand_augment is strength and deviation, test_crop the central part that is
# measured.
DEIT = dict(img_size=[224], patch_size=16, epochs=100, warmup_share=0.05, batch_size=1024,
            at_once=64, optimizer="adamw", lr=2.5e-4, weight_decay=0.05, betas=[0.9, 0.999],
            clip=5.0, crop=[0.08, 1.0], layer_decay=0.65, drop_path=0.1, smoothing=0.1,
            rand_augment=[9, 0.5], random_erasing=0.0, mixup=0.8, cutmix=1.0, loss="ce",
            pool="mean", test_size=0, test_crop=0.875, schedule="cosine")
RSB_A3 = dict(DEIT, img_size=[160], batch_size=2048, optimizer="lamb", lr=1e-3, weight_decay=0.02,
              clip=0.0, layer_decay=1.0, drop_path=0.0, smoothing=0.0, rand_augment=[6, 0.5],
              mixup=0.1, loss="bce", test_size=224, test_crop=0.95)
PIXELS = dict(DEIT, img_size=[512], batch_size=16, at_once=16, clip=0.0, crop=[0.5, 2.0],
              smoothing=0.0, rand_augment=[0, 0], mixup=0.0, cutmix=0.0, schedule="linear",
              width=512, auxiliary=0.4, num_classes=150)
RECIPES = {
    # BM 4.4, A2 A.3 and its code, ADE20K; lr is absolute at 16 images. 1,500 steps of warm-up.
    "ade_bm": dict(PIXELS, epochs=160000 * 16 / 20210, warmup_share=1500 / 160000, lr=4e-4 * 16,
                   layer_decay=0.75),
    "ade_a2": dict(PIXELS, epochs=100, warmup_share=1500 * 16 / 2021000, lr=4e-4 * 16,
                   relative_positions=True),
    "scenes": dict(PIXELS, img_size=[48], patch_size=4, epochs=4, warmup_share=0.05, lr=8e-3,
                   at_once=32, batch_size=32, width=32, crop=[0.75, 1.5], drop_path=0.0,
                   layer_decay=0.75),
    "bm": dict(DEIT, lr=1e-3, clip=0.0, layer_decay=0.75, random_erasing=0.25, pool="cls"),
    "deit": DEIT, "rsb_a3": RSB_A3,
    # differs from the paper: its Table A2 has lr 1.5e-3. RSB and A2's published configuration have
    # 5e-3 at 2048 images, which is this.
    "rsb_a2": dict(RSB_A3, img_size=[224], epochs=300, warmup_share=5 / 300, lr=6.25e-4,
                   drop_path=0.05, rand_augment=[7, 0.5]),
    "small": dict(DEIT, img_size=[32], patch_size=4, epochs=50, batch_size=64, at_once=256,
                  lr=8e-3, crop=[0.8, 1.0], rand_augment=[0, 0], mixup=0.0, cutmix=0.0,
                  test_crop=1.0),
}


def open_run(weights, chosen, trains=False):
    """What --weights and the other options of first_options settle: what the file of weights holds,
    without its optimiser, or None; its run's configuration, or {}; the defaults of the rest.

    trains: by the recipe. Otherwise the images are shown as the run measured them.
    """
    held = None if weights == "none" else models.read_weights(weights)
    run = (held or {}).get("config") or {}
    (held or {}).pop("optimizer", None)
    head = "classify"
    if hasattr(chosen, "head"):  # --eval: the run's
        head = chosen.head or not trains and run.get("head") or head
    data = chosen.data or run.get("data", "shapes")
    if head == "segment" and not chosen.data and not os.path.isdir(f"{data}/annotations"):
        data = "scenes"
    folder = pretrain.kind_of(data) == "folder"
    model = chosen.model or run.get("model", "vit_base" if folder else "vit_micro")
    maps = not models.MODELS[model].family.tokens
    recipe = getattr(chosen, "recipe", None)
    recipe = recipe or usual_recipe(head, run, data, model, chosen.img_size, trains)
    check(maps or not recipe.startswith("rsb"), f"--recipe {recipe}: {model} is no ResNet")
    check((head == "segment") == ("width" in RECIPES[recipe]), f"--recipe {recipe}: another --head")

    # the recipe, what differs for a network of maps and for a folder, and what the run had
    defaults = {"relative_positions": False, **RECIPES[recipe]}
    defaults.update(model=model, data=data, recipe=recipe, head=head, root="data", only=None,
                    fitted=None)
    if maps:
        defaults.update(layer_decay=1.0, pool="mean", relative_positions=False)
        if recipe in ("small", "scenes"):
            defaults.update(img_size=[64], patch_size=8, drop_path=0.0)
    if folder and recipe == "small":
        defaults.update(img_size=[224], patch_size=16)  # as in pre-training
    taken = ["root", "patch_size"]
    if run.get("head") != "segment":
        taken.append("pool")
    if not trains or recipe == "small" or head == "classify" and not maps:
        taken.append("img_size")  # else it is the recipe's
    if not trains:
        taken += ["test_size", "test_crop", "labels", "seed", "width", "num_classes"]
    if run.get("relative_positions"):
        taken.append("relative_positions")
    if data == run.get("data"):
        taken.append("only")
    defaults.update((name, run[name]) for name in taken if name in run)
    if trains and folder:
        defaults = for_labels(defaults, chosen)
    return held, run, defaults


def usual_recipe(head, run, data, model, img_size, trains):
    """The recipe for what a command line says, if that does not name one."""
    paper = getattr(degrade.TASKS.get(run.get("task")), "paper", "BM")
    if pretrain.is_small(data, model, img_size or run.get("img_size")):
        return "scenes" if head == "segment" else "small"
    if head == "segment":
        return f"ade_{paper.lower()}"
    if trains and not models.MODELS[model].family.tokens:
        return "rsb_a3"
    return "deit" if paper == "A2" else "bm"


def for_labels(defaults, chosen):
    """The recipe for as many labelled images as are trained on."""
    only = tuple(chosen.only or defaults["only"] or ())
    labelled = defaults["head"] == "classify"
    files, _ = pretrain.image_files(pretrain.inner(defaults["data"], "train"), labelled, only)
    images = len(files)
    if chosen.labels:
        images = chosen.labels * len({name.split(b"/")[0] for name in files})
    return pretrain.for_size(defaults, images, chosen.batch_size)


def encoder_options(o, pools=True):
    """What finetune.py, probe.py and analyze.py ask about an encoder. pools: it is of images."""
    o("--patch_size", type=positive_int, help="of a ViT")
    o("--relative_positions", action="store_true", help="a bias in the ViT, learned from zero")
    if pools:
        o("--pool", choices=("cls", "mean"), help="the features of a ViT")
        o("--test_crop", type=share, help="side of the central part of an image that is measured")


def first_options(o):
    """What is read first: it settles the defaults of the others."""
    o("--weights", default="none", metavar="PATH", help="a run's folder, a file, or none")
    o("--data", help="a folder or a set by name; default: that of the weights")
    o("--model", choices=models.MODELS, metavar="MODEL", help="default: that of the weights")
    pretrain.first_options(o)
    o("--labels", type=positive_int, help="keep so many labelled images a class, chosen by --seed")


def options(argv=None):
    """The command line, what the file of --weights holds, its run's configuration."""
    first = pretrain.Parser(add_help=False)
    first_options(first.add_argument)
    first.add_argument("--recipe", choices=RECIPES, help="default: small for small sets, models "
                       "and sizes, rsb_a3 for a ResNet, deit for a run of A2's, bm for any other; "
                       "scenes, ade_a2, ade_bm of --head segment")
    pretrain.batch_option(first.add_argument)
    first.add_argument("--head", choices=LOSSES, help="classify (default): a class for an image; "
                       "segment: for every pixel, and --crop is the image's scale")
    first.add_argument("--eval", action="store_true", help="only measure --weights")
    chosen, _ = first.parse_known_args(argv)
    weights, run, defaults = open_run(chosen.weights, chosen, trains=not chosen.eval)
    p = pretrain.Parser(parents=[first], description=(__doc__ or "").split("\n")[0])
    o = p.add_argument
    encoder_options(o, pools=defaults["head"] == "classify")
    pretrain.training_options(o)
    o("--optimizer", choices=OPTIMIZERS, help="AdamW or LAMB")
    o("--layer_decay", type=share, help="a layer's learning rate over the next one's, a ViT's")
    o("--drop_path", type=share, help="stochastic depth of the last layer")
    o("--schedule", choices=("cosine", "linear"), help="of the learning rate, down to 0")
    if defaults["head"] == "segment":
        o("--width", type=positive_int, help="of UperNet")
        o("--auxiliary", type=not_negative, help="weight of the loss on the third map alone")
        o("--num_classes", type=positive_int, help="of a folder's annotations, at most 255")
    else:
        o("--loss", choices=("ce", "bce"), help="cross-entropy, or binary for each class")
        o("--smoothing", type=share, help="of the labels")
        o("--rand_augment", type=not_negative, nargs=2, help="strength, 0 to 10, and its deviation")
        o("--random_erasing", type=share, help="share of the images with a part of noise")
        o("--mixup", type=not_negative, help="alpha, 0: none")
        o("--cutmix", type=not_negative, help="alpha, 0: none")
        o("--test_size", type=int, help="measure a ResNet at this size; 0: --img_size")
    o("--out", type=pretrain.folder_path, help="None: runs/finetune-WEIGHTS-DATA[-LABELS][-SEED]")
    pretrain.machine_options(o)
    p.set_defaults(**defaults)
    return p.parse_args(argv), weights, run


def run_name(script, args, *more):
    """SCRIPT-WEIGHTS-DATA[-LABELS][-MORE][-SEED], what a run's folder is called after."""
    path = Path(args.weights)
    path = path.parent if path.name == "checkpoint.pt" else path
    stem = path.name if path.is_dir() else path.stem
    if args.weights == "none":
        stem = f"none-{args.model}"
    more = [str(x) for x in (args.labels, *more, args.seed) if x]
    return "-".join([script, stem, Path(args.data).name, *more])


def settle(args, process, data):
    """What follows from the options and the data: the share of each process, the folder."""
    if args.eval:
        args.batch_size, args.accum = process.world, 1  # there are no steps
    tokens = models.MODELS[args.model].family.tokens
    check(tokens or args.layer_decay == 1, "--layer_decay: a ResNet has none")
    pretrain.share_out(args, process, data)
    check(args.head == "classify" or args.eval or args.micro_batch * process.world > 1,
          "--head segment: its batch norm takes two images at once, or more")
    pretrain.settle_folder(args, run_name("eval" if args.eval else "finetune", args))
    check(not args.test_size or not tokens,
          f"--test_size {args.test_size}: a ViT is measured at --img_size")
    odd = args.micro_batch % 2 and (args.mixup or args.cutmix)
    check(args.eval or not odd, f"mixup pairs images, {args.micro_batch} at once are odd: choose "
          "another --batch_size or --accum, or --mixup 0 --cutmix 0")
    args.classes = data.classes


# --- Data, augmentation, loss, optimiser ---

def labelled_data(args, process, trains=True, classes=None):
    """The images to train on, --labels of each class, and those to measure, of no other classes.
    trains False: those to measure twice; classes: of the run that is measured, where known.
    """
    if trains:
        data = load_data(args, process, "train", labelled=True)
        classes = data.classes
    val = load_data(args, process, "val", labelled=True, classes=classes)
    check(classes in (None, val.classes), f"{args.data} has other classes than were trained on")
    found = set(val.labels.tolist())
    absent = [name for i, name in enumerate(val.classes) if i not in found]
    if absent and process.rank == 0:
        print(f"{args.data}/val has no images of {', '.join(absent)}")
    if not trains:
        return val, val
    return few_labels(data, args.labels, args.seed) if args.labels else data, val


def few_labels(data, k, seed):
    """The set of k images of each class."""
    rows = []
    for label, name in enumerate(data.classes):
        of = (data.labels == label).nonzero()[:, 0]
        check(len(of) >= k, f"--labels {k}: class {name} has only {len(of)} images")
        rows.append(of[torch.randperm(len(of), generator=seeded(seed, LABELS, label))[:k]])
    return data.keep(torch.cat(rows).sort().values)


class PixelSet(pretrain.FolderSet):
    """Images with a class for every pixel, which goes with them as a fourth channel. 255: it is not
    labelled. Of `scenes`, or of a folder in ADE20K's layout: DIR/images/{training,validation}/...
    and DIR/annotations/{training,validation}/...png, of 1 and on, 0 not labelled.
    """
    planes = 4

    def __init__(self, data, train, classes):
        self.scenes = None
        if data == "scenes":
            self.scenes = pretrain.built_in_scenes(train)
            n = len(self.scenes.kinds)
            self.names, self.bad, self.found = np.arange(n), {}, f"{n:,} scenes"
            self.classes = ["ground", *pretrain.SHAPES]
            self.labels = torch.zeros(n)
        else:
            split = "training" if train else "validation"
            super().__init__(os.path.join(data, "images", split))
            self.annotations = os.path.join(data, "annotations", split)
            absent = [x for x in map(self.annotation, range(len(self))) if not x.exists()]
            check(not absent, f"{len(absent)} images have no annotation, such as {absent[:1]}")
            self.classes = [str(i) for i in range(1, classes + 1)]

    def annotation(self, index):
        return Path(self.annotations, os.fsdecode(self.names[index])).with_suffix(".png")

    def path(self, index):
        return f"scene {index}" if self.scenes else super().path(index)

    def read(self, index):
        """(4, H, W) uint8."""
        if self.scenes:
            image = self.scenes.drawn(torch.tensor([index]))[0]
            kinds = F.pad(self.scenes.kinds[index] + 1, (1, 0)).to(torch.uint8)
            return torch.cat([image[:3], kinds[image[3:].long()]])
        image, path = super().read(index), self.annotation(index)
        with Image.open(self.path(index)) as picture:
            if picture.getexif().get(0x0112, 1) != 1:
                raise ValueError("EXIF turns it, and not its annotation: save it upright")
        with Image.open(path) as picture:
            labels = torch.from_numpy(np.array(picture).astype(np.int64))
        if labels.shape != image.shape[1:] or labels.max() > len(self.classes):
            raise ValueError(f"{path} is {tuple(labels.shape)} of 0 .. {labels.max()}, for an "
                             f"image of {tuple(image.shape[1:])} and {len(self.classes)} classes")
        return torch.cat([image, labels[None].to(torch.uint8) - 1])  # of 0, 255

    def view(self, image, index, epoch, size, scale, seed):
        """Scaled at random, where its short side at 1 is the view's; cropped, flipped."""
        u = torch.rand(4, generator=seeded(seed, pretrain.CROP, epoch, index)).tolist()
        image = resized(image[None], (scale[0] + (scale[1] - scale[0]) * u[0]) * min(size))[0]
        H, W = (max(n, m) for n, m in zip(image.shape[1:], size))
        padding = [0, W - image.shape[2], 0, H - image.shape[1]]
        image = torch.cat([F.pad(image[:3], padding), F.pad(image[3:], padding, value=255)])
        top, left = int(u[1] * (H - size[0] + 1)), int(u[2] * (W - size[1] + 1))
        image = image[:, top:top + size[0], left:left + size[1]]
        return image.flip(2) if u[3] < 0.5 else image

    def batches(self, *args, **more):
        """As MemorySet.batches, with the classes (k, H, W) for labels."""
        for view, _ in super().batches(*args, **more):
            yield view[:, :3], (view[:, 3] * 255).round().long()

    def whole(self, rows, at_once=16):
        """The images of these rows that can be read, as they are, (k, 4, H, W) of one size."""
        images = []
        for index in rows:
            try:
                image = self.read(index)
            except Exception as error:
                self.skip(f"{self.path(index)}: {error}", -1)
                continue
            if images and (len(images) == at_once or image.shape != images[0].shape):
                yield torch.stack(images)
                images = []
            images.append(image)
        if images:
            yield torch.stack(images)


def resized(images, short):
    """Images with their classes (k, 4, H, W) uint8, their short side as given."""
    size = [max(1, round(side * short / min(images.shape[2:]))) for side in images.shape[2:]]
    pixels = F.interpolate(images[:, :3], size, mode="bilinear", antialias=True)
    return torch.cat([pixels, F.interpolate(images[:, 3:], size, mode="nearest-exact")], dim=1)


def pixel_data(args, process):
    """The images to train on, and those to measure."""
    check(not args.labels and not args.only, "--labels, --classes: not of --head segment")
    check(args.data == "scenes" or os.path.isdir(f"{args.data}/annotations"), f"--head segment: "
          f"{args.data} is not scenes, nor a folder with images/ and annotations/")
    check(args.num_classes < 256, f"--num_classes {args.num_classes}: at most 255")
    sets = [PixelSet(args.data, train, args.num_classes) for train in (True, False)]
    for data in sets:
        pretrain.same_copies(data, args.data, process)
    return sets


def augmentation(magnitude, deviation, erasing):
    """augmented() at these strengths, as `batches` takes it, or None."""
    if magnitude or erasing:
        return functools.partial(augmented, magnitude=magnitude, deviation=deviation,
                                 erasing=erasing)


def augmented(image, generator, magnitude, deviation, erasing):
    """RandAugment of a (C, H, W) uint8 image as timm's, which Table A2's (9, 0.5) means: twice,
    each time with probability 1/2, one operation at a strength of N(magnitude, deviation) of 10.
    Then, with probability `erasing`, a rectangle of noise (random erasing, A2 3.1).
    """
    for _ in range(2 if magnitude else 0):
        strength = magnitude + deviation * float(torch.randn((), generator=generator))
        used = torch.rand((), generator=generator) < 0.5
        seed = int(torch.randint(2 ** 62, (), generator=generator))
        if used:
            policy = v2.RandAugment(1, round(10 * min(max(strength, 0), 10)), 101,
                                    v2.InterpolationMode.BILINEAR, [128] * len(image))
            with torch.random.fork_rng(devices=[]):  # torchvision's numbers are global
                torch.manual_seed(seed)
                image = policy(image)
    if erasing and torch.rand((), generator=generator) < erasing:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)))
            z = v2.RandomErasing(1, value="random")((image / 255 - 0.45) / 0.225)
        image = ((0.45 + 0.225 * z).clamp(0, 1) * 255).round().to(torch.uint8)
    return image


def mix(images, targets, mixup, cutmix, rng):
    """Mixup or cutmix, by turns if both alphas are above 0. An image is mixed with its neighbour,
    and rng is the same in all processes, so nothing depends on how a batch is split.
    """
    if not mixup and not cutmix:
        return images, targets
    boxed = not mixup or (cutmix > 0 and rng.random() < 0.5)
    alpha = cutmix if boxed else mixup
    own = rng.beta(alpha, alpha)  # the share of the image itself
    other = torch.arange(len(images), device=images.device) ^ 1
    if boxed:
        (H, W), (y, x), half = images.shape[2:], rng.random(2), (1 - own) ** 0.5 / 2
        top, bottom = (min(max(round((y + side) * H), 0), H) for side in (-half, half))
        left, right = (min(max(round((x + side) * W), 0), W) for side in (-half, half))
        own = 1 - (bottom - top) * (right - left) / (H * W)
        images = images.clone()
        images[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    else:
        images = own * images + (1 - own) * images[other]
    return images, own * targets + (1 - own) * targets[other]


def class_loss(scores, targets, args):
    """Cross-entropy; or RSB's binary one: a class of more than a fifth of the image is there."""
    if args.loss == "bce":
        return F.binary_cross_entropy_with_logits(scores.float(), (targets > 0.2).float())
    return F.cross_entropy(scores.float(), targets, label_smoothing=args.smoothing)


def pixel_loss(scores, labels, args):
    """Cross-entropy over all pixels, those without a label count 0, and --auxiliary times that of
    the auxiliary scores.
    """
    main, auxiliary = (F.cross_entropy(x, labels, ignore_index=255, reduction="none").mean()
                       for x in scores)
    return main + args.auxiliary * auxiliary


LOSSES = {"classify": class_loss, "segment": pixel_loss}


def with_head(args, weights, data, says):
    """The encoder with its weights and a fresh head. --eval: with its own."""
    dense = args.head == "segment"
    model = encoder = models.encoder(args.model, args.img_size, args.patch_size, data.channels,
                                     0 if dense else len(data.classes), args.relative_positions,
                                     args.pool)
    if model.tokens:
        model.pos_embed.requires_grad_(True)  # differs from the authors' code: BM's are constants
    if dense:
        model = models.UperNet(encoder, len(data.classes), args.width)
    elif model.tokens:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # near 0, as MAE's
    missing = f"--eval: {args.weights} has no head for {len(data.classes)} classes: give a " \
              "fine-tuned run, and the --data it was made for"
    if dense and args.eval:
        check(weights and weights.get("config", {}).get("head") == "segment", missing)
        models.load_weights(encoder, weights)
        rest = {k: x for k, x in weights["model"].items() if "pyramid.encoder." not in k}
        own = model.state_dict()
        check(all(k in own and own[k].shape == x.shape for k, x in rest.items()), missing)
        model.load_state_dict(rest, strict=False)
    elif weights is not None:
        loaded = models.load_weights(encoder, weights, head=args.eval)
        check(not (args.eval and loaded.missing), missing)
        if says:
            print(loaded)
    return model


def layer_scale(model, decay):
    """name -> decay^(L + 1 - l): l: 0 for the embeddings, 1 .. L for blocks, L + 1 the rest."""
    def scale(name):
        encoder = getattr(getattr(model, "pyramid", None), "encoder", model)
        name = name.removeprefix("pyramid.encoder.")
        after = len(encoder.blocks) + 1
        if name.startswith("blocks."):
            return decay ** (after - int(name.split(".")[1]) - 1)
        return decay ** after if name.startswith(("cls_token", "pos_", "patch_")) else 1.0
    return scale if decay != 1 else lambda name: 1.0


class LAMB(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2): u = m / (sqrt(v) + eps) + weight_decay w, then
    w <- w - lr |w| / |u| u. Parameters without weight decay keep the ratio 1, as in RSB's code.
    """

    def __init__(self, groups, lr, betas, eps=1e-6):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                state = self.state[w]
                if not state:
                    state.update(t=0, m=torch.zeros_like(w), v=torch.zeros_like(w))
                state["t"] += 1
                m = state["m"].lerp_(w.grad, 1 - beta1)
                v = state["v"].mul_(beta2).addcmul_(w.grad, w.grad, value=1 - beta2)
                m, v = m / (1 - beta1 ** state["t"]), v / (1 - beta2 ** state["t"])
                u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * w
                ratio = 1.0
                if group["weight_decay"]:
                    of_w, of_u = w.norm(), u.norm()
                    ratio = torch.where((of_w > 0) & (of_u > 0), of_w / of_u, 1.0)
                w.sub_(group["lr"] * ratio * u)


OPTIMIZERS = {"adamw": functools.partial(torch.optim.AdamW, fused=True), "lamb": LAMB}


# --- What is measured ---

@torch.no_grad()
def evaluate_pixels(model, data, args, process, amp):
    """Mean IoU and pixel accuracy in %, over every labelled pixel of all images at their own size.
    A class that is neither there nor found is left out of the mean.
    """
    n, read, mine = len(data.classes), 0, range(process.rank, len(data), process.world)
    confusion = torch.zeros(n * n, dtype=torch.float64)
    model.eval()
    for images in data.whole(mine):
        found, labels = classes_of(model, images, args, process.device, amp), images[:, 3].long()
        pairs = (labels * n + found)[labels != 255]
        confusion += torch.bincount(pairs, minlength=n * n)
        read += len(images)
    model.train()
    *confusion, read = sum_over_processes([*confusion.tolist(), read], process)
    pretrain.refuse_bad(data, len(data) - read, process)
    if not sum(confusion):
        raise pretrain.Failed("no pixel of the images to measure is labelled")
    return dict(**iou(torch.tensor(confusion).view(n, n)), images=int(read))


def iou(confusion):
    """Mean IoU and pixel accuracy, in %, of a table (truth, found) of pixels."""
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    return dict(miou=round(100 * (right / union)[union > 0].mean().item(), 2),
                pixel_accuracy=round(100 * (right.sum() / confusion.sum()).item(), 2))


def classes_of(model, images, args, device, amp):
    """The class found for each pixel of images (k, 4, H, W): (k, H, W). Their short side is shown
    at --img_size.
    """
    view = resized(images, min(args.img_size))[:, :3].to(device).float() / 255
    with torch.autocast(device.type, amp, enabled=amp is not None):
        scores = model(view).float()
    scores = F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)
    return scores.argmax(1).cpu()


@torch.no_grad()
def pixel_sheet(model, data, args, device, amp, count=8):
    """found.png in --out: images, their classes, and those that are found."""
    colors = torch.rand(256, 3, generator=seeded(7))
    model.eval()
    rows = []
    for images in data.whole(range(min(count, len(data))), at_once=1):
        found = classes_of(model, images, args, device, amp)
        maps = [colors[x.long()].permute(0, 3, 1, 2) for x in (images[:, 3], found)]
        square = [degrade.center_crop(x, min(x.shape[2:])) for x in (images[:, :3] / 255, *maps)]
        rows.append([F.interpolate(x, (192, 192), mode="nearest-exact") for x in square])
    if not rows:
        return
    columns = [torch.cat(column) for column in zip(*rows)]
    half = [column[i::2] for i in (0, 1) for column in columns]
    page = degrade.sheet(half, ["image", "classes", "found"] * 2)
    pretrain.write_whole(args.out / "found.png", lambda file: page.save(file, "PNG"))


@torch.no_grad()
def evaluate(model, data, args, process, amp):
    """Top-1 and top-5 in % over all images, each counted once however many processes share them."""
    size = [args.test_size] * 2 if args.test_size else args.img_size
    rows, first, fifth, seen = torch.arange(len(data))[process.rank::process.world], 0, 0, 0
    model.eval()
    for views, labels in data.plain(rows, 256, size, process.device, args.workers, args.test_crop):
        with torch.autocast(process.device.type, amp, enabled=amp is not None):
            scores = model(views).float()
        hit = scores.topk(min(5, len(data.classes))).indices == labels[:, None]
        first, fifth = first + hit[:, 0].sum().item(), fifth + hit.sum().item()
        seen += len(labels)
    model.train()
    first, fifth, seen = sum_over_processes([first, fifth, seen], process)
    pretrain.refuse_bad(data, len(data) - seen, process)
    return dict(top1=round(100 * first / seen, 2), top5=round(100 * fifth / seen, 2),
                images=int(seen))


def measured(args, step):
    """Whether log.jsonl has what was measured at this step."""
    lines = (args.out / "log.jsonl").read_text().splitlines()
    return any('"images":' in line and json.loads(line)["step"] == step for line in lines)


MEASURES = {"classify": evaluate, "segment": evaluate_pixels}


def report(args, process, result):
    """result.json in --out, also printed."""
    line = json.dumps(dict(model=args.model, data=args.data, labels=args.labels, seed=args.seed,
                           weights=args.weights, steps=None if args.eval else args.total,
                           **result))

    def write():
        args.out.mkdir(parents=True, exist_ok=True)
        pretrain.write_text(args.out / "result.json", line)
        print(line)
    pretrain.on_rank_0(write, process)


if __name__ == "__main__":
    sys.exit(pretrain.command(main))
