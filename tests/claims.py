"""Is it true? What the two papers claim, tried at the size of a laptop.

    python tests/claims.py --download                   every set, what matters most first
    python tests/claims.py --data shapes --only integrated fill         some claims
    python tests/claims.py --data shapes --share 0.05   a twentieth of all steps, to try
    python tests/claims.py --sheet                      only tables and figures of what is there

A claim is a row of CLAIMS: pairs of arms, of which the paper has the first ahead. An arm is one
way to pre-train: a task, or TASK.NAME with other settings (VARIANTS) or another length (LENGTHS).
All full-length arms of a set get about the same time on a core. It is given in steps: an encoder
that drops 75% of the patches gets 2.8 times as many, each that much shorter (tests/bench.py
budget), and so sees 2.8 times the images. No setting is tuned to an arm.

A task's encoder is measured by k-NN and a linear probe (probe.py), and by fine-tuning with 100
labels a class (finetune.py). Its seed draws these. An encoder of TASK.NAME is measured only by what
its claims ask for. Some ask for more: detection, segmentation, two blocks on frozen tokens, A2's
figures. For A2's Fig. 1 an encoder is first fine-tuned with all labels. `supervised` is random
weights fine-tuned so. A2's ablations of a ResNet are judged by the linear probe.

The rule. Two arms differ when their means differ by more than t standard errors of that difference.
The error takes both arms to have one deviation over seeds, pooled: an arm of one seed borrows the
other's. t is Student's at 5%, two-sided: 2.8 for three seeds and three, 3.2 for three
and two, 4.3 for two and two, three and one, or three and a number that the claim names. It is not
corrected for the number of pairs. A claim `holds` if all of its pairs differ in the paper's
direction, and `in part` if some do. It `does not` if some differ in the other direction and none in
the paper's. Else it `cannot be told`, or has `too few seeds` where a pair has one seed a side. A
row is shown when all of its arms are run. An arm of a claim with `seeds` 3 is asked for three
pre-training seeds, as are `none` and the better arm of any other; the rest for one (no ±).

By estimate two cores with bf16 take a day and a half for all, without it most of a week. An
encoder of the built-in pictures takes a core 14 minutes with its measurements.
One arm is at work on each core. Every part is a run in --out/SET. What was stopped goes on where it
was. A change of the code is not noticed: delete the runs that it changes. To make an encoder anew,
delete what was measured of it too. Numbers are in --out/SET/results.json, tables in
--out/claims.md. The results page has copies: .github/results/SET.json is a results.json, its tables
are those of claims.md. Where --out has no numbers, --sheet takes these.
"""
import collections
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
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # before torch, whose threads it sets
import degrade
import models

# Steps where 75% of the patches are dropped, and where fewer are
SETS = {"shapes": dict(size=32, steps=(2100, 750)),
        "resnet18": dict(size=64, patch=8, model="resnet18", steps=(500, 500)),
        "fashion_mnist": dict(size=32, steps=(4200, 1500))}  # longer than shapes'
LABELS = 100  # a class
# Of scenes, what a claim's measure asks for: the head, the size (a ResNet's is twice it), the steps
HEADS = dict(miou=("segment", 48, 400), box_ap=("detect", 64, 500))
# ImageNet top-1 of ViT-B/16 by arm: BM Table 1 (distort: Table 2, with missing pixels), A2 Table 2
PAPER = {"none": 80.7, "mask": 82.9, "zoom_in": 82.7, "zoom_out": 82.2, "distort": 82.5,
         "blur": 81.8, "decolor": 81.4, "zoom_in_mask": 83.2, "simmim": 83.8, "a2mim": 84.2,
         # BM 4.2, Table 2, A.3, Fig. 5
         "mask.block": 82.3, "zoom_in.96": 82.2, "zoom_in.128": 82.3, "zoom_in.192": 82.5,
         "zoom_in.208": 82.3, "zoom_out.96": 81.9, "zoom_out.128": 82.0, "zoom_out.192": 82.1,
         "zoom_out.none": 79.9, "zoom_out.black": 80.0, "zoom_out.other": 80.5,
         "distort.weak": 82.3, "distort.strong": 82.3, "distort.wave": 81.9, "blur.5": 80.9,
         "blur.7": 81.5, "blur.11": 81.0, "zoom_in_mask.1of6": 82.7, "zoom_in_mask.1of3": 83.0}
# A2 5.4: of its Fig. 6 only these two are in the text, of a ResNet-50 fine-tuned on IN-100
PAPER_A2 = {"simmim": 87.75, "simmim.mean": 88.14}
# BM Table 3, A2 Tables 4 (ViT-B) and 3 (ResNet-50): mean IoU on ADE20K, box AP, mask AP on COCO
PAPER_DENSE = {
    "shapes": {"mask": "45.6, 45.3, 40.2", "zoom_in": "44.8, 44.2, 39.4",
               "zoom_in_mask": "46.2, 46.1, 40.9", "simmim": "A2: 48.4, 48.9, 43.0",
               "a2mim": "A2: 49.0, 49.3, 43.5", "supervised": "A2: 47.0, 47.9, 42.9"},
    "resnet18": {"supervised": "A2: 36.1, 38.2, 33.3", "a2mim": "A2: 38.3, 39.8, 34.9"}}

# TASK.NAME: the settings of an arm. [n]: so many of 224 pixels.
VARIANTS = {
    "mask.block": "--mask_kind block", "a2mim.hole": "--mask_kind hole --mask_ratio 0.25",
    "mask.inner": "--mask_kind center --mask_ratio 0.49",
    "zoom_in.random": "--zoom_at random", "distort.wave": "--warp wave",
    **{f"zoom_in.{n}": f"--zoom_size [{n}]" for n in (96, 128, 192, 208)},
    **{f"zoom_out.{n}": f"--zoom_size [{n}]" for n in (96, 128, 192)},
    **{f"zoom_out.{fill}": f"--zoom_fill {fill}" for fill in ("none", "black", "other")},
    "distort.weak": "--twist 0.15 0.20", "distort.strong": "--twist 0.25 0.30",
    **{f"blur.{k}": f"--blur_kernel {k}" for k in (5, 7, 11)},
    "blur.kaiming": "--blur_init kaiming",
    "decolor.0": "--saturation 0", "decolor.60": "--saturation 0.6",
    # A2 Fig. 6: from SimMIM to A2MIM, without its frequency loss
    "simmim.mean": "--fill mean --token_at none",
    "simmim.input": "--fill mean --token_how add",
    "simmim.middle": "--fill mean --token_how add --token_at middle",
    "simmim.replace": "--fill mean --token_at middle",
    "simmim.zero": "--fill zero --token_how add --token_at middle",
    # A2 Table 5: its first three rows are without the token, and the first is `simmim.mean`
    "a2mim.no_omega": "--token_at none --freq_alpha 0",
    "a2mim.no_token": "--token_at none",
}
LENGTHS = {"1of6": 1 / 6, "1of3": 1 / 3, "2of3": 2 / 3}  # TASK.LENGTH
# What a claim is about: the key in a result, and its name.
MEASURES = dict(top1="fine-tuned", linear="linear probe", box_ap="box AP", miou="mean IoU",
                mended="of the probe's errors, mended, %",
                kept="accuracy above chance kept, %, mean over the shares dropped",
                middle="orders .05 to .5, %", middle_resnet="orders .1 to .55, %",
                low_pass="high frequencies", variance="variance")
LESS = ("low_pass", "variance", "mended")  # the better has less of it
# Student's t at 5%, two-sided, by degrees of freedom: the seeds of both arms, less two
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
# analyze.py's commands, what is taken from their numbers {..} of one run (of Fig. 3 the mean over
# depth), and of which runs: those fine-tuned, or the encoders
FIGURES = {
    # above chance, of ten classes; the first share is 0
    "kept": ("occlusion", lambda r: 100 * (statistics.mean(r["mean"][1:]) - 10)
             / max(1, r["intact"] - 10), True),
    "middle": ("interaction", lambda r: r["share_05_to_50"], True),
    "middle_resnet": ("interaction", lambda r: r["share_10_to_55"], True),
    "low_pass": ("fourier", lambda r: statistics.mean(x[-1] for x in r["mean"]), False),
    "variance": ("variance", lambda r: statistics.mean(x[0] for x in r["mean"]), False)}


class Claim(NamedTuple):
    name: str
    place: str
    says: str
    sets: str
    measure: str  # of MEASURES
    pairs: list  # (better, worse) arms; the worse may be a number
    seeds: int = 1  # of its arms; `none` and the first pair's better arm have three
    paper: str = ""  # its numbers, if they are not PAPER's

    def arms(self):
        sides = itertools.chain(*zip(*self.pairs))
        return list(dict.fromkeys(x for x in sides if isinstance(x, str)))

    def on(self, data):
        """The claim as it is tried on a set."""
        pairs = [p for p in self.pairs if not any(absent(data, str(x)) for x in p)]
        # a ResNet of random weights is fine-tuned to 99%, which leaves A2's ablations no room
        ablation = data == RESNET and self.sets == NETWORKS and self.measure == "top1"
        return self._replace(pairs=pairs, measure="linear" if ablation else self.measure)

    def asks_for(self, arm, seed):
        always = arm in ("none", self.pairs[0][0])  # three seeds, for want of an error
        return arm in self.arms() and (always or seed < self.seeds)


def over(better, *worse):
    """One arm better than each of the others."""
    return [(better, other) for other in worse]


BOTH, RESNET, NETWORKS = "shapes fashion_mnist", "resnet18", "shapes resnet18"
BM_TASKS = "zoom_in_mask", "mask", "zoom_in", "distort", "zoom_out", "blur", "decolor"
DENSE_TASKS = "zoom_in_mask", "mask", "zoom_in", "a2mim"
CLAIMS = [  # what matters most first
    Claim("integrated", "BM Table 1", "masking and zooming in together beat masking", BOTH, "top1",
          over("zoom_in_mask", "mask"), 3),
    Claim("pays", "BM Tables 1, 2", "every task beats random weights", BOTH, "top1",
          [(task, "none") for task in BM_TASKS], 3),
    Claim("order", "BM Tables 1, 2", "the order of the tasks", BOTH, "top1",
          [*itertools.combinations((*BM_TASKS, "none"), 2)], 3),
    Claim("a2mim", "A2 Table 2", "a2mim beats simmim", BOTH, "top1", over("a2mim", "simmim"), 3),
    Claim("pays_resnet", "our question", "masked modelling beats random weights", RESNET, "top1",
          [("a2mim", "none"), ("simmim", "none")], 3, "-"),
    Claim("a2mim_resnet", "A2 Table 1", "a2mim beats simmim", RESNET, "top1",
          over("a2mim", "simmim"), 3, "ResNet-50: 78.8, 78.2"),
    Claim("linear", "BM 5", "zoom_in_mask beats mask in a linear probe", BOTH, "linear",
          over("zoom_in_mask", "mask"), 3, "63.1, 61.5"),
    Claim("linear_resnet", "A2 Table 1", "a2mim beats simmim in a linear probe", RESNET, "linear",
          over("a2mim", "simmim"), 3, "ResNet-50: 48.1, 47.5"),
    Claim("early", "our question, after BM Fig. 5", "zoom_in_mask beats mask at 1/6, 1/3, 2/3 of "
          "the length", BOTH, "top1", [(f"zoom_in_mask.{n}", f"mask.{n}") for n in LENGTHS], 3),
    Claim("random", "BM 4.2", "random masks beat a visible block", BOTH, "top1",
          over("mask", "mask.block"), 3),
    Claim("mirror", "BM A.3", "zooming out: a mirrored canvas beats none, black, another image",
          BOTH, "top1", over("zoom_out", "zoom_out.none", "zoom_out.black", "zoom_out.other"), 3),
    Claim("detection", "BM Table 3", "zoom_in_mask beats mask in detection", "shapes", "box_ap",
          over("zoom_in_mask", "mask"), 3, "46.1, 45.3"),
    Claim("detection_mask", "BM Table 3", "mask beats zoom_in in detection", "shapes", "box_ap",
          over("mask", "zoom_in"), 3, "45.3, 44.2"),
    Claim("segmentation", "BM Table 3", "zoom_in_mask beats mask in segmentation", "shapes", "miou",
          over("zoom_in_mask", "mask"), 3, "46.2, 45.6"),
    Claim("segmentation_mask", "BM Table 3", "mask beats zoom_in in segmentation", "shapes", "miou",
          over("mask", "zoom_in"), 3, "45.6, 44.8"),
    Claim("detection_a2", "A2 Table 4", "a2mim beats simmim, mask (A2: MAE) and supervised "
          "pre-training in detection", "shapes", "box_ap",
          over("a2mim", "simmim", "mask", "supervised"), 3, "49.3, 48.9, 48.5, 47.9"),
    Claim("segmentation_a2", "A2 Table 4", "a2mim beats simmim, mask (A2: MAE) and supervised "
          "pre-training in segmentation", "shapes", "miou",
          over("a2mim", "simmim", "mask", "supervised"), 3, "49.0, 48.4, 48.1, 47.0"),
    Claim("detection_resnet", "A2 Table 3", "a2mim beats supervised pre-training in detection",
          RESNET, "box_ap", over("a2mim", "supervised"), 3, "ResNet-50: 39.8, 38.2"),
    Claim("segmentation_resnet", "A2 Table 3", "a2mim beats supervised pre-training in "
          "segmentation", RESNET, "miou", over("a2mim", "supervised"), 3, "ResNet-50: 38.3, 36.1"),
    Claim("detection_pays", "our question", "pre-training beats random weights in detection",
          NETWORKS, "box_ap", [(task, "none") for task in DENSE_TASKS], 3, "-"),
    Claim("segmentation_pays", "our question", "pre-training beats random weights in segmentation",
          NETWORKS, "miou", [(task, "none") for task in DENSE_TASKS], 3, "-"),
    Claim("fill", "A2 5.4", "hidden patches: the mean colour beats SimMIM's token", NETWORKS,
          "top1", over("simmim.mean", "simmim"), 3, "ResNet-50: 88.14, 87.75"),
    Claim("zero", "A2 Fig. A2", "under the token the mean colour beats zero (A2: has fewer "
          "artifacts)", RESNET, "linear", over("simmim.middle", "simmim.zero"), 3),
    Claim("middle", "A2 Fig. 6", "the token in the middle beats it at the input", NETWORKS, "top1",
          over("simmim.middle", "simmim.input"), 3),
    Claim("freq", "A2 Table 5", "the frequency loss helps", NETWORKS, "top1",
          over("a2mim.no_token", "simmim.mean"), 3,
          "ViT-S: 86.41, 85.17; ResNet-50: 88.73, 88.19"),
    Claim("occlusion", "A2 Fig. 1 a", "masked modelling stands occlusion better than training from "
          "random weights", "shapes", "kept",
          [(task, "supervised") for task in ("mask", "zoom_in_mask", "a2mim")], 3),
    Claim("occlusion_resnet", "A2 Fig. 1 c", "masked modelling stands occlusion better than "
          "training from random weights", RESNET, "kept", over("a2mim", "supervised"), 3),
    Claim("fourier", "A2 Fig. 3a", "masked modelling and inpainting filter high frequencies more "
          "than supervised training", RESNET, "low_pass",
          [("a2mim", "supervised"), ("a2mim.hole", "supervised")], 3),
    Claim("variance", "A2 Fig. 3b", "masked modelling has less variance than supervised training "
          "and inpainting", RESNET, "variance", over("a2mim", "supervised", "a2mim.hole"), 3),
    Claim("interaction", "A2 Fig. 1 e", "masked modelling strengthens the middle orders, against "
          "training from random weights", "shapes", "middle",
          [("mask", "supervised"), ("a2mim", "supervised")], 3),
    Claim("interaction_resnet", "A2 Fig. 1 g", "masked modelling strengthens the middle orders, "
          "against training from random weights", RESNET, "middle_resnet",
          over("a2mim", "supervised"), 3),
    Claim("centre", "BM A.3", "zooming in: the centre beats a random place", BOTH, "top1",
          over("zoom_in", "zoom_in.random"), 1, "82.5, 81.5"),
    Claim("scale_in", "BM Table 2", "zooming in: 160 of 224 pixels are best", BOTH, "top1",
          over("zoom_in", "zoom_in.96", "zoom_in.128", "zoom_in.192", "zoom_in.208")),
    Claim("inner", "BM A.3", "zooming in beats predicting the outer patches", BOTH, "top1",
          over("zoom_in", "mask.inner"), 1, "82.5, 82.3"),
    Claim("scale_out", "BM Table 2", "zooming out: 160 of 224 pixels are best", BOTH, "top1",
          over("zoom_out", "zoom_out.96", "zoom_out.128", "zoom_out.192")),
    Claim("twist", "BM Table 2", "a twist of .20 to .25 is best", BOTH, "top1",
          over("distort", "distort.weak", "distort.strong")),
    Claim("wave", "BM A.3", "the fisheye beats a wave (BM: 82.1, no pixels lost)", BOTH, "top1",
          over("distort", "distort.wave")),
    Claim("kernel", "BM Table 2", "a blur of 9 x 9 is best", BOTH, "top1",
          over("blur", "blur.5", "blur.7", "blur.11")),
    Claim("kaiming", "BM A.1", "Kaiming's blur is worse than nothing", BOTH, "top1",
          over("none", "blur.kaiming")),
    Claim("saturation", "BM Table 2", "30% of the saturation are best", "shapes", "top1",
          over("decolor", "decolor.0", "decolor.60")),
    Claim("adding", "A2 Fig. 6", "adding the token beats replacing by it", NETWORKS, "top1",
          over("simmim.middle", "simmim.replace")),
    Claim("token", "A2 Table 5", "the token helps", NETWORKS, "top1",
          over("a2mim", "a2mim.no_token"), 1, "ViT-S: 86.62, 86.41; ResNet-50: 88.86, 88.73"),
    Claim("blocks", "BM 5", "two blocks on frozen tokens mend little of the linear probe's errors "
          "(less than 10%, we say)", "shapes", "mended",
          [("mask", 10.0), ("zoom_in_mask", 10.0)], 3, "4.7 (61.5 to 63.3), 4.3 (63.1 to 64.7)"),
    Claim("omega", "A2 Table 5", "weighing the frequencies helps", NETWORKS, "top1",
          over("a2mim.no_token", "a2mim.no_omega"), 1,
          "ViT-S: 86.41, 86.05; ResNet-50: 88.73, 88.47"),
]
# Figures of several arms: {title: arms, those of a second line after ";"}. A tick is what follows
# the task's name, if something does
PANELS = {
    "BM Table 2: zoom in to (zoom_in: 160)":
        "zoom_in.96 zoom_in.128 zoom_in zoom_in.192 zoom_in.208",
    "BM Table 2: zoom out to (zoom_out: 160)": "zoom_out.96 zoom_out.128 zoom_out zoom_out.192",
    "BM Table 2: twist (distort: .20 to .25)": "distort.weak distort distort.strong",
    "BM Table 2: blur (blur: 9)": "blur.5 blur.7 blur blur.11",
    "BM A.3: round the small image": "zoom_out zoom_out.none zoom_out.black zoom_out.other",
    "BM Fig. 5: length": ";".join(f"{t}.1of6 {t}.1of3 {t}.2of3 {t}"
                                  for t in ("zoom_in_mask", "mask")),
    "BM Tables 1, 2": " ".join(("none", *BM_TASKS[::-1])),
    "A2 Fig. 6: the token": "simmim simmim.mean simmim.input simmim.middle simmim.replace",
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
    o("--seeds", type=int, choices=(1, 2, 3), default=3, help="at most")
    o("--share", type=float, default=1.0, help="of all steps, to try")
    o("--sheet", action="store_true", help="run nothing: the tables and the papers' figures")
    args = p.parse_args(argv)
    trial = "" if args.share == 1 else f"-{args.share:g}"  # must not be taken for the table
    args.out = (args.out or Path(f"runs/claims{trial}")).resolve()
    args.root = args.root.resolve()
    args.claims = [c for c in CLAIMS if not args.claims or c.name in args.claims]
    return args


def absent(data, arm):
    """Whether an arm is not tried on a set: no colours to lose; BM's task on a ResNet, for time."""
    task = arm.split(".")[0]
    return (data, task) == ("fashion_mnist", "decolor") or data == RESNET and task in BM_TASKS


def encoders(args):
    """(set, arm, seed) of each: claims of three seeds first, in these set by set, seed by seed."""
    found = {}  # in order
    for seeds, data, seed in itertools.product((3, 1), args.data, range(args.seeds)):
        for claim in args.claims:
            if data in claim.sets.split() and claim.seeds == seeds:
                claim = claim.on(data)
                found |= {(data, a, seed): None for a in claim.arms() if claim.asks_for(a, seed)}
    return list(found)


class Job(NamedTuple):
    """One command."""
    folder: Path
    right: dict  # what its result says
    argv: list
    figure: str = ""  # of FIGURES

    @property
    def kind(self):
        """Commands of a kind take about the same time."""
        return self.folder.parent, self.argv[0], self.right.get("steps"), "--head" in self.argv


def jobs(args, data, arm, seed):
    """The Jobs of one encoder, in order."""
    d, found, out = SETS[data], [], args.out / data
    size, patch = d["size"], d.get("patch", 4)
    trained_on = "fashion_mnist" if data == "fashion_mnist" else "shapes"
    task, _, variant = arm.partition(".")
    network = ["--model", d.get("model", "vit_micro"), "--img_size", size, "--patch_size", patch]
    machine = ["--root", args.root, "--device", "cpu", "--workers", 0]
    weights = out / f"pretrain-{arm}-{seed}"

    def add(script, name, steps, own_seed, *more, on=trained_on):
        argv = [f"{script}.py", "--data", on, *machine, *network, "--seed", own_seed, *more]
        if steps:
            steps = max(1, round(steps * args.share))
            argv += ["--steps", steps, "--resume"]
        folder = out / f"{script}-{arm}-{seed}{name}"
        argv = [*map(str, argv)]
        right = dict(steps=steps, command=" ".join([*argv, "--out", str(folder)]))
        found.append(Job(folder, right, argv))

    def tune_with_all_labels(of):
        add("finetune", "-all", 2 * steps, seed, "--weights", of, "--save_every", 100000)
        return found[-1].folder

    longer, steps = d["steps"]
    if arm == "none":
        weights = "none"
    elif arm == "supervised":
        weights = tune_with_all_labels("none")
    else:
        text = VARIANTS.get(arm, "")
        drops = degrade.TASKS[task].mask_ratio == 0.75 and "ratio" not in text
        n = (longer if drops else steps) * LENGTHS.get(variant, 1)
        text = re.sub(r"\[(\d+)\]", lambda m: str(round(int(m[1]) * size / 224)), text)
        more = f"--task {task} --batch_size 128 --lr 3e-3 --save_every 1000"
        add("pretrain", "", n, seed, *more.split(), *text.split())
    wanted = {c.on(data).measure for c in args.claims
              if data in c.sets.split() and c.asks_for(arm, seed)}
    if not variant and arm != "supervised":  # what the table of tasks shows
        wanted |= {"linear", "top1"}
    if "linear" in wanted:
        add("probe", "", None, seed, "--weights", weights)
    if "top1" in wanted:
        add("finetune", f"-{LABELS}", 500, seed, "--weights", weights, "--labels", LABELS,
            "--save_every", 100000)
    if "mended" in wanted:
        add("probe", "-blocks", None, seed, "--weights", weights, "--blocks", 2)
    for head, side, n in (HEADS[x] for x in HEADS if x in wanted):
        add("finetune", f"-{head}", n, seed, "--weights", weights, "--head", head,
            "--img_size", side * size // 32, "--save_every", 100000, on="scenes")
    figures, tuned = [x for x in FIGURES if x in wanted], weights
    if arm != "supervised" and any(FIGURES[x][2] for x in figures):
        tuned = tune_with_all_labels(weights)
    for measure in figures:
        name, _, of_tuned = FIGURES[measure]
        of = tuned if of_tuned else weights
        argv = ["analyze.py", name, of, *machine]
        right = dict(weights=str(of))
        if name == "interaction":  # noise: a curve's a tenth at most, a pair's .07 to .34
            right.update(images=8, pairs=4, contexts=400)
            argv += ["--images", 8, "--pairs", 4, "--contexts", 400]
        found.append(Job(out / f"{name}-{arm}-{seed}", right, [*map(str, argv)], measure))
    return found


def in_order(*files):
    """Whether the files that are there were made in this order."""
    made = [x.stat().st_mtime for x in files if x.exists()]
    return made == sorted(made)


def result(job):
    """What a finished run found. None: it is not `right`, or its encoder is newer."""
    folder = job.folder
    try:
        if job.figure:
            name, taken, _ = FIGURES[job.figure]
            file = folder / f"{name}.json"
            held = json.loads(file.read_text())
            run, = held["runs"].values()
            right = in_order(Path(run["weights"], "checkpoint.pt"), file)
            right = right and job.right.items() <= {**held["settings"], **run}.items()
            noise = {"noise": round(run["noise"], 3)} if "noise" in run else {}
            return {job.figure: round(taken(run), 4)} | noise if right else None
        config = json.loads((folder / "config.json").read_text())
        found = {k: config.get(k) for k in ("data", "seed", "amp", "hardware", "commit")}
        encoder, file = Path(config["weights"], "checkpoint.pt"), folder / "result.json"
        if file.exists():
            found |= json.loads(file.read_text())
            if "nonlinear" in found:  # the plain probe has the rest
                linear, _ = found.pop("linear"), found.pop("knn")
                found["mended"] = 100 * (found["nonlinear"] - linear) / max(0.01, 100 - linear)
        else:  # a pre-training
            found |= [line for line in pretrain.read_log(folder) if "loss" in line][-1]
            found.update(task=config["task"], steps=models.read_weights(folder)["step"],
                         images=config["batch_size"] * config["total"])
        right = in_order(encoder, folder / "checkpoint.pt", file)
        said = config | found
        found.pop("weights", None)  # a path
        if right and all(said.get(k) == v for k, v in job.right.items()):
            return found
    except (OSError, ValueError, LookupError):
        return None


def results_in(folder, name="{}/results.json"):
    """What has been found, {set: {folder: result}}."""
    files = {data: folder / name.format(data) for data in SETS}
    return {data: json.loads(x.read_text()) if x.exists() else {} for data, x in files.items()}


class Work:
    """Runs the commands, an encoder on each core."""

    def __init__(self, args, todo):
        self.args, self.results = args, results_in(args.out)  # what is not asked for now stays
        self.lock, self.running, self.stopped = threading.RLock(), [], ""
        for data in SETS:
            (args.out / data).mkdir(parents=True, exist_ok=True)
        for (data, *_), all_jobs in todo.items():
            for job in all_jobs:  # what has been deleted is out of the tables until it is done
                if not result(job):
                    self.results[data].pop(job.folder.name, None)
        self.cores = [*os.sched_getaffinity(0)] if hasattr(os, "sched_getaffinity") else [None]
        self.workers, self.took = len(self.cores), {}  # seconds of commands, by kind
        self.left = collections.Counter(job.kind for jobs in todo.values() for job in jobs)

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
        out, began, there = job.folder, time.monotonic(), result(job)
        if not there:
            with self.lock, open(f"{out}.txt", "w") as log:
                if self.stopped:
                    return False
                argv = [sys.executable, *job.argv, "--out", out]
                process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log)
                self.running.append(process)
            process.wait()
        found = there or result(job)
        with self.lock:
            if not found:
                last = ["nothing", *Path(f"{out}.txt").read_text().split("\n")][-2]
                if process.returncode == 0:
                    last = "older than its encoder, or of another command: delete it"
                self.stop(f"{out.name}: {last} (all of it: {out}.txt)")
                return False
            self.results[data][out.name] = found
            text = json.dumps(self.results[data], indent=0)
            pretrain.write_text(self.args.out / data / "results.json", text)
            self.left[job.kind] -= 1
            if not there:
                self.took.setdefault(job.kind, []).append(time.monotonic() - began)
            said = f"{data}/{out.name} {found}\n{self.left.total()} commands left"
            if self.took:
                mean = {kind: statistics.mean(seconds) for kind, seconds in self.took.items()}
                usual = statistics.mean(mean.values())
                hours = sum(n * mean.get(kind, usual) for kind, n in self.left.items()) / 3600
                said += f", {hours / self.workers:.1f} h"
            print(said, flush=True)
        return True

    def stop(self, why="stopped: the same command goes on"):
        """Every command saves and leaves."""
        with self.lock:
            self.stopped = self.stopped or why
            for process in self.running:
                process.terminate()


# --- Tables ---

def spread(values, digits=1):
    """Mean ± the sample's deviation."""
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def by_seed(results, measure):
    """{arm: a number for each pre-training seed}."""
    found = {}
    for folder, r in results.items():
        _, arm, seed, *more = folder.split("-")
        if measure in r and (measure != "top1" or more == [str(LABELS)]):
            found.setdefault(arm, []).append(r[measure])
    return found


def verdict(claim, found):
    """The rule above on {arm: numbers} -> its word."""
    told, tried = {True: 0, False: 0}, 0
    for better, worse in claim.pairs:
        a, number = found.get(better, ()), isinstance(worse, float)  # it has no error
        b = [worse] if number else found.get(worse, ())
        freedom = len(a) + len(b) - 2
        if a and b and freedom:
            tried += 1
            squares = sum((len(x) - 1) * statistics.variance(x) for x in (a, b) if len(x) > 1)
            error = math.sqrt(squares / freedom * (1 / len(a) + (not number) / len(b)))
            lead = statistics.mean(a) - statistics.mean(b)
            if abs(lead) > STUDENT[freedom] * error:
                told[(lead > 0) != (claim.measure in LESS)] += 1
    if told[True] == len(claim.pairs):
        return "holds"
    if told[True]:
        return (f"in part: {told[True]} of {len(claim.pairs)} pairs, {told[False]} the other way "
                "round")
    if told[False]:
        return "does not"
    return "cannot be told" if tried == len(claim.pairs) else "too few seeds"


def claims_table(results):
    """{set: {folder: result}} -> Markdown, a row for each claim and set of which all arms are run.
    """
    rows, seen = [["claim", "the paper's", "on", "ours", "does it hold?"]], []
    for row in CLAIMS:
        for data in row.sets.split():
            claim = row.on(data)
            found = by_seed(results.get(data, {}), claim.measure)
            arms = claim.arms()
            if arms and all(arm in found for arm in arms):
                digits = 2 if claim.measure in LESS else 1
                ours = ", ".join(f"`{arm}` {spread(found[arm], digits)}" for arm in arms)
                theirs = claim.paper
                if row.measure == "top1" and not theirs:
                    theirs = ", ".join(str(PAPER.get(arm, "-")) for arm in arms)
                cells = [theirs, data, f"{MEASURES[claim.measure]}: {ours}"]
                shown = ["as above", data, "as above"] if cells in seen else cells
                seen.append(cells)
                rows.append([f"{claim.says} ({claim.place})", *shown,
                             f"**{verdict(claim, found)}**"])
    return markdown(rows)


def table(results, data):
    """{folder: result} -> Markdown, the tasks by their fine-tuned accuracy."""
    knn, linear, top1 = (by_seed(results, name) for name in ("knn", "linear", "top1"))
    order = sorted((t for t in top1 if "." not in t), key=lambda t: -statistics.mean(top1[t]))
    paper_of = PAPER if "model" not in SETS[data] else dict(simmim=78.2, a2mim=78.8)  # A2 Table 1
    ours = [t for t in order if t in paper_of and t not in ("simmim", "a2mim")]
    paper = sorted(ours, key=lambda t: -paper_of[t])

    rows = [["pre-training", "seeds", "images", "k-NN", "linear probe", f"{LABELS * 10:,} labels",
             "place", "BM's place among these (ImageNet)"]]
    for t in order:
        places = ["", f"A2: {paper_of[t]}" if t in paper_of else ""]
        if t in ours:
            places = [ours.index(t) + 1, f"{paper.index(t) + 1} ({paper_of[t]})"]
        images = results.get(f"pretrain-{t}-0", {}).get("images", 0)
        rows.append([f"`{t}`", len(top1[t]), f"{images:,}", spread(knn[t]), spread(linear[t]),
                     spread(top1[t]), *places])
    return markdown(rows)


def markdown(rows):
    """Rows, the first of them the head, as a table."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows).replace(" --- ", "---")


def dense_table(results, data):
    """The same of segmentation and detection."""
    names = dict(miou="mean IoU", pixel_accuracy="pixel accuracy", box_ap="box AP",
                 box_ap50="box AP50", mask_ap="mask AP")
    found = {name: by_seed(results, name) for name in names}
    rows = [["pre-training", "seeds", *names.values(), "ADE20K, COCO: mean IoU, box AP, mask AP"]]
    tasks = dict.fromkeys(t for of in found.values() for t in of)
    for task in sorted(tasks, key=lambda t: -statistics.mean(found["miou"].get(t, [0]))):
        row = [found[name].get(task, ()) for name in names]
        rows.append([f"`{task}`", max(map(len, row)), *(spread(x) if x else "" for x in row),
                     PAPER_DENSE[data].get(task, "")])
    return markdown(rows)


def tables(args, results):
    """{set: {folder: result}} -> claims.md in --out, also printed."""
    made = {tuple(str(r.get(k)) for k in ("commit", "hardware", "amp"))
            for found in results.values() for r in found.values() if "commit" in r}
    made = "; ".join(", ".join(x) for x in sorted(made))
    said = f"Commit, machine, precision: {made}. ± is over pre-training seeds."
    parts = [claims_table(results), said]
    for data, found in results.items():
        parts += [f"{data}:", table(found, data)] if found else []
        if any(HEADS.keys() & r.keys() for r in found.values()):
            parts.append(dense_table(found, data))
    text = "\n\n".join(parts)
    pretrain.write_text(args.out / "claims.md", text + "\n")
    print(text)


# --- The sheet of figures ---

def sheet(args):
    """What is in --out, seed 0, in one picture: what the encoders of the built-in pictures recover
    and how they learned, then the analyses that claims have measured, of the ViT and of the ResNet.
    """
    from PIL import Image

    import analyze
    out, drawn = args.out / "figures", []
    runs = [args.out / "shapes" / f"pretrain-{arm}-0" for arm in ("mask", "zoom_in_mask", "a2mim")]
    runs = [str(x) for x in runs if (x / "checkpoint.pt").exists()]
    for name, more in dict(reconstruct=["--rows", "4"], curves=[]).items() if runs else ():
        analyze.main([name, *runs, *more, "--resume", "--out", str(out)])
        drawn.append((name, out / f"{name}.png"))
    for name in ("occlusion", "interaction", "fourier variance"):
        parts, file = [], out / f"{name}.png"
        for data, one in itertools.product(("shapes", "resnet18"), name.split()):
            found = {}
            for numbers in sorted((args.out / data).glob(f"{one}-*-0/{one}.json")):
                run, = json.loads(numbers.read_text())["runs"].values()
                found[numbers.parent.name.split("-")[1]] = run
            network = SETS[data].get("model", "vit_micro")
            for panel in analyze.NAMES[one][2](found) if found else ():
                parts.append(dict(panel, title=f"{panel['title']}, {network}"))
        if parts:
            analyze.draw(parts, file)
            drawn.append((name, file))
    if not drawn:
        return print(f"{args.out} has no runs: figures.png is not drawn")
    rows = []
    for title, file in drawn:
        x = Image.open(file).convert("RGB")
        x.thumbnail((1320, x.height), Image.Resampling.LANCZOS)
        rows.append((title, x))
    page = analyze.stacked(rows)
    pretrain.write_whole(out / "figures.png", lambda file: page.save(file, "PNG", optimize=True))
    print(f"drawn: {out / 'figures.png'}")


def panels(args, results):
    """PANELS of which two arms are measured: ours on the left axis, the paper's on the right."""
    from matplotlib import pyplot as plt
    tried = []
    for data, measure in (("shapes", "top1"), (RESNET, "linear")):
        found = by_seed(results[data], measure)
        tried += [(f"{title}, {data}", measure, [line.split() for line in arms.split(";")], found)
                  for title, arms in PANELS.items()
                  if sum(arm in found for arm in re.split("[ ;]", arms)) > 1]
    if not tried:
        return
    rows, columns = math.ceil(len(tried) / 3), min(len(tried), 3)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False,
                                layout="constrained")
    for ax in axes.flat[len(tried):]:
        ax.axis("off")
    for ax, (title, measure, lines, found) in zip(axes.flat, tried):
        paper, of = PAPER, "ImageNet"
        if "A2" in title:
            paper, of = PAPER_A2 if measure == "linear" else {}, "ResNet-50, IN-100"
        places = [place for place in zip(*lines) if {*place} & {*found, *paper}]
        lines = [*zip(*places)]
        dash = "-" * ("Table 2" in title or "Fig. 5" in title)  # these arms differ by a number
        right = ax.twinx()
        right.set_visible(bool(paper))
        for arms, color in zip(lines, ("C0", "C1")):
            x = [i for i, arm in enumerate(arms) if arm in found]
            ours = [found[arms[i]] for i in x]
            error = [statistics.stdev(v) if len(v) > 1 else 0 for v in ours]
            ax.errorbar(x, [statistics.mean(v) for v in ours], error, fmt="o" + dash,
                        color=color, label=arms[-1])
            x = [i for i, arm in enumerate(arms) if arm in paper]
            right.plot(x, [paper[arms[i]] for i in x], "s" + 2 * dash, color=color, alpha=0.4)
        ticks = [arm.partition(".")[2] or arm for arm in lines[0]]
        ticks = ticks if len(lines) == 1 else [*ticks[:-1], "all"]
        ax.set_title(title)
        ax.set_xticks(range(len(ticks)), ticks, rotation=45 * (len(ticks) > 5))
        ax.set_ylabel(f"o: ours, {MEASURES[measure]}, %")
        right.set_ylabel(f"squares: the paper's, {of}, %")
        if len(lines) > 1:
            ax.legend(loc="lower right")
    pretrain.write_whole(args.out / "figures/claims.png",
                         lambda out: figure.savefig(out, format="png"))
    print(f"drawn: {args.out / 'figures/claims.png'}")


def main(argv=None):
    args = options(argv)
    if args.sheet:
        (args.out / "figures").mkdir(parents=True, exist_ok=True)
        results = results_in(args.out)
        if not any(results.values()):
            print(f"{args.out} has no numbers: these are the page's\n")
            results = results_in(ROOT / ".github/results", "{}.json")
        tables(args, results)
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return print("no figures without matplotlib: pip install matplotlib")
        panels(args, results)
        return sheet(args)
    if "fashion_mnist" in args.data:  # not found out after days
        asked = ["--data", "fashion_mnist", "--root", str(args.root)]
        pretrain.load_data(pretrain.options(asked + ["--download"] * args.download),
                           pretrain.set_up("cpu"))
    todo = {e: jobs(args, *e) for e in encoders(args)}
    work = Work(args, todo)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: work.stop())
    print(f"{len(todo)} encoders, {work.left.total()} commands, {work.workers} cores -> {args.out}",
          flush=True)
    with concurrent.futures.ThreadPoolExecutor(len(work.cores)) as pool:
        for done in [pool.submit(work.encoder, e[0], todo[e]) for e in todo]:
            if done.exception():  # a full disk: the other commands save and leave
                work.stop()
            done.result()
    tables(args, work.results)
    if work.stopped:
        raise pretrain.Failed(work.stopped)


if __name__ == "__main__":
    sys.exit(pretrain.command(main))
