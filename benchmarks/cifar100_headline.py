#!/usr/bin/env python3
"""The published CIFAR-100 result from nothing to a score: train, ternarize, score, beside the published figures.

    python benchmarks/cifar100_headline.py --data-path DIR [--out runs/headline]

As printed in README: 250 epochs of MicroNet d 1.4, w 1.2, phi 3.5, then EC2T with s 0.45, g 0.15 for 20 + 20 epochs.
Stopped at any moment, the same command continues after the last whole epoch. `--epochs`, `--phi` and the like make
it shorter. OUT receives the runs, `ternary.safetensors` (the packed network), `scores.json` and `result.md`. Under
`torchrun`'s environment nothing changes: this script starts the programs, and `--processes N` starts them with
`torchrun` on N GPUs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.program.report import table  # noqa: E402

PUBLISHED = {"full precision": "81.46%", "EC2T": "80.13%", "zeros": "90.49%"}
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


def scores(network: Path, out: Path, add_bits: int, data: list[str], *more: str) -> dict:
    """Score `network` with additions of `add_bits` bit; everything that `--json` says."""
    report = out / f"scores_{add_bits}.json"
    bits = ["--halfprecision", "--add-bits", str(add_bits), "--json", str(report)]
    program("run_scoring.py", ["--t-model", str(network), *data, *bits, *more])
    return json.loads(report.read_text())


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
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--machine", nargs="*", default=[], help="more flags for all programs: compile no-cuda")
    args = parser.parse_args()
    out = args.out.resolve()
    data = ["--dataset", args.dataset, "--data-path", str(Path(args.data_path).resolve())]
    data += [f"--{flag}" for flag in args.machine]
    batches = ["--batch-size", args.batch_size]

    scaling = ["--grid", *args.grid, "--phi", args.phi, "--epochs", args.epochs, *batches, *data]
    scaling_seconds = program("run_compound_scaling.py", [*scaling, "--save-dir", str(out / "fp")], args.processes)
    quantization = ["--model-dict", str(out / "fp" / "best_model.pt"), *batches, *data]
    quantization += ["--epochs", args.quantization_epochs, "--retrain-epochs", args.retrain_epochs]
    quantization += ["--ini-c-divrs", "0.45", "--lambda-max-divrs", "0.15", "--save-dir", str(out / "ec2t")]
    quantization_seconds = program("run_quantization.py", quantization, args.processes)

    network = out / "ec2t" / "Ternary_best_acc.pt"
    challenge_bits = scores(network, out, 32, data, "--eval", "--pack", str(out / "ternary.safetensors"))
    published_bits = scores(network, out, 16, data)
    (point,) = json.loads((out / "ec2t" / "best_model_sweep.json").read_text())
    results = [json.loads(path.read_text()) for path in (out / "fp").glob("*/result.json")]
    full_precision = max(result["accuracy"] for result in results)
    rows = [
        ["accuracy, full precision", PUBLISHED["full precision"], f"{full_precision:.2f}%"],
        ["accuracy, EC2T, 16 bit values", PUBLISHED["EC2T"], f"{challenge_bits['evaluation']['accuracy']:.2f}%"],
        ["zeros", PUBLISHED["zeros"], f"{point['zeros']:.2f}%"],
    ]
    for name, theirs in PUBLISHED_SCORES.items():
        report = published_bits if "16" in name else challenge_bits
        rows.append([f"score, {name}", f"{theirs:.4f}", f"{report['rulers'][name.split(',')[0]]['score']:.4f}"])
    rows.append(["bytes, packed", "", f"{(out / 'ternary.safetensors').stat().st_size:,}"])
    rows.append(["seconds, training", "", f"{scaling_seconds:,.0f}"])
    rows.append(["seconds, EC2T", "", f"{quantization_seconds:,.0f}"])
    text = table(["", "published", "here"], rows)
    (out / "result.md").write_text(f"    {text.replace(chr(10), chr(10) + '    ')}\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
