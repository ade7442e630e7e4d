"""Fine-tuning (BM 4.2; A2 5.2, A.1, Table A2): its parts by hand, and the command."""
import functools
import math
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
import models
import pretrain
from conftest import (ONE, RESNET, checkpoint_of, close, command, equal, gradients_of, json_of,
                      log_of, spoil, stop, together, weights_of)

CPU = torch.device("cpu")
HERE = "--workers 0 --amp off --device cpu".split()
VIT = "--model vit_micro --img_size 16 --patch_size 4".split()
TWO = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 40, 60)  # black, white


def plain(*argv):
    return command(finetune, *argv, *HERE)


@pytest.fixture
def tuned(done):
    """tuned(name, options) -> the folder of that name, of a fine-tuning that ends well."""
    return functools.partial(done, module=finetune)


def memory(images, labels, classes="abc"):
    return pretrain.MemorySet(images, torch.as_tensor(labels), list(classes), "made by hand")


# --- The recipes ---

DEIT = dict(model="vit_base", recipe="deit", img_size=[224], patch_size=16, batch_size=1024,
            optimizer="adamw", betas=[0.9, 0.999], weight_decay=0.05, clip=5, layer_decay=0.65,
            drop_path=0.1, smoothing=0.1, rand_augment=[9, 0.5], mixup=0.8, cutmix=1, loss="ce",
            random_erasing=0, pool="mean", crop=[0.08, 1], test_crop=0.875, schedule="cosine")
BM = dict(DEIT, recipe="bm", clip=0, layer_decay=0.75, random_erasing=0.25, pool="cls")
RSB_A3 = dict(model="resnet50", recipe="rsb_a3", img_size=[160], batch_size=2048, optimizer="lamb",
              weight_decay=0.02, clip=0, layer_decay=1, drop_path=0, smoothing=0, mixup=0.1,
              rand_augment=[6, 0.5], cutmix=1, loss="bce", test_size=224, test_crop=0.95,
              crop=[0.08, 1], schedule="cosine")
RSB_A2 = dict(RSB_A3, recipe="rsb_a2", img_size=[224], drop_path=0.05, rand_augment=[7, 0.5])


@pytest.mark.parametrize("flags, epochs, lr, table", [
    ("", 100, 4e-3, BM), ("--recipe deit", 100, 1e-3, DEIT),
    ("--model resnet50", 100, 8e-3, RSB_A3),
    ("--model resnet50 --recipe rsb_a2", 300, 5e-3, RSB_A2),
    ("--model resnet50 --recipe deit", 100, 1e-3, dict(DEIT, model="resnet50", layer_decay=1))])
def test_on_a_folder_the_recipe_is_the_papers(flags, epochs, lr, table, tmp_path, imagenet):
    """BM 4.2 and its code, A2's Table A2. 5 epochs of warm-up. lr is that of the whole batch.

    A2's B.1 fine-tunes a ResNet-50 as a ViT. Its Table A2 has another lr for RSB A2, see RECIPES.
    """
    args, _, _ = finetune.options(["--data", str(tmp_path), *flags.split()])
    assert {name: getattr(args, name) for name in table} == table
    assert (args.epochs, args.warmup_share * epochs) == (epochs, pytest.approx(5))
    assert args.lr * args.batch_size / 256 == pytest.approx(lr)


@pytest.mark.parametrize("flags, batch, epochs", [("", 64, 8889), ("--labels 2", 64, 53334)])
def test_few_images_have_a_small_batch_and_5000_steps(flags, batch, epochs, labelled):
    """36 of them, or 6."""
    argv = ["--data", str(labelled), "--model", "vit_micro", *flags.split()]
    args, _, _ = finetune.options(argv)
    assert (args.recipe, args.batch_size, args.epochs) == ("small", batch, epochs)
    assert (args.img_size, args.patch_size, args.crop) == ([224], 16, [0.8, 1])
    assert args.lr == 8e-3


def test_each_part_of_the_recipe_reaches_the_run(tuned):
    """Another value gives another gradient in the first step. The same seed gives the same."""
    changes = ("", "--batch_size 8", "--mixup 0", "--cutmix 0", "--drop_path 0", "--smoothing 0",
               "--rand_augment 0 0", "--loss bce", "--crop 1 1", "--pool cls", "--clip 0.001",
               "--random_erasing 1", "--labels 2", "--seed 1")
    found = []
    for i, change in enumerate(changes):
        found.append(gradients_of(tuned(str(i), f"--steps 1 {change}")))
        assert torch.equal(found[0], found[-1]) == (i < 2), change


def test_layer_decay_by_hand(tuned):
    """A2 A.1, BEiT: embeddings decay^(L + 1), block l of 1 .. L decay^(L + 1 - l), the rest 1.

    AdamW's first step moves a weight by its learning rate.
    """
    out = tuned("run", "--steps 1 --warmup 0 --weight_decay 0 --clip 0 --layer_decay 0.5 "
                "--lr 0.032 --betas 0.8 0.95 --drop_path 0 --relative_positions")
    torch.manual_seed(0)
    before = models.encoder("vit_micro", 16, 4, 3, 3, True).state_dict()
    after, held = weights_of(out), checkpoint_of(out)["optimizer"]["param_groups"]
    assert {group["betas"] for group in held} == {(0.8, 0.95)}
    del before["head.weight"]  # it begins at random
    for name in before:
        l = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        l = 7 if name.startswith(("norm", "head")) else l
        moved = (after[name] - before[name]).abs().max().item()
        assert moved == pytest.approx(0.032 * 8 / 256 * 0.5 ** (7 - l), rel=0.03), name


def test_each_step_has_its_own_rate_mix_and_drop_path(tuned, spy):
    """And each seed. A layer's rate is its share of the logged one."""
    drops, mixes = spy(models, "drop_path"), spy(finetune, "mix")
    for seed in (0, 1):
        out = tuned(str(seed), f"--steps 3 --seed {seed}")
        rate = [line["lr"] for line in log_of(out) if "lr" in line][-1]
        assert all(group["lr"] == pytest.approx(rate * group["lr_scale"])
                   for group in checkpoint_of(out)["optimizer"]["param_groups"])
    assert len({str(drop.tolist()) for _, drop in drops}) == 6
    assert len({str(rng.bit_generator.state) for (*_, rng), _ in mixes}) == 6


# --- Mixing, augmenting, losses, LAMB ---

@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_targets_are_the_shares_of_the_pixels(mixup, cutmix):
    """Mixup's share has the mean and the variance of Beta(a, a)."""
    kinds, shares = set(), []
    for step in range(40 if cutmix else 2000):
        rng = np.random.default_rng(step)
        mixed, targets = finetune.mix(TWO, torch.eye(2), mixup, cutmix, rng)
        assert torch.allclose(targets.sum(1), torch.ones(2))
        assert close(mixed.mean((1, 2, 3)), targets[:, 1])
        kinds.add("cutmix" if {*mixed.unique().tolist()} <= {0, 1} else "mixup")
        shares.append(targets[0, 0].item())
    assert kinds == {*["mixup"] * (mixup > 0), *["cutmix"] * (cutmix > 0)}
    if not cutmix:
        assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * mixup + 1)), rel=0.1)


@pytest.mark.parametrize("place, rows, columns", [
    ((0.5, 0.5), (10, 30), (15, 45)), ((0, 1), (0, 10), (45, 60))])
def test_a_box_of_cutmix_by_hand(place, rows, columns):
    """Its sides are H and W times sqrt(1 - share). It is cut off at the edge."""
    rng = SimpleNamespace(beta=lambda a, b: 0.75, random=lambda n: np.array(place))
    box = torch.zeros(40, 60)
    box[slice(*rows), slice(*columns)] = 1
    mixed, targets = finetune.mix(TWO, torch.eye(2), 0, 1.0, rng)
    assert torch.equal(mixed[:, 0], torch.stack([box, 1 - box]))
    assert targets[0, 1].item() == pytest.approx(box.mean().item())


def test_mixing_does_not_depend_on_how_a_batch_is_split():
    images, targets = torch.rand(8, 3, 6, 6), torch.eye(8)
    for step in range(4):
        whole, *parts = ([finetune.mix(i, t, 0.8, 1.0, np.random.default_rng(step))
                          for i, t in zip(images.split(k), targets.split(k))] for k in (8, 2, 4))
        for part in parts:
            assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole[0], zip(*part)))


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_depends_on_its_generator_alone(channels):
    image, before = (torch.rand(channels, 20, 24) * 255).byte(), torch.get_rng_state()

    def draws():
        return torch.stack([finetune.augmented(image, pretrain.seeded(i), 9, 0.5, 0.5)
                            for i in range(12)])
    first = draws()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    assert torch.equal(first, draws())
    assert (first != image).flatten(1).any(1).sum() > 4


def test_random_erasing():
    """A2 3.1: a part of .02 to .33 of the image, in so many images, is noise, normal once it is
    normalised. The rest stays.
    """
    image = torch.full((3, 60, 40), 100, dtype=torch.uint8)
    found = torch.stack([finetune.augmented(image, pretrain.seeded(i), 0, 0, 0.25)
                         for i in range(400)])
    changed = (found != 100).any(1)  # (400, 60, 40)
    some = changed.flatten(1).any(1)
    assert some.float().mean() == pytest.approx(0.25, abs=0.06)
    area = changed[some].float().mean((1, 2))
    assert 0.018 < area.min() and 0.25 < area.max() < 0.35
    for mask in changed[some]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() > 0.95 * rows * columns  # a rectangle, but for noise of just that value
    noise = found.movedim(1, 3)[changed].float() / 255
    assert noise.mean() == pytest.approx(0.45, abs=0.01)
    assert noise.std() == pytest.approx(0.225, abs=0.02)


def test_a_strength_of_nine_is_nine_tenths(monkeypatch):
    """timm's scale, Table A2's, ends at 10. Of two operations each is used half of the time."""
    strengths = []

    def operation(ops, magnitude, bins, *_):
        strengths.append(magnitude / (bins - 1))
        return lambda image: image + ops
    monkeypatch.setattr(finetune, "RandAugment", operation)
    image = torch.zeros(1, 1, 1, dtype=torch.uint8)
    used = [finetune.augmented(image, pretrain.seeded(i), 9, 0.5, 0).item() for i in range(400)]
    assert np.bincount(used) / 400 == pytest.approx([0.25, 0.5, 0.25], abs=0.08)
    assert (np.mean(strengths), np.std(strengths)) == pytest.approx((0.9, 0.05), abs=0.01)
    assert max(strengths) <= 1


def test_rand_augment_has_timms_strong_operations():
    """At 9 of 10 one bit is left of posterized colours; and inverted ones are there."""
    image = torch.arange(192).view(3, 8, 8).byte()
    found = [finetune.augmented(image, pretrain.seeded(i), 9, 0, 0) for i in range(400)]
    assert any(torch.equal(x, 255 - image) for x in found)
    assert any(torch.equal(x, image // 128 * 128) for x in found)
    assert len(finetune.RandAugment._AUGMENTATION_SPACE) == 14


def test_an_image_is_augmented_by_its_own_draw():
    """By seed, epoch and image, however a batch is split. 72 draws of 256 differ."""
    def augment(image, generator):
        return image + torch.randint(256, (1, 1, 1), generator=generator).byte()
    images, values = memory(torch.zeros(36, 1, 8, 8, dtype=torch.uint8), torch.zeros(36)), []
    for k in (8, 4):
        wanted = [(step, 8, slice(i, i + k)) for step in range(9) for i in range(0, 8, k)]
        views = images.batches(wanted, (4, 4), (1.0, 1.0), 0, CPU, 0, augment)
        values.append(torch.cat([view[:, 0, 0, 0] for view, _ in views]))
    assert torch.equal(*values) and len(values[0].unique()) > 50


@pytest.mark.parametrize("share, there", [(0.19, [1, 0, 0]), (0.21, [1, 1, 0])])
def test_bce_says_there_is_what_is_more_than_a_fifth(share, there):
    """RSB. The mean is over images and classes."""
    scores = [2.0, -1.0, 0.5]
    want = np.mean([math.log1p(math.exp(-s if t else s)) for s, t in zip(scores, there)])
    targets = torch.tensor([[1 - share, share, 0]])
    got = finetune.class_loss(torch.tensor([scores]), targets, SimpleNamespace(loss="bce"))
    assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("start, decay", [([3.0, 4], 0.1), ([3.0, 4], 0), ([0.0, 0], 0.1)])
def test_lamb_by_hand(start, decay):
    """Algorithm 2. Weights that are zero have no ratio, nor those without decay (RSB's code)."""
    w, x, m, v = torch.nn.Parameter(torch.tensor(start)), np.array(start), 0, 0
    group = dict(params=[w], weight_decay=decay)
    optimizer = finetune.LAMB([group], lr=0.2, betas=(0.9, 0.999))
    for t, g in ((1, np.array([1.0, -2])), (2, np.array([0.5, 0]))):
        w.grad = torch.tensor(g).float()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        u = m / (1 - 0.9 ** t) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-6) + decay * x
        ratio = np.linalg.norm(x) / np.linalg.norm(u) if decay and x.any() else 1
        x = x - 0.2 * ratio * u
        assert w.tolist() == pytest.approx(x, rel=1e-5)


# --- Labels, and what is measured ---

def test_few_labels_are_so_many_of_each_class_by_seed():
    images = memory(torch.arange(240).view(-1, 1, 1, 1).byte(), torch.arange(240) % 3)
    few, same, other = (finetune.few_labels(images, 7, seed) for seed in (0, 0, 1))
    assert few.labels.bincount().tolist() == [7, 7, 7]
    assert torch.equal(few.images.flatten() % 3, few.labels)
    assert torch.equal(few.images, same.images) and not torch.equal(few.images, other.images)


class Brightness(torch.nn.Module):
    """Eight classes in falling order, of bright images class 1 first."""

    def forward(self, images):
        assert not self.training
        self.size = images.shape[2:]
        scores = -torch.arange(8.0).repeat(len(images), 1)
        scores[images.mean((1, 2, 3)) > 0.5, 1] = 1
        return scores


def test_what_is_measured_by_hand():
    """Of the central half: the frame is bright. The true class is at the places 1, 1, 1, 5, 6."""
    images = torch.tensor([0, 0, 255, 0, 255]).view(5, 1, 1, 1).expand(5, 1, 4, 4).byte()
    images = memory(F.pad(images, [2] * 4, value=255), [0, 0, 1, 4, 5], range(8))
    args = SimpleNamespace(img_size=[4, 4], test_size=6, test_crop=0.5, workers=0)
    model = Brightness()
    found = finetune.evaluate(model, images, args, ONE, nullcontext)
    assert found == dict(top1=60, top5=80, images=5)
    assert model.size == (6, 6) and model.training


@pytest.fixture(scope="module")
def learned(labelled, tmp_path_factory):
    """A run that tells three brightnesses apart."""
    out = tmp_path_factory.mktemp("learned") / "run"
    flags = "--steps 20 --save_every 10 --lr 0.032 --drop_path 0 --seed 3".split()
    flags += ["--batch_size", 8, "--test_crop", 0.7, "--data", labelled, "--out", out]
    assert plain(*VIT, *flags) == 0
    return out


def test_a_run_learns_and_leaves_its_files(learned):
    want = dict(top1=100, top5=100, images=13, weights="none", steps=20, seed=3)
    assert want.items() <= json_of(learned).items()
    measured = {line["step"]: line["top1"] for line in log_of(learned) if "top1" in line}
    assert [*measured] == [10, 20] and measured[20] == 100
    assert {"checkpoint.pt", "config.json", "log.jsonl", "result.json"} == {*os.listdir(learned)}


def test_eval_keeps_the_classifier_and_counts_every_image_once(learned, data, tmp_path):
    """As the run did. Then three processes share 13 images, one in a wrong class; then two."""
    argv = ["--weights", learned, "--eval", *HERE, "--out"]
    assert plain(*argv, tmp_path / "a") == 0
    last = {name: log_of(learned)[-1][name] for name in ("top1", "top5", "images")}
    assert dict(last, seed=3).items() <= json_of(tmp_path / "a").items()
    shutil.move(data / "val/class0/36.png", data / "val/class2/36.png")
    together("finetune", *argv, tmp_path / "b", "--data", data, processes=3)
    assert dict(top1=92.31, images=13).items() <= json_of(tmp_path / "b").items()
    assert [*os.listdir(tmp_path / "b")] == ["result.json"]
    for path in sorted((data / "val").rglob("*.png"))[2:]:
        path.unlink()
    together("finetune", *argv, tmp_path / "c", "--data", data, processes=3)
    assert dict(top1=100, images=2).items() <= json_of(tmp_path / "c").items()


def test_eval_leaves_what_another_command_left(learned, tmp_path, capfd):
    (tmp_path / "result.json").write_text('{"weights": "another"}')
    for out, says in ((learned, "holds a run"), (tmp_path, "is of another")):
        assert plain("--weights", learned, "--eval", *HERE, "--out", out) == 2
        assert says in capfd.readouterr().err


def test_eval_without_the_classifier_is_refused(learned, data, tmp_path, capfd):
    shutil.move(data / "val/class2", data / "val/other")
    torch.save(models.encoder("vit_micro", 16, 4).state_dict(), tmp_path / "encoder.pt")
    for weights, says in ((learned, "other"), (tmp_path / "encoder.pt", "has no head for")):
        assert plain(*VIT, "--eval", "--data", data, "--out", tmp_path, "--weights", weights) == 2
        assert says in capfd.readouterr().err


def test_unreadable_images_do_not_count_and_over_1_percent_stop(learned, data, tmp_path, capfd):
    argv = ["--weights", learned, "--eval", "--data", data, "--out", tmp_path]
    spoil(data / "val/class0/36.png", copies=150)
    assert plain(*argv) == 0
    assert dict(top1=100, images=162).items() <= json_of(tmp_path).items()
    assert capfd.readouterr().err.count("36.png: cannot identify") == 1
    spoil(data / "val/class0/more0.png")
    assert plain(*argv) == 1
    assert "2 of 163 images cannot be read" in capfd.readouterr().err


# --- The weights that it begins with ---

@pytest.mark.parametrize("model, flags", [("vit_micro", ""), ("resnet18", RESNET)])
@pytest.mark.parametrize("kind", ["run", "file"])
def test_weights_are_what_training_begins_with(kind, model, flags, done, tuned, labelled, tmp_path):
    """All but the classifier. A file has timm's names, or torchvision's."""
    path, vit = tmp_path / "run", model == "vit_micro"
    if kind == "run":
        task = "mask" if vit else "a2mim"
        done("run", f"{flags} --task {task} --steps 1", data=labelled)
        args, _, _ = finetune.options(["--weights", str(path)])
        assert (args.model, args.data) == (model, str(labelled))
        before = weights_of(path)
    else:
        before = models.encoder(model, 16 if vit else 32, 4, num_classes=3).state_dict()
        before["head.bias" if vit else "fc.bias"].fill_(7)
        torch.save(before, path)
    flags += " --recipe deit" if vit else " --recipe rsb_a3 --test_size 0"
    held = checkpoint_of(tuned("fine", f"{flags} --lr 1e-9 --steps 1 --weights {path}"))
    after, optimizer = held["model"], held["optimizer"]
    for name, x in after.items():
        if name.startswith(("head", "fc")):
            assert x.abs().max() < 1, name
        elif "running" not in name and "num_batches" not in name:
            assert close(x, before[name], 1e-6), name
    if vit:  # MAE's start
        assert 1e-5 < after["head.weight"].std() < 4e-5
    else:  # the recipe's optimiser
        assert {*optimizer["state"][0]} == {"t", "m", "v"}
        assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.02, 0]


RUN = dict(model="vit_micro", img_size=[16, 24], patch_size=4, relative_positions=True)
MAPS = dict(model="resnet18", img_size=[96, 96], test_size=128)
LARGE = dict(model="vit_small", img_size=[224, 224])


@pytest.mark.parametrize("run, flags, want", [
    (RUN, [], RUN), (MAPS, [], dict(img_size=[160], test_size=224)), (MAPS, ["--eval"], MAPS),
    (MAPS, ["--img_size", "160"], dict(img_size=[160], test_size=224)),
    (MAPS, ["--eval", "--img_size", "64"], dict(img_size=[64], test_size=0)),
    (dict(RUN, head="segment", test_crop=0.5), ["--eval", "--head", "classify"],
     dict(test_crop=1.0)),
    (dict(RUN, head="detect", width=7), ["--eval", "--head", "segment"], dict(width=32)),
    (dict(LARGE, task="zoom_in"), [], dict(recipe="bm")), (LARGE, [], dict(recipe="bm")),
    (dict(LARGE, task="a2mim"), [], dict(recipe="deit")),
    (dict(LARGE, recipe="deit"), [], dict(recipe="deit"))])
def test_a_run_settles_model_sizes_and_recipe(run, flags, want, tmp_path, imagenet):
    """A2 pre-trains a ResNet at 224 and fine-tunes it at 160. --eval measures as the run did, if it
    was of images. A run's paper is its recipe.
    """
    config = dict(dict(patch_size=16), **run, data=str(tmp_path))
    torch.save(dict(model={}, config=config), tmp_path / "checkpoint.pt")
    args, _, _ = finetune.options(["--weights", str(tmp_path), *flags])
    assert {**want, "data": str(tmp_path)}.items() <= vars(args).items()


@pytest.mark.parametrize("weights", ["mask-0.5", "mask-0.5/checkpoint.pt", "mask-0.5.pth"])
def test_a_run_is_called_after_its_weights(weights, tmp_path):
    (tmp_path / "mask-0.5").mkdir()
    args = SimpleNamespace(weights=tmp_path / weights, data="x/shapes", labels=5, seed=2)
    assert finetune.run_name("finetune", args) == "finetune-mask-0.5-shapes-5-seed2"
    args.data = "."
    assert finetune.run_name("finetune", args) == f"finetune-mask-0.5-{Path.cwd().name}-5-seed2"


# --- The same run, however it is split or stopped ---

def test_neither_accumulation_nor_two_processes_change_the_run(labelled, tmp_path):
    """With all that is random: of three steps one is mixup, two are cutmix. 13 images to measure
    cannot be halved.
    """
    flags = [*VIT, *"--recipe deit --batch_size 8 --steps 3 --data".split(), labelled, *HERE]
    half = [*flags, "--accum", 2, "--out"]
    assert plain(*flags, "--out", tmp_path / "one") == plain(*half, tmp_path / "half") == 0
    together("finetune", *half, tmp_path / "two")
    for other in ("half", "two"):
        results, gradients = ([f(tmp_path / name) for name in ("one", other)]
                              for f in (json_of, gradients_of))
        assert results[0] == results[1] and results[0]["images"] == 13
        assert torch.allclose(*gradients, atol=1e-9, rtol=1e-3)  # most are below 1e-6


@pytest.mark.parametrize("name, step, code", [
    ("learning_rate", 1, 143), ("learning_rate", 2, 143), ("save", 6, 130)])
def test_resume_equals_never_stopping(name, step, code, of, tuned, tmp_path, monkeypatch):
    """The same bits, and each step and measurement once. A SIGTERM comes in step 2, or in step 3,
    which is measured. Or the run ends between measuring and saving.
    """
    parts, whole, real = tmp_path / "parts", tuned("whole"), getattr(pretrain, name)

    def stopped(at, *args):
        if at == step and code == 130:
            raise KeyboardInterrupt
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        return real(at, *args)
    with monkeypatch.context() as patch:
        patch.setattr(finetune if code == 143 else pretrain, name, stopped)
        assert of(finetune, out=parts)[0] == code
    tuned("parts", "--resume")
    assert torch.equal(gradients_of(parts), gradients_of(whole))
    assert equal(weights_of(parts), weights_of(whole))
    lines = [[{k: line[k] for k in ("step", "loss", "top1", "images") if k in line}
              for line in log_of(out)] for out in (parts, whole)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0] if "top1" in line] == [3, 6]
    (parts / "result.json").unlink()  # what is done is only measured again
    tuned("parts", "--resume")
    assert json_of(parts) == json_of(whole) and len(log_of(parts)) == len(lines[0])


def test_a_signal_in_the_last_step_changes_no_result(tuned, at):
    """Of a run that also saves, and measures, in an earlier step."""
    whole = tuned("whole", "--save_every 2 --steps 5")
    at(4, stop)
    last = tuned("last", "--save_every 2 --steps 5")
    assert json_of(last) == json_of(whole)
    assert log_of(last)[-1]["step"] == 5 and "top1" in log_of(last)[-1]


# --- What is refused ---

def test_a_loss_that_is_not_finite_stops_the_run(refused, tmp_path):
    assert "step 2: the loss is nan" in refused("--lr 1e30", code=1, module=finetune)
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_scores_that_are_not_finite_are_no_accuracy(learned, data, tmp_path, capfd):
    held = models.read_weights(learned)
    held["model"]["norm.weight"][3] = torch.inf
    torch.save(held, tmp_path / "x.pth")
    argv = ["--weights", tmp_path / "x.pth", "--eval", "--data", data, "--out", tmp_path]
    assert plain(*argv) == 1 and "the scores are not finite" in capfd.readouterr().err


@pytest.mark.parametrize("flags, says", [
    ("--labels 13", "--labels 13: class class0 has only 12"),
    ("--mixup 1 --batch_size 3", "3 at once are odd"),
    ("--weights nowhere.pt", "no weights at nowhere.pt")])
def test_what_cannot_be_done_gets_one_line_and_exit_code_2(flags, says, refused):
    assert says in refused(flags, module=finetune)


def test_other_classes_to_measure_on_are_refused(refused, data):
    shutil.move(data / "val/class1", data / "val/other")
    assert "trained on: other" in refused(module=finetune, data=data)
