"""What the tests share: the real scripts run small, in this process or in others, and folders."""
import functools
import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Before torch is imported. Batches this small are slower in two threads, far slower beside other
# work.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import degrade
import finetune
import models
import pretrain
import probe

# What is the same at less cost, here and in forked processes.
degrade.sheet.__defaults__ = "", 16  # the pictures of a run are small
os.fsync = lambda _: None  # what a test kills has given its files to the system
pretrain.provenance = functools.cache(pretrain.provenance)  # git is asked once
probe.STEPS = 20  # linear layers need not have learned
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # a GPU's float32 is compared with a CPU's

NET = "--model vit_micro --img_size 16 --patch_size 4 --workers 0 --amp off".split()
RESNET = "--model resnet18 --img_size 32 --patch_size 8"
TINY = [*NET, *"--batch_size 8 --save_every 2 --log_every 1 --steps 6".split()]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long, left out of the README's test command")


SIGNALS = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def same_signals():
    """The trainer answers Ctrl-C itself; the test run gets its own answer back."""
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def little_disk(tmp_path):
    """A ResNet's checkpoint has 140 MB, and pytest keeps the folders of three runs."""
    yield
    for checkpoint in tmp_path.rglob("checkpoint.pt"):
        checkpoint.unlink()


@pytest.fixture(autouse=True)
def folders_anew():
    """A folder that a test changes is read again."""
    pretrain.image_files.cache_clear()


@pytest.fixture
def imagenet(monkeypatch):
    """Any folder has ImageNet's 1,281,167 images in 1,000 classes, where recipes ask for names."""
    names = np.resize(np.array([b"%03d/x.jpg" % i for i in range(1000)]), 1281167)
    monkeypatch.setattr(pretrain, "image_files", lambda *_, **__: (names, ""))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 pictures in nested folders, of two sizes."""
    where = tmp_path_factory.mktemp("images")
    for i, picture in enumerate(pretrain.Drawn(24, size=40)[torch.arange(24)]):
        (where / f"class{i % 2}").mkdir(exist_ok=True)
        picture = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((40, 40 + 8 * (i % 2)))
        picture.save(where / f"class{i % 2}" / f"{i:02d}.png")
    return where


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """train/ and val/ with three classes that differ in brightness: 12 pictures of each, and 13."""
    where = tmp_path_factory.mktemp("labelled")
    for i, pixels in enumerate(picture(49, 20, 24, 3) * 0.2):
        of_class = where / ("train" if i < 36 else "val") / f"class{i % 3}"
        of_class.mkdir(parents=True, exist_ok=True)
        pixels = ((pixels + 0.4 * (i % 3)) * 255).byte().numpy()
        Image.fromarray(pixels).save(of_class / f"{i:02d}.png")
    return where


@pytest.fixture
def data(labelled, tmp_path):
    """A copy of `labelled`."""
    return Path(shutil.copytree(labelled, tmp_path / "data"))


def spoil(image, copies=0):
    """The file of an image cannot be read. So many copies of what it was stand beside it."""
    for i in range(copies):
        shutil.copy(image, image.with_name(f"more{i}.png"))
    image.write_text("no picture")


@pytest.fixture
def of(folder, labelled, tmp_path, capfd):
    """of(module, *options) -> (exit code, what was printed, what was complained about), of
    pretrain on `folder`, of finetune or probe on `labelled`, of a dense head on `scenes`.
    """
    tiny = "--recipe deit --batch_size 8 --save_every 3 --log_every 1 --steps 6".split()
    usual = {pretrain: (TINY, folder), finetune: ([*NET, *tiny], labelled), probe: (NET, labelled)}

    def go(module, *argv, out=None, data=None):
        tiny, where = usual[module] if "--head" not in argv else ([], "scenes")
        argv = [*tiny, "--data", data or where, "--out", out or tmp_path / "run", *argv]
        return command(module, *argv), *capfd.readouterr()
    return go


@pytest.fixture
def run(of):
    return functools.partial(of, pretrain)


@pytest.fixture
def done(of, tmp_path):
    """done(name, options) -> the folder of that name, of a run that ends well."""
    def go(name, options="", *argv, module=pretrain, **more):
        code, _, complaint = of(module, *options.split(), *argv, out=tmp_path / name, **more)
        assert code == 0, complaint
        return tmp_path / name
    return go


@pytest.fixture
def refused(of):
    """refused(options) -> the one line of a run that ends with exit code `code`."""
    def go(options="", *argv, code=2, module=pretrain, **more):
        got, _, complaint = of(module, *options.split(), *argv, **more)
        assert got == code, complaint
        assert "Traceback" not in complaint
        *bar, line = complaint.strip().split("\n")
        assert code == 1 or all("step/s" in x or "skipped" in x for x in bar)
        return line
    return go


def stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture
def at(monkeypatch):
    """at(step, action): action(), once, just before that step of a trainer, counted from 0."""
    def when(step, action, real=pretrain.learning_rate):
        left = [action]

        def rate(now, *more):
            if now == step and left:
                left.pop()()
            return real(now, *more)
        for trainer in (pretrain, finetune):
            monkeypatch.setattr(trainer, "learning_rate", rate)
    return when


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name) -> (arguments, result) of each call of owner.name from now on, as a list."""
    def noted(owner, name):
        calls, real = [], getattr(owner, name)

        def function(*args, **more):
            calls.append((args, real(*args, **more)))
            return calls[-1][1]
        monkeypatch.setattr(owner, name, function)
        return calls
    return noted


def script(*argv, processes=1, preamble="", **popen):
    """Start pretrain.py as a user would, by python or torchrun; preamble: Python to run first."""
    start = ["pretrain.py"]
    if preamble:
        start = ["-c", f"{preamble}\nimport sys, pretrain\n"
                 "sys.exit(pretrain.command(pretrain.main))"]
    elif processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                 "pretrain.py"]
    return subprocess.Popen([sys.executable, *start, *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torchvision", "pytest", "probe"])


def together(name, *argv, processes=2, preamble="", code=0):
    """The command of a script in processes forked from one that has imported it, to its end. More
    than one find each other as torchrun's do. preamble: Python that runs first. -> what they said,
    each having ended with exit code `code`.
    """
    said, place = tempfile.NamedTemporaryFile("r"), {}
    if processes > 1:
        place = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=free_port())
    jobs = [FORKS.Process(target=_process, daemon=True, args=(
        name, argv, preamble, dict(place, RANK=rank, LOCAL_RANK=rank) if place else {}, said.name))
        for rank in range(processes)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(200)
    said = said.read()
    assert {job.exitcode for job in jobs} == {code}, said
    return said


def _process(name, argv, preamble, place, said):
    file = open(said, "a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    os.environ.update({k: str(v) for k, v in place.items()})
    exec(preamble, {})
    sys.argv[0], module = f"{name}.py", importlib.import_module(name)
    sys.exit(pretrain.command(module.main, list(map(str, argv))))


def command(module, *argv):
    """The exit code of a script's command in this process."""
    return pretrain.command(module.main, [*map(str, argv)])


log_of, checkpoint_of = pretrain.read_log, models.read_weights  # of a run's folder


def losses_of(out):
    return {line["step"]: line["loss"] for line in log_of(out) if "loss" in line}


def weights_of(out):
    return checkpoint_of(out)["model"]


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    return torch.allclose(a.float(), b.float(), atol=atol)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def json_of(out, name="result"):
    return json.loads(Path(out, f"{name}.json").read_text())


ONE = pretrain.Process(0, 1, torch.device("cpu"))


def loaded(data, split="train"):
    return pretrain.load_data(pretrain.options(["--data", str(data)]), ONE, split)


def views(labelled, size, crop=1.0):
    """The 13 images of `labelled`'s val as they are measured, and their classes."""
    val = pretrain.FolderSet(labelled / "val", labelled=True)
    return next(val.plain(torch.arange(13), 13, size, torch.device("cpu"), crop=crop))


def gradients_of(out):
    """AdamW's running mean of the gradients, (parameters,): it shows a gradient's scale."""
    state = checkpoint_of(out)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()])


# --- Of the two heads for dense predictions ---

DENSE = ("--model vit_micro --patch_size 8 --img_size 32 --batch_size 4 --workers 0 --amp off "
         "--steps 4 --save_every 2 --log_every 1").split()


@pytest.fixture
def few_scenes(monkeypatch):
    """Thirty of the built-in scenes to train on, five to measure, of 40 pixels."""
    Scenes = pretrain.Scenes
    monkeypatch.setattr(pretrain, "Scenes", lambda n, seed: Scenes(30 if n > 1000 else 5, 40, seed))


def small_run(out):
    """A run on the built-in pictures as the first command leaves one, two steps long."""
    assert command(pretrain, "--batch_size", 8, "--steps", 2, "--out", out) == 0
    return str(out)


def a_run_on_scenes(go, tmp_path, *names):
    """From a pre-trained run, with whose weights it begins: a measurement, a picture, and --eval
    finds the same.
    """
    out, weights = tmp_path / "run", small_run(tmp_path / "encoder")
    assert go("--weights", weights, "--patch_size", 4, "--out", out) == 0
    found = json_of(out)
    assert found["images"] == 5 and found["data"] == "scenes" and 0 <= found[names[0]] <= 100
    assert (out / "found.png").exists()
    assert [line["step"] for line in log_of(out) if names[0] in line] == [2, 4]
    argv = ["--eval", "--weights", out, "--amp", "off", "--out", tmp_path / "eval"]
    assert command(finetune, *argv) == 0
    again = json_of(tmp_path / "eval")
    assert [again[name] for name in names] == [found[name] for name in names]
    argv = ["--patch_size", 4, "--lr", 1e-9, "--steps", 1, "--out", tmp_path / "begun"]
    assert go("--weights", weights, *argv) == 0
    before = weights_of(weights)
    begun = {n.split("encoder.")[-1]: x for n, x in weights_of(argv[-1]).items() if "encoder." in n}
    assert begun and all(close(x, before[n], 1e-6) for n, x in begun.items())


def stopped_and_resumed(go, at, tmp_path, *argv):
    """go(*argv), left at once in the third step, and gone on with: it is one/ to the bit."""
    def leave():
        raise KeyboardInterrupt
    argv = [*argv, "--out", tmp_path / "parts"]
    at(2, leave)
    assert go(*argv) == 130
    assert go(*argv, "--resume") == 0
    assert equal(weights_of(tmp_path / "parts"), weights_of(tmp_path / "one"))


def commands_of_the_readme(go, head, data, tmp_path):
    """README's three of a head: of a run, of random weights, and on a folder."""
    weights, text = small_run(tmp_path / "run"), (ROOT / "README.md").read_text()
    commands = re.findall(rf"^(?:python|torchrun \S+) finetune.py (.*--head {head}.*)$", text, re.M)
    assert len(commands) == 3
    for i, command in enumerate(commands):
        command = re.sub(r"/path/to/\w+", str(data), re.sub(r"runs/\S+", weights, command))
        less = ["--patch_size", 4] if weights in command else []
        assert go(*shlex.split(command), *less, "--steps", 1, "--out", tmp_path / str(i)) == 0
        assert json_of(tmp_path / str(i))["images"] == 5
