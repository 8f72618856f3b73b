#!/usr/bin/env python3
"""A network as files, and how standard runtimes load and run them: sizes, seconds to load, milliseconds an image.

    python benchmarks/deploy.py --t-model FILE [--image-size PX]

torch, ONNX Runtime and OpenVINO (where they are installed) side by side in one run, of the network itself as a plain
ONNX file of 32 bit and of the file that `run_scoring.py --onnx` writes. Each time is the least of many.
"""

import argparse
import gzip
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.evaluation import as_stored
from engine.store.checkpoint import read_network
from model_scoring.onnx_file import write_onnx
from model_scoring.packing import write_packed


def least(run: Callable[[], object], seconds: float = 2.0) -> float:
    """The least time of a call, milliseconds."""
    run()
    best, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t-model", type=Path, required=True, metavar="FILE")
    parser.add_argument("--image-size", type=int, default=32, metavar="PX")
    args = parser.parse_args()
    checkpoint = read_network(args.t_model)
    network, size = as_stored(checkpoint.network().eval()), args.image_size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plain, small = folder / "plain.onnx", folder / "small.onnx"
        examples = (torch.zeros(2, 3, size, size),)
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(network, examples, plain, dynamo=True, dynamic_shapes=shapes, input_names=["images"],
                          opset_version=18, external_data=False, verbose=False)  # fmt: skip
        write_onnx(network, [torch.zeros(3, size, size)], small, 18, {})
        write_packed(checkpoint, folder / "packed")
        print("| file | bytes | gzip -9 |\n|---|---|---|")
        files = {"checkpoint": args.t_model, "ONNX, 32 bit": plain, "ONNX, symbols": small, "packed": folder / "packed"}
        for name, file in files.items():
            data = file.read_bytes()
            print(f"| {name} | {len(data):,} | {len(gzip.compress(data, 9)):,} |")

        print("\n| runtime | load (ms) | 1 image (ms) | 32 images (ms) |\n|---|---|---|---|")
        batches = [torch.randn(n, 3, size, size) for n in (1, 32)]
        arrays = [batch.numpy() for batch in batches]
        with torch.inference_mode():
            times = [least(lambda b=batch: network(b)) for batch in batches]
        print(f"| torch {torch.__version__} | | {times[0]:.2f} | {times[1]:.1f} |")
        for name, file in (("32 bit", plain), ("symbols", small)):
            load = least(lambda f=file: onnxruntime.InferenceSession(f))
            session = onnxruntime.InferenceSession(file)
            times = [least(lambda s=session, a=array: s.run(None, {"images": a})) for array in arrays]
            print(f"| ONNX Runtime {onnxruntime.__version__}, {name} | {load:.0f} | {times[0]:.2f} | {times[1]:.1f} |")
        try:
            import openvino
        except ImportError:
            return
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        for name, file in (("32 bit", plain), ("symbols", small)):
            load = least(lambda f=file: openvino.Core().compile_model(f, "CPU", hint))
            model = openvino.Core().compile_model(file, "CPU", hint)
            times = [least(lambda m=model, a=array: m(a)) for array in arrays]
            version = openvino.__version__.partition("-")[0]
            print(f"| OpenVINO {version}, {name} | {load:.0f} | {times[0]:.2f} | {times[1]:.1f} |")


if __name__ == "__main__":
    main()
