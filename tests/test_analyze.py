"""The analyses by their definitions, and the real commands on small runs: BM Fig. 2, 3, 5; A2 sections 3.1 to 3.3, appendix B."""
import functools
import itertools
import json
import math
import os
import shutil
import sys
import time

import numpy as np
import pytest
import torch

import analyze
import degrade
import finetune
import losses
import models
import pretrain
from conftest import command, ended, forked

PLACE = pretrain.Place(0, 1, torch.device("cpu"))


def of_table(table):
    """f of visible (k, n) by a table with a number for each of the 2^n sets."""
    powers = 2 ** torch.arange(int(math.log2(len(table))))
    return lambda visible: table[(visible * powers).sum(1)]


def brute_force(f, n, i, j, m):
    """A2 eq. 1 as it stands, one set at a time."""
    def score(players):
        return f(torch.tensor([[x in players for x in range(n)]])).item()
    others = [x for x in range(n) if x not in (i, j)]
    return np.mean([score({*S, i, j}) - score({*S, i}) - score({*S, j}) + score(set(S)) for S in itertools.combinations(others, m)])


PAIRS = torch.tensor([[0, 3], [1, 2], [4, 5]])


def test_eq_1_over_all_contexts():
    f = of_table(torch.rand(64, generator=pretrain.seeded(1), dtype=torch.float64))
    I, error = analyze.interactions(f, 6, PAIRS, [0, 1, 2, 3, 4], 6, pretrain.seeded(0))       # at most C(4, 2) = 6 sets
    for row, (i, j) in enumerate(PAIRS.tolist()):
        np.testing.assert_allclose(I[row], [brute_force(f, 6, i, j, m) for m in range(5)], atol=1e-6)
    assert (error == 0).all()


def test_eq_1_from_random_contexts_is_near_the_enumeration():
    """Their mean over 300 draws of five contexts, within its own standard error; the one that is reported is that of a draw."""
    f = of_table(torch.rand(64, generator=pretrain.seeded(2), dtype=torch.float64))
    draws = [analyze.interactions(f, 6, PAIRS, [2], 5, pretrain.seeded(3, i)) for i in range(300)]
    I, error = (torch.stack(x)[:, :, 0].double() for x in zip(*draws))
    want = torch.tensor([brute_force(f, 6, i, j, 2) for i, j in PAIRS.tolist()])
    assert ((I.mean(0) - want).abs() < 4 * I.std(0) / 300 ** 0.5).all() and (I.std(0) > 0.01).all()
    np.testing.assert_allclose(error.square().mean(0).sqrt(), I.std(0), rtol=0.15)


def test_each_context_has_m_players_and_neither_of_the_pair():
    seen = []

    def f(visible):
        seen.append(visible)
        return torch.zeros(len(visible))
    analyze.interactions(f, 9, torch.tensor([[2, 7]]), [0, 3, 7], 4, pretrain.seeded(0))
    sets = seen[0].view(-1, 4, 9)
    assert len(sets) == 1 + 4 + 1                               # orders 0 and n - 2 have one context, and are seen once
    assert sets[:, 3].sum(1).tolist() == [0, 3, 3, 3, 3, 7] and not sets[:, 3][:, [2, 7]].any()
    for which, players in enumerate(([2, 7], [2], [7])):
        added = sets[:, 3].clone()
        added[:, players] = True
        assert torch.equal(sets[:, which], added)
    assert len({tuple(x) for x in sets[1:5, 3].tolist()}) > 1   # not one set four times


def test_a_linear_model_has_no_interactions():
    weight = torch.randn(16, generator=pretrain.seeded(0), dtype=torch.float64)
    I, error = analyze.interactions(lambda visible: visible.double() @ weight + 1, 16, analyze.near_pairs((4, 4)), [0, 3, 7, 14], 5, pretrain.seeded(0))
    assert I.abs().max() < 1e-6 and error.max() < 1e-6


def test_a_product_of_two_patches_has_interaction_for_that_pair_alone():
    pairs = analyze.near_pairs((4, 4))
    I, _ = analyze.interactions(lambda visible: 3.0 * visible[:, 5] * visible[:, 10], 16, pairs, [0, 4, 14], 6, pretrain.seeded(0))
    here = (pairs == torch.tensor([5, 10])).all(1)
    assert here.sum() == 1 and (I[here] == 3).all() and (I[~here] == 0).all()


def test_contexts_are_of_the_seed():
    f = of_table(torch.rand(64, generator=pretrain.seeded(4), dtype=torch.float64))
    a, b, c = (analyze.interactions(f, 6, PAIRS, [2], 3, pretrain.seeded(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_eq_2_averages_to_one_and_its_error_is_the_jackknife():
    strength = torch.rand(40, 7, generator=pretrain.seeded(0)) + torch.arange(7)
    J, error = analyze.relative_strength(strength)
    assert abs(J.mean() - 1) < 1e-12 and torch.allclose(J, strength.mean(0).double() / strength.mean().double(), rtol=1e-5)
    assert torch.allclose(analyze.relative_strength(5 * strength)[0], J)
    boot = torch.stack([analyze.relative_strength(strength[torch.randint(40, (40,), generator=pretrain.seeded(9, i))])[0] for i in range(400)]).std(0)
    np.testing.assert_allclose(error, boot, rtol=0.25)
    assert analyze.relative_strength(strength[:1])[1] is None


def test_the_share_between_two_orders():
    """45% of a flat curve on any grid of orders; of a straight line by hand."""
    for x in ([0, 0.5, 1], [0, 0.07, 0.2, 0.36, 0.93, 1]):
        assert analyze.share_between(x, [2] * len(x), 0.05, 0.5) == pytest.approx(45)
    assert analyze.share_between([0, 1], [0, 1], 0.1, 0.55) == pytest.approx(100 * (0.55 ** 2 - 0.1 ** 2))


def test_the_mean_colour_is_the_data_s():
    """Of 1,000 images from anywhere in the set, each channel's."""
    images = torch.zeros(3000, 3, 4, 4, dtype=torch.uint8)
    images[1000:] = torch.tensor([30, 60, 90], dtype=torch.uint8).view(3, 1, 1)                # sorted, as by class
    run = analyze.Run("", dict(img_size=[4, 4], test_crop=1.0, workers=0), None)
    colour = analyze.mean_colour(pretrain.MemorySet(images, None, PLACE.device), run, 0, PLACE)
    np.testing.assert_allclose(colour, np.array([20, 40, 60]) / 255, rtol=0.1)


def test_log_odds_by_hand():
    """log p / (1 - p) of softmax, and no infinity where p rounds to one."""
    scores, labels = torch.tensor([[1.0, 2.0, 0.5], [100.0, 0.0, -5.0]]), torch.tensor([1, 0])
    p = scores[0].double().softmax(0)[1]
    got = analyze.log_odds(scores, labels)
    assert abs(got[0] - (p / (1 - p)).log()) < 1e-6 and abs(got[1] - 100 + math.log(1 + math.exp(-5))) < 1e-4


def test_the_game_of_an_image_by_hand():
    """A classifier by the first patch's brightness: 2 where the patch is shown, the colour's 1 where it is not."""
    image = torch.zeros(1, 1, 4, 4)
    image[:, :, :2, :2] = 2.0

    def classify(images):
        return torch.stack([images[:, 0, :2, :2].mean((1, 2)), torch.zeros(len(images))], dim=1)
    f = analyze.game(classify, image, torch.tensor([0]), 2, torch.ones(1))
    assert f(torch.tensor([[True, False, False, False], [False, True, True, True]] * 700)).view(700, 2).unique(dim=0).tolist() == [[2, 1]]


def test_near_pairs_by_hand():
    """Two rows of three patches: all are within two of each other but none twice; a row of four: ends are three apart."""
    assert len(analyze.near_pairs((2, 3))) == 15 and analyze.near_pairs((1, 4)).tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]
    assert len(analyze.near_pairs((3, 3), 1)) == 20


def test_showing_replaces_whole_patches_by_the_colour():
    images, visible = torch.rand(2, 3, 4, 6), torch.tensor([[True, False, True, True, True, False], [False] * 6])
    shown = analyze.showing(images, visible, 2, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(shown[0, :, :2, :2], images[0, :, :2, :2]) and torch.equal(shown[0, :, 2:, :4], images[0, :, 2:, :4])
    for colour, channel in zip((0.1, 0.2, 0.3), shown[0]):
        assert (channel[:2, 2:4] == colour).all() and (channel[2:, 4:] == colour).all()
    assert torch.equal(shown[1], torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(3, 4, 6))


@pytest.mark.parametrize("ratio, dropped", [(0.0, 0), (0.05, 1), (0.5, 8), (0.9, 15), (0.95, 15)])
def test_occlusion_drops_an_exact_count_each_image_its_own(ratio, dropped):
    """Sixteen white patches: what is black was dropped."""
    seen = []

    def classify(images):
        seen.append(images)
        return torch.zeros(len(images), 2)
    analyze.occlusion(classify, torch.ones(20, 1, 8, 8), torch.zeros(20, dtype=torch.long), 2, torch.zeros(1), [ratio], 2, pretrain.seeded(0))
    assert len(seen) == (2 if ratio else 1)
    for images in seen:
        black = (degrade.patch_pixels(torch.ones(1, 16, dtype=torch.bool), 2, (4, 4)) & (images == 0)).flatten(1)
        assert (black.sum(1) == 4 * dropped).all()
        assert not dropped or len({tuple(x) for x in black.tolist()}) > 5


def test_occlusion_counts_hits():
    """A classifier by the mean brightness: right while enough is white."""
    def classify(images):
        bright = images.mean((1, 2, 3))
        return torch.stack([bright, 0.6 - bright], dim=1)      # 0 while more than 30% is shown
    hits = analyze.occlusion(classify, torch.ones(5, 1, 8, 8), torch.zeros(5, dtype=torch.long), 2, torch.zeros(1), [0.0, 0.5, 0.9], 3, pretrain.seeded(0))
    assert hits.tolist() == [[5, 5, 5], [5, 5, 5], [0, 0, 0]]


@pytest.mark.parametrize("side, high", [(8, 0.0), (7, 0.35), (16, 0.0)])
def test_fourier_of_white_noise_is_flat(side, high):
    """0, or, where one of the two ends of the diagonal is not real, (ln 2) / 2 = .35 more: the mean logarithms of |real| and
    |complex| normal numbers."""
    amplitude = analyze.log_amplitude(torch.randn(40, 300, side, side, generator=pretrain.seeded(0))).mean(0)
    assert len(amplitude) == side // 2 + 1 and amplitude[0] == 0
    assert abs(amplitude[-1] - high) < 0.04 and (amplitude[1:-1] - 0.35).abs().max() < 0.04


def test_fourier_of_smooth_maps_is_strongly_negative():
    noise = torch.randn(4, 8, 16, 16, generator=pretrain.seeded(0))
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(noise, (2, 2, 2, 2), mode="circular"), 5, 1)
    assert analyze.log_amplitude(torch.full((1, 2, 8, 8), 3.0))[0, -1] < -15
    assert analyze.log_amplitude(blurred).mean(0)[-1] < -2


@pytest.mark.parametrize("h, w", [(8, 8), (7, 7), (9, 5), (4, 10)])
def test_the_diagonal_has_the_right_frequencies(h, w):
    """A wave of the k-th frequency along the diagonal stands out at k, and the last is the highest there is."""
    n = min(h, w) // 2
    y, x = torch.arange(h)[:, None] / h, torch.arange(w) / w
    for k in range(1, n + 1):
        ky, kx = round(h // 2 * k / n), round(w // 2 * k / n)
        wave = 1 + 5 * torch.cos(2 * math.pi * (ky * y + kx * x))
        amplitude = analyze.log_amplitude(wave[None, None] + 0.01 * torch.randn(1, 1, h, w, generator=pretrain.seeded(k)))[0]
        assert amplitude.argmax() == k
    assert (ky, kx) == (h // 2, w // 2)


def test_variance_by_hand():
    maps = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 4.0]]]])                # variances 1 and 3
    assert analyze.spatial_variance(maps).tolist() == [[2.0]]
    assert analyze.spatial_variance(torch.randn(3, 5, 1, 1)).tolist() == [[0.0]] * 3           # one position: none, not nan


@pytest.mark.parametrize("name, size, shapes", [
    ("vit_micro", (16, 24), [(2, 128, 4, 6)] * 6),
    ("resnet18", (64, 32), [(2, 64, 16, 8)] * 2 + [(2, 128, 8, 4)] * 2 + [(2, 256, 4, 2)] * 2 + [(2, 512, 2, 1)] * 2),
    ("resnet50", (32, 32), [(2, 256, 8, 8)] * 3 + [(2, 512, 4, 4)] * 4 + [(2, 1024, 2, 2)] * 6 + [(2, 2048, 1, 1)] * 3)])
def test_feature_maps_are_every_block_s(name, size, shapes):
    model, images = models.encoder(name, size, 4).eval(), torch.rand(2, 3, *size)
    with torch.no_grad():
        found = analyze.feature_maps(model, images, lambda z: z.clone())
        assert [tuple(z.shape) for z in found] == shapes
        last = model.encode(images)
        if name == "vit_micro":
            patch = found[-1][:, :, 1, 2]                       # row 1, column 2 of 6: token 1 + 8
            assert torch.allclose(model.norm(patch), last[:, 1 + 8], atol=1e-5)
        else:
            assert torch.equal(found[-1], last)
        assert len(analyze.feature_maps(model, images, lambda z: 0)) == len(shapes)            # no hook is left behind


def test_sums_of_parts_are_the_mean_and_its_error():
    values = [torch.rand(30, 3, generator=pretrain.seeded(0)), torch.rand(30, 1, generator=pretrain.seeded(1))]
    parts = [json.loads(json.dumps(analyze.sums([v[rows] for v in values]))) for rows in (slice(0, 20), slice(20, 30))]
    mean, error = analyze.mean_and_error(parts)
    for v, m, e in zip(values, mean, error):
        np.testing.assert_allclose(m, v.mean(0), rtol=1e-5)
        np.testing.assert_allclose(e, v.std(0) / 30 ** 0.5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(labelled, tmp_path_factory):
    """Small runs by the real scripts: two of pre-training, ViT and ResNet, and the ViT fine-tuned."""
    where, tiny = tmp_path_factory.mktemp("runs"), "--workers 0 --amp off --steps 4 --batch_size 8 --log_every 1 --seed 1".split()
    data = ["--data", str(labelled)]

    def go(module, *argv):
        assert pretrain.command(module.run, module.options, [*map(str, argv), *tiny, *data]) == 0
    go(pretrain, "--task", "zoom_in_mask", "--model", "vit_micro", "--img_size", 16, "--patch_size", 4, "--out", where / "zoom")
    go(pretrain, "--task", "a2mim", "--model", "resnet18", "--img_size", 32, "--patch_size", 8, "--out", where / "resnet")
    go(finetune, "--weights", where / "zoom", "--recipe", "small", "--save_every", 2, "--out", where / "tuned")
    return where


@pytest.fixture
def do(made, tmp_path, capfd):
    """do(name, *options) -> (exit code, what was printed, what was complained about, the numbers)."""
    def go(name, *argv, out=None):
        out = out or tmp_path / "out"
        argv = [name, *(str(made / x) if (made / str(x)).is_dir() else str(x) for x in argv), "--out", str(out)]
        code = pretrain.command(analyze.run, analyze.options, argv)
        path = out / f"{name}.json"
        return code, *capfd.readouterr(), json.loads(path.read_text()) if path.exists() else None
    return go


TINY = "--images 10 --amp off --workers 0".split()


@pytest.mark.parametrize("name", ["fourier", "variance"])
def test_feature_maps_of_runs_and_random_weights(do, made, name):
    code, said, _, found = do(name, "zoom", "resnet", "none", *TINY)
    assert code == 0 and list(found["runs"]) == ["zoom", "resnet", "none"] and not found["parts"]
    assert [len(found["runs"][x]["mean"]) for x in ("zoom", "resnet", "none")] == [6, 8, 6]     # none is like the first run
    model, state = models.encoder("vit_micro", [16, 16], 4), models.read_weights(str(made / "zoom"))
    models.load_weights(model, state)
    val = pretrain.load_data(state["config"], PLACE, "val")
    views = torch.cat([v for v, _, _ in val.plain(analyze.choose_images(val, 10, 0), 10, (16, 16), 0.875)])
    with torch.no_grad():
        look = analyze.log_amplitude if name == "fourier" else analyze.spatial_variance
        want = analyze.feature_maps(model.eval(), views, look)
    for block, expected in zip(found["runs"]["zoom"]["mean"], want):
        np.testing.assert_allclose(block, expected.mean(0), rtol=1e-4, atol=1e-5)
    assert f"{name}.png" in said and "A2 found" in said


def test_occlusion_of_nothing_is_the_plain_accuracy(do, made, labelled):
    code, said, _, found = do("occlusion", "tuned", "--images", 13, "--repeats", 2, "--amp", "off", "--workers", 0)
    run = found["runs"]["tuned"]
    out = made / "eval"
    assert code == 0 and pretrain.command(finetune.run, finetune.options, ["--weights", str(made / "tuned"), "--eval", "--amp", "off", "--out", str(out)]) == 0
    assert run["mean"][0] == pytest.approx(json.loads((out / "result.json").read_text())["top1"], abs=0.01)
    assert run["classifier"] == "its own classifier" and run["patches"] == 16
    assert run["dropped"] == [0, 1, 2, 4, 5, 7, 8, 10, 12, 13, 15, 15] and run["deviation"][0] == 0
    assert len(run["top1"]) == 12 and all(len(x) == 2 for x in run["top1"])


def test_a_run_without_a_classifier_gets_a_linear_layer(do):
    code, said, _, found = do("occlusion", "zoom", "none", *TINY, "--repeats", 1, "--fill", "mean")
    assert code == 0 and "zoom by a linear layer on its frozen features, fitted to 36 images" in said
    assert found["runs"]["zoom"]["deviation"] is None
    assert found["runs"]["none"]["mean"][0] == 100              # classes of different brightness: fitted to the right labels, all are told apart


def test_occlusion_s_fills_are_different_pictures(do, tmp_path):
    """Nothing dropped is the same, 95% dropped is not: black is told from the mean."""
    argv = ["occlusion", "tuned", "--images", 13, "--repeats", 1, "--amp", "off", "--workers", 0]
    black, mean = (do(*argv, "--fill", fill, out=tmp_path / fill)[3]["runs"]["tuned"]["mean"] for fill in ("black", "mean"))
    assert black[0] == mean[0] and black[-1] != mean[-1]


def test_interaction_of_real_runs(do):
    code, said, _, found = do("interaction", "tuned", "resnet", "--images", 3, "--pairs", 4, "--contexts", 3, "--workers", 0)
    assert code == 0 and found["settings"]["amp"] == "off"      # float32, unless asked otherwise: interactions may be below bf16's rounding
    for run in found["runs"].values():
        assert run["players"] == 16 and run["orders"] == [0, 1, 3, 4, 6, 7, 8, 10, 11, 13, 14]
        assert np.mean(run["J"]) == pytest.approx(1) and len(run["J_error"]) == 11 and len(run["strength_of_image"]) == 3
        assert run["context_error"][0] == run["context_error"][-1] == 0 < run["context_error"][4]
    assert "45% were it flat: tuned" in said


def test_interaction_of_a_real_run_by_hand(do, made):
    """Of one image: its own pairs, the data's mean colour about them, |I| and then the mean over pairs."""
    run = do("interaction", "tuned", "--images", 1, "--pairs", 12, "--contexts", 2, "--workers", 0)[3]["runs"]["tuned"]
    state = models.read_weights(str(made / "tuned"))
    model = models.encoder("vit_micro", [16, 16], 4, num_classes=3, pool="mean").eval()
    models.load_weights(model, state)
    val = pretrain.load_data(state["config"], PLACE, "val", labelled=True)
    image, label, _ = next(val.plain(analyze.choose_images(val, 1, 0), 1, (16, 16), state["config"]["test_crop"]))
    base = torch.cat([v for v, _, _ in val.plain(torch.arange(13), 13, (16, 16), state["config"]["test_crop"])]).mean((0, 2, 3))
    near = analyze.near_pairs((4, 4))
    pairs = near[torch.randperm(len(near), generator=pretrain.seeded(0, pretrain.PAIRS, 0))[:12]]

    def score(players):                                         # log p / (1 - p) with these patches shown
        shown = base.view(3, 1, 1).expand(3, 16, 16).clone()
        for x in players:
            rows, columns = slice(x // 4 * 4, x // 4 * 4 + 4), slice(x % 4 * 4, x % 4 * 4 + 4)
            shown[:, rows, columns] = image[0, :, rows, columns]
        p = model(shown[None]).double().softmax(1)[0, label[0]]
        return (p / (1 - p)).log().item()
    with torch.no_grad():
        for at, others in ((0, lambda i, j: set()), (-1, lambda i, j: set(range(16)) - {i, j})):            # orders 0 and n - 2
            I = np.array([score({*others(i, j), i, j}) - score({*others(i, j), i}) - score({*others(i, j), j}) + score(others(i, j)) for i, j in pairs.tolist()])
            assert run["strength"][at] == pytest.approx(abs(I).mean(), rel=1e-2, abs=1e-5)

def test_eq_2_takes_the_magnitude_of_each_pair_before_their_mean(do, monkeypatch):
    monkeypatch.setattr(analyze, "interactions", lambda f, n, pairs, orders, *_: (torch.tensor([[1.0], [-3.0]]).expand(2, len(orders)), torch.zeros(2, len(orders))))
    run = do("interaction", "tuned", "--images", 2, "--pairs", 2, "--workers", 0)[3]["runs"]["tuned"]
    assert run["strength"] == [2] * 11 and run["J"] == [1] * 11


def test_reconstruct_is_the_loss_of_the_run(do, made):
    """By hand from the same pictures; the mask token has its own figure where it enters inside."""
    code, said, _, found = do("reconstruct", "zoom", "resnet", *TINY)
    assert code == 0 and "reconstruct.png" in said
    zoom, resnet = found["runs"]["zoom"], found["runs"]["resnet"]
    assert zoom["borrowed"] and zoom["mse_without_token"] is None and not resnet["borrowed"] and resnet["mse_without_token"] > 0
    c = models.read_weights(str(made / "resnet"))["config"]
    model, state = pretrain.build(c), models.read_weights(str(made / "resnet"))
    models.load_weights(model, state)
    val = pretrain.load_data(c, PLACE, "val")
    views = torch.cat([v for v, _, _ in val.plain(analyze.choose_images(val, 10, 0), 10, (32, 32))])
    d = degrade.degrade(views, "a2mim", (32, 32), 8, pretrain.seeded(0, pretrain.PICTURE, 0), **c["settings"])
    with torch.no_grad():
        prediction = model.eval()(d.inputs, d.hidden)
        error = (prediction - losses.patchify(model.normalize(d.target), 8)).square().mean(2)
        assert resnet["mse"] == pytest.approx(error[d.hidden].mean().item(), rel=1e-4)
        without = (model(d.inputs, d.hidden, token=False) - losses.patchify(model.normalize(d.target), 8)).square().mean(2)
        assert resnet["mse_without_token"] == pytest.approx(without[d.hidden].mean().item(), rel=1e-4) and resnet["mse_without_token"] != resnet["mse"]
        shown = model.denormalize(losses.unpatchify(prediction, 8, (4, 4)))
        shown = torch.where(degrade.patch_pixels(d.hidden, 8, (4, 4)), shown, d.inputs).clamp(0, 1)
    assert resnet["mse_shown"] == pytest.approx((shown - d.target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("task, model", [*((task, "vit_micro") for task in list(degrade.TASKS)[:9]), ("zoom_in_mask", "resnet18"), ("blur", "resnet18")])
def test_every_task_and_model_is_reconstructed(labelled, tmp_path, do, task, model):
    out = tmp_path / "run"
    argv = f"--task {task} --model {model} --img_size 32 --patch_size 8 --workers 0 --amp off --steps 1 --batch_size 4 --seed 0".split()
    assert pretrain.command(pretrain.run, pretrain.options, [*argv, "--data", str(labelled), "--out", str(out)]) == 0
    code, said, wrong, found = do("reconstruct", out, "--images", 6, "--amp", "off", "--workers", 0)
    assert code == 0, wrong
    run = found["runs"]["run"]
    inside = task in ("simmim", "a2mim") or model == "resnet18" and task in ("mask", "zoom_in_mask")
    assert (run["mse_without_token"] is not None) == inside and run["mse"] > 0 and run["task"] == task


def test_a_file_of_weights_alone_is_reconstructed(do, made, tmp_path, labelled):
    """An MAE file has no configuration: --task says what it recovers."""
    state = models.read_weights(str(made / "zoom"))
    torch.save(dict(model=state["model"]), tmp_path / "mae.pth")
    more = ["--model", "vit_micro", "--img_size", 16, "--patch_size", 4, "--data", labelled]
    code, _, wrong, found = do("reconstruct", tmp_path / "mae.pth", *TINY, *more, "--norm_target", "off", "--rows", 2)
    assert code == 0, wrong
    assert found["runs"]["mae.pth"]["task"] == "mask" and not found["runs"]["mae.pth"]["borrowed"]
    again = do("reconstruct", tmp_path / "mae.pth", *TINY, *more, "--norm_target", "patch", "--rows", 2, "--resume")[3]
    assert again["runs"]["mae.pth"]["borrowed"]                 # another request: measured again
    assert do("reconstruct", "zoom", tmp_path / "mae.pth", *TINY, *more, "--rows", 2, out=tmp_path / "both")[0] == 0
    torch.save(models.export(state["model"]), tmp_path / "vit.pth")
    code, _, wrong, _ = do("reconstruct", tmp_path / "vit.pth", *TINY, *more, out=tmp_path / "other")
    assert code == 2 and "vit.pth recovers no image, it lacks decoder_pred.weight" in wrong
    assert do("fourier", tmp_path / "vit.pth", *TINY, *more)[0] == 0
    assert do("variance", tmp_path / "vit.pth", "zoom", *TINY, *more[:-2])[0] == 0             # the data of the run, in any order


def test_curves_are_the_log_s(do, made):
    code, said, _, found = do("curves", "zoom", "resnet", "tuned")
    assert code == 0
    lines = [json.loads(line) for line in (made / "zoom" / "log.jsonl").open()]
    assert found["runs"]["zoom"]["loss"] == [[x["epoch"], x["loss"]] for x in lines] and found["runs"]["resnet"]["task"] == "a2mim"
    tuned = found["runs"]["tuned"]
    assert len(tuned["top1"]) == 2 and tuned["pretraining"] == "zoom_in_mask" and tuned["pretraining_epochs"] == pytest.approx(4 * 8 / 36, abs=1e-4)
    assert "pretraining" not in found["runs"]["zoom"]


def test_pre_training_is_found_behind_several_fine_tunings(do, made, labelled, tmp_path):
    """And by its checkpoint's path; where its log is gone, that is said."""
    again = ["--steps", "2", "--batch_size", "4", "--workers", "0", "--amp", "off", "--data", str(labelled)]
    for weights, out in ((made / "tuned" / "checkpoint.pt", "twice"), (tmp_path / "twice", "thrice")):
        assert pretrain.command(finetune.run, finetune.options, ["--weights", str(weights), *again, "--out", str(tmp_path / out)]) == 0
    found = do("curves", tmp_path / "thrice")[3]["runs"]["thrice"]
    assert found["pretraining"] == "zoom_in_mask" and found["pretraining_epochs"] == pytest.approx(4 * 8 / 36, abs=1e-4)
    shutil.rmtree(tmp_path / "twice")
    code, said, _, _ = do("curves", tmp_path / "thrice")
    assert code == 0 and "the log of their pre-training is not to be found: thrice" in said


def test_stopped_and_resumed_equals_never_stopping(made, tmp_path, do, monkeypatch):
    argv = ["--pairs", 4, "--contexts", 3, "--workers", 0]
    code, _, _, whole = do("interaction", "tuned", *argv, out=tmp_path / "whole")
    assert code == 0
    slow = ("import analyze, time\nold = analyze.interactions\n"
            "def interactions(*a):\n    print('at work', flush=True); time.sleep(.3); return old(*a)\nanalyze.interactions = interactions")
    jobs, said = forked(functools.partial(command, preamble=slow), "analyze", "interaction", made / "tuned", *argv, "--out", tmp_path / "part")
    while jobs[0].is_alive() and open(said.name).read().count("at work") < 3:                  # the first two images are done
        time.sleep(0.01)
    jobs[0].terminate()
    assert ended(jobs, said)[0] == [143]
    done = len(json.loads((tmp_path / "part" / "interaction.json").read_text())["parts"]["tuned"]["found"])
    assert 0 < done < 13
    code, _, wrong, _ = do("interaction", "tuned", *argv, out=tmp_path / "part")
    assert code == 2 and "is there already: --resume goes on with it" in wrong
    code, _, wrong, _ = do("interaction", "tuned", *argv[:-2], "--workers", 0, "--seed", 5, "--resume", out=tmp_path / "part")
    assert code == 2 and "was made with seed 0, this command asks for 5" in wrong
    seen, real = [], analyze.interactions
    monkeypatch.setattr(analyze, "interactions", lambda *a: seen.append(0) or real(*a))
    code, _, _, found = do("interaction", "tuned", *argv, "--resume", out=tmp_path / "part")
    assert code == 0 and found["runs"]["tuned"]["J"] == whole["runs"]["tuned"]["J"] and len(seen) == 13 - done


def test_resume_measures_only_what_is_new(do, made, monkeypatch):
    assert do("variance", "zoom", *TINY)[0] == 0
    first = do("variance", "zoom", "none", *TINY, "--resume")[3]["runs"]
    monkeypatch.setattr(analyze, "feature_maps", None)          # nothing is left to measure
    code, _, _, again = do("variance", "none", "zoom", *TINY, "--resume")
    assert code == 0 and again["runs"]["zoom"] == first["zoom"] and again["runs"]["none"] == first["none"]
    os.utime(made / "zoom" / "checkpoint.pt")                   # other weights
    code, _, wrong, _ = do("variance", "zoom", *TINY, "--resume")
    assert code == 1 and "TypeError" in wrong


def test_parts_of_other_weights_are_not_gone_on_with(do, made, tmp_path):
    """What was found before the weights changed is measured again."""
    assert do("variance", "zoom", *TINY)[0] == 0
    path = tmp_path / "out" / "variance.json"
    there = json.loads(path.read_text())
    want, stale = there["runs"].pop("zoom"), dict(n=10, sum=[[9.0]] * 6, square=[[90.0]] * 6)
    for of, mean in ((want["of"], 0.9), (dict(want["of"], written=1.0), None)):
        path.write_text(json.dumps(dict(there, runs={}, parts=dict(zoom=dict(of=of, found=[stale])))))
        found = do("variance", "zoom", *TINY, "--resume")[3]["runs"]["zoom"]["mean"]
        assert found == (want["mean"] if mean is None else [[mean]] * 6)


def test_unreadable_images_are_named_and_too_many_of_them_stop(do, made, labelled, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    for path in list((data / "val").rglob("*.png")):
        for i in range(9):
            shutil.copy(path, path.with_name(f"{i}{path.name}"))
    files = sorted((data / "val").rglob("*.png"))               # 130
    files[0].write_bytes(b"no picture")
    code, _, wrong, found = do("variance", "zoom", "--data", data, "--amp", "off", "--workers", 0)
    assert code == 0 and str(files[0]) in wrong and found["settings"]["images"] == len(files)
    files[1].write_bytes(b"nor this")
    code, _, wrong, _ = do("variance", "zoom", "--data", data, "--amp", "off", "--workers", 0, out=tmp_path / "more")
    assert code == 1 and f"more than 1% of {len(files)} images cannot be read" in wrong and str(files[1]) in wrong


def test_what_is_drawn(do, monkeypatch):
    """The axes of every curve: depth 1/L .. 1, the share dropped, order over n - 2; bands are the deviations that are reported."""
    seen, hits = {}, torch.arange(36).view(12, 3) * 7 % 4       # of 3 images
    monkeypatch.setattr(analyze, "occlusion", lambda *_: hits)
    monkeypatch.setattr(analyze, "draw", lambda panels, path, again: seen.update({os.path.basename(path): panels[0]["lines"][0]}))
    runs = {name: do(name, "tuned", "--images", 3, "--workers", 0, "--amp", "off", *more)[3]["runs"]["tuned"] for name, more in (
        ("occlusion", ["--repeats", 3]), ("interaction", ["--pairs", 2, "--contexts", 2]), ("variance", []))}
    _, x, y, band = seen["occlusion.png"]
    assert x == [k / 16 for k in (0, 1, 2, 4, 5, 7, 8, 10, 12, 13, 15, 15)] and y == runs["occlusion"]["mean"]
    np.testing.assert_allclose(y, 100 * hits.double().mean(1) / 3, rtol=1e-5)
    np.testing.assert_allclose(band, 100 * hits.double().std(1) / 3, atol=1e-4)
    assert seen["interaction.png"][1] == [m / 14 for m in (0, 1, 3, 4, 6, 7, 8, 10, 11, 13, 14)]
    assert seen["variance.png"][1] == [(i + 1) / 6 for i in range(6)]


def test_images_in_parts_are_one_set(do, made, labelled, tmp_path, monkeypatch):
    """Ten images by fours: the last two count as two; every part draws its own masks, every image its own pairs."""
    argv = f"--task zoom_in --model vit_micro --img_size 16 --patch_size 4 --workers 0 --amp off --steps 1 --batch_size 4 --data {labelled}"
    assert pretrain.command(pretrain.run, pretrain.options, [*argv.split(), "--out", str(tmp_path / "run")]) == 0
    whole = do("reconstruct", tmp_path / "run", *TINY, out=tmp_path / "whole")[3]["runs"]["run"]                # nothing random in it
    real, masks, pairs = analyze.Results.over_images, [], []
    monkeypatch.setattr(analyze.Results, "over_images", lambda self, run, data, rows, chunk, *more: real(self, run, data, rows, min(chunk, 4), *more))
    run = do("reconstruct", tmp_path / "run", *TINY)[3]["runs"]["run"]
    assert run["mse"] == pytest.approx(whole["mse"], rel=1e-5) and run["images"] == 10
    draw, old = degrade.random_mask, analyze.interactions
    monkeypatch.setattr(degrade, "random_mask", lambda batch, grid, ratio, **more: masks.append(draw(batch, grid, ratio, **more)) or masks[-1])
    assert do("occlusion", "tuned", *TINY, "--repeats", 1)[3]["runs"]["tuned"]["images"] == 10
    half = [m[:2] for m in masks if m.sum() == 8 * len(m) and len(m) > 1]
    assert len(half) == 3 and not torch.equal(half[0], half[1])
    monkeypatch.setattr(analyze, "interactions", lambda f, n, p, *more: pairs.append(p.tolist()) or old(f, n, p, *more))
    do("interaction", "tuned", "--images", 3, "--pairs", 3, "--contexts", 2, "--workers", 0)
    assert len(pairs) == 3 and pairs[0] != pairs[1]


def test_a_classifier_of_other_classes_is_not_taken(do, made, tmp_path, short_fits):
    """Nor one of the same classes in another order: its scores would be read for the wrong ones."""
    state = models.read_weights(str(made / "tuned"))
    state["config"]["classes"] = state["config"]["classes"][::-1]
    (tmp_path / "turned").mkdir()
    torch.save(state, tmp_path / "turned" / "checkpoint.pt")
    run = do("occlusion", tmp_path / "turned", *TINY, "--repeats", 1)[3]["runs"]["turned"]
    assert run["classifier"].startswith("a linear layer")


@pytest.mark.parametrize("more, fitted", [([], 5), (["--paper"], 36)])
def test_paper_fits_to_all_training_images(do, monkeypatch, short_fits, more, fitted):
    monkeypatch.setattr(analyze, "FIT", 5)
    run = do("occlusion", "zoom", *TINY, "--repeats", 1, *more)[3]["runs"]["zoom"]
    assert run["classifier"].endswith(f"fitted to {fitted} images")


def test_what_is_not_finite_is_not_written(do, made, tmp_path, short_fits):
    state = models.read_weights(str(made / "zoom"))
    state["model"]["blocks.3.mlp.fc2.weight"][0, 0] = math.inf
    (tmp_path / "burst").mkdir()
    torch.save(state, tmp_path / "burst" / "checkpoint.pt")
    for name in ("variance", "occlusion"):                      # the largest of scores that are no numbers is the first class
        code, _, wrong, found = do(name, tmp_path / "burst", *TINY)
        assert code == 1 and "not finite" in wrong and found is None


def test_a_run_is_measured_again_where_it_is_another_thing(do):
    """--resume keeps no numbers of another size, or of random weights of another model."""
    zoom, none = (do("variance", "zoom", "none", *TINY)[3]["runs"][x] for x in ("zoom", "none"))
    wide = do("variance", "zoom", *TINY, "--img_size", 32, "--resume")[3]["runs"]
    assert wide["zoom"]["mean"] != zoom["mean"] and wide["none"] == none
    assert len(do("variance", "resnet", "none", *TINY, "--resume")[3]["runs"]["none"]["mean"]) == 8 > len(none["mean"])


def test_results_that_are_there_are_not_written_over(do):
    assert do("variance", "zoom", *TINY)[0] == 0
    code, _, wrong, found = do("variance", "resnet", *TINY)
    assert code == 2 and "variance.json is there already: --resume goes on with it and adds runs" in wrong and list(found["runs"]) == ["zoom"]


def test_a_stopped_reconstruct_goes_on(do, tmp_path):
    """What its first images gave is not measured again; the picture is made anew."""
    argv = ["zoom", "--images", 8, "--amp", "off", "--workers", 0, "--rows", 3]
    want = do("reconstruct", *argv)[3]["runs"]["zoom"]
    path = tmp_path / "out" / "reconstruct.json"
    there = json.loads(path.read_text())
    path.write_text(json.dumps(dict(there, runs={}, parts=dict(zoom=dict(of=want["of"], found=[dict(n=8, mse=[7.0], shown=[6.0])])))))
    (tmp_path / "out" / "reconstruct.png").unlink()
    found = do("reconstruct", *argv, "--resume")[3]["runs"]["zoom"]
    assert (found["mse"], found["mse_shown"]) == (7, 6) and (tmp_path / "out" / "reconstruct.png").exists()


def test_files_of_weights_stand_beside_runs_of_another_architecture(do, tmp_path):
    """--model is a file's; a run says its own."""
    import torchvision
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "r18.pth")
    code, _, wrong, found = do("variance", "zoom", tmp_path / "r18.pth", *TINY, "--model", "resnet18")
    assert code == 0 and [len(r["mean"]) for r in found["runs"].values()] == [6, 8], wrong
    code, _, wrong, _ = do("variance", "zoom", tmp_path / "r18.pth", *TINY, out=tmp_path / "other")
    assert code == 2 and "r18.pth: " in wrong
    code, _, wrong, _ = do("variance", "zoom", *TINY, "--model", "resnet18", out=tmp_path / "third")
    assert code == 2 and "--model resnet18 is for files of weights alone" in wrong


def test_maps_of_one_position_have_no_frequencies(do):
    code, said, _, found = do("fourier", "resnet", *TINY)       # 32 pixels: the last stage's maps are 1x1
    assert code == 0 and "Left out, maps one position high: resnet after depth 0.75" in said and found["runs"]["resnet"]["mean"][-1] == [0]
    mean, error = found["runs"]["resnet"]["mean"], found["runs"]["resnet"]["error"]
    assert f"Last block: resnet {mean[-3][-1]:.2f} ± {error[-3][-1]:.2f}" in said and mean[-3][-1] != 0     # the highest frequency of the last that has one


@pytest.mark.parametrize("name", ["fourier", "curves"])
def test_curves_are_drawn_with_every_run_in_the_legend(do, made, tmp_path, monkeypatch, name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    seen = []
    close = pyplot.close
    texts = lambda figure: [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    monkeypatch.setattr(pyplot, "close", lambda figure: seen.append(texts(figure)) or close(figure))
    code, said, _, _ = do(name, "tuned", "zoom", *(TINY if name == "fourier" else []))
    assert code == 0 and f"drawn: {tmp_path / 'out' / name}.png" in said and {"tuned", "zoom"} <= set(seen[0])
    from PIL import Image
    assert Image.open(tmp_path / "out" / f"{name}.png").size[0] > 400


@pytest.mark.parametrize("argv, want", [
    ("interaction x", dict(images=16, pairs=8, contexts=6)), ("interaction x --paper", dict(images=500, pairs=50, contexts=50)),
    ("interaction x --paper --images 5 --pairs 3", dict(images=5, pairs=3, contexts=50)), ("occlusion x --paper", dict(images=0, repeats=5)),
    ("occlusion x --repeats 2", dict(images=500, repeats=2)), ("variance x --paper --images 9", dict(images=9))])
def test_paper_takes_the_paper_s_counts_where_none_is_given(monkeypatch, argv, want):
    seen = {}
    for name, (_, *rest) in list(analyze.NAMES.items()):
        monkeypatch.setitem(analyze.NAMES, name, (lambda args, place: seen.update(vars(args)), *rest))
    assert pretrain.command(analyze.run, analyze.options, argv.split()) == 0 and want.items() <= seen.items()


def test_without_matplotlib_the_numbers_are_written(do, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said, _, found = do("variance", "zoom", *TINY)
    assert code == 0 and found["runs"]["zoom"]["mean"] and "pip install matplotlib" in said and "drawn" not in said
    code, said, _, _ = do("curves", "zoom")                     # it has no --resume
    assert code == 0 and said.splitlines()[0].endswith("pip install matplotlib, then the same command")
    code, said, _, _ = do("reconstruct", "zoom", *TINY)         # a grid of pictures needs none
    assert code == 0 and "reconstruct.png" in said


@pytest.mark.parametrize("name", ["fourier", "variance", "occlusion"])
def test_lower_precision_does_not_change_the_answer(do, tmp_path, name):
    """Measured in bf16 and in float32: what differs is within the error that is reported, or one image of 13."""
    plain, low = (do(name, "tuned", "--images", 13, "--workers", 0, "--amp", amp, out=tmp_path / amp)[3]["runs"]["tuned"] for amp in ("off", "bf16"))
    spread = "deviation" if name == "occlusion" else "error"
    a, b, e = (np.concatenate([np.atleast_1d(x) for x in r[k]]) for r, k in ((plain, "mean"), (low, "mean"), (plain, spread)))
    assert (abs(a - b) <= np.maximum(0.5 * e, 8 if name == "occlusion" else 1e-6)).all()


@pytest.mark.parametrize("argv, says", [
    ("fourier nowhere", "no weights at nowhere"),
    ("fourier zoom zoom", "zoom is given twice"),
    ("fourier zoom zoom/", "zoom is given twice"),
    ("fourier zoom --images 0", "--images 0 must be at least 1"),
    ("interaction tuned --contexts 1", "--contexts 1 must be at least 2"),
    ("interaction tuned --distance 0", "--distance 0 must be at least 1"),
    ("occlusion none --data nothing", "--data nothing is neither a folder nor one of shapes"),
    ("reconstruct none", "no weights at none"),
    ("reconstruct tuned", "tuned recovers no image: give the run of pretrain.py it began with"),
    ("reconstruct zoom --task blur", "--task is for a file of weights alone"),
    ("curves none", "curves takes folders of pretrain.py and finetune.py, and none is none"),
    ("fourier zoom --weights x", "unrecognized arguments: --weights"),
    ("sharpness zoom", "invalid choice: 'sharpness'")])
def test_a_bad_request_is_one_line(do, argv, says):
    code, _, wrong, _ = do(*argv.split())
    assert code == 2 and says in wrong and wrong.count("\n") == 1


def test_runs_of_other_data_want_data(do, made, tmp_path):
    config = models.read_weights(str(made / "zoom"))
    config["config"]["data"] = "shapes"
    (tmp_path / "other").mkdir()
    torch.save(config, tmp_path / "other" / "checkpoint.pt")
    code, _, wrong, _ = do("variance", "zoom", tmp_path / "other", *TINY)
    assert code == 2 and "say which images with --data" in wrong


def test_labels_tell_runs_apart():
    assert analyze.labels_of(["runs/a", "runs/b/", "none"]) == ["a", "b", "none"]
    assert analyze.labels_of(["x/a", "y/a/checkpoint.pt"]) == ["x/a", "y/a"]
