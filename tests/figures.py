"""The sheet of all six analyses in the README, made from runs of the real scripts on the built-in pictures.

    python tests/figures.py              an hour on 2 CPU cores, less after tests/table1.py -> runs/figures/figures.png
    python tests/figures.py --share 0.02 to try

Three pre-trainings, the table's own (`mask`, `zoom_in_mask`, `a2mim`, in its folder, made if they are not there); each
fine-tuned with 100 labels a class, and so are random weights; then analyze.py six times. A stopped one goes on where it
was. matplotlib is needed.
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import analyze
import pretrain
import table1

WIDTH = 1320                                                    # pixels of the sheet


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--out", metavar="DIR", help="default: runs/figures")
    p.add_argument("--table", metavar="DIR", help="the --out of tests/table1.py; default: runs/table1-shapes")
    p.add_argument("--share", type=float, default=1.0, help="of all steps, to try; default: 1")
    args = p.parse_args(argv)
    import matplotlib                                           # without it there is nothing to put together  # noqa: F401
    trial = "" if args.share == 1 else f"-{args.share:g}"       # must not be taken for the table
    out, table = Path(args.out or f"runs/figures{trial}").resolve(), Path(args.table or f"runs/table1-shapes{trial}").resolve()
    out.mkdir(parents=True, exist_ok=True)

    def go(*command):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT)
        if done.returncode:
            sys.exit(f"figures.py: {' '.join(map(str, command))} ended with code {done.returncode}: mend it, the same command "
                     "goes on")

    before, after = {}, {}
    for task in ("mask", "zoom_in_mask", "a2mim"):
        job = table1.jobs(argparse.Namespace(data="shapes", root="data", out=table, share=args.share), task, 0)[0]
        before[task] = table / job.folder
        go(*job.argv, "--out", before[task])                    # goes on, or finds that it is done
    for name in (*before, "none"):
        after[name] = out / f"{name}-tuned"
        go("finetune.py", "--weights", before.get(name, "none"), "--model", "vit_micro", "--labels", 100, "--resume",
           "--steps", max(2, round(500 * args.share)), "--save_every", max(1, round(100 * args.share)), "--out", after[name])
    made, tuned = list(before.values()), list(after.values())
    shown = dict(reconstruct=[*made, "--rows", 4, "--resume"], curves=[*made, *tuned], occlusion=[*tuned, "--resume"],
                 interaction=[*tuned, "--resume"], fourier=[*made, "none", "--resume"], variance=[*made, "none", "--resume"])
    for name, runs in shown.items():
        go("analyze.py", name, *runs, "--out", out)
    sheet(out)


def sheet(folder):
    """The six pictures in one: figures.png."""
    from PIL import Image
    rows = []
    for names in (["reconstruct"], ["curves"], ["occlusion", "interaction"], ["fourier", "variance"]):
        parts = [Image.open(folder / f"{name}.png").convert("RGB") for name in names]
        row = Image.new("RGB", (sum(x.width for x in parts), max(x.height for x in parts)), "white")
        for i, x in enumerate(parts):
            row.paste(x, (sum(left.width for left in parts[:i]), 0))
        rows.append(row.resize((WIDTH, round(row.height * WIDTH / row.width)), Image.Resampling.LANCZOS))
    pretrain.write_whole(str(folder / "figures.png"), lambda file: analyze.stacked([("", row) for row in rows]).save(file, format="PNG", optimize=True))
    print(f"drawn: {folder / 'figures.png'}")


if __name__ == "__main__":
    main()
