#!/usr/bin/env python3
"""Train tiny networks for many epochs, and watch what the process holds: resident memory and open files by epoch.

    python tests/robustness/long_run.py [--epochs 200]

Both must be flat: between the halves of the run, the median may grow by 4 MiB and by no file.
Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS = "--dataset digits --image-size 8 --batch-size 479 --no-cuda --amp off --save-dir results".split()


def commands(epochs: int) -> dict[str, list[str]]:
    return {
        "run_compound_scaling.py": f"--grid 0.14 0.5 --phi 1 --epochs {epochs} --lr 0.05".split(),
        "run_quantization.py": (
            f"--model-dict results/best_model.pt --epochs {epochs // 2} --retrain-epochs {epochs - epochs // 2} "
            "--ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()
        ),
    }


def watch(program: str, arguments: list[str], folder: Path) -> list[tuple[int, int, float]]:
    """Run a program; after each epoch's line: resident bytes, open files, seconds since the line before."""
    command = [sys.executable, "-u", str(ROOT / program), *DIGITS, *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        found, before = [], time.monotonic()
        for line in process.stdout:
            if "val loss" in line:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                files = len(os.listdir(f"/proc/{process.pid}/fd"))
                now = time.monotonic()
                found.append((pages * os.sysconf("SC_PAGE_SIZE"), files, now - before))
                before = now
    if process.returncode:
        sys.exit(f"{program} ended with {process.returncode}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()
    flat = True
    with tempfile.TemporaryDirectory() as folder:
        for program, arguments in commands(args.epochs).items():
            found = watch(program, arguments, Path(folder))
            memory, files, seconds = zip(*found)
            middle = len(found) // 2
            print(f"{program}: {len(found)} epochs")
            for i in sorted({1, middle // 2, middle, middle + middle // 2, len(found) - 1}):
                print(f"  epoch {i + 1:4d}  {memory[i] / 2**20:7.1f} MiB  {files[i]} open files  {seconds[i]:.3f} s")
            halves = slice(1, middle), slice(middle, None)
            more_memory, more_files = (median(x[halves[1]]) - median(x[halves[0]]) for x in (memory, files))
            print(f"  medians of the halves differ by {more_memory / 2**20:.1f} MiB, {more_files:g} open files")
            flat &= more_memory <= 2**22 and more_files <= 0
    print("flat" if flat else "NOT flat")
    return not flat


if __name__ == "__main__":
    sys.exit(main())
