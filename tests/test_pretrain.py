"""The trainer: data, randomness by (seed, step), the run, resuming, processes, and each fault."""
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import degrade
import losses
import models
import pretrain as P
from conftest import (ONE, RESNET, ROOT, TINY, checkpoint_of, close, equal, gradients_of, json_of,
                      loaded, log_of, losses_of, script, spoil, stop, together, weights_of)

CPU = torch.device("cpu")


@pytest.fixture
def processes(folder, tmp_path):
    """processes(n, options) -> what was said of a run in n of them in run/. more: `together`'s."""
    def go(n, options="", data=folder, **more):
        return together("pretrain", *TINY, *options.split(), "--data", data, "--out",
                        tmp_path / "run", processes=n, **more)
    return go


def before(step, action):
    """What `at` does, in Python that runs first in a process of its own."""
    return ("import os, pretrain as P\nreal = P.learning_rate\nP.learning_rate = lambda now, *more:"
            f"(now == {step} and {action}, real(now, *more))[1]")


def config_of(out):
    config = json_of(out, "config")
    return {**config, **config["settings"]}


def token_of(out):
    """Where a run's token enters, and what its hidden patches hold."""
    return "{token_at} {fill}".format(**config_of(out))


def same(a, b):
    """Two runs have the same log, weights, running means and scaler, bit for bit."""
    x, y = ([(line["step"], line["loss"]) for line in log_of(out)] for out in (a, b))
    assert x == y
    assert equal(weights_of(a), weights_of(b))
    assert torch.equal(gradients_of(a), gradients_of(b))
    assert checkpoint_of(a)["scaler"] == checkpoint_of(b)["scaler"]


def alike(a, b, tolerance=1e-3):
    """Two runs have the same losses and gradients but for rounding."""
    assert losses_of(a) == pytest.approx(losses_of(b), rel=1e-4)
    x, y = gradients_of(a), gradients_of(b)
    assert (x - y).norm() < tolerance * x.norm()


def test_built_in_pictures_are_the_same_however_they_are_asked_for():
    """A seed is a set. The ten classes are equally often, and a label is what is drawn."""
    whole, again, other = (P.Drawn(60, size=24, seed=seed) for seed in (3, 3, 4))
    rows = torch.randperm(60, generator=P.seeded(0))
    pictures = whole[torch.arange(60)]
    assert torch.equal(torch.cat([again[row] for row in rows.split(7)]), pictures[rows])
    assert not torch.equal(other[torch.arange(60)], pictures)
    for i, outline in enumerate(P.SHAPES.values()):
        few = (whole.labels == i).nonzero()[:, 0]
        assert len(few) == 6
        r = whole.numbers[few].T[:, :, None, None]
        drawn, _ = P.draw_shapes([(outline, r, 0.62 + 0.28 * r[0])], 24)
        assert torch.equal(drawn, pictures[few])


@pytest.mark.parametrize("height, width", [(375, 500), (48, 48)])
def test_crop_boxes_are_those_of_random_resized_crop(height, width):
    def measured(boxes):
        top, left, h, w = boxes.T
        assert boxes.min() >= 0 <= min((height - top - h).min(), (width - left - w).min())
        x = np.stack([h * w / (height * width), w / h, top / height, left / width])
        return np.stack([x.min(1), x.max(1), x.mean(1), x.std(1)])
    u = torch.rand(4000, 22, generator=P.seeded(0)).numpy()
    ours = measured(P.crop_boxes(u, height, width, (0.2, 1.0)))
    torch.manual_seed(0)
    blank, bounds = torch.empty(3, height, width), ((0.2, 1.0), (3 / 4, 4 / 3))
    theirs = [RandomResizedCrop.get_params(blank, *bounds) for _ in u]
    assert ours == pytest.approx(measured(np.array(theirs)), abs=0.03)
    boxes = P.crop_boxes(u, height, width, (0.1, 0.2))  # they reach the far edges
    assert (boxes[:, :2] + boxes[:, 2:]).max(0).tolist() == [height, width]
    centre = [0, 194, 10, 13]  # where no box fits
    assert np.unique(P.crop_boxes(u, 10, 400, (0.2, 1.0)), axis=0).tolist() == [centre]


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_view_is_a_crop_as_pillows_half_of_the_time_flipped(kind, tmp_path):
    image = P.Drawn(1, size=64)[torch.arange(1)]
    page = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    page.save(tmp_path / "a.png")
    data = P.FolderSet(str(tmp_path))
    if kind == "memory":
        data = P.MemorySet(image, torch.zeros(1), ["a"], "one")
    views, _ = next(data.batches([(3, 100, slice(100))], (24, 32), (0.2, 0.8), 5, CPU))
    numbers, flips = torch.rand(100, 23, generator=P.seeded(5, P.CROP, 3)), 0
    for i, view in enumerate(views):
        u = numbers[i:i + 1]
        if kind == "folder":  # all are image 0, each in an epoch of its own
            u = torch.rand(1, 23, generator=P.seeded(5, P.CROP, 300 + i, 0))
        top, left, h, w = P.crop_boxes(u.numpy(), 64, 64, (0.2, 0.8))[0].tolist()
        box = (left, top, left + w, top + h)
        source, part = page.crop(box), None
        if kind == "memory":  # its edge blends with what is beyond
            source, part = page, box
        want = np.array(source.resize((32, 24), Image.BICUBIC, part))
        want = torch.from_numpy(want).permute(2, 0, 1) / 255
        straight, flipped = ((x - want).abs().max() < 0.02 for x in (view, view.flip(2)))
        assert straight or flipped
        flips += int(flipped)
    assert 35 < flips < 65


def test_every_epoch_has_each_image_once():
    """A batch may begin in one epoch and end in the next. A seed is an order."""
    steps = [P.samples(step, 8, 20, seed=1) for step in range(5)]  # 40 images
    epoch, index = torch.cat(steps).T
    assert epoch.tolist() == [0] * 20 + [1] * 20
    assert steps[2][:, 0].unique().tolist() == [0, 1]
    assert sorted(index[:20].tolist()) == sorted(index[20:].tolist()) == list(range(20))
    assert not torch.equal(index[:20], index[20:])
    assert not torch.equal(steps[0], P.samples(0, 8, 20, seed=2))


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_batch_does_not_depend_on_how_it_is_split(kind, folder):
    """Neither do the views of a step on the steps before, or on loader workers."""
    data = loaded("shapes" if kind == "memory" else folder)

    def views(parts, steps=range(2), workers=0):
        wanted = [(step, 12, slice(*part)) for step in steps for part in parts]
        made = data.batches(wanted, (20, 24), (0.5, 1.0), 0, CPU, workers)
        return torch.cat([view for view, _ in made])
    whole = views([(0, 12)])
    assert whole.shape == (24, 3, 20, 24)
    assert not torch.equal(whole[:12], whole[12:])
    assert torch.equal(views([(0, 4), (4, 8), (8, 12)]), whole)
    assert torch.equal(views([(4, 8)]), torch.cat([whole[4:8], whole[16:20]]))
    assert torch.equal(views([(0, 12)], range(1, 2)), whole[12:])
    if kind == "folder":
        assert torch.equal(views([(0, 12)], workers=2), whole)


def test_any_image_is_read_as_rgb_and_upright(tmp_path):
    smooth = np.linspace(0, 255, 60 * 40 * 3).reshape(40, 60, 3).astype(np.uint8)
    rgb, exif = Image.fromarray(smooth), Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    grey = Image.fromarray(smooth[..., 0])
    for name, image, want in (
            ("a.jpg", rgb, rgb), ("turned.jpg", rgb.rotate(90, expand=True), rgb),
            ("turned.tif", grey.rotate(90, expand=True), grey),
            ("grey.png", grey, grey),
            ("palette.png", rgb.quantize(), rgb), ("alpha.png", rgb.convert("RGBA"), rgb),
            ("cmyk.jpg", rgb.convert("CMYK"), rgb)):
        image.save(tmp_path / name, **(dict(exif=exif) if "turned" in name else {}))
        got = degrade.read_image(str(tmp_path / name)).permute(1, 2, 0).numpy()
        assert got == pytest.approx(np.array(want.convert("RGB")).astype(int), abs=32), name


def test_a_folder_is_all_images_below_its_train_once(folder, tmp_path):
    """Links are followed, into no circle. Hidden and system files and a run's pictures are none."""
    one, data = next(folder.rglob("*.png")), tmp_path / "data/train"
    shutil.copytree(folder, data / "deep/er")
    hidden = ".DS_Store", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png"
    for name in (*hidden, "run/config.json", "run/log.jsonl", "run/a.png", "notes.txt",
                 "\udce9.png", "../../linked/A.PNG", "../outside.png"):
        (data / name).parent.mkdir(exist_ok=True)
        shutil.copy(one, data / name)
    (data / "link").symlink_to(tmp_path / "linked")
    (data / "up").symlink_to(data)
    found = loaded(tmp_path / "data")
    assert {b"link/A.PNG", b"\xe9.png"} < {*found.names.tolist()}
    assert "26 images" in found.found
    assert "(5 hidden or system names passed over, 1 files of other kinds left out)" in found.found
    assert found[(25, 0, (8, 8), (0.5, 1.0), 0, None)][3] == ""  # read under its name


@pytest.mark.parametrize("name, shape, train, val", [
    ("cifar10", (40, 32, 32, 3), dict(train=True), dict(train=False)),
    ("fashion_mnist", (40, 28, 28), dict(train=True), dict(train=False)),
    ("stl10", (40, 3, 96, 96), dict(split="train+unlabeled"), dict(split="test"))])
def test_torchvisions_sets_by_name(name, shape, train, val, done, monkeypatch):
    """Whatever their layout. A grey set trains a model of one channel."""
    class Fake:
        calls, classes, data = [], [], np.random.default_rng(0).integers(0, 256, shape, np.uint8)

        def __init__(self, root, download=False, **asked):
            Fake.calls.append((root, download, asked))
            setattr(self, "labels" if name == "stl10" else "targets", list(range(10)) * 4)

    monkeypatch.setattr(torchvision.datasets, P.SETS[name], Fake)
    args = P.options(["--data", name, "--root", "there", "--download"])
    data, _ = (P.load_data(args, ONE, split) for split in ("train", "val"))
    last = Fake.data[39]
    last = np.moveaxis(last, 2, 0) if shape[-1] == 3 else last.reshape(-1, *last.shape[-2:])
    assert Fake.calls == [("there", download, asked) for asked in (train, val)
                          for download in (True, False)]
    assert data.images[39].tolist() == last.tolist()
    assert data.labels.tolist() == list(range(10)) * 4
    weights = weights_of(done("run", "--steps 1", data=name))
    assert weights["patch_embed.proj.weight"].shape[1] == data.channels


@pytest.mark.parametrize("schedule, falls", [
    ("cosine", lambda x: 1 + math.cos(math.pi * x)), ("linear", lambda x: 2 - 2 * x)])
def test_learning_rate_warms_up_and_falls_to_zero(schedule, falls):
    lr = [P.learning_rate(step, 110, 10, 2.0, schedule) for step in range(110)]
    want = [0.2 * (i + 1) for i in range(10)] + [falls(i / 100) for i in range(100)]
    assert lr == pytest.approx(want)


def test_no_weight_decay_on_biases_norms_tokens_positions():
    model = models.recovery_model("vit_micro", 16, 4, relative_positions=True)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    got = {names[id(p)]: group["weight_decay"]
           for group in P.parameter_groups(model, 0.05) for p in group["params"]}
    assert not any("pos_embed" in name for name in names.values())  # fixed
    free = ("bias", "norm", "token", "pos_embed")
    assert got == {n: 0 if any(word in n for word in free) else 0.05 for n in names.values()}


IMAGENET = P.MemorySet(torch.empty(1281167, 3, 0, 0, dtype=torch.uint8), range(1281167), [], "")
BOTH = dict(model="vit_base", img_size=[224, 224], patch_size=16, weight_decay=0.05,
            batch_size=2048, micro_batch=256)
BM = dict(BOTH, epochs=300, warmed=20, lr=1.5e-4, betas=[0.9, 0.95], clip=0,
          crop=[0.2, 1], loss="mse", norm_target="patch", freq=[0, 1, False])
A2 = dict(BOTH, epochs=800, warmed=10, lr=1e-4, betas=[0.9, 0.999], clip=5,
          crop=[0.67, 1], loss="l1", norm_target="off", freq=[0.5, 1, False], fill="mean",
          mask_ratio=0.6, mask_unit=2, token_how="add", view=(224, 224))


@pytest.mark.parametrize("argv, paper, more", [
    ("--task mask", BM, dict(view=(224, 224), token_at="decoder", decoder="4x384x6")),
    ("--task zoom_in_mask", BM, dict(view=(320, 320), peak_lr=1.2e-3, accum=1, mask_ratio=0.75)),
    ("--task a2mim", A2, dict(token_at=8, peak_lr=8e-4, accum=1)),
    ("--task a2mim --model vit_small", A2, dict(model="vit_small", epochs=300, token_at=5)),
    ("--task a2mim --model resnet50", A2,
     dict(model="resnet50", epochs=300, lr=1.5e-4, clip=0, token_at=3)),
    ("--task simmim", dict(A2, freq=[0, 1, False], fill="token", token_how="replace"),
     dict(token_at=0)),
    ("--data shapes", {}, dict(epochs=15, batch_size=256, warmup_share=0.05, lr=1.5e-3)),
    ("--data cifar10", {}, dict(model="vit_micro", img_size=[32, 32], epochs=12, crop=[0.5, 1])),
    ("--data shapes --model resnet18 --lr 1", {}, dict(img_size=[64, 64], epochs=5, lr=1)),
])
def test_recipes(argv, paper, more, tmp_path, imagenet):
    """BM 4.1, A.1. A2 5.1, Table A1, and the epochs of its Tables 1 and 2. Eight processes."""
    args = P.options(["--data", str(tmp_path), *argv.split()])
    P.settle(args, P.Process(0, 8, CPU), IMAGENET)
    got, want = {**vars(args), **args.settings}, {**paper, **more}
    got["warmed"] = round(args.warmup_steps * args.batch_size / 1281167, 1)
    assert {name: got[name] for name in want} == want
    assert args.total == math.ceil(args.epochs * 1281167 / args.batch_size)


def test_a_runs_folder_has_its_seed(folder):
    for seed, end in (("0", ""), ("5", "-seed5")):
        args = P.options([*TINY, "--data", str(folder), "--seed", seed])
        P.settle(args, ONE, loaded(folder))
        assert args.out.name == f"zoom_in_mask-vit_micro-{folder.name}{end}"


@pytest.mark.parametrize("flags, images, want", [
    ("", 360, dict(batch_size=64, epochs=889)), ("", 6080, dict(batch_size=128, epochs=300)),
    ("--batch_size 512", 6080, dict(batch_size=512, epochs=422)),
    ("--batch_size 1024", 1281167, dict(batch_size=1024, epochs=300)),
    ("", 126689, dict(batch_size=2048, epochs=300)), ("--task a2mim", 50000, dict(batch_size=1024)),
    ("--model vit_micro", 6080, dict(lr=1.5e-3, crop=[0.5, 1], img_size=[224], batch_size=128)),
    ("--img_size 64 96", 6080, dict(lr=1.5e-4, crop=[0.2, 1])),
    ("--img_size 64 80", 6080, dict(lr=1.5e-3, crop=[0.5, 1], epochs=300))])
def test_the_recipe_follows_the_number_of_images(flags, images, want, tmp_path, monkeypatch):
    """A batch is a power of two, at least 64, at most a 32nd of them. 5,000 steps at least."""
    monkeypatch.setattr(P, "image_files", lambda *_, **__: (np.full(images, b"x.png"), ""))
    args = P.options(["--data", str(tmp_path), *flags.split()])
    assert want.items() <= vars(args).items()
    assert args.epochs * images / args.batch_size >= 5000
    as_paper = args.epochs == 300 and (args.batch_size == 2048 or "--batch_size" in flags)
    assert args.fitted == (None if as_paper else f"fitted to {images:,} images")


@pytest.mark.parametrize("task", degrade.TASKS)
def test_help_tells_the_true_defaults_of_a_tasks_settings(task, folder, capsys):
    argv = ["--task", task, "--data", str(folder)]
    with pytest.raises(SystemExit, match="0"):
        P.options([*argv, "--help"])
    said, args = capsys.readouterr().out, P.options(argv)
    shown = dict(re.findall(r"^  --(\w+)((?:.*\n)(?: {4}.*\n)*)", said, re.M))
    assert {name for name in degrade.SETTINGS if name in shown} == {*degrade.task_settings(task)}
    values = dict(vars(args), **args.settings, classes=None, task="zoom_in_mask", data="shapes")
    for name, text in shown.items():
        assert f"(default: {values[name]})" in " ".join(text.split()), name
    assert len(said.splitlines()) <= 75


@pytest.mark.parametrize("row", [
    # argparse
    "--frob | --frob", "--task mask --blur_kernel 5 | --blur_kernel", "--bat 8 | --bat",
    "--lr -1 | --lr", "--seed -1 | --seed",
    # what does not fit together
    "--batch_size 9 --accum 2 | --batch_size 9",
    "--token_at 7 | --token_at 7", f"{RESNET} --token_at decoder | --token_at decoder",
    "--fill zero --task mask | --fill zero", "--fill token --task a2mim | --fill token",
    "--task blur --mask_kind hole | --mask_kind does nothing with --mask_ratio 0",
    f"{RESNET} --task blur --token_at input | --token_at does nothing with resnet18",
    "--token_how scaled | --token_how does nothing with --token_at decoder",
    "--task distort --warp wave --twist 0 0 | --twist does nothing with --warp wave",
    "--freq_batch_mean | --freq_batch_mean does nothing with --freq_weight 0",
    "--task mask --band_weight 0.2 | --band_weight does nothing without an outer band",
    # the data and the model
    "--data /nowhere | is no folder", "--data tests | no images below",
    "--data cifar10 --root /nowhere | download", "--decoder 4x10x3 | 4x10x3",
    "--img_size 18 | 18x18", f"{RESNET} --relative_positions | relative",
    # degrade and torch
    "--task blur --blur_kernel 4 | blur kernel 4", "--mask_unit 3 | cells of 3",
    "--task zoom_out --zoom_fill other --batch_size 6 --accum 2 | not fours",
    f"{RESNET} --accum 8 | more than 1 value",
])
def test_what_is_refused_gets_one_line_and_exit_code_2(row, refused):
    argv, says = row.split(" | ")
    assert says in refused(argv)


def test_a_small_run_leaves_all_it_should(run, done, tmp_path):
    flags = "--lr 0.032 --accum 2 --warmup 1"
    code, said, _ = run("--log_every", 2, *flags.split())
    said, out = " ".join(said.split()), tmp_path / "run"
    numbers = sum(x.numel() for x in models.read_weights(out)["model"].values())
    for words in (f"vit_micro ({numbers:,} parameters)", "8 images = 4 x 1 processes x 2",
                  "recipe BM's, small, fitted to 24 images", ": 24 images",
                  "= 0.001,", "mask_ratio 0.75", "seed 0,", "done: "):
        assert words in said
    pictures = [f"recovered_{step:07d}.png" for step in (2, 4, 6)]
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "config.json", "log.jsonl", *pictures]
    assert {"command", "commit", "torch", "hardware"} < config_of(out).keys()
    keys, log = "step epoch lr loss grad_norm images_per_s data_wait".split(), log_of(out)
    assert [[*line] for line in log] == [keys] * 3
    assert [line["epoch"] for line in log] == pytest.approx([2 / 3, 4 / 3, 2])
    assert config_of(out)["warmup_steps"] == 3
    assert [(line["step"], line["lr"]) for line in log] == [
        (n, pytest.approx(P.learning_rate(n - 1, 6, 3, 0.001))) for n in (2, 4, 6)]
    held = checkpoint_of(out)["optimizer"]["param_groups"]
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in held] == [
        (log[-1]["lr"], (0.9, 0.95), decay) for decay in (0.05, 0)]
    each = losses_of(done("each", flags))
    assert losses_of(out) == {n: pytest.approx((each[n - 1] + each[n]) / 2) for n in (2, 4, 6)}
    assert models.load_encoder(out)(torch.rand(2, 3, 16, 16)).shape == (2, 128)


@pytest.mark.parametrize("flags, V, crop, norm, loss, weight", [
    ("--seed 5", 22, (0.5, 1), "patch", "mse", 0),
    ("--task a2mim --crop 0.2 0.4", 16, (0.2, 0.4), "off", "l1", 0.5),
    ("--task blur --view_size 22", 22, (0.5, 1), "patch", "mse", 0)])
def test_the_losses_of_a_run_by_hand(flags, V, crop, norm, loss, weight, done, folder):
    """view -> degrade -> model -> loss, all from the seed and the step."""
    c = config_of(out := done("run", f"{flags} --steps 2 --lr 1e-12"))
    torch.manual_seed(c["seed"])
    model = models.recovery_model("vit_micro", 16, 4, 3, c["token_at"], c["token_how"],
                                  c["decoder"])
    mean, std = (torch.tensor(x).view(3, 1, 1)
                 for x in (models.IMAGENET_MEAN, models.IMAGENET_STD))
    batches = [(step, 8, slice(8)) for step in (0, 1)]
    views = loaded(folder).batches(batches, (V, V), crop, c["seed"], CPU)
    for step, (got, (view, _)) in enumerate(zip(losses_of(out).values(), views, strict=True)):
        d = degrade.degrade(view, c["task"], 16, 4, P.seeded(c["seed"], P.DAMAGE, step),
                            **c["settings"])
        want = losses.recovery_loss(
            model(d.inputs, d.hidden), (d.target - mean) / std, (16, 16), 4, d.counted, norm,
            loss=loss, freq=(weight, 1, False))
        assert got == pytest.approx(want.item(), rel=1e-5)


def test_training_learns_the_built_in_pictures(done):
    out = done("run", "--task mask --batch_size 32 --steps 12 --lr 0.01", data="shapes")
    loss = list(losses_of(out).values())
    assert sum(loss[-3:]) < 0.95 * sum(loss[:3])


@pytest.mark.parametrize("task", degrade.TASKS)
@pytest.mark.parametrize("net", [
    "--img_size 16 24", "--model resnet18 --img_size 32 64 --patch_size 8"])
def test_every_task_trains_every_family(task, net, done):
    """A ResNet drops no patches: they are filled, and the token enters in the middle."""
    out = done("run", f"--task {task} {net} --steps 2")
    hides = degrade.TASKS[task].mask_ratio > 0
    assert all(0 < line["grad_norm"] < math.inf for line in log_of(out))
    want = {"simmim": "0 token", "a2mim": "3 mean"}.get(task, "decoder None")
    if "resnet" in net and task != "simmim":
        want = "3 mean" if hides else "none None"
    assert token_of(out) == want


A2MIM, MASK = "--task a2mim", "--task mask"
FIRST = {}  # of each task unchanged: its losses and its parameters


@pytest.mark.parametrize("row", [
    # A2 Fig. 6: where the token enters, and how; the mean colour in its place
    "simmim | --token_at input --token_how add | 0 token",
    "simmim | --token_at middle | 3 mean",
    "simmim | --token_at 4 --token_how scaled | 4 mean",
    f"simmim {RESNET} | --fill mean | 0 mean",
    "a2mim | --fill zero | 3 zero",
    "a2mim | --fill token --token_at input --token_how replace | 0 token",
    "a2mim | --token_at none | none mean",
    "a2mim | --token_at decoder | decoder None",
    # A2 Table 5: the frequency loss and its weights; the authors' spectrum
    "a2mim | --freq_weight 0 | 3 mean",
    "a2mim | --freq_alpha 0 | 3 mean",
    "a2mim | --freq_batch_mean | 3 mean",
    "a2mim | --mask_ratio 0 | none None",
    # any task
    "a2mim | --relative_positions | 3 mean",
    "mask | --relative_positions | decoder None",
    "mask | --token_at middle | 3 mean",
    "mask | --freq_weight 0.5 | decoder None",
    "mask | --norm_target channel | decoder None",
    "zoom_in_mask | --seed 5 | decoder None",
    "zoom_in_mask | --band_weight 0.2 | decoder None",
    "zoom_in_mask | --loss l1 | decoder None",
    "blur | --mask_ratio 0.5 --mask_kind hole | decoder None",
    "distort | --twist 0.1 0.15 | decoder None",
])
def test_every_ablation_is_another_run(row, done):
    """task | flags | token_of. It differs from the task's own in its losses or its parameters."""
    def result(name, more=""):
        out = done(name, f"--task {task} {more} --steps 2")
        return token_of(out), losses_of(out), [*weights_of(out)]
    task, flags, says = row.split(" | ")
    FIRST[task] = FIRST.get(task) or result("own")
    got, *changed = result("changed", flags)
    assert got == says
    assert changed != [*FIRST[task][1:]]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_clipping_bounds_the_gradient_and_keeps_its_direction(amp, done):
    outs = [done(f"{clip}", f"--clip {clip} --amp {amp} --steps 1") for clip in (0.01, 0)]
    clipped, whole = (gradients_of(out) / 0.1 for out in outs)  # 1 - beta1 is 0.1
    logged = [log_of(out)[0]["grad_norm"] for out in outs]
    assert logged == pytest.approx([whole.norm().item()] * 2, rel=1e-3)
    assert clipped.norm() == pytest.approx(0.01, rel=1e-3)
    assert close(clipped / clipped.norm(), whole / whole.norm(), 1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_lower_precision_has_nearly_the_same_curve(amp, done):
    low, full = ([*losses_of(done(x, f"--amp {x} --steps 3")).values()] for x in (amp, "off"))
    assert low == pytest.approx(full, rel=0.05)
    assert low != full


@pytest.mark.slow
def test_compiling_does_not_change_the_run(done):
    alike(done("a", "--steps 3"), done("b", "--steps 3 --compile"))


@pytest.mark.parametrize("argv", ["", f"{A2MIM} {RESNET}"])
def test_recover_is_the_models_own_prediction_and_changes_nothing(argv, folder):
    args = P.options([*TINY, *argv.split(), "--data", str(folder)])
    P.settle(args, ONE, loaded(folder))
    size, p = tuple(args.img_size), args.patch_size
    model = models.recovery_model(args.model, size, p, 3, args.token_at, args.token_how)
    view = torch.rand(4, 3, *args.view, generator=P.seeded(1))
    for training in (True, False):
        model.train(training)
        held = {name: x.clone() for name, x in model.state_dict().items()}
        d, prediction, _ = P.recover(model, view, args, P.seeded(0), nullcontext)
        assert model.training == training
        assert equal(model.state_dict(), held)
    assert torch.equal(prediction, model(d.inputs, d.hidden))


@pytest.mark.parametrize("flags, extra, borrowed", [
    (MASK, 0, True), (f"{A2MIM} --token_at none", 0, False), (A2MIM, 2, False)])
def test_the_picture_of_a_run(flags, extra, borrowed, done, spy):
    """A token inside the encoder: two more columns, all predicted (A2 Fig. A3)."""
    drawn = spy(degrade, "sheet")
    done("run", f"{flags} --steps 2 --lr 3")
    (columns, titles, note), _ = drawn[-1]  # two images a row
    n = 3 + extra
    assert titles == ["view", "encoder sees", "recovered", "all predicted", "without token"][:n] * 2
    assert ("borrowed" in note) == borrowed
    view, sees, recovered, *inside = columns[n:]
    changed = (sees != view).any(1, keepdim=True).expand_as(view)
    assert torch.equal(recovered[~changed], view[~changed])  # what is seen is pasted
    assert not torch.isclose(recovered[changed], view[changed], atol=1e-3).all()
    if extra:
        assert torch.equal(recovered[changed], inside[0][changed])
        assert not close(*inside, 1e-3)


@pytest.mark.parametrize("task, more", [
    ("zoom_in_mask", "--accum 2 --workers 1"), ("blur", "--accum 4"), ("a2mim", "--accum 8")])
def test_accumulation_and_workers_do_not_change_the_run(task, more, done):
    flags = f"--task {task} --steps 3"
    alike(done("one", flags), done("parts", f"{flags} {more}"))


@pytest.mark.parametrize("flags, more, tolerance", [
    ("--steps 3", "", 1e-3), ("--task zoom_out --steps 3", "--accum 2", 1e-3),
    # one step, and a ReLU that rounding turns is 1%; batch norms that are not shared are 300%
    (f"{A2MIM} {RESNET} --steps 1 --lr 1e-4", "", 0.05)], ids=["vit", "accumulated", "resnet"])
def test_two_processes_are_one(flags, more, tolerance, done, processes, tmp_path):
    """Each has half of the batch: its share of the same images, crops, masks and kernels."""
    one, two = done("one", flags), tmp_path / "run"
    processes(2, f"{flags} {more}")
    alike(one, two, tolerance)
    x, y = weights_of(one), weights_of(two)
    for name in x:
        assert torch.allclose(x[name], y[name], rtol=1e-4, atol=1e-5), name


def test_processes_with_other_images_are_refused_once(processes, folder, tmp_path):
    for rank in "01":
        shutil.copytree(folder, tmp_path / rank / "data")
    shutil.move(tmp_path / "1/data/class0/00.png", tmp_path / "1/data/class0/other.png")
    go = f"import os; os.chdir('{tmp_path}/' + os.environ['RANK'])"
    said = processes(2, preamble=go, data="data", code=2)
    assert said.count("other images in data") == len(said.splitlines()) == 1
    assert "rank 0 24 " in said and "rank 1 24 " in said


@pytest.mark.parametrize("flags, again", [
    ("", ""), ("--amp fp16", ""), (f"{A2MIM} {RESNET} --save_every 9", ""),
    ("--log_every 4", "--workers 1"), ("", "--accum 2")])
def test_resuming_equals_never_stopping(flags, again, run, done, at, tmp_path):
    """SIGTERM comes in the middle of an epoch and between two lines of the log. Accumulation and
    workers may change.
    """
    whole = done("whole", flags)
    at(4, stop)
    assert run(*flags.split(), out=tmp_path / "cut")[0] == 143
    assert checkpoint_of(tmp_path / "cut")["step"] == 5
    (alike if "accum" in again else same)(whole, done("cut", f"{flags} {again} --resume"))


def saving(how):
    """Python that runs first: torch.save does `how` at step 4."""
    return f"""
import os, resource, torch
def save(state, file, real=torch.save):
    if state["step"] == 4:
        {how}
    real(state, file)
torch.save = save"""


@pytest.mark.parametrize("killed", [
    before(3, "os.kill(os.getpid(), 9)"),
    saving("real(state, file); file.truncate(1000); os.kill(os.getpid(), 9)"),
], ids=["after a line of the log", "half way through a checkpoint"])
def test_after_kill_9_the_last_checkpoint_is_whole(killed, done, processes, tmp_path):
    """Resuming equals never stopping, and the log has each step once."""
    cut = tmp_path / "run"
    processes(1, preamble=killed, code=-9)
    assert checkpoint_of(cut)["step"] == 2 < len(log_of(cut))
    same(done("whole"), done("run", "--resume"))


@pytest.mark.parametrize("full, says", [
    ("real(state, file); file.truncate(1000); raise OSError(28, 'No space left')", "No space left"),
    ("resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))", "File too large")])
def test_a_full_disk_leaves_the_checkpoint_before(full, says, processes, tmp_path):
    """Also where torch.save's own error hides the disk's."""
    said = processes(2, preamble=saving(full), code=1)
    assert said.count(says) == said.count("pretrain.py: ") == 1
    assert checkpoint_of(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_folder_that_cannot_be_written(refused, at, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(out=tmp_path / "file/run")
    at(3, lambda: shutil.rmtree(tmp_path / "run"))
    assert "cannot write" in refused(code=1)


def test_a_checkpoint_goes_on_elsewhere(run, done, refused, at, folder, tmp_path):
    """In another --out, and on moved images, which are known by their names below --data."""
    old, moved, whole = tmp_path / "a", tmp_path / "moved", done("whole")
    at(4, stop)
    assert run(out=old)[0] == 143
    shutil.copytree(folder, moved)
    out = done("b", "--resume", old, data=moved)
    assert [line["step"] for line in log_of(out)] == [6]
    assert checkpoint_of(old)["step"] == 5
    assert equal(weights_of(whole), weights_of(out))
    shutil.move(moved / "class0/00.png", moved / "class0/other.png")
    P.image_files.cache_clear()
    assert "contents" in refused("--resume", old, out=tmp_path / "c", data=moved)
    (moved / "class0/other.png").unlink()  # the epochs, too, are others then
    P.image_files.cache_clear()
    assert "contents" in refused("--resume", old, out=tmp_path / "c", data=moved)
    assert "is the folder of --data" in refused(out=moved, data=moved)


def test_resume_without_a_checkpoint_and_at_the_end(done):
    out = done("run", "--resume --steps 2")
    saved = (out / "checkpoint.pt").stat().st_mtime_ns
    done("run", "--resume --steps 2 --decoder 2x64x2")  # a default, said
    assert len(log_of(out)) == 2
    assert (out / "checkpoint.pt").stat().st_mtime_ns == saved
    kept = (out / "checkpoint.pt").rename(out / "kept.pt")
    done("run", f"--resume {kept} --steps 2")
    assert len(log_of(out)) == 2


def test_a_run_is_not_overwritten_and_goes_on_only_as_it_was(done, refused):
    out = done("run", "--steps 2")
    config = (out / "config.json").read_bytes()
    assert "already holds a run" in refused("--steps 2")
    for flags in (MASK, "--lr 1", "--steps 3", "--mask_ratio 0.5", "--seed 5"):
        assert flags.split()[0].strip("-") in refused(f"--steps 2 --resume {flags}")
    assert (out / "config.json").read_bytes() == config
    other = done("other", f"--steps 2 {MASK}")
    assert "already holds a run" in refused("--steps 2 --resume", out, out=other)


def test_weights_of_another_tasks_run_begin_a_run(done, refused):
    """The encoder is taken. To go on, the run does not need them."""
    first = done("first", "--task blur --steps 1 --seed 1")
    flags = f"{A2MIM} --steps 1 --lr 1e-9 --weights {first}"
    x, y = (weights_of(out)["blocks.5.mlp.fc1.weight"] for out in (first, done("then", flags)))
    assert close(x, y, 1e-6)
    shutil.rmtree(first)
    done("then", f"{flags} --resume")
    assert "no weights at" in refused(flags)


def test_foreign_and_hostile_checkpoints_are_refused(done, refused, tmp_path):
    mine = done("mine", "--steps 1")

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save(checkpoint_of(mine) | {"recent": Payload()}, tmp_path / "evil.pt")
    torch.save(weights_of(mine), tmp_path / "plain.pt")
    (tmp_path / "cut.pt").write_bytes((mine / "checkpoint.pt").read_bytes()[:5000])
    for name, says in (("evil", "could run code"), ("plain", "no checkpoint of this script"),
                       ("cut", "damaged")):
        assert says in refused("--resume", tmp_path / f"{name}.pt")
    assert "could run code" in refused("--weights", tmp_path / "evil.pt", out=tmp_path / "new")
    assert not (tmp_path / "executed").exists()


def nothing_is_left(job):
    """No process of a job's session, after half a second at most."""
    for _ in range(50):
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)


@pytest.mark.parametrize("number, processes", [
    (signal.SIGINT, 1), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)])
def test_the_real_script_saves_and_leaves_at_a_signal(number, processes, folder, tmp_path):
    """A signal to the group reaches the loaders too, and torchrun passes it on. Nothing is left."""
    log = tmp_path / "log.jsonl"
    job = script(*TINY, "--steps", 10 ** 6, "--save_every", 10 ** 6, "--workers", 1, "--data",
                 folder, "--out", tmp_path, processes=processes, start_new_session=True)
    deadline = time.time() + 90
    while time.time() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    os.killpg(job.pid, number) if processes == 1 else job.send_signal(number)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + number if processes == 1 else job.returncode
    assert checkpoint_of(tmp_path)["step"] == len(log_of(tmp_path)) > 0
    assert said.count("saved: --resume") == 1
    assert processes > 1 or "Traceback" not in said
    assert nothing_is_left(job)


def test_a_signal_to_one_process_stops_both(processes, tmp_path):
    one = before(3, "os.environ['RANK'] == '1' and os.kill(os.getpid(), 15)")
    processes(2, preamble=one, code=143)
    assert checkpoint_of(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pause, saved", [(0, 4), (1.1, 2)])
def test_a_second_ctrl_c_leaves_at_once(second, pause, saved, run, at, monkeypatch, tmp_path):
    """torchrun may send the first one twice, so only one that is a second later counts."""
    now = time.monotonic

    def twice():
        stop(signal.SIGINT)
        monkeypatch.setattr(time, "monotonic", lambda: now() + pause)
        stop(second)
    at(3, twice)
    assert run()[0] == 130
    assert checkpoint_of(tmp_path / "run")["step"] == saved


def test_the_real_script_refuses_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["", "--task", "sharpen"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(P.__file__, run_name="__main__")
    assert re.fullmatch("pretrain.py: .*sharpen.*\n", "".join(capfd.readouterr()))


@pytest.mark.parametrize("room", ["pretrain", "finetune", "probe", "analyze"])
def test_how_long_threads_wait_awake_is_set_before_torch_reads_it(room):
    run = f"""import os, sys
class Torch:
    def find_spec(name, *_):
        if name == "torch":
            sys.exit(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Torch)
import {room}"""
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=env, capture_output=True)
    assert done.stderr.strip() == b"30000"


def test_threads_are_torchs_own_number_or_the_users():
    """torchrun gives several processes OMP_NUM_THREADS=1 where the user has not set it."""
    def threads(**more):
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | more
        run = "import pretrain as p; p.set_up('cpu'), p.set_up('cpu'); "
        run += "print(p.torch.get_num_threads())"
        return int(subprocess.check_output([sys.executable, "-c", run], cwd=ROOT, env=env))

    alone, ones = threads(), dict(OMP_NUM_THREADS="1")
    assert threads(**ones, LOCAL_WORLD_SIZE="2") == max(1, alone // 2)
    assert threads(**ones, LOCAL_WORLD_SIZE="1") == 1


def damaged(folder, where, bad):
    """200 images, in which those numbered `bad` are cut in half."""
    where.mkdir()
    files = sorted(folder.rglob("*.png"))
    for i in range(200):
        content = files[i % len(files)].read_bytes()
        (where / f"{i:03d}.png").write_bytes(content[:len(content) // (2 if i in bad else 1)])
    return where


def test_a_bad_image_is_named_once_and_the_next_replaces_it(run, folder, tmp_path):
    data = damaged(folder, tmp_path / "data", {17, 18})
    flags = "--batch_size 40 --steps 10 --save_every 10 --workers 1".split()  # two epochs
    code, _, complaint = run(*flags, data=data)
    assert code == 0
    assert sorted(re.findall(r"skipped \S+/(\S+.png)", complaint)) == ["017.png", "018.png"]
    _, index, _, unread = P.FolderSet(str(data))[(17, 0, (8, 8), (0.5, 1.0), 0, None)]
    assert index == 19
    assert "017.png" in unread


def test_a_folder_of_bad_images_is_leapt_over(done, folder, tmp_path):
    """The first 40 of 4,200, one of which is wanted: less than 1%. Pictures are of others."""
    data = tmp_path / "data"
    data.mkdir()
    good = next(folder.rglob("*.png"))
    for i in range(4200):
        (data / f"{i:04d}.png").touch() if i < 40 else (data / f"{i:04d}.png").symlink_to(good)
    assert P.FolderSet(str(data))[(0, 0, (8, 8), (0.5, 1.0), 0, None)][1] == 125
    done("leapt", "--steps 1", data=data)


def test_a_bad_image_counts_once_for_all_processes(processes, folder, tmp_path):
    """Each meets all images in one step, and two of 200 are no more than 1%."""
    data = damaged(folder, tmp_path / "data", {17, 150})
    processes(2, "--batch_size 400 --accum 1 --steps 1", data=data)


def test_more_than_1_percent_bad_images_stop_the_run(done, refused, folder, tmp_path):
    data, bad = damaged(folder, tmp_path / "data", {3, 50, 199}), ("003", "050", "199")
    flags = "--batch_size 40 --steps 6"
    line = refused(flags, code=1, data=data)
    assert "more than 1%" in line
    assert all(f"{name}.png" in line for name in bad)
    for name in bad:  # mended: the same command goes on
        shutil.copy(data / "000.png", data / f"{name}.png")
    assert len(log_of(done("run", f"{flags} --resume", data=data))) == 6


@pytest.mark.parametrize("bad, code", [({7}, 0), ({*range(0, 200, 2)}, 1)])
def test_bad_images_in_a_batch_of_several_epochs(bad, code, run, folder, tmp_path):
    data = damaged(folder, tmp_path / "data", bad)
    assert run("--batch_size", 500, "--accum", 4, "--steps", 2, data=data)[0] == code


@pytest.mark.parametrize("bad, code", [("train", 1), ("val", 2)])
def test_a_folder_of_unreadable_images(bad, code, refused, folder, tmp_path):
    """It gets one line, also when a loader meets it."""
    shutil.copytree(folder, tmp_path / "data/train")
    shutil.copytree(folder, tmp_path / "data/val")
    for image in (tmp_path / "data" / bad).rglob("*.png"):
        spoil(image)
    assert "be read" in refused("--workers 1", code=code, data=tmp_path / "data")


def test_a_loss_that_is_not_finite_stops_the_run(refused, at, monkeypatch, tmp_path):
    real = losses.recovery_loss
    at(3, lambda: monkeypatch.setattr(losses, "recovery_loss", lambda *x: real(*x) * math.nan))
    assert "step 4: the loss is nan" in refused("--amp fp16", code=1)
    assert checkpoint_of(tmp_path / "run")["step"] == 2


def test_weights_that_exploded_are_not_saved(refused, tmp_path):
    """The loss was finite before the step that ruined them."""
    assert "not finite" in refused("--save_every 1 --lr 1e30 --warmup 0", code=1)
    assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_gradient_that_overflows(amp, run, at, monkeypatch, tmp_path):
    """It changes no weight. fp16's scaler halves the scale and goes on. Else the run stops."""
    real, held = losses.recovery_loss, []

    def steep(prediction, *more):
        held.append(weights_of(tmp_path / "run"))
        return real(prediction, *more) + 1e38 * (prediction - prediction.detach()).float().sum()
    at(2, lambda: monkeypatch.setattr(losses, "recovery_loss", steep))
    code, _, complaint = run("--amp", amp, "--save_every", 1, "--steps", 3)
    state = checkpoint_of(tmp_path / "run")
    assert equal(state["model"], held[0])
    if amp == "fp16":
        assert (code, state["step"], state["scaler"]["scale"]) == (0, 3, 2 ** 15)
    else:
        assert (code, state["step"]) == (1, 2)
        assert re.search(r"step 3: the loss is \d", complaint)


def test_bad_images_of_this_epoch_count():
    data = P.MemorySet(torch.zeros(100, 1, 1, 1).byte(), torch.zeros(100), [], "")
    args = SimpleNamespace(log_every=1, save_every=1, total=9, batch_size=100, amp="off")
    data.bad = {"a": 0, "b": 0}  # 2%, of the first
    for step, stops in ((1, True), (2, False)):
        with pytest.raises(P.Failed) if stops else nullcontext():
            P.agree([torch.ones(2)], [], step, args, data, ONE)


def test_a_gpu_is_waited_for_where_a_line_is_logged():
    """Its losses are read together, every one once; a signal is seen at once; and of a step that
    was not finite the number is told.
    """
    args = P.options("--log_every 4 --save_every 50".split())
    args.total, gpu = 100, P.Process(0, 1, torch.device("cuda"))

    def read(losses, norms=(1.0,) * 8, received=()):
        unread, found = [], []
        for done, both in enumerate(zip(losses, norms), 1):
            unread.append(torch.tensor(both))
            found.append(P.agree(unread, received, done, args, IMAGENET, gpu))
        return found

    assert read([1.0, 2.0, 3.0, 4.0, 5.0]) == [([], False)] * 3 + [([1, 2, 3, 4], False)] \
        + [([], False)]
    assert read([1.0, 2.0], received=[signal.SIGTERM]) == [([1], True), ([2], True)]
    with pytest.raises(P.Failed, match="step 2: the loss is inf"):
        read([1.0, math.inf, 1.0, 1.0])
    args.amp = "bf16"
    with pytest.raises(P.Failed, match="step 3: the loss is 1.0, the gradient's norm inf"):
        read([1.0] * 4, [1.0, 1.0, math.inf, 1.0])
    args.amp = "fp16"
    assert read([1.0] * 4, [1.0, 1.0, math.inf, 1.0])[3] == ([1] * 4, False)


def test_an_accident_shows_its_traceback(run, monkeypatch):
    monkeypatch.setattr(losses, "recovery_loss", lambda *_: int("an edited line"))
    code, _, complaint = run()
    assert (code, complaint.count("Traceback")) == (1, 1)
    assert "an edited line" in complaint


def test_what_torch_cannot_do_gets_a_way_out(refused, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    monkeypatch.setattr(losses, "recovery_loss", full)
    assert "--accum" in refused(code=1)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [
    "import pretrain\npretrain.crop_boxes = lambda *_: int('an edited line')",
    before(3, "os.kill(P.multiprocessing.active_children()[0].pid, 9)")
    + "\nP.traceback.extract_tb = None"])
def test_an_accident_in_a_loader_ends_the_run_too(wrong, folder, tmp_path):
    """No process is left, though loaders ignore SIGTERM. Also where another accident follows."""
    job = script(*TINY, "--workers", 2, "--data", folder, "--out", tmp_path, preamble=wrong,
                 start_new_session=True)
    try:
        said, _ = job.communicate(timeout=40)
    finally:
        job.kill()
    assert job.returncode == 1
    assert "Traceback" in said
    assert nothing_is_left(job)
