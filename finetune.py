"""Fine-tune an encoder end to end with labels, or measure a classifier: *Beyond Masking* (BM) section 4.2, *A2MIM* (A2)
sections 5.2, A.1, Table A2.

    python finetune.py --weights runs/zoom_in_mask-vit_micro-shapes --labels 100      a laptop's CPU, minutes
    python finetune.py --weights none --labels 100                                    the same from random weights
    torchrun --nproc_per_node=8 finetune.py --weights RUN --data /path/to/imagenet    the paper's run
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 \\
        finetune.py --weights RUN --data /path/to/imagenet                            on two machines
    python finetune.py --weights FINE_TUNED_RUN --eval                                only measure

Labelled images are DIR/train/<class>/... and DIR/val/<class>/..., or a set by name. --weights takes a run of pretrain.py
(model, sizes and data are then that run's; a ResNet's size on a folder is the recipe's), a file with timm's, MAE's or
torchvision's names, or none; only --eval uses a classifier in it. The loop, data, processes, precision,
checkpoints and exit codes are pretrain.py's. A run leaves checkpoint.pt, log.jsonl, config.json, confusion.png and
result.json, one line that is also printed last.
"""
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import models
import pretrain
from pretrain import AUTOCAST, DROP, LABELS, MIX, BadRequest, Failure, refusing, seeded, sum_over_processes

# The papers' recipes and one that fits a CPU. lr is per 256 images; rand_augment: magnitude and its deviation; test_size
# 0: the training size. A2's Table A2 prints 1e-3 (A3) and 1.5e-3 (A2): the first is RSB's own 8e-3 at batch 2048, the
# second is not (RSB: 5e-3, 6.25e-4 per 256); the table is followed. The random crop and cls token are MAE's and BM's.
DEIT = dict(img_size=[224], patch_size=16, epochs=100, warmup=5, batch_size=1024, micro=64, optimizer="adamw", lr=2.5e-4,
            weight_decay=0.05, betas=[0.9, 0.999], clip=5, crop=[0.08, 1.0], layer_decay=0.65, drop_path=0.1, smoothing=0.1,
            rand_augment=[9, 0.5], mixup=0.8, cutmix=1.0, loss="ce", pool="cls", test_size=0, test_crop=0.875)
RSB_A3 = dict(DEIT, img_size=[160], batch_size=2048, optimizer="lamb", lr=1e-3, weight_decay=0.02, clip=0, layer_decay=1.0,
              drop_path=0.0, smoothing=0.0, rand_augment=[6, 0.5], mixup=0.1, loss="bce", test_size=224, test_crop=0.95)
RECIPES = {
    "deit": DEIT, "rsb_a3": RSB_A3,
    "rsb_a2": dict(RSB_A3, img_size=[224], epochs=300, lr=1.5e-3, drop_path=0.05, rand_augment=[7, 0.5]),
    "small": dict(DEIT, img_size=[32], patch_size=4, epochs=50, warmup=2.5, batch_size=64, micro=256, lr=8e-3, crop=[0.8, 1.0],
                  drop_path=0.1, rand_augment=[0, 0], mixup=0.0, cutmix=0.0, pool="mean", test_crop=1.0),
}


SAYS = dict(
    pretrain.DEVICE_SAYS, data="that of the run in --weights, or shapes", root="that of the run in --weights, or ./data",
    model="that of the run in --weights; else vit_base for a folder, vit_micro for the small sets",
    img_size="that of the run in --weights, but for a ResNet on a folder the recipe's, 160 (rsb_a3) or 224 (rsb_a2); else 224, "
             "or for the small sets 32, for a ResNet 64",
    patch_size="as --img_size, else 16, or for the small sets 4, for a ResNet 8",
    warmup="a twentieth of the run (rsb_a2 a sixtieth)",
    save_every="a twentieth of the run, or more, so that measuring on val, which goes with it, stays below a tenth of the work",
    out="runs/finetune-WEIGHTS-DATA[-LABELS][-DRAW][-SEED]",
    **{option: pretrain.by_recipe(RECIPES, option) for option in ("epochs", "batch_size", "lr", "weight_decay", "betas", "clip",
                                                                  "crop")})
SAME_RUN = ("weights", "labels", "draw", "classes", "model", "relative_positions", "data", "images", "img_size", "patch_size",
            "pool", "total_steps", "warmup_steps", "batch_size", "optimizer", "lr", "weight_decay", "betas", "clip", "crop",
            "seed", "layer_decay", "drop_path", "smoothing", "rand_augment", "mixup", "cutmix", "loss", "test_size",
            "test_crop")


# ---------------------------------------------------------------------------------------------------
# Labels, augmentation, loss
# ---------------------------------------------------------------------------------------------------

def few_labels(labels, k, draw, classes):
    """k rows of each of `classes`, (classes k,) int64, sorted: the draw-th choice. BadRequest when a class has fewer."""
    rows = []
    for label, name in enumerate(classes):
        of_class = (labels == label).nonzero()[:, 0]
        if len(of_class) < k:
            raise BadRequest(f"--labels {k}: class {name} has only {len(of_class)} images")
        rows.append(of_class[torch.randperm(len(of_class), generator=seeded(draw, LABELS, label))[:k]])
    return torch.cat(rows).sort().values


def rand_augment(image, generator, magnitude, deviation):
    """RandAugment of a (C, H, W) uint8 image, as timm's, which Table A2's (9, 0.5) means: twice, each time with probability
    1/2, one of torchvision's operations, at a strength of N(magnitude, deviation) on a scale from 0 to 10 (torchvision's own
    9 is 3 there).
    """
    for _ in range(2):
        strength = magnitude + deviation * float(torch.randn((), generator=generator))
        used, seed = torch.rand((), generator=generator) < 0.5, int(torch.randint(2 ** 62, (), generator=generator))
        if not used:
            continue
        policy = v2.RandAugment(1, round(10 * min(max(strength, 0), 10)), 101, v2.InterpolationMode.BILINEAR, [128] * len(image))
        with torch.random.fork_rng(devices=[]):                 # torchvision draws from the global generator
            torch.manual_seed(seed)
            image = policy(image)
    return image


def mix(images, targets, mixup, cutmix, rng):
    """Mixup or cutmix, by turns if both alphas are above 0: (B, C, H, W), (B, classes) -> the same, of an even B.

    An image is mixed with its neighbour, in one proportion from Beta(alpha, alpha) for the whole batch; cutmix puts a box
    of it in place. rng: numpy's, the same in all processes. (torchvision's MixUp and CutMix pair the images that a process
    holds and draw from the global generator, so a run would depend on how a batch is split.)
    """
    if not mixup and not cutmix:
        return images, targets
    boxed = not mixup or (cutmix > 0 and rng.random() < 0.5)
    share = rng.beta(*[cutmix if boxed else mixup] * 2)         # of the image itself
    other = torch.arange(len(images), device=images.device) ^ 1
    if boxed:
        (H, W), (y, x) = images.shape[2:], rng.random(2)
        half = (1 - share) ** 0.5 / 2
        edges = (min(max(round((at + side) * n), 0), n) for at, n in ((y, H), (x, W)) for side in (-half, half))
        top, bottom, left, right = edges
        images, share = images.clone(), 1 - (bottom - top) * (right - left) / (H * W)
        images[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    else:
        images = share * images + (1 - share) * images[other]
    return images, share * targets + (1 - share) * targets[other]


def class_loss(scores, targets, loss, smoothing):
    """scores, targets (B, classes) -> a number. "ce": cross-entropy, targets smoothed. "bce": RSB's binary cross-entropy,
    every class that makes up more than a fifth of the image is there, the mean over images and classes.
    """
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(scores.float(), (targets > 0.2).float())
    return F.cross_entropy(scores.float(), targets, label_smoothing=smoothing)


# ---------------------------------------------------------------------------------------------------
# Optimisers
# ---------------------------------------------------------------------------------------------------

def layer_scale(model, decay):
    """name -> decay^(L + 1 - l), the factor on a ViT parameter's learning rate: l = 0 for the embeddings, block l's own
    1 .. L, L + 1 for what comes after (BEiT, A2 A.1). 1 throughout for decay 1.
    """
    embeddings = ("cls_token", "pos_embed", "patch_embed")

    def scale(name):
        if decay == 1:
            return 1.0
        after = len(model.blocks) + 1
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0 if name.startswith(embeddings) else after
        return decay ** (after - layer)
    return scale


class LAMB(torch.optim.Optimizer):
    """LAMB: You et al., Large Batch Optimization for Deep Learning (arXiv 1904.00962), Algorithm 2, with bias correction.

    u = m / (sqrt(v) + eps) + weight_decay w;  w <- w - lr |w| / |u| u, where the ratio of norms is 1 when either is 0.
    # differs from Algorithm 2: as in RSB's code, parameters without weight decay (biases, norms) keep the ratio 1. That code
    # also clips the gradient's norm to 1; A2's Table A2 says it does not.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
                t = state["step"] = state["step"] + 1
                m = state["exp_avg"].lerp_(w.grad, 1 - beta1)
                v = state["exp_avg_sq"].mul_(beta2).addcmul_(w.grad, w.grad, value=1 - beta2)
                u = (m / (1 - beta1 ** t)).div_((v / (1 - beta2 ** t)).sqrt_().add_(group["eps"]))
                u.add_(w, alpha=group["weight_decay"])
                ratio = 1.0
                if group["weight_decay"]:
                    of_w, of_u = w.norm(), u.norm()
                    ratio = torch.where((of_w > 0) & (of_u > 0), of_w / of_u, 1.0)
                w.sub_(u.mul_(group["lr"] * ratio))


# ---------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------

def measured_size(c):
    """[height, width] of what is measured: --test_size, or the training size."""
    return [c["test_size"]] * 2 if c["test_size"] else c["img_size"]


@torch.no_grad()
def evaluate(model, data, c, place, bad_files):
    """Accuracy over all images of `data`, each counted once however many processes share them: {top1, top5 in %, images},
    and for up to 40 classes the counts (true, predicted), else None. Every process calls it. Failure when more than 1% of
    the files cannot be read.
    """
    classes, size = len(data.classes), measured_size(c)
    small = classes <= 40
    confusion, first, fifth, bad = torch.zeros(classes, classes, dtype=torch.long) if small else None, 0, 0, 0
    rows, training = torch.arange(len(data))[place.rank::place.world], model.training
    model.eval()
    parts = data.plain(rows, 256, size, c["test_crop"], device=place.device, workers=c["workers"])
    shown = dict(desc="measuring", unit="batch", leave=False, delay=2, disable=place.rank > 0)
    for views, labels, unread in tqdm(parts, total=math.ceil(len(rows) / 256), **shown):
        bad += bad_files.meet(unread)
        if views is None:
            continue
        with torch.autocast(place.device.type, *AUTOCAST[c["amp"]]):
            top = model(views).float().topk(min(5, classes)).indices                           # (k, 5)
        hit = top == labels[:, None]
        first, fifth = first + int(hit[:, 0].sum()), fifth + int(hit.sum())
        if small:
            confusion += torch.bincount((labels * classes + top[:, 0]).cpu(), minlength=classes ** 2).view(classes, classes)
    model.train(training)
    first, fifth, bad, *counts = sum_over_processes([first, fifth, bad, *(confusion.flatten().tolist() if small else [])], place)
    if bad > 0.01 * len(data):
        files = bad_files.listed(place)
        raise Failure("" if place.rank else f"{int(bad)} of {len(data)} images to measure on cannot be read: "
                      f"mend or replace {files}")
    seen = len(data) - int(bad)
    figures = dict(top1=round(100 * first / seen, 2), top5=round(100 * fifth / seen, 2), images=seen)
    return figures, torch.tensor(counts).view(classes, classes).long() if small else None


def confusion_picture(confusion, classes):
    """Rows: what an image is, columns: what it was taken for, in % of the row. A Pillow picture."""
    from PIL import Image, ImageDraw, ImageFont
    font, cell, n = ImageFont.load_default(12), 34, len(classes)
    names = [name if len(name) < 15 else f"{i} {name[:10]}.." for i, name in enumerate(classes)]
    left, legend = 12 + max(int(font.getlength(name)) for name in names), "rows: true class, columns: predicted, % of the row"
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    width = max(left + n * cell + 8, 12 + int(font.getlength(legend)))
    picture = Image.new("RGB", (width, 26 + n * cell + left), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((6, 6), legend, "black", font)
    for i, name in enumerate(names):
        draw.text((left - 6 - font.getlength(name), 26 + i * cell + 9), name, "black", font)
        column = Image.new("RGB", (left, cell), "white")
        ImageDraw.Draw(column).text((0, 9), name, "black", font)
        picture.paste(column.rotate(-90, expand=True), (left + i * cell, 30 + n * cell))
        for j in range(n):
            s = float(share[i, j])
            colour = (int(255 - 205 * s), int(255 - 155 * s), 255) if i == j else (255, int(255 - 190 * s), int(255 - 190 * s))
            x, y = left + j * cell, 26 + i * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour, outline="lightgray")
            if s >= 0.005:
                text = f"{100 * s:.0f}"
                draw.text((x + (cell - font.getlength(text)) / 2, y + 9), text, "white" if s > 0.7 else "black", font)
    return picture


def write_confusion(c, place, confusion, classes):
    """confusion.png in --out, by rank 0. Every process calls it: Failure for all when it cannot be written."""
    trouble = ""
    if place.rank == 0:
        picture = confusion_picture(confusion, classes)
        try:
            pretrain.write_whole(os.path.join(c["out"], "confusion.png"), lambda file: picture.save(file, format="PNG"))
        except OSError as error:
            trouble = str(error)
    pretrain.all_stop(trouble, place)


def make_folder(c, place, same):
    """--out for a measurement, before the work and not after it. BadRequest for every process when it cannot be written to,
    or holds a training run, or a measurement with other values of what `same` names.
    """
    trouble, old = "", {}
    if place.rank == 0 and os.path.exists(os.path.join(c["out"], "checkpoint.pt")):
        trouble = f"{c['out']} holds a run with its own result: choose another --out"
    elif place.rank == 0 and os.path.exists(os.path.join(c["out"], "result.json")):
        with contextlib.suppress(OSError, ValueError), open(os.path.join(c["out"], "config.json")) as file:
            old = json.load(file)
        other = next((name for name in same if old.get(name) != c[name]), None)
        trouble = other and f"{c['out']} holds a result with {other} {old.get(other)}, not {c[other]}: choose another --out"
    pretrain.all_stop(trouble, place, BadRequest)
    pretrain.open_folder(c, place)


def baseline(c, figures, settings):
    """The run from random weights in a neighbouring folder, of the same `settings`, or how to make one."""
    folder = os.path.dirname(os.path.abspath(c["out"]))
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "result.json"))):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError), open(path) as file:     # others' may hold anything
            other = json.load(file)
            if other["weights"] == "none" and other["settings"] == settings:
                out = os.path.join(os.path.dirname(c["out"]), os.path.basename(os.path.dirname(path)))
                return dict(weights="none", out=out, **{k: other[k] for k in figures})
    given = {k: c.get(k) for k in ("model", "data", "img_size", "patch_size", "pool", "labels", "draw", "seed")}
    given["test_size"] = c["test_size"] or None                 # 0 follows from --img_size, and probe.py has no such option
    asked = " ".join(f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in given.items() if v is not None)
    asked += " --relative_positions" * c["relative_positions"]
    return dict(weights="none", missing=f"{c['script']}.py --weights none {asked}, and what else this command was given")


def report(c, figures, same):
    """Print the one line of results, and save it as result.json in --out. Beside it what to compare it with: the run from
    random weights with the same values of what `same` names, if it lies in a neighbouring folder, or how to get it.
    """
    out, shown = c["out"], ("script", "model", "data", "labels", "draw", "seed", "total_steps", "blocks", "weights")
    mine = {k: c[k] for k in shown if c.get(k) is not None} | figures
    if same:
        settings = json.dumps({k: c[k] for k in same if k != "weights"}, sort_keys=True)
        mine["settings"] = hashlib.sha1(settings.encode()).hexdigest()[:8]
    if same and c["weights"] != "none":
        mine["compared_with"] = baseline(c, figures, mine["settings"])
    line = json.dumps(mine)
    try:
        pretrain.write_whole(os.path.join(out, "result.json"), lambda file: file.write(line.encode() + b"\n"))
    except OSError as error:
        raise Failure(f"{error}. The result is {line}")
    print(line)


# ---------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------

def weights_options(p):
    """What finetune.py, probe.py and analyze.py ask about an encoder."""
    p.set_defaults(data=None, root=None)                        # those of the run in --weights; None: not given
    p.add_argument("--pool", choices=("cls", "mean"), help="a ViT's features: the cls token (BM), or the mean of the others; "
                   "default: that of the run, else mean with the small sets' recipe, cls with another")
    p.add_argument("--relative_positions", action="store_true", default=None,
                   help="the ViT has a relative position bias; default: as the run's")


def labels_options(p):
    """What finetune.py and probe.py ask about the labelled images."""
    p.add_argument("--labels", type=int, metavar="K", help="keep K labelled images a class; default: all")
    p.add_argument("--draw", type=int, metavar="N", help="which K images: the N-th random choice, whatever the seed; default: "
                   "that of --seed")


def options():
    p = pretrain.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    pretrain.common_options(p, SAYS)
    weights_options(p)
    labels_options(p)
    o = p.add_argument
    o("--recipe", choices=RECIPES,
      help="Table A2's, or one for a CPU; default: deit for a ViT, rsb_a3 for a ResNet, small for the small sets")
    o("--eval", action="store_true", help="only measure the classifier in --weights")
    def of_recipe(name, help, **more):
        o(name, help=f"{help}default: {pretrain.by_recipe(RECIPES, name[2:])}", **more)
    of_recipe("--optimizer", "", choices=("adamw", "lamb"))
    of_recipe("--layer_decay", "a ViT layer's learning rate over the next one's, for a ResNet 1; ", type=float)
    of_recipe("--drop_path", "stochastic depth of the last layer; ", type=float)
    of_recipe("--loss", "cross-entropy, or binary cross-entropy of each class; ", choices=("ce", "bce"))
    of_recipe("--smoothing", "of the labels; ", type=float)
    of_recipe("--rand_augment", "RandAugment's strength, 0 to 10, 0 for none, and its deviation; ", type=float, nargs=2,
              metavar=("M", "STD"))
    of_recipe("--mixup", "0 for none; ", type=float, metavar="ALPHA")
    of_recipe("--cutmix", "0 for none; ", type=float, metavar="ALPHA")
    of_recipe("--test_crop", "side of the central part that is measured; ", type=float)
    o("--test_size", type=int, metavar="PX",
      help="measure at this size, a ResNet only; default: 224 (rsb without --img_size), else the training size")
    return p


def open_weights(args):
    """--weights as a dict of what the file holds, or None. It fills in args' model, sizes and data from its run where they
    were not given; state["config"] is a run's of ours, or {}. BadRequest when it cannot be read, unless a checkpoint in --out
    is gone on with, which holds all weights.
    """
    state, config, measuring = None, {}, vars(args).get("eval")
    if args.weights != "none":
        args.weights = os.path.normpath(args.weights)
        path = None if measuring or not vars(args).get("resume") else pretrain.going_on(vars(args))
        if path:
            config = pretrain.load_checkpoint(path)["config"]
        else:
            with refusing():
                state = models.read_weights(args.weights)
            config = state.get("config")
            ours = isinstance(config, dict) and config.get("model") in models.MODELS and isinstance(config.get("img_size"), list)
            config = config if ours else {}                     # others' files may hold anything there
            state = dict(state, config=config)
    taken = ["data", "root", "model", "img_size", "patch_size", "relative_positions", "pool"]
    if measuring:                                               # as the run did; at the size that is asked for, if one is
        taken += ["recipe", "test_crop", *([] if args.img_size else ["test_size"])]
    trains = "recipe" in vars(args) and not measuring
    for name in taken:
        if name.endswith("_size") and args.model in models.RESNETS and not is_small(args.data or "shapes") and trains:
            continue                                            # a ResNet takes any size: the recipe's (RSB A3 trains at 160)
        if getattr(args, name) is None:
            setattr(args, name, config.get(name))
    args.data, args.root, args.relative_positions = args.data or "shapes", args.root or "data", bool(args.relative_positions)
    return state


def labelled_data(args, place):
    """--data's labelled images to train on, --labels of each class if given, and those to measure on, of the same classes.
    args.draw is then settled.
    """
    data, val = (pretrain.load_data(vars(args), place, split, labelled=True) for split in ("train", "val"))
    missing, extra = ([x for x in a if x not in b] for a, b in ((data.classes, val.classes), (val.classes, data.classes)))
    if missing or extra:
        differ = [f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
                  for what, names in (("without", missing), ("more:", extra)) if names]
        raise BadRequest(f"the classes of {args.data}/val are not those of train: {'; '.join(differ)}")
    if args.labels is None:
        if args.draw is not None:
            raise BadRequest(f"--draw {args.draw} does nothing without --labels")
        return data, val
    pretrain.not_negative(vars(args), "seed", "draw")
    args.draw = args.seed if args.draw is None else args.draw
    if args.labels < 1:
        raise BadRequest(f"--labels {args.labels} must be more than 0")
    return data.keep(few_labels(data.labels, args.labels, args.draw, data.classes)), val


def folder_name(script, c):
    """SCRIPT-WEIGHTS-DATA[-LABELS][-DRAW][-BLOCKS][-SEED], what a run's folder is called after."""
    folder = c["weights"].removesuffix(os.sep + "checkpoint.pt")
    base = os.path.basename(folder if os.path.isdir(folder) else os.path.splitext(folder)[0])
    if c["weights"] == "none":
        base = f"none-{c['model']}"
    labels = [str(c["labels"])] + [f"draw{c['draw']}"] * (c["draw"] != c["seed"]) if c.get("labels") else []
    more = [f"{k}{c[k]}" for k in ("blocks", "seed") if c.get(k)]
    return "-".join([script, base, os.path.basename(c["data"]), *labels, *more])


def is_small(data):
    return data == "shapes" or data in pretrain.TORCHVISION


def recipe_of(name, data, model):
    """A recipe by name as a new dict, for this data and model (None: the data's default)."""
    model = model or ("vit_micro" if is_small(data) or name == "small" else "vit_base")
    resnet = model in models.RESNETS
    recipe = dict(RECIPES[name], model=model)
    if is_small(data) or name == "small":
        recipe.update(dict(img_size=[64], patch_size=8) if resnet else dict(img_size=[32], patch_size=4), test_size=0)
    if resnet and name == "small":
        recipe.update(layer_decay=1.0, drop_path=0.0)
    return recipe


def refuse_for_resnet(args):
    """BadRequest for what only a ViT has."""
    if args.model in models.RESNETS and args.relative_positions:
        raise BadRequest(f"relative positions are a ViT's: {args.model} has no attention")
    if args.model in models.RESNETS and args.pool:
        raise BadRequest(f"--pool {args.pool} is a ViT's: a {args.model}'s features are the mean over its last map")


def choose_recipe(args, script):
    """The command line with its recipe's values, as a dict. BadRequest for what does not go together."""
    resnet = args.model in models.RESNETS
    name = args.recipe or ("small" if is_small(args.data) else "rsb_a3" if resnet else "deit")
    if name == "deit" and resnet or name.startswith("rsb") and not resnet:
        kind, other = ("ViT", "vit_base, or another ViT") if resnet else ("ResNet", "resnet50, or another ResNet")
        raise BadRequest(f"--recipe {name} is a {kind}'s: add --model {other}")
    refuse_for_resnet(args)
    c = dict(vars(args), recipe=name, script=script)
    if c["img_size"] and c["test_size"] is None:
        c["test_size"] = 0                                      # a size that was asked for is what is measured too
    pretrain.settle(c, recipe_of(name, args.data, args.model))
    if resnet:
        c["pool"] = None
    elif c["test_size"]:
        raise BadRequest(f"--test_size {c['test_size']} is for a ResNet: a ViT is measured at --img_size")
    if not 0 < c["test_crop"] <= 1:
        raise BadRequest(f"--test_crop {c['test_crop']} must be in (0, 1]")
    pretrain.not_negative(c, "test_size", "seed", "workers")
    return c


def resolve(args, place, data, measured):
    """The command line and the recipe as one dict of JSON values; measured: images of val. BadRequest for what cannot be run."""
    c = choose_recipe(args, "finetune")
    if c["model"] in models.VITS and not 0 < c["layer_decay"] <= 1 or c["model"] in models.RESNETS and c["layer_decay"] != 1:
        raise BadRequest(f"--layer_decay {c['layer_decay']} must be in (0, 1], and is a ViT's")
    for option in ("drop_path", "smoothing"):
        if not 0 <= c[option] < 1:
            raise BadRequest(f"--{option} {c[option]} must be in [0, 1)")
    if c["loss"] == "bce" and c["smoothing"]:
        raise BadRequest(f"--smoothing {c['smoothing']} does nothing with --loss bce: add --smoothing 0")
    if not 0 <= c["rand_augment"][0] <= 10:
        raise BadRequest(f"--rand_augment {c['rand_augment'][0]}: the magnitude is from 0 to 10")
    pretrain.not_negative(c, "mixup", "cutmix")
    pretrain.share_out(c, RECIPES[c["recipe"]], place, len(data), data.channels, folder_name("finetune", c))
    if args.save_every is None:                                 # measuring should stay below a tenth of the work
        c["save_every"] = max(math.ceil(c["total_steps"] / 20), math.ceil(5 * measured / c["batch_size"]))
    if (c["mixup"] or c["cutmix"]) and c["images_per_process"] % 2:
        raise BadRequest(f"mixup pairs neighbours, and {c['images_per_process']} images at once are odd: "
                         "choose another --batch_size or --accum, or --mixup 0 --cutmix 0")
    c.update(view=c["img_size"], classes=data.classes)
    return c


def load_model(c, state, place, classes=0, keep_head=False):
    """The encoder of c with a fresh head for so many classes (0: none), `state` loaded into it, its head too only with
    keep_head. -> model, models.Loaded or None. BadRequest when they do not suit each other.
    """
    torch.manual_seed(c["seed"])
    with refusing():
        model = models.encoder(c["model"], c["img_size"], c["patch_size"], c["channels"], classes, c["relative_positions"],
                               c["pool"] or "mean")
        if classes and c["model"] in models.VITS:
            nn.init.trunc_normal_(model.head.weight, std=2e-5)  # MAE's, so that fine-tuning begins with the encoder's features
        report = None
        if state is not None:
            weights, heads = models.tensors(state), () if keep_head else ("head.", "fc.")
            report = models.load_weights(model, {k: v for k, v in weights.items() if not k.startswith(heads)})
    return models.to_device(model, place.device), report


def optimizer_of(c, model):
    kind = LAMB if c["optimizer"] == "lamb" else functools.partial(torch.optim.AdamW, fused=True)
    groups = pretrain.parameter_groups(model, c["weight_decay"], layer_scale(model, c["layer_decay"]))
    return kind(groups, lr=c["actual_lr"], betas=tuple(c["betas"]))


def step_of(c, model, classes, device):
    """prepare and loss_of, as pretrain.train asks for them: mixed images, their targets, and the branches to drop -> loss."""
    def prepare(view, labels, step, part):
        kept, targets = None, F.one_hot(labels, classes).float()
        if c["drop_path"]:
            kept = models.drop_path(len(view), model.branches, c["drop_path"], seeded(c["seed"], DROP, step), part).to(device)
        return *mix(view, targets, c["mixup"], c["cutmix"], np.random.default_rng((c["seed"], MIX, step))), kept

    def loss_of(net, prepared):
        images, targets, kept = prepared
        with torch.autocast(device.type, *AUTOCAST[c["amp"]]):
            scores = net(images, kept)
        return class_loss(scores, targets, c["loss"], c["smoothing"])

    return prepare, loss_of


def measured_line(c, measured):
    """How many images are measured, and how, for the start of a run."""
    size = measured_size(c)
    return f"measured on {measured:,} at {size[0]}x{size[1]}, the central {c['test_crop']:g}"


def data_line(c, length, measured):
    """Recipe, model, data and what is measured, for the start of a run."""
    size, few = c["img_size"], f" ({c['labels']} a class, draw {c['draw']})" if c["labels"] else ""
    return (f"{c['recipe']}: {c['model']} from {c['weights']} on {c['data']}, {length:,} images of {len(c['classes'])} "
            f"classes{few}, input {size[0]}x{size[1]}, {measured_line(c, measured)}")


def recipe_line(c):
    """The recipe's values, for the start of a run."""
    return (f"{c['optimizer']}, layer decay {c['layer_decay']:g}, weight decay {c['weight_decay']:g}, gradient clip "
            f"{c['clip'] or 'off'}, loss {c['loss']}, smoothing {c['smoothing']:g}, drop path {c['drop_path']:g}, "
            f"RandAugment {c['rand_augment'][0]:g} {c['rand_augment'][1]:g}, mixup {c['mixup']:g}, cutmix {c['cutmix']:g}, "
            f"features: {c['pool'] or 'mean'}")


TRAINS = ("labels", "draw", "epochs", "steps", "batch_size", "accum", "lr", "weight_decay", "betas", "clip", "warmup", "crop",
          "resume", "save_every", "optimizer", "layer_decay", "drop_path", "loss", "smoothing", "rand_augment", "mixup", "cutmix",
          "compile")
MEASURED = ("weights", "model", "data", "img_size", "patch_size", "test_size", "test_crop", "pool")


def measure_only(args, state, place):
    """--eval: measure the classifier in --weights on the val images of --data. Returns the exit code."""
    given = [name for name in TRAINS if getattr(args, name) is not None and getattr(args, name) is not False]
    if given:
        raise BadRequest(f"--{given[0]} does nothing with --eval, which only measures")
    c = choose_recipe(args, "eval")
    val, weights = pretrain.load_data(c, place, "val", labelled=True), {} if state is None else models.tensors(state)
    head, classes = "fc.weight" if c["model"] in models.RESNETS else "head.weight", len(val.classes)
    if head not in weights or len(weights[head]) != classes:
        has = f"a classifier of {len(weights[head])} classes" if head in weights else "no classifier"
        raise BadRequest(f"--eval: {c['weights']} has {has}, {c['data']} has {classes} classes: "
                         "give a fine-tuned run, and the --data it was made for")
    known = state["config"].get("classes", val.classes)
    if known != val.classes:
        other = next((a, b) for a, b in zip(known, val.classes) if a != b)
        raise BadRequest(f"--eval: the classes of {c['weights']} are not those of {c['data']}: {other[0]} there is {other[1]} "
                         "here")
    c.update(channels=val.channels, workers=pretrain.loaders(c["workers"], place), amp=pretrain.precision(c["amp"], place.device),
             device=str(place.device), out=c["out"] or os.path.join("runs", folder_name("eval", c)))
    model, loaded = load_model(c, state, place, classes, keep_head=True)
    if loaded.missing:
        raise BadRequest(f"--eval: {c['weights']} lacks {', '.join(loaded.missing[:4])} ({len(loaded.missing)}) of a "
                         f"{c['model']}: its scores would mean nothing")
    c.update({k: state["config"].get(k) for k in ("labels", "draw", "seed")})                  # the run's; others' are not known
    make_folder(c, place, MEASURED)
    if place.rank == 0:
        print(loaded, f"{c['model']} from {c['weights']} on {c['data']}, {measured_line(c, len(val))}, "
              f"features: {c['pool'] or 'mean'}", pretrain.device_line(c, place), sep="\n", flush=True)
    figures, confusion = evaluate(model, val, c, place, pretrain.BadFiles(len(val), 1))
    if confusion is not None:
        write_confusion(c, place, confusion, val.classes)
    if place.rank == 0:
        report(c, figures, ())
    return 0


def run(args):
    """One fine-tuning, or with --eval one measurement, from the command line's options. Returns the exit code."""
    state, place = open_weights(args), pretrain.set_up(args.device)
    if args.eval:
        return measure_only(args, state, place)
    main, device = place.rank == 0, place.device
    data, val = labelled_data(args, place)
    c = resolve(args, place, data, len(val))
    classes = len(data.classes)
    model, loaded = load_model(c, state, place, classes)
    del state                                                   # with an optimiser's moments it may be three times the model
    if main and loaded:
        print(loaded)
    if c["model"] in models.VITS:
        model.pos_embed.requires_grad_(True)                    # as in MAE's and BM's fine-tuning
    optimizer = optimizer_of(c, model)
    scaler = torch.amp.GradScaler(device.type, enabled=c["amp"] == "fp16")
    start, progress, log = pretrain.begin(c, place, model, optimizer, scaler, SAME_RUN)
    if main:
        print(data_line(c, len(data), len(val)), pretrain.batch_line(c, len(data)), recipe_line(c),
              pretrain.device_line(c, place, start), sep="\n", flush=True)
    last, bad_files, (prepare, loss_of) = {}, pretrain.BadFiles(len(val), 1), step_of(c, model, classes, device)
    known = {line["step"] for line in log.lines if "top1" in line}          # measured before the run was stopped

    def check(step):
        finite = all(x.isfinite().all() for x in model.state_dict().values())
        if sum_over_processes([float(finite)], place)[0] < place.world and main:
            return "the weights are not finite. Begin again in another --out with a lower --lr or a longer --warmup", {}
        return "", {}

    def measure(step):
        figures, confusion = evaluate(model, val, c, place, bad_files)
        last.update(figures)
        if main:
            tqdm.write(f"step {step}: top-1 {figures['top1']}%, top-5 {figures['top5']}%")
        if step not in known:                                   # else a finished run is measured again
            log(step=step, epoch=round(step * c["batch_size"] / len(data), 4), **figures)
        if confusion is not None:
            write_confusion(c, place, confusion, data.classes)

    missed = main and start not in known and (start == c["total_steps"] or start > 0 and start % c["save_every"] == 0)
    if sum_over_processes([float(missed)], place)[0]:           # stopped between saving and measuring
        measure(start)
    magnitude, deviation = c["rand_augment"]
    augment = functools.partial(rand_augment, magnitude=magnitude, deviation=deviation) if magnitude else None
    code = pretrain.train(c, place, data, model, optimizer, scaler, start, progress, log, prepare, loss_of, check, measure,
                          augment)
    if not code and not last:
        measure(start)
    if main and code:
        print(pretrain.stopped(code))
    elif main:
        report(c, last, SAME_RUN)
    return code


if __name__ == "__main__":
    sys.exit(pretrain.command(run, options))
