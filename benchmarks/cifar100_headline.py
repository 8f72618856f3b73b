#!/usr/bin/env python3
"""The CIFAR-100 result from nothing to a score: train, ternarize, score, beside the published figures.

    python benchmarks/cifar100_headline.py --data-path DIR [--out runs/headline]

As printed in README: 250 epochs of MicroNet d 1.4, w 1.2, phi 3.5, then EC2T with s 0.45, g 0.15 for 20 + 20 epochs.
Stopped at any moment, the same command continues after the last whole epoch. `--epochs`, `--phi` and the like make
it shorter; `--sweeps` compares several quantizations, each with more flags of stage 2. The small MicroNet, by
its measured steps some minutes on an H100 (not run whole yet):

    FLAGS="--s 0.3 --g 0.05 --lr 5e-4 --lr2 5e-5 --schedule cosine"
    python benchmarks/cifar100_headline.py --data-path DIR --grid 1 1 --phi 0 --epochs 60 --retrain-epochs 15 \\
        --batch-size 256 --machine cuda-graphs --sweeps "$FLAGS" "$FLAGS --teacher self"

OUT receives the runs, of each sweep the packed network and its scores, and `result.md`. Under `torchrun`'s
environment nothing changes: this script starts the programs, and `--processes N` starts them with `torchrun` on N
GPUs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.program.report import table  # noqa: E402

PUBLISHED = ("80.13%", "90.49%")  # accuracy, of 81.46% in full precision, and zeros
OF_TRAINING = ("--compile", "--cuda-graphs")  # flags that stage 3 lacks
PUBLISHED_SCORES = {"published, additions 16 bit": 0.0182, "published": 0.0242, "improved": 0.0130}


def program(name: str, arguments: list[str], processes: int = 1) -> float:
    """Run one of the three programs; return its seconds."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, "-u", *torchrun, str(ROOT / name), *arguments]
    print(f"\n$ {' '.join(command[2:])}", flush=True)
    start = time.monotonic()
    if code := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(code)
    return time.monotonic() - start


def scores(network: Path, folder: Path, add_bits: int, data: list[str], *more: str) -> dict:
    """Score `network` with additions of `add_bits` bit; everything that `--json` says."""
    report = folder / f"scores_{add_bits}.json"
    bits = ["--halfprecision", "--add-bits", str(add_bits), "--json", str(report)]
    program("run_scoring.py", ["--t-model", str(network), *data, *bits, *more])
    return json.loads(report.read_text())


def quantized(flags: str, folder: Path, shared: list[str], data: list[str], processes: int) -> list[str]:
    """Quantize with `flags`, score and pack; the column of figures."""
    seconds = program("run_quantization.py", [*shared, *shlex.split(flags), "--save-dir", str(folder)], processes)
    network, packed = folder / "Ternary_best_acc.pt", folder / "ternary.safetensors"
    of_scoring = [flag for flag in data if flag not in OF_TRAINING]
    challenge_bits = scores(network, folder, 32, of_scoring, "--eval", "--pack", str(packed))
    published_bits = scores(network, folder, 16, of_scoring)
    points = json.loads((folder / "best_model_sweep.json").read_text())
    best = max(points, key=lambda point: point["accuracy"])
    column = [f"{challenge_bits['evaluation']['accuracy']:.2f}%", f"{best['zeros']:.2f}%"]
    for name in PUBLISHED_SCORES:
        report = published_bits if "16" in name else challenge_bits
        column.append(f"{report['rulers'][name.split(',')[0]]['score']:.5f}")
    return [*column, f"{packed.stat().st_size:,}", f"{seconds:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--dataset", default="CIFAR100")
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--grid", nargs=2, default=["1.4", "1.2"], metavar=("D", "W"))
    parser.add_argument("--phi", default="3.5")
    parser.add_argument("--epochs", default="250")
    parser.add_argument("--quantization-epochs", default="20")
    parser.add_argument("--retrain-epochs", default="20")
    parser.add_argument("--batch-size", default="128")
    parser.add_argument("--sweeps", nargs="+", default=["--s 0.45 --g 0.15"], metavar="FLAGS")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--machine", nargs="*", default=[], help="more flags for the programs: cuda-graphs compile no-cuda"
    )
    args = parser.parse_args()
    out = args.out.resolve()
    data = ["--dataset", args.dataset, "--data-path", str(Path(args.data_path).resolve())]
    data += [f"--{flag}" for flag in args.machine]
    batches = ["--batch-size", args.batch_size, *data]

    scaling = ["--grid", *args.grid, "--phi", args.phi, "--epochs", args.epochs, *batches]
    seconds = program("run_compound_scaling.py", [*scaling, "--save-dir", str(out / "fp")], args.processes)
    results = [json.loads(path.read_text()) for path in (out / "fp").glob("*/result.json")]
    full_precision = max(result["accuracy"] for result in results)
    shared = ["--model-dict", str(out / "fp" / "best_model.pt"), *batches]
    shared += ["--epochs", args.quantization_epochs, "--retrain-epochs", args.retrain_epochs]
    columns = [quantized(f, out / f"ec2t{i}", shared, data, args.processes) for i, f in enumerate(args.sweeps)]

    names = ["accuracy, 16 bit values", "zeros", *(f"score, {name}" for name in PUBLISHED_SCORES)]
    names += ["bytes, packed", "seconds"]
    published = [*PUBLISHED, *(f"{score:.4f}" for score in PUBLISHED_SCORES.values()), "", ""]
    text = table(["", "published", *args.sweeps], list(map(list, zip(names, published, *columns, strict=True))))
    text = f"Full precision: {full_precision:.2f}% after {seconds:,.0f} seconds\n\n{text}"
    (out / "result.md").write_text(f"    {text.replace(chr(10), chr(10) + '    ')}\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
