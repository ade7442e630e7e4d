"""Measure an encoder as it is, its weights frozen: k-NN, linear probe, non-linear probe. *Beyond Masking* (BM) section 5,
*A2MIM* (A2) section 5.2.

    python probe.py --weights runs/zoom_in_mask-vit_micro-shapes               k-NN and linear probe, a minute on a laptop
    python probe.py --weights runs/zoom_in_mask-vit_micro-shapes --blocks 2    and two transformer blocks, a few more
    python probe.py --weights none                                             random weights, to compare
    python probe.py --weights RUN --data /path/to/imagenet                     on a GPU

One process. The backbone is in eval() and never changes, so its features are computed once: of the central part of every
image, with no augmentation. Prints one line of JSON last, also saved as result.json in --out; accuracies in %.
"""
import math
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import finetune
import models
import pretrain
from pretrain import AUTOCAST, BLOCKS, LINEAR, BadRequest, Failure, learning_rate, samples, seeded

BATCH, STORE = 256, 4 * 2 ** 30                                 # images at once; bytes of tokens to keep at most
STEPS = 2000                                                    # of fitting to a small set, whose epochs are short, at least


def encode(model, data, rows, c, place, tokens=False, note="", bad_files=None):
    """Yields (features (k, D) float32, labels (k,), None or tokens (k, T, D)) of the images of `rows`, in order, by the frozen
    model. A ResNet's tokens are the positions of its last map. Images that cannot be read are left out.
    """
    bad_files = bad_files or pretrain.BadFiles(len(data), 1)
    parts = data.plain(rows, BATCH, c["img_size"], c["test_crop"], device=place.device, workers=c["workers"])
    for views, labels, unread in tqdm(parts, note, math.ceil(len(rows) / BATCH), leave=False, disable=not note, unit="batch"):
        bad_files.meet_few(unread, place)
        if views is None:
            continue
        with torch.no_grad(), torch.autocast(place.device.type, *AUTOCAST[c["amp"]]):
            z = model.encode(views)
        yield model.pooled(z).float(), labels, (z if z.ndim == 3 else z.flatten(2).transpose(1, 2)) if tokens else None


def precision_kept(c):
    """The precision that tokens are kept in: that of --amp."""
    return AUTOCAST[c["amp"]][0] or torch.float32


def gather(model, data, c, place, note, tokens=False):
    """encode of all images of `data`, each in one tensor."""
    rows, kept, at = torch.arange(len(data)), None, 0
    features, labels = [], []
    for z, y, t in encode(model, data, rows, c, place, tokens, note):
        features.append(z), labels.append(y)
        if tokens:                                              # room for all at once: no second copy when they are joined
            if kept is None:
                kept = torch.empty(len(data), *t.shape[1:], dtype=precision_kept(c), device=t.device)
            kept[at:at + len(t)] = t
            at += len(t)
    return torch.cat(features), torch.cat(labels), kept[:at] if tokens else None


def knn(train, labels, test, classes, k=20, temperature=0.07):
    """The classes' votes (m, classes) of the k training features (n, D) nearest to each test feature (m, D) by cosine
    similarity s, a vote counting exp(s / temperature).
    """
    train, test, k = F.normalize(train, dim=1), F.normalize(test, dim=1), min(k, len(train))
    votes = []
    for some in test.split(max(1, 2 ** 27 // len(train))):      # half a GiB of similarities at once
        near, which = (some @ train.T).topk(k)
        of_class = torch.zeros(len(some), classes, device=test.device)
        votes.append(of_class.scatter_add_(1, labels[which], ((near - 1) / temperature).exp()))
    return torch.cat(votes)


class LARS(torch.optim.Optimizer):
    """LARS, as MAE probes: You et al., Large Batch Training of Convolutional Networks (arXiv 1708.03888), Algorithm 1.

    g <- 0.001 |w| / |g| g for matrices, 1 where a norm is 0; then momentum: m <- 0.9 m + g, w <- w - lr m.
    """

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                g, of_w, of_g = w.grad, w.norm(), w.grad.norm()
                if w.ndim > 1:
                    g = g * torch.where((of_w > 0) & (of_g > 0), 0.001 * of_w / of_g, 1.0)
                m = self.state[w].setdefault("momentum", torch.zeros_like(w)).mul_(0.9).add_(g)
                w.sub_(group["lr"] * m)


def linear_probe(train, labels, classes, resnet, seed=0):
    """Fit a linear classifier to features (n, D) -> the fitted module, in eval(), (m, D) -> (m, classes).

    ViT: MAE's protocol, batch norm without affine before it, LARS, lr 0.1 x 16384 / 256, batch 16384 (all, if there are
    fewer), cosine after a ninth of warm-up, 90 epochs. These are 7,000 steps on ImageNet; small sets get at least 2,000.
    ResNet: MoCo's, SGD, lr 30, momentum 0.9, batch 256, 100 epochs, a tenth of the lr from epoch 60 and again from 80.
    """
    n, D = train.shape
    linear = nn.Linear(D, classes)
    nn.init.normal_(linear.weight, std=0.01, generator=seeded(seed, LINEAR))
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(*([] if resnet else [nn.BatchNorm1d(D, affine=False, eps=1e-6)]), linear).to(train.device)
    optimizer = torch.optim.SGD(linear.parameters(), lr=30, momentum=0.9) if resnet else LARS(linear.parameters(), lr=6.4)
    batch = min(256 if resnet else 16384, n)
    total = math.ceil(100 * n / batch) if resnet else max(90 * (n // batch), STEPS)
    for step in tqdm(range(total), desc="linear probe", unit="step", leave=False):
        rows = samples(step, batch, n, seed)[:, 1].to(train.device) if batch < n else slice(None)
        lr = learning_rate(step, total, total // 9, 6.4)
        if resnet:
            lr = 30 * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        F.cross_entropy(head(train[rows]), labels[rows]).backward()
        optimizer.step()
    return head.eval()


class BlocksProbe(nn.Module):
    """BM section 5: transformer blocks, then pooling and a linear classifier, on frozen tokens (B, T, D)."""

    def __init__(self, dim, heads, blocks, classes, cls):
        super().__init__()
        self.cls = cls                                          # the cls token, or the mean of the patches
        self.blocks = nn.ModuleList(models.Block(dim, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        self.apply(models.ViT._init)

    def forward(self, tokens, first):
        """first: where the patches begin, after a ViT's cls token."""
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return self.head(tokens[:, 0] if self.cls else tokens[:, first:].mean(1))


def blocks_probe(model, data, val, train, test, c, place):
    """Train BlocksProbe on the frozen model's tokens -> scores (m, classes) and labels (m,) of the images of val.

    train, test: what gather found; without tokens in them, which would take more than 4 GiB, they are computed anew each
    epoch. BM gives no recipe: AdamW, batch 256, lr 1e-3, weight decay 0.05, cosine, a tenth of it warm-up, no augmentation,
    20 epochs, of a small set as many as make 2,000 steps.
    """
    resnet, device, n = c["model"] in models.RESNETS, place.device, len(train[1])
    torch.manual_seed(c["seed"])
    heads = max(1, model.dim // 64) if resnet else models.VITS[c["model"]][0][2]
    probe = BlocksProbe(model.dim, heads, c["blocks"], len(data.classes), not resnet and c["pool"] == "cls").to(device)
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(probe, 0.05), lr=1e-3, fused=True)
    scaler, bad_files = torch.amp.GradScaler(device.type, enabled=c["amp"] == "fp16"), pretrain.BadFiles(len(data), 1)

    def batches(of, found, rows):
        if found[2] is None:
            return ((t, y) for _, y, t in encode(model, of, rows, c, place, tokens=True, bad_files=bad_files))
        return ((found[2][some], found[1][some]) for some in rows.to(device).split(BATCH))

    def scores_of(tokens):
        with torch.autocast(device.type, *AUTOCAST[c["amp"]]):
            return probe(tokens.float(), 0 if resnet else 1).float()

    images = n if train[2] is not None else len(data)           # of what is read anew some may not be readable
    step, total = 0, c["epochs"] * math.ceil(images / BATCH)
    for epoch in tqdm(range(c["epochs"]), f"{c['blocks']} blocks", unit="epoch", leave=False):
        order = torch.randperm(images, generator=seeded(c["seed"], BLOCKS, epoch))
        for tokens, labels in batches(data, train, order):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, total // 10, 1e-3)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(scores_of(tokens), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
    probe.eval()
    rows = torch.arange(len(val) if test[2] is None else len(test[1]))
    with torch.no_grad():
        found = [(scores_of(tokens), labels) for tokens, labels in batches(val, test, rows)]
    return tuple(torch.cat(x) for x in zip(*found))


SAYS = dict(finetune.SAYS, img_size="that of the run in --weights; else 224 or, for the small sets, 32, for a ResNet 64",
            epochs="20, or as many as make 2,000 steps", out="runs/probe-WEIGHTS-DATA[-LABELS][-DRAW][-BLOCKS][-SEED]")
COMMON = ("data", "root", "download", "model", "img_size", "patch_size", "epochs", "seed", "device", "amp", "workers", "out",
          "weights")


def options():
    p = pretrain.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    pretrain.common_options(p, SAYS, COMMON)
    finetune.weights_options(p)
    p.add_argument("--blocks", type=int, choices=(2, 4),
                   help="also the non-linear probe, of so many transformer blocks (BM section 5), for --epochs")
    finetune.labels_options(p)
    return p


def accuracy(scores, labels, name):
    """Top-1 and top-5 in % of scores (m, classes): {name: ., name_top5: .}."""
    hit = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    top1, top5 = (round(100 * x.float().mean().item(), 2) for x in (hit[:, 0], hit.any(1)))
    return {name: top1, f"{name}_top5": top5}


SAME = ("data", "model", "img_size", "patch_size", "relative_positions", "pool", "labels", "draw", "seed", "blocks",
        "epochs")


def run(args):
    """One measurement, from the command line's options. Returns the exit code."""
    state, place = finetune.open_weights(args), pretrain.set_up(args.device)
    if place.world > 1:
        raise BadRequest(f"probe.py is one process, and torchrun started {place.world}: start it with python")
    if args.epochs is not None and (not args.blocks or args.epochs < 1 or args.epochs % 1):
        raise BadRequest(f"--epochs {args.epochs:g} is for --blocks, and a whole number above 0")
    data, val = finetune.labelled_data(args, place)
    if len(data) < 2:
        raise BadRequest(f"{args.data} has {len(data)} image to fit to: a probe needs two or more")
    recipe = finetune.recipe_of("small" if finetune.is_small(args.data) else "deit", args.data, args.model)
    c = dict(vars(args), script="probe", test_size=0, test_crop=None)
    pretrain.settle(c, {k: recipe[k] for k in ("model", "img_size", "patch_size", "pool", "test_crop")})
    resnet, classes = c["model"] in models.RESNETS, len(data.classes)
    epochs = c["epochs"] or max(20, math.ceil(STEPS / math.ceil(len(data) / BATCH)))
    finetune.refuse_for_resnet(args)
    pretrain.not_negative(c, "seed", "workers")
    c.update(channels=data.channels, pool=None if resnet else c["pool"], epochs=int(epochs) if c["blocks"] else None,
             workers=pretrain.loaders(c["workers"], place), amp=pretrain.precision(c["amp"], place.device),
             device=str(place.device), out=c["out"] or os.path.join("runs", finetune.folder_name("probe", c)))
    model, loaded = finetune.load_model(c, state, place)
    model.eval().requires_grad_(False)
    finetune.make_folder(c, place, ("weights", *SAME))
    print(loaded or "random weights", f"{c['model']} from {c['weights']} on {c['data']}, {len(data):,} images of {classes} "
          f"classes, {finetune.measured_line(c, len(val))}, features: {c['pool'] or 'mean'}",
          pretrain.device_line(c, place), sep="\n", flush=True)
    positions = math.prod(c["img_size"]) // (models.ResNet.stride if resnet else c["patch_size"]) ** 2 + (not resnet)
    room = precision_kept(c).itemsize * (len(data) + len(val)) * positions * model.dim
    tokens = bool(c["blocks"]) and room <= STORE
    train, test = gather(model, data, c, place, "features", tokens), gather(model, val, c, place, "features of val", tokens)
    if not (train[0].isfinite().all() and test[0].isfinite().all()):
        raise Failure("the features are not finite: try --amp off, or other --weights")
    votes = knn(train[0], train[1], test[0], classes)
    figures = dict(knn=accuracy(votes, test[1], "knn")["knn"])                                 # 20 votes name no top five
    print(f"k-NN {figures['knn']}%", flush=True)
    head = linear_probe(train[0], train[1], classes, resnet, c["seed"])
    with torch.no_grad():
        figures.update(accuracy(head(test[0]), test[1], "linear"))
    print(f"linear probe {figures['linear']}%", flush=True)
    if c["blocks"]:
        figures.update(accuracy(*blocks_probe(model, data, val, train, test, c, place), "nonlinear"))
        print(f"{c['blocks']} blocks {figures['nonlinear']}%", flush=True)
    finetune.report(c, dict(figures, images=len(test[1])), SAME)
    return 0


if __name__ == "__main__":
    sys.exit(pretrain.command(run, options))
