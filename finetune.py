"""Fine-tune an encoder end to end with labels, or measure a classifier.

    python finetune.py --weights runs/zoom_in_mask-vit_micro-shapes --labels 100
    python finetune.py --weights none --labels 100                      random weights, to compare
    torchrun --nproc_per_node=8 finetune.py --weights RUN --data /path/to/imagenet
    python finetune.py --weights FINE_TUNED_RUN --eval                  only measure
    python finetune.py --weights RUN --head segment                     a class for every pixel
    python finetune.py --weights RUN --head detect                      boxes and masks of objects
    torchrun --nproc_per_node=8 finetune.py --weights RUN --head detect --data /path/to/coco

--weights is a folder that pretrain.py left (model, sizes and data are then that run's), a file with
timm's, MAE's or torchvision's names, or none. Images are DIR/train/<class>/... and
DIR/val/<class>/..., or a set by name; for --head segment and detect the built-in `scenes`, some ten
minutes on two cores, or a folder like ADE20K's or COCO's. BM sections 4.2, 4.4; A2 sections 5.2,
5.3, A.1 to A.3, Table A2.

The last line is JSON, also saved as result.json: top-1 and top-5; mean IoU and pixel accuracy; or
COCO's AP of boxes and masks; in %, and the images measured.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pretrain  # before torch, whose threads it sets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import ops, utils
from torchvision.transforms import v2
from tqdm import tqdm

import degrade
import models
from pretrain import (LABELS, check, due, learning_rate, load_data, not_negative,
                      parameter_groups, positive_int, precision, seeded, share, sum_over_processes)

MIX, DROP, SAMPLE = range(100, 103)  # further streams of random numbers


def main(argv=None):
    # options, processes, data
    args, weights, run = options(argv)
    process = pretrain.set_up(args.device)
    device = process.device
    on_first = process.rank == 0
    amp = precision(args, device)
    read = labelled_data if args.head == "classify" else annotated_data
    data, val = read(args, process, not args.eval, run.get("classes"))
    settle(args, process, data)
    measure = MEASURES[args.head]

    # the encoder with a fresh head; --eval keeps its head
    torch.manual_seed(args.seed)
    model = with_head(args, weights, data, on_first)
    model = models.to_device(model, device)
    if args.eval:
        return report(args, process, measure(model, val, args, process, amp))

    # its optimiser, and where the run stands
    groups = parameter_groups(model, args.weight_decay, layer_scale(model, args.layer_decay))
    optimizer = OPTIMIZERS[args.optimizer](groups, lr=args.peak_lr, betas=tuple(args.betas))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = dict(model=model, optimizer=optimizer, scaler=scaler)  # what is saved and loaded
    start, recent = pretrain.begin(args, process, state)
    # `model` itself, which is measured on other sizes, is not compiled
    net = torch.compile(model, mode=pretrain.compile_mode(args), disable=not args.compile)
    if process.world > 1:
        net = nn.parallel.DistributedDataParallel(net)
    if on_first:
        print(pretrain.describe(args, process, data, model, start), flush=True)

    first_rows, wanted = pretrain.micro_batches(args, process, start)
    views = data.batches(wanted, tuple(args.img_size), args.crop, args.seed, device, args.workers,
                         augmentation(*args.rand_augment, args.random_erasing))
    bar = tqdm(total=args.total, initial=start, unit="step", disable=not on_first, mininterval=1)
    received = pretrain.remember_signals(on_first)
    result = {}
    if start and due(start, args.save_every, args) and not measured(args, start):
        result = measure(model, val, args, process, amp)  # a signal came before it
        pretrain.log(args, process, step=start, epoch=start * args.batch_size / len(data), **result)
    clock = time.perf_counter()
    timed = 0  # steps since `clock`
    waited = 0.0  # seconds waited for data
    unread = []  # losses and norms, still on the device
    for step in range(start, args.total):
        # the learning rate
        lr = learning_rate(step, args.total, args.warmup_steps, args.peak_lr, args.schedule,
                           args.drops)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # the gradient, in args.accum micro-batches
        loss = 0.0
        for a, row in enumerate(first_rows):
            asked = time.perf_counter()
            view, labels = next(views)  # (k, C, H, W) in [0, 1], (k,) or (k, H, W); or two lists
            waited += time.perf_counter() - asked
            drop = None
            if args.drop_path:
                drop = models.drop_path(len(view), model.branches, args.drop_path,
                                        seeded(args.seed, DROP, step), (row, args.batch_size))
                drop = degrade.moved(drop, device)
            more = []
            if args.head == "detect":  # its losses are of boxes that are drawn at random
                torch.manual_seed(seeded(args.seed, SAMPLE, step, row).initial_seed())
                more = [labels]
            if args.head == "classify":
                labels = F.one_hot(labels, len(data.classes)).float()  # (k, classes)
                view, labels = mix(view, labels, args.mixup, args.cutmix,
                                   np.random.default_rng((args.seed, MIX, step)))
            with net.no_sync() if process.world > 1 and a < args.accum - 1 else nullcontext():
                with amp():
                    scores = net(view, drop, *more)
                micro_loss = LOSSES[args.head](scores, labels, args) / args.accum
                scaler.scale(micro_loss).backward()
            loss = loss + micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = pretrain.clipped_norm(model, args.clip)

        # how all processes stand; what cannot go on stops here, before it is saved
        timed += 1
        done = step + 1
        unread.append(torch.stack([loss, norm]))
        found, leaving = pretrain.agree(unread, received, done, args, data, process)
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

        # log, measure, save, leave
        epoch = done * args.batch_size / len(data)
        if due(done, args.log_every, args):
            pretrain.log(args, process, step=done, epoch=epoch, lr=lr, loss=float(np.mean(recent)),
                         grad_norm=float(norm), images_per_s=round(speed, 1),
                         data_wait=round(waited / (time.perf_counter() - clock), 4))
            recent = []
            clock = time.perf_counter()
            timed = 0
            waited = 0.0
        paused = time.perf_counter()  # what follows is not training
        at_checkpoint = due(done, args.save_every, args)
        if at_checkpoint or leaving:
            pretrain.save(done, args, process, state, recent)
        if at_checkpoint and (not leaving or done == args.total):
            result = measure(model, val, args, process, amp)
            pretrain.log(args, process, step=done, epoch=epoch, **result)
        clock += time.perf_counter() - paused
        if leaving and done < args.total:
            return pretrain.leave(received, process)
    bar.close()
    report(args, process, result or measure(model, val, args, process, amp))
    if args.head != "classify":
        pretrain.on_rank_0(lambda: found_sheet(model, val, args, device, amp), process)


# --- Recipes and options ---

# The columns of A2's Table A2; BM 4.2's, and where that is silent its code's; a recipe for a CPU.
# lr is per 256 images, rand_augment is strength and deviation, test_crop the central part that is
# measured.
DEIT = dict(img_size=[224], patch_size=16, epochs=100, warmup_share=0.05, batch_size=1024,
            at_once=64, optimizer="adamw", lr=2.5e-4, weight_decay=0.05, betas=[0.9, 0.999],
            clip=5.0, crop=[0.08, 1.0], layer_decay=0.65, drop_path=0.1, smoothing=0.1,
            rand_augment=[9, 0.5], random_erasing=0.0, mixup=0.8, cutmix=1.0, loss="ce",
            pool="mean", test_size=0, test_crop=0.875, schedule="cosine", drops=[],
            head="classify", num_classes=None, relative_positions=False)
RSB_A3 = dict(DEIT, img_size=[160], batch_size=2048, optimizer="lamb", lr=1e-3, weight_decay=0.02,
              clip=0.0, layer_decay=1.0, drop_path=0.0, smoothing=0.0, rand_augment=[6, 0.5],
              mixup=0.1, loss="bce", test_size=224, test_crop=0.95)
DENSE = dict(DEIT, batch_size=16, at_once=16, clip=0.0, smoothing=0.0, rand_augment=[0, 0],
             mixup=0.0, cutmix=0.0)
PIXELS = dict(DENSE, head="segment", img_size=[512], crop=[0.5, 2.0], schedule="linear",
              width=512, auxiliary=0.4, num_classes=150)
BOXES = dict(DENSE, head="detect", img_size=[800], crop=[0.6, 1.0], epochs=12, lr=3e-4 * 16,
             schedule="step", drops=[9 / 12, 11 / 12], warmup_share=1000 / 88716, at_once=2,
             layer_decay=0.75, width=256, neck="fpn", sampled=512)
RECIPES = {
    # BM 4.4, A2 A.3 and its code, ADE20K; lr is absolute at 16 images. 1,500 steps of warm-up.
    "ade_bm": dict(PIXELS, epochs=160000 * 16 / 20210, warmup_share=1500 / 160000, lr=4e-4 * 16,
                   layer_decay=0.75),
    "ade_a2": dict(PIXELS, epochs=100, warmup_share=1500 * 16 / 2021000, lr=4e-4 * 16,
                   relative_positions=True),
    # BM 4.4, A2 A.2, COCO; lr is absolute at 16 images, the warm-up detectron2's. A ResNet's is
    # MoCo's.
    "coco_bm": BOXES, "coco_a2": dict(BOXES, relative_positions=True),
    "coco_c4": dict(BOXES, epochs=24, optimizer="sgd", lr=0.02 * 16, betas=[0.9, 0.0],
                    weight_decay=1e-4, drops=[2 / 3, 8 / 9], warmup_share=1000 / 180000,
                    crop=[0.8, 1.0], drop_path=0.0, neck="c4"),
    "scenes_pixels": dict(PIXELS, img_size=[48], patch_size=4, epochs=4, warmup_share=0.05,
                          lr=8e-3, at_once=32, batch_size=32, width=32, crop=[0.75, 1.5],
                          drop_path=0.0, layer_decay=0.75),
    "scenes_boxes": dict(BOXES, img_size=[64], patch_size=4, epochs=1, warmup_share=0.05,
                         lr=0.016, at_once=16, width=32, sampled=32, drop_path=0.0,
                         save_every=250),
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
    """What the file of --weights holds, but the optimiser, or None; its run's configuration, or {};
    and the defaults of the options that follow from these and from `chosen`. trains False: images
    are shown as the run measured them.
    """
    held = None if weights == "none" else models.read_weights(weights)
    run = models.run_config(held or {})
    (held or {}).pop("optimizer", None)
    head = "classify"
    if hasattr(chosen, "head"):  # of finetune.py; --eval measures what the run was trained for
        head = chosen.head or not trains and run.get("head") or head
    data = chosen.data or run.get("data", "shapes")
    of_images = run.get("head", "classify") == "classify"
    if head != "classify" and of_images and not chosen.data \
            and not os.path.isdir(f"{data}/annotations"):
        data = "scenes"
    folder = pretrain.kind_of(data) == "folder"
    model = chosen.model or run.get("model", "vit_base" if folder else "vit_micro")
    maps = not models.MODELS[model].family.tokens
    recipe = getattr(chosen, "recipe", None)
    recipe = recipe or usual_recipe(head, run, data, model, chosen.img_size, trains)
    check(maps or recipe != "coco_c4", f"--recipe coco_c4: {model} is no ResNet")
    check(head == RECIPES[recipe]["head"], f"--recipe {recipe}: another --head")

    # the recipe, what differs for a network of maps and for a folder, and what the run had
    defaults = dict(RECIPES[recipe], model=model, data=data, recipe=recipe, root="data", only=None,
                    fitted=None)
    if maps:
        defaults.update(layer_decay=1.0, pool="mean", relative_positions=False)
        if head != "classify":
            defaults["drop_path"] = 0.0
        if recipe == "small" or recipe.startswith("scenes"):
            size = 128 if head == "detect" else 64
            defaults.update(img_size=[size], patch_size=8, drop_path=0.0)
    elif recipe.startswith("ade"):
        defaults["width"] = models.MODELS[model].sizes["dim"]
    if folder and recipe == "small":
        defaults.update(img_size=[224], patch_size=16)  # as in pre-training
    taken = ["root", "patch_size"]
    if of_images:
        taken.append("pool")
    if of_images and not trains:
        taken += ["test_size", "test_crop"]
    if not trains or recipe == "small" or head == "classify" and not maps:
        taken.append("img_size")  # else it is the recipe's
    if not trains and run.get("head") == head:
        taken += ["labels", "seed", "width", "num_classes", "neck", "sampled"]
    if run.get("relative_positions"):
        taken.append("relative_positions")
    if os.path.realpath(data) == os.path.realpath(str(run.get("data"))):
        taken.append("only")
    defaults.update((name, run[name]) for name in taken if name in run)
    if chosen.img_size not in (None, defaults["img_size"]):  # images are measured at it, too
        defaults["test_size"] = 0
    if trains and folder:
        defaults = for_labels(defaults, chosen)
    return held, run, defaults


def usual_recipe(head, run, data, model, img_size, trains):
    """The recipe for what a command line says, if that does not name one."""
    again = run.get("recipe") in ("deit", "ade_a2", "coco_a2")  # a fine-tuned run of A2's
    paper = "A2" if again else getattr(degrade.TASKS.get(run.get("task")), "paper", "BM")
    if pretrain.is_small(data, model, img_size or run.get("img_size")):
        return dict(classify="small", segment="scenes_pixels", detect="scenes_boxes")[head]
    maps = not models.MODELS[model].family.tokens
    if head == "segment":
        return "ade_a2" if maps else f"ade_{paper.lower()}"
    if head == "detect":
        return "coco_c4" if maps else f"coco_{paper.lower()}"
    if trains and maps:
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
    o("--patch_size", type=positive_int, help="side of a ViT's patch, in analyze.py of any")
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
    o = first.add_argument
    first_options(o)
    o("--recipe", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    pretrain.batch_option(o)
    o("--head", choices=LOSSES, help="classify (default): a class for an image; segment: for "
      "every pixel; detect: boxes and masks of objects. For these --crop is an image's scale")
    o("--eval", action="store_true", help="only measure --weights")
    chosen, _ = first.parse_known_args(argv)
    weights, run, defaults = open_run(chosen.weights, chosen, trains=not chosen.eval)
    p = pretrain.Parser(parents=[first], description=(__doc__ or "").split("\n")[0])
    o = p.add_argument
    tokens = models.MODELS[defaults["model"]].family.tokens
    encoder_options(o, pools=defaults["head"] == "classify")
    pretrain.training_options(o)
    o("--optimizer", choices=OPTIMIZERS, help="sgd has the first of --betas for momentum")
    if tokens:
        o("--layer_decay", type=share, help="a layer's learning rate over the next one's")
    o("--drop_path", type=share, help="stochastic depth of the last layer")
    o("--schedule", choices=("cosine", "linear", "step"), help="of the learning rate, down to 0, "
      "or to a tenth after each of --drops")
    o("--drops", type=share, nargs="+", help="shares of the run")
    if defaults["head"] != "classify":
        o("--width", type=positive_int, help="of UperNet, or of the pyramid's maps")
    if defaults["head"] == "detect":
        o("--neck", choices=["fpn"] if tokens else ["fpn", "c4"], help="a pyramid, or a ResNet's "
          "third stage alone, the fourth being the head of boxes and masks")
        o("--sampled", type=positive_int, help="boxes of an image that the losses are of, a "
          "quarter at most of objects")
    elif defaults["head"] == "segment":
        o("--auxiliary", type=not_negative, help="weight of the loss on the third map alone")
        o("--num_classes", type=positive_int, help="of a folder's annotations, at most 255")
    else:
        o("--loss", choices=("ce", "bce"), help="cross-entropy, or binary for each class")
        o("--smoothing", type=share, help="of the labels, with ce")
        o("--rand_augment", type=not_negative, nargs=2, help="strength, 0 to 10, and its deviation")
        o("--random_erasing", type=share, help="share of the images with a part of noise")
        o("--mixup", type=not_negative, help="alpha, 0: none")
        o("--cutmix", type=not_negative, help="alpha, 0: none")
        o("--test_size", type=pretrain.natural, help="measure at this size; 0: --img_size")
    o("--out", type=pretrain.folder_path, help="None: runs/finetune-WEIGHTS-DATA[-LABELS][-HEAD]"
      "[-seedSEED], or runs/eval-...")
    pretrain.machine_options(o)
    p.set_defaults(**defaults)
    return p.parse_args(argv), weights, run


def run_name(script, args, *more):
    """SCRIPT-WEIGHTS-DATA[-LABELS][-MORE][-seedSEED], what a run's folder is called after."""
    path = Path(args.weights)
    path = path.parent if path.name == "checkpoint.pt" else path
    stem = path.name if path.is_dir() else path.stem
    if args.weights == "none":
        stem = f"none-{args.model}"
    more = [str(x) for x in (args.labels, *more, args.seed and f"seed{args.seed}") if x]
    return "-".join([script, stem, Path(args.data).absolute().name, *more])


def keep_results(args):
    """Refuse an --out that holds a run, or what was measured of other weights."""
    check(not (args.out / "checkpoint.pt").exists(), f"{args.out} holds a run: give another --out")
    file = args.out / "result.json"
    of = json.loads(file.read_text())["weights"] if file.exists() else args.weights
    check(of == args.weights, f"{file} is of {of}: give another --out")


def settle(args, process, data):
    """What follows from the options and the data: the share of each process, the folder."""
    if args.eval:
        args.batch_size = process.world  # there are no steps
        args.accum = 1
    pretrain.share_out(args, process, data)
    check(args.head != "detect" or not args.compile,
          "--compile: the sizes of --head detect change from step to step")
    head = "" if args.head == "classify" else args.head
    pretrain.settle_folder(args, run_name("eval" if args.eval else "finetune", args, head))
    if args.eval:
        keep_results(args)
    check(args.test_size % args.patch_size == 0,
          f"--test_size {args.test_size}: choose a multiple of --patch_size {args.patch_size}")
    odd = args.micro_batch % 2 and (args.mixup or args.cutmix)
    check(args.eval or not odd, f"mixup pairs images, {args.micro_batch} at once are odd: choose "
          "another --batch_size or --accum, or --mixup 0 --cutmix 0")
    args.classes = data.classes


# --- Data, augmentation, loss, optimiser ---

def labelled_data(args, process, trains=True, classes=None):
    """The images to train on, --labels of each class, and those to measure, of no other classes.
    trains False: both are those to measure. classes: those of the measured run, if known.
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


class AnnotatedSet(pretrain.FolderSet):
    """Images that are read with their annotations: of `scenes`, or of a folder that `open` knows.
    classes: how many a folder has, where its annotations do not say it.
    """

    def __init__(self, data, train, classes):
        self.scenes = None
        self.bad = {}  # as FolderSet's
        if data == "scenes":
            self.scenes = pretrain.built_in(data, train)
            self.classes = self.of_scenes
            self.names = np.arange(len(self.scenes.kinds))
            self.found = f"{len(self):,} scenes"
        else:
            self.open(data, train, classes)
        self.labels = torch.zeros(len(self))

    def upright(self, index):
        """An image (3, H, W) uint8 of a folder."""
        with Image.open(self.path(index)) as picture:
            if picture.getexif().get(0x0112) in range(2, 9):
                raise ValueError("EXIF turns it, perhaps not its annotation: save it without EXIF")
        return super().read(index)

    def readable(self, rows, workers=0):
        """(index, what `read` returns) of each of these rows that can be read."""
        loader = DataLoader(self, None, sampler=[(i, -1, (1, 1), None, 0, None) for i in rows],
                            num_workers=0 if self.scenes else workers,  # these are kept once drawn
                            worker_init_fn=pretrain.ignore_signals)
        for image, index, _, unread in loader:
            if unread:
                self.skip(unread, -1)
            else:
                yield index, image


class PixelSet(AnnotatedSet):
    """Images with a class for every pixel, which goes with them as a fourth channel. 255: it is not
    labelled. A folder is in ADE20K's layout: DIR/images/{training,validation}/... and
    DIR/annotations/{training,validation}/...png, of 1 and on, 0 not labelled.
    """
    planes = 4
    of_scenes = ["ground", *pretrain.SHAPES]

    def open(self, data, train, classes):
        check(os.path.isdir(f"{data}/annotations"), f"--head segment: {data} is not scenes, nor a "
              "folder with images/ and annotations/")
        split = "training" if train else "validation"
        pretrain.FolderSet.__init__(self, os.path.join(data, "images", split))
        self.annotations = os.path.join(data, "annotations", split)
        absent = [x for x in map(self.annotation, range(len(self))) if not x.exists()]
        check(not absent, f"{len(absent)} images have no annotation, such as "
              f"{next(iter(absent), None)}")
        self.classes = [str(i) for i in range(1, classes + 1)]

    def annotation(self, index):
        return Path(self.annotations, os.fsdecode(self.names[index])).with_suffix(".png")

    def read(self, index):
        """(4, H, W) uint8."""
        if self.scenes:
            image = self.scenes.drawn(torch.tensor([index]))[0]
            kinds = F.pad(self.scenes.kinds[index] + 1, (1, 0)).to(torch.uint8)
            return torch.cat([image[:3], kinds[image[3:].long()]])
        image = self.upright(index)
        path = self.annotation(index)
        with Image.open(path) as picture:
            labels = torch.from_numpy(np.array(picture).astype(np.int64))
        if labels.shape != image.shape[1:] or labels.max() > len(self.classes):
            raise ValueError(f"{path} is {tuple(labels.shape)} of 0 .. {labels.max()}, for an "
                             f"image of {tuple(image.shape[1:])} and {len(self.classes)} classes")
        return torch.cat([image, labels[None].to(torch.uint8) - 1])  # of 0, 255

    def view(self, image, index, epoch, size, scale, seed):
        """Scaled (1: to the view's short side), cropped, flipped at random; epoch -1: as it is."""
        if epoch < 0:
            return image
        u = torch.rand(4, generator=seeded(seed, pretrain.CROP, epoch, index)).tolist()
        short = (scale[0] + (scale[1] - scale[0]) * u[0]) * min(size)
        pixels = models.to_short_side(image[None, :3], short)
        kinds = F.interpolate(image[None, 3:], pixels.shape[2:], mode="nearest-exact")
        image = torch.cat([pixels, kinds], dim=1)[0]
        H, W = (max(n, m) for n, m in zip(image.shape[1:], size))
        canvas = torch.full((4, H, W), 255, dtype=torch.uint8)  # 255: not labelled
        canvas[:3] = 255 * torch.tensor(degrade.ZERO).view(3, 1, 1)
        canvas[:, :image.shape[1], :image.shape[2]] = image
        top = int(u[1] * (H - size[0] + 1))
        left = int(u[2] * (W - size[1] + 1))
        image = canvas[:, top:top + size[0], left:left + size[1]]
        return image.flip(2) if u[3] < 0.5 else image

    def batches(self, *args, **more):
        """As MemorySet.batches, with the classes (k, H, W) for labels."""
        for view, _ in super().batches(*args, **more):
            yield view[:, :3], (view[:, 3] * 255).round().long()

    def whole(self, rows, workers):
        """The images of these rows that can be read, as they are, (k, 4, H, W) of one size."""
        images = (image for _, image in self.readable(rows, workers))
        for (_, H, W), same in itertools.groupby(images, lambda image: image.shape):
            while some := [*itertools.islice(same, min(16, math.ceil(2 ** 20 / (H * W))))]:
                yield torch.stack(some)


class BoxSet(AnnotatedSet):
    """Images with objects, a dict of boxes (n, 4) as left, top, right, bottom, labels (n,) from 1
    on, masks (n, H, W) uint8, crowd (n,) bool, area (n,). A folder is in COCO's layout:
    DIR/annotations/instances_{train,val}2017.json and DIR/{train,val}2017/. Crowds, empty boxes and
    images without objects are not trained on.
    """
    of_scenes = [*pretrain.SHAPES]

    def open(self, data, train, classes):
        split = "train" if train else "val"
        self.file = pretrain.coco_file(data, split)
        self.folder = pretrain.inner(data, split)
        check(self.file, f"--head detect: {data} is not scenes, nor a folder with annotations/"
              f"instances_{split}2017.json")
        try:
            held = json.loads(self.file.read_bytes())
            images = {x["id"]: dict(name=x["file_name"], size=[x["height"], x["width"]], objects=[])
                      for x in sorted(held["images"], key=lambda x: x["id"])}
            kinds = sorted(held["categories"], key=lambda kind: kind["id"])
            number = {kind["id"]: i for i, kind in enumerate(kinds, 1)}
            for a in held["annotations"]:
                few = {key: a.get(key) for key in ("id", "segmentation", "iscrowd", "area")}
                image = images[a["image_id"]]
                H, W = image["size"]
                x, y, w, h = a["bbox"]
                check(min(x + 1, y + 1, w, h) >= 0 and x + w <= W + 1 and y + h <= H + 1,
                      f"the box of object {few['id']} is not within its {W} x {H} image")
                if not train or min(w, h) > 0.01 and not few["iscrowd"]:
                    image["objects"].append(
                        dict(few, box=[x, y, x + w, y + h], label=number[a["category_id"]]))
            self.classes = [str(kind["name"]) for kind in kinds]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file} is not of COCO's format: {type(error).__name__} {error}")

        kept = [image for image in images.values() if image["objects"] or not train]
        check(any(image["objects"] for image in kept), f"{self.file} has no objects")
        self.names = np.array([os.fsencode(image["name"]) for image in kept])
        check(os.path.exists(self.path(0)), f"{self.file}: there is no {self.path(0)}")
        self.found = f"{len(kept):,} of {len(images):,} images of {self.file} in {self.folder}"
        lines = [json.dumps(image).encode() for image in kept]  # one block, not a million objects
        self.lines = b"".join(lines)
        self.ends = np.cumsum([0, *map(len, lines)])

    @property
    def contents(self):
        more = "" if self.scenes else hashlib.sha1(self.lines).hexdigest()[:12]
        return f"{super().contents} {more}".strip()

    def read(self, index):
        """(3, H, W) uint8, its objects."""
        if self.scenes:
            image = self.scenes.drawn(torch.tensor([index]))[0]
            kinds = self.scenes.kinds[index]
            which = image[3][image[3] > 0].unique().long()  # not hidden
            masks = image[3] == which[:, None, None]
            boxes = ops.masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
            return image[:3], dict(boxes=boxes, labels=kinds[which - 1] + 1, masks=masks.byte(),
                                   crowd=torch.zeros(len(which)).bool(), area=masks.sum((1, 2)))
        image = self.upright(index)
        record = json.loads(self.lines[slice(*self.ends[index:index + 2])])
        objects = record["objects"]
        size = [*image.shape[1:]]
        if record["size"] != size:
            raise ValueError(f"it is {size} high and wide, in {self.file} {record['size']}")
        masks = torch.zeros(len(objects), *size, dtype=torch.uint8)
        for mask, a in zip(masks, objects):
            try:
                mask |= torch.from_numpy(mask_of(a["segmentation"], *size))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"the mask of object {a['id']} of {self.file}: {error}")
        area = [mask.sum() if a["area"] is None else a["area"] for mask, a in zip(masks, objects)]
        return image, dict(boxes=torch.tensor([a["box"] for a in objects]).view(-1, 4).float(),
                           labels=torch.tensor([a["label"] for a in objects]).long(), masks=masks,
                           crowd=torch.tensor([a["iscrowd"] == 1 for a in objects]).bool(),
                           area=torch.tensor(area))

    def view(self, item, index, epoch, size, scale, seed):
        """Scaled (1: to the view's short side) and flipped at random; epoch -1: as it is."""
        if epoch < 0:
            return item
        image, objects = item
        u = torch.rand(2, generator=seeded(seed, pretrain.CROP, epoch, index)).tolist()
        H, W = image.shape[1:]
        short = (scale[0] + (scale[1] - scale[0]) * u[0]) * min(size)
        image = models.to_short_side(image[None], short, LONGER * min(size))[0]
        h, w = image.shape[1:]
        masks = F.interpolate(objects["masks"][None], (h, w), mode="nearest-exact")[0]
        boxes = objects["boxes"] * torch.tensor([w / W, h / H, w / W, h / H])
        if u[1] < 0.5:
            image = image.flip(2)
            masks = masks.flip(2)
            boxes = torch.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], dim=1)
        return image, dict(boxes=boxes, labels=objects["labels"], masks=masks)

    @staticmethod
    def collate(items):
        views, index, epoch, unread = zip(*items)
        return views, torch.tensor(index), torch.tensor(epoch), unread

    def to_device(self, views, device):
        return ([pretrain.FolderSet.to_device(self, image, device) for image, _ in views],
                [{name: degrade.moved(x, device) for name, x in objects.items()}
                 for _, objects in views])

    def batches(self, *args, **more):
        """As MemorySet.batches, with lists of images of several sizes and of their objects."""
        return (both for both, _ in super().batches(*args, **more))


LONGER = 1333 / 800  # of an image that a detector sees: the longest side over --img_size


def mask_of(segmentation, height, width):
    """COCO's polygons or run lengths -> (height, width) uint8."""
    if isinstance(segmentation, dict):
        size = segmentation["size"]
        counts = segmentation["counts"]
        if size != [height, width]:
            raise ValueError(f"it is {size} high and wide, its image {[height, width]}")
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        inside = np.repeat(np.arange(len(counts)) % 2, counts)
        return inside.reshape(width, height).T.astype(np.uint8)
    if not segmentation:
        raise ValueError("there is none")
    mask = np.zeros((height, width), np.uint8)
    for points in segmentation:
        if len(points) < 6:
            raise ValueError("a polygon has three corners or more")
        mask |= polygon(points, height, width)
    return mask


def run_lengths(text):
    """COCO's compressed run lengths: numbers of 5 bits a character. The fourth and later ones are
    differences from the number two before.
    """
    counts = []
    number = 0
    bits = 0
    for c in map(ord, text):
        number |= (c - 48 & 31) << bits
        bits += 5
        if not c - 48 & 32:  # its last
            number -= (c - 48 & 16) << bits - 4  # below zero
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = 0
            bits = 0
    return counts


def polygon(points, height, width):
    """The pixels inside a polygon [x, y, x, y ...], as COCO's own code rounds: the outline goes in
    steps of a fifth of a pixel, and where it crosses the middle of a column, every later pixel,
    column by column, changes sides.
    """
    start = (5 * np.array(points, float).reshape(-1, 2) + 0.5).astype(int)  # (edges, 2)
    end = np.roll(start, -1, axis=0)
    size = np.abs(end - start)
    length = size.max(1)
    number = np.arange(len(start))
    back = (start > end)[number, size.argmax(1)]  # on the longer axis: from its high end
    low, high = np.where(back[:, None], [end, start], [start, end])
    slope = (high - low) / np.maximum(length, 1)[:, None]
    edge = np.repeat(number, length + 1)
    t = np.concatenate([np.arange(n + 1) for n in length])
    t = np.where(back[edge], length[edge] - t, t)
    u, v = (low[edge] + slope[edge] * t[:, None] + 0.5).astype(int).T
    crossing = np.flatnonzero(u[1:] != u[:-1])
    x, y = (np.minimum(z[crossing], z[crossing + 1]) for z in (u, v))
    middle = (x % 5 == 2) & (x // 5 >= 0) & (x // 5 < width)
    x = x[middle] // 5
    y = np.ceil(np.clip((y[middle] + 0.5) / 5 - 0.5, 0, height)).astype(int)
    changes = np.bincount(x * height + y, minlength=height * width + 1)[:height * width]
    return (changes.cumsum(dtype=np.uint8) & 1).reshape(width, height).T


def annotated_data(args, process, trains, classes):
    """As labelled_data, of images with annotations."""
    check(not args.labels and not args.only, f"--labels, --classes: not of --head {args.head}")
    check((args.num_classes or 0) < 256, f"--num_classes {args.num_classes}: at most 255")
    kind = dict(segment=PixelSet, detect=BoxSet)[args.head]
    splits = [True, False] if trains else [False]
    sets = [kind(args.data, train, args.num_classes) for train in splits]
    classes = sets[0].classes if trains else classes
    check(classes in (None, sets[-1].classes), f"{args.data} has other classes than are trained "
          "on, or --weights has another --head")
    for data in sets:
        pretrain.same_copies(data, args.data, process)
    return sets[0], sets[-1]


def augmentation(magnitude, deviation, erasing):
    """augmented() at these strengths, as `batches` takes it, or None."""
    if magnitude or erasing:
        return functools.partial(augmented, magnitude=magnitude, deviation=deviation,
                                 erasing=erasing)


class RandAugment(v2.RandAugment):
    """torchvision's with the operations of timm's, all but SolarizeAdd: those of torchvision alone
    change pixels by a quarter less.
    """
    _AUGMENTATION_SPACE = {
        **{name: x for name, x in v2.RandAugment._AUGMENTATION_SPACE.items() if name != "Identity"},
        "Invert": (lambda *_: None, False),
        "Posterize": (lambda bins, *_: 4 - 4 * torch.arange(bins) // (bins - 1), False)}  # to bits


def augmented(image, generator, magnitude, deviation, erasing):
    """RandAugment of a (C, H, W) uint8 image as timm's, which Table A2's (9, 0.5) means: twice,
    each time with probability 1/2, one operation at a strength of N(magnitude, deviation) of 10.
    Then, with probability `erasing`, a rectangle of noise (random erasing, A2 3.1).
    """
    with torch.random.fork_rng(devices=[]):  # torchvision's numbers are global
        for _ in range(2 if magnitude else 0):
            strength = magnitude + deviation * float(torch.randn((), generator=generator))
            used = torch.rand((), generator=generator) < 0.5
            torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)))
            if used:
                image = RandAugment(1, round(10 * min(max(strength, 0), 10)), 101,
                                    v2.InterpolationMode.BILINEAR, [128] * len(image))(image)
        if erasing and torch.rand((), generator=generator) < erasing:
            torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)))
            z = v2.RandomErasing(1, value="random")((image / 255 - 0.45) / 0.225)
            image = ((0.45 + 0.225 * z).clamp(0, 1) * 255).round().to(torch.uint8)
    return image


def mix(images, targets, mixup, cutmix, rng):
    """Mixup or cutmix, one at random if both alphas are above 0. An image is mixed with its
    neighbour, and rng is the same in all processes, so nothing depends on how a batch is split.
    """
    if not mixup and not cutmix:
        return images, targets
    boxed = not mixup or (cutmix > 0 and rng.random() < 0.5)
    alpha = cutmix if boxed else mixup
    own = rng.beta(alpha, alpha)  # the share of the image itself
    other = torch.arange(len(images), device=images.device) ^ 1
    if boxed:
        H, W = images.shape[2:]
        y, x = rng.random(2)
        half = (1 - own) ** 0.5 / 2
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


def segment_loss(scores, labels, args):
    """Cross-entropy over all pixels, those without a label count 0, and --auxiliary times that of
    the auxiliary scores.
    """
    main, auxiliary = (F.cross_entropy(x, labels, ignore_index=255, reduction="none").mean()
                       for x in scores)
    return main + args.auxiliary * auxiliary


LOSSES = {"classify": class_loss, "segment": segment_loss,
          "detect": lambda losses, *_: sum(losses.values())}  # Mask R-CNN's five


def with_head(args, weights, data, says):
    """The encoder with its weights and a fresh head. --eval: with its own."""
    dense = args.head != "classify"
    model = encoder = models.encoder(args.model, args.img_size, args.patch_size, data.channels,
                                     0 if dense else len(data.classes), args.relative_positions,
                                     args.pool)
    if model.tokens:
        model.pos_embed.requires_grad_(True)  # differs from the authors' code: BM's are constants
    if args.head == "segment":
        model = models.UperNet(encoder, len(data.classes), args.width)
    elif args.head == "detect":
        short = min(args.img_size)
        model = models.Detector(encoder, len(data.classes), short, round(LONGER * short), args.neck,
                                args.width, args.sampled)
    elif model.tokens:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # near 0, as MAE's
    missing = f"--eval: {args.weights} has no head for {len(data.classes)} classes: give a " \
              "fine-tuned run, and the --data it was made for"
    if dense and args.eval:
        check(weights and models.run_config(weights).get("head") == args.head, missing)
        loaded = models.load_weights(encoder, weights)
        rest = {k: x for k, x in weights["model"].items() if "encoder." not in k}
        own = model.state_dict()
        check(all(k in own and own[k].shape == x.shape for k, x in rest.items()), missing)
        model.load_state_dict(rest, strict=False)
    elif weights is not None:
        loaded = models.load_weights(encoder, weights, head=args.eval)
        check(not (args.eval and loaded.missing), missing)
    if says and weights is not None:
        print(loaded)
    return model


def layer_scale(model, decay):
    """name -> decay^(L + 1 - l): l: 0 for the embeddings, 1 .. L for blocks, L + 1 the rest."""
    after = model.branches // 2 + 1  # a block has two

    def scale(name):
        name = name.split("encoder.")[-1]
        if name.startswith("blocks."):
            return decay ** (after - int(name.split(".")[1]) - 1)
        return decay ** after if name.startswith(("cls_token", "pos_", "patch_")) else 1.0
    return scale


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
                m = m / (1 - beta1 ** state["t"])
                v = v / (1 - beta2 ** state["t"])
                u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * w
                ratio = 1.0
                if group["weight_decay"]:
                    of_w = w.norm()
                    of_u = u.norm()
                    ratio = torch.where((of_w > 0) & (of_u > 0), of_w / of_u, 1.0)
                w.sub_(group["lr"] * ratio * u)


OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True), "lamb": LAMB,
    "sgd": lambda groups, lr, betas: torch.optim.SGD(groups, lr, momentum=betas[0])}


# --- What is measured ---

@torch.no_grad()
def evaluate_pixels(model, data, args, process, amp):
    """Mean IoU and pixel accuracy in %, over every labelled pixel of all images at their own size.
    A class that is neither there nor found is left out of the mean.
    """
    n = len(data.classes)
    read = 0
    mine = range(process.rank, len(data), process.world)
    confusion = torch.zeros(n * n, dtype=torch.float64)
    model.eval()
    for images in data.whole(mine, args.workers):
        found = classes_of(model, images, args, process.device, amp)
        labels = images[:, 3].long()
        pairs = (labels * n + found)[labels != 255]
        confusion += torch.bincount(pairs, minlength=n * n)
        read += len(images)
    model.train()
    *confusion, read = sum_over_processes([*confusion.tolist(), read], process)
    pretrain.refuse_bad(data, len(data) - read, process)
    if not sum(confusion):
        raise pretrain.Failed("" if process.rank else "no pixel to measure is labelled")
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
    view = models.to_short_side(images[:, :3], min(args.img_size)).to(device).float() / 255
    with amp():
        scores = finite(model(view).float())
    scores = F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)
    return scores.argmax(1).cpu()


@torch.no_grad()
def evaluate_boxes(model, data, args, process, amp):
    """COCO's AP of boxes and masks in %, over all images at their own size. What no object is of
    (a size) is left out.
    """
    model.eval()
    mine = []
    rows = range(process.rank, len(data), process.world)
    for index, (image, truth) in data.readable(rows, args.workers):
        mine.append((index, matched(objects_of(model, image, process.device, amp), truth)))
    model.train()
    rows = sorted(sum(pretrain.gather(mine, process), []), key=lambda row: row[0])
    pretrain.refuse_bad(data, len(data) - len(rows), process)
    found = average_precision([row for _, row in rows])
    if not found:
        raise pretrain.Failed("" if process.rank else "no image to measure has an object")
    return dict(**found, images=len(rows))


def objects_of(model, image, device, amp):
    """What is found in an image (3, H, W) uint8: boxes, labels, scores, masks (n, H, W) bool."""
    with amp():
        found = model([image.to(device).float() / 255])[0]
    found["masks"] = found["masks"][:, 0] > 0.5
    return {name: x.cpu() for name, x in found.items()}


THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZES = {"": (0, math.inf), "_small": (0, 32 ** 2), "_medium": (32 ** 2, 96 ** 2),
         "_large": (96 ** 2, math.inf)}  # areas in pixels, both ends belong to them


def matched(found, truth):
    """Of an image, {("box" or "mask", label): (scores, highest first, and `match`'s)}."""
    result = {}
    for label in {*found["labels"].tolist(), *truth["labels"].tolist()}:
        f, t = ({name: x[objects["labels"] == label].numpy() for name, x in objects.items()}
                for objects in (found, truth))
        order = np.argsort(-f["scores"], kind="stable")[:100]
        f = {name: x[order] for name, x in f.items()}
        for kind, shared_by in (("box", boxes_shared), ("mask", masks_shared)):
            shared, of_found, of_truth = shared_by(f, t)
            union = of_found[:, None] + np.where(t["crowd"], 0, of_truth - shared)
            iou = shared / np.maximum(union, 1e-9)
            result[kind, label] = f["scores"], *match(iou, t["crowd"], t["area"], of_found)
    return result


def boxes_shared(found, truth):
    """The area that each box found (f, 4) shares with each (t, 4): (f, t); their areas."""
    a, b = (objects["boxes"].astype(float) for objects in (found, truth))
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(0).prod(2), *((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))


def masks_shared(found, truth):
    a, b = (x.reshape(len(x), math.prod(x.shape[1:])) for x in (found["masks"], truth["masks"]))
    areas = [np.count_nonzero(x, axis=1) for x in (a, b)]
    return (a.astype(np.float32) @ b.astype(np.float32).T).astype(float), *areas


def match(iou, crowd, area, area_found):
    """COCO's matching of what is found, highest score first, for one image and class. iou (f, t),
    crowd and area (t,), area_found (f,) -> right (sizes, thresholds, f): 1, 0, or -1 where it does
    not count, as of a crowd; and how many objects count, (sizes,).

    Each takes the free object that it overlaps most, the threshold or more; if there is none, one
    that does not count.
    """
    low, high = np.array([*SIZES.values()]).T[:, :, None, None]
    # a last object that nothing overlaps: argmax needs one
    iou = np.pad(iou, [(0, 0), (0, 1)])
    crowd = np.append(crowd, True)
    area = np.append(area, 0)
    ignored = crowd | (area < low) | (area > high)  # (sizes, 1, t + 1)
    outside = (area_found < low) | (area_found > high)  # (sizes, 1, f)
    free = np.ones((len(SIZES), len(THRESHOLDS), len(crowd)), bool)
    right = np.empty((*free.shape[:2], len(iou)), np.int8)
    for i, row in enumerate(iou):
        fits = (free | crowd) & (row >= THRESHOLDS[:, None])
        worth = np.where(fits, row + 2 * ~ignored, -1)  # one that counts beats any that does not
        best = len(crowd) - 1 - worth[..., ::-1].argmax(2, keepdims=True)  # the last of equals
        taken = fits & (np.arange(len(crowd)) == best)
        hit = taken.any(2)
        passed = np.where(hit, (taken & ignored).any(2), outside[..., i])
        right[..., i] = np.where(passed, -1, hit)
        free &= ~taken
    return right, (~ignored).sum((1, 2))


def average_precision(images):
    """COCO's AP, in %, of what `matched` says of all images: precision at 101 recalls, its mean
    over thresholds, and over classes that have an object of the size.
    """
    result = {}
    for kind in ("box", "mask"):
        table = []  # classes x sizes x thresholds
        for label in sorted({label for image in images for _, label in image}):
            rows = [image[kind, label] for image in images if (kind, label) in image]
            scores, right, objects = zip(*rows)
            order = np.argsort(-np.concatenate(scores), kind="stable")
            right = np.concatenate(right, axis=2)[..., order]
            objects = sum(objects)
            hits = (right == 1).cumsum(2)
            misses = (right == 0).cumsum(2)
            precision = hits / np.maximum(hits + misses, 1)
            precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
            precision = np.pad(precision, [(0, 0), (0, 0), (0, 1)])  # 0 where no recall is so high
            recall = hits / np.maximum(objects, 1)[:, None, None]
            table.append([[p[np.searchsorted(r, np.linspace(0, 1, 101))].mean() if n else math.nan
                           for p, r in zip(*both)] for *both, n in zip(precision, recall, objects)])
        table = np.array(table).reshape(-1, len(SIZES), len(THRESHOLDS))
        means = {f"ap{size}": table[:, i] for i, size in enumerate(SIZES)}
        means.update(ap50=table[:, 0, 0], ap75=table[:, 0, 5])
        result.update({f"{kind}_{name}": round(100 * np.nanmean(x), 2) for name, x in means.items()
                       if np.isfinite(x).any()})
    return result


@torch.no_grad()
def found_sheet(model, data, args, device, amp):
    """found.png in --out: eight images with what is in them, and with what is found."""
    model.eval()
    pairs = []
    for _, image in data.readable(range(min(8, len(data)))):
        if args.head == "segment":
            maps = image[3], classes_of(model, image[None], args, device, amp)[0]
            labels = [x[x != 255].unique() for x in maps]
            both = [dict(labels=l, masks=x == l.view(-1, 1, 1)) for l, x in zip(labels, maps)]
            image = image[:3]
        else:
            image, truth = image
            found = objects_of(model, image, device, amp)
            both = truth, {name: x[found["scores"] >= 0.5] for name, x in found.items()}
        pairs.append([drawn(image, objects, args.classes) for objects in both])
    if pairs:
        columns = [torch.stack(column) for column in zip(*pairs)]
        half = [column[i::2] for i in (0, 1) for column in columns]
        page = degrade.sheet(half, ["annotated", "found"] * 2, side=192)
        pretrain.write_whole(args.out / "found.png", lambda file: page.save(file, "PNG"))


def drawn(image, objects, classes):
    """An image (3, H, W) uint8 with objects on it: (3, 192, 192) in [0, 1]."""
    picture = models.to_short_side(image[None], 192, 192)[0]
    size = picture.shape[1:]
    labels = objects["labels"].tolist()
    if labels:
        masks = F.interpolate(objects["masks"][None].byte(), size, mode="nearest-exact")[0] > 0
        colors = [f"hsl({67 * i % 360}, 90%, 60%)" for i in labels]
        picture = utils.draw_segmentation_masks(picture, masks, 0.7, colors)
        if "boxes" in objects:
            names = [classes[i - 1] for i in labels]
            boxes = objects["boxes"] * 192 / max(image.shape[1:])
            picture = utils.draw_bounding_boxes(picture, boxes, names, colors, label_colors="white")
    return F.pad(picture, [0, 192 - size[1], 0, 192 - size[0]]) / 255


@torch.no_grad()
def evaluate(model, data, args, process, amp):
    """Top-1 and top-5 in % over all images, each counted once however many processes share them."""
    size = [args.test_size] * 2 if args.test_size else args.img_size
    rows = torch.arange(len(data))[process.rank::process.world]
    first = 0
    fifth = 0
    seen = 0
    model.eval()
    for views, labels in data.plain(rows, 256, size, process.device, args.workers, args.test_crop):
        with amp():
            scores = finite(model(views).float())
        hit = scores.topk(min(5, len(data.classes))).indices == labels[:, None]
        first += hit[:, 0].sum().item()
        fifth += hit.sum().item()
        seen += len(labels)
    model.train()
    first, fifth, seen = sum_over_processes([first, fifth, seen], process)
    pretrain.refuse_bad(data, len(data) - seen, process)
    return dict(top1=round(100 * first / seen, 2), top5=round(100 * fifth / seen, 2),
                images=int(seen))


def finite(scores):
    """The scores. Failed where one is nan or infinite: argmax would find a class there, too."""
    if not scores.isfinite().all():
        raise pretrain.Failed("the scores are not finite: try --amp off, other --weights, or train "
                              "with a lower --lr")
    return scores


def measured(args, step):
    """Whether log.jsonl has what was measured at this step."""
    return any("images" in x and x["step"] == step for x in pretrain.read_log(args.out))


MEASURES = {"classify": evaluate, "segment": evaluate_pixels, "detect": evaluate_boxes}


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
