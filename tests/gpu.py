"""The CUDA path, once, for real: about twelve minutes on one GPU, half of them `runs`.

    python tests/gpu.py                          all parts
    python tests/gpu.py same curves              only these, of: same curves nccl kill runs scripts
    python tests/gpu.py --device cpu             with small numbers, to try this script

A line a figure, with what is wanted of it; the last line is JSON. Exit code 1 where something
differs from what is wanted. pytest does not collect it. tests/bench.py measures the speed.
"""
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median

import bench  # it finds the others
import claims
import torch

import degrade
import models
import pretrain

p = pretrain.Parser(description=__doc__.split("\n")[0])
p.add_argument("parts", nargs="*", help="default: all")
p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
asked = p.parse_args()
device, figures, wrong = torch.device(asked.device), {}, []
BIG = asked.device == "cuda"
SMALL = ("--img_size 32 --patch_size 4 --batch_size 8 --steps 6 --workers 1 --log_every 1 "
         f"--device {asked.device}").split()
temporary = tempfile.TemporaryDirectory()  # until the end
folder = Path(temporary.name)


def report(name, value, right=True, wanted=""):
    figures[name] = value
    print(f"{name:64} {value} {wanted}{'' if right else '   <-- WRONG'}", flush=True)
    if not right:
        wrong.append(name)


def furthest(ours, theirs):
    """The largest relative difference of two lists of numbers; nan if one is."""
    return torch.tensor([abs(a / b - 1) for a, b in zip(ours, theirs)]).max().item()


def losses_of(lines):
    return [line["loss"] for line in lines]


def command(name, script, *argv, processes=0):
    """Run a script in a folder of its own -> that folder and the lines of its log. processes: by
    torchrun, 0: by python.
    """
    out, start = folder / name.replace(" ", "_"), time.perf_counter()
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    launcher = torchrun.split() if processes else []
    argv = [sys.executable, *launcher, f"{script}.py", *map(str, argv), "--out", out]
    done = subprocess.run(argv, cwd=claims.ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    last = [line for line in said if "Error" in line][:1] or said[-1:]
    report(f"{name}: seconds", round(time.perf_counter() - start, 1), not done.returncode,
           f"exit code {done.returncode}: {last}" if done.returncode else "")
    return out, [line for line in pretrain.read_log(out) if "loss" in line]


def photos():
    """A labelled folder of JPEGs, made once: DIR/{train,val}/<class>/."""
    where = folder / "photos"
    if not where.exists():
        for i in range(1200 if BIG else 24):
            to = where / ("val" if i % 6 == 0 else "train") / f"class{i % 4}"
            to.mkdir(parents=True, exist_ok=True)
            bench.photo(to / f"{i}.jpg", 256, 320)
    return where


def same():
    """What each task does, each network's loss and gradient, beside the CPU's, all in float32."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    for task in degrade.TASKS:
        for name in ("vit_micro", "resnet18"):
            args = pretrain.options(f"--task {task} --model {name} --img_size 64 --patch_size 8 "
                                    "--batch_size 4".split())
            pretrain.settle(args, bench.process, bench.DATA)
            view, found = torch.rand(4, 3, *args.view, generator=pretrain.seeded(0)), []
            for where in (torch.device("cpu"), device):
                torch.manual_seed(0)
                model = models.to_device(models.recovery_model(
                    name, 64, 8, 3, args.token_at, args.token_how, args.decoder), where)
                d = degrade.degrade(view.to(where), task, args.img_size, 8, pretrain.seeded(1),
                                    **args.settings)
                prediction = model(d.inputs, d.hidden)
                loss = pretrain.loss_of(model, prediction, d, args)
                loss.backward()
                found.append((d.inputs.cpu(), loss.item(), pretrain.clipped_norm(model, 0).item()))
            (x, *a), (y, *b) = found
            apart = (x - y).abs().max().item()
            report(f"{task}: largest difference of a pixel", apart, apart < 1e-4, "below 1e-4")
            apart = furthest(a, b)
            report(f"{task}, {name}: loss, gradient, relative", apart, apart < 1e-3, "below 1e-3")


def curves():
    """The first 20 losses beside the CPU's, for the same seed, in bf16, and those of --compile."""
    for task, model in (("zoom_in_mask", "vit_micro"), ("a2mim", "resnet18")):
        found = []
        for where, more in (("cpu", ()), (asked.device, ()), (asked.device, ("--compile",))):
            argv = [*SMALL, "--task", task, "--model", model, "--steps", 20, "--amp", "bf16"]
            argv += ["--batch_size", 64, "--device", where, *more]
            _, lines = command(f"curve {task} {where} {len(found)}", "pretrain", *argv)
            found.append(losses_of(lines))
        for name, losses in zip(("here", "compiled"), found[1:]):
            apart = furthest(found[0], losses)
            report(f"{task}, {model}, {name}: 20 losses beside the CPU's, relative", apart,
                   apart < 1e-2, "below 1e-2")


NCCL = f"""
import sys
import torch.distributed as dist
sys.path.insert(0, {str(claims.ROOT)!r})
import pretrain

class Several(int):  # 1, and yet more than 1
    __gt__ = lambda *_: True
    __eq__ = lambda *_: False

def joined(device, alone=pretrain.set_up):
    process = alone(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return process._replace(world=Several(1))

pretrain.set_up = joined
dist.get_world_size = lambda *_: Several(1)
sys.exit(pretrain.command(pretrain.main))
"""


def nccl():
    """One process that takes the ways of several, since NCCL wants a GPU for each: its group,
    DistributedDataParallel, sums over processes, the batch norm of all; beside a run of one.
    """
    script = folder / "nccl.py"
    script.write_text(NCCL)
    for task, model in (("zoom_in_mask", "vit_micro"), ("a2mim", "resnet18")):
        argv = [*SMALL, "--task", task, "--model", model, "--steps", 20, "--batch_size", 64,
                "--accum", 2]
        alone = command(f"alone {task}", "pretrain", *argv)[1]
        joined = command(f"NCCL {task}", script.with_suffix(""), *argv, processes=1)[1]
        apart = furthest(losses_of(alone), losses_of(joined))
        report(f"{task}, {model}, as one of several: 20 losses, relative", apart,
               len(joined) == 20 and apart < 1e-2, "below 1e-2")


def runs():
    """200 steps of each paper, from JPEGs and from memory, in both precisions, compiled."""
    for task, model in (("zoom_in_mask", "vit_base"), ("a2mim", "resnet50")):
        for data, amp, more in ((photos(), "bf16", ""), (photos(), "bf16", "--compile"),
                                ("shapes", "bf16", ""), ("shapes", "fp16", ""),
                                ("shapes", "bf16", "--compile")):
            argv = f"--task {task} --data {data} --amp {amp} {more} --device {asked.device}".split()
            argv += SMALL if not BIG else f"--model {model} --batch_size 128 --img_size 224 " \
                "--patch_size 16 --steps 200 --log_every 20".split()
            if not BIG:
                argv += ["--amp", "bf16", "--model", "vit_micro" if "vit" in model else "resnet18"]
            kind = "JPEGs" if data == photos() else "memory"
            out, lines = command(f"{task} {model} {kind} {amp} {more}", "pretrain", *argv)
            if lines:
                report(f"{out.name}: images/s", median(x["images_per_s"] for x in lines[1:]))
                report(f"{out.name}: waiting for data", median(x["data_wait"] for x in lines[1:]))
                report(f"{out.name}: loss falls", [lines[0]["loss"], lines[-1]["loss"]],
                       not BIG or lines[-1]["loss"] < lines[0]["loss"])


def kill():
    """A run killed by kill -9 goes on as two processes, which share the GPU if there is one: its
    losses are those of a run of two that was never stopped.
    """
    argv = [*SMALL, "--steps", 60, "--save_every", 20, "--batch_size", 64]
    whole = command("never stopped", "pretrain", *argv, processes=2)[1]
    out = folder / "killed"
    child = subprocess.Popen([sys.executable, "pretrain.py", *map(str, argv), "--out", out],
                             cwd=claims.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and child.poll() is None:
        time.sleep(0.05)
    killed = child.poll() is None
    child.kill()
    child.wait()
    parts = command("killed", "pretrain", *argv, "--resume", processes=2)[1]
    apart = furthest(losses_of(whole), losses_of(parts))
    right = killed and len(whole) == len(parts) and apart < 1e-2
    report("killed and resumed: losses beside one never stopped, relative", apart, right)


def scripts():
    """Each of the others once."""
    sizes = "--img_size 32 --patch_size 4 --device".split() + [asked.device]
    run, _ = command("encoder", "pretrain", *SMALL, "--data", photos(), "--model", "vit_micro")
    command("finetune", "finetune", *SMALL, "--weights", run)
    command("probe", "probe", *sizes, "--weights", run)
    command("analyze", "analyze", "fourier", run, "--device", asked.device)
    for name, more in (("segment", ""), ("detect", ""), ("detect relative", "--relative_positions"),
                       ("detect c4", "--model resnet18 --img_size 64 --patch_size 8 --neck c4")):
        argv = [*SMALL, "--head", name.split()[0], "--data", "scenes", *more.split()]
        command(name, "finetune", *argv, "--weights", "none" if more else run)


PARTS = {part.__name__: part for part in (same, curves, nccl, kill, runs, scripts)}

if __name__ == "__main__":
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA here: --device cpu tries the script with small numbers")
    about = torch.cuda.get_device_name() if BIG else "CPU"
    start = time.perf_counter()
    for name in asked.parts or PARTS:
        try:
            PARTS[name]()
        except Exception:  # a failed command leaves nothing to compare: the other parts go on
            traceback.print_exc()
            wrong.append(name)
    print(json.dumps(dict(device=about, seconds=round(time.perf_counter() - start), wrong=wrong,
                          **figures)))
    sys.exit(bool(wrong))
