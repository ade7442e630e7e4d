"""README is true: its commands run, its options exist, its table is degrade's, its expected lines are what is printed."""
import functools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torchvision

import analyze
import degrade
import finetune
import models
import pretrain
import probe
import table1
from conftest import ROOT, TINY, free_port, log_of

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SMALL = ["--model", "vit_micro", "--img_size", "16", "--patch_size", "4", "--batch_size", "8", "--steps", "2"]


def in_this_python(command):
    """A shell command as arguments, `torchrun` and `python` being this test's own, on a free port."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run", *([] if "--rdzv" in command else ["--standalone"])]
    return [sys.executable if w == "python" else w for w in words]


def of(text):
    return next(c for c in COMMANDS if text in c)


def test_the_first_command_installs_and_trains_and_says_what_the_readme_says(tmp_path):
    install, train = of("pip install").rsplit(" && ", 1)
    assert install == "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"
    less = ["--steps", "12", "--log_every", "4", "--batch_size", "64", "--out", str(tmp_path / "run")]
    done = subprocess.run([*in_this_python(train), *less], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    text = lambda text: re.sub(r"(commit|precision) [\w-]+", r"\1 #", text)
    def blank(said):                                            # without numbers and names of folders
        lines = [re.sub(r"[\d.,]+(e-\d+)?", "#", line.replace(str(tmp_path / "run"), "runs/x")) for line in text(said).strip().splitlines()]
        return [re.sub(r"runs/\S+?(?=/checkpoint|\n|$)", "OUT", line) for line in lines]
    expected = blank(next(text for kind, text in BLOCKS if kind == "text"))
    said = blank(done.stdout)
    assert said[:4] == expected[:4] and said[5] == expected[5]
    assert said[4].split()[0] == expected[4].split()[0] == "loss"
    assert log_of(tmp_path / "run")[-1]["loss"] < log_of(tmp_path / "run")[0]["loss"]


def here(command, *less):
    """Run the README's command in this process, without its launcher (test_pretrain and test_finetune start several) -> its exit code."""
    script, *argv = shlex.split(re.sub(r"^(python|torchrun( --\S+)*) ", "", command))
    module = dict(pretrain=pretrain, finetune=finetune, probe=probe, analyze=analyze)[script.removesuffix(".py")]
    return pretrain.command(module.run, module.options, [*argv, *map(str, less)])


def test_the_second_command_is_what_ci_runs():
    assert of("pytest").split(" && ")[1] in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("text", ["--nproc_per_node=8", "--data photos", "--model resnet50"])
def test_the_commands_for_a_folder(text, folder, tmp_path):
    small = SMALL if "resnet" not in text else ["--img_size", "32", "--patch_size", "8", "--batch_size", "8", "--steps", "2"]
    command = next(c for c in COMMANDS if text in c and "nnodes" not in c).replace("/path/to/imagenet", str(folder)).replace("--data photos", f"--data {folder}")
    assert here(command, *small, "--out", tmp_path / "run") == 0
    assert len(log_of(tmp_path / "run")) == 1


def test_the_command_for_two_machines(folder, tmp_path):
    """Two launchers of one process each meet at the rendezvous."""
    command = of("--nnodes=2").replace("/path/to/imagenet", str(folder)).replace("HOST:29400", f"127.0.0.1:{free_port()}").replace("=8", "=1")
    argv, pipe = [*in_this_python(command), *SMALL, "--out", str(tmp_path / "run")], subprocess.PIPE
    jobs = [subprocess.Popen(argv, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "4 images x 2 processes" in "".join(said) and len(log_of(tmp_path / "run")) == 1


def small_run(tmp_path, *flags):
    """A run on the built-in pictures, two steps long, as the README's first command leaves one."""
    argv = ["--batch_size", "8", "--steps", "2", "--out", str(tmp_path / "encoder"), *flags]
    assert pretrain.command(pretrain.run, pretrain.options, argv) == 0
    return str(tmp_path / "encoder")


@pytest.fixture
def few_shapes(monkeypatch, short_fits):
    """A hundredth of the built-in pictures, made once."""
    make = functools.lru_cache(pretrain.shapes)
    monkeypatch.setattr(pretrain, "shapes", lambda n, size=48, seed=0: make(max(n // 100, 20), size, seed))


def test_the_command_for_a_resnet_on_the_built_in_pictures(few_shapes, tmp_path, capsys):
    assert here(of("resnet18"), "--steps", 3, "--batch_size", 16, "--out", tmp_path / "run") == 0
    assert "mask token after stage 3 (add), loss l1" in capsys.readouterr().out


def test_the_commands_that_show_whether_it_pays(few_shapes, tmp_path, capsys):
    """Probe, fine-tune, and from random weights: each ends with its line of JSON."""
    commands = [c for c in COMMANDS if c.startswith(("python probe.py", "python finetune.py")) and "--eval" not in c]
    assert len(commands) == 4
    weights, results = small_run(tmp_path), []
    for i, command in enumerate(commands):
        less = [] if "probe" in command else ["--labels", 10, "--steps", 2]
        assert here(command.replace("runs/zoom_in_mask-vit_micro-shapes", weights), *less, "--out", tmp_path / str(i)) == 0
        results.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    assert results[2]["compared_with"]["knn"] == results[0]["knn"] and results[3]["compared_with"]["top1"] == results[1]["top1"]


def test_the_commands_of_the_figures(few_shapes, tmp_path):
    """On a small run, with fewer images: each leaves its numbers and its picture."""
    commands = [c for c in COMMANDS if c.startswith("python analyze.py")]
    assert [c.split()[2] for c in commands] == list(analyze.NAMES)
    weights = small_run(tmp_path)
    for command in commands:
        name = command.split()[2]
        few = dict(curves=[], occlusion=["--images", 8, "--repeats", 1], interaction=["--images", 1, "--pairs", 2, "--contexts", 2])
        less = few.get(name, ["--images", 20])
        assert here(command.replace("runs/zoom_in_mask-vit_micro-shapes", weights), *less, "--out", tmp_path / "out") == 0
        assert (tmp_path / "out" / f"{name}.json").exists()
        assert (tmp_path / "out" / f"{name}.png").exists() or name != "reconstruct"            # curves want matplotlib


def test_the_commands_that_fine_tune_on_a_folder(labelled, tmp_path, run):
    commands = [c for c in COMMANDS if "finetune.py" in c and "torchrun" in c]
    assert len(commands) == 2
    for i, (command, model, size) in enumerate(zip(commands, ("vit_micro", "resnet18"), (16, 32))):
        assert run("--model", model, "--img_size", size, "--patch_size", 4, "--steps", 1, "--task", "mask", data=labelled, out=tmp_path / model)[0] == 0
        command = re.sub(r"runs/\S+", str(tmp_path / model), command).replace("/path/to/imagenet", str(labelled))
        assert here(command, "--batch_size", 8, "--steps", 1, "--img_size", size, *(["--test_size", 64] if i else []), "--out", tmp_path / f"fine{i}") == 0
        assert json.loads((tmp_path / f"fine{i}/result.json").read_text())["images"] == 13


def test_the_command_that_measures_torchvisions_weights(labelled, tmp_path):
    """Their class scores on these pictures, measured by us, are torchvision's own."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    command = of("--eval").replace("resnet50.pth", str(tmp_path / "resnet50.pth")).replace("/path/to/imagenet", str(labelled))
    assert here(command, "--amp", "off", "--out", tmp_path / "eval") == 0
    val = pretrain.FolderSet(str(labelled / "val"), labelled=True)
    views, labels, _ = next(val.plain(torch.arange(13), 13, (224, 224), 0.875))
    with torch.no_grad():
        right = (theirs(torchvision.transforms.functional.normalize(views, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).argmax(1) == labels).sum()
    assert json.loads((tmp_path / "eval/result.json").read_text())["top1"] == round(100 * int(right) / 13, 2)


def test_the_tables_are_what_the_runs_found():
    """README's tables are table1.py's, made from the results that lie beside the figures."""
    results = sorted((ROOT / ".github/results").glob("table1-*.json"))
    assert results and "python tests/table1.py" in COMMANDS
    for file in results:
        assert table1.table(json.loads(file.read_text()), file.stem.removeprefix("table1-")) in README, file


def test_the_export_command(tmp_path, run):
    assert run("--steps", 2)[0] == 0
    command = of("--export").replace("runs/zoom_in_mask-vit_micro-shapes", str(tmp_path / "run")).replace("vit.pth", str(tmp_path / "vit.pth"))
    models.main(shlex.split(command)[2:])
    assert (tmp_path / "vit.pth").exists()


def test_every_option_named_is_an_option_and_every_setting_is_named():
    analyses = analyze.options()._subparsers._group_actions[0].choices.values()
    parsers = (*analyses, *(of.options() for of in (pretrain, finetune, probe, table1)))
    torchruns = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    known = set().union(*(p._option_string_actions for p in parsers)) | torchruns | {"--export", "--strength"}
    named = set(re.findall(r"(?<![\w-])--[a-z_]+", README))
    assert named <= known, named - known
    assert {"--" + k for task in list(degrade.TASKS)[:9] for k in degrade.task_settings(task)} <= named


def test_the_table_of_tasks_is_degrades():
    """In its order; a task that a reader adds comes after."""
    rows = re.findall(r"^\| `(\w+)` ?(?:\([a-z()+]+\))? \|", README.split("## The tasks")[1].split("\n## ")[0], re.M)
    assert len(rows) == 9 and rows == list(degrade.TASKS)[:9]


def test_the_examples_of_settings_run(run, tmp_path):
    examples = re.findall(r"`(--task [^`]+)`", README)
    assert len(examples) >= 4
    for i, example in enumerate(examples):
        words = [str(int(w) * 16 // 224 // 2 * 2) if w in ("320", "288") else w for w in example.split()]
        code, _, complaint = run(*words, "--steps", 1, out=tmp_path / str(i))
        assert code == 0, complaint


def test_the_task_added_in_the_readme_trains(folder, tmp_path):
    """The README's ten lines, appended to a copy of degrade.py, and its command."""
    for name in ("pretrain.py", "losses.py", "models.py", "degrade.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    added = next(text for kind, text in BLOCKS if kind == "python")
    text = (ROOT / "degrade.py").read_text()
    (tmp_path / "degrade.py").write_text(text.replace("def number_or_rand", added + "\n\ndef number_or_rand"))
    command = next(c for c in re.findall(r"`(python pretrain.py [^`]+)`", README) if "negative" in c)
    done = subprocess.run([*in_this_python(command), *TINY, "--data", str(folder), "--out", str(tmp_path / "run")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "strength 0.5" in done.stdout, done.stderr


def test_pictures_are_there_and_files_are_mapped():
    for path in re.findall(r"\]\((\.github/[^)]+)\)", README):
        assert os.path.getsize(ROOT / path) > 1000
    files = {f for f in os.listdir(ROOT) if f.endswith(".py")}
    assert all(f"| `{f}` |" in README for f in files)


@pytest.mark.slow
def test_the_first_command_to_its_end(tmp_path):
    """What the README promises: a loss that falls to less than half, and the picture; within the hour on any two cores."""
    train = of("pip install").rsplit(" && ", 1)[1]
    done = subprocess.run([*in_this_python(train), "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and (tmp_path / "run/recovered_0001758.png").exists()
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < 0.25 < 0.5 < log[0]["loss"]
