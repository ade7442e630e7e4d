"""Does pre-training pay? BM's Table 1 at the size of a laptop: every task, and none, for the same time of pre-training.

    python tests/table1.py                                            the built-in pictures, about two hours on 2 CPU cores
    python tests/table1.py --data fashion_mnist --root data --download
    python tests/table1.py --tasks mask none --seeds 1 --share 0.1    a tenth of it, to try

vit_micro. Each encoder: pretrain.py for ten to fifteen minutes of one core, then probe.py (k-NN, linear probe)
and finetune.py with 100 labels a class (Fashion-MNIST: 20 too), three draws of labels, the same for all; BOLD tasks and none
from three pre-training seeds. The budget is a number of steps, chosen for about the same time: 2.7 to 2.8 times as many where
the encoder drops 75% of the patches (bench.py budget times them: within a factor of 1.3 of each other). Times are of cores with
AVX-512 and bf16: without bf16 2.5 times, without AVX-512 either 3.5 to 4.5 times as long (the steps are the same everywhere,
and so is the table). No setting is tuned to a task: all share one learning rate and batch. On 28 px, 7x7 patches, A2's mask
cells are one patch.

One encoder is at work on each core; a bar says how far each is. A stopped table goes on where it was: every part is a run of
its own in --out, and what it found stands in results.json there, which is all it needs of what is done. Writes table.md, what
the README shows (its results.json is kept as .github/results/table1-DATA.json, and a test compares the two).
"""
import argparse
import concurrent.futures
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import degrade
import models
import pretrain

# steps of 128 images in about ten minutes of one core: where the encoder drops 75% of the patches, and where it sees them all
# labels a class: steps of fine-tuning, of 64 images
DATA = {"shapes": dict(size=32, steps=(4200, 1500), labels={100: 500}),
        "fashion_mnist": dict(size=28, steps=(5400, 2000), labels={20: 250, 100: 500})}
BOLD = ("mask", "zoom_in_mask")                                 # from three seeds, as is none
DRAWS, PRETRAIN, PROBE = 3, 600, 60                             # the last two: seconds of one core with bf16, to foresee the end
# ImageNet top-1 of ViT-B/16 after fine-tuning: BM Table 1 (300 epochs; distort with missing pixels, Table 2), A2 Table 2 (800)
PAPER = dict(none=80.7, mask=82.9, zoom_in=82.7, zoom_out=82.2, distort=82.5, blur=81.8, decolor=81.4, zoom_in_mask=83.2,
             simmim=83.8, a2mim=84.2)


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--data", default="shapes", choices=DATA, help="default: shapes")
    p.add_argument("--root", default="data", help="where the torchvision sets are kept; default: ./data")
    p.add_argument("--download", action="store_true", help="fetch the torchvision set")
    p.add_argument("--out", metavar="DIR", help="default: runs/table1-DATA")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="default: the papers' nine (decolor not of grey pictures), and none")
    p.add_argument("--seeds", type=int, default=3, help="pre-training seeds of mask, zoom_in_mask and none; default: 3")
    p.add_argument("--share", type=float, default=1.0, help="of all steps, to try; default: 1")
    return p


def encoders(args):
    """(task, seed) of every encoder: seed 0 of all, then the further seeds; the ones with several first."""
    tasks = dict.fromkeys(args.tasks or (*list(degrade.TASKS)[:9], "none"))
    if args.data == "fashion_mnist" and not args.tasks:
        del tasks["decolor"]                                    # the pictures are grey
    seeds = {t: args.seeds if t in (*BOLD, "none") else 1 for t in tasks}
    return sorted(((t, seed) for t in tasks for seed in range(seeds[t])), key=lambda e: (e[1], e[0] not in BOLD))


class Job(NamedTuple):
    """One command: the folder it leaves in --out, seconds of one core, the steps it takes (None: a probe), the draw of its
    labels (None: all labels, or no use of any), its arguments.
    """
    folder: str
    seconds: float
    steps: int | None
    draw: int | None
    argv: tuple


def jobs(args, task, seed):
    """The Jobs for one encoder, in order."""
    d, found = DATA[args.data], []
    weights = "none" if task == "none" else Path(args.out) / f"pretrain-{task}-{seed}"

    def add(name, seconds, steps, draw, *argv):
        steps = steps and max(1, round(steps * args.share))
        argv = [*argv, "--data", args.data, "--root", args.root, "--model", "vit_micro", "--img_size", d["size"],
                "--patch_size", 4, "--workers", 0, "--device", "cpu", *(["--steps", steps, "--resume"] if steps else [])]
        found.append(Job(name, seconds, steps, draw, (f"{name.split('-')[0]}.py", *map(str, argv))))

    if task != "none":
        setting = degrade.task_settings(task)
        unit = ["--mask_unit", 1] if d["size"] // 4 % setting["mask_unit"] else []             # 7 patches have no half
        steps = d["steps"][0 if setting["mask_ratio"] == 0.75 else 1]
        add(f"pretrain-{task}-{seed}", PRETRAIN, steps, None, "--task", task, *unit, "--batch_size", 128, "--lr", 3e-3,
            "--save_every", 1000, "--seed", seed)
    add(f"probe-{task}-{seed}", PROBE, None, None, "--weights", weights, "--seed", seed)
    for k, n in d["labels"].items():
        for draw in range(DRAWS):
            add(f"finetune-{task}-{seed}-{k}-{draw}", 10 + n / 6, n, draw, "--weights", weights, "--labels", k, "--draw", draw,
                "--save_every", 100000, "--seed", DRAWS * seed + draw)
    return found


def result(folder):
    """What a finished part left, and on what and with which code: its result, for pre-training the last line of its log; None
    if it is not finished, or measured an encoder that has been trained anew since.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        made = {k: config[k] for k in ("hardware", "commit")}
        if (folder / "result.json").exists():
            encoder = Path(config["weights"], "checkpoint.pt")
            stale = encoder.exists() and encoder.stat().st_mtime > (folder / "result.json").stat().st_mtime
            return None if stale else json.loads((folder / "result.json").read_text()) | made
        steps = config["total_steps"]
        if not config.get("task") or models.read_weights(folder)["step"] < steps:
            return None
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        return dict(last, images=steps * config["batch_size"], **made)
    except (OSError, ValueError, IndexError, KeyError):
        return None


class Work:
    """Runs the commands, an encoder on each core, and tells how far it is."""

    def __init__(self, args):
        self.args, self.out, self.lock, self.running, self.stopped = args, Path(args.out), threading.Lock(), {}, ""
        self.file, self.results = self.out / "results.json", {}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
        self.todo, self.done = [job for e in encoders(args) for job in self.open(*e)], set()
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
        self.bar = tqdm(total=sum(job.seconds for job in self.todo), initial=sum(map(self.behind, self.todo)), smoothing=0,
                        bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} gone, about {remaining} to go{postfix}",
                        dynamic_ncols=True)

    def is_of(self, job, found):
        """Whether a result is this job's: of as many steps, on the same data, with the same labels."""
        if not found:
            return False
        steps = found.get("total_steps", found.get("step"))
        draw = found.get("draw", found.get("seed"))             # before there was --draw the seed was it
        return job.steps in (None, steps) and job.draw in (None, draw) and found.get("data") in (None, self.args.data)

    def open(self, task, seed):
        """What of an encoder's jobs is still to do: all, if it is not pre-trained (or is of another length); pre-training
        again too, if its weights are gone and are needed.
        """
        first, *_ = todo = jobs(self.args, task, seed)
        if task == "none" or self.is_of(first, self.results.get(first.folder)):
            todo = [job for job in todo if not self.is_of(job, self.results.get(job.folder))]
            if todo and task != "none" and not self.is_of(first, result(self.out / first.folder)):
                todo.insert(0, first)
        return todo

    def behind(self, job):
        """How many of a job's seconds it has behind it, by its log."""
        if job.folder in self.done:
            return job.seconds
        try:
            last = json.loads((self.out / job.folder / "log.jsonl").read_text().splitlines()[-1])
            return job.seconds * min(1, last["step"] / job.steps)
        except (OSError, ValueError, IndexError, KeyError):     # not begun, or a probe, which has no log
            return 0.0

    def show(self):
        with self.lock:
            shares = [f"{job.folder} {self.behind(job) / job.seconds:.0%}" for job in self.running]
            self.bar.set_postfix_str(", ".join(shares), refresh=False)
            self.bar.update(sum(map(self.behind, self.todo)) - self.bar.n)
            self.bar.refresh()

    def encoder(self, task, seed):
        with self.lock:
            core = self.cores.pop()
        if core is not None:
            os.sched_setaffinity(0, {core})                     # this thread's, so its commands'
        try:
            for job in self.open(task, seed):
                if self.stopped or not self.one(job):
                    return
        finally:
            self.cores.append(core)

    def one(self, job):
        """Run one command, if it has not been; whether it went well."""
        out, code = self.out / job.folder, None
        if not self.is_of(job, result(out)):
            with open(f"{out}.txt", "w") as log:
                with self.lock:
                    if self.stopped:
                        return False
                    process = subprocess.Popen([sys.executable, *job.argv, "--out", str(out)], cwd=ROOT, stdout=log, stderr=log)
                    self.running[job] = process
                if self.stopped:                                # a signal came in between
                    process.terminate()
                code = process.wait()
        found = result(out)
        with self.lock:
            self.running.pop(job, None)
            if not self.is_of(job, found):                      # of another length: the command was refused
                said = Path(f"{out}.txt").read_text().strip().splitlines() or ["nothing"]
                self.stop(f"{job.folder} ended with code {code}, and said last: {said[-1]} (all of it: {out}.txt)")
                return False
            self.done.add(job.folder)
            self.results[job.folder] = {k: v for k, v in found.items() if k not in ("weights", "compared_with")}   # paths
            pretrain.write_whole(self.file, lambda file: file.write(json.dumps(self.results, indent=0).encode()))
            tqdm.write(f"{job.folder}: " + " ".join(f"{k} {found[k]:g}" for k in ("loss", "knn", "linear", "top1") if k in found))
        return True

    def stop(self, why="stopped: the same command goes on"):
        """Every command saves and leaves."""
        self.stopped = self.stopped or why
        for process in list(self.running.values()):
            process.terminate()


def spread(values):
    """mean ± deviation, the sample's; a plain number where there is one."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results, data):
    """results {folder: result} -> the table in Markdown, tasks by their accuracy with the most labels. A cell that lacks draws
    of labels says so.
    """
    found, labels = {}, DATA[data]["labels"]
    k_most = max(labels)
    for folder, r in results.items():
        kind, task, seed, *more = folder.split("-")
        row = found.setdefault(task, {})
        if kind == "pretrain":
            row.setdefault("images", []).append(r["images"])
        elif kind == "probe":
            row.setdefault("knn", []).append(r["knn"]), row.setdefault("linear", []).append(r["linear"])
        else:
            row.setdefault(int(more[0]), {}).setdefault(seed, []).append(r["top1"])
    def all_of(row, k):                                         # every draw of every seed
        return [x for draws in row.get(k, {}).values() for x in draws]
    order = sorted((t for t in found if all_of(found[t], k_most)), key=lambda t: -statistics.mean(all_of(found[t], k_most)))
    paper = sorted((t for t in order if t in PAPER and t not in ("simmim", "a2mim")), key=lambda t: -PAPER[t])
    ours = [t for t in order if t in paper]

    def cell(row, k):
        draws, wanted = all_of(row, k), DRAWS * len(row["knn"])
        return spread(draws) + (f" ({len(draws)} of {wanted})" if len(draws) < wanted else "")
    columns = ["pre-training", "seeds", "images", "k-NN", "linear probe", *(f"{k * 10:,} labels" for k in labels), "place",
               "BM's place among these (ImageNet)"]
    rows = [columns]
    for t in order:
        row = found[t]
        name, images = (f"`{t}`", f"{row['images'][0]:,}") if "images" in row else (t, "0")
        place, theirs = "", f"A2: {PAPER[t]}" if t in PAPER else ""
        if t in paper:
            place, theirs = f"{ours.index(t) + 1}", f"{paper.index(t) + 1} ({PAPER[t]})"
        rows.append([name, f"{len(row['knn'])}", images, spread(row["knn"]), spread(row["linear"]),
                     *(cell(row, k) for k in labels), place, theirs])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def main(argv=None):
    args = options().parse_args(argv)
    share = "" if args.share == 1 else f"-{args.share:g}"       # a trial must not be taken for the table
    args.out = os.path.abspath(args.out or os.path.join("runs", f"table1-{args.data}{share}"))
    args.root = os.path.abspath(args.root)
    unknown = [t for t in args.tasks or [] if t not in (*degrade.TASKS, "none")]
    if unknown:
        sys.exit(f"table1.py: --tasks {unknown[0]} is none of {', '.join(degrade.TASKS)}, none")
    if args.download:
        pretrain.load_data(dict(data=args.data, root=args.root, download=True), pretrain.Place(0, 1, "cpu"))
    os.makedirs(args.out, exist_ok=True)
    work = Work(args)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: work.stop())
    print(f"{len(work.todo)} commands to do on {len(work.cores)} cores -> {args.out}", flush=True)
    with work.bar, concurrent.futures.ThreadPoolExecutor(len(work.cores)) as pool:
        waiting = {pool.submit(work.encoder, *e) for e in encoders(args)}
        while waiting:
            finished, waiting = concurrent.futures.wait(waiting, timeout=5, return_when=concurrent.futures.FIRST_COMPLETED)
            work.show()
            for future in finished:
                if future.exception():                          # a full disk: the other commands save and leave
                    work.stop()
                future.result()
    text = table(work.results, args.data)
    pretrain.write_whole(os.path.join(args.out, "table.md"), lambda file: file.write(text.encode() + b"\n"))
    print(text)
    if work.stopped:
        sys.exit(f"table1.py: {work.stopped}")


if __name__ == "__main__":
    main()
