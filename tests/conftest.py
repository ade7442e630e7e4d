"""What the tests share: the real scripts run small, in this process or in others, and a folder of images."""
import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402

TINY = ("--model vit_micro --img_size 16 --patch_size 4 --batch_size 8 --workers 0 --save_every 2 --log_every 1 "
        "--amp off --steps 6").split()


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities")
    config.addinivalue_line("markers", "slow: minutes long, left out of the README's test command")


@pytest.fixture(autouse=True)
def same_signals():
    """The trainer answers Ctrl-C itself; the test run should get its own answer back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    """Nothing waits for the disk: what a test kills has given its files to the system."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 pictures in nested folders, of two sizes."""
    from PIL import Image
    where = tmp_path_factory.mktemp("images")
    pictures = pretrain.shapes(24, size=40).images
    for i, picture in enumerate(pictures):
        (where / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((40, 40 + 8 * (i % 2))).save(where / f"class{i % 2}" / f"{i:02d}.png")
    return where


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """train/ and val/ with three classes that differ in brightness: 12 and 5 or 4 pictures of each, 13 in val."""
    from PIL import Image
    where = tmp_path_factory.mktemp("labelled")
    pixels = torch.rand(60, 20, 24, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    for i, picture in enumerate(pixels):
        label, split, of_class = i % 3, "train" if i < 36 else "val", f"class{i % 3}"
        if split == "val" and i >= 36 + 13:
            break
        (where / split / of_class).mkdir(parents=True, exist_ok=True)
        Image.fromarray(((picture + 0.4 * label) * 255).byte().numpy()).save(where / split / of_class / f"{i:02d}.png")
    return where


@pytest.fixture
def short_fits(monkeypatch):
    """Linear layers of a few steps, where it does not matter what they have learned."""
    monkeypatch.setattr(probe, "STEPS", 20)


@pytest.fixture
def of(labelled, tmp_path, capfd):
    """of(module, *options) -> (exit code, what was printed, what was complained about), of finetune or probe on `labelled`."""
    def go(module, *argv, out=None, data=None):
        tiny = "--model vit_micro --img_size 16 --patch_size 4 --workers 0 --amp off".split()
        tiny += "--batch_size 8 --save_every 3 --log_every 1 --steps 6".split() if module is finetune else []
        argv = [*tiny, "--data", str(data or labelled), "--out", str(out or tmp_path / "run"), *map(str, argv)]
        code = pretrain.command(module.run, module.options, argv)
        return code, *capfd.readouterr()
    return go


@pytest.fixture
def run(folder, tmp_path, capfd):
    """run(*options) -> (exit code, what was printed, what was complained about), of pretrain.py on the folder."""
    def go(*argv, out=None, data=None):
        argv = [*TINY, "--data", str(data or folder), "--out", str(out or tmp_path / "run"), *map(str, argv)]
        code = pretrain.command(pretrain.run, pretrain.options, argv)
        return code, *capfd.readouterr()
    return go


def script(*argv, processes=1, preamble="", **popen):
    """Start pretrain.py as a user would, by python or torchrun; `preamble` is Python that runs before it."""
    if preamble:
        start = ["-c", f"{preamble}\nimport sys, pretrain\nsys.exit(pretrain.command(pretrain.run, pretrain.options))"]
    elif processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "pretrain.py"]
    else:
        start = ["pretrain.py"]
    return subprocess.Popen([sys.executable, *start, *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **popen)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision"])


def forked(function, *args, processes=1):
    """function(*args) in processes of its own, forked from one that has imported torch, which takes seconds each time; more
    than one find each other as torchrun's do. -> (processes, the open file of what they say), for `ended`.
    """
    said, place = tempfile.NamedTemporaryFile("r"), {}
    if processes > 1:
        place = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [dict(place, RANK=rank, LOCAL_RANK=rank) if place else {} for rank in range(processes)]
    jobs = [FORKS.Process(target=_process, args=(function, args, rank, said.name), daemon=True) for rank in ranks]
    for job in jobs:
        job.start()
    return jobs, said


def _process(function, args, place, said):
    file = open(said, "a", buffering=1)
    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ.update({k: str(v) for k, v in place.items()})
    sys.exit(function(*args))


def ended(jobs, said):
    """(exit codes, what they said) of what `forked` started."""
    for job in jobs:
        job.join(200)
    return [job.exitcode for job in jobs], said.read()


def command(name, *argv, preamble=""):
    """The command of a script, for `forked`; `preamble` is Python that runs before it."""
    exec(preamble, {})
    sys.argv[0], module = f"{name}.py", importlib.import_module(name)
    return pretrain.command(module.run, module.options, list(map(str, argv)))


def together(name, *argv, processes=2, preamble=""):
    """The command of a script in forked processes, to its end -> (exit codes, what they said). torchrun itself starts README's
    commands, and those that are sent signals.
    """
    return ended(*forked(functools.partial(command, preamble=preamble), name, *argv, processes=processes))


def log_of(out):
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]


def losses_of(out):
    return {line["step"]: line["loss"] for line in log_of(out)}


def weights_of(out):
    return torch.load(os.path.join(out, "checkpoint.pt"), weights_only=True)["model"]


def gradients_of(out):
    """AdamW's running mean of the gradients, (parameters,): unlike the weights it shows a gradient's scale."""
    state = torch.load(os.path.join(out, "checkpoint.pt"), weights_only=True)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()])
