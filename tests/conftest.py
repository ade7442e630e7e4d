"""What the tests share: the real scripts run small, in this process or in others, and folders."""
import functools
import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402

NET = "--model vit_micro --img_size 16 --patch_size 4 --workers 0 --amp off".split()
TINY = [*NET, *"--batch_size 8 --save_every 2 --log_every 1 --steps 6".split()]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long, left out of the README's test command")


@pytest.fixture(autouse=True)
def same_signals():
    """The trainer answers Ctrl-C itself; the test run gets its own answer back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    """Nothing waits for the disk: what a test kills has given its files to the system."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Batches this small are slower in two, and far slower beside other work."""
    monkeypatch.setattr(pretrain, "cores", lambda: 1)


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
    pixels = torch.rand(49, 20, 24, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    for i, picture in enumerate(pixels):
        of_class = where / ("train" if i < 36 else "val") / f"class{i % 3}"
        of_class.mkdir(parents=True, exist_ok=True)
        picture = ((picture + 0.4 * (i % 3)) * 255).byte().numpy()
        Image.fromarray(picture).save(of_class / f"{i:02d}.png")
    return where


@pytest.fixture
def short_fits(monkeypatch):
    """Linear layers of a few steps, where it does not matter what they have learned."""
    monkeypatch.setattr(probe, "STEPS", 20)


@pytest.fixture
def run(folder, tmp_path, capfd):
    """run(*options) -> (exit code, what was printed, what was complained about), of pretrain.py on
    the folder.
    """
    def go(*argv, out=None, data=None):
        where = ["--data", data or folder, "--out", out or tmp_path / "run"]
        code = pretrain.command(pretrain.main, [str(x) for x in (*TINY, *where, *argv)])
        return code, *capfd.readouterr()
    return go


@pytest.fixture
def of(labelled, tmp_path, capfd):
    """of(module, *options), as `run`, of finetune or probe on `labelled`."""
    def go(module, *argv, out=None, data=None):
        tiny = "--recipe deit --batch_size 8 --save_every 3 --log_every 1 --steps 6".split()
        where = ["--data", data or labelled, "--out", out or tmp_path / "run"]
        argv = [*NET, *(tiny if module is finetune else []), *where, *argv]
        code = pretrain.command(module.main, [str(x) for x in argv])
        return code, *capfd.readouterr()
    return go


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
FORKS.set_forkserver_preload(["torch", "torchvision"])


def forked(function, *args, processes=1):
    """function(*args) in processes of its own, forked from one that has imported torch. More than
    one find each other as torchrun's do. -> (processes, the open file of what they say).
    """
    said, place = tempfile.NamedTemporaryFile("r"), {}
    if processes > 1:
        place = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=free_port())
    jobs = [FORKS.Process(target=_process, daemon=True, args=(
        function, args, dict(place, RANK=rank, LOCAL_RANK=rank) if place else {}, said.name))
        for rank in range(processes)]
    for job in jobs:
        job.start()
    return jobs, said


def _process(function, args, place, said):
    file = open(said, "a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    os.environ.update({k: str(v) for k, v in place.items()})
    pretrain.cores = lambda: 1
    sys.exit(function(*args))


def ended(jobs, said):
    """(exit codes, what they said) of what `forked` started."""
    for job in jobs:
        job.join(200)
    return [job.exitcode for job in jobs], said.read()


def command(name, *argv, preamble=""):
    """The command of a script, for `forked`; preamble: Python that runs first."""
    exec(preamble, {})
    sys.argv[0], module = f"{name}.py", importlib.import_module(name)
    return pretrain.command(module.main, list(map(str, argv)))


def together(name, *argv, processes=2, preamble=""):
    """The command of a script in forked processes, to its end -> (exit codes, what they said)."""
    return ended(*forked(functools.partial(command, preamble=preamble), name, *argv,
                         processes=processes))


def log_of(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def losses_of(out):
    return {line["step"]: line["loss"] for line in log_of(out) if "loss" in line}


def checkpoint_of(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def weights_of(out):
    return checkpoint_of(out)["model"]


def gradients_of(out):
    """AdamW's running mean of the gradients, (parameters,): it shows a gradient's scale."""
    state = checkpoint_of(out)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()])


# --- Of the two heads for dense predictions ---

def small_encoder(out):
    """A run of one step, to fine-tune."""
    argv = "--task mask --model vit_micro --batch_size 4 --steps 1 --amp off --out".split()
    assert pretrain.command(pretrain.main, [*argv, str(out)]) == 0
    return out


def result_of(out):
    return json.loads(Path(out, "result.json").read_text())


def stopped_and_resumed(go, monkeypatch, *argv):
    """go(*argv), left by Ctrl-C in the third step, and gone on with."""
    real, calls = finetune.learning_rate, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "learning_rate", stopped)
        assert go(*argv) == 130
    assert go(*argv, "--resume") == 0


def commands_of_the_readme(go, head, data, tmp_path):
    """README's three of a head: of a run, of random weights, and on a folder."""
    weights, text = small_encoder(tmp_path / "run"), (ROOT / "README.md").read_text()
    commands = re.findall(rf"^(?:python|torchrun \S+) finetune.py (.*--head {head}.*)$", text, re.M)
    assert len(commands) == 3
    for i, command in enumerate(commands):
        command = re.sub(r"/path/to/\w+", str(data), re.sub(r"runs/\S+", str(weights), command))
        less = ["--patch_size", 4] if str(weights) in command else []
        assert go(*shlex.split(command), *less, "--steps", 1, "--out", tmp_path / str(i)) == 0
        assert result_of(tmp_path / str(i))["images"] == 5
