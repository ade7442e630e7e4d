"""Fine-tuning by its parts and through the real script: BM section 4.2; A2 section 5.2, A.1, Table A2."""
import json
import math
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont

import finetune
import models
import pretrain
import probe
from conftest import command, ended, forked, gradients_of, log_of, together, weights_of

PLACE = pretrain.Place(0, 1, torch.device("cpu"))


def result_of(said):
    return json.loads(said.strip().splitlines()[-1])


# ---------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("relative", [False, True])
def test_layer_decay_puts_each_parameter_in_one_group_with_the_rate_by_hand(relative):
    """A2 A.1, BEiT: embeddings decay^(L + 1), block l of 1 .. L decay^(L + 1 - l), norm and head 1."""
    model = models.encoder("vit_micro", 16, 4, num_classes=3, relative_positions=relative)
    model.pos_embed.requires_grad_(True)
    groups = pretrain.parameter_groups(model, 0.05, finetune.layer_scale(model, 0.5))
    names = {id(p): n for n, p in model.named_parameters()}
    seen = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(seen) == sorted(names.values())
    rate = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rate["cls_token"] == rate["pos_embed"] == rate["patch_embed.proj.bias"] == (1 / 128, 0)
    assert rate["patch_embed.proj.weight"] == (1 / 128, 0.05)
    assert rate["blocks.0.attn.qkv.weight"] == (1 / 64, 0.05) and rate["blocks.0.norm1.weight"] == (1 / 64, 0)
    assert rate["blocks.5.mlp.fc2.weight"] == (1 / 2, 0.05)
    assert rate["norm.weight"] == (1, 0) and rate["head.weight"] == (1, 0.05) and rate["head.bias"] == (1, 0)


def test_the_layers_rates_reach_the_optimiser(of, tmp_path):
    """AdamW's first step moves each weight by its learning rate (no decay), so far blocks move less."""
    assert of(finetune, "--steps", 1, "--warmup", 0, "--layer_decay", 0.5, "--weight_decay", 0, "--clip", 0, "--weights", "none", "--lr", 0.032)[0] == 0
    torch.manual_seed(0)
    before, after = models.encoder("vit_micro", 16, 4, num_classes=3).state_dict(), weights_of(tmp_path / "run")
    for name, scale in (("blocks.5.norm2.bias", 1 / 2), ("blocks.2.norm2.bias", 1 / 16), ("head.bias", 1)):
        assert (after[name] - before[name]).abs().max().item() == pytest.approx(0.001 * scale, rel=0.02), name


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixup_and_cutmix_targets_sum_to_one_and_are_the_pixels_shares(mixup, cutmix):
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 40, 60)
    kinds = set()
    for step in range(20):
        mixed, targets = finetune.mix(images, torch.eye(2), mixup, cutmix, np.random.default_rng(step))
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1])                      # white is class 1
        kinds.add("cut" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mix")
    assert kinds == ({"cut", "mix"} if mixup and cutmix else {"cut"} if cutmix else {"mix"})
    assert images.unique().tolist() == [0, 1]


@pytest.mark.parametrize("place, rows, columns", [((0.5, 0.5), (10, 30), (15, 45)), ((0, 1), (0, 10), (45, 60))])
def test_a_box_of_cutmix_by_hand(place, rows, columns):
    """CutMix: sides H sqrt(1 - share) and W sqrt(1 - share) around a place, cut off at the edge; the share is what is left."""
    rng = SimpleNamespace(beta=lambda a, b: 0.75, random=lambda n: np.array(place))
    images, box = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 40, 60), torch.zeros(40, 60)
    box[slice(*rows), slice(*columns)] = 1
    mixed, targets = finetune.mix(images, torch.eye(2), 0, 1.0, rng)
    assert torch.equal(mixed[0, 0], box) and torch.equal(mixed[1, 0], 1 - box) and targets[0, 1].item() == pytest.approx(box.mean().item())


def test_mixing_pairs_neighbours_however_the_batch_is_split():
    images, targets = torch.rand(8, 3, 6, 6), F.one_hot(torch.arange(8), 8).float()
    whole = finetune.mix(images, targets, 0.8, 1.0, np.random.default_rng(5))
    for part in (2, 4):
        parts = [finetune.mix(i, t, 0.8, 1.0, np.random.default_rng(5)) for i, t in zip(images.split(part), targets.split(part))]
        for a, b in zip(whole, zip(*parts)):
            assert torch.equal(a, torch.cat(b))


def test_shares_are_beta_distributed():
    """Mixup's share has Beta(a, a)'s variance, 1 / (4 (2 a + 1)), and mean 1/2."""
    one = torch.zeros(2, 1, 2, 2)
    share = np.array([finetune.mix(one, torch.eye(2), 0.8, 0, np.random.default_rng(i))[1][0, 0].item() for i in range(3000)])
    assert share.mean() == pytest.approx(0.5, abs=0.02) and share.var() == pytest.approx(1 / (4 * 2.6), rel=0.07)


def test_bce_targets_as_in_rsb():
    """Every class that makes up more than a fifth of the image counts as there; the mean over images and classes."""
    scores = torch.tensor([[2.0, -1.0, 0.5]])
    positive, negative = (lambda x: math.log1p(math.exp(-x))), (lambda x: math.log1p(math.exp(x)))
    loss = lambda *t: finetune.class_loss(scores, torch.tensor([t]), "bce", 0).item()
    assert loss(0.7, 0.3, 0.0) == pytest.approx((positive(2) + positive(-1) + negative(0.5)) / 3, rel=1e-5)
    for share, there in ((0.19, False), (0.21, True)):
        assert loss(1 - share, share, 0.0) == pytest.approx((positive(2) + (positive if there else negative)(-1) + negative(0.5)) / 3, rel=1e-5)
    assert loss(0.9, 0.1, 0.0) == pytest.approx((positive(2) + negative(-1) + negative(0.5)) / 3, rel=1e-5)


def test_cross_entropy_smooths_mixed_targets():
    """(1 - s) target + s / classes, against log p."""
    scores, target = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.7, 0.3, 0.0]])
    by_hand = -((0.9 * target + 0.1 / 3) * (scores - scores.exp().sum().log())).sum()
    assert finetune.class_loss(scores, target, "ce", 0.1).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_lamb_steps_by_hand():
    """You et al. Algorithm 2, bias correction; no ratio without weight decay (RSB's code)."""
    w, free = torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = finetune.LAMB([dict(params=[w], weight_decay=0.1), dict(params=[free], weight_decay=0.0)], lr=0.2)
    x, y, m, v = np.array([3.0, 4.0]), np.array([3.0, 4.0]), np.zeros(2), np.zeros(2)
    for t, g in ((1, np.array([1.0, -2.0])), (2, np.array([0.5, 0.0]))):
        w.grad, free.grad = (torch.tensor(g, dtype=torch.float32) for _ in range(2))
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        r = (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-6)
        u = r + 0.1 * x
        x = x - 0.2 * np.linalg.norm(x) / np.linalg.norm(u) * u
        y = y - 0.2 * r
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=1e-5)
        np.testing.assert_allclose(free.detach().numpy(), y, rtol=1e-5)


def test_lamb_moves_weights_that_are_zero():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    finetune.LAMB([dict(params=[w], weight_decay=0.1)], lr=0.1).step()
    torch.testing.assert_close(w.detach(), torch.full((2,), -0.1))


def test_drop_path_keeps_the_expectation_and_rises_with_depth():
    factors = models.drop_path(20000, 6, 0.5, pretrain.seeded(1))
    torch.testing.assert_close(factors.mean(0), torch.ones(6), atol=0.03, rtol=0)
    torch.testing.assert_close((factors == 0).float().mean(0), torch.linspace(0, 0.5, 6), atol=0.02, rtol=0)
    parts = [models.drop_path(5000, 6, 0.5, pretrain.seeded(1), (first, 20000)) for first in range(0, 20000, 5000)]
    assert torch.equal(torch.cat(parts), factors)


@pytest.mark.parametrize("name", ["vit_micro", "resnet18", "resnet50"])
def test_a_dropped_branch_adds_nothing_and_a_kept_one_its_share(name):
    """All factors 1 is the network without; a block whose factors are 0 hands on its shortcut."""
    model, images = models.encoder(name, 32, 4).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images, torch.ones(2, model.branches)), model(images))
        block, x = (model.blocks[0], torch.randn(2, 5, 128)) if name == "vit_micro" else (model.layer1[-1], torch.rand(2, model.widths[1], 4, 4))
        zero = torch.zeros(2, 2 if name == "vit_micro" else 1)
        torch.testing.assert_close(block(x, None, zero) if name == "vit_micro" else block(x, zero), x)
        kept = torch.ones(2, model.branches)
        kept[1, -1] = 2.0                                       # the last branch of the second image only
        changed = (model(images, kept) - model(images)).abs().amax(1)
        assert changed[0] < 1e-6 < changed[1]


def test_pooling_is_the_cls_token_or_the_mean_of_the_others():
    images = torch.rand(2, 3, 16, 16)
    by_cls, by_mean = (models.encoder("vit_micro", 16, 4, pool=pool).eval() for pool in ("cls", "mean"))
    by_mean.load_state_dict(by_cls.state_dict())
    with torch.no_grad():
        tokens = by_cls.encode(images)
        torch.testing.assert_close(by_cls(images), tokens[:, 0])
        torch.testing.assert_close(by_mean(images), tokens[:, 1:].mean(1))


def test_few_labels_are_so_many_of_each_class_by_seed():
    labels = torch.arange(300) % 3
    rows = finetune.few_labels(labels, 7, 0, "abc")
    assert labels[rows].bincount().tolist() == [7, 7, 7] and len(rows.unique()) == 21
    assert torch.equal(rows, finetune.few_labels(labels, 7, 0, "abc")) and not torch.equal(rows, finetune.few_labels(labels, 7, 1, "abc"))
    with pytest.raises(pretrain.BadRequest, match="--labels 101: class a has only 100 images"):
        finetune.few_labels(labels, 101, 0, "abc")


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_depends_on_its_generator_alone(channels):
    image = (torch.rand(channels, 20, 24) * 255).byte()
    before = torch.get_rng_state()
    draws = [finetune.rand_augment(image, pretrain.seeded(i), 9, 0.5) for i in range(12)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(draws[i], finetune.rand_augment(image, pretrain.seeded(i), 9, 0.5)) for i in range(12))
    assert all(d.shape == image.shape and d.dtype == torch.uint8 for d in draws) and sum(not torch.equal(d, image) for d in draws) > 4


def test_rand_augments_nine_is_nine_tenths(monkeypatch):
    """timm's scale, which Table A2 is on, ends at 10; torchvision's magnitude 9 of 31 would be a third of it."""
    asked = []
    monkeypatch.setattr(finetune.v2, "RandAugment", lambda ops, magnitude, bins, *_: (asked.append((ops, magnitude / (bins - 1))), lambda x: x + 1)[1])
    times = [finetune.rand_augment(torch.zeros(1, 1, 1, dtype=torch.uint8), pretrain.seeded(i), 9, 0.5).item() for i in range(300)]
    assert np.bincount(times) / 300 == pytest.approx([0.25, 0.5, 0.25], abs=0.08)             # two, each used half of the time
    strengths = np.array([s for _, s in asked])
    assert asked[0][0] == 1 and strengths.mean() == pytest.approx(0.9, abs=0.01) and strengths.std() == pytest.approx(0.05, abs=0.01) and strengths.max() <= 1


@pytest.mark.parametrize("kind", ["memory", "folder", "bad"])
def test_labels_follow_their_images(kind, labelled, tmp_path):
    """Through order, split, `keep`, and the image that stands in for one that cannot be read; class k is k x 0.4 bright."""
    shutil.copytree(labelled, tmp_path / "data")
    if kind == "bad":                                           # the last of class0; class1's first stands in
        (tmp_path / "data/train/class0/33.png").write_bytes(b"no picture")
    data = pretrain.FolderSet(str(tmp_path / "data/train"), labelled=True)
    assert data.classes == ["class0", "class1", "class2"] and data.labels.bincount().tolist() == [12, 12, 12]
    if kind == "memory":
        images, labels, _ = next(data.plain(torch.arange(36), 36, (20, 24)))
        data = pretrain.MemorySet((images * 255).round().byte(), labels, torch.device("cpu"), data.classes)
    for few in (data, data.keep(torch.arange(3, 36, 2))):
        parts, count = [(0, 4), (4, 4)], torch.zeros(3)
        for views, labels, bad in few.batches(range(9), 8, parts, (8, 8), (0.5, 1.0), 0, device=torch.device("cpu"), workers=0):
            assert torch.equal(((views.mean((1, 2, 3)) - 0.1) / 0.4).round().long(), labels)
            count += labels.bincount(minlength=3)
        assert count.min() > 0
    assert sorted(few.labels.bincount().tolist()) == [5, 6, 6]


def test_each_step_draws_anew_and_a_part_draws_as_the_whole():
    """Mixing and dropped branches are a function of seed and step; image i of a batch is treated alike however it is split."""
    model, c = models.encoder("vit_micro", 8, 4), dict(seed=0, mixup=0.8, cutmix=1.0, drop_path=0.5, loss="ce", smoothing=0, amp="off")
    prepare, _ = finetune.step_of(c, model, 8, torch.device("cpu"))
    view, labels = torch.rand(8, 3, 8, 8), torch.arange(8)
    steps = [prepare(view, labels, step, (0, 8)) for step in (0, 1, 2)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert all(not torch.equal(x, y) for x, y in zip(steps[a], steps[b]))
    parts = [prepare(view[rows], labels[rows], 1, (rows.start, 8)) for rows in (slice(0, 4), slice(4, 8))]
    assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*parts), steps[1]))


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_each_image_is_augmented_by_its_own_draw(kind, labelled):
    augment = lambda image, generator: torch.randint(256, (1, 1, 1), generator=generator).byte().expand_as(image)
    data = pretrain.FolderSet(str(labelled / "train"), labelled=True)
    if kind == "memory":
        data = pretrain.MemorySet(torch.zeros(36, 3, 8, 8, dtype=torch.uint8), data.labels, torch.device("cpu"))
    def values(parts, steps=range(9)):
        views = data.batches(steps, 8, parts, (4, 4), (1.0, 1.0), 0, augment=augment, device=torch.device("cpu"), workers=0)
        return torch.cat([v for v, _, _ in views])[:, 0, 0, 0]
    whole = values([(0, 8)])
    assert len(whole.unique()) > 50                             # two epochs of 36 images, each its own of 256 values
    assert torch.equal(whole, values([(0, 4), (4, 4)])) and torch.equal(whole[32:40], values([(0, 8)], range(4, 5)))


class Fixed(torch.nn.Module):
    """Says class 0 for dark images, 1 for bright ones, 2 never."""

    def forward(self, images):
        assert not self.training
        self.size, bright = images.shape[2:], images.mean((1, 2, 3)) > 0.5
        return torch.stack([~bright, bright, 0.5 * torch.ones_like(bright)], 1).float()


def test_accuracy_and_confusion_by_hand():
    """Of the central half, at --test_size, in eval(): a white frame would change what is dark."""
    images = torch.tensor([0, 0, 255, 255, 255], dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    data = pretrain.MemorySet(F.pad(images, [2] * 4, value=255), torch.tensor([0, 1, 1, 1, 2]), torch.device("cpu"), ["a", "b", "c"])
    c, model = dict(img_size=[4, 4], test_size=6, test_crop=0.5, workers=0, amp="off"), Fixed()
    found, confusion = finetune.evaluate(model, data, c, PLACE, pretrain.BadFiles(5, 1))
    assert model.size == (6, 6) and model.training
    assert found == dict(top1=60, top5=100, images=5)
    assert confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 1, 0]]


class Ranked(torch.nn.Module):
    """Scores that fall with the class: 0 first, 7 last, for any image."""

    def forward(self, images):
        return -torch.arange(self.classes, dtype=torch.float32).expand(len(images), -1)


@pytest.mark.parametrize("classes", [8, 41])
def test_top_5_counts_the_fifth_and_not_the_sixth(classes):
    """True classes 0, 4, 5 and 7 at the places 1, 5, 6 and 8; beyond 40 classes nobody reads a confusion picture."""
    data = pretrain.MemorySet(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 4, 5, 7]), torch.device("cpu"), [str(i) for i in range(classes)])
    model = Ranked()
    model.classes = classes
    found, confusion = finetune.evaluate(model, data, dict(img_size=[4, 4], test_size=0, test_crop=1.0, workers=0, amp="off"), PLACE, pretrain.BadFiles(4, 1))
    assert found == dict(top1=25, top5=50, images=4)
    assert confusion is None if classes > 40 else confusion[:, 0].tolist() == [1, 0, 0, 0, 1, 1, 0, 1]


def test_the_rows_of_the_confusion_picture_are_the_true_classes():
    """All of class 0 taken for class 1: the red cell is in the first row, second column."""
    picture, width = finetune.confusion_picture(torch.tensor([[0, 9], [0, 9]]), ["a", "b"]), ImageFont.load_default(12).getlength
    cell, left, top = 34, 12 + int(width("a")), 26
    assert picture.width > 6 + width("rows: true class, columns: predicted, % of the row")      # the legend is whole
    corner = [[picture.getpixel((left + x * cell + 3, top + y * cell + 3)) for x in (0, 1)] for y in (0, 1)]
    assert corner[0][1] == (255, 65, 65) and corner[1] == [(255, 255, 255), (50, 100, 255)]
    picture = finetune.confusion_picture(torch.eye(2), ["names that begin alike, one", "names that begin alike, two"])
    left = 12 + int(width("0 names that.."))
    assert picture.crop((0, 26, left, 60)).tobytes() != picture.crop((0, 60, left, 94)).tobytes()      # cut, but told apart


@pytest.mark.parametrize("crop, size", [(0.5, [4, 8]), (0.95, [6, 6])])
def test_what_is_measured_is_the_central_part(crop, size, tmp_path):
    """The largest centred box of the input's proportions, `crop` of it a side, from memory and from a folder alike."""
    image = (torch.rand(3, 20, 30, generator=pretrain.seeded(0)) * 255).byte()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    box = pretrain.central_box(20, 30, size, crop)
    assert box == ([8, 15] if crop == 0.5 else [19, 19])
    top, left = (20 - box[0]) // 2, (30 - box[1]) // 2
    want = F.interpolate(image[None, :, top:top + box[0], left:left + box[1]].float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
    for data in (pretrain.MemorySet(image[None], None, torch.device("cpu")), pretrain.FolderSet(str(tmp_path))):
        views, labels, bad = next(data.plain(torch.arange(1), 4, size, crop))
        assert (views - want).abs().max() < 0.02 and not bad and labels is None


# ---------------------------------------------------------------------------------------------------
# The recipes
# ---------------------------------------------------------------------------------------------------

def resolved(*argv, length=1281167, classes=1000):
    labels = torch.zeros(1)
    data = pretrain.MemorySet(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), labels, torch.device("cpu"), [str(i) for i in range(classes)])
    data.__class__ = type("Long", (pretrain.MemorySet,), dict(__len__=lambda self: length))
    return finetune.resolve(finetune.options().parse_args(["--data", "/imagenet", *argv]), PLACE, data, 50000)


def test_table_a2_vit():
    c = resolved()
    want = dict(recipe="deit", model="vit_base", img_size=[224, 224], epochs=100, optimizer="adamw", lr=2.5e-4, weight_decay=0.05, batch_size=1024,
                smoothing=0.1, drop_path=0.1, clip=5, rand_augment=[9, 0.5], mixup=0.8, cutmix=1.0, loss="ce",
                layer_decay=0.65, test_crop=0.875, pool="cls", test_size=0, crop=[0.08, 1.0], betas=[0.9, 0.999])
    assert {k: c[k] for k in want} == want
    assert c["save_every"] == math.ceil(c["total_steps"] / 20) > 5 * 50000 / 1024              # measuring is a tenth of the work at most
    assert resolved("--steps", "1000")["save_every"] == math.ceil(5 * 50000 / 1024)
    assert c["actual_lr"] == pytest.approx(1e-3) and c["warmup_steps"] == pytest.approx(5 * 1281167 / 1024, abs=1) and c["images_per_process"] <= 64


@pytest.mark.parametrize("recipe, size, epochs, lr, drop, magnitude", [(None, 160, 100, 8e-3, 0, 6), ("rsb_a2", 224, 300, 12e-3, 0.05, 7)])
def test_table_a2_resnet(recipe, size, epochs, lr, drop, magnitude):
    c = resolved("--model", "resnet50", *(["--recipe", recipe] if recipe else []))
    want = dict(recipe=recipe or "rsb_a3", img_size=[size, size], test_size=224, test_crop=0.95, epochs=epochs, optimizer="lamb", weight_decay=0.02, batch_size=2048,
                smoothing=0, drop_path=drop, clip=0, rand_augment=[magnitude, 0.5], mixup=0.1, cutmix=1.0, loss="bce", layer_decay=1.0)
    assert {k: c[k] for k in want} == want
    assert c["actual_lr"] == pytest.approx(lr) and c["warmup_steps"] == pytest.approx(5 * 1281167 / 2048, abs=1)


# ---------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------

def test_a_run_learns_and_leaves_all_it_should(of, tmp_path):
    code, said, _ = of(finetune, "--steps", 40, "--save_every", 20, "--lr", 0.016, "--drop_path", 0, "--warmup", 0)
    assert code == 0
    result, out = result_of(said), tmp_path / "run"
    assert result["top1"] == 100 and result["top5"] == 100 and result["images"] == 13 and result["seed"] == 0 and result["weights"] == "none"
    assert json.loads((out / "result.json").read_text()) == result
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "top1" in line] == [20, 40] and log[-1]["top1"] == 100
    assert {"checkpoint.pt", "config.json", "log.jsonl", "result.json", "confusion.png"} <= set(os.listdir(out))
    fresh = models.encoder("vit_micro", 16, 4)
    assert (weights_of(out)["pos_embed"] - fresh.pos_embed).abs().max() > 1e-5                 # positions are trained, as MAE's


def measuring(weights, out, *flags):
    """The command line of --eval."""
    return list(map(str, ["--weights", weights, "--eval", "--workers", 0, "--amp", "off", "--out", out, *flags]))


def measured(weights, out, *flags):
    """The exit code of --eval."""
    return pretrain.command(finetune.run, finetune.options, measuring(weights, out, *flags))


def test_a_fine_tuned_run_is_measured_again_with_eval(of, tmp_path, capfd):
    said = of(finetune, "--steps", 3, "--seed", 3)[1]
    assert measured(tmp_path / "run", tmp_path / "eval") == 0
    again = capfd.readouterr().out
    result = result_of(again)
    assert result["top1"] == result_of(said)["top1"] and os.path.exists(tmp_path / "eval/confusion.png")
    assert "measured on 13 at 16x16, the central 0.875, features: cls" in again and "device cpu" in again
    assert result["seed"] == 3 and "seed 3" in again and "total_steps" not in result and "compared_with" not in result and json.loads((tmp_path / "eval/result.json").read_text()) == result


def test_eval_measures_as_the_run_did(of, tmp_path):
    """A ResNet trained at 64 and measured at 96: the same again, unless another size is asked for; three processes share it."""
    said = of(finetune, "--model", "resnet18", "--recipe", "rsb_a3", "--img_size", 64, "--patch_size", 8, "--test_size", 96,
              "--steps", 2, "--mixup", 0, "--cutmix", 0)[1]
    codes, again = together("finetune", *measuring(tmp_path / "run", tmp_path / "eval"), processes=3)
    config, again = json.load(open(tmp_path / "eval/config.json")), result_of(again)
    assert codes == [0, 0, 0] and config["test_size"] == 96 and config["img_size"] == [64, 64] and config["test_crop"] == 0.95
    assert {k: again[k] for k in ("top1", "top5", "images")} == {k: result_of(said)[k] for k in ("top1", "top5", "images")}
    assert measured(tmp_path / "run", tmp_path / "other", "--test_size", 0) == 0
    assert json.load(open(tmp_path / "other/config.json"))["test_size"] == 0


def test_three_processes_measure_every_image_once(monkeypatch):
    """What each of three of 13 images counts, added up, is what one counts alone (test_two_processes_equal_one: for real)."""
    data = pretrain.MemorySet((torch.rand(13, 1, 4, 4, generator=pretrain.seeded(0)) * 255).byte(), torch.arange(13) % 3, torch.device("cpu"), ["a", "b", "c"])
    c, counted = dict(img_size=[4, 4], test_size=0, test_crop=1.0, workers=0, amp="off"), []
    monkeypatch.setattr(finetune, "sum_over_processes", lambda values, place: (counted.append(torch.tensor(values)), values)[1])
    for place in (PLACE, *(PLACE._replace(rank=rank, world=3) for rank in range(3))):
        finetune.evaluate(Fixed(), data, c, place, pretrain.BadFiles(13, 1))
    assert torch.equal(counted[0], sum(counted[1:])) and counted[0][3:].sum() == 13


def test_eval_refuses_what_would_mean_nothing(of, labelled, tmp_path, capfd):
    assert of(finetune, "--steps", 1)[0] == 0
    state = {k: v for k, v in weights_of(tmp_path / "run").items() if not k.startswith("norm.")}
    torch.save(state | {"fc_norm.weight": torch.ones(128)}, tmp_path / "mae.pt")               # MAE's own, mean-pooled
    shutil.copytree(labelled, tmp_path / "data")
    shutil.move(tmp_path / "data/val/class2", tmp_path / "data/val/0class")
    for weights, flags, says in (("mae.pt", ["--model", "vit_micro", "--img_size", "16", "--patch_size", "4", "--data", str(labelled)], "lacks norm.weight, norm.bias"),
                                 ("run", ["--data", str(tmp_path / "data")], "class0 there is 0class here"), ("run", ["--labels", "2"], "--labels does nothing with --eval"),
                                 ("run", ["--compile"], "--compile does nothing with --eval"),
                                 ("run", ["--out", str(tmp_path / "run")], "holds a run with its own result")):
        argv = ["--weights", str(tmp_path / weights), "--eval", "--workers", "0", "--amp", "off", "--out", str(tmp_path / "eval"), *flags]
        assert pretrain.command(finetune.run, finetune.options, argv) == 2
        assert says in capfd.readouterr().err.strip().splitlines()[-1]
    codes, said = together("finetune", *measuring(tmp_path / "run", tmp_path / "run"))
    assert codes == [2, 2], said                                # both leave, none waits


def test_a_size_that_is_asked_for_is_what_is_measured(of, tmp_path):
    """RSB measures at 224 what it trains at 160, but not what someone wants at another size."""
    code, said, _ = of(finetune, "--model", "resnet18", "--recipe", "rsb_a3", "--img_size", 32, 64, "--patch_size", 8, "--steps", 1)
    assert code == 0 and "input 32x64, measured on 13 at 32x64, the central 0.95" in said
    assert json.load(open(tmp_path / "run/config.json"))["test_size"] == 0


def test_the_encoder_and_what_it_was_made_with_come_from_the_run(run, labelled, tmp_path, capfd):
    assert run("--task", "mask", "--relative_positions", "--img_size", 16, 24, "--steps", 2, data=labelled)[0] == 0
    argv = ["--weights", str(tmp_path / "run"), "--steps", "1", "--batch_size", "4", "--workers", "0", "--amp", "off",
            "--lr", "1e-9", "--out", str(tmp_path / "fine")]
    assert pretrain.command(finetune.run, finetune.options, argv) == 0
    c, before, after = json.load(open(tmp_path / "fine/config.json")), weights_of(tmp_path / "run"), weights_of(tmp_path / "fine")
    assert c["model"] == "vit_micro" and c["img_size"] == [16, 24] and c["patch_size"] == 4 and c["relative_positions"] and c["data"] == str(labelled)
    shared = [k for k in after if k in before]
    assert len(shared) == len(after) - 2 and all(torch.allclose(after[k], before[k], atol=1e-7) for k in shared)


def test_labels_keeps_k_a_class(of, tmp_path):
    code, said, _ = of(finetune, "--labels", 2)
    assert code == 0 and "6 images of 3 classes (2 a class, draw 0)" in said and result_of(said)["labels"] == 2


def test_other_seeds_may_have_the_same_labels(labelled, monkeypatch):
    """--draw says which labels, by default --seed does."""
    def kept(*argv):
        args = finetune.options().parse_args([*"--data x --labels 4".split(), *argv])
        args.data, args.root = str(labelled), "data"
        return finetune.labelled_data(args, PLACE)[0].paths.tolist()
    assert kept("--seed", "1") == kept("--seed", "2", "--draw", "1") == kept("--draw", "1") != kept("--seed", "2")


def test_a_drawing_without_labels_is_refused(of):
    for module in (finetune, probe):
        code, _, complaint = of(module, "--draw", 1)
        assert code == 2 and "--draw 1 does nothing without --labels" in complaint
    assert "--draw -1 must not be negative" in of(finetune, "--labels", 2, "--draw", -1)[2]


def test_saving_and_measuring_do_not_count_as_training(of, tmp_path, monkeypatch):
    """images_per_s of log.jsonl: a step of 8 images that takes a second, and 100 seconds of measuring after every third."""
    now = [0.0]
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: now[0])

    def slow(name, seconds, real):
        def instead(*a):
            now[0] += seconds
            return real(*a)
        monkeypatch.setattr(finetune, name, instead)
    slow("class_loss", 1, finetune.class_loss), slow("evaluate", 100, finetune.evaluate)
    assert of(finetune)[0] == 0
    assert [line["images_per_s"] for line in log_of(tmp_path / "run") if "loss" in line] == [8.0] * 6 and now[0] == 206


def test_the_result_finds_its_baseline(of, tmp_path):
    none = result_of(of(finetune, out=tmp_path / "a")[1])
    of(finetune, "--seed", 1, out=tmp_path / "b")
    shutil.copy(tmp_path / "a/checkpoint.pt", tmp_path / "encoder.pt")
    mine = result_of(of(finetune, "--weights", tmp_path / "encoder.pt", out=tmp_path / "c")[1])
    assert mine["compared_with"] == dict(weights="none", out=str(tmp_path / "a"), top1=none["top1"], top5=none["top5"], images=13)
    other = result_of(of(finetune, "--weights", tmp_path / "encoder.pt", out=tmp_path / "e")[1])
    assert other["compared_with"] == mine["compared_with"]      # not with the run from other weights
    alone = result_of(of(finetune, "--weights", tmp_path / "encoder.pt", "--seed", 5, out=tmp_path / "d")[1])
    missing = alone["compared_with"]["missing"]
    assert missing.startswith("finetune.py --weights none --model vit_micro --data ") and "--img_size 16 16" in missing
    for name, text in (("x", '{"accuracy": 1}'), ("y", "[1]"), ("z", "half a li"), ("0", '{"weights": "none"}')):       # others' files
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    assert result_of(of(finetune, "--weights", tmp_path / "encoder.pt", out=tmp_path / "f")[1])["compared_with"] == mine["compared_with"]
    cropped = result_of(of(finetune, "--weights", tmp_path / "encoder.pt", "--test_crop", 0.5, out=tmp_path / "g")[1])
    assert "missing" in cropped["compared_with"]                # measured otherwise


def test_the_way_to_a_probes_baseline_leads_there(of, tmp_path, short_fits):
    torch.save(models.encoder("vit_micro", 16, 4, relative_positions=True).state_dict(), tmp_path / "encoder.pt")
    flags = ["--weights", tmp_path / "encoder.pt", "--relative_positions"]
    way = result_of(of(probe, *flags, out=tmp_path / "a")[1])["compared_with"]["missing"].split(", and what else")[0].split()
    assert way[0] == "probe.py" and of(probe, *way[1:], out=tmp_path / "none")[0] == 0
    assert result_of(of(probe, *flags, out=tmp_path / "a")[1])["compared_with"]["out"] == str(tmp_path / "none")


def test_a_measurement_is_not_overwritten_by_another(of, tmp_path, short_fits):
    """The same again may be, as after more pre-training."""
    assert of(probe, "--weights", "none")[0] == of(probe, "--weights", "none")[0] == 0
    code, _, complaint = of(probe, "--weights", "none", "--pool", "mean")
    assert code == 2 and "holds a result with pool cls, not mean: choose another --out" in complaint


def test_the_way_to_a_baseline_leads_there(of, tmp_path):
    """The command that a result names, and what else was given: the result is then compared with it."""
    more = ["--recipe", "rsb_a3", "--steps", 1, "--batch_size", 8]
    torch.save(models.encoder("resnet18", 32, 8).state_dict(), tmp_path / "encoder.pt")
    flags = ["--weights", tmp_path / "encoder.pt", "--model", "resnet18", "--img_size", 32, "--patch_size", 8, "--test_size", 64, *more]
    way = result_of(of(finetune, *flags, out=tmp_path / "a")[1])["compared_with"]["missing"].split(", and what else")[0].split()
    assert way[0] == "finetune.py" and of(finetune, *way[1:], *more, out=tmp_path / "none")[0] == 0
    assert result_of(of(finetune, *flags, out=tmp_path / "b")[1])["compared_with"]["out"] == str(tmp_path / "none")


MIXED = ["--mixup", 0.8, "--cutmix", 1, "--drop_path", 0.3, "--rand_augment", 9, 0.5]


def test_same_seed_same_run_and_accumulation_does_not_change_it(of, tmp_path):
    for name, flags in (("a", []), ("b", []), ("c", ["--accum", 2]), ("d", ["--seed", 1])):
        assert of(finetune, *MIXED, *flags, out=tmp_path / name)[0] == 0
    a, b, c, d = (gradients_of(tmp_path / name) for name in "abcd")
    assert torch.equal(a, b) and not torch.allclose(a, d, atol=1e-4)
    torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("less", ["--mixup 0 --cutmix 0", "--drop_path 0", "--rand_augment 0 0", "--smoothing 0"])
def test_each_part_of_the_recipe_reaches_the_run(less, of, tmp_path):
    for name, flags in (("with", []), ("without", less.split())):
        assert of(finetune, *MIXED, "--steps", 1, *flags, out=tmp_path / name)[0] == 0
    assert not torch.equal(gradients_of(tmp_path / "with"), gradients_of(tmp_path / "without"))


def test_two_processes_equal_one(of, labelled, tmp_path):
    """Training with everything random, and measuring on 13 images: each counted once."""
    said = of(finetune, *MIXED, out=tmp_path / "one")[1]
    argv = "--model vit_micro --img_size 16 --patch_size 4 --workers 0 --amp off --batch_size 8 --save_every 3 --log_every 1 --steps 6".split()
    codes, said_by_two = together("finetune", *argv, *MIXED, "--data", labelled, "--out", tmp_path / "two")
    assert codes == [0, 0], said_by_two
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 13 and one["top1"] == two["top1"] and one["top5"] == two["top5"] == result_of(said)["top5"]
    torch.testing.assert_close(gradients_of(tmp_path / "one"), gradients_of(tmp_path / "two"), atol=1e-5, rtol=1e-3)


def test_two_processes_fine_tune_a_resnet_as_one(of, labelled, tmp_path):
    """Batch norm over both, LAMB, BCE, stochastic depth."""
    flags = "--model resnet18 --img_size 32 --patch_size 8 --recipe rsb_a2 --test_size 0 --batch_size 12 --steps 2".split()
    assert of(finetune, *flags, out=tmp_path / "one")[0] == 0
    codes, said = together("finetune", *flags, "--workers", 0, "--amp", "off", "--data", labelled, "--out", tmp_path / "two")
    assert codes == [0, 0], said
    a, b = (gradients_of(tmp_path / name) for name in ("one", "two"))
    assert (a - b).norm() < 0.02 * a.norm()
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 13


class Killed(BaseException):
    pass


def test_resume_equals_never_stopping(of, tmp_path, monkeypatch):
    """Killed between saving and measuring: what was not measured is measured first; weights and log are the same bits."""
    torch.save(models.encoder("vit_micro", 16, 4).state_dict(), tmp_path / "encoder.pt")
    flags = [*MIXED, "--weights", tmp_path / "encoder.pt"]
    assert of(finetune, *flags, out=tmp_path / "whole")[0] == 0

    def killed(*_):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finetune, "evaluate", killed)
        of(finetune, *flags, out=tmp_path / "parts")
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 3
    os.remove(tmp_path / "encoder.pt")                          # the checkpoint holds all weights
    code, said, _ = of(finetune, *flags, "--resume", out=tmp_path / "parts")
    assert code == 0 and result_of(said)["images"] == 13
    assert torch.equal(gradients_of(tmp_path / "whole"), gradients_of(tmp_path / "parts"))
    shown = lambda name: [{k: line[k] for k in ("step", "loss", "top1") if k in line} for line in log_of(tmp_path / name)]
    assert shown("parts") == shown("whole") and [line["step"] for line in shown("parts") if "top1" in line] == [3, 6]
    lines = (tmp_path / "parts/log.jsonl").read_text()
    code, again, _ = of(finetune, *flags, "--resume", out=tmp_path / "parts")                  # after its end: measured again
    assert code == 0 and result_of(again)["top1"] == result_of(said)["top1"] and (tmp_path / "parts/log.jsonl").read_text() == lines


def test_a_head_is_fresh_and_small_whatever_the_weights_hold(of, tmp_path):
    """MAE's start: a classifier of as many classes, of some other set, is left behind; --eval keeps it."""
    state = models.encoder("vit_micro", 16, 4, num_classes=3).state_dict()
    state["head.weight"].fill_(7)
    torch.save(state, tmp_path / "other.pt")
    assert of(finetune, "--weights", tmp_path / "other.pt", "--steps", 1, "--lr", 1e-9)[0] == 0
    assert 1e-5 < weights_of(tmp_path / "run")["head.weight"].std() < 4e-5
    c = dict(model="vit_micro", img_size=[16, 16], patch_size=4, channels=3, relative_positions=False, pool="mean", seed=0)
    assert (finetune.load_model(c, state, PLACE, 3, keep_head=True)[0].head.weight == 7).all()


def test_what_other_files_call_config_is_not_taken_for_ours(labelled, tmp_path, capfd):
    state = models.encoder("vit_micro", 16, 4, num_classes=3).state_dict()
    argv = ["--weights", str(tmp_path / "w.pt"), "--data", str(labelled), "--recipe", "small", "--model", "vit_micro", "--workers", "0"]
    for i, config in enumerate(({"model": "deit_tiny", "img_size": 224}, {"model": "vit_micro", "img_size": 16}, {"classes": 3}, [1])):
        torch.save(dict(model=state, config=config), tmp_path / "w.pt")
        assert pretrain.command(finetune.run, finetune.options, [*argv, "--steps", "1", "--batch_size", "6", "--out", str(tmp_path / str(i))]) == 0
        assert pretrain.command(finetune.run, finetune.options, [*argv, "--eval", "--out", str(tmp_path / f"eval{i}")]) == 0, capfd.readouterr().err


def test_a_picture_that_cannot_be_written_is_one_line(of, tmp_path):
    (tmp_path / "run/confusion.png").mkdir(parents=True)
    code, _, complaint = of(finetune, "--steps", 1)
    assert code == 1 and "could not write" in complaint and "confusion.png" in complaint and "Traceback" not in complaint


def test_a_picture_that_cannot_be_written_stops_every_process(tmp_path, monkeypatch):
    (tmp_path / "confusion.png").mkdir()
    monkeypatch.setattr(pretrain, "sum_over_processes", lambda values, place: [1.0])                        # what rank 0 has found
    for rank, says in ((0, "could not write"), (1, "")):
        with pytest.raises(pretrain.Failure) as failure:
            finetune.write_confusion(dict(out=str(tmp_path)), PLACE._replace(rank=rank, world=2), torch.eye(2), ["a", "b"])
        assert says in str(failure.value) and bool(str(failure.value)) == (rank == 0)


def test_a_run_is_called_after_its_weights(tmp_path):
    for name in ("mask-0.5", "mask-0.75"):
        (tmp_path / name).mkdir()
        for weights in (tmp_path / name, tmp_path / name / "checkpoint.pt"):
            assert finetune.folder_name("probe", dict(weights=str(weights), data="shapes", seed=0)) == f"probe-{name}-shapes"
    assert finetune.folder_name("probe", dict(weights="a/resnet50.pth", data="b/imagenet", seed=2)) == "probe-resnet50-imagenet-seed2"
    assert finetune.folder_name("probe", dict(weights="a.pth", data="b", labels=5, draw=0, blocks=2, seed=0)) == "probe-a-b-5-blocks2"
    assert finetune.folder_name("finetune", dict(weights="a.pth", data="b", labels=5, draw=1, seed=2)) == "finetune-a-b-5-draw1-seed2"


def test_a_resnet_by_rsb(of, tmp_path):
    """LAMB, BCE, trained at 64 and measured at 96, stochastic depth, all from the recipe but the sizes."""
    code, said, complaint = of(finetune, "--model", "resnet18", "--recipe", "rsb_a2", "--img_size", 64, "--patch_size", 8, "--test_size", 96, "--steps", 2)
    assert code == 0 and "rsb_a2: resnet18" in said and "lamb, layer decay 1, weight decay 0.02" in said and "loss bce" in said, complaint
    assert {"exp_avg", "exp_avg_sq", "step"} == set(next(iter(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["optimizer"]["state"].values())))


def test_a_bad_image_to_measure_on_is_named_and_left_out(of, labelled, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    for i in range(150):
        shutil.copy(data / "val/class0/36.png", data / f"val/class0/more{i}.png")
    (data / "val/class0/36.png").write_bytes(b"no picture")
    code, said, complaint = of(finetune, data=data)
    assert code == 0 and result_of(said)["images"] == 162 and complaint.count("skipped") == 1 and "36.png" in complaint
    for i in range(4):
        (data / f"val/class0/more{i}.png").write_bytes(b"no picture")
    code, _, complaint = of(finetune, data=data, out=tmp_path / "other")
    assert code == 1 and "5 of 163 images to measure on cannot be read" in complaint and (tmp_path / "other/checkpoint.pt").exists()      # saved before


@pytest.mark.parametrize("flags, says", [
    (["--labels", 13], "--labels 13: class class0 has only 12 images"), (["--labels", 0], "--labels 0"),
    (["--layer_decay", 0], "--layer_decay 0"), (["--drop_path", 1], "--drop_path 1"), (["--test_crop", 2], "--test_crop 2"),
    (["--rand_augment", 11, 0], "--rand_augment 11"), (["--mixup", -1], "--mixup -1"),
    (["--seed", -1, "--labels", 2], "--seed -1"), (["--loss", "bce", "--smoothing", 0.5], "--smoothing 0.5 does nothing"),
    (["--model", "resnet18", "--pool", "cls", "--img_size", 32], "--pool cls is a ViT's"),
    (["--mixup", 1, "--batch_size", 3], "3 images at once are odd"),
    (["--recipe", "rsb_a3"], "--recipe rsb_a3 is a ResNet's: add --model resnet50"),
    (["--model", "resnet18", "--img_size", 32, "--relative_positions"], "relative positions are a ViT's"),
    (["--test_size", 32], "--test_size 32 is for a ResNet"),
    (["--model", "resnet18", "--layer_decay", 0.5, "--img_size", 32], "--layer_decay 0.5"),
    (["--weights", "nowhere.pt"], "no weights at nowhere.pt"),
])
def test_a_request_that_cannot_be_met_gets_one_line_and_exit_code_2(flags, says, of):
    code, _, complaint = of(finetune, *flags)
    assert code == 2 and says in complaint and len(complaint.strip().splitlines()) == 1


def test_classes_that_do_not_fit_get_one_line(of, labelled, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    shutil.move(data / "val/class1", data / "val/other")
    code, _, complaint = of(finetune, data=data)
    assert code == 2 and "without class1 (1)" in complaint and "more: other (1)" in complaint and complaint.count("\n") == 1
    shutil.copytree(data / "val/other", data / "val/class1")
    code, _, complaint = of(finetune, data=data)
    assert code == 2 and "more: other (1)" in complaint and "without" not in complaint
    shutil.rmtree(data / "val")
    code, _, complaint = of(finetune, data=data)
    assert code == 2 and f"there is no {data}/val" in complaint and complaint.count("\n") == 1
    (data / "val").mkdir()
    Image.new("RGB", (8, 8)).save(data / "val/loose.png")
    code, _, complaint = of(finetune, data=data)
    assert code == 2 and "loose.png is in no class" in complaint and complaint.count("\n") == 1


def test_weights_that_do_not_fit_are_named_with_their_shapes(of, labelled, tmp_path, capfd):
    assert of(finetune, "--steps", 1, out=tmp_path / "a")[0] == 0
    code, _, complaint = of(finetune, "--weights", tmp_path / "a", "--patch_size", 8)
    assert code == 2 and "patch_embed.proj.weight is (128, 3, 4, 4) in the weights and (128, 3, 8, 8) in the model" in complaint and complaint.count("\n") == 1
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    shutil.rmtree(data / "train/class2"), shutil.rmtree(data / "val/class2")
    code, said = measured(tmp_path / "a", tmp_path / "eval", "--data", data), capfd.readouterr().err
    assert code == 2 and "a classifier of 3 classes" in said and "has 2 classes" in said and said.count("\n") == 1
    assert of(finetune, "--weights", tmp_path / "a", "--steps", 1, data=data, out=tmp_path / "b")[0] == 0                 # a new head


def test_sigterm_saves_and_leaves(labelled, tmp_path):
    argv = "--model vit_micro --img_size 16 --patch_size 4 --workers 0 --amp off --batch_size 8 --save_every 100000 --log_every 1 --steps 100000".split()
    (job,), said = forked(command, "finetune", *argv, "--data", labelled, "--out", tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    while job.is_alive() and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.01)
    job.terminate()
    codes, said = ended([job], said)
    assert codes == [143] and "stopped by signal 15, saved" in said and (tmp_path / "run/checkpoint.pt").exists()
