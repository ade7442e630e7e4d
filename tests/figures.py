"""The sheet of all six analyses in the README, made from runs of the real scripts on the built-in pictures.

    python tests/figures.py              about half an hour on 2 CPU cores -> runs/figures/figures.png
    python tests/figures.py --share 0.02 to try

Two pre-trainings, `mask` and `zoom_in_mask`, of the same time as a table's; each fine-tuned with 100 labels a class, and so
are random weights; then analyze.py six times. A stopped one goes on where it was. matplotlib is needed.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import analyze
import pretrain
import table1


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--out", default=os.path.join("runs", "figures"), metavar="DIR", help="default: runs/figures")
    p.add_argument("--share", type=float, default=1.0, help="of all steps, to try; default: 1")
    args = p.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def go(*command):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        if done.returncode:
            sys.exit(f"figures.py: {' '.join(map(str, command))} ended with code {done.returncode}: mend it, the same command goes on")

    def steps(n):
        return ["--steps", max(2, round(n * args.share)), "--resume"]
    out = out.resolve()
    before, after = {}, {}
    for task in ("mask", "zoom_in_mask"):
        before[task] = out / task
        go("pretrain.py", "--task", task, "--batch_size", 128, "--lr", "3e-3", *steps(table1.DATA["shapes"]["steps"][0]), "--out", before[task])
    for name in (*before, "none"):
        after[name] = out / f"{name}-tuned"
        go("finetune.py", "--weights", before.get(name, "none"), "--model", "vit_micro", "--labels", 100, *steps(500), "--save_every", max(1, round(100 * args.share)), "--out", after[name])
    made, tuned = list(before.values()), list(after.values())
    for name, runs in dict(reconstruct=made, curves=[*made, *tuned], occlusion=tuned, interaction=tuned, fourier=[*made, "none"], variance=[*made, "none"]).items():
        go("analyze.py", name, *runs, "--out", out, *(["--rows", 6] if name == "reconstruct" else []))
    sheet(out)


def sheet(folder):
    """The six pictures in one: figures.png."""
    from PIL import Image
    pictures = [Image.open(folder / f"{name}.png").convert("RGB") for name in analyze.NAMES]
    width = 1200
    pictures = [x.resize((width, round(x.height * width / x.width)), Image.Resampling.LANCZOS) if x.width > width else x for x in pictures]
    whole = analyze.stacked(pictures)
    pretrain.write_whole(str(folder / "figures.png"), lambda file: whole.save(file, format="PNG", optimize=True))
    print(f"drawn: {folder / 'figures.png'}")


if __name__ == "__main__":
    main()
