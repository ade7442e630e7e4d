"""Every figure of the two papers, one command each: *Beyond Masking* (BM) Fig. 2, 3, 5, *A2MIM* (A2) sections 3.1 to 3.3,
Fig. 1, 3, 5, A1 to A3, appendix B.

    python analyze.py reconstruct RUN ...     BM Fig. 3, A2 Fig. 5, A3: view, what the encoder sees, recovered; mean MSE
    python analyze.py curves RUN ...          BM Fig. 2, 5: loss and accuracy against epochs
    python analyze.py occlusion RUN ...       A2 Fig. 1 a-d: top-1 against the share of patches dropped
    python analyze.py interaction RUN ...     A2 Fig. 1 e-h: strength of the interactions of two patches, by order
    python analyze.py fourier RUN ...         A2 Fig. 3a: high frequencies in the feature maps, by depth
    python analyze.py variance RUN ...        A2 Fig. 3b: spatial variance of the feature maps, by depth

RUN is a folder that pretrain.py or finetune.py left, a file with timm's, MAE's or torchvision's names, or none: random
weights, for reference. --out gets NAME.json, every number, and NAME.png, all runs on one sheet; curves want matplotlib. On
two CPU cores and the built-in data each takes seconds to two minutes; --paper takes the papers' sample counts. --resume goes
on with a stopped one. Nothing is random but by --seed, and all runs are shown the same images, each at its own size and crop.

B batch, C channels, H x W pixels, p patch size, N patches, L blocks. visible (k, N) bool: True = the patch is shown.
"""
import argparse
import itertools
import json
import math
import os
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import degrade
import finetune
import losses
import models
import pretrain
import probe
from pretrain import AUTOCAST, CHOSEN, CONTEXTS, HIDDEN, PAIRS, PICTURE, BadRequest, seeded

# ---------------------------------------------------------------------------------------------------
# The definitions
# ---------------------------------------------------------------------------------------------------

RATIOS = (0.0, 0.05, *(r / 10 for r in range(1, 10)), 0.95, 1.0)      # orders m = r (n - 2); occlusion stops before 1


def showing(images, visible, p, base):
    """Patches that are not `visible` (B, N) replaced by the colour `base` (C,): (B, C, H, W)."""
    pixels = degrade.patch_pixels(visible, p, [side // p for side in images.shape[2:]])
    return torch.where(pixels, images, base.view(-1, 1, 1))


def occlusion(classify, images, labels, p, base, ratios, repeats, generator):
    """How many images (B, C, H, W) are classified right with a share of their patches dropped (A2 3.1): (ratios, repeats)
    counts. Each image loses its own patches, the same number; the ratio 0 is measured once.

    # differs from the authors' tool: there all images of a batch lose the same patches.
    """
    grid, hits = [side // p for side in images.shape[2:]], torch.zeros(len(ratios), repeats, dtype=torch.long)
    for (i, ratio), repeat in itertools.product(enumerate(ratios), range(repeats)):
        if ratio or not repeat:
            hidden = degrade.random_mask(len(images), grid, ratio, generator=generator).to(images.device)
            hits[i, repeat] = (classify(showing(images, ~hidden, p, base)).argmax(1) == labels).sum()
        else:
            hits[i, repeat] = hits[i, 0]
    return hits


def log_odds(scores, labels):
    """f of A2 B.2, log p / (1 - p) of the true class: scores (k, classes), labels (k,) -> (k,)."""
    others = scores.scatter(1, labels[:, None], -math.inf)
    return scores.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def game(classify, image, label, p, base):
    """f of one image (1, C, H, W), label (1,), as a game of its patches: visible (k, N) bool -> log-odds (k,), the patches
    outside the set replaced by the colour `base` (C,). 512 forward passes go together, or 4 million pixels.
    """
    at_once = max(1, min(512, 2 ** 22 // math.prod(image.shape[2:])))

    def f(visible):
        parts = visible.to(image.device).split(at_once)
        return torch.cat([log_odds(classify(showing(image, some, p, base)), label.expand(len(some))) for some in parts]).cpu()
    return f


def near_pairs(grid, distance=2):
    """Every pair of patches at most `distance` rows and columns from each other, each once: (pairs, 2) int64."""
    row, column = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    apart = torch.maximum(*((x[:, None] - x).abs() for x in (row, column)))
    return ((apart > 0) & (apart <= distance)).triu().nonzero()


def interactions(f, n, pairs, orders, contexts, generator):
    """I^(m)(i, j) of n players for each pair (P, 2) and each order m (A2 eq. 1), and its standard error: (P, orders) both.

    f: visible (k, n) bool -> (k,) scores. The mean over `contexts` random sets S of m other players; over all sets, without
    error, where there are no more of them. The orders share their random numbers: a pair's larger sets hold its smaller ones.
    """
    P = len(pairs)
    order = torch.rand(P, contexts, n, generator=generator)
    order = order.scatter(2, pairs[:, None].expand(-1, contexts, -1), 2.0).argsort(2).argsort(2)           # i and j come last
    others = torch.tensor([[x for x in range(n) if x not in pair] for pair in pairs.tolist()])             # (P, n - 2)
    sets, exact = [], []
    for m in orders:
        exact.append(math.comb(n - 2, m) <= contexts)
        if exact[-1]:
            every = torch.tensor(list(itertools.combinations(range(n - 2), m)), dtype=torch.long)          # (sets, m)
            S = torch.zeros(P, len(every), n, dtype=torch.bool).scatter_(2, others[:, every], True)
        else:
            S = order < m
        S = S[:, :, None].repeat(1, 1, 4, 1)                                                   # (P, sets, 4, n)
        for which, players in enumerate(((0, 1), (0,), (1,), ())):
            for player in players:                              # S + i + j, S + i, S + j, S
                S[:, :, which].scatter_(2, pairs[:, None, player:player + 1].expand(-1, S.shape[1], 1), True)
        sets.append(S.flatten(0, 2))
    mean, error = torch.zeros(P, len(orders)), torch.zeros(P, len(orders))
    for i, scores in enumerate(f(torch.cat(sets)).split([len(S) for S in sets])):
        both, first, second, neither = scores.view(P, -1, 4).unbind(2)
        difference = both - first - second + neither                                           # (P, sets)
        mean[:, i] = difference.mean(1)
        error[:, i] = 0 if exact[i] else difference.std(1) / difference.shape[1] ** 0.5
    return mean, error


def relative_strength(strength):
    """J^(m) (A2 eq. 2) from the mean |I^(m)| of each image, (images, orders): (orders,), whose mean is one; and its standard
    error over images, by the jackknife, as a list, or None for one image.
    """
    strength, n = strength.double().clamp(min=1e-30), len(strength)
    without = strength.sum(0) - strength                        # one image at a time left out
    each = without / without.mean(1, keepdim=True)
    error = ((n - 1) / n * (each - each.mean(0)).square().sum(0)).sqrt().tolist() if n > 1 else None
    return strength.mean(0) / strength.mean(), error


def share_between(x, J, low, high):
    """Of the area under J over x in [0, 1], straight between its points, the share between low and high in %."""
    def area(a, b):
        at = np.linspace(a, b, 1001)
        return np.trapezoid(np.interp(at, x, J), at)
    return 100 * area(low, high) / area(0, 1)


def log_amplitude(maps):
    """Log amplitude of the spectrum of feature maps (B, C, h, w) along its diagonal, from frequency 0 to the highest, less
    that at 0, averaged over channels (A2 B.3): (B, n + 1), n = min(h, w) // 2. The frequencies are k / n of the highest, which
    is pi for even sides and pi (h - 1) / h for odd ones. White noise: 0, but +.35 at what is not real (odd sides, the middle).

    # differs from the authors' tool: it leaves out the highest frequency of even sides.
    """
    h, w = maps.shape[2:]
    n = min(h, w) // 2
    rows, columns = ([round(side // 2 * k / max(n, 1)) for k in range(n + 1)] for side in (h, w))
    amplitude = torch.fft.fft2(maps.float())[:, :, rows, columns].abs()                        # (B, C, n + 1)
    amplitude = (amplitude + 1e-6).log().mean(1)
    return amplitude - amplitude[:, :1]


def spatial_variance(maps):
    """Variance over the positions of feature maps (B, C, h, w), averaged over channels (A2 3.3): (B, 1)."""
    return maps.float().var((2, 3), correction=0).mean(1, keepdim=True)


def feature_maps(model, images, look):
    """[look(map (B, C, h, w)) of each block's output, first to last]. A ViT's map is its patch tokens on their grid."""
    found, resnet = [], isinstance(model, models.ResNet)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4) if resnet else (model.blocks,)
    blocks = [block for stage in stages for block in stage]

    def keep(_, __, z):
        found.append(look(z if resnet else z[:, 1:].transpose(1, 2).unflatten(2, model.grid)))

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        model.encode(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


# ---------------------------------------------------------------------------------------------------
# Runs, images, results
# ---------------------------------------------------------------------------------------------------

NOT_FINITE = "what was measured is not finite: try --amp off, or look at the weights"


class Stopped(BaseException):
    """By a signal. What was measured is saved on its way."""


def stop(number, frame):
    """Answers SIGTERM and Ctrl-C at once: files are written whole."""
    raise Stopped(number)


class Results:
    """NAME.json in --out: {analysis, settings, runs: {label: numbers}, ...}; while a run is measured also what was found for
    each part of its images, so that --resume goes on there.
    """

    def __init__(self, args, settings):
        self.path, self.saved = os.path.join(args.out, f"{args.name}.json"), time.monotonic()
        self.all = dict(analysis=args.name, settings=settings, runs={}, parts={}, **pretrain.provenance())
        try:
            os.makedirs(args.out, exist_ok=True)
            if os.path.exists(self.path) and args.name != "curves":                            # a matter of a second
                with open(self.path) as file:
                    self._take(json.load(file), args.resume)
            pretrain.write_whole(f"{self.path}.try", lambda file: None)                         # before the work, not after it
            os.remove(f"{self.path}.try")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"{self.path} cannot be used: {error!r}. Choose another --out, or delete it")

    def _take(self, there, resume):
        if not resume:
            raise BadRequest(f"{self.path} is there already: --resume goes on with it and adds runs, another --out keeps it, "
                             "or delete it")
        for name, asked in self.all["settings"].items():
            had = there["settings"].get(name)
            if had != asked:
                raise BadRequest(f"{self.path} was made with {name} {had}, this command asks for {asked}: give the same, or "
                                 "another --out")
        self.all.update(runs=there["runs"], parts=there["parts"])

    def save(self):
        try:
            text = json.dumps(self.all, allow_nan=False)
        except ValueError:
            raise pretrain.Failure(NOT_FINITE)
        try:
            pretrain.write_whole(self.path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise pretrain.Failure(f"{error}. Make room, or choose another --out")
        self.saved = time.monotonic()

    def has(self, run):
        """Whether the numbers of a run, as it is now, are there already."""
        return self.all["runs"].get(run.label, {}).get("of") == run.of()

    def done(self, run, numbers):
        self.all["runs"][run.label] = dict(numbers, of=run.of())
        self.all["parts"].pop(run.label, None)
        self.save()

    def over_images(self, run, data, rows, chunk, size, look, place):
        """[look(views, labels, first)] for every `chunk` images of `rows`, what is there already not again. Failure when
        more than 1% of them cannot be read.
        """
        of_run = self.all["parts"].get(run.label)
        if not of_run or of_run["of"] != run.of():              # other weights, or sizes, by now
            of_run = self.all["parts"][run.label] = dict(of=run.of(), found=[])
        parts, total, bad_files = of_run["found"], math.ceil(len(rows) / chunk), pretrain.BadFiles(len(rows), 1)
        views = data.plain(rows[len(parts) * chunk:], chunk, size, run.c["test_crop"], device=place.device,
                           workers=run.c["workers"])
        try:
            for view, labels, unread in tqdm(views, run.label, total, initial=len(parts), leave=False, unit="part"):
                bad_files.meet_few(unread, place)
                with torch.inference_mode():
                    parts.append(None if view is None else look(view, labels, len(parts) * chunk))
                if time.monotonic() > self.saved + 20:
                    self.save()
        except Stopped:
            self.save()
            raise
        return some([part for part in parts if part is not None], run)


class Run(NamedTuple):
    label: str                          # in legends and results
    c: dict                             # configuration: model, sizes, precision
    state: dict | None                  # what its file holds; None: random weights

    def of(self):
        """What its numbers depend on, besides the settings of the analysis: JSON values."""
        path = os.path.join(self.c["weights"], "checkpoint.pt") if os.path.isdir(self.c["weights"]) else self.c["weights"]
        written = os.path.getmtime(path) if self.state else None
        names = ("model", "img_size", "patch_size", "pool", "test_crop", "task", "settings", "norm_target")
        return dict(weights=self.c["weights"], written=written, **{k: self.c.get(k) for k in names})


def folder_of(weights):
    """A run's folder, of its checkpoint's path too."""
    return os.path.normpath(weights).removesuffix(os.sep + "checkpoint.pt")


def labels_of(weights):
    """A short name for each run, of as many of its last folders as tell it from the others."""
    whole = [folder_of(w) for w in weights]
    paths = [w.split(os.sep) for w in whole]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise BadRequest(f"{next(w for w in whole if whole.count(w) > 1)} is given twice")


def open_runs(args, place):
    """The encoders of args.runs, each with its own model and sizes, on one --data. `none` is like the first other one."""
    runs, first, own_to_a_run = {}, None, dict.fromkeys(("model", "recipe", "test_size", "test_crop"))
    says_least_last = lambda x: (x[1] == "none", not os.path.isdir(folder_of(x[1])))           # runs, files of weights, none
    for label, weights in sorted(zip(labels_of(args.runs), args.runs), key=says_least_last):
        own = argparse.Namespace(**{**vars(args), **own_to_a_run, "weights": weights, "eval": True})
        if weights == "none" and first:
            for name in ("model", "img_size", "patch_size", "pool", "relative_positions", "test_crop"):
                setattr(own, name, first[name])
        state = finetune.open_weights(own)
        own.model = own.model or args.model                     # a run says its own, a file of weights alone does not
        if args.data is None and first and not (state or {}).get("config"):
            own.data, own.root = first["data"], first["root"]
        if args.data is None and first and own.data != first["data"]:
            raise BadRequest(f"{first['weights']} is of {first['data']}, {weights} of {own.data}: say which images with --data")
        c = finetune.choose_recipe(own, "analyze")
        c.update(img_size=finetune.measured_size(c), amp=pretrain.precision(c["amp"], place.device),
                 workers=pretrain.loaders(c["workers"], place), labels=None)
        first = first or c
        runs[label] = Run(label, c, state)
    if args.model and args.model not in [run.c["model"] for run in runs.values()]:
        raise BadRequest(f"--model {args.model} is for files of weights alone: these runs say their own")
    return [runs[label] for label in labels_of(args.runs)]


def choose_images(data, count, seed):
    """`count` rows of a set, all if there are fewer: (n,) int64."""
    return torch.randperm(len(data), generator=seeded(seed, CHOSEN))[:count].sort().values


def some(found, run):
    """`found`, of the images of a run. Failure when it is empty."""
    if not found:
        raise pretrain.Failure(f"not one image of {run.c['data']} can be read")
    return found


def mean_colour(data, run, seed, place):
    """The mean of each channel over 1,000 images of the set, all if there are fewer: (C,)."""
    rows = choose_images(data, 1000, seed)
    parts = data.plain(rows, 250, run.c["img_size"], run.c["test_crop"], device=place.device, workers=run.c["workers"])
    return torch.cat(some([views.mean((2, 3)) for views, _, _ in parts if views is not None], run)).mean(0)


FIT = 10000                                                     # images a linear layer is fitted to, where the run has none


def classifier(run, val, args, place):
    """The run's own classifier of val's classes, or its encoder, frozen, with a linear layer fitted by probe.py to the
    training images -> images -> scores (k, classes), float32, Failure if not finite; what it is in words.
    """
    c, classes, weights = run.c, len(val.classes), {} if run.state is None else models.tensors(run.state)
    head = weights.get("fc.weight" if c["model"] in models.RESNETS else "head.weight")
    if head is not None and len(head) == classes and run.state["config"].get("classes", val.classes) == val.classes:
        model, loaded = finetune.load_model(c, run.state, place, classes, keep_head=True)
        if not loaded.missing:
            return scored(model.eval(), c, place), "its own classifier"
    model = finetune.load_model(c, run.state, place)[0].eval().requires_grad_(False)
    train = pretrain.load_data(c, place, "train", labelled=True)
    if train.classes != val.classes:
        raise BadRequest(f"the classes of {c['data']}/val are not those of train")
    train = train if args.paper else train.keep(choose_images(train, FIT, c["seed"]))
    features, labels, _ = probe.gather(model, train, c, place, f"{run.label}: features")
    head = probe.linear_probe(features, labels, classes, c["model"] in models.RESNETS, c["seed"])
    kind = f"a linear layer on its frozen features, fitted to {len(labels):,} images"
    return scored(nn.Sequential(model, head), c, place), kind


def scored(model, c, place):
    """images -> the model's scores, float32, computed in --amp's precision. Failure when they are not finite."""
    def classify(images):
        with torch.autocast(place.device.type, *AUTOCAST[c["amp"]]):
            scores = model(images).float()
        if not scores.isfinite().all():
            raise pretrain.Failure(NOT_FINITE)
        return scores
    return classify


# ---------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------

def draw(panels, path, again):
    """Curves into a PNG, if matplotlib is there. panels: [{title, x, y, lines: [(label, xs, ys, their errors or None)],
    more}].
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return print(f"the numbers are all there; for the curves, {path}, pip install matplotlib, then {again}")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels):
        for label, x, y, error in panel["lines"]:
            line, = axis.plot(x, y, label=label, marker="o" if len(x) < 40 else "", markersize=3,
                              linestyle="--" if label == "none" else "-")
            if error is not None:
                low, high = ([at + sign * e for at, e in zip(y, error)] for sign in (-1, 1))
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"], **panel.get("more", {}))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    pretrain.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)
    print(f"drawn: {path}")


def finish(args, results, panels, says):
    """Draw, and say what there is to see."""
    results.save()
    again = "the same command" + (" with --resume" if args.name != "curves" else "")
    draw(panels, os.path.join(args.out, f"{args.name}.png"), again)
    print(f"{says}\nnumbers: {results.path}")


def sums(per_image):
    """Per-image values, a list over blocks of (B, values) -> JSON: how many, sums, sums of squares."""
    per_image = [x.cpu().double() for x in per_image]
    return dict(n=len(per_image[0]), sum=[x.sum(0).tolist() for x in per_image],
                square=[x.square().sum(0).tolist() for x in per_image])


def mean_and_error(parts):
    """What `sums` found of all parts -> two lists over blocks of lists: the mean over images, its standard error."""
    n = sum(part["n"] for part in parts)
    total, square = ([torch.tensor(block, dtype=torch.float64).sum(0) for block in zip(*(part[k] for part in parts))]
                     for k in ("sum", "square"))
    means = [x / n for x in total]
    errors = [((s / n - m * m).clamp(min=0) / max(n - 1, 1)).sqrt() for s, m in zip(square, means)]
    return [m.tolist() for m in means], [e.tolist() for e in errors]


def measured(args, place, settings, chunk, prepare, labelled=False):
    """What four of the figures share: every run is shown the same images, `chunk` at once -> results, [(label, its numbers)].

    prepare(run, data) -> look(views, labels, first), a part of the answer as JSON values; numbers(parts), the answer.
    """
    runs = open_runs(args, place)
    data = pretrain.load_data(runs[0].c, place, "val", labelled=labelled)
    rows = choose_images(data, args.images or len(data), args.seed)
    results = Results(args, dict(data=runs[0].c["data"], images=len(rows), seed=args.seed, amp=runs[0].c["amp"], **settings))
    for run in runs:
        if not results.has(run):
            run.c["channels"] = data.channels
            try:
                look, numbers = prepare(run, data)
            except BadRequest as error:
                raise BadRequest(f"{run.label}: {error}")
            results.done(run, numbers(results.over_images(run, data, rows, chunk, run.c["img_size"], look, place)))
    return results, [(run.label, results.all["runs"][run.label]) for run in runs]


def of_maps(args, place, value):
    """value(map) of the blocks' outputs: results, [(label, depth of each block from 1/L to 1, its mean over images, its standard
    error)]. A map of one position (of one row, for the frequencies) has nothing but 0, and is left out.
    """
    def prepare(run, data):
        model = finetune.load_model(run.c, run.state, place)[0].eval()

        def look(views, labels, first):
            with torch.autocast(place.device.type, *AUTOCAST[run.c["amp"]]):
                return sums(feature_maps(model, views, value))

        def numbers(parts):
            mean, error = mean_and_error(parts)
            return dict(images=sum(part["n"] for part in parts), mean=mean, error=error)
        return look, numbers
    results, runs, lines = *measured(args, place, {}, 64, prepare), []
    for label, r in runs:
        depths = [(i + 1) / len(r["mean"]) for i in range(len(r["mean"]))]
        blocks = [block for block in zip(depths, r["mean"], r["error"]) if any(block[1])]
        if not blocks:
            raise BadRequest(f"{label}: its maps are too small for this: choose a larger --img_size")
        lines.append((label, *map(list, zip(*blocks))))
    left = "; ".join(f"{label} after depth {at[-1]:.2g}" for label, at, _, _ in lines if at[-1] < 1)
    return results, lines, f" Left out, maps one position high: {left}." if left else ""


def fourier(args, place):
    results, runs, left = of_maps(args, place, log_amplitude)
    high = [(label, at, [m[-1] for m in mean], [e[-1] for e in error]) for label, at, mean, error in runs]
    whole = [(label, np.linspace(0, 1, len(mean[-1])).tolist(), mean[-1], error[-1]) for label, _, mean, error in runs]
    panels = [dict(title="High frequencies in the feature maps", x="depth, block / blocks",
                   y=r"$\Delta$ log amplitude, highest frequency less 0", lines=high),
              dict(title="Spectrum of the last block's maps", x=r"frequency along the diagonal, of the highest",
                   y="log amplitude (natural) less that at 0", lines=whole)]
    last = "; ".join(f"{label} {y[-1]:.2f} ± {error[-1]:.2f}" for label, _, y, error in high)
    average = "; ".join(f"{label} {sum(y) / len(y):.2f}" for label, _, y, _ in high)
    finish(args, results, panels,
           "Lower is smoother: the more negative, the more a block's maps have been low-pass filtered; white noise has 0. A2 "
           "found that masked modelling and inpainting filter more than contrastive or supervised training (ResNet-50, Fig. 3a). "
           f"Last block: {last}. Mean over blocks: {average}.{left}")


def variance(args, place):
    results, runs, left = of_maps(args, place, spatial_variance)
    lines = [(label, at, [m for m, in mean], [e for e, in error]) for label, at, mean, error in runs]
    panel = dict(title="Variance of the feature maps", x="depth, block / blocks", y="spatial variance, mean over channels",
                 lines=lines, more=dict(yscale="log"))
    ends = "; ".join(f"{label} {y[0]:.3g}, {y[-1]:.3g}" for label, _, y, _ in lines)
    finish(args, results, [panel],
           "How much a block's maps differ from place to place. A2 found that masked modelling lowers it and other pre-training "
           "raises it (ResNet-50, Fig. 3b); the scale of a network's features counts too, so compare one architecture's curves "
           f"by their course. First and last block: {ends}.{left}")


def grid_of(c):
    return [side // c["patch_size"] for side in c["img_size"]]


def judged(runs):
    """By what each run was judged, in words."""
    return "Judged: " + "; ".join(f"{label} by {r['classifier']}" for label, r in runs) + "."


def occlude(args, place):
    ratios = RATIOS[:-1]

    def prepare(run, val):
        (classify, kind), grid = classifier(run, val, args, place), grid_of(run.c)
        base = mean_colour(val, run, args.seed, place) if args.fill == "mean" else torch.zeros(val.channels, device=place.device)

        def look(views, labels, first):
            hits = occlusion(classify, views, labels, run.c["patch_size"], base, ratios, args.repeats,
                             seeded(args.seed, HIDDEN, first))
            return dict(n=len(views), hits=hits.tolist())

        def numbers(parts):
            seen = sum(part["n"] for part in parts)
            top1 = 100 * sum(torch.tensor(part["hits"]) for part in parts) / seen              # (ratios, repeats)
            return dict(classifier=kind, images=seen, patches=math.prod(grid), top1=top1.tolist(), mean=top1.mean(1).tolist(),
                        deviation=top1.std(1).tolist() if args.repeats > 1 else None,
                        dropped=[int(degrade.random_mask(1, grid, r).sum()) for r in ratios])
        return look, numbers
    settings = dict(repeats=args.repeats, fill=args.fill, fitted="all" if args.paper else FIT)
    results, runs = measured(args, place, settings, 128, prepare, labelled=True)
    lines = [(label, [k / r["patches"] for k in r["dropped"]], r["mean"], r["deviation"]) for label, r in runs]
    half = [min(range(len(x)), key=lambda i: abs(x[i] - 0.5)) for _, x, _, _ in lines]
    panel = dict(title=f"Robustness against occlusion, {args.repeats} repeats", x="share of the patches dropped",
                 y="top-1 accuracy, %", lines=lines, more=dict(ylim=(0, None)))
    kept = "; ".join(f"{label} {y[0]:.1f}% and {y[i]:.1f}%, {100 * y[i] / max(y[0], 1e-9):.0f}% of it left"
                     for (label, _, y, _), i in zip(lines, half))
    finish(args, results, [panel],
           "The longer a curve stays up, the less a network needs any one patch. A2 found that a ViT-S with masked modelling "
           "behind it is robust up to 80% dropped, and from scratch is not (Fig. 1 a). Nothing dropped and half dropped: "
           f"{kept}. {judged(runs)}")


def interact(args, place):
    if args.amp == "auto":                      # a difference of four scores: where it is small, bf16 rounds it away
        args.amp = "off"

    def prepare(run, val):
        grid, p = grid_of(run.c), run.c["patch_size"]
        n, near = math.prod(grid), near_pairs(grid, args.distance)
        if n < 3 or not len(near):
            raise BadRequest(f"--distance {args.distance}: {grid[0]}x{grid[1]} patches have no such pairs with others about them")
        (classify, kind), base = classifier(run, val, args, place), mean_colour(val, run, args.seed, place)
        orders = sorted({round(r * (n - 2)) for r in RATIOS})

        def look(views, labels, first):                         # one image
            pairs = near[torch.randperm(len(near), generator=seeded(args.seed, PAIRS, first))[:args.pairs]]
            I, error = interactions(game(classify, views, labels, p, base), n, pairs, orders, args.contexts,
                                    seeded(args.seed, CONTEXTS, first))
            return [I.abs().mean(0).tolist(), error.mean(0).tolist()]

        def numbers(parts):
            strength, error = torch.tensor(parts).unbind(1)                                    # (images, orders)
            J, J_error = relative_strength(strength)
            return dict(classifier=kind, images=len(parts), players=n, orders=orders, J=J.tolist(), J_error=J_error,
                        strength=strength.mean(0).tolist(), context_error=error.mean(0).tolist(),
                        strength_of_image=strength.tolist())
        return look, numbers
    settings = dict(pairs=args.pairs, contexts=args.contexts, distance=args.distance, fitted="all" if args.paper else FIT)
    results, runs = measured(args, place, settings, 1, prepare, labelled=True)
    lines = [(label, [m / (r["players"] - 2) for m in r["orders"]], r["J"], r["J_error"]) for label, r in runs]
    panel = dict(title="Strength of interactions", x="order m / (n - 2), patches about the pair",
                 y=r"$J^{(m)}$, relative to the mean over orders", lines=lines, more=dict(ylim=(0, None)))
    middle = "; ".join(f"{label} {share_between(x, J, 0.05, 0.5):.0f}% and {share_between(x, J, 0.1, 0.55):.0f}%"
                       for label, x, J, _ in lines)
    worst = [max(e / max(s, 1e-12) for e, s in zip(r["context_error"], r["strength"])) for _, r in runs]
    noise = "; ".join(f"{100 * error:.0f}% ({label})" for (label, _), error in zip(runs, worst))
    finish(args, results, [panel],
           "Where a curve is high, the answer depends on two patches together when that share of the others is shown; networks "
           "are strong at both ends. A2 found that masked modelling strengthens the middle: .05 to .5 in ViT-S, .1 to .55 in "
           f"ResNet-50 (Fig. 1 e, g). Share of the area under J there, 45% were it flat: {middle}. With {args.contexts} "
           f"contexts a pair's value has a standard error of up to {noise} of the strength, which lifts the orders between "
           f"the ends: more --contexts lower it. {judged(runs)}")


def recovery_of(args, weights, place):
    """How the images of a run of pretrain.py are damaged and recovered -> its configuration, its file. For an MAE file, which
    says nothing of it: by --task and its like.
    """
    with pretrain.refusing():
        state = models.read_weights(weights)
    config = state.get("config")
    if isinstance(config, dict) and "settings" in config:
        c = dict(config, **{name: getattr(args, name) for name in ("data", "root") if getattr(args, name)})
    elif isinstance(config, dict):
        raise BadRequest(f"{weights} recovers no image: give the run of pretrain.py it began with")
    else:
        own = pretrain.options().parse_args([])
        given = {name: vars(args)[name] for name in ("data", "root", "download", *OF_A_FILE)}
        vars(own).update({"task": "mask", **{name: value for name, value in given.items() if value is not None}})
        c = pretrain.resolve(own, place, 1, pretrain.load_data(vars(own), place, "val").channels)
    return dict(c, download=args.download, weights=weights, test_crop=1.0, amp=pretrain.precision(args.amp, place.device),
                workers=pretrain.loaders(args.workers, place)), state


def recovery_model(c, state, place):
    """The model of pretrain.py with its decoder or head, in eval(). BadRequest when the file has none."""
    torch.manual_seed(c["seed"])
    with pretrain.refusing(f"{c['weights']}: "):
        model = pretrain.build(c)
        missing = models.load_weights(model, state).missing
    lacking = [name for name in missing if name.startswith("decoder_pred")]
    if lacking:
        raise BadRequest(f"{c['weights']} recovers no image, it lacks {lacking[0]}: give a run of pretrain.py, or a whole MAE "
                         "file")
    return models.to_device(model, place.device).eval()


def reconstruct(args, place):
    """BM Fig. 3, A2 Fig. 5, A3. The mean squared error is that of the loss: of the pixels the task asks for, normalised as its
    targets are; beside it that of the pictures shown, of all pixels in [0, 1].
    """
    opened, pictures, says = [], [], []
    for label, weights in zip(labels_of(args.runs), args.runs):                                # all, before one is measured
        c, state = recovery_of(args, weights, place)
        run, data, model = Run(label, c, state), pretrain.load_data(c, place, "val"), recovery_model(c, state, place)
        if data.channels != c["channels"]:
            raise BadRequest(f"{weights} recovers images of {c['channels']} channels, those of {c['data']} have {data.channels}: "
                             "choose another --data")
        opened.append((run, data, model))
    asked = [name for name in OF_A_FILE if getattr(args, name) is not None]
    if asked and all("config" in run.state for run, _, _ in opened):
        raise BadRequest(f"--{asked[0]} is for a file of weights alone: these runs say themselves how they were made")
    results = Results(args, dict(images=args.images, seed=args.seed, data=args.data))
    for run, data, model in opened:
        c, label = run.c, run.label
        rows, size, p, per = choose_images(data, args.images, args.seed), tuple(c["img_size"]), c["patch_size"], c["norm_target"]

        def look(views, labels, first):
            d, predictions, recovered = pretrain.recover(model, views, c, seeded(args.seed, PICTURE, first))
            loss = dict(pretrain.the_loss(c), loss="mse", freq_weight=0.0)
            mse = [losses.recovery_loss(x, model.normalize(d.target), size, p, d.counted, **loss) for x in predictions]
            shown = [(degrade.paste_visible(x, d, p).clamp(0, 1) - d.target).square().mean() for x in recovered]
            return dict(n=len(views), mse=[float(x) for x in mse], shown=[float(x) for x in shown])
        if not results.has(run):
            parts = results.over_images(run, data, rows, 50, tuple(c["view"]), look, place)
            n = [part["n"] for part in parts]
            mse, shown = (np.average([part[k] for part in parts], 0, n).tolist() for k in ("mse", "shown"))
            results.done(run, dict(task=c["task"], images=sum(n), normalised_per=per, mse=mse[0],
                                   mse_without_token=(mse + [None])[1], mse_shown=shown[0], borrowed=per != "off"))
        found = results.all["runs"][label]
        pixels = "of pixels over ImageNet's deviations" if per == "off" else f"of pixels normalised per {per}"
        text = f"{label}: mean squared error over {found['images']} images {found['mse']:.4f}, {pixels}"
        first = data.plain(rows, args.rows, tuple(c["view"]), device=place.device)
        shown = next(views for views, _, _ in first if views is not None)
        pictures.append((text, pretrain.picture_of(model, shown, c, seeded(args.seed, PICTURE, 0))))
        without, borrowed = found["mse_without_token"], ", their patches' mean and contrast borrowed" if found["borrowed"] else ""
        says.append(text + (f" (without the mask token {without:.4f})" if without is not None else "") +
                    f", of the pictures shown {found['mse_shown']:.4f}{borrowed}")
    path, page = os.path.join(args.out, "reconstruct.png"), stacked(pictures)
    pretrain.write_whole(path, lambda file: page.save(file, format="PNG"))
    print(f"drawn: {path}\nWhat is recovered is blurred, most where nothing was seen. BM found so even where the encoder sees "
          "the whole picture, and the colour task's error far below those of tasks that pay more (Fig. 3); A2, that a "
          f"good recovery does not make good features (3.3). On images of val: {'; '.join(says)}. Errors of tasks that normalise "
          f"or hide differently do not compare.\nnumbers: {results.path}")


def stacked(pictures):
    """[(a line of text or "", a Pillow picture)] below one another, each picture below its line."""
    from PIL import Image, ImageDraw, ImageFont
    font, at = ImageFont.load_default(14), [0, *itertools.accumulate(x.height + 26 * bool(text) for text, x in pictures)]
    page = Image.new("RGB", (max(max(x.width, 12 + round(font.getlength(text))) for text, x in pictures), at[-1]), "white")
    for top, bottom, (text, x) in zip(at, at[1:], pictures):
        ImageDraw.Draw(page).text((6, top + 6), text, "black", font)
        page.paste(x, (0, bottom - x.height))
    return page


def log_of(folder):
    """The lines of a run's log.jsonl and its config.json. BadRequest when there is none."""
    folder = folder_of(folder)
    try:
        with open(os.path.join(folder, "log.jsonl")) as log, open(os.path.join(folder, "config.json")) as config:
            lines, config = [json.loads(line) for line in log if line.endswith("\n")], json.load(config)
    except (OSError, ValueError) as error:
        raise BadRequest(f"curves takes folders of pretrain.py and finetune.py, and {folder} is none: {error}")
    if not any("loss" in line for line in lines):
        raise BadRequest(f"{folder} has no lines in its log yet")
    return lines, config


def behind(config):
    """(task, epochs) of the pre-training that a fine-tuned run began with, however many fine-tunings ago. BadRequest when its
    log is not there.
    """
    while config["weights"] != "none":
        lines, config = log_of(config["weights"])
        if "task" in config:
            return config["task"], lines[-1]["epoch"]
    return "none", 0.0


def curves(args, _):
    """BM Fig. 2: loss against epochs; of fine-tuned runs the accuracy instead; and BM Fig. 5: their last accuracy against
    the epochs of pre-training behind it.
    """
    found, paid, unknown = {}, {}, []
    for label, folder in zip(labels_of(args.runs), args.runs):
        lines, config = log_of(folder)
        run = found[label] = {k: [[line["epoch"], line[k]] for line in lines if k in line] for k in ("loss", "top1")}
        run.update(task=config.get("task"), weights=config["weights"])
        if run["top1"]:
            try:
                run["pretraining"], run["pretraining_epochs"] = behind(config)
                paid.setdefault(run["pretraining"], []).append((run["pretraining_epochs"], run["top1"][-1][1]))
            except BadRequest:
                unknown.append(label)
    results = Results(args, {})
    results.all["runs"] = found
    def panel(title, y, k):
        shown = {label: run[k] for label, run in found.items() if run[k] and not (k == "loss" and run["top1"])}
        return dict(title=title, x="epochs", y=y, lines=[(label, *zip(*points), None) for label, points in shown.items()])
    panels = [panel("Training loss", "loss, each task's own", "loss"),
              panel("Accuracy while fine-tuning", "top-1 accuracy, %", "top1"),
              dict(title="What pre-training pays", x="epochs of pre-training", y="top-1 after fine-tuning, %",
                   lines=[(task, *zip(*sorted(points)), None) for task, points in paid.items()])]
    last = "; ".join(f"{label} {run['loss'][0][1]:.3f} to {run['loss'][-1][1]:.3f}" +
                     (f", top-1 {run['top1'][-1][1]:.1f}%" if run["top1"] else "") for label, run in found.items())
    lost = f" Not in the last panel, for the log of their pre-training is not to be found: {', '.join(unknown)}."
    finish(args, results, [x for x in panels if x["lines"]],
           "Losses of different tasks are different quantities: their course compares, their height does not. BM found that the "
           "height does not tell which task pays (Fig. 2), and that 50 epochs of zoom_in_mask already pay (Fig. 5). "
           f"From first to last: {last}.{lost if unknown else ''}")


# ---------------------------------------------------------------------------------------------------
# python analyze.py
# ---------------------------------------------------------------------------------------------------

OF_A_FILE = ("task", "model", "img_size", "patch_size", "decoder", "norm_target")             # a run says its own
NAMES = {                                                       # what it does, its counts, and those of --paper (0: all)
    "reconstruct": (reconstruct, "pictures recovered and their mean squared error", dict(images=100), {}),
    "curves": (curves, "loss and accuracy against epochs", {}, {}),
    "occlusion": (occlude, "top-1 against the share of patches dropped",
                  dict(images=500, repeats=5), dict(images=0, repeats=5)),
    "interaction": (interact, "strength of interactions by order",
                    dict(images=16, pairs=8, contexts=6), dict(images=500, pairs=50, contexts=50)),
    "fourier": (fourier, "high frequencies in the feature maps by depth", dict(images=256), dict(images=0)),
    "variance": (variance, "spatial variance of the feature maps by depth", dict(images=256), dict(images=0)),
}


def options():
    p = pretrain.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    names = p.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, about, counts, paper) in NAMES.items():
        q = names.add_parser(name, help=about, description=about, allow_abbrev=False)
        kinds = {"curves": "", "reconstruct": ", or a file of weights"}.get(name, ", or a file of weights, or none")
        q.add_argument("runs", nargs="+", metavar="RUN", help=f"a run's folder{kinds}")
        q.add_argument("--out", default=os.path.join("runs", "analyze"), metavar="DIR", help="default: runs/analyze")
        if name == "curves":
            continue

        def count(option, what):
            of_paper = f", with --paper {paper[option] or 'all'}" if paper and paper[option] != counts[option] else ""
            q.add_argument(f"--{option}", type=int, help=f"{what}; default: {counts[option]}{of_paper}")
        says = dict(finetune.SAYS, data="that of the first run", root="that of the first run, or data",
                    model="a run's own; of a file of weights vit_base for a folder, vit_micro for the small sets",
                    img_size="a run's own; else 224 or, for the small sets, 32, for a ResNet 64",
                    patch_size="a run's own; else 16 or 4, for a ResNet 8")
        if name == "interaction":
            says["amp"] = "auto, which is float32 here: bf16 may round interactions away"
        shared = ("data", "root", "download", "model", "img_size", "patch_size", "seed", "device", "amp", "workers")
        pretrain.common_options(q, says, shared)
        q.set_defaults(data=None, root=None)
        count("images", "of val, chosen by --seed")
        q.add_argument("--resume", action="store_true", help="go on with the results in --out, if they are there")
        if name == "reconstruct":
            q.add_argument("--task", choices=degrade.TASKS, help="of a file of weights alone; default: mask")
            q.add_argument("--decoder", metavar="DEPTHxWIDTHxHEADS", help="of a file of weights alone; MAE's is 8x512x16")
            q.add_argument("--norm_target", choices=("patch", "channel", "off"),
                           help="of a file of weights alone; default: the task's")
            q.add_argument("--rows", type=int, default=8, metavar="N",
                           help="images shown of each run, two a row, so an even number; default: 8")
            continue
        finetune.weights_options(q)
        q.add_argument("--paper", action="store_true", help="the paper's counts (A2 3.1; of interactions those of its reference "
                       "[12]), and linear layers fitted to all training images")
        if name == "occlusion":
            count("repeats", "draws of the dropped patches")
            q.add_argument("--fill", choices=("black", "mean"), default="black", help="what dropped patches hold: black, as the "
                           "tool that A2 used, or the data's mean colour; default: black")
        if name == "interaction":
            count("pairs", "of each image")
            count("contexts", "sets S of each pair and order")
            q.add_argument("--distance", type=int, default=2, help="rows and columns between the two patches at most; default: 2")
    return p


def run(args):
    """One analysis, from the command line's options. Returns the exit code."""
    if args.name != "curves":
        least = dict(images=1, rows=1, repeats=1, pairs=1, contexts=2, distance=1)
        for name, value in vars(args).items():
            if name in least and value is not None and value < least[name]:
                raise BadRequest(f"--{name} {value} must be at least {least[name]}")
        _, _, counts, paper = NAMES[args.name]
        for name, value in (paper if vars(args).get("paper") else counts).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        pretrain.not_negative(vars(args), "seed", "workers")
    place = pretrain.set_up(getattr(args, "device", "cpu"))
    if place.world > 1:
        raise BadRequest(f"analyze.py is one process, and torchrun started {place.world}: start it with python")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        NAMES[args.name][0](args, place)
    except Stopped as stopped:
        print(pretrain.stopped(128 + stopped.args[0]))
        return 128 + stopped.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(pretrain.command(run, options))
