"""Probes of a frozen encoder (BM 5; A2 5.2): by hand, and the command run small."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import degrade
import finetune
import models
import pretrain
import probe
from conftest import RESNET, close, command, equal, json_of, spoil


# --- The probes ---

def test_knn_by_hand():
    """20 neighbours by cosine similarity, each with a vote of exp(s / 0.07)."""
    generator = pretrain.seeded(0)
    train, test = torch.randn(50, 3, generator=generator), torch.randn(9, 3, generator=generator)
    labels = torch.arange(50) % 4
    votes = probe.knn(train, labels, test, 4).double().numpy()
    a, b = (x.double().numpy() / np.linalg.norm(x, axis=1)[:, None] for x in (train, test))
    for mine, s in zip(votes, b @ a.T):
        near = np.argsort(-s)[:20]
        want = [np.exp(s[near[labels[near] == c]] / 0.07).sum() for c in range(4)]
        assert mine / mine.sum() == pytest.approx(want / np.sum(want), rel=1e-3)
    assert probe.knn(train[:3], labels[:3], test, 4).argmax(1).max() < 3  # fewer may vote


@pytest.mark.parametrize("vit", [True, False])
def test_a_linear_probe_of_separable_features_has_them_all_right(vit, monkeypatch):
    """Each class is shifted along an axis of its own, beside larger numbers that mean nothing."""
    monkeypatch.setattr(probe, "STEPS", 2000)
    features, labels = 3 * torch.rand(300, 5, generator=pretrain.seeded(0)), torch.arange(300) % 3
    features[:, :3] = features[:, :3] / 3 + 2 * torch.eye(3)[labels]
    head = probe.linear_probe(features, labels, 3, vit)
    assert not head.training and (head(features).argmax(1) == labels).all()


def test_a_vits_linear_probe_is_maes(monkeypatch):
    """Batch norm without affine. 90 epochs, a ninth of them warm-up to 0.1 x 16384 / 256."""
    rates, step = [], probe.LARS.step
    monkeypatch.setattr(probe.LARS, "step", lambda self: (
        rates.append(self.param_groups[0]["lr"]), step(self)))
    norm, _ = probe.linear_probe(torch.randn(40, 4), torch.arange(40) % 2, 2, vit=True)
    assert isinstance(norm, torch.nn.BatchNorm1d) and not norm.affine
    want = [6.4 * (i + 1) / 10 for i in range(10)]
    want += [3.2 * (1 + math.cos(math.pi * i / 80)) for i in range(80)]
    assert rates == pytest.approx(want)


def test_a_resnets_linear_probe_is_mocos(monkeypatch):
    """100 epochs of SGD in batches of 256, at 30, from the 60th at 3, from the 80th at 0.3."""
    found, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (
        found.append([self.param_groups[0][k] for k in ("lr", "momentum")]), step(self)))
    assert len(probe.linear_probe(torch.randn(512, 4), torch.arange(512) % 2, 2, vit=False)) == 1
    want = [[lr, 0.9] for lr, steps in ((30, 120), (3, 40), (0.3, 40)) for _ in range(steps)]
    assert np.allclose(found, want)


def test_lars_by_hand():
    """Algorithm 1 as MAE has it: the ratio 0.001 |w| / |g| for matrices alone, momentum 0.9."""
    w, b = torch.nn.Parameter(torch.tensor([[3.0, 4]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = probe.LARS([w, b], lr=2.0)
    x, y, m, n = np.array([[3.0, 4]]), 1.0, 0, 0
    for g, h in ((np.array([[1.0, -2]]), 0.5), (np.array([[0.5, 0]]), -1.0)):
        w.grad, b.grad = torch.tensor(g).float(), torch.tensor([h])
        optimizer.step()
        m, n = 0.9 * m + 0.001 * np.linalg.norm(x) / np.linalg.norm(g) * g, 0.9 * n + h
        x, y = x - 2 * m, y - 2 * n
        assert w[0].tolist() == pytest.approx(x[0]) and b.item() == pytest.approx(y)


def test_top_5_counts_the_fifth_and_not_the_sixth():
    scores = -torch.arange(8.0).expand(4, 8)
    found = probe.accuracy(scores, torch.tensor([0, 4, 5, 7]), "x")
    assert found == dict(x=25, x_top5=50)


@pytest.mark.parametrize("cls", [True, False])
def test_the_blocks_probe_pools_the_cls_token_or_the_patches(cls):
    """Without blocks, so that what it does not pool changes nothing."""
    pooled = slice(1) if cls else slice(1, None)
    head, tokens = probe.BlocksProbe(8, 2, 0, 3, pooled), torch.randn(2, 5, 8)
    other = tokens.clone()
    other[:, 1 if cls else 0] += torch.randn(8)
    assert torch.equal(head(tokens), head(other))
    other[:, 0 if cls else 1] += torch.randn(8)
    assert not torch.equal(head(tokens), head(other))


# --- The command ---

@pytest.mark.parametrize("model, flags", [
    ("vit_micro", []), pytest.param("resnet18", RESNET.split(), marks=pytest.mark.slow)])
def test_three_probes_of_a_frozen_encoder(model, flags, of, spy, tmp_path, monkeypatch):
    """Tokens are computed once, or anew each epoch, to the same end. The backbone is in eval() and
    stays as it was.
    """
    monkeypatch.setattr(probe, "BATCH", 20)
    torch.manual_seed(0)
    before = models.encoder(model, 32 if flags else 16, 4).state_dict()
    torch.save(before, tmp_path / "encoder.pt")
    fits, scores = spy(probe, "linear_probe"), spy(probe, "accuracy")
    encoded, encode = [], models.MODELS[model].family.encode

    def noted(self, images):
        encoded.append((self, len(images), self.training, torch.is_grad_enabled()))
        return encode(self, images)
    monkeypatch.setattr(models.MODELS[model].family, "encode", noted)
    for name, store, anew in (("stored", 2 ** 20, 0), ("anew", 0, 12 * 36 + 13)):
        monkeypatch.setattr(probe, "STORE", store)
        code, said, _ = of(probe, *flags, "--blocks", 2, "--epochs", 12, "--weights",
                           tmp_path / "encoder.pt", out=tmp_path / name)
        assert code == 0
        networks, counts, training, gradients = zip(*encoded)
        assert sum(counts) == 36 + 13 + anew and not any(training + gradients)
        assert equal({k: x.cpu() for k, x in networks[0].state_dict().items()}, before)
        encoded.clear()
    result = json_of(tmp_path / "anew")
    assert result == json.loads(said.splitlines()[-1]) == json_of(tmp_path / "stored")
    assert result["knn"] == result["nonlinear"] == 100 and result["images"] == 13
    assert [vit for (_, _, _, vit, _), _ in fits] == [not flags] * 2
    assert close(scores[2][0][0], scores[5][0][0], 1e-3)
    config = json_of(tmp_path / "anew", "config")
    assert (config["epochs"], config["model"], result["blocks"]) == (12, model, 2)


def test_features_are_those_of_load_encoder(of, spy, labelled, tmp_path):
    """Of the central part. Model, sizes, pooling and data are the run's."""
    assert of(finetune, "--steps", 1, "--pool", "mean", "--test_crop", 0.5)[0] == 0
    calls = spy(probe, "knn")
    argv = ["--weights", tmp_path / "run", "--out", tmp_path / "probe", "--amp", "off"]
    assert command(probe, *argv) == 0
    paths = sorted((labelled / "val").rglob("*.png"))
    images = torch.stack([degrade.read_image(path) for path in paths])
    views = F.interpolate(images[:, :, 5:15, 7:17], (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        want = models.load_encoder(tmp_path / "run")(views / 255)
    assert close(calls[0][0][2].cpu(), want)


def test_labels_are_so_many_of_each_class(of, spy, tmp_path):
    calls = spy(probe, "knn")
    assert of(probe, "--labels", 3)[0] == 0
    assert calls[0][0][1].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert json_of(tmp_path / "run")["labels"] == 3


def test_a_resnet_is_probed_at_the_size_it_was_measured_at(tmp_path):
    for more, size in (({}, [96, 96]), (dict(test_size=128), [128, 128])):
        config = dict(more, model="resnet18", img_size=[96, 96], patch_size=16, data=str(tmp_path))
        torch.save(dict(model={}, config=config), tmp_path / "checkpoint.pt")
        args, _ = probe.options(["--weights", str(tmp_path)])
        assert (args.model, args.img_size) == ("resnet18", size)
        assert args.out == Path(f"runs/probe-{tmp_path.name}-{tmp_path.name}")


def test_unreadable_images_are_left_out_with_their_labels(of, spy, data, tmp_path):
    """Up to 1% of them, and more stop."""
    spoil(data / "train/class0/00.png", copies=150)
    calls = spy(probe, "knn")
    code, _, complaint = of(probe, "--blocks", 2, "--epochs", 1, data=data)
    assert code == 0 and complaint.count("skipped") == 1 and "00.png" in complaint
    (train, labels, *_), _ = calls[0]
    assert labels.bincount().tolist() == [161, 12, 12] and len(train) == 185
    spoil(data / "train/class0/more0.png")
    code, _, complaint = of(probe, data=data, out=tmp_path / "other")
    assert code == 1 and "2 of 186 images cannot be read" in complaint


# --- What is refused ---

def test_a_folder_of_a_run_or_of_other_weights_is_refused(refused, tmp_path):
    (tmp_path / "result.json").write_text('{"weights": "another"}')
    assert "result.json is of another" in refused(module=probe, out=tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoint.pt").touch()
    assert "holds a run" in refused(module=probe, out=tmp_path)


def test_features_that_are_not_finite_are_refused(refused, tmp_path):
    state = models.encoder("vit_micro", 16, 4).state_dict()
    state["norm.weight"][3] = math.inf
    torch.save(state, tmp_path / "broken.pt")
    broken = f"--weights {tmp_path}/broken.pt"
    assert "features are not finite" in refused(broken, module=probe)


def test_several_processes_are_refused(refused, monkeypatch):
    several = pretrain.Process(0, 2, torch.device("cpu"))
    monkeypatch.setattr(pretrain, "set_up", lambda device: several)
    assert "one process, not 2" in refused(module=probe)
