"""The sheet of all six analyses in the README, of runs on the built-in pictures.

    python tests/figures.py                  an hour on 2 CPU cores -> runs/figures/figures.png
    python tests/figures.py --share 0.02     to try

Three encoders are those of tests/table1.py, made if they are not there. They and random weights are
fine-tuned with 100 labels a class. Then analyze.py draws. A stopped one goes on where it was.
"""
import argparse
import subprocess
import sys
from pathlib import Path

import table1  # it finds the others
import analyze
import pretrain

WIDTH = 1320  # pixels of the sheet


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--share", type=float, default=1.0, help="of all steps, to try; default: 1")
    share = p.parse_args(argv).share
    import matplotlib  # noqa: F401  without it there is nothing to put together
    table = table1.options(["--share", str(share)])
    out = table.out.with_name(table.out.name.replace("table1-shapes", "figures"))
    out.mkdir(parents=True, exist_ok=True)

    before, after = [], []
    for task in ("mask", "zoom_in_mask", "a2mim"):
        job = table1.jobs(table, task, 0)[0]
        before.append(table.out / job.folder)
        go(*job.argv, "--out", before[-1])
    for weights in (*before, Path("none")):
        after.append(out / f"{weights.name}-tuned")
        go("finetune.py", "--weights", weights, "--labels", 100, "--resume", "--out", after[-1],
           "--steps", max(2, round(500 * share)), "--save_every", max(1, round(100 * share)))
    for name, *argv in (["reconstruct", *before, "--rows", 4], ["curves", *before, *after],
                        ["occlusion", *after], ["interaction", *after],
                        ["fourier", *before, "none"], ["variance", *before, "none"]):
        go("analyze.py", name, *argv, "--resume", "--out", out)
    sheet(out)


def go(*command):
    command = [str(x) for x in command]
    if subprocess.run([sys.executable, *command], cwd=table1.ROOT).returncode:
        sys.exit(f"figures.py: {' '.join(command)} failed. The same command goes on")


def sheet(folder):
    """The six pictures in one."""
    from PIL import Image
    rows = []
    for names in ("reconstruct", "curves", "occlusion interaction", "fourier variance"):
        parts = [Image.open(folder / f"{name}.png").convert("RGB") for name in names.split()]
        width, height = sum(x.width for x in parts), max(x.height for x in parts)
        row = Image.new("RGB", (width, height), "white")
        for i, x in enumerate(parts):
            row.paste(x, (i * parts[0].width, 0))
        rows.append(row.resize((WIDTH, round(height * WIDTH / width)), Image.Resampling.LANCZOS))
    page = analyze.stacked([("", row) for row in rows])
    pretrain.write_whole(folder / "figures.png", lambda file: page.save(file, "PNG", optimize=True))
    print(f"drawn: {folder / 'figures.png'}")


if __name__ == "__main__":
    main()
