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

BATCH, STORE = 256, 4 * 2 ** 30                                           # images at once; bytes of tokens to keep at most


def encode(model, data, rows, c, place, bad_files, tokens=False, note=""):
    """Yields (features, labels) of the images of `rows`, in order, by the frozen model: (k, D) float32; or its tokens
    (k, T, D), a ResNet's being the positions of its last map. Images that cannot be read are left out.
    """
    parts = data.plain(rows, BATCH, c["img_size"], c["test_crop"], device=place.device, workers=c["workers"])
    for views, labels, unread in tqdm(parts, note, math.ceil(len(rows) / BATCH), leave=False, disable=not note, unit="batch"):
        if bad_files.meet(unread) and len(bad_files.why) > 0.01 * len(data):
            raise Failure(f"more than 1% of {len(data)} images cannot be read: mend or replace {bad_files.listed(place)}")
        if views is None:
            continue
        with torch.no_grad(), torch.autocast(place.device.type, *AUTOCAST[c["amp"]]):
            z = model.encode(views)
            z = (z if z.ndim == 3 else z.flatten(2).transpose(1, 2)) if tokens else model.pooled(z).float()
        yield z, labels


def knn(train, labels, test, classes, k=20, temperature=0.07):
    """The classes' votes (m, classes) of the k training features (n, D) nearest to each test feature (m, D) by cosine
    similarity s, a vote counting exp(s / temperature).
    """
    train, test, k = F.normalize(train, dim=1), F.normalize(test, dim=1), min(k, len(train))
    votes = []
    for some in test.split(1000):
        near, which = (some @ train.T).topk(k)
        votes.append(torch.zeros(len(some), classes, device=test.device).scatter_add_(1, labels[which], ((near - 1) / temperature).exp()))
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
    total = 100 * (n // batch) if resnet else max(90 * (n // batch), 2000)
    for step in tqdm(range(total), desc="linear probe", unit="step", leave=False):
        rows = samples(step, batch, n, seed)[:, 1].to(train.device)
        lr = 30 * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total)) if resnet else learning_rate(step, total, total // 9, 6.4)
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


def blocks_probe(model, data, val, c, place, bad_files):
    """Train BlocksProbe on the frozen model's tokens -> scores (m, classes) and labels (m,) of the images of val.

    BM gives no recipe: AdamW, batch 256, lr 1e-3, weight decay 0.05, cosine, a tenth of it warm-up, no augmentation. Tokens
    are computed once and kept in half precision, or anew each epoch where they would take more than 4 GiB.
    """
    resnet, device = c["model"] in models.RESNETS, place.device
    torch.manual_seed(c["seed"])
    probe = BlocksProbe(model.dim, max(1, model.dim // 64) if resnet else models.VITS[c["model"]][0][2], c["blocks"],
                        len(data.classes), not resnet and c["pool"] == "cls").to(device)
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(probe, 0.05), lr=1e-3, fused=True)
    one = next(encode(model, data, torch.arange(1), c, place, bad_files, tokens=True))[0]
    n, cached = len(data), None
    if n * one[0].numel() * 2 <= STORE:
        made = ((z.bfloat16(), y) for z, y in encode(model, data, torch.arange(n), c, place, bad_files, True, "tokens"))
        cached = [torch.cat(x) for x in zip(*made)]
        n = len(cached[1])
    total = c["epochs"] * math.ceil(n / BATCH)
    with tqdm(total=total, desc=f"{c['blocks']} blocks", unit="step", leave=False) as bar:
        for epoch in range(c["epochs"]):
            order = torch.randperm(n, generator=seeded(c["seed"], BLOCKS, epoch))
            batches = ([x[rows] for x in cached] for rows in order.to(device).split(BATCH)) if cached else \
                encode(model, data, order, c, place, bad_files, tokens=True)
            for tokens, labels in batches:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(bar.n, total, total // 10, 1e-3)
                with torch.autocast(device.type, *AUTOCAST[c["amp"]]):
                    scores = probe(tokens.float(), 0 if resnet else 1)
                loss = F.cross_entropy(scores.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    out, probe = [], probe.eval()
    for tokens, labels in encode(model, val, torch.arange(len(val)), c, place, bad_files, tokens=True):
        with torch.no_grad(), torch.autocast(device.type, *AUTOCAST[c["amp"]]):
            out.append((probe(tokens.float(), 0 if resnet else 1).float(), labels))
    return tuple(torch.cat(x) for x in zip(*out))


SAYS = dict(finetune.SAYS, img_size="that of the run in --weights; else 224 or, for the small sets, 32, for a ResNet 64",
            epochs="20", out="runs/probe-WEIGHTS-DATA", workers=pretrain.DEVICE_SAYS["workers"])
COMMON = ("data", "root", "download", "model", "img_size", "patch_size", "epochs", "seed", "device", "amp", "workers", "out", "weights")


def options():
    p = pretrain.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    pretrain.common_options(p, SAYS, COMMON)
    finetune.weights_options(p)
    p.add_argument("--blocks", type=int, choices=(2, 4), help="also the non-linear probe, of so many transformer blocks (BM section 5), for --epochs")
    p.add_argument("--labels", type=int, metavar="K", help="keep K labelled images a class, chosen by --seed; default: all")
    return p


def accuracy(scores, labels, name):
    """Top-1 and top-5 in % of scores (m, classes): {name: ., name_top5: .}."""
    hit = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return {name: round(100 * hit[:, 0].float().mean().item(), 2), f"{name}_top5": round(100 * hit.any(1).float().mean().item(), 2)}


def run(args):
    """One measurement, from the command line's options. Returns the exit code."""
    state, place = finetune.open_weights(args), pretrain.set_up(args.device)
    if place.world > 1:
        raise BadRequest(f"probe.py is one process, and torchrun started {place.world}: start it with python")
    data, val = finetune.labelled_data(args, place)
    recipe = finetune.recipe_of("small" if finetune.is_small(args.data) else "deit", args.data, args.model)
    c = dict(vars(args), script="probe")
    pretrain.settle(c, {k: recipe[k] for k in ("model", "img_size", "patch_size", "pool", "test_crop")})
    pretrain.not_negative(c, "seed", "workers", "epochs")
    resnet = c["model"] in models.RESNETS
    c.update(channels=data.channels, epochs=round(c["epochs"] or 20), workers=1 if c["workers"] is None else c["workers"],
             amp=pretrain.precision(c["amp"], place.device), pool=None if resnet else c["pool"])
    name = finetune.name_weights(c)
    c["out"] = c["out"] or os.path.join("runs", f"probe-{name}")
    model, loaded = finetune.load_model(c, state, place)
    model.eval().requires_grad_(False)
    print(loaded or "random weights")
    print(f"{c['model']} from {c['weights']} on {c['data']}, {len(data):,} images of {len(data.classes)} classes, measured on {len(val):,}, "
          f"input {c['img_size'][0]}x{c['img_size'][1]}, features: {c['pool'] or 'mean'}", flush=True)
    bad_files, classes = pretrain.BadFiles(len(data), 1), len(data.classes)
    (train, labels), (test, truth) = ([torch.cat(x) for x in zip(*encode(model, of, torch.arange(len(of)), c, place, bad_files, note=note))]
                                      for of, note in ((data, "features"), (val, "features to measure on")))
    figures = accuracy(knn(train, labels, test, classes), truth, "knn")
    print(f"k-NN {figures['knn']}%", flush=True)
    head = linear_probe(train, labels, classes, resnet, c["seed"])
    with torch.no_grad():
        figures.update(accuracy(head(test), truth, "linear"))
    print(f"linear probe {figures['linear']}%", flush=True)
    if c["blocks"]:
        figures.update(accuracy(*blocks_probe(model, data, val, c, place, bad_files), "nonlinear"))
        print(f"{c['blocks']} blocks {figures['nonlinear']}%", flush=True)
    finetune.report(c, dict(figures, images=len(truth)), c["out"])
    return 0


if __name__ == "__main__":
    sys.exit(pretrain.command(run, options))
