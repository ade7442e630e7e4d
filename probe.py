"""Measure an encoder as it is, its weights frozen: k-NN, linear probe, non-linear probe.

    python probe.py --weights runs/zoom_in_mask-vit_micro-shapes              a minute on a laptop
    python probe.py --weights runs/zoom_in_mask-vit_micro-shapes --blocks 2   minutes more
    python probe.py --weights none                                            random, to compare

*Beyond Masking* (BM) section 5, *A2MIM* (A2) section 5.2. Features are computed once, in eval(),
of the central part of every image. The last line is JSON, also result.json in --out. Accuracies
are in %.
"""
import json
import math
import sys

import pretrain  # before torch, whose threads it sets
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import finetune
import models
from pretrain import check, learning_rate, positive_int, precision, samples, seeded

LINEAR, BLOCKS = range(102, 104)  # further streams of random numbers
BATCH = 256  # images at once
STORE = 4 * 2 ** 30  # most bytes of tokens kept
STEPS = 2000  # of a fit to a small set, at least


def main(argv=None):
    args, weights = options(argv)
    process = pretrain.set_up(args.device)
    check(process.world == 1, f"one process, not {process.world}: start it with python")
    finetune.keep_results(args)
    data, val = finetune.labelled_data(args, process)
    classes = len(data.classes)
    amp = precision(args, process.device)
    args.epochs = args.epochs or max(20, math.ceil(STEPS / math.ceil(len(data) / BATCH)))
    model = load_model(args, weights, data.channels, process)
    print(f"{args.model} from {args.weights} on {args.data}, {data.found} of {classes} classes, "
          f"measured on {val.found}\n{args.img_size}, the central {args.test_crop:g}, features: "
          f"{args.pool}, {process.device}, {args.amp} -> {args.out}", flush=True)

    train, test = (all_features(model, images, args, process, amp, args.blocks)
                   for images in (data, val))
    votes = knn(*train[:2], test[0], classes)
    figures = dict(knn=accuracy(votes, test[1], "knn")["knn"])  # 20 votes name no top five
    print(f"k-NN {figures['knn']}%", flush=True)

    head = linear_probe(*train[:2], classes, model.tokens, args.seed)
    with torch.no_grad():
        figures.update(accuracy(head(test[0]), test[1], "linear"))
    print(f"linear probe {figures['linear']}%", flush=True)

    if args.blocks:
        scores = blocks_probe(model, data, val, train, test, args, process, amp)
        figures.update(accuracy(scores, test[1], "nonlinear"))

    names = "model", "data", "labels", "seed", "weights", "blocks"
    line = json.dumps({k: vars(args)[k] for k in names} | figures | dict(images=len(test[1])))

    def write():
        pretrain.write_config(args)
        pretrain.write_text(args.out / "result.json", line)
    pretrain.on_rank_0(write, process)
    print(line)


# --- The command ---

def load_model(args, weights, channels, process, classes=0):
    """The encoder with its weights, frozen, in eval(); what was loaded is printed."""
    torch.manual_seed(args.seed)
    model = models.encoder(args.model, args.img_size, args.patch_size, channels, classes,
                           args.relative_positions, args.pool)
    if weights is not None:
        print(models.load_weights(model, weights), flush=True)
    return models.to_device(model, process.device).eval().requires_grad_(False)


def defaults_of(defaults):
    """Those of open_run's defaults that are options here, at the run's test size."""
    names = ("data", "only", "model", "root", "img_size", "patch_size", "pool", "test_crop",
             "relative_positions")
    if defaults.get("test_size"):  # trained at another
        defaults["img_size"] = [defaults["test_size"]]
    return {name: defaults[name] for name in names}


def options(argv=None):
    """The command line, and what the file of --weights holds."""
    first = pretrain.Parser(add_help=False)
    finetune.first_options(first.add_argument)
    chosen, _ = first.parse_known_args(argv)
    weights, _, defaults = finetune.open_run(chosen.weights, chosen)
    p = pretrain.Parser(parents=[first], description=(__doc__ or "").split("\n")[0])
    o = p.add_argument
    finetune.encoder_options(o)
    o("--blocks", type=int, choices=(2, 4), help="also so many transformer blocks on the tokens")
    o("--epochs", type=positive_int, help="of --blocks; None: 20, or as many as make 2,000 steps")
    o("--out", type=pretrain.folder_path,
      help="None: runs/probe-WEIGHTS-DATA[-LABELS][-BLOCKS][-seedSEED]")
    pretrain.machine_options(o)
    p.set_defaults(**defaults_of(defaults))
    args = p.parse_args(argv)
    args.img_size = pretrain.two_sides(args.img_size)
    name = finetune.run_name("probe", args, args.blocks and f"blocks{args.blocks}")
    args.out = args.out or pretrain.folder_path(f"runs/{name}")
    return args, weights


# --- Features ---

@torch.no_grad()
def encode(model, data, rows, args, process, amp):
    """Yields features (k, D), tokens (k, T, D) and labels (k,) of the images of `rows`, in order.
    A ResNet's tokens are the positions of its last map.
    """
    for views, labels in data.plain(rows, BATCH, args.img_size, process.device,
                                    workers=args.workers, crop=args.test_crop):
        with amp():
            z = model.encode(views)
        yield model.pooled(z).float(), z if z.ndim == 3 else z.flatten(2).transpose(1, 2), labels


def all_features(model, data, args, process, amp, blocks=False):
    """Features (n, D) and labels (n,) of all readable images, and for `blocks` their tokens
    (n, T, D), or None where they would take more than STORE bytes.
    """
    n = len(data)
    at = 0
    tokens = None
    labels = []
    features = torch.empty(n, model.dim, device=process.device)
    found = encode(model, data, torch.arange(n), args, process, amp)
    for z, t, y in tqdm(found, "features", math.ceil(n / BATCH), leave=False):
        if not at and blocks:
            kind = pretrain.PRECISIONS[args.amp]
            if n * t[0].numel() * kind.itemsize <= STORE:
                tokens = torch.empty(n, *t.shape[1:], dtype=kind, device=process.device)
        rows = slice(at, at + len(z))
        features[rows] = z
        if tokens is not None:
            tokens[rows] = t
        labels.append(y)
        at += len(z)
    pretrain.refuse_bad(data, n - at, process)
    features = features[:at]
    check(torch.stack(features.aminmax()).isfinite().all(),  # without a copy of them
          "the features are not finite: try --amp off, other --weights")
    return features, torch.cat(labels), None if tokens is None else tokens[:at]


# --- Three probes ---

def knn(train, labels, test, classes, k=20, temperature=0.07):
    """The votes for each class (m, classes) of the k training features (n, D) nearest to each test
    feature (m, D). A vote counts exp(s / temperature), s the cosine similarity.
    """
    k = min(k, len(train))
    length = train.norm(dim=1).clamp(min=1e-12)
    votes = []
    for rows in test.split(max(1, 2 ** 27 // len(train))):  # half a GiB of similarities at once
        s = (F.normalize(rows, dim=1) @ train.T).div_(length)
        near, which = s.topk(k)
        of_class = torch.zeros(len(rows), classes, device=test.device)
        votes.append(of_class.scatter_add_(1, labels[which], ((near - 1) / temperature).exp()))
    return torch.cat(votes)


class LARS(torch.optim.Optimizer):
    """LARS (arXiv 1708.03888, Algorithm 1), as MAE probes. For matrices g <- 0.001 |w| / |g| g,
    unless a norm is 0. Then m <- 0.9 m + g and w <- w - lr m.
    """

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                g = w.grad
                of_w = w.norm()
                of_g = g.norm()
                if w.ndim > 1:
                    g = g * torch.where((of_w > 0) & (of_g > 0), 0.001 * of_w / of_g, 1.0)
                m = self.state[w].setdefault("momentum", torch.zeros_like(w)).mul_(0.9).add_(g)
                w.sub_(group["lr"] * m)


def linear_probe(train, labels, classes, vit, seed=0):
    """Fit a linear classifier to features (n, D) -> a module (m, D) -> (m, classes), in eval().

    A ViT gets MAE's protocol: batch norm without affine, LARS, lr 0.1 x 16384 / 256, batch 16384,
    cosine after a ninth of warm-up, 90 epochs, but 2,000 steps at least.
    A ResNet gets MoCo's: SGD, lr 30, momentum 0.9, batch 256, 100 epochs, a tenth of the lr from
    epoch 60 and again from 80.
    # differs from the authors' code: theirs see random crops, flipped at random; features here are
    # those of the central part.
    """
    n, D = train.shape
    linear = nn.Linear(D, classes)
    nn.init.normal_(linear.weight, std=0.01, generator=seeded(seed, LINEAR))
    nn.init.zeros_(linear.bias)
    if vit:
        norm = nn.BatchNorm1d(D, affine=False, eps=1e-6)
        batch = min(16384, n)
        head = nn.Sequential(norm, linear).to(train.device)
        optimizer = LARS(linear.parameters(), lr=6.4)
        total = max(90 * (n // batch), STEPS)
        rate = total // 9, 6.4
    else:
        head = nn.Sequential(linear).to(train.device)
        batch = min(256, n)
        optimizer = torch.optim.SGD(linear.parameters(), lr=30, momentum=0.9)
        total = math.ceil(100 * n / batch)
        rate = 0, 30, "step", (0.6, 0.8)
    for step in tqdm(range(total), desc="linear probe", unit="step", leave=False):
        rows = slice(None)
        if batch < n:
            rows = samples(step, batch, n, seed)[:, 1].to(train.device)
        optimizer.param_groups[0]["lr"] = learning_rate(step, total, *rate)
        optimizer.zero_grad()
        F.cross_entropy(head(train[rows]), labels[rows]).backward()
        optimizer.step()
    return head.eval()


class BlocksProbe(nn.Module):
    """BM section 5: transformer blocks, pooling and a linear classifier on tokens (B, T, D)."""

    def __init__(self, dim, heads, blocks, classes, pooled):
        super().__init__()
        self.pooled = pooled  # the slice of tokens that are averaged
        self.blocks = nn.ModuleList(models.Block(dim, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        self.apply(models.xavier)

    def forward(self, tokens):
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, self.pooled].mean(1))


def blocks_probe(model, data, val, train, test, args, process, amp):
    """Train BlocksProbe on the frozen model's tokens -> scores of val's images (m, classes).

    train and test are what `all_features` found. Where it kept no tokens they are computed anew
    each epoch. BM gives no recipe. Ours is AdamW, batch 256, lr 1e-3, weight decay 0.05, cosine, a
    tenth of warm-up, no augmentation.
    """
    vit = model.tokens
    device = process.device
    torch.manual_seed(args.seed)
    heads = model.heads if vit else max(1, model.dim // 64)
    pooled = slice(1) if vit and args.pool == "cls" else slice(int(vit), None)
    probe = BlocksProbe(model.dim, heads, args.blocks, len(data.classes), pooled).to(device)
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(probe, 0.05), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    def batches(images, found, epoch=None):
        _, labels, tokens = found
        n = len(images) if tokens is None else len(tokens)
        rows = torch.arange(n)
        if epoch is not None:
            rows = torch.randperm(n, generator=seeded(args.seed, BLOCKS, epoch))
        if tokens is None:
            return ((t, y) for _, t, y in encode(model, images, rows, args, process, amp))
        return ((tokens[index], labels[index]) for index in rows.to(device).split(BATCH))

    def scores_of(tokens):
        with amp():
            return probe(tokens.float()).float()

    total = args.epochs * math.ceil(len(data) / BATCH)
    steps = iter(range(total))
    for epoch in tqdm(range(args.epochs), f"{args.blocks} blocks", unit="epoch", leave=False):
        for tokens, labels in batches(data, train, epoch):
            lr = learning_rate(next(steps), total, total // 10, 1e-3)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(scores_of(tokens), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
    probe.eval()
    with torch.no_grad():
        return torch.cat([scores_of(tokens) for tokens, _ in batches(val, test)])


def accuracy(scores, labels, name):
    """Top-1 and top-5 in % of scores (m, classes): {name: ., name_top5: .}."""
    hit = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    top1, top5 = (round(100 * x.float().mean().item(), 2) for x in (hit[:, 0], hit.any(1)))
    return {name: top1, f"{name}_top5": top5}


if __name__ == "__main__":
    sys.exit(pretrain.command(main))
