"""The trainer: data, randomness by (seed, step), schedule, resume, processes, and what each fault gets."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import degrade
import losses
import models
import pretrain as P
from conftest import ROOT, TINY, command, ended, forked, gradients_of, log_of, losses_of, script, together, weights_of


# the built-in data ---------------------------------------------------------------------------------------

def test_shapes_are_labelled_and_their_masks_and_boxes_are_true():
    made = P.shapes(100, seed=3)
    assert made.images.shape == (100, 3, 48, 48) and made.images.dtype == torch.uint8
    assert made.labels.bincount().tolist() == [10] * 10
    for mask, box in zip(made.masks, made.boxes):
        y, x = mask.nonzero().T
        assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]
    again, other = P.shapes(100, seed=3), P.shapes(100, seed=4)
    assert torch.equal(again.images, made.images) and not torch.equal(other.images, made.images)
    inside = (made.images.float() * made.masks[:, None]).sum((2, 3)) / made.masks.sum((1, 2))[:, None]
    outside = (made.images.float() * ~made.masks[:, None]).sum((2, 3)) / (~made.masks).sum((1, 2))[:, None]
    assert ((inside - outside).abs().amax(1) > 25).float().mean() > 0.99       # the object shows


# views -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(375, 500), (48, 48), (10, 400)])
def test_crop_boxes_are_random_resized_crops(height, width):
    u = torch.rand(2000, 22, generator=torch.Generator().manual_seed(0))
    top, left, h, w = torch.from_numpy(P.crop_boxes(u.numpy(), height, width, (0.2, 1.0))).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    if height == 10:                                            # nothing fits: the largest box of an allowed aspect
        assert set(zip(h.tolist(), w.tolist())) == {(10, 13)}
    else:
        share = h * w / (height * width)
        theirs = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, height, width), (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]).float()
        assert share.mean() == pytest.approx(((theirs[:, 2] * theirs[:, 3]).mean() / (height * width)).item(), abs=0.02)
        assert (w / h).log().std() == pytest.approx((theirs[:, 3] / theirs[:, 2]).log().std().item(), abs=0.02)
        assert top.mean() == pytest.approx(theirs[:, 0].mean().item(), rel=0.1) and left.mean() == pytest.approx(theirs[:, 1].mean().item(), rel=0.1)


def test_every_epoch_is_a_permutation_and_none_is_left_out():
    stream = torch.cat([P.samples(step, 8, 20, seed=1) for step in range(5)])              # 40 images: two epochs of 20
    first, second = stream[:20], stream[20:]
    assert first[:, 0].tolist() == [0] * 20 and second[:, 0].tolist() == [1] * 20
    assert sorted(first[:, 1].tolist()) == sorted(second[:, 1].tolist()) == list(range(20)) and not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_batch_does_not_depend_on_how_it_is_split(kind, folder):
    data = P.MemorySet(*P.shapes(30)[:2], torch.device("cpu")) if kind == "memory" else P.FolderSet(str(folder))
    def views(parts, steps=range(2), workers=0):
        return torch.cat([v for v, _, _ in data.batches(steps, 12, parts, (20, 24), (0.5, 1), 0, device=torch.device("cpu"), workers=workers)])
    whole = views([(0, 12)])
    assert whole.shape == (24, 3, 20, 24) and 0 <= whole.min() and whole.max() <= 1 and not torch.equal(whole[:12], whole[12:])
    assert torch.equal(views([(0, 4), (4, 4), (8, 4)]), whole)
    assert torch.equal(views([(4, 4)]), torch.cat([whole[4:8], whole[16:20]]))
    assert torch.equal(views([(0, 12)], range(1, 2)), whole[12:])
    if kind == "folder":
        assert torch.equal(views([(0, 12)], workers=2), whole)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_view_is_a_random_part_of_its_image_turned_round_half_of_the_time(kind, tmp_path):
    """Red is a pixel's column, green its row: a view tells which part it shows, how large, and which way round."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    image = torch.stack([5 * x, 5 * y, 0 * x]).to(torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    data = P.FolderSet(str(tmp_path)) if kind == "folder" else P.MemorySet(image[None], None, torch.device("cpu"))
    views = torch.cat([v for v, _, _ in data.batches(range(4), 100, [(0, 100)], (24, 24), (0.2, 0.8), 0, device=torch.device("cpu"), workers=0)])
    red, green = views[:, 0] * 51, views[:, 1] * 51                                    # in pixels of the image
    width, height = (red[:, 12, 20] - red[:, 12, 4]) * 1.5, (green[:, 20, 12] - green[:, 4, 12]) * 1.5
    share, column, row = width.abs() * height / 48 ** 2, red[:, 12, 12], green[:, 12, 12]
    assert 0.4 < (width < 0).float().mean() < 0.6 and (height > 0).all()
    assert share.min() == pytest.approx(0.2, abs=0.03) and share.max() == pytest.approx(0.8, abs=0.03)
    assert column.min() < 16 and column.max() > 32 and row.min() < 16 and row.max() > 32


def test_a_folder_is_walked_once_and_without_the_pictures_of_runs(folder, tmp_path):
    """Links that lead round in circles, and a run of this project among the images."""
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/here").symlink_to(".")
    (tmp_path / "runs/x").mkdir(parents=True)
    for name in ("config.json", "log.jsonl", "recovered.png"):
        (tmp_path / "runs/x" / name).write_bytes(b"")
    assert len(P.FolderSet(str(tmp_path))) == 24


# images of every kind --------------------------------------------------------------------------------------

def test_any_image_is_read_as_rgb(tmp_path):
    """JPEG, PNG, WebP; grey, RGBA, palette, CMYK, 16 bit, one bit, EXIF-rotated, tiny, huge."""
    smooth = np.linspace(0, 255, 60 * 40 * 3).reshape(40, 60, 3).astype(np.uint8)
    rgb = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the camera was held sideways
    saved = {"a.jpg": rgb, "a.png": rgb, "a.webp": rgb, "grey.jpg": rgb.convert("L"), "grey.png": rgb.convert("L"), "rgba.png": rgb.convert("RGBA"),
             "palette.png": rgb.convert("P"), "cmyk.jpg": rgb.convert("CMYK"), "bit.png": rgb.convert("1"), "a.bmp": rgb, "a.gif": rgb,
             "deep.png": Image.fromarray((smooth[..., 0].astype(np.uint16) * 257)), "tiny.png": rgb.resize((1, 1)), "huge.jpg": rgb.resize((6000, 4000)),
             "rgba.webp": rgb.convert("RGBA"), "la.png": rgb.convert("LA")}
    for name, image in saved.items():
        image.save(tmp_path / name)
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.save(tmp_path / "turned.webp", exif=exif)
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[rgb.rotate(180)] * 2)
    for name in saved:
        read = P.read_image(str(tmp_path / name))
        assert read.dtype == torch.uint8 and read.shape == (3, *saved[name].size[::-1]), name
        if name not in ("tiny.png", "huge.jpg", "bit.png"):
            want = smooth[..., :1].repeat(3, 2) if name == "deep.png" else np.asarray(saved[name].convert("RGB"))
            assert np.abs(read.permute(1, 2, 0).numpy().astype(int) - want).mean() < 6, name
    assert set(P.read_image(str(tmp_path / "bit.png")).unique().tolist()) == {0, 255}
    for name in ("turned.jpg", "turned.webp"):
        turned = P.read_image(str(tmp_path / name))
        assert turned.shape == (3, 60, 40) and (turned.float() - P.read_image(str(tmp_path / "a.jpg")).rot90(-1, (1, 2)).float()).abs().mean() < 4
    assert P.read_image(str(tmp_path / "moving.gif")).shape == (3, 40, 60)
    data = P.FolderSet(str(tmp_path))
    views = [data.view((0, i), (16, 16), (0.2, 1.0), 0) for i in range(19)]
    assert len(data) == 19 and all(view.shape == (3, 16, 16) and place == i and bad is None for i, (view, place, bad) in enumerate(views))
    with pytest.raises(OSError, match="nothing.jpg"):
        P.read_image(str(tmp_path / "nothing.jpg"))


def test_a_train_folder_is_used_and_flat_folders_work(tmp_path, folder):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    assert len(P.load_data(dict(data=str(tmp_path)), P.Place(0, 1, torch.device("cpu")))) == 1
    assert len(P.load_data(dict(data=str(folder)), P.Place(0, 1, torch.device("cpu")))) == 24


def test_torchvision_sets_by_name(tmp_path, run):
    """Fashion-MNIST from its own files, one channel; a set that is not there names the way out."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 40), ("t10k", 10)):
        header = lambda *numbers: b"".join(x.to_bytes(4, "big") for x in numbers)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header(2051, n, 28, 28) + os.urandom(n * 784))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header(2049, n) + bytes(i % 10 for i in range(n)))
    code, said, _ = run("--root", tmp_path, "--steps", 2, data="fashion_mnist")
    assert code == 0 and "40 images" in said
    assert weights_of(tmp_path / "run")["patch_embed.proj.weight"].shape[1] == 1
    code, _, complaint = run("--root", tmp_path / "empty", data="cifar10")
    assert code == 2 and "--download" in complaint and complaint.count("\n") == 1


# schedule, groups, precision -------------------------------------------------------------------------------

def test_learning_rate_warms_up_and_follows_half_a_cosine():
    lr = [P.learning_rate(s, 110, 10, 2.0) for s in range(110)]
    assert lr[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and lr[10] == 2.0
    assert lr[60] == pytest.approx(1.0) and 0 < lr[109] < 1e-3


def test_no_weight_decay_on_biases_norms_tokens_positions():
    model = models.recovery_model("vit_micro", 16, 4)
    decayed, free = P.parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert {"cls_token", "mask_token", "norm.weight", "patch_embed.proj.bias"} <= {names[id(p)] for p in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == sum(p.requires_grad for p in model.parameters())


# the run ---------------------------------------------------------------------------------------------------

def test_a_small_run_leaves_all_it_should(run, tmp_path):
    code, said, _ = run("--task", "zoom_in_mask", "--log_every", 2, "--lr", 0.003)
    assert code == 0 and "actual" not in said and "8 = 8 images x 1 processes x 1 accumulated" in said
    log, out = log_of(tmp_path / "run"), tmp_path / "run"
    assert [line["step"] for line in log] == [2, 4, 6] and {"step", "epoch", "loss", "lr", "images_per_s"} <= set(log[0])
    assert log[-1]["epoch"] == pytest.approx(6 * 8 / 24) and log[-1]["loss"] < log[0]["loss"]
    config = json.load(open(out / "config.json"))
    assert [line["lr"] for line in log] == [P.learning_rate(s, 6, config["warmup_steps"], config["actual_lr"]) for s in (1, 3, 5)]
    assert config["actual_lr"] == pytest.approx(0.003 * 8 / 256) and config["view"] == [22, 22] and config["settings"]["mask_ratio"] == 0.75
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "config.json", "log.jsonl", *(f"recovered_{s:07d}.png" for s in (2, 4, 6))]
    assert Image.open(out / "recovered_0000006.png").width > 300
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and state["config"]["task"] == "zoom_in_mask"
    assert all(group["lr"] == log[-1]["lr"] for group in state["optimizer"]["param_groups"])
    M = models.encoder("vit_micro", 16, 4)
    assert not models.load_weights(M, out / "checkpoint.pt").missing
    assert run("--task", "zoom_in_mask", "--weights", out / "checkpoint.pt", "--steps", 1, out=tmp_path / "b")[0] == 0


@pytest.mark.parametrize("task", degrade.TASKS)
def test_every_task_trains_from_the_command_line(task, run, tmp_path):
    code, _, complaint = run("--task", task, "--steps", 12, "--lr", 0.03, "--warmup", 0, "--save_every", 12)
    assert code == 0, complaint
    loss = losses_of(tmp_path / "run")
    assert sum(loss[s] for s in (10, 11, 12)) < sum(loss[s] for s in (1, 2, 3))


@pytest.mark.parametrize("task, model", [*((task, "resnet18") for task in degrade.TASKS), ("zoom_in_mask", "resnet50")])
def test_every_task_trains_a_resnet(task, model, run, tmp_path):
    """A ResNet: hidden patches filled, the token after stage 3, a pixel-shuffle head; with the frequency loss on any task."""
    code, said, complaint = run("--task", task, "--model", model, "--img_size", 32, 64, "--patch_size", 8, "--freq_weight", 0.2, "--lr", 0.01,
                                "--warmup", 0, "--steps", 5, "--save_every", 5)
    assert code == 0, complaint
    loss, config = losses_of(tmp_path / "run"), json.load(open(tmp_path / "run" / "config.json"))
    hides = degrade.TASKS[task].mask_ratio > 0
    assert min(loss[s] for s in (3, 4, 5)) < loss[1] and config["settings"]["fill"] == (("token" if task == "simmim" else "mean") if hides else None)
    assert config["token_at"] == ((0 if task == "simmim" else 3) if hides else "none") and "+ 0.2 x focal frequency" in said


def test_a_task_is_one_function_and_one_row(run, monkeypatch, tmp_path, capfd):
    """With its own setting on the command line, in --help and in the demonstration picture, and no other edit."""
    def negative(images, strength=1.0):
        return images + strength * (1 - 2 * images)
    monkeypatch.setitem(degrade.TASKS, "negative", degrade.Task(negative, "colours turned round"))
    code, said, complaint = run("--task", "negative", "--strength", 0.5, "--steps", 2)
    assert code == 0 and "strength 0.5" in said, complaint
    assert "colours turned round" in P.options().format_help() and "--strength" in P.options().format_help()
    degrade.main(["--out", str(tmp_path / "t.png"), "--size", "64"])
    assert "negative" in capfd.readouterr().out


def test_settings_reach_the_run_and_strays_are_refused(run, tmp_path):
    code, _, complaint = run("--task", "distort", "--twist", 0.1, 0.15, "--view_size", 20, "--mask_ratio", 0.5, "--mask_kind", "block", "--steps", 2)
    assert code == 0, complaint
    config = json.load(open(tmp_path / "run" / "config.json"))
    assert config["settings"] == dict(mask_ratio=0.5, mask_unit=1, mask_kind="block", fill=None, view_size=20, warp="fisheye", twist=[0.1, 0.15])
    assert config["view"] == [20, 20]
    code, _, complaint = run("--task", "mask", "--blur_kernel", 5, out=tmp_path / "b")
    assert code == 2 and "--blur_kernel does nothing in task mask" in complaint


def test_the_papers_run_is_one_flag_away(folder):
    """BM 4.1 and A.1, from --data alone; linear scaling of the learning rate; accumulation fills the batch of 4096."""
    place = P.Place(0, 8, torch.device("cpu"))
    c = P.resolve(P.options().parse_args(["--data", "/imagenet"]), place, 1281167, 3)
    assert (c["task"], c["model"], c["img_size"], c["patch_size"], c["view"]) == ("zoom_in_mask", "vit_base", [224, 224], 16, [320, 320])
    assert (c["batch_size"], c["images_per_process"], c["accum"], c["epochs"], c["lr"]) == (4096, 64, 8, 300, 1.5e-4)
    assert c["actual_lr"] == pytest.approx(2.4e-3) and c["total_steps"] == math.ceil(300 * 1281167 / 4096)
    assert c["warmup_steps"] == pytest.approx(40 * 1281167 / 4096, abs=1) and c["crop"] == [0.2, 1.0] and c["norm_target"] == "patch"
    model = models.recovery_model(c["model"])
    assert len(model.blocks) == 12 and len(model.decoder_blocks) == 4 and model.mask_token.shape[2] == 384


@pytest.mark.parametrize("model, epochs, lr, clip, token_at", [(None, 800, 1e-4, 5, 8), ("vit_small", 300, 1e-4, 5, 5), ("resnet50", 300, 1.5e-4, 0, 3)])
def test_a2s_run_is_table_a1(model, epochs, lr, clip, token_at):
    """A2 Table A1, and the epochs of Tables 1 and 2, from --data and --model alone: 60% of 32 px cells, L1 + 0.5 L_freq."""
    place = P.Place(0, 8, torch.device("cpu"))
    c = P.resolve(P.options().parse_args(["--task", "a2mim", "--data", "/imagenet", *(["--model", model] if model else [])]), place, 1281167, 3)
    assert (c["model"], c["img_size"], c["view"], c["patch_size"]) == (model or "vit_base", [224, 224], [224, 224], 16)
    assert c["settings"] == dict(mask_ratio=0.6, mask_unit=2, mask_kind="random", fill="mean", view_size=None)
    assert (c["batch_size"], c["epochs"], c["lr"], c["clip"], c["betas"], c["weight_decay"]) == (2048, epochs, lr, clip, [0.9, 0.999], 0.05)
    assert c["warmup_steps"] == pytest.approx(10 * 1281167 / 2048, abs=1) and c["crop"] == [0.67, 1.0] and c["actual_lr"] == pytest.approx(8 * lr)
    assert (c["token_at"], c["token_how"], c["loss"], c["norm_target"], c["freq_weight"], c["freq_alpha"]) == (token_at, "add", "l1", "off", 0.5, 1)


SIMMIM, A2MIM, RESNET = ["--task", "simmim"], ["--task", "a2mim"], ["--model", "resnet18", "--img_size", 32, "--patch_size", 8]
ABLATIONS = [                                                   # (task, what is changed, what config.json then says)
    # A2 Fig. 6: where the token enters, adding or replacing, for both families; the mean colour in its place
    *[(SIMMIM + more, ["--token_at", at, "--token_how", how], dict(token_at=at, token_how=how))
      for more, layers in (([], (0, 2, 6)), (RESNET, (0, 2, 4))) for at in layers for how in models.TOKEN_HOWS if (at, how) != (0, "replace")],
    (SIMMIM, ["--fill", "mean"], dict(token_at="none", fill="mean")), (SIMMIM + RESNET, ["--fill", "mean"], dict(token_at="none", fill="mean")),
    (SIMMIM + RESNET, ["--fill", "mean", "--token_at", "input"], dict(token_at=0, fill="mean")),
    (A2MIM, ["--fill", "zero"], dict(token_at=3, fill="zero")), (A2MIM, ["--fill", "token"], dict(token_at=0, token_how="replace", fill="token")),
    (A2MIM, ["--token_at", "none"], dict(token_at="none", fill="mean")), (A2MIM, ["--token_at", "decoder"], dict(token_at="decoder", fill=None)),
    # Table 5: the frequency loss, its weighting; the authors' spectrum
    (A2MIM, ["--token_at", "none", "--freq_weight", 0], dict(token_at="none", freq_weight=0)),
    (A2MIM, ["--token_at", "none", "--freq_alpha", 0], dict(token_at="none", freq_alpha=0, freq_weight=0.5)),
    (A2MIM, ["--freq_weight", 0], dict(freq_weight=0)), (A2MIM, ["--freq_alpha", 0], dict(freq_alpha=0)), (A2MIM, ["--freq_batch_mean"], dict(freq_batch_mean=True)),
    # any task
    (["--task", "mask"], ["--freq_weight", 0.5], dict(freq_weight=0.5, token_at="decoder")), (["--task", "mask"], ["--token_at", "middle"], dict(token_at=3, fill="mean")),
    (["--task", "mask"], ["--relative_positions"], dict(relative_positions=True)), (A2MIM, ["--relative_positions"], dict(relative_positions=True)),
    (["--task", "blur"], ["--token_at", "middle"], dict(token_at="none", fill=None)), (A2MIM + RESNET, ["--mask_ratio", 0], dict(mask_ratio=0, token_at="none")),
    (["--task", "zoom_in_mask"], ["--freq_weight", 0.5, "--loss", "l1"], dict(loss="l1", freq_weight=0.5)),
    (["--task", "zoom_in_mask"], ["--token_at", "middle"], dict(token_at=3, fill="mean")),
]
BASE = {}


@pytest.mark.parametrize("task, flags, says", ABLATIONS, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_every_ablation_of_fig_6_and_table_5(task, flags, says, run, tmp_path):
    """It runs, is written down, and is another run than the task's own: in its losses, or in its parameters."""
    def result(name, *more):
        code, _, complaint = run(*task, *more, "--steps", 2, "--save_every", 2, out=tmp_path / name)
        assert code == 0, complaint
        return losses_of(tmp_path / name), set(weights_of(tmp_path / name))
    if str(task) not in BASE:
        BASE[str(task)] = result("base")
    assert result("changed", *flags) != BASE[str(task)]
    config = json.load(open(tmp_path / "changed" / "config.json"))
    assert says.items() <= {**config, **config["settings"]}.items()


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_clipping_bounds_the_gradient(amp, run, tmp_path):
    """--clip: the norm over all parameters; AdamW's first running mean is (1 - beta1) times what it was given."""
    for name, flags in (("clipped", ["--clip", 0.01]), ("whole", [])):
        assert run(*flags, "--amp", amp, "--steps", 1, out=tmp_path / name)[0] == 0
    clipped, whole = (gradients_of(tmp_path / name) / 0.1 for name in ("clipped", "whole"))
    assert clipped.norm() == pytest.approx(0.01, rel=1e-3) and whole.norm() > 0.02
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm(), atol=1e-4)


def test_pictures_show_what_is_recovered_without_the_token(run, tmp_path, monkeypatch):
    """A2 Fig. A3: two more columns where a token enters inside the encoder, predictions with and without it, nothing pasted."""
    pages, draw = {}, degrade.sheet
    monkeypatch.setattr(degrade, "sheet", lambda columns, titles, note="": pages.setdefault(name, dict(zip(titles, columns))) and draw(columns, titles, note))
    for name, flags in (("inside", []), ("none", ["--token_at", "none"]), ("decoder", ["--token_at", "decoder"])):
        assert run("--task", "a2mim", *flags, "--steps", 1, "--lr", 0.03, out=tmp_path / name)[0] == 0
    plain = {"view", "encoder sees", "recovered"}
    assert set(pages["none"]) == set(pages["decoder"]) == plain and set(pages["inside"]) == plain | {"all predicted", "without token"}
    view, sees, recovered, whole, without = pages["inside"].values()                   # of every second of the eight images
    c = json.load(open(tmp_path / "inside" / "config.json"))
    d = degrade.degrade(view.repeat_interleave(2, 0), "a2mim", 16, 4, P.seeded(0, P.PICTURE), **c["settings"])
    hidden = degrade.patch_pixels(d.hidden[1::2], 4, (4, 4)).expand_as(view)           # (images drawn twice: masks of the second half of the sheet)
    model = P.build(c).eval()
    model.load_state_dict(weights_of(tmp_path / "inside"))
    with torch.no_grad():
        want = [model.denormalize(losses.unpatchify(model(sees, d.hidden[1::2], token=on), 4, (4, 4))) for on in (True, False)]
    assert torch.allclose(whole, want[0], atol=1e-5) and torch.allclose(without, want[1], atol=1e-5) and not torch.allclose(whole, without, atol=1e-3)
    assert torch.equal(recovered[~hidden], view[~hidden]) and torch.equal(recovered[hidden], whole[hidden])


def test_an_odd_number_of_images_is_recovered_where_a_task_takes_them_in_pairs(run, tmp_path):
    """zoom_out's --zoom_fill other fills an image with its neighbour; a picture, or a validation set, may have three."""
    assert run("--task", "zoom_out", "--zoom_fill", "other", "--steps", 1)[0] == 0
    c, view = json.load(open(tmp_path / "run/config.json")), torch.rand(3, 3, 16, 16, generator=P.seeded(1))
    model = P.build(c)
    d, (prediction,), (picture,) = P.recover(model, view, c, P.seeded(0))
    assert len(d.inputs) == len(prediction) == 3 and picture.shape == view.shape and torch.equal(d.target, view)
    four, (of_four,), _ = P.recover(model, torch.cat([view, view[2:]]), c, P.seeded(0))
    assert torch.equal(d.inputs, four.inputs[:3]) and torch.equal(prediction, of_four[:3])


def test_same_seed_same_run(run, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("--seed", seed, "--steps", 3, out=tmp_path / name)[0] == 0
    a, b, c = (losses_of(tmp_path / name) for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("flags", [["--accum", 2], ["--accum", 4, "--workers", 2]])
@pytest.mark.parametrize("task", ["zoom_in_mask", "blur"])
def test_accumulation_does_not_change_the_run(flags, task, run, tmp_path):
    assert run("--task", task, "--steps", 3, out=tmp_path / "a")[0] == 0
    assert run("--task", task, "--steps", 3, *flags, out=tmp_path / "b")[0] == 0
    a, b = losses_of(tmp_path / "a"), losses_of(tmp_path / "b")
    assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-4)
    a, b = gradients_of(tmp_path / "a"), gradients_of(tmp_path / "b")
    assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.parametrize("task, accum", [("zoom_in_mask", 1), ("zoom_out", 2)])
def test_two_processes_equal_one(task, accum, run, folder, tmp_path):
    """Two Gloo processes of batch 4 (and of two accumulated 2) see the images, crops and masks of one of 8, and make its step."""
    assert run("--task", task, "--steps", 3, "--lr", 0.01, out=tmp_path / "one")[0] == 0
    codes, said = together("pretrain", *TINY, "--task", task, "--steps", 3, "--lr", 0.01, "--accum", accum, "--data", folder, "--out", tmp_path / "two")
    assert codes == [0, 0], said
    one, both = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert list(one.values()) == pytest.approx(list(both.values()), rel=1e-4)
    a, b = gradients_of(tmp_path / "one"), gradients_of(tmp_path / "two")
    assert (a - b).norm() < 1e-3 * a.norm()


def test_two_processes_with_synchronised_batch_norm_equal_one(run, folder, tmp_path):
    """Two processes of batch 4 have the losses, gradients and running statistics of one of 8. (One step: AdamW's first
    ones are little more than the signs of the gradients, so rounding grows.)"""
    flags = ["--task", "a2mim", *RESNET, "--steps", 1]
    assert run(*flags, out=tmp_path / "one")[0] == 0
    codes, said = together("pretrain", *TINY, *flags, "--data", folder, "--out", tmp_path / "two")
    assert codes == [0, 0], said
    assert losses_of(tmp_path / "one")[1] == pytest.approx(losses_of(tmp_path / "two")[1], rel=1e-5)
    a, b = gradients_of(tmp_path / "one"), gradients_of(tmp_path / "two")
    assert (a - b).norm() < 0.05 * a.norm()                     # one ReLU that rounding turns is 1%, each its own batch norm 300%
    a, b = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all(torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-6) for n in a if "running" in n)


def half_normed(out):
    """models.BatchNorm of this process's half of a batch, forward and backward, saved."""
    place = P.set_up("cpu")
    x = NORMED[place.rank * 3:place.rank * 3 + 3].requires_grad_()
    norm, low = models.BatchNorm(5), models.BatchNorm(5)(x.detach().bfloat16())
    torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    y = norm(x)
    (y * torch.arange(60.).view(5, 3, 4)).square().sum().backward()
    torch.save(dict(norm.state_dict(), low=low, y=y.detach(), x=x.grad, weight_grad=norm.weight.grad, bias_grad=norm.bias.grad), out + str(place.rank))


NORMED = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(0)) * 3 + 70


def test_synchronised_batch_norm_by_its_definition(tmp_path):
    """Outputs, gradients, running statistics of two processes' halves are torch's batch norm's of the whole."""
    codes, said = ended(*forked(half_normed, str(tmp_path / "out"), processes=2))
    assert codes == [0, 0], said
    a, b = (torch.load(tmp_path / f"out{r}", weights_only=True) for r in (0, 1))
    x = NORMED.clone().requires_grad_()
    low = torch.nn.BatchNorm2d(5)(x.detach().bfloat16())
    assert torch.allclose(torch.cat([a["low"], b["low"]]), low, atol=0.02)                     # bf16 is rounded once, at the end
    norm = torch.nn.BatchNorm2d(5)
    torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    y = norm(x)
    (y * torch.arange(60.).view(5, 3, 4)).square().sum().backward()
    assert torch.allclose(torch.cat([a["y"], b["y"]]), y, atol=1e-5)
    assert torch.allclose(torch.cat([a["x"], b["x"]]), x.grad, rtol=1e-3, atol=1e-3 * x.grad.abs().max().item())
    assert torch.allclose(a["weight_grad"] + b["weight_grad"], norm.weight.grad, rtol=1e-4)
    assert torch.allclose(a["bias_grad"] + b["bias_grad"], norm.bias.grad, rtol=1e-4)
    for name, value in norm.state_dict().items():
        assert torch.allclose(a[name], value, rtol=1e-5) and torch.equal(a[name], b[name]), name


def gradients(out):
    """Of a step in float64, by this process's share of a batch of 4; rank 0 saves them."""
    place = P.set_up("cpu")
    torch.manual_seed(0)
    model = models.recovery_model("vit_micro", 16, 4).double()
    net = torch.nn.parallel.DistributedDataParallel(model) if place.world > 1 else model
    view = torch.rand(4, 3, 22, 22, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = 4 // place.world
    part = (place.rank * k, 4)
    d = degrade.degrade(view[part[0]:part[0] + k], "zoom_in_mask", 16, 4, P.seeded(0), part)
    losses.recovery_loss(net(d.inputs, d.hidden), model.normalize(d.target), (16, 16), 4, d.counted).backward()
    if place.rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, out)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DDP over Gloo, in float64: gradients of two processes of batch 2 equal those of one of 4, to rounding."""
    for processes in (1, 2):
        codes, said = ended(*forked(gradients, str(tmp_path / f"{processes}.pt"), processes=processes))
        assert codes == [0] * processes, said
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    assert one.keys() == two.keys() and len(one) > 50
    for name in one:                                            # the loss is float32: rounding of that
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("task", [["--task", "zoom_in_mask"], [*A2MIM, *RESNET]], ids=["vit", "resnet"])
def test_lower_precision_has_nearly_the_same_curve(task, run, tmp_path):
    for name in ("off", "bf16", "fp16"):
        assert run(*task, "--amp", name, "--steps", 3, out=tmp_path / name)[0] == 0
    a, b, c = (list(losses_of(tmp_path / name).values()) for name in ("off", "bf16", "fp16"))
    assert a == pytest.approx(b, rel=0.05) and a == pytest.approx(c, rel=0.05) and a != b


# resuming --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, steps", [([], 20), pytest.param(["--task", "a2mim", *RESNET], 20, marks=pytest.mark.slow)], ids=["vit", "resnet"])
def test_resume_equals_never_stopping_after_kill_9(flags, steps, run, folder, tmp_path):
    """Killed at any moment: the curve and the weights are bit for bit those of a run never killed; each step stands once."""
    assert run(*flags, "--steps", steps, "--log_every", 1, out=tmp_path / "whole")[0] == 0
    (killed,), _ = forked(command, "pretrain", *TINY, *flags, "--steps", steps, "--data", folder, "--out", tmp_path / "killed")
    deadline = time.time() + 60
    while time.time() < deadline and not (os.path.exists(tmp_path / "killed/log.jsonl") and len(log_of(tmp_path / "killed")) >= 3):
        time.sleep(0.002)
    killed.kill(), killed.join(60)
    assert killed.exitcode == -9 and 0 < torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["step"] < steps
    code, said, complaint = run(*flags, "--steps", steps, "--resume", out=tmp_path / "killed")
    assert code == 0, complaint
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "killed")
    assert [line["step"] for line in log_of(tmp_path / "killed")] == list(range(1, steps + 1))
    a, b = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_resume_between_two_log_lines(run, tmp_path):
    """The mean of a log line takes in the steps before the stop."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--log_every", 5, "--steps", 10]
    assert run(*flags, out=whole)[0] == 0 and run(*flags, out=cut)[0] == 0
    state = os.path.join(cut, "checkpoint.pt")
    dying = "import torch, os; real = torch.save\ndef save(state, file):\n real(state, file)\n if state['step'] == 6: file.flush(); os._exit(9)\ntorch.save = save"
    os.remove(state)
    data = json.load(open(whole / "config.json"))["data"]
    codes, _ = together("pretrain", *TINY, *flags, "--data", data, "--out", cut, processes=1, preamble=dying)
    assert codes == [9] and torch.load(state, weights_only=True)["step"] == 4
    assert run(*flags, "--resume", out=cut)[0] == 0
    assert losses_of(whole) == losses_of(cut)


def test_killed_while_a_checkpoint_is_written(run, folder, tmp_path):
    """Half of the second checkpoint reaches the disk: the first is whole, and --resume goes on from it."""
    half = ("import torch, os, io; real = torch.save\ndef save(state, file):\n b = io.BytesIO(); real(state, b)\n"
            " file.write(b.getvalue()[:len(b.getvalue()) // (2 if state['step'] == 4 else 1)]); file.flush()\n"
            " if state['step'] == 4: os.kill(os.getpid(), 9)\ntorch.save = save")
    codes, _ = together("pretrain", *TINY, "--data", folder, "--out", tmp_path / "run", processes=1, preamble=half)
    assert codes == [-9] and torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2
    assert run("--resume")[0] == 0
    assert run(out=tmp_path / "whole")[0] == 0 and losses_of(tmp_path / "whole") == losses_of(tmp_path / "run")


def test_resume_without_a_checkpoint_starts_anew_and_with_a_wrong_path_is_refused(run, tmp_path):
    code, said, _ = run("--resume", "--steps", 2)
    assert code == 0 and "from the beginning" in said
    assert P.going_on(dict(resume="auto", out=None)) is None
    code, _, complaint = run("--resume", tmp_path / "nowhere.pt", "--steps", 2)
    assert code == 2 and "nowhere.pt" in complaint and complaint.count("\n") == 1


def test_resuming_does_not_need_the_weights_it_began_with(run, tmp_path):
    torch.save(models.encoder("vit_micro", 16, 4).state_dict(), tmp_path / "encoder.pt")
    flags = ["--steps", 2, "--weights", tmp_path / "encoder.pt"]
    assert run(*flags)[0] == 0
    os.remove(tmp_path / "encoder.pt")
    assert run(*flags, "--resume")[0] == 0
    code, _, complaint = run(*flags, out=tmp_path / "other")
    assert code == 2 and "no weights at" in complaint


def test_a_run_is_not_overwritten_unasked(run, tmp_path):
    assert run("--steps", 2)[0] == 0
    code, _, complaint = run("--steps", 2)
    assert code == 2 and "already holds a run" in complaint and "--resume" in complaint
    code, said, _ = run("--steps", 2, "--resume", "--decoder", "2x64x2", "--mask_ratio", 0.75)          # said or by default: the same
    assert code == 0 and len(log_of(tmp_path / "run")) == 2     # done already: nothing is done twice
    assert run("--steps", 2, "--resume", tmp_path / "run")[0] == 0                             # a run by its folder
    code, _, complaint = run("--steps", 2, "--resume", "--mask_ratio", 0.5)
    assert code == 2 and "was made with mask_ratio 0.75, this command asks for 0.5" in complaint


def test_two_trainers_in_one_folder_are_refused(run, folder, tmp_path):
    """The second, while the first is at work, whose files stay its own; killed, it leaves no lock behind."""
    (first,), _ = forked(command, "pretrain", *TINY, "--steps", 100000, "--workers", 0, "--data", folder, "--out", tmp_path / "run")
    while first.is_alive() and not os.path.exists(tmp_path / "run/checkpoint.pt"):
        time.sleep(0.01)
    before = (tmp_path / "run/config.json").read_text()
    code, _, complaint = run("--steps", 100000, "--resume", "--log_every", 7)
    assert code == 2 and "another process is at work on" in complaint and complaint.count("\n") == 1
    assert first.is_alive() and (tmp_path / "run/config.json").read_text() == before
    first.kill(), first.join()
    P.Log(str(tmp_path / "run/log.jsonl"), 10 ** 9)
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, len(log_of(tmp_path / "run")) + 1))


def test_a_damaged_log_is_named(run, tmp_path):
    assert run("--steps", 2)[0] == 0
    with open(tmp_path / "run/log.jsonl", "a") as file:
        file.write("{step\n")
    code, _, complaint = run("--steps", 2, "--resume")
    assert code == 2 and "log.jsonl is damaged" in complaint and "cannot be written" not in complaint and complaint.count("\n") == 1


def orphans(mark):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                found += [pid] if mark in file.read() and int(pid) != os.getpid() else []
        except OSError:
            pass
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("number, processes", [
    (signal.SIGINT, 1), (signal.SIGTERM, 2),
    pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow), pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow)])
def test_sigterm_and_ctrl_c_save_and_leave(number, processes, run, folder, tmp_path):
    """At the end of the step, with exit code 143 or 130, no process left behind; --resume equals never stopping."""
    out = tmp_path / "run"
    flags = ["--steps", 40, "--save_every", 1000, "--workers", 1, "--task", "mask"]
    job = script(*TINY, *flags, "--data", folder, "--out", out, processes=processes, start_new_session=True)
    deadline = time.time() + 90
    while time.time() < deadline and not (os.path.exists(out / "log.jsonl") and len(log_of(out)) >= 2):
        time.sleep(0.01)
    os.killpg(job.pid, number) if number == signal.SIGINT else job.send_signal(number)       # Ctrl-C reaches the whole group
    said, _ = job.communicate(timeout=60)
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 2 <= step < 40 and "stopped by signal" in said, said
    assert job.returncode == 128 + number if processes == 1 else job.returncode != 0
    time.sleep(0.5)
    assert orphans(str(out)) == []
    assert processes > 1 or "Traceback" not in said
    codes, said = together("pretrain", *TINY, *flags, "--workers", 0, "--resume", "--data", folder, "--out", out, processes=processes)
    assert codes == [0] * processes and f"from step {step}" in said and run(*flags, out=tmp_path / "whole")[0] == 0
    whole, parts = losses_of(tmp_path / "whole"), losses_of(out)
    assert whole.keys() == parts.keys() and list(whole.values()) == pytest.approx(list(parts.values()), rel=0 if processes == 1 else 1e-3)


# faults ----------------------------------------------------------------------------------------------------

def damaged(folder, where, bad):
    """A copy of the folder in which the images numbered `bad` are cut in half, over 400 images."""
    where.mkdir()
    files = sorted(folder.rglob("*.png"))
    for i in range(400):
        bytes_ = files[i % len(files)].read_bytes()
        (where / f"{i:03d}.png").write_bytes(bytes_[:len(bytes_) // 2] if i in bad else bytes_)
    return where


def test_a_bad_image_is_named_once_replaced_and_counted(run, folder, tmp_path):
    data = damaged(folder, tmp_path / "data", {17, 18})
    code, _, complaint = run("--batch_size", 40, "--steps", 20, "--save_every", 20, "--workers", 1, data=data)       # two epochs
    assert code == 0 and complaint.count("skipped") == 2 and all(complaint.count(f"skipped {data}/{name}") == 1 for name in ("017.png", "018.png"))
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["progress"]["bad"] == 2


def test_more_than_one_percent_bad_images_stop_the_run_with_the_list(run, folder, tmp_path):
    data = damaged(folder, tmp_path / "data", {3, 50, 90, 200, 399})
    code, _, complaint = run("--batch_size", 40, "--steps", 25, data=data)
    last = complaint.strip().splitlines()[-1]
    assert code == 1 and "5 reads of 400 images" in last and "more than 1%" in last and all(f"{i:03d}.png" in last for i in (3, 50, 90, 200, 399))
    for i in (3, 50, 90, 200, 399):                             # mended: the same command goes on
        (data / f"{i:03d}.png").write_bytes((data / "000.png").read_bytes())
    assert run("--batch_size", 40, "--steps", 25, "--resume", data=data)[0] == 0 and len(log_of(tmp_path / "run")) == 25


def test_one_bad_image_in_a_batch_larger_than_the_folder_is_not_too_many(run, folder, tmp_path):
    """An image that is met several times a step counts against the batch, not against the smaller folder."""
    data = damaged(folder, tmp_path / "data", {7})
    assert run("--batch_size", 800, "--accum", 4, "--steps", 2, data=data)[0] == 0


def test_a_folder_of_unreadable_images_stops_at_once(tmp_path):
    """Also when a loader process meets it: one line, no traceback, no process left."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        (tmp_path / "data" / f"{i}.jpg").write_text("no picture")
    job = script(*TINY, "--workers", 1, "--data", tmp_path / "data", "--out", tmp_path / "run")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1 and ".jpg: UnidentifiedImageError" in said and "Traceback" not in said and orphans(str(tmp_path / "run")) == []
    assert said.splitlines()[-1].startswith("pretrain.py: ")


REFUSED = [
    (["--task", "sharpen"], "sharpen"), (["--model", "vit_giant"], "vit_giant"), (["--frobnicate"], "--frobnicate"),
    (["--img_size", "18"], "18x18"), (["--img_size", "0"], "0x0"), (["--img_size", "-16"], "-16"),
    (["--decoder", "2x0x2"], "2x0x2"), (["--decoder", "4x-384x6"], "4x-384x6"), (["--patch_size", "32"], "16x16"),
    (["--mask_unit", "0"], "cells of 0"), (["--mask_kind", "center", "--mask_ratio", "0.05"], "hides none"),
    (["--seed", "-1"], "--seed -1"), (["--workers", "-1"], "--workers -1"), (["--weight_decay", "-1"], "-1"),
    (["--warmup", "-1"], "--warmup -1"), (["--steps", "inf"], "inf"), (["--view_size", "17"], "view size 17"),
    (["--task", "zoom_in", "--zoom_size", "0"], "zoom size 0"), (["--task", "decolor", "--saturation", "-3"], "-3"),
    (["--task", "distort", "--twist", "9", "-9"], "twist 9"),
    (["--task", "distort", "--warp", "wave", "--twist", "0.1", "0.2"], "--twist does nothing with --warp wave"),
    (["--task", "zoom_out", "--zoom_fill", "other", "--batch_size", "3"], "1 is odd"),
    (["--task", "zoom_in_mask", "--zoom_size", "8"], "--zoom_size does nothing"), (["--epochs", "inf"], "--epochs inf"),
    (["--mask_ratio", "1"], "mask ratio 1.0 is outside"), (["--mask_ratio", "-0.5"], "-0.5"),
    (["--batch_size", "9", "--accum", "2"], "9 cannot be shared"), (["--mask_unit", "3"], "cells of 3"),
    (["--batch_size", "0"], "--batch_size 0"), (["--lr", "-1"], "--lr -1"), (["--crop", "0.5", "1.5"], "1.5"),
    (["--task", "zoom_in", "--zoom_size", "99"], "zoom size 99"),
    (["--task", "zoom_in", "--zoom_size", "rand"], "zoom size rand"), (["--decoder", "4x10x3"], "4x10x3"),
    (["--task", "blur", "--blur_kernel", "4"], "4 is not an odd"), (["--view_size", "8"], "view size 8"),
    (["--img_size", "16", "16", "16"], "not 3"),
    (["--task", "a2mim", "--model", "resnet18"], "16x16 is not divisible by the stride of the last stage 32"),
    (["--model", "resnet18", "--token_at", "decoder"], "--token_at decoder: a resnet18"),
    (["--token_at", "7"], "--token_at 7: vit_micro takes"), (["--token_at", "deep"], "--token_at deep"),
    (["--task", "a2mim", "--fill", "token", "--token_at", "3"], "--fill token is the mask token at the input"),
    (["--task", "mask", "--fill", "zero"], "--fill zero does nothing"),
    (["--task", "mask", "--token_how", "add"], "--token_how add does nothing"),
    (["--task", "a2mim", "--token_at", "none", "--token_how", "replace"], "--token_how replace does nothing"),
    (["--task", "a2mim", "--decoder", "1x8x2"], "decoder 1x8x2"),
    (["--task", "mask", "--freq_alpha", "2"], "--freq_alpha 2.0 does nothing"),
    (["--task", "mask", "--freq_batch_mean"], "--freq_batch_mean does nothing"),
    (["--task", "mask", "--freq_weight", "-1"], "-1"),
    (["--task", "mask", "--band_weight", "0.5"], "--band_weight 0.5 does nothing"),
    (["--band_weight", "2"], "--band_weight 2"), (["--betas", "0.9", "1"], "--betas 0.9 1"), (["--clip", "-1"], "--clip -1"),
    (["--model", "resnet18", "--img_size", "32", "--relative_positions"], "relative positions"),
    (["--task", "a2mim", "--token_how", "blend"], "blend"), (["--task", "a2mim", "--img_size", "20"], "cells of 2"),
    (["--task", "simmim", "--fill", "mean", "--token_at", "input"], "--fill mean does nothing"),
    (["--task", "blur", "--mask_kind", "block"], "--mask_kind does nothing"),
    (["--task", "a2mim", "--mask_ratio", "0", "--token_how", "replace"], "--token_how does nothing"),
    (["--view_size", "16", "--band_weight", "0.9"], "--band_weight 0.9 does nothing"),
    ([*RESNET, "--accum", "8"], "batch norm has nothing to average"), (["--freq_weight", "inf"], "and finite"),
    (["--task", "a2mim", "--patch_size", "8"], "1x1 cells of 2x2 patches"), (["--weights", "/nowhere.pt"], "/nowhere.pt"),
    (["--lr", "fast"], "fast"), (["--saturation", "0.3"], "--saturation does nothing"),
    *([] if torch.cuda.is_available() else [(["--device", "cuda"], "--device cuda")]),
]


@pytest.mark.parametrize("flags, says", REFUSED, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else None)
def test_a_request_that_cannot_be_met_gets_one_line_and_exit_code_2(flags, says, run, tmp_path):
    code, _, complaint = run(*flags)
    assert code == 2 and says in complaint and complaint.count("\n") == 1 and "Traceback" not in complaint
    assert not (tmp_path / "run").exists()


def test_missing_and_empty_folders(run, tmp_path):
    code, _, complaint = run(data=tmp_path / "nothing")
    assert code == 2 and "neither a folder nor one of" in complaint
    (tmp_path / "empty").mkdir()
    code, _, complaint = run(data=tmp_path / "empty")
    assert code == 2 and "no images in" in complaint and complaint.count("\n") == 1


def test_precision_may_change_on_resuming(run, tmp_path):
    assert run("--steps", 4)[0] == 0
    for amp in ("bf16", "fp16", "off"):
        state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
        torch.save({**state, "step": 2}, tmp_path / "run/checkpoint.pt")
        code, said, complaint = run("--steps", 4, "--amp", amp, "--resume")
        assert code == 0 and "from step 2" in said, complaint


def test_the_scaler_goes_on_where_it_was(run, tmp_path):
    """Of fp16: what it has learned of the gradients' size, here how many steps went well at this scale."""
    counted = lambda: torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["scaler"]["_growth_tracker"]
    assert run("--steps", 4, "--amp", "fp16")[0] == 0 and counted() == 4
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 2}, tmp_path / "run/checkpoint.pt")
    assert run("--steps", 4, "--amp", "fp16", "--resume")[0] == 0 and counted() == 4 + 2


def test_the_message_reaches_a_user_of_the_real_script(tmp_path):
    job = script("--task", "sharpen", "--out", tmp_path / "x")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and said.startswith("pretrain.py: ") and said.count("\n") == 1


def test_foreign_and_wrong_checkpoints_are_refused(run, tmp_path):
    assert run("--steps", 2)[0] == 0
    mine = tmp_path / "run/checkpoint.pt"
    code, _, complaint = run("--steps", 2, "--resume", mine, "--task", "mask", out=tmp_path / "b")
    assert code == 2 and "made with task zoom_in_mask" in complaint
    torch.save(torch.load(mine, weights_only=True)["model"], tmp_path / "plain.pt")
    code, _, complaint = run("--resume", tmp_path / "plain.pt", out=tmp_path / "b")
    assert code == 2 and "not a run's checkpoint" in complaint
    code, _, complaint = run("--resume", ROOT / "README.md", out=tmp_path / "b")
    assert code == 2 and "damaged or of another kind" in complaint
    assert run("--steps", 3, "--task", "mask", out=tmp_path / "other")[0] == 0
    code, _, complaint = run("--steps", 2, "--resume", mine, out=tmp_path / "other")
    assert code == 2 and "already holds a run" in complaint
    assert run("--steps", 2, "--resume", mine, out=tmp_path / "copy")[0] == 0               # done already
    (tmp_path / "cut.pt").write_bytes(mine.read_bytes()[:5000])
    code, _, complaint = run("--resume", tmp_path / "cut.pt", out=tmp_path / "b")
    assert code == 2 and "damaged" in complaint and complaint.count("\n") == 1

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save({"model": Payload(), "step": 1}, tmp_path / "evil.pt")
    code, _, complaint = run("--resume", tmp_path / "evil.pt", out=tmp_path / "b")
    assert code == 2 and "could run code" in complaint and not (tmp_path / "executed").exists()


def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, complaint = run(out=tmp_path / "file" / "run")
    assert code == 2 and "cannot be written to" in complaint and complaint.count("\n") == 1


def test_a_full_disk_is_said_and_the_previous_checkpoint_is_intact(run, folder, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    assert run("--steps", 6, "--save_every", 4)[0] == 0
    os.remove(tmp_path / "run/checkpoint.pt")
    full = ("import resource, torch; real = torch.save\n"
            "def save(state, file):\n"
            " if state['step'] > 2: resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))\n"
            " real(state, file)\n"
            "torch.save = save")
    codes, said = together("pretrain", *TINY, "--data", folder, "--out", tmp_path / "run", processes=1, preamble=full)
    assert codes == [1] and "could not write" in said and "last checkpoint is intact" in said and "Traceback" not in said
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".part")]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(run, tmp_path, monkeypatch):
    calls = []
    real = P.losses.recovery_loss
    monkeypatch.setattr(P.losses, "recovery_loss", lambda *a, **k: calls.append(1) or real(*a, **k) * (math.nan if len(calls) == 4 else 1))
    code, _, complaint = run("--lr", 0.5)
    assert code == 1 and "the loss is nan at step 4, learning rate" in complaint
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())


def test_weights_that_exploded_are_not_saved(run, tmp_path):
    """The loss was finite before the step that ruined the weights: the checkpoint of the step before stays."""
    code, _, complaint = run("--save_every", 1, "--lr", 1e30, "--warmup", 0)
    assert code == 1 and "not finite" in complaint and not (tmp_path / "run/checkpoint.pt").exists()


def test_a_log_that_cannot_be_written_is_said(run, tmp_path):
    log = P.Log(str(tmp_path / "log.jsonl"), 0)
    log.file = open("/dev/full", "w", buffering=1)
    log(step=1)
    assert "could not write /dev/full" in log.trouble           # the next save says it, on every process


@pytest.mark.parametrize("full", ["out", "log"])
def test_a_full_disk_stops_both_processes(full, folder, tmp_path):
    """What rank 0 cannot write, at the start or at a checkpoint, rank 1 hears of: one message, no traceback of ours."""
    (tmp_path / "file").write_text("")
    (tmp_path / "log").mkdir()
    (tmp_path / "log/log.jsonl").symlink_to("/dev/full")
    codes, said = together("pretrain", *TINY, "--data", folder, "--out", tmp_path / ("file/run" if full == "out" else "log"))
    assert codes == ([2, 2] if full == "out" else [1, 1]) and "Traceback" not in said
    assert said.count("cannot be written to" if full == "out" else "could not write") == 1


def test_an_exception_nobody_foresaw_ends_the_run(folder, tmp_path):
    """Shown, exit code 1, and no process left: the loaders, which ignore the SIGTERM of Python's exit, go first."""
    wrong = "import pretrain\ndef wrong(*_): raise ValueError('a mistake in an edited line')\npretrain.shrink = wrong"
    job = script(*TINY, "--workers", 2, "--data", folder, "--out", tmp_path / "run", preamble=wrong)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1 and "a mistake in an edited line" in said and orphans(str(tmp_path / "run")) == []


@pytest.mark.slow
def test_compiling_does_not_change_the_run(run, tmp_path):
    assert run("--steps", 3, out=tmp_path / "a")[0] == 0 and run("--steps", 3, "--compile", out=tmp_path / "b")[0] == 0
    assert list(losses_of(tmp_path / "a").values()) == pytest.approx(list(losses_of(tmp_path / "b").values()), rel=1e-4)
