"""The figures of the two papers that show a network at work, one command each.

    python analyze.py reconstruct RUN ...   BM Fig. 3, A2 Fig. 5, A3: what is seen and recovered
    python analyze.py curves RUN ...        BM Fig. 2, 5: loss and accuracy against epochs
    python analyze.py occlusion RUN ...     A2 Fig. 1 a-d: top-1 against patches dropped
    python analyze.py interaction RUN ...   A2 Fig. 1 e-h: interactions of two patches, by order
    python analyze.py fourier RUN ...       A2 Fig. 3a: high frequencies in the maps, by depth
    python analyze.py variance RUN ...      A2 Fig. 3b: spatial variance of the maps, by depth

BM is *Beyond Masking* (arXiv 2203.14313), A2 is *A2MIM* (arXiv 2205.13943; sections 3, 5.4,
appendices B, C). RUN is a folder that pretrain.py or finetune.py left, a file with timm's, MAE's or
torchvision's names, or none: random weights. --out gets NAME.json, every number, and NAME.png, all
runs on one sheet. On two CPU cores each takes seconds to two minutes of the built-in data. All runs
are shown the same images, each at its own size and crop.

B batch, C channels, H x W pixels, p patch size, N patches.
visible (k, N) bool: True = the patch is shown.
"""
import argparse
import itertools
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import pretrain  # before torch, whose threads it sets
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import degrade
import finetune
import losses
import models
import probe
from pretrain import PICTURE, check, load_data, positive_int, precision, seeded

CHOSEN, HIDDEN, PAIRS, CONTEXTS = range(200, 204)  # further streams of random numbers


def main(argv=None):
    args = options(argv)
    _, measure, panels, _ = NAMES[args.name]
    process = pretrain.set_up(args.device)
    file = args.out / f"{args.name}.json"
    check(process.world == 1, f"one process, not {process.world}: start it with python")
    data = rows = None
    if args.name == "curves":
        runs = [argparse.Namespace(label=label_of(path), weights=path, of=None)
                for path in args.runs]
    else:
        runs = open_runs(args)
        data = images_to_measure(runs[0], process, args.name in ("occlusion", "interaction"))
        rows = choose_images(data, args.images, args.seed)

    # the runs whose numbers are there already
    names = ("runs", "out", "resume", "device", "workers", "root", "download", "rows")
    settings = {k: v for k, v in pretrain.config_of(args).items() if k not in names}
    found = dict(settings=settings, runs={})
    if file.exists() and args.name != "curves":
        check(args.resume, f"{file} is there: --resume keeps its runs, another --out leaves it")
        found = json.loads(file.read_text())
        then = found["settings"]
        other = ", ".join(f"{k} {then.get(k)}" for k in settings if then.get(k) != settings[k])
        check(not other, f"{file} was made with {other}: give the same, or another --out")
    args.out.mkdir(parents=True, exist_ok=True)

    # each of the others, one after the other
    numbers = found["runs"]
    pictures = []
    for run in runs:
        own = dict(weights=run.weights, of=run.of)
        # the name is another run's
        while any(numbers.get(run.label, own).get(k, x) != x for k, x in own.items()):
            run.label += "'"
        if run.label not in numbers or args.name == "reconstruct":  # its picture is not kept
            with torch.inference_mode():
                numbers[run.label] = dict(measure(run, data, rows, process), **own)
            pretrain.write_text(file, json.dumps(found, allow_nan=False))
        line = ", ".join(f"{k} {v:.4g}" for k, v in numbers[run.label].items()
                         if isinstance(v, (int, float)))
        print(f"{run.label}: {line}", flush=True)
        if args.name == "reconstruct":
            pictures.append((f"{run.label}: {line}", run.picture))

    picture = file.with_suffix(".png")
    if pictures:
        page = stacked(pictures)
        pretrain.write_whole(picture, lambda out: page.save(out, "PNG"))
    drawn = pictures or draw(panels(numbers), picture)
    print(file, picture if drawn else "")


def options(argv=None):
    p = pretrain.Parser(description=(__doc__ or "").split("\n")[0])
    names = p.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (about, measure, _, counts) in NAMES.items():
        q = names.add_parser(name, help=about, description=measure.__doc__)
        o = q.add_argument
        o("runs", nargs="+", metavar="RUN", help="a run's folder, a file of weights, or none")
        o("--out", type=pretrain.folder_path, default=Path("runs/analyze"), help="a folder")
        o("--resume", action="store_true", help="keep the numbers in --out, measure what "
          "is not there; another or a changed run of the same name is added as NAME' "
          "(curves is made anew)")
        pretrain.machine_options(o)
        if name == "curves":
            continue
        o("--data", help="a folder or a set by name; None: that of the first run")
        o("--model", choices=models.MODELS, metavar="MODEL", help="default: that of each run")
        pretrain.first_options(o)
        finetune.encoder_options(o, pools=name != "reconstruct")
        for count, value in counts.items():
            o(f"--{count}", type=positive_int, default=value, help="how many")
        if name == "reconstruct":
            o("--task", choices=degrade.TASKS, default="mask", help="of a file of weights alone")
            o("--decoder", help="of a file of weights alone; MAE's is 8x512x16")
            o("--norm_target", choices=("patch", "channel", "off"), help="likewise")
            o("--rows", type=positive_int, default=8, help="images shown of each run, two a row")
        q.set_defaults(root=None, relative_positions=None)  # the run's
    return p.parse_args(argv)


# --- The definitions ---

# Orders are m = r (n - 2). Occlusion stops before 1.
RATIOS = (0.0, 0.05, *(r / 10 for r in range(1, 10)), 0.95, 1.0)


def showing(images, visible, p, base):
    """Patches that are not `visible` (B, N) get the colour `base` (C,): (B, C, H, W)."""
    pixels = degrade.patch_pixels(visible, p, images.shape[2:])
    return torch.where(pixels, images, base.view(-1, 1, 1))


def occlusion(classify, images, labels, p, base, ratios, repeats, generator):
    """How many images (B, C, H, W) are classified right with a share of their patches dropped
    (A2 3.1): counts (ratios, repeats). All lose the same number. The ratio 0 is measured once.
    # differs from the authors' tool: there all images of a batch lose the same patches.
    """
    grid = [side // p for side in images.shape[2:]]
    hits = torch.zeros(len(ratios), repeats, dtype=torch.long)
    for i, ratio in enumerate(ratios):
        for repeat in range(repeats if ratio else 1):
            hidden = degrade.random_mask(len(images), grid, ratio, generator=generator)
            scores = classify(showing(images, ~hidden.to(images.device), p, base))
            hits[i, repeat:] = (scores.argmax(1) == labels).sum()
    return hits


def log_odds(scores, labels):
    """f of A2 B.2, log p / (1 - p) of the true class: scores (k, classes), labels (k,) -> (k,)."""
    others = scores.scatter(1, labels[:, None], -math.inf)
    return scores.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def game(classify, image, label, p, base):
    """f of one image (1, C, H, W), label (1,), as a game of its patches: visible (k, N) bool ->
    log-odds (k,). The patches outside the set get the colour `base` (C,).
    """
    at_once = max(1, min(512, 2 ** 22 // math.prod(image.shape[2:])))

    def f(visible):
        odds = []
        for some in visible.to(image.device).split(at_once):
            scores = classify(showing(image, some, p, base))
            odds.append(log_odds(scores, label.expand(len(some))))
        return torch.cat(odds).cpu()
    return f


def near_pairs(grid, distance=2):
    """Pairs of patches at most `distance` rows and columns apart, each once: (pairs, 2) int64."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))  # (N, 2)
    apart = (places[:, None] - places).abs().amax(2)
    return ((apart > 0) & (apart <= distance)).triu().nonzero()


def interactions(f, n, pairs, orders, contexts, generator):
    """I^(m)(i, j) of n players for each pair (P, 2) and each order m (A2 eq. 1), and its standard
    error: (P, orders) both. f: visible (k, n) bool -> scores (k,).

    I is the mean of f(S+i+j) - f(S+i) - f(S+j) + f(S) over `contexts` random sets S of m others.
    Where there are no more sets than that, it is the mean over all and has no error. The orders
    share their random numbers: a pair's larger sets hold its smaller ones.
    """
    P = len(pairs)
    # a random order of the players for each set, i and j at its end: S is its first m
    rank = torch.rand(P, contexts, n, generator=generator)
    rank = rank.scatter(2, pairs[:, None].expand(-1, contexts, -1), 2.0).argsort(2).argsort(2)
    others = [[x for x in range(n) if x not in pair] for pair in pairs.tolist()]
    others = torch.tensor(others)  # (P, n - 2)
    sets = []
    exact = []
    for m in orders:
        exact.append(math.comb(n - 2, m) <= contexts)
        S = rank < m
        if exact[-1]:
            every = torch.tensor(list(itertools.combinations(range(n - 2), m)), dtype=torch.long)
            S = torch.zeros(P, len(every), n, dtype=torch.bool)
            S.scatter_(2, others[:, every], True)
        S = S[:, :, None].repeat(1, 1, 4, 1)  # (P, sets, 4, n): S + i + j, S + i, S + j, S
        S[torch.arange(P), :, :2, pairs[:, 0]] = True
        S[torch.arange(P), :, ::2, pairs[:, 1]] = True
        sets.append(S.flatten(0, 2))
    mean = torch.zeros(P, len(orders))
    error = torch.zeros(P, len(orders))
    for i, scores in enumerate(f(torch.cat(sets)).split([len(S) for S in sets])):
        both, first, second, neither = scores.view(P, -1, 4).unbind(2)
        difference = both - first - second + neither  # (P, sets)
        mean[:, i] = difference.mean(1)
        if not exact[i]:
            error[:, i] = difference.std(1) / difference.shape[1] ** 0.5
    return mean, error


def relative_strength(strength):
    """J^(m) (A2 eq. 2) from the mean |I^(m)| of each image (images, orders): (orders,), whose mean
    is one. And its standard error over images, by the jackknife, as a list; None for one image.
    """
    n = len(strength)
    strength = strength.double().clamp(min=1e-30)
    without = strength.sum(0) - strength  # one image at a time left out
    each = without / without.mean(1, keepdim=True)
    error = ((n - 1) / n * (each - each.mean(0)).square().sum(0)).sqrt()
    return strength.mean(0) / strength.mean(), error.tolist() if n > 1 else None


def share_between(x, J, low, high):
    """The area under J between low and high, in % of that over [0, 1]. J is straight between its
    points x.
    """
    def area(a, b):
        at = np.linspace(a, b, 1001)
        return np.trapezoid(np.interp(at, x, J), at)
    return 100 * area(low, high) / area(0, 1)


def log_amplitude(maps):
    """Log amplitude of the spectrum of feature maps (B, C, h, w) along its diagonal, less that at
    frequency 0, averaged over channels (A2 B.3): (B, n + 1), n = min(h, w) // 2. The frequencies
    are k / n of the highest. White noise has 0 where its spectrum is real, and .35 elsewhere.
    # differs from the authors' tool: it leaves out the highest frequency of even sides.
    """
    h, w = maps.shape[2:]
    n = min(h, w) // 2
    rows, columns = ([round(side // 2 * k / max(n, 1)) for k in range(n + 1)] for side in (h, w))
    amplitude = torch.fft.fft2(maps.float())[:, :, rows, columns].abs()  # (B, C, n + 1)
    amplitude = (amplitude + 1e-6).log().mean(1)
    return amplitude - amplitude[:, :1]


def spatial_variance(maps):
    """Variance over the positions of feature maps (B, C, h, w), averaged over channels (A2 3.3),
    and its share of the maps' mean square: (B, 2).
    # differs from the authors' tool: its variance is the unbiased one.
    """
    maps = maps.float()
    variance = maps.var((2, 3), correction=0).mean(1)
    power = maps.square().mean((1, 2, 3))
    return torch.stack([variance, variance / power.clamp(min=1e-30)], dim=1)


def feature_maps(model, images, look):
    """[look(map (B, C, h, w)) of each layer, first to last]: of a ViT's patch tokens after each
    attention and each MLP, of a ResNet's stem, pooling and blocks.
    """
    inputs, outputs = model.watched
    found = []

    def keep(z):
        grid = z[:, 1:].transpose(1, 2).unflatten(2, model.grid) if model.tokens else z
        found.append(look(grid))

    handles = [x.register_forward_pre_hook(lambda _, z: keep(z[0])) for x in inputs]
    handles += [x.register_forward_hook(lambda _, __, z: keep(z)) for x in outputs]
    model.encode(images)
    for handle in handles:
        handle.remove()
    return found


# --- Runs, images, pictures ---

FIT = 10000  # images a linear layer is fitted to, at most


def label_of(path):
    """A run's name, its folder's; "run" where a picture cannot show that."""
    path = Path(path).absolute()
    name = path.parent.name if path.name == "checkpoint.pt" else path.name
    return "run" if max(name) > "\u04ff" else name


def open_runs(args):
    """The options of each run; .held, what its file holds; .classes, its classifier's, if it has
    one. The images are those of the first run. `none` is like that run, with random weights.
    """
    first = next((path for path in args.runs if path != "none"), "none")
    opened = finetune.open_run(first, args)
    args.data = opened[2]["data"]
    args.only = args.only or opened[2]["only"]
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("data", "model")}
    runs = []
    for path in args.runs:
        held, config, defaults = opened
        if path not in (first, "none"):
            held, config, defaults = finetune.open_run(path, args)
        if path == "none":
            held = None
            config = {}
        run = argparse.Namespace(**{**probe.defaults_of(defaults), **given, "only": args.only})
        run.img_size = pretrain.two_sides(run.img_size)
        run.label = label_of(path)
        run.weights = path
        run.held = held
        run.classes = config.get("classes")
        weights = models.tensors(held)[0] if held else {}
        total = sum(x.double().abs().sum().item() for x in weights.values())
        # what its numbers are of
        run.of = [run.model, *run.img_size, run.patch_size, f"{total:.10g}"]
        runs.append(run)
    return runs


def images_to_measure(run, process, labelled):
    """The images of the run. If labelled, their classes are its classifier's, or those of the
    images to train on: val may lack some.
    """
    val = load_data(run, process, "val", labelled)
    if not labelled or pretrain.kind_of(run.data) != "folder":
        return val
    known = run.classes or []
    if val.classes != [name for name in known if name in val.classes]:
        known = load_data(run, process, "train", True).classes
    return load_data(run, process, "val", True, known)


def choose_images(data, count, seed):
    """`count` rows of a set, all if there are fewer: (n,) int64."""
    return torch.randperm(len(data), generator=seeded(seed, CHOSEN))[:count].sort().values


def shown(run, data, rows, chunk, process):
    """Yields the images of `rows` that can be read, `chunk` at once, their labels, and the first
    one's place. Failed where more than 1% cannot.
    """
    views = data.plain(rows, chunk, run.img_size, process.device, workers=run.workers,
                       crop=run.test_crop)
    total = math.ceil(len(rows) / chunk)
    for i, (view, labels) in enumerate(tqdm(views, run.label, total, leave=False, unit="part")):
        yield view, labels, i * chunk
    pretrain.refuse_bad(data, len(data.bad), process)


def mean_colour(data, run, process):
    """The mean of each channel over 1,000 images of the set, all if there are fewer: (C,)."""
    views = shown(run, data, choose_images(data, 1000, run.seed), 250, process)
    return torch.cat([view.mean((2, 3)) for view, _, _ in views]).mean(0)


def classifier(run, val, process, amp):
    """images -> scores (k, classes) in float32, and what gives them, in words: the run's own
    classifier, or a linear layer that probe.py fits to the training images.
    """
    classes = len(val.classes)
    name = models.MODELS[run.model].family.head_name
    held = {} if run.held is None else models.tensors(run.held)[0]
    known = run.classes in (None, val.classes)
    if known and len(held.get(f"{name}.weight", ())) == classes:
        model = probe.load_model(run, run.held, val.channels, process, classes)
        kind = "its own classifier"
        head = nn.Identity()
    else:
        model = probe.load_model(run, run.held, val.channels, process)
        train = load_data(run, process, "train", labelled=True)
        check(train.classes == val.classes, f"{run.data}: train and val have other classes")
        train = train.keep(choose_images(train, FIT, run.seed))
        features, labels, _ = probe.all_features(model, train, run, process, amp)
        with torch.inference_mode(False), torch.enable_grad():
            head = probe.linear_probe(features.clone(), labels.clone(), classes, model.tokens,
                                      run.seed)
        kind = f"a linear layer on its frozen features, fitted to {len(labels):,} images"

    def classify(images):
        with amp():
            scores = model(images)
        scores = head(scores.float())
        check(scores.isfinite().all(), f"{run.label}: the scores are not finite: try --amp off")
        return scores
    return classify, kind


def draw(panels, path):
    """Curves as a PNG, if matplotlib is there; whether it is. A panel: dict(title, x, y, lines),
    what else an axis takes, and marks: {x: text}. A line: label, xs, ys, their errors or None.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("for the curves: pip install matplotlib, then the same with --resume")
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2),
                                   squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels):
        for label, x, y, error in panel.pop("lines"):
            # matplotlib leaves out names that begin with _, and sets in type what is between two $
            name = f" {label}".replace("$", r"\$")
            line, = axis.plot(x, y, label=name, marker="o" if len(x) < 40 else "", markersize=3,
                              linestyle="--" if label.strip("'") == "none" else "-")
            if error is not None:
                axis.fill_between(x, np.subtract(y, error), np.add(y, error), alpha=0.2,
                                  color=line.get_color(), linewidth=0)
        for x, text in panel.pop("marks", {}).items():
            axis.axvline(x, color="grey", linestyle=":")
            axis.text(x, 0.02, f" {text}", rotation=90, transform=axis.get_xaxis_transform())
        axis.set(xlabel=panel.pop("x"), ylabel=panel.pop("y"), **panel)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    pretrain.write_whole(path, lambda out: figure.savefig(out, format="png", dpi=110))
    pyplot.close(figure)
    return True


def stacked(pictures):
    """[(a line of text, a Pillow picture)] below one another, each picture below its line."""
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(14)
    line = 26
    width = max(max(x.width, 12 + round(font.getlength(text))) for text, x in pictures)
    page = Image.new("RGB", (width, sum(x.height + line for _, x in pictures)), "white")
    top = 0
    for text, x in pictures:
        ImageDraw.Draw(page).text((6, top + 6), text, "black", font)
        page.paste(x, (0, top + line))
        top += line + x.height
    return page


# --- The figures ---

# A measure takes one run to its numbers, panels show those of all runs.

def of_maps(run, data, rows, process, value):
    """value(map) of each layer: its mean over images, and its standard error."""
    model = probe.load_model(run, run.held, data.channels, process)
    amp = precision(run, process.device)
    found = []
    for view, _, _ in shown(run, data, rows, 64, process):
        with amp():
            found.append([x.cpu() for x in feature_maps(model, view, value)])
    layers = [torch.cat(parts).double() for parts in zip(*found)]  # (n, values)
    check(all(x.isfinite().all() for x in layers), f"{run.label}: the feature maps are not finite")
    errors = [(x.var(0, correction=0) / max(len(x) - 1, 1)).sqrt().tolist() for x in layers]
    blocks = [len(stage) for stage in model.stages]  # a ResNet has a map each, after two others
    starts = [len(layers) - sum(blocks[i:]) for i in range(len(blocks))]
    return dict(images=len(layers[0]), mean=[x.mean(0).tolist() for x in layers], error=errors,
                stages=[(x + 0.5) / len(layers) for x in starts] if len(blocks) > 1 else [])


def by_depth(found):
    """(label, depth from 1/L to 1, mean, error) of each run. A layer of nothing but 0 is left out:
    its map has one position, or one row for the frequencies.
    """
    for label, r in found.items():
        L = len(r["mean"])
        depth = [i / L for i in range(1, L + 1)]
        layers = [x for x in zip(depth, r["mean"], r["error"]) if any(x[1])]
        check(layers, f"{label}: its maps are too small: choose a larger --img_size")
        yield label, *map(list, zip(*layers))


def stages_of(found):
    """{depth: the stage that begins there} of the first network that has stages."""
    first = next((r["stages"] for r in found.values() if r["stages"]), [])
    return {x: f"stage {i}" for i, x in enumerate(first, 1)}


def fourier(run, data, rows, process):
    """Lower is smoother: the more negative, the more a layer's maps have been low-pass filtered.
    A2 found that masked modelling and inpainting filter more than contrastive or supervised
    training (ResNet-50, Fig. 3a).
    """
    r = of_maps(run, data, rows, process, log_amplitude)
    return dict(r, last=r["mean"][-1][-1])


def fourier_panels(found):
    high = []
    whole = []
    for label, depth, mean, error in by_depth(found):
        high.append((label, depth, [m[-1] for m in mean], [e[-1] for e in error]))
        whole.append((label, np.linspace(0, 1, len(mean[-1])), mean[-1], error[-1]))
    return [dict(title="High frequencies in the feature maps", x="depth, layer / layers",
                 y=r"$\Delta$ log amplitude, highest frequency less 0", lines=high,
                 marks=stages_of(found)),
            dict(title="Spectrum of the last maps", x="diagonal frequency, of the highest",
                 y="log amplitude (natural) less that at 0", lines=whole)]


def variance(run, data, rows, process):
    """How much a layer's maps differ from place to place. A2 found that masked modelling lowers it
    and other pre-training raises it (ResNet-50, Fig. 3b). The scale of a network's features counts
    too, so the courses of one architecture's curves compare. The share of the mean square has no
    scale. `over_depth` and `share` are means over all layers; a map of one position has 0.
    """
    r = of_maps(run, data, rows, process, spatial_variance)
    over_depth, share = np.mean(r["mean"], axis=0).tolist()
    return dict(r, over_depth=over_depth, share=share)


def variance_panels(found):
    variance = []
    share = []
    for label, depth, mean, error in by_depth(found):
        variance.append((label, depth, [m[0] for m in mean], [e[0] for e in error]))
        share.append((label, depth, [m[1] for m in mean], [e[1] for e in error]))
    return [dict(title="Variance of the feature maps", x="depth, layer / layers",
                 y="spatial variance, mean over channels", lines=variance, yscale="log",
                 marks=stages_of(found)),
            dict(title="The same without its scale", x="depth, layer / layers",
                 y="share of the maps' mean square", lines=share, ylim=(0, 1),
                 marks=stages_of(found))]


def occlude(run, data, rows, process):
    """The longer a curve stays up, the less a network needs any one patch. A2 found that a ViT-S
    with masked modelling behind it is robust up to 80% dropped, and from scratch is not (Fig. 1 a).
    """
    ratios = RATIOS[:-1]
    p = run.patch_size
    classify, kind = classifier(run, data, process, precision(run, process.device))
    base = torch.zeros(data.channels, device=process.device)  # black, as in A2's tool
    hits = 0
    images = 0
    for view, labels, first in shown(run, data, rows, 128, process):
        hits = hits + occlusion(classify, view, labels, p, base, ratios, run.repeats,
                                seeded(run.seed, HIDDEN, first))
        images += len(view)
    top1 = 100 * hits / images  # (ratios, repeats)
    grid = [side // p for side in run.img_size]
    share = [int(degrade.random_mask(1, grid, r).sum()) / math.prod(grid) for r in ratios]
    return dict(classifier=kind, images=images, dropped=share, top1=top1.tolist(),
                mean=top1.mean(1).tolist(), intact=top1[0].mean().item(),
                deviation=top1.std(1).tolist() if run.repeats > 1 else None)


def occlude_panels(found):
    lines = [(label, r["dropped"], r["mean"], r["deviation"]) for label, r in found.items()]
    return [dict(title="Robustness against occlusion", x="share of the patches dropped",
                 y="top-1 accuracy, %", lines=lines, ylim=(0, None))]


def interact(run, data, rows, process):
    """Where a curve is high, the answer depends on two patches together when that share of the
    others is shown. Networks are strong at both ends. A2 found that masked modelling strengthens
    the middle: .05 to .5 in ViT-S, .1 to .55 in ResNet-50 (Fig. 1 e, g). A flat curve has 45% of
    its area there. Few contexts are noise, which lifts the orders between the ends.
    """
    p = run.patch_size
    grid = [side // p for side in run.img_size]
    n = math.prod(grid)
    near = near_pairs(grid)
    check(n > 2, f"--img_size: {n} patches have no pair among others")
    check(run.contexts > 1, "--contexts 1: one set has no standard error")
    # a difference of four scores: bf16 and TF32 round it away
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    amp = nullcontext if run.amp == "auto" else precision(run, process.device)
    classify, kind = classifier(run, data, process, amp)
    base = mean_colour(data, run, process)
    parts = []
    orders = sorted({round(r * (n - 2)) for r in RATIOS})
    for view, label, first in shown(run, data, rows, 1, process):  # one image
        chosen = torch.randperm(len(near), generator=seeded(run.seed, PAIRS, first))[:run.pairs]
        I, error = interactions(game(classify, view, label, p, base), n, near[chosen],
                                orders, run.contexts, seeded(run.seed, CONTEXTS, first))
        parts.append(torch.stack([I.abs().mean(0), error.mean(0)]))
    strength, error = torch.stack(parts).unbind(1)  # (images, orders)
    J, J_error = relative_strength(strength)
    x = [m / (n - 2) for m in orders]
    noise = error.mean(0) / strength.mean(0).clamp(min=1e-12)
    return dict(classifier=kind, images=len(parts), players=n, orders=orders, J=J.tolist(),
                J_error=J_error, strength=strength.mean(0).tolist(),
                context_error=error.mean(0).tolist(),
                share_05_to_50=share_between(x, J, 0.05, 0.5),
                share_10_to_55=share_between(x, J, 0.1, 0.55), noise=noise.max().item())


def interact_panels(found):
    lines = [(label, [m / (r["players"] - 2) for m in r["orders"]], r["J"], r["J_error"])
             for label, r in found.items()]
    return [dict(title="Strength of interactions", x="order m / (n - 2), patches about the pair",
                 y=r"$J^{(m)}$, relative to the mean over orders", lines=lines, ylim=(0, None))]


def recovery_of(run, data, process):
    """How a run of pretrain.py damages images, and its model. A file that says nothing of it, as
    MAE's, is taken by --task and its like.
    """
    config = models.run_config(run.held or {})
    check("settings" in config or not config and run.held, f"{run.weights} recovers no image")
    c = argparse.Namespace(**config)
    if not config:
        argv = ["--img_size", *map(str, run.img_size)]
        for name in ("task", "data", "model", "patch_size", "decoder", "norm_target"):
            if name in run:
                argv += [f"--{name}", str(vars(run)[name])]
        c = pretrain.options(argv)
        pretrain.settle(c, process, data)
    check(run.img_size == [*c.img_size], f"--img_size: {run.weights} recovers {c.img_size} pixels")
    model = models.recovery_model(c.model, c.img_size, c.patch_size, data.channels, c.token_at,
                                  c.token_how, c.decoder, c.relative_positions)
    loaded = models.load_weights(model, run.held)
    print(loaded)
    lost = [name for name in loaded.missing if name.startswith("decoder_p")]
    check(not lost, f"{run.weights} recovers no image, it lacks {', '.join(lost)}")
    return c, models.to_device(model, process.device).eval()


@torch.no_grad()
def reconstruct(run, data, rows, process):
    """`mse` is that of the loss: of the pixels the task asks for, normalised as its targets are.
    `mse_shown` is that of the pictures, of all pixels in [0, 1]. Mean and contrast of normalised
    patches are borrowed from the view. What is recovered is blurred, most where nothing was seen
    (BM Fig. 3). A good recovery does not make good features (A2 3.3). The errors of tasks that
    normalise or hide differently do not compare.
    """
    c, model = recovery_of(run, data, process)
    amp = precision(run, process.device)
    size = tuple(c.img_size)
    p = c.patch_size
    inside = c.token_at not in ("decoder", "none")  # there is a token to leave out
    run.img_size = list(c.view)
    run.test_crop = 1.0
    sums = np.zeros(3)  # of the loss, of that without the token, of the pictures' errors
    images = 0
    chunk = 50 - (len(rows) % 50 == 1)  # zoom_out's patches of other images take two at least
    for view, _, first in shown(run, data, rows, chunk, process):
        images += len(view)
        for i, token in enumerate((True, False)[:1 + inside]):
            d, prediction, picture = pretrain.recover(
                model, view, c, seeded(run.seed, PICTURE, first), amp, token)
            error = losses.recovery_loss(prediction, model.normalize(d.target), size, p, d.counted,
                                         c.norm_target, c.band_weight)
            sums[i] += len(view) * error.item()
            if token:
                error = degrade.paste_visible(picture, d, p).clamp(0, 1) - d.target
                sums[2] += len(view) * error.square().mean().item()

    few = rows[:run.rows + run.rows % 2]
    view = next(data.plain(few, len(few), tuple(c.view), process.device))[0]
    c.seed = run.seed
    run.picture = pretrain.recovery_sheet(model, view, c, amp)
    mse, without, pixels = (sums / images).tolist()
    return dict(task=c.task, images=images, normalised_per=c.norm_target, mse=mse,
                mse_without_token=without if inside else None, mse_shown=pixels)


def curve(run, *_):
    """Losses of different tasks are different quantities: their course compares, their height does
    not. BM found that the height does not tell which task pays (Fig. 2), and that 50 epochs of
    zoom_in_mask already pay (Fig. 5): the last panel, of fine-tuned runs.
    """
    def read(path):
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        log = pretrain.read_log(folder)
        return log, json.loads((folder / "config.json").read_text()) if log else {}

    log, config = read(run.weights)
    check(any("loss" in line for line in log), f"{run.weights} has no log.jsonl with a loss: "
          "curves are of runs")
    measures = dict(top1="top-1", miou="mean IoU", box_ap="box AP")
    measure = next((k for k in measures if any(k in x for x in log)), "top1")
    r = {k: [[x["epoch"], x[at]] for x in log if at in x]
         for k, at in (("loss", "loss"), ("measured", measure))}
    r.update(last_loss=r["loss"][-1][1], task=config.get("task"), began_with=config["weights"])
    if r["measured"]:
        r.update(last=r["measured"][-1][1], measure=measures[measure])
        log, before = read(config["weights"])
        if log and "task" in before:  # not a fine-tuning
            r.update(pretraining=before["task"], pretraining_epochs=log[-1]["epoch"])
        elif config["weights"] == "none":
            r.update(pretraining="none", pretraining_epochs=0.0)
        elif not Path(config["weights"]).exists():
            print(f"{run.label}: its pre-training, {config['weights']}, is not found from here")
    return r


def curve_panels(found):
    of = dict(loss=[], measured=[])
    paid = {}
    for label, r in found.items():
        kind = "measured" if r["measured"] else "loss"
        of[kind].append((label, *zip(*r[kind]), None))
        if "pretraining" in r:
            task = f"{r['pretraining']}, {r['measure']}"
            paid.setdefault(task, []).append((r["pretraining_epochs"], r["last"]))
    last = [(task, *zip(*sorted(points)), None) for task, points in paid.items()]
    panels = [dict(title="Training loss", x="epochs", y="loss, each task's own", lines=of["loss"]),
              dict(title="While fine-tuning", x="epochs", y="top-1 accuracy, mean IoU, box AP, %",
                  lines=of["measured"]),
              dict(title="What pre-training pays", x="epochs of pre-training",
                   y="the same after fine-tuning, %", lines=last)]
    return [panel for panel in panels if panel["lines"]]


# What it does, its measure and panels, its counts: ours, for a laptop.
NAMES = {
    "reconstruct": ("pictures recovered and their mean squared error", reconstruct, None,
                    dict(images=100)),
    "curves": ("loss and accuracy against epochs", curve, curve_panels, {}),
    "occlusion": ("top-1 against the share of patches dropped", occlude, occlude_panels,
                  dict(images=500, repeats=5)),
    "interaction": ("strength of interactions by order", interact, interact_panels,
                    dict(images=16, pairs=8, contexts=6)),
    "fourier": ("high frequencies in the feature maps by depth", fourier, fourier_panels,
                dict(images=256)),
    "variance": ("spatial variance of the feature maps by depth", variance, variance_panels,
                 dict(images=256)),
}


if __name__ == "__main__":
    sys.exit(pretrain.command(main))
