"""Is it true? What the two papers claim, tried at the size of a laptop.

    python tests/claims.py                              every set, what matters most first
    python tests/claims.py --data fashion_mnist --download
    python tests/claims.py --only integrated fill       some claims
    python tests/claims.py --share 0.05                 a twentieth of all steps, to try
    python tests/claims.py --sheet                      only the figures, of the runs in --out

A claim is a row of CLAIMS: pairs of arms, the first of which is to be better. An arm is one way to
pre-train: a task, with settings or a length of its own (VARIANTS). Each gets about the same time on
a core, given in steps: 2.7 to 2.8 times as many where the encoder drops 75% of the patches
(tests/bench.py budget). probe.py then measures k-NN and a linear probe. finetune.py has 100 labels
a class (Fashion-MNIST: 20 too), drawn by its seeds 0, 1 and 2 for every encoder. For scenes it has
the same steps for all, of --head segment and of --head detect. No setting is tuned to an arm.

The rule. Two arms are told apart when their means differ by more than twice the standard error of
the difference, sqrt(s^2 / n + s^2 / m) of n and m pre-training seeds. s is the deviation over
seeds, pooled over all arms of the set with two seeds or more. A claim `holds` if no pair is told
the other way round and at least half are told; it `does not` hold if more are told the other way
round than are told; else it `cannot be told`. The claims that carry the papers' titles (`seeds` 3)
have three seeds, the others' own arms one. Random weights have three networks, and nine
fine-tunings: no network twice.

One arm is at work on each core. Every part is a run in --out/SET. What was stopped goes on where it
was. To make an encoder anew, delete what was measured of it too. Numbers are kept in
--out/SET/results.json, a copy of which is .github/results/SET.json, the tables in --out/claims.md.
"""
import concurrent.futures
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import degrade
import models
import pretrain

# Steps where 75% of the patches are dropped, and where fewer are. {labels a class: steps}
# of scenes, {head: (size, steps)}
SETS = {"shapes": dict(size=32, steps=(4200, 1500), labels={100: 500}),
        "resnet18": dict(size=64, patch=8, model="resnet18", steps=(1000, 1000), labels={100: 500}),
        "scenes": dict(size=32, steps=(2400, 900), heads=dict(segment=(48, 400), detect=(64, 500))),
        "scenes-resnet18": dict(size=64, patch=8, model="resnet18", steps=(400, 400),
                                heads=dict(segment=(64, 400), detect=(128, 500))),
        "fashion_mnist": dict(size=28, steps=(5400, 2000), labels={20: 250, 100: 500})}
DRAWS = 3
# ImageNet top-1 of ViT-B/16 by arm: BM Table 1 (distort: Table 2, with missing pixels), A2 Table 2
PAPER = {"none": 80.7, "mask": 82.9, "zoom_in": 82.7, "zoom_out": 82.2, "distort": 82.5,
         "blur": 81.8, "decolor": 81.4, "zoom_in_mask": 83.2, "simmim": 83.8, "a2mim": 84.2,
         # BM 4.2, Table 2, A.3, Fig. 5
         "mask.block": 82.3, "mask.inner": 82.3, "zoom_in.random": 81.5, "zoom_in.96": 82.2,
         "zoom_in.128": 82.3, "zoom_in.192": 82.5, "zoom_in.208": 82.3, "zoom_out.96": 81.9,
         "zoom_out.128": 82.0, "zoom_out.192": 82.1, "zoom_out.none": 79.9, "zoom_out.black": 80.0,
         "zoom_out.other": 80.5, "distort.weak": 82.3, "distort.strong": 82.3, "distort.wave": 81.9,
         "blur.5": 80.9, "blur.7": 81.5, "blur.11": 81.0, "zoom_in_mask.1of6": 82.7,
         "zoom_in_mask.1of3": 83.0}
# BM Table 3, A2 Tables 4 (ViT-B) and 3 (ResNet-50): mean IoU on ADE20K, box AP, mask AP on COCO
PAPER_DENSE = {"mask": "45.6, 45.3, 40.2", "zoom_in_mask": "46.2, 46.1, 40.9",
               "a2mim": "A2: 49.0, 49.3, 43.5", "a2mim resnet18": "A2: 38.3, 39.8, 34.9"}
DENSE = ("none", "mask", "zoom_in_mask", "a2mim")  # of scenes, three seeds each

# TASK.NAME: the settings of an arm. [n]: so many of 224 pixels.
VARIANTS = {
    "mask.block": "--mask_kind block", "mask.hole": "--mask_kind hole",
    "mask.inner": "--mask_kind center --mask_ratio 0.49",
    "zoom_in.random": "--zoom_at random", "distort.wave": "--warp wave",
    **{f"zoom_in.{n}": f"--zoom_size [{n}]" for n in (96, 128, 192, 208)},
    **{f"zoom_out.{n}": f"--zoom_size [{n}]" for n in (96, 128, 192)},
    **{f"zoom_out.{fill}": f"--zoom_fill {fill}" for fill in ("none", "black", "other")},
    "distort.weak": "--twist 0.15 0.20", "distort.strong": "--twist 0.25 0.30",
    **{f"blur.{k}": f"--blur_kernel {k}" for k in (5, 7, 11)},
    "blur.kaiming": "--blur_init kaiming",
    "decolor.0": "--saturation 0", "decolor.60": "--saturation 0.6",
    "a2mim.zero": "--fill zero", "a2mim.input": "--token_at input",
    "a2mim.no_token": "--token_at none", "a2mim.replace": "--token_how replace",
    "a2mim.no_freq": "--freq_weight 0", "a2mim.no_omega": "--freq_alpha 0",
}
LENGTHS = {f"{n}of{m}": Fraction(n, m) for n, m in ((1, 6), (1, 3), (2, 3))}  # TASK.LENGTH
# What a claim is about: the key in a result, and its name.
MEASURES = dict(top1="fine-tuned", box_ap="box AP", kept="accuracy kept, half dropped",
                middle="middle orders", low_pass="high frequencies", variance="variance")
LESS = ("low_pass", "variance")  # the better has less of it
# analyze.py's commands, what is taken from their numbers {..} of one run, and of which runs: those
# fine-tuned, or the encoders
FIGURES = {
    "kept": ("occlusion", lambda r: 100 * r["mean"][r["dropped"].index(0.5)] / r["intact"], True),
    "middle": ("interaction", lambda r: r["share_05_to_50"], True),
    "low_pass": ("fourier", lambda r: statistics.mean(x[-1] for x in r["mean"]), False),
    "variance": ("variance", lambda r: r["mean"][-1][0], False)}


class Claim(NamedTuple):
    name: str
    place: str
    says: str
    sets: str
    measure: str  # of MEASURES
    pairs: list  # (better, worse) arms
    seeds: int = 1  # of its arms; none has three
    paper: str = ""  # its numbers, if they are not PAPER's

    def arms(self):
        return list(dict.fromkeys(itertools.chain(*self.pairs)))


def over(better, *worse):
    """One arm better than each of the others."""
    return [(better, other) for other in worse]


BOTH, RESNET, NETWORKS = "shapes fashion_mnist", "resnet18", "shapes resnet18"
BM_TASKS = "zoom_in_mask", "mask", "zoom_in", "distort", "zoom_out", "blur", "decolor"
CLAIMS = [  # what matters most first
    Claim("integrated", "BM Table 1", "masking and zooming in together beat masking", BOTH, "top1",
          over("zoom_in_mask", "mask"), 3),
    Claim("pays", "BM Table 1", "every task beats random weights", BOTH, "top1",
          [(task, "none") for task in BM_TASKS], 3),
    Claim("order", "BM Table 1", "the order of the tasks", BOTH, "top1",
          [*itertools.combinations((*BM_TASKS, "none"), 2)], 3),
    Claim("a2mim", "A2 Table 2", "a2mim beats simmim", BOTH, "top1", over("a2mim", "simmim"), 3),
    Claim("a2mim_resnet", "A2 Table 1", "a2mim beats simmim", RESNET, "top1",
          over("a2mim", "simmim"), 3, "78.8, 78.2"),
    Claim("gap", "BM Table 3", "masking and zooming in together lead in detection, too", "scenes",
          "box_ap", over("zoom_in_mask", "mask"), 3, "46.1, 45.3"),
    Claim("early", "BM Fig. 5", "they lead at 1/6, 1/3 and 2/3 of the length", BOTH, "top1",
          [(f"zoom_in_mask.{n}", f"mask.{n}") for n in LENGTHS], 3),
    Claim("random", "BM 4.2", "random masks beat a visible block", BOTH, "top1",
          over("mask", "mask.block"), 3),
    Claim("mirror", "BM A.3", "zooming out: a mirrored canvas beats none, black, another image",
          BOTH, "top1", over("zoom_out", "zoom_out.none", "zoom_out.black", "zoom_out.other"), 3),
    Claim("fill", "A2 5.4", "hidden patches: the mean colour beats zero", NETWORKS, "top1",
          over("a2mim", "a2mim.zero"), 3, "ResNet-50: 88.14, 87.75"),
    Claim("middle", "A2 Fig. 6", "the token in the middle beats it at the input", NETWORKS, "top1",
          over("a2mim", "a2mim.input"), 3),
    Claim("freq", "A2 Table 5", "the frequency loss helps", NETWORKS, "top1",
          over("a2mim", "a2mim.no_freq"), 3, "ViT-S: 86.41, 85.17; ResNet-50: 88.73, 88.19"),
    Claim("occlusion", "A2 Fig. 1 a-d", "masked modelling stands occlusion better", "shapes",
          "kept", [pair for task in ("mask", "zoom_in_mask", "a2mim")
                   for pair in over(task, "supervised", "none")], 3),
    Claim("fourier", "A2 Fig. 3a", "masked modelling and inpainting filter high frequencies",
          RESNET, "low_pass", [("a2mim", "supervised"), ("mask.hole", "supervised")], 3),
    Claim("variance", "A2 Fig. 3b", "masked modelling lowers the variance", RESNET, "variance",
          over("a2mim", "supervised", "none")),
    Claim("interaction", "A2 Fig. 1 e-h", "masked modelling strengthens the middle orders",
          "shapes", "middle", [pair for task in ("mask", "a2mim")
                               for pair in over(task, "supervised", "none")]),
    Claim("centre", "BM A.3", "zooming in: the centre beats a random place", BOTH, "top1",
          over("zoom_in", "zoom_in.random")),
    Claim("scale_in", "BM Table 2", "zooming in: 160 of 224 pixels are best", BOTH, "top1",
          over("zoom_in", "zoom_in.96", "zoom_in.128", "zoom_in.192", "zoom_in.208")),
    Claim("inner", "BM A.3", "zooming in beats predicting the outer patches", BOTH, "top1",
          over("zoom_in", "mask.inner")),
    Claim("scale_out", "BM Table 2", "zooming out: 160 of 224 pixels are best", BOTH, "top1",
          over("zoom_out", "zoom_out.96", "zoom_out.128", "zoom_out.192")),
    Claim("twist", "BM Table 2", "a twist of .20 to .25 is best", BOTH, "top1",
          over("distort", "distort.weak", "distort.strong")),
    Claim("wave", "BM A.3", "the fisheye beats a wave", BOTH, "top1",
          over("distort", "distort.wave")),
    Claim("kernel", "BM Table 2", "a blur of 9 x 9 is best", BOTH, "top1",
          over("blur", "blur.5", "blur.7", "blur.11")),
    Claim("kaiming", "BM A.1", "Kaiming's blur is worse than nothing", BOTH, "top1",
          over("none", "blur.kaiming")),
    Claim("saturation", "BM Table 2", "30% of the saturation are best", "shapes", "top1",
          over("decolor", "decolor.0", "decolor.60")),
    Claim("token", "A2 Fig. 6", "adding the token beats replacing by it, and none", NETWORKS,
          "top1", over("a2mim", "a2mim.replace", "a2mim.no_token")),
    Claim("omega", "A2 Table 5", "weighing the frequencies helps", NETWORKS, "top1",
          over("a2mim", "a2mim.no_omega"), 1, "ViT-S: 86.41, 86.05; ResNet-50: 88.73, 88.47"),
]
# Figures of several arms: {title: {tick: arm}}
PANELS = {
    "BM Table 2: zoom in to": {"96": "zoom_in.96", "128": "zoom_in.128", "160": "zoom_in",
                               "192": "zoom_in.192", "208": "zoom_in.208"},
    "BM Table 2: zoom out to": {"96": "zoom_out.96", "128": "zoom_out.128", "160": "zoom_out",
                                "192": "zoom_out.192"},
    "BM Table 2: twist from": {".15": "distort.weak", ".20": "distort", ".25": "distort.strong"},
    "BM Table 2: blur": {"5": "blur.5", "7": "blur.7", "9": "blur", "11": "blur.11"},
    "BM A.3: round the small image": {"mirror": "zoom_out", "none": "zoom_out.none",
                                      "black": "zoom_out.black", "other": "zoom_out.other"},
    "BM Fig. 5: length of zoom_in_mask": {
        "1/6": "zoom_in_mask.1of6", "1/3": "zoom_in_mask.1of3", "2/3": "zoom_in_mask.2of3",
        "1": "zoom_in_mask"},
    "BM Table 1": {t: t for t in ("none", *BM_TASKS[::-1])},
    "A2 Fig. 6: the token": {"middle": "a2mim", "input": "a2mim.input", "none": "a2mim.no_token",
                             "replaced": "a2mim.replace"},
}


def options(argv=None):
    p = pretrain.Parser(description=__doc__.split("\n")[0])
    o = p.add_argument
    o("--data", nargs="+", default=list(SETS), choices=SETS, help="sets by name")
    o("--root", type=Path, default="data", help="where torchvision keeps its sets")
    o("--download", action="store_true", help="fetch Fashion-MNIST into --root")
    o("--out", type=Path, help="a folder; None: runs/claims")
    o("--only", nargs="+", dest="claims", choices=[c.name for c in CLAIMS], metavar="CLAIM",
      help=", ".join(c.name for c in CLAIMS) + "; None: all")
    o("--seeds", type=int, default=3, help="at most")
    o("--share", type=float, default=1.0, help="of all steps, to try")
    o("--sheet", action="store_true", help="draw the papers' figures of the runs in --out")
    args = p.parse_args(argv)
    trial = "" if args.share == 1 else f"-{args.share:g}"  # must not be taken for the table
    args.out = (args.out or Path(f"runs/claims{trial}")).resolve()
    args.root = args.root.resolve()
    args.claims = [c for c in CLAIMS if not args.claims or c.name in args.claims]
    return args


def grey(data, arm):
    return (data, arm.split(".")[0]) == ("fashion_mnist", "decolor")


def encoders(args):
    """(set, arm, seed) of each: those of three seeds first, set by set, all seeds 0 first."""
    found = {}  # in order
    for seeds, data, seed in itertools.product((3, 1), args.data, range(args.seeds)):
        for claim in args.claims:
            if data in claim.sets.split() and claim.seeds == seeds:
                for arm in claim.arms():
                    if not grey(data, arm) and (seed < seeds or arm == "none"):
                        found[data, arm, seed] = None
        if "heads" in SETS[data] and args.claims == CLAIMS:
            found.update(((data, arm, seed), None) for arm in DENSE)
    return list(found)


class Job(NamedTuple):
    """One command."""
    folder: Path
    right: dict  # what its result says
    argv: list
    figure: str = ""  # of FIGURES


def jobs(args, data, arm, seed):
    """The Jobs of one encoder, in order."""
    d, found, out = SETS[data], [], args.out / data
    heads, size, patch = d.get("heads"), d["size"], d.get("patch", 4)
    trained_on = "fashion_mnist" if data == "fashion_mnist" else "shapes"
    task, _, variant = arm.partition(".")
    shared = ["--root", args.root, "--device", "cpu", "--model", d.get("model", "vit_micro"),
              "--img_size", size, "--patch_size", patch, "--workers", 0]
    weights = out / f"pretrain-{arm}-{seed}"

    def add(script, name, steps, own_seed, *more, data=trained_on):
        argv = [f"{script}.py", "--data", data, *shared, "--seed", own_seed, *more]
        if steps:
            steps = max(1, round(steps * args.share))
            argv += ["--steps", steps, "--resume"]
        right = dict(data=data, seed=own_seed, steps=steps)
        found.append(Job(out / f"{script}-{arm}-{seed}{name}", right, [*map(str, argv)]))

    steps = d["steps"][1]
    if arm == "supervised":  # all labels, as long as the others are pre-trained
        add("finetune", "", steps, seed, "--weights", "none", "--save_every", 100000)
        weights = found[0].folder
    elif arm == "none":
        weights = "none"
    else:
        setting = degrade.task_settings(task)
        if setting["mask_ratio"] == 0.75 and "model" not in d:
            steps = d["steps"][0]
        unit = setting["mask_unit"]
        unit = unit if size // patch % unit == 0 else 1  # 7x7
        text = re.sub(r"\[(\d+)\]", lambda m: str(round(int(m[1]) * size / 224)),
                      VARIANTS.get(arm, ""))
        more = f"--task {task} --mask_unit {unit} --batch_size 128 --lr 3e-3 --save_every 1000"
        add("pretrain", "", steps * LENGTHS.get(variant, 1), seed, *more.split(), *text.split())
    for head, (side, steps) in (heads or {}).items():
        add("finetune", f"-{head}", steps, seed, "--weights", weights, "--head", head,
            "--img_size", side, "--save_every", 100000, data="scenes")
    if not heads and arm != "supervised":
        add("probe", "", None, seed, "--weights", weights)
        for (k, steps), draw in itertools.product(d["labels"].items(), range(DRAWS)):
            network = DRAWS * seed if arm == "none" else 0
            add("finetune", f"-{k}-{draw}", steps, network + draw, "--weights", weights,
                "--labels", k, "--save_every", 100000)
    tuned = next((j.folder for j in found if j.folder.name.endswith("-100-0")), weights)
    for claim in args.claims:
        if claim.measure in FIGURES and data in claim.sets.split() and arm in claim.arms():
            name, _, of_tuned = FIGURES[claim.measure]
            of = tuned if of_tuned else weights
            argv = ["analyze.py", name, of, "--root", args.root, "--device", "cpu", "--workers", 0]
            if of == "none":
                argv += ["--data", trained_on, *shared[4:10], "--seed", seed]
            found.append(Job(out / f"{name}-{arm}-{seed}", {}, [*map(str, argv)], claim.measure))
    return found


def result(job):
    """What a finished run found. None: it is not `right`, or its encoder is newer."""
    folder = job.folder
    try:
        if job.figure:
            name, taken, _ = FIGURES[job.figure]
            held = json.loads((folder / f"{name}.json").read_text())
            return {job.figure: round(taken(next(iter(held["runs"].values()))), 4)}
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
        if made[0] == min(made) and all(found.get(k) == v for k, v in job.right.items()):
            return found
    except (OSError, ValueError, LookupError):
        return None


class Work:
    """Runs the commands, an encoder on each core."""

    def __init__(self, args, todo):
        self.args, self.results, self.todo = args, {}, todo
        self.lock, self.running, self.stopped = threading.RLock(), [], ""
        for data in args.data:
            file = args.out / data / "results.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            self.results[data] = json.loads(file.read_text()) if file.exists() else {}
        self.cores = [*os.sched_getaffinity(0)] if hasattr(os, "sched_getaffinity") else [None]
        self.left, self.spent, self.timed = sum(map(len, todo.values())), 0.0, 0

    def encoder(self, data, all_jobs):
        """All commands of one encoder, until one fails."""
        core = self.cores.pop()
        if core is not None:
            os.sched_setaffinity(0, {core})  # this thread's, so its commands'
        try:
            return all(self.one(data, job) for job in all_jobs)
        finally:
            self.cores.append(core)

    def one(self, data, job):
        """Run one command if it is not done -> whether it went well."""
        out, began = job.folder, time.monotonic()
        if not result(job):
            with self.lock, open(f"{out}.txt", "w") as log:
                if self.stopped:
                    return False
                argv = [sys.executable, *job.argv, "--out", out]
                process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
                self.running.append(process)
            process.wait()
        found, took = result(job), time.monotonic() - began
        with self.lock:
            if not found:
                last = ["nothing", *Path(f"{out}.txt").read_text().split("\n")][-2]
                self.stop(f"{out.name}: {last} (all of it: {out}.txt)")
                return False
            found.pop("weights", None)  # a path
            self.results[data][out.name] = found
            text = json.dumps(self.results[data], indent=0)
            pretrain.write_text(self.args.out / data / "results.json", text)
            self.left -= 1
            if took > 5:  # it was not there already
                self.spent, self.timed = self.spent + took, self.timed + 1
            hours = self.left * self.spent / max(1, self.timed) / max(1, len(self.cores)) / 3600
            print(f"{data}/{out.name} {found}\n{self.left} commands left, at most {hours:.1f} h",
                  flush=True)
        return True

    def stop(self, why="stopped: the same command goes on"):
        """Every command saves and leaves."""
        with self.lock:
            self.stopped = self.stopped or why
            for process in self.running:
                process.terminate()


# --- Tables ---

def spread(values):
    """Mean ± the sample's deviation."""
    more = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{more}"


def by_seed(results, data, measure):
    """{arm: a number for each pre-training seed}, the mean over its fine-tunings."""
    found, most = {}, max(SETS[data].get("labels", {0: 0}))
    for folder, r in results.items():
        kind, arm, seed, *more = folder.split("-")
        if measure in r and (measure != "top1" or more[:1] == [str(most)]):
            found.setdefault(arm, {}).setdefault(seed, []).append(r[measure])
    return {arm: [statistics.mean(x) for x in seeds.values()] for arm, seeds in found.items()}


def verdict(claim, found):
    """The rule above on {arm: numbers} -> its word."""
    several = [x for x in found.values() if len(x) > 1]
    freedom = sum(len(x) - 1 for x in several)
    told = {True: 0, False: 0}
    if freedom:
        s = math.sqrt(sum(statistics.variance(x) * (len(x) - 1) for x in several) / freedom)
        for better, worse in claim.pairs:
            if better in found and worse in found:
                a, b = found[better], found[worse]
                lead = statistics.mean(a) - statistics.mean(b)
                if abs(lead) > 2 * s * math.sqrt(1 / len(a) + 1 / len(b)):
                    told[(lead > 0) != (claim.measure in LESS)] += 1
    if told[True] and not told[False] and 2 * told[True] >= len(claim.pairs):
        return "holds"
    return "does not" if told[False] > told[True] else "cannot be told"


def claims_table(results, claims=CLAIMS):
    """{set: {folder: result}} -> Markdown, a row for each claim and set that was tried."""
    rows = [["claim", "the paper's", "on", "ours", ""]]
    for claim in claims:
        for data in claim.sets.split():
            found = by_seed(results.get(data, {}), data, claim.measure)
            arms = [arm for arm in claim.arms() if arm in found]
            if any(a in found and b in found for a, b in claim.pairs):
                ours = ", ".join(f"`{arm}` {spread(found[arm])}" for arm in arms)
                theirs = claim.paper
                if claim.measure == "top1" and not theirs:
                    theirs = ", ".join(str(PAPER.get(arm, "-")) for arm in arms)
                rows.append([f"{claim.says} ({claim.place})", theirs, data,
                             f"{MEASURES[claim.measure]}: {ours}", f"**{verdict(claim, found)}**"])
    return markdown(rows)


def table(results, data):
    """{folder: result} -> Markdown, the tasks by their accuracy with the most labels."""
    if "heads" in SETS[data]:
        return dense_table(results, data)
    labels, found = SETS[data]["labels"], {}
    for folder, r in results.items():
        kind, task, _, *more = folder.split("-")
        names = {"pretrain": ["images"], "probe": ["knn", "linear"],
                 "finetune": ["top1"] * bool(more)}.get(kind, [])
        for name in names * ("." not in task):
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


# --- The sheet of figures ---

def sheet(args, width=1320):
    """The six analyses of seed 0 on the built-in pictures, in one picture `width` pixels wide: of
    what is in --out for the ViT, and in occlusion and below for the ResNet.
    """
    from PIL import Image

    import analyze
    import matplotlib  # noqa: F401  without it there is nothing to put together
    tasks = dict(shapes=("mask", "zoom_in_mask", "a2mim"),
                 resnet18=("simmim", "a2mim", "mask.hole"))
    rows, out = [], args.out / "figures"
    for data, arms in tasks.items():
        runs = args.out / data
        before = [runs / f"pretrain-{arm}-0" for arm in arms]
        after = [runs / f"finetune-{arm}-0-100-0" for arm in (*arms, "none")]
        after.append(runs / "finetune-supervised-0")
        before, after = ([x for x in some if x.exists()] for some in (before, after))
        of = dict(reconstruct=[*before, "--rows", 4], curves=[*before, *after], occlusion=after,
                  interaction=after, fourier=[*before, "none"], variance=[*before, "none"])
        wanted = ["reconstruct", "curves", "occlusion interaction"]
        if data == "resnet18":
            wanted = ["occlusion interaction", "fourier variance"]
        for names in wanted if before and after else []:
            parts = []
            for name in names.split():
                code = analyze.main([name, *map(str, of[name]), "--resume", "--out",
                                     str(out / data)])
                pretrain.check(not code, f"{name}: {code}")
                parts.append(Image.open(out / data / f"{name}.png").convert("RGB"))
            size = sum(x.width for x in parts), max(x.height for x in parts)
            row = Image.new("RGB", size, "white")
            for i, x in enumerate(parts):
                row.paste(x, (i * parts[0].width, 0))
            size = width, round(row.height * width / row.width)
            rows.append((names + " of a ResNet" * (data == "resnet18"),
                         row.resize(size, Image.Resampling.LANCZOS)))
    page = analyze.stacked(rows)
    pretrain.write_whole(out / "figures.png", lambda file: page.save(file, "PNG", optimize=True))
    print(f"drawn: {out / 'figures.png'}")


def panels(args):
    """PANELS on the built-in pictures, ours on the left axis, the paper's on the right."""
    from matplotlib import pyplot as plt
    results = json.loads((args.out / "shapes/results.json").read_text())
    found = by_seed(results, "shapes", "top1")
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), layout="constrained")
    for ax, (title, arms) in zip(axes.flat, PANELS.items()):
        ours = {t: found[arm] for t, arm in arms.items() if arm in found}
        theirs = {t: PAPER[arm] for t, arm in arms.items() if arm in PAPER and "A2" not in title}
        ax.set_title(title)
        ax.set_xticks(range(len(arms)), arms, rotation=45 * (len(arms) > 5))
        x = [list(arms).index(t) for t in ours]
        ax.errorbar(x, [statistics.mean(v) for v in ours.values()],
                    [statistics.stdev(v) if len(v) > 1 else 0 for v in ours.values()], fmt="o-")
        ax.set_ylabel("ours, 1,000 labels, %", color="C0")
        if theirs:
            right = ax.twinx()
            right.plot([list(arms).index(t) for t in theirs], theirs.values(), "s--", color="C1")
            right.set_ylabel("the paper's, ImageNet, %", color="C1")
    pretrain.write_whole(args.out / "figures/claims.png", figure.savefig)


def main(argv=None):
    args = options(argv)
    if args.sheet:
        sheet(args)
        return panels(args)
    if args.download:
        pretrain.load_data(pretrain.options(f"--data fashion_mnist --download --root {args.root}"
                                            .split()), pretrain.set_up("cpu"))
    todo = {e: jobs(args, *e) for e in encoders(args)}
    work = Work(args, todo)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: work.stop())
    print(f"{len(todo)} encoders, {work.left} commands, {len(work.cores)} cores -> {args.out}",
          flush=True)
    with concurrent.futures.ThreadPoolExecutor(len(work.cores)) as pool:
        for done in [pool.submit(work.encoder, e[0], todo[e]) for e in todo]:
            if done.exception():  # a full disk: the other commands save and leave
                work.stop()
            done.result()
    text = "\n\n".join([claims_table(work.results), *(f"{data}:\n\n{table(found, data)}"
                                                      for data, found in work.results.items())])
    pretrain.write_text(args.out / "claims.md", text + "\n")
    print(text)
    if work.stopped:
        raise pretrain.Failed(work.stopped)


if __name__ == "__main__":
    sys.exit(pretrain.command(main))
