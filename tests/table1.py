"""Does pre-training pay? BM's Tables 1 and 3 at the size of a laptop: every task, and none.

    python tests/table1.py                            built-in pictures, two hours on 2 CPU cores
    python tests/table1.py --data fashion_mnist --download
    python tests/table1.py --data scenes              segmentation, detection: three hours
    python tests/table1.py --data scenes-resnet18     the same of a ResNet
    python tests/table1.py --tasks mask none --seeds 1 --share 0.1    a tenth of it

Every task pre-trains a vit_micro for about the same time, ten to fifteen minutes of one core with
AVX-512 and bf16. The time is given in steps: 2.7 to 2.8 times as many where the encoder drops 75%
of the patches (tests/bench.py budget). probe.py then measures k-NN and a linear probe. finetune.py
has 100 labels a class (Fashion-MNIST: 20 too), drawn by its seeds 0, 1 and 2 for every encoder.
BOLD tasks have three pre-training seeds. Random weights have three of a network, and nine of
fine-tuning: no network twice. No setting is tuned to a task.

For scenes four encoders pre-train on the built-in pictures, about half as long, three seeds each.
finetune.py then has the same steps for all, of --head segment and of --head detect.

One encoder is at work on each core. Every part is a run in --out. A stopped table goes on where it
was. To make an encoder anew, delete what was fine-tuned from it too. The README shows table.md.
.github/results/table1-DATA.json is its results.json.
"""
import concurrent.futures
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import degrade
import models
import pretrain

# Steps where 75% of the patches are dropped, and where fewer are. {labels a class: steps}
# of scenes, {head: (size, steps)}
DATA = {"shapes": dict(size=32, steps=(4200, 1500), labels={100: 500}),
        "fashion_mnist": dict(size=28, steps=(5400, 2000), labels={20: 250, 100: 500}),
        "scenes": dict(size=32, steps=(2400, 900), heads=dict(segment=(48, 400), detect=(64, 500))),
        "scenes-resnet18": dict(size=64, patch=8, model="resnet18", steps=(400, 400),
                                heads=dict(segment=(64, 400), detect=(128, 500)))}
BOLD = ("mask", "zoom_in_mask")
DENSE = ("none", "mask", "zoom_in_mask", "a2mim")
DRAWS = 3
# ImageNet top-1 of ViT-B/16: BM Table 1 (distort: Table 2, with missing pixels), A2 Table 2
PAPER = dict(none=80.7, mask=82.9, zoom_in=82.7, zoom_out=82.2, distort=82.5, blur=81.8,
             decolor=81.4, zoom_in_mask=83.2, simmim=83.8, a2mim=84.2)
# BM Table 3, A2 Tables 4 (ViT-B) and 3 (ResNet-50): mean IoU on ADE20K, box AP, mask AP on COCO
PAPER_DENSE = {"mask": "45.6, 45.3, 40.2", "zoom_in_mask": "46.2, 46.1, 40.9",
               "a2mim": "A2: 49.0, 49.3, 43.5", "a2mim resnet18": "A2: 38.3, 39.8, 34.9"}


def options(argv=None):
    p = pretrain.Parser(description=__doc__.split("\n")[0])
    o = p.add_argument
    o("--data", default="shapes", choices=DATA, help="a set by name")
    o("--root", type=Path, default="data", help="where torchvision keeps its sets")
    o("--download", action="store_true", help="fetch the set into --root")
    o("--out", type=Path, help="a folder; None: runs/table1-DATA")
    o("--tasks", nargs="+", choices=[*degrade.TASKS, "none"], metavar="TASK",
      help="None: all, but decolor of grey pictures")
    o("--seeds", type=int, default=3, help="of mask, zoom_in_mask and none")
    o("--share", type=float, default=1.0, help="of all steps, to try")
    p.set_defaults(only=None)  # of --download
    args = p.parse_args(argv)
    trial = "" if args.share == 1 else f"-{args.share:g}"  # must not be taken for the table
    args.out = (args.out or Path(f"runs/table1-{args.data}{trial}")).resolve()
    args.root = args.root.resolve()
    usual = DENSE if "heads" in DATA[args.data] else PAPER
    args.tasks = args.tasks or [t for t in usual if (args.data, t) != ("fashion_mnist", "decolor")]
    return args


def encoders(args):
    """(task, seed) of each, seed 0 first."""
    found = [(task, seed) for task in args.tasks
             for seed in range(args.seeds if task in (*BOLD, "none") or "heads" in DATA[args.data]
                               else 1)]
    return sorted(found, key=lambda e: (e[1], e[0] not in BOLD))


class Job(NamedTuple):
    """One command."""
    folder: str
    right: dict  # what its result says
    argv: list


def jobs(args, task, seed):
    """The Jobs of one encoder, in order."""
    d, found = DATA[args.data], []
    heads = d.get("heads")
    trained_on, patch = "shapes" if heads else args.data, d.get("patch", 4)
    shared = ["--root", args.root, "--device", "cpu", "--model", d.get("model", "vit_micro"),
              "--img_size", d["size"], "--patch_size", patch, "--workers", 0]
    weights = "none" if task == "none" else args.out / f"pretrain-{task}-{seed}"

    def add(script, name, steps, own_seed, *more, data=trained_on):
        argv = [f"{script}.py", "--data", data, *shared, "--seed", own_seed, *more]
        if steps:
            steps = max(1, round(steps * args.share))
            argv += ["--steps", steps, "--resume"]
        right = dict(data=data, seed=own_seed, steps=steps)
        found.append(Job(f"{script}-{task}-{seed}{name}", right, [*map(str, argv)]))

    if task != "none":
        setting = degrade.task_settings(task)
        unit = setting["mask_unit"]
        unit = unit if d["size"] // patch % unit == 0 else 1  # 7x7
        more = f"--task {task} --mask_unit {unit} --batch_size 128 --lr 3e-3 --save_every 1000"
        steps = d["steps"][setting["mask_ratio"] != 0.75]
        add("pretrain", "", steps, seed, *more.split())
    for head, (size, steps) in (heads or {}).items():
        add("finetune", f"-{head}", steps, seed, "--weights", weights, "--head", head,
            "--img_size", size, "--save_every", 100000, data="scenes")
    if heads:
        return found
    add("probe", "", None, seed, "--weights", weights)
    for (k, steps), draw in itertools.product(d["labels"].items(), range(DRAWS)):
        network = DRAWS * seed if task == "none" else 0
        add("finetune", f"-{k}-{draw}", steps, network + draw, "--weights", weights, "--labels", k,
            "--save_every", 100000)
    return found


def result(folder, right):
    """What a finished run found. None: it is not `right`, or its encoder is newer."""
    try:
        config = json.loads((folder / "config.json").read_text())
        found = {k: config.get(k) for k in ("data", "seed", "hardware", "commit")}
        encoder, file = Path(config["weights"], "checkpoint.pt"), folder / "result.json"
        if file.exists():
            found |= json.loads(file.read_text())
        else:  # a pre-training
            found |= json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
            found.update(task=config["task"], steps=models.read_weights(folder)["step"],
                         images=config["batch_size"] * config["total"])
        files = encoder, folder / "checkpoint.pt", file
        made = [x.stat().st_mtime for x in files if x.exists()]
        if made[0] == min(made) and all(found.get(k) == v for k, v in right.items()):
            return found
    except (OSError, ValueError, LookupError):
        return None


class Work:
    """Runs the commands, an encoder on each core."""

    def __init__(self, args):
        self.args, self.file, self.results = args, args.out / "results.json", {}
        self.lock, self.running, self.stopped = threading.RLock(), [], ""
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
        self.cores = [*os.sched_getaffinity(0)] if hasattr(os, "sched_getaffinity") else [None]

    def encoder(self, task, seed):
        """All commands of one encoder, until one fails."""
        core = self.cores.pop()
        if core is not None:
            os.sched_setaffinity(0, {core})  # this thread's, so its commands'
        try:
            return all(self.one(job) for job in jobs(self.args, task, seed))
        finally:
            self.cores.append(core)

    def one(self, job):
        """Run one command if it is not done -> whether it went well."""
        out, said = (self.args.out / f"{job.folder}{end}" for end in ("", ".txt"))
        if not result(out, job.right):
            with self.lock, open(said, "w") as log:
                if self.stopped:
                    return False
                argv = [sys.executable, *job.argv, "--out", out]
                process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
                self.running.append(process)
            process.wait()
        found = result(out, job.right)
        with self.lock:
            if not found:
                last = ["nothing", *said.read_text().split("\n")][-2]
                self.stop(f"{job.folder}: {last} (all of it: {said})")
                return False
            found.pop("weights", None)  # a path
            self.results[job.folder] = found
            text = json.dumps(self.results, indent=0)
            pretrain.write_whole(self.file, lambda file: file.write(text.encode()))
            print(job.folder, found, flush=True)
        return True

    def stop(self, why="stopped: the same command goes on"):
        """Every command saves and leaves."""
        with self.lock:
            self.stopped = self.stopped or why
            for process in self.running:
                process.terminate()


def spread(values):
    """Mean ± the sample's deviation."""
    more = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{more}"


def table(results, data):
    """{folder: result} -> Markdown, the tasks by their accuracy with the most labels."""
    if "heads" in DATA[data]:
        return dense_table(results, data)
    labels, found = DATA[data]["labels"], {}
    for folder, r in results.items():
        kind, task, _, *more = folder.split("-")
        names = {"pretrain": ["images"], "probe": ["knn", "linear"], "finetune": ["top1"]}[kind]
        for name in names:
            key = int(more[0]) if kind == "finetune" else name
            found.setdefault(task, {}).setdefault(key, []).append(r[name])
    best = {t: statistics.mean(row[max(labels)]) for t, row in found.items() if max(labels) in row}
    order = sorted(best, key=lambda t: -best[t])
    ours = [t for t in order if t in PAPER and t not in ("simmim", "a2mim")]
    paper = sorted(ours, key=lambda t: -PAPER[t])

    def cell(row, k):  # it says how many draws it lacks
        draws, wanted = row[k], DRAWS * len(row["knn"])
        return spread(draws) + (f" ({len(draws)} of {wanted})" if len(draws) < wanted else "")

    rows = [["pre-training", "seeds", "images", "k-NN", "linear probe",
             *(f"{k * 10:,} labels" for k in labels), "place", "BM's place among these (ImageNet)"]]
    for t in order:
        row, name, places = found[t], t, ["", f"A2: {PAPER[t]}" if t in PAPER else ""]
        if "images" in row:
            name = f"`{t}`"
        if t in ours:
            places = [ours.index(t) + 1, f"{paper.index(t) + 1} ({PAPER[t]})"]
        rows.append([name, len(row["knn"]), f"{row.get('images', [0])[0]:,}", spread(row["knn"]),
                     spread(row["linear"]), *(cell(row, k) for k in labels), *places])
    return markdown(rows)


def markdown(rows):
    """Rows, the first of them the head, as a table."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows).replace(" --- ", "---")


def dense_table(results, data):
    """The same of segmentation and detection, each beside none."""
    names = dict(miou="mean IoU", pixel_accuracy="pixel accuracy", box_ap="box AP",
                 box_ap50="box AP50", mask_ap="mask AP")
    found = {}
    for folder, r in results.items():
        task = folder.split("-")[1]
        for name in names:
            if name in r:
                found.setdefault(task, {}).setdefault(name, []).append(r[name])
    rows = [["pre-training", "seeds", *names.values(), "ADE20K, COCO: mean IoU, box AP, mask AP"]]
    for task in sorted(found, key=lambda t: -statistics.mean(found[t].get("miou", [0]))):
        row, of = found[task], " ".join([task, *data.split("-")[1:]])
        rows.append([f"`{task}`", max(map(len, row.values())),
                     *(spread(row[name]) if name in row else "" for name in names),
                     PAPER_DENSE.get(of, PAPER_DENSE.get(task, "") if of == task else "")])
    return markdown(rows)


def main(argv=None):
    args = options(argv)
    if args.download:
        pretrain.load_data(args, pretrain.set_up("cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    work = Work(args)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: work.stop())
    print(f"{len(work.cores)} cores -> {args.out}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(len(work.cores)) as pool:
        for done in [pool.submit(work.encoder, *e) for e in encoders(args)]:
            if done.exception():  # a full disk: the other commands save and leave
                work.stop()
            done.result()
    text = table(work.results, args.data)
    pretrain.write_whole(args.out / "table.md", lambda file: file.write(text.encode() + b"\n"))
    print(text)
    if work.stopped:
        raise pretrain.Failed(work.stopped)


if __name__ == "__main__":
    sys.exit(pretrain.command(main))
