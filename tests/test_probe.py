"""Probing by its parts and through the real script: BM section 5, A2 section 5.2; and the table of tasks."""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import finetune
import models
import pretrain
import probe
import table1

PLACE = pretrain.Place(0, 1, torch.device("cpu"))


def settings(**more):
    return dict(dict(model="vit_micro", img_size=[16, 16], test_crop=1.0, workers=0, amp="off", seed=0, pool="mean", blocks=2, epochs=2), **more)


def bright(n, seed=0):
    """n grey pictures of three brightnesses, which are their labels."""
    labels = torch.arange(n) % 3
    noise = torch.rand(n, 3, 16, 16, generator=pretrain.seeded(seed)) * 0.2
    return pretrain.MemorySet(((noise + 0.4 * labels[:, None, None, None]) * 255).byte(), labels, torch.device("cpu"), ["a", "b", "c"])


def test_knn_by_hand():
    """Cosine similarity, the k nearest, votes of exp(s / T)."""
    train, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.0]]), torch.tensor([0, 1, 1, 0])
    votes = probe.knn(train, labels, torch.tensor([[5.0, 0.0]]), classes=3, k=3, temperature=0.5)
    s = np.array([1.0, 0.0, 2 ** -0.5])                         # to the first three; the fourth, opposite, is not among them
    want = np.exp((s - 1) / 0.5)
    np.testing.assert_allclose(votes[0], [want[0], want[1] + want[2], 0], rtol=1e-5)
    assert probe.knn(train, labels, torch.tensor([[-1.0, -0.1]]), 3, k=1).argmax(1).item() == 0
    assert probe.knn(train, labels, torch.randn(5, 2), 3, k=20).shape == (5, 3)                # fewer than k to vote
    assert probe.knn.__defaults__ == (20, 0.07)                 # the README's


@pytest.mark.parametrize("resnet", [False, True])
@pytest.mark.parametrize("n", [40, 3000])
def test_linear_probe_of_separable_features_reaches_all(resnet, n):
    """Three classes, each shifted along its own axis, beside larger coordinates that mean nothing."""
    generator = pretrain.seeded(n)
    labels = torch.arange(n) % 3
    features = 2 * torch.eye(3)[labels] + torch.rand(n, 3, generator=generator)
    features = torch.cat([features, 3 * torch.randn(n, 2, generator=generator)], dim=1)
    head = probe.linear_probe(features, labels, 3, resnet)
    assert not head.training and (head(features).argmax(1) == labels).all()


def test_the_linear_probes_are_mae_s_and_moco_s(monkeypatch):
    """Batch norm without affine and LARS from 0 to 6.4 and back; SGD at 30, 3 and 0.3, no norm."""
    rates = {}
    for optimizer, resnet in ((probe.LARS, False), (torch.optim.SGD, True)):
        rates[resnet], momenta, step = [], set(), optimizer.step

        def note(self, rates=rates[resnet], momenta=momenta, step=step):
            rates.append(self.param_groups[0]["lr"]), momenta.add(self.param_groups[0].get("momentum"))
            step(self)
        monkeypatch.setattr(optimizer, "step", note)
        head = probe.linear_probe(torch.randn(960, 4), torch.arange(960) % 2, 2, resnet)
        assert momenta == {0.9 if resnet else None}             # LARS's own is 0.9, below
        assert len(head) == 1 if resnet else not head[0].affine and head[0].num_batches_tracked == 2000
    assert max(rates[False]) == pytest.approx(0.1 * 16384 / 256) and np.argmax(rates[False]) == pytest.approx(2000 / 9, abs=2) and rates[False][-1] < 1e-4
    assert sorted(set(np.round(rates[True], 6)), reverse=True) == [30, 3, 0.3]
    assert [rates[True].count(lr) for lr in sorted(set(rates[True]))] == [75, 75, 225]    # of 375: 3.75 an epoch


def test_lars_steps_by_hand():
    """You et al. Algorithm 1 as MAE uses it: the ratio 0.001 |w| / |g| for matrices only, momentum 0.9."""
    w, b = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = probe.LARS([w, b], lr=2.0)
    x, y, m, n = np.array([[3.0, 4.0]]), 1.0, 0.0, 0.0
    for g, h in ((np.array([[1.0, -2.0]]), 0.5), (np.array([[0.5, 0.0]]), -1.0)):
        w.grad, b.grad = torch.tensor(g, dtype=torch.float32), torch.tensor([h])
        optimizer.step()
        m, n = 0.9 * m + 0.001 * np.linalg.norm(x) / np.linalg.norm(g) * g, 0.9 * n + h
        x, y = x - 2 * m, y - 2 * n
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=1e-5)
        assert b.item() == pytest.approx(y, rel=1e-5)


def test_accuracies_by_hand():
    """Of eight scores that fall with the class, the fifth place is among the top five and the sixth is not."""
    scores = -torch.arange(8.0).expand(4, 8)
    assert probe.accuracy(scores, torch.tensor([0, 4, 5, 7]), "x") == dict(x=25, x_top5=50)


@pytest.mark.parametrize("cls", [True, False])
def test_the_blocks_probe_pools_the_cls_token_or_the_patches_alone(cls):
    """Without blocks between: what stands in the other place changes nothing."""
    torch.manual_seed(0)
    head, tokens = probe.BlocksProbe(8, 2, 0, 3, cls), torch.randn(2, 5, 8)
    other = tokens.clone()
    other[:, slice(1, None) if cls else slice(0, 1)] = 100 * torch.randn(2, 4 if cls else 1, 8)
    assert torch.equal(head(tokens, 1), head(other, 1)) and not torch.equal(head(tokens, 1), head(tokens.flip(1), 1))
    if not cls:                                                 # a ResNet's tokens are all patches
        assert not torch.equal(head(tokens, 0), head(other, 0))


@pytest.mark.parametrize("name", ["vit_micro", "resnet18"])
@pytest.mark.parametrize("stored", [True, False])
def test_the_blocks_learn_and_leave_the_backbone_untouched(name, stored, monkeypatch):
    """Weights and batch norm statistics are the same bits; tokens are computed once where they fit, else each epoch."""
    monkeypatch.setattr(probe, "BATCH", 20)
    size = 32 if name == "resnet18" else 16
    torch.manual_seed(0)
    model = models.encoder(name, size, 4).eval().requires_grad_(False)
    before, calls, encode = {k: v.clone() for k, v in model.state_dict().items()}, [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: (calls.append((len(images), torch.is_grad_enabled(), model.training)), encode(images))[1])
    c = settings(model=name, img_size=[size, size], epochs=12 if name == "resnet18" else 6)
    data, val = bright(60), bright(30, seed=1)
    train, test = (probe.gather(model, of, c, PLACE, "", tokens=stored) for of in (data, val))
    keys, draw, asked, rate = [], probe.seeded, [], probe.learning_rate
    monkeypatch.setattr(probe, "learning_rate", lambda *a: (asked.append(a), rate(*a))[1])
    monkeypatch.setattr(probe, "seeded", lambda *key: (keys.append(key), draw(*key))[1])
    scores, labels = probe.blocks_probe(model, data, val, train, test, c, PLACE)
    assert list(dict.fromkeys(asked)) == [(step, 3 * c["epochs"], 3 * c["epochs"] // 10, 1e-3) for step in range(3 * c["epochs"])]
    assert keys == [(0, probe.BLOCKS, epoch) for epoch in range(c["epochs"])]                  # another order in each
    assert (scores.argmax(1) == labels).float().mean() > 0.9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(grad or training for _, grad, training in calls)
    assert sum(n for n, _, _ in calls) == 90 + (0 if stored else 60 * c["epochs"] + 30)


def test_features_are_of_the_central_part():
    model, data = models.encoder("vit_micro", 16, 4).eval(), bright(6)
    framed = pretrain.MemorySet(torch.nn.functional.pad(data.images, [8] * 4, value=255), data.labels, PLACE.device, data.classes)
    whole, central = (probe.gather(model, of, settings(test_crop=crop), PLACE, "")[0] for of, crop in ((data, 1.0), (framed, 0.5)))
    torch.testing.assert_close(whole, central)


def test_one_go_gives_all_and_computes_features_once(of, tmp_path, monkeypatch):
    seen, encode = [], models.ViT.encode
    monkeypatch.setattr(models.ViT, "encode", lambda self, images, *a, **k: (seen.append((len(images), self.training)), encode(self, images, *a, **k))[1])
    monkeypatch.setattr(probe, "STEPS", 40)
    code, said, complaint = of(probe)
    assert code == 0, complaint
    assert sum(n for n, _ in seen) == 36 + 13 and not any(training for _, training in seen)
    seen.clear()
    code, said, _ = of(probe, "--blocks", 2, out=tmp_path / "blocks")
    assert sum(n for n, _ in seen) == 36 + 13                   # tokens and features in one pass
    result = json.loads(said.strip().splitlines()[-1])
    assert code == 0 and result["knn"] == result["linear"] == 100 and result["nonlinear"] > 60 and result["images"] == 13 and result["weights"] == "none"
    assert json.loads((tmp_path / "blocks/result.json").read_text()) == result
    assert json.loads((tmp_path / "blocks/config.json").read_text())["epochs"] == 40           # 36 images are one step


def test_a_resnet_is_probed_at_the_size_of_its_run(tmp_path):
    """On a folder too, where finetune.py takes the recipe's."""
    config = dict(model="resnet18", img_size=[96, 96], patch_size=24, data=str(tmp_path))
    torch.save(dict(model={}, config=config), tmp_path / "checkpoint.pt")
    for module, size in ((probe, ([96, 96], 24)), (finetune, (None, None))):
        args = module.options().parse_args(["--weights", str(tmp_path)])
        finetune.open_weights(args)
        assert args.model == "resnet18" and (args.img_size, args.patch_size) == size


def test_a_resnet_is_probed_by_mocos_protocol(of, monkeypatch):
    asked = []
    fit = probe.linear_probe
    monkeypatch.setattr(probe, "linear_probe", lambda f, y, n, resnet, seed: asked.append((resnet, f.shape[1])) or fit(f, y, n, resnet, seed))
    code, said, complaint = of(probe, "--model", "resnet18", "--img_size", 32, "--patch_size", 8)
    assert code == 0 and asked == [(True, 512)], complaint


def test_a_run_is_probed_and_compared_with_none(of, run, labelled, tmp_path, short_fits):
    assert run("--task", "mask", "--steps", 2, data=labelled, out=tmp_path / "mask")[0] == 0
    none = json.loads(of(probe, out=tmp_path / "a")[1].splitlines()[-1])
    code, said, _ = of(probe, "--weights", tmp_path / "mask", out=tmp_path / "b")
    mine = json.loads(said.splitlines()[-1])
    assert code == 0 and "78 loaded" in said and mine["compared_with"]["knn"] == none["knn"] and mine["compared_with"]["out"] == str(tmp_path / "a")


def test_unreadable_images_are_left_out_and_too_many_stop(of, labelled, tmp_path, short_fits):
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    for i in range(150):
        shutil.copy(data / "train/class0/00.png", data / f"train/class0/more{i}.png")
    (data / "train/class0/00.png").write_bytes(b"no picture")
    code, said, complaint = of(probe, "--blocks", 2, "--epochs", 1, data=data)
    assert code == 0 and complaint.count("skipped") == 1 and "00.png" in complaint
    for i in range(4):
        (data / f"train/class0/more{i}.png").write_bytes(b"no picture")
    code, _, complaint = of(probe, data=data, out=tmp_path / "other")
    assert code == 1 and "more than 1% of 186 images cannot be read" in complaint


def test_ctrl_c_is_one_line_and_130(of, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(probe, "gather", interrupted)
    code, _, complaint = of(probe)
    assert code == 130 and complaint.endswith(": stopped by Ctrl-C\n") and complaint.count("\n") == 1


def test_one_image_is_too_few(of, labelled, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "only").mkdir(parents=True)
        shutil.copy(sorted((labelled / split / "class0").iterdir())[0], tmp_path / "data" / split / "only")
    code, _, complaint = of(probe, data=tmp_path / "data")
    assert code == 2 and "has 1 image to fit to" in complaint


def test_features_that_are_not_finite_stop_the_probe(of, tmp_path):
    model = models.encoder("vit_micro", 16, 4)
    model.norm.weight.data[3] = math.inf
    torch.save(model.state_dict(), tmp_path / "broken.pt")
    code, _, complaint = of(probe, "--weights", tmp_path / "broken.pt")
    assert code == 1 and "the features are not finite" in complaint


@pytest.mark.parametrize("flags, says", [(["--labels", 13], "--labels 13: class class0 has only 12"), (["--weights", "nowhere.pt"], "no weights at nowhere.pt"),
                                         (["--img_size", 18], "not divisible by the patch size 4"), (["--blocks", 3], "--blocks"), (["--seed", -1], "--seed -1"),
                                         (["--seed", -1, "--labels", 2], "--seed -1"), (["--epochs", 3], "--epochs 3 is for --blocks"), (["--blocks", 2, "--epochs", 0], "--epochs 0"),
                                         (["--patch_size", 0], "--patch_size 0 must be more than 0"), (["--seed", 2 ** 63], "must be below 2^63"),
                                         (["--model", "resnet18", "--relative_positions", "--img_size", 32], "relative positions are a ViT's"),
                                         (["--model", "resnet18", "--pool", "cls", "--img_size", 32], "--pool cls is a ViT's"), (["--out", "/proc/x"], "--out /proc/x cannot be written to")])
def test_a_request_that_cannot_be_met_gets_one_line_and_exit_code_2(flags, says, of):
    code, _, complaint = of(probe, *flags)                      # the last --out counts
    assert code == 2 and says in complaint and len(complaint.strip().splitlines()) == 1


def test_several_processes_are_refused(of, monkeypatch):
    monkeypatch.setattr(pretrain, "set_up", lambda device: PLACE._replace(world=2))
    code, _, complaint = of(probe)
    assert code == 2 and "probe.py is one process, and torchrun started 2" in complaint


# ---------------------------------------------------------------------------------------------------
# tests/table1.py
# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", table1.DATA)
def test_the_table_is_made_of_commands_that_the_scripts_take(data):
    args = table1.options().parse_args(["--data", data, "--out", "x"])
    encoders = table1.encoders(args)
    assert encoders.count(("none", 2)) == encoders.count(("mask", 2)) == encoders.count(("zoom_in_mask", 2)) == 1
    assert {t for t, _ in encoders} == {*list(table1.degrade.TASKS)[:9], "none"} - ({"decolor"} if data == "fashion_mnist" else set())
    seeds, draws = set(), set()
    for task, seed in encoders:
        for folder, _, steps, draw, argv in table1.jobs(args, task, seed):
            module = dict(pretrain=pretrain, probe=probe, finetune=finetune)[argv[0].removesuffix(".py")]
            got = module.options().parse_args([*argv[1:], "--out", folder])
            assert vars(got).get("steps") == steps
            if module is pretrain:
                pretrain.resolve(got, PLACE, 60000, 1 if data == "fashion_mnist" else 3)       # nothing to refuse
            assert got.data == data and folder.startswith(f"{argv[0].removesuffix('.py')}-{task}-{seed}")
            if module is finetune:
                assert got.draw == draw
                seeds.add((task, got.seed)), draws.add((task, draw))
    assert len([s for t, s in seeds if t == "none"]) == 9       # nine random networks, none twice,
    assert {d for _, d in draws} == {0, 1, 2} and len(draws) == 3 * len({t for t, _ in draws})  # on the labels that all get


def test_the_table_by_hand():
    """Means, and deviations of the sample; places among BM's tasks by the accuracy with the most labels."""
    r = {"pretrain-mask-0": dict(images=128), "pretrain-mask-1": dict(images=128), "pretrain-a2mim-0": dict(images=64),
         "probe-mask-0": dict(knn=80.0, linear=70.0), "probe-mask-1": dict(knn=82.0, linear=70.0),
         "probe-none-0": dict(knn=60.0, linear=65.0), "probe-a2mim-0": dict(knn=61.0, linear=66.0)}
    for k, add in ((20, 0), (100, 10)):
        r |= {f"finetune-mask-{seed}-{k}-{draw}": dict(top1=70.0 + add + seed + draw) for seed in (0, 1) for draw in (0, 1)}
        r |= {f"finetune-none-0-{k}-{draw}": dict(top1=50.0 + add + draw) for draw in (0, 1)} | {f"finetune-a2mim-0-{k}-0": dict(top1=90.0)}
    lines = table1.table(r, "fashion_mnist").splitlines()
    assert lines[2:] == ["| `a2mim` | 1 | 64 | 61.0 | 66.0 | 90.0 (1 of 3) | 90.0 (1 of 3) |  | A2: 84.2 |",
                         "| `mask` | 2 | 128 | 81.0 ± 1.4 | 70.0 ± 0.0 | 71.0 ± 0.8 (4 of 6) | 81.0 ± 0.8 (4 of 6) | 1 | 1 (82.9) |",
                         "| none | 1 | 0 | 60.0 | 65.0 | 50.5 ± 0.7 (2 of 3) | 60.5 ± 0.7 (2 of 3) | 2 | 2 (80.7) |"]
    assert len({line.count("|") for line in lines}) == 1


def test_a_stopped_table_goes_on_from_what_it_found(tmp_path):
    """Parts that results.json holds are not run again; pre-training is, only where its weights are gone and needed."""
    args = table1.options().parse_args(["--out", str(tmp_path), "--tasks", "mask", "--seeds", "1"])
    everything = table1.jobs(args, "mask", 0)

    def still_open(known, off=0, **more):                       # when results.json holds these
        found = {}
        for job in known:
            steps = {"step" if job.draw is None else "total_steps": (job.steps or 0) + off}
            found[job.folder] = (steps if job.steps else dict(knn=1.0)) | (dict(draw=job.draw) | more if job.draw is not None else {})
        (tmp_path / "results.json").write_text(json.dumps(found))
        return table1.Work(args).todo
    assert still_open([]) == everything and still_open(everything) == []
    assert still_open(everything[:3]) == everything[:1] + everything[3:]
    assert still_open(everything, off=-9) == everything         # a trial's, with fewer steps: its probe is of another encoder
    assert still_open(everything, seed=7) == [] and still_open(everything, draw=1) == [everything[i] for i in (0, 2, 4)]


def test_the_table_tells_how_far_its_commands_are(tmp_path):
    """By their logs: half of a pre-training, and all of what is done."""
    args = table1.options().parse_args(["--out", str(tmp_path), "--tasks", "mask", "--seeds", "1"])
    (tmp_path / "pretrain-mask-0").mkdir()
    (tmp_path / "pretrain-mask-0/log.jsonl").write_text('{"step": 20}\n{"step": 2100}\n')
    work = table1.Work(args)
    first, second, *_ = work.todo
    assert work.bar.initial == work.behind(first) == first.seconds / 2 and work.behind(second) == 0
    work.running, work.done = {second: None}, {first.folder}
    work.show()
    assert work.bar.n == first.seconds and "probe-mask-0 0%" in str(work.bar)


def test_a_part_is_finished_when_its_checkpoint_is_the_last(tmp_path):
    """Not when its log is at the end and the save was not; and a measurement, while its encoder is the one that it was of."""
    config = dict(task="mask", batch_size=8, total_steps=30, hardware="h", commit="c")
    (tmp_path / "config.json").write_text(json.dumps(config)), torch.save({"step": 30}, tmp_path / "checkpoint.pt")
    (tmp_path / "log.jsonl").write_text('{"step": 20, "loss": 0.6}\n{"step": 30, "loss": 0.5}\n')
    assert table1.result(tmp_path) == dict(step=30, loss=0.5, images=240, hardware="h", commit="c")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/config.json").write_text(json.dumps(dict(weights=str(tmp_path), hardware="h", commit="c")))
    (tmp_path / "probe/result.json").write_text('{"knn": 50}')
    assert table1.result(tmp_path / "probe") == dict(knn=50, hardware="h", commit="c")
    torch.save({"step": 20}, tmp_path / "checkpoint.pt")
    os.utime(tmp_path / "checkpoint.pt", (2 ** 31, 2 ** 31))
    assert table1.result(tmp_path) is None and table1.result(tmp_path / "probe") is None


def test_a_command_of_the_table_that_fails_says_why(tmp_path):
    argv = ["--data", "fashion_mnist", "--root", str(tmp_path), "--tasks", "none", "--seeds", "1", "--share", "0.002"]
    with pytest.raises(SystemExit, match="probe-none-0 ended with code 2, and said last: probe.py: .* add --download"):
        table1.main([*argv, "--out", str(tmp_path / "table")])


@pytest.mark.slow
def test_a_table_is_made_with_real_runs(tmp_path, capfd):
    """Two thousandths of the work; the second call finds all of it done."""
    argv = ["--out", str(tmp_path), "--tasks", "mask", "none", "--seeds", "1", "--share", "0.002"]
    table1.main(argv)
    said = capfd.readouterr().out
    assert "9 commands to do" in said and len(json.loads((tmp_path / "results.json").read_text())) == 9
    assert "| `mask` | 1 | 1,024 |" in (tmp_path / "table.md").read_text()
    table1.main(argv)
    assert "0 commands to do" in capfd.readouterr().out
