"""README is true: its commands run, its options exist, its tables are the code's."""
import inspect
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
import claims
import degrade
import finetune
import models
import pretrain
import probe
from conftest import ROOT, TINY, free_port, json_of, log_of, small_run, views

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
FIRST_RUN = "runs/zoom_in_mask-vit_micro-shapes"
TINY_VIT = "--model vit_micro --img_size 16 --patch_size 4 --batch_size 8 --steps 2".split()
TINY_RESNET = "--img_size 32 --patch_size 8 --batch_size 8 --steps 2".split()


def the(text):
    """The first command that contains `text`."""
    return next(c for c in COMMANDS if text in c)


def in_this_python(command):
    """A shell command as arguments, `torchrun` and `python` being this test's own."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        alone = [] if "--rdzv" in command else ["--standalone"]
        words[:1] = [sys.executable, "-m", "torch.distributed.run", *alone]
    return [sys.executable if w == "python" else w for w in words]


def here(command, *more):
    """A command, without its launcher, in this process. It ends well."""
    script, *argv = shlex.split(re.sub(r"^(python|torchrun( --\S+)*) ", "", command))
    module = dict(pretrain=pretrain, finetune=finetune, probe=probe, analyze=analyze)
    main = module[script.removesuffix(".py")].main
    assert pretrain.command(main, [*argv, *map(str, more)]) == 0


@pytest.fixture
def few_shapes(monkeypatch):
    """A hundredth of the built-in pictures."""
    Drawn = pretrain.Drawn
    monkeypatch.setattr(pretrain, "Drawn", lambda n, seed: Drawn(n // 100, 48, seed))


def test_the_first_command_installs_and_trains(tmp_path):
    """Two processes start, say what they do, and the loss falls."""
    install, train = the("pip install").rsplit(" && ", 1)
    assert install == ("python3 -m venv .venv && . .venv/bin/activate && "
                       "pip install -r requirements.txt")
    less = ["--steps", "12", "--log_every", "4", "--batch_size", "64", "--out", tmp_path / "run"]
    done = subprocess.run([*in_this_python(train), *map(str, less)], cwd=ROOT, text=True,
                          capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "64 images = 32 x 2 processes x 1" in done.stdout and "recipe BM" in done.stdout
    assert done.stdout.strip().endswith(f"done: {tmp_path / 'run'}")
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"checkpoint.pt", "log.jsonl", "config.json"} < set(os.listdir(tmp_path / "run"))


def test_the_second_command_is_what_ci_runs():
    assert the("pytest").split(" && ")[1] in (ROOT / ".ci/run").read_text().splitlines()


def test_the_four_lines_are_mains():
    """The calls that README shows stand in the loop of main() in that order."""
    source = inspect.getsource(pretrain.main)
    lines = next(text for kind, text in BLOCKS if kind == "text" and "degrade(" in text)
    calls = [re.search(r"= ([\w.]+\()", line)[1] for line in lines.splitlines()]
    assert calls == ["next(", "degrade.degrade(", "net(", "loss_function("]
    places = [source.index(call) for call in calls]
    assert places == sorted(places)


@pytest.mark.parametrize("text", ["--nproc_per_node=8", "--data photos", "--model resnet50"])
def test_the_commands_for_a_folder(text, folder, tmp_path):
    command = re.sub(r"/path/to/imagenet|\bphotos\b", str(folder), the(text))
    small = TINY_RESNET if "resnet" in text else TINY_VIT
    here(command, *small, "--out", tmp_path / "run")
    assert len(log_of(tmp_path / "run")) == 1


@pytest.mark.slow
def test_the_command_for_two_machines(folder, tmp_path):
    """Two launchers of one process each meet at the rendezvous."""
    command = the("--nnodes=2").replace("/path/to/imagenet", str(folder)).replace("=8", "=1")
    command = command.replace("HOST:29400", f"127.0.0.1:{free_port()}")
    argv = [*in_this_python(command), *TINY_VIT, "--out", str(tmp_path / "run")]
    jobs = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True) for _ in range(2)]
    said = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "4 x 2 processes" in "".join(said) and len(log_of(tmp_path / "run")) == 1


def test_the_command_for_a_resnet(few_shapes, tmp_path, capsys):
    here(the("--model resnet18"), "--steps", 2, "--batch_size", 8, "--out", tmp_path)
    assert "token_at 3, token_how add" in " ".join(capsys.readouterr().out.split())


def test_the_commands_that_show_whether_it_pays(few_shapes, tmp_path, capsys):
    """Probe and fine-tune, from random weights and from the run: each ends with a line of JSON."""
    commands = [c for c in COMMANDS if re.match(r"python (probe|finetune).py", c)
                and not re.search("--eval|photos|--head", c)]
    assert len(commands) == 4
    weights = small_run(tmp_path / "encoder")
    for i, command in enumerate(commands):
        less = [] if "probe" in command else ["--labels", 10, "--steps", 2]
        command = command.replace(FIRST_RUN, weights)
        here(command, *less, "--out", tmp_path / str(i))
        result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert "knn" in result or "top1" in result


def test_the_commands_of_the_figures(few_shapes, tmp_path):
    """On small runs, with fewer images: each leaves its numbers."""
    commands = [c for c in COMMANDS if c.startswith("python analyze.py")]
    assert [c.split()[2] for c in commands] == list(analyze.NAMES)
    weights = small_run(tmp_path / "encoder")
    tuned = {name: tmp_path / name for name in ("zoom_in_mask", "none")}
    for name, out in tuned.items():
        begin = "none" if name == "none" else weights
        here("python finetune.py --labels 10 --steps 2 --weights", begin, "--out", out)
    few = dict(curves=[], occlusion=["--images", 8, "--repeats", 1],
               interaction=["--images", 1, "--pairs", 2, "--contexts", 2])
    for command in commands:
        name = command.split()[2]
        less = few.get(name, ["--images", 20])
        command = re.sub(r"runs/finetune-(zoom_in_mask|none)-\S+", lambda m: str(tuned[m[1]]),
                         command).replace(FIRST_RUN, weights)
        here(command, *less, "--out", tmp_path / "out")
        assert (tmp_path / "out" / f"{name}.json").exists()


def test_the_commands_for_images_of_ones_own(labelled, tmp_path, done):
    """Two measure the run that the first leaves, by its own configuration, two random weights."""
    own = done("own", "--task mask --steps 1", data=labelled)
    texts = [f"{script}.py --weights {of}" for script in ("probe", "finetune")
             for of in ("runs/mask", "none --data photos")]
    for i, text in enumerate(texts):
        less = ["--labels", 2, "--steps", 2] if "finetune" in text else []
        command = re.sub(r"runs/\S+", str(own), the(text))
        command = command.replace("photos", str(labelled))
        here(command, *less, "--out", tmp_path / str(i))
        assert json_of(tmp_path / str(i))["images"] == 13


def test_the_commands_that_fine_tune_on_a_folder(labelled, tmp_path, done):
    commands = [c for c in COMMANDS if "finetune.py" in c and "torchrun" in c and "--head" not in c]
    assert len(commands) == 2
    for command, model, more in ((commands[0], "vit_micro", []),
                                 (commands[1], "resnet18", ["--test_size", 64])):
        size = 32 if more else 16
        flags = f"--model {model} --img_size {size} --steps 1 --task mask"
        run = done(model, flags, data=labelled)
        command = re.sub(r"runs/\S+", str(run), command)
        command = command.replace("/path/to/imagenet", str(labelled))
        more = [*more, "--batch_size", 8, "--steps", 1, "--img_size", size]
        here(command, *more, "--out", tmp_path / f"fine-{model}")
        assert json_of(tmp_path / f"fine-{model}")["images"] == 13


@pytest.mark.slow
def test_the_command_that_measures_torchvisions_weights(labelled, tmp_path):
    """Their class scores on these pictures, measured by us, are torchvision's own."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    command = the("--eval").replace("resnet50.pth", str(tmp_path / "resnet50.pth"))
    command = command.replace("/path/to/imagenet", str(labelled))
    here(command, "--amp", "off", "--out", tmp_path / "eval")
    view, labels = views(labelled, (224, 224), crop=0.875)
    normal = torchvision.transforms.functional.normalize(
        view, models.IMAGENET_MEAN, models.IMAGENET_STD)
    with torch.no_grad():
        right = (theirs(normal).argmax(1) == labels).sum()
    assert json_of(tmp_path / "eval")["top1"] == round(100 * int(right) / 13, 2)


def test_the_tables_of_results_are_what_the_runs_found():
    folder = ROOT / ".github/results"
    page = (folder / "README.md").read_text()
    results = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    assert results.keys() == claims.SETS.keys()
    tried = claims.claims_table({name: results[name] for name in claims.SETS})
    rows = tried.splitlines()
    assert tried in page and "\n".join(rows[:10]) in README  # its head
    less = {folder: r for folder, r in results["shapes"].items() if "-blur-" not in folder}
    less = claims.claims_table(dict(shapes=less))  # no row of which an arm has not been run
    assert "masking and zooming in together beat masking" in less and "every task" not in less
    hold, part, no, cannot, few = (
        sum(f"**{word}" in row for row in rows)
        for word in ("holds", "in part", "does not", "cannot", "too few"))
    of = sum(len(claim.sets.split()) for claim in claims.CLAIMS)
    assert f"tries {len(claims.CLAIMS)} claims" in README
    assert len(rows) - 2 == of  # all have been run
    assert not few
    assert (f"Of their {of} rows {hold} hold, {part} hold in part, {no} do not, and {cannot} "
            "cannot be told.") in " ".join(README.split())
    for data, found in results.items():
        assert claims.table(found, data) in page, data
        if any(claims.HEADS.keys() & result.keys() for result in found.values()):
            assert claims.dense_table(found, data) in page, data


def test_a_claims_number_goes_with_its_run(tmp_path):
    """That of a run which is not there is dropped. What is not asked for stays."""
    file = tmp_path / "shapes/results.json"
    file.parent.mkdir()
    file.write_text('{"pretrain-mask-0": {"loss": 1}, "pretrain-blur-0": {"loss": 2}}')
    args = claims.options(["--out", str(tmp_path), "--data", "shapes", "--only", "integrated"])
    todo = {e: claims.jobs(args, *e) for e in claims.encoders(args)}
    assert claims.Work(args, todo).results["shapes"] == {"pretrain-blur-0": {"loss": 2}}


def test_the_export_command_and_the_encoder_in_three_lines(tmp_path):
    """On a run of the first command's kind; the features of both are the same."""
    weights = small_run(tmp_path / "run")
    command = the("--export").replace(FIRST_RUN, weights)
    models.main(shlex.split(command.replace("vit.pth", str(tmp_path / "vit.pth")))[2:])
    photo_file = tmp_path / "photo.jpg"
    torchvision.transforms.functional.to_pil_image(torch.rand(3, 40, 60)).save(photo_file)
    lines, names = next(text for text in PYTHON if "load_encoder" in text), {}
    exec(lines.replace(FIRST_RUN, weights).replace("photo.jpg", str(photo_file)), names)
    exported = models.load_encoder(tmp_path / "vit.pth", model="vit_micro", img_size=32,
                                   patch_size=4, pool="mean")
    photo = degrade.scaled(names["photo"], (32, 32)).clamp(0, 1)
    assert names["features"].shape == (1, 128)
    assert torch.equal(names["features"], exported(photo))


def test_every_option_named_is_an_option_and_every_setting_is_named(monkeypatch):
    known = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--export",
             "--strength"}
    add = pretrain.Parser.add_argument
    monkeypatch.setattr(pretrain.Parser, "add_argument",
                        lambda p, *names, **more: known.update(names) or add(p, *names, **more))
    settings = {f"--{name}" for task in degrade.TASKS for name in degrade.task_settings(task)}
    pretrain.options([])
    for head in finetune.LOSSES:
        finetune.options(["--head", head])
    probe.options([])
    analyze.options(["curves", "x"])
    claims.options([])
    named = set(re.findall(r"(?<![\w-])--[a-z_]+", README))
    assert named <= known | settings, named - known - settings
    assert settings <= named, settings - named


def test_the_table_of_tasks_is_degrades():
    """Each task has a row, in their order; one that a reader adds may come anywhere."""
    text = README.split("## The tasks")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` ?(?:\([a-z()+]+\))? \|", text, re.M)
    assert rows == [task for task in degrade.TASKS if task in rows] and len(rows) == 9


def test_the_examples_of_settings_run(done):
    examples = [" ".join(e.split()) for e in re.findall(r"`(--task [^`]+)`", README)]
    assert len(examples) >= 9
    for i, example in enumerate(examples):
        example = example.replace("320", "22").replace("288", "20")  # of pictures of 16 pixels
        done(str(i), f"{example} --steps 1")


def test_the_task_added_in_the_readme_trains(folder, tmp_path, monkeypatch, capsys):
    """README's lines in degrade.py, and its command."""
    monkeypatch.setattr(degrade, "TASKS", dict(degrade.TASKS))
    exec(next(text for text in PYTHON if "TASKS[" in text), vars(degrade))
    command = re.search(r"`(python pretrain.py --task negative[^`]*)`", README)[1]
    here(command, *TINY, "--data", folder, "--out", tmp_path / "run")
    assert "strength 0.5" in " ".join(capsys.readouterr().out.split())
    assert len(log_of(tmp_path / "run")) == 6


def test_pictures_are_there_and_files_have_their_sizes():
    for path in re.findall(r"\]\((\.github/[^)#]+)[)#]", README):
        assert os.path.getsize(ROOT / path) > 1000
    for file in ROOT.glob("*.py"):
        stated = int(re.search(rf"\| `{file.name}` \| (\d+) \|", README)[1])
        assert abs(file.stat().st_size / 1000 - stated) < 1, file.name


@pytest.mark.slow
def test_the_first_command_to_its_end(tmp_path):
    """What README promises: the loss, and the picture; within the hour on any two cores."""
    train = the("pip install").rsplit(" && ", 1)[1]
    done = subprocess.run([*in_this_python(train), "--out", str(tmp_path)], cwd=ROOT, text=True,
                          capture_output=True, timeout=3600)
    assert done.returncode == 0 and (tmp_path / "recovered_0001758.png").exists()
    log = log_of(tmp_path)
    assert log[0]["loss"] > 0.5 and log[-1]["loss"] < 0.23
