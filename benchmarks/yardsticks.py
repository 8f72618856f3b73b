#!/usr/bin/env python3
"""What others' quantization without training makes of the same network, on the same images: torchao, ONNX Runtime.

    python benchmarks/yardsticks.py --t-model FILE --data-path DIR --calibration DIR [--model MODULE:FUNCTION]

For each: accuracy, bytes of the file, and under gzip -9. torchao (pip install torchao) quantizes the weights of linear
layers alone, one scale a filter; its 4-bit weights lie in bytes. ONNX Runtime quantizes the weights of convolutions
and linear layers, one scale a filter, and activations to 8 bits: as they come ("dynamic"), or by ranges from 100
photographs of --calibration ("static", a folder with train/ class folders).
"""

import argparse
import copy
import gzip
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.device import Machine
from engine.evaluation import evaluate
from engine.images.batches import ImageRequest, load_data
from engine.program.report import say
from engine.store.checkpoint import read_network
from model import row_of
from model.own import is_own
from model_scoring.onnx_file import OnnxNetwork, exported

CALIBRATED = 10  # batches of 10


class Calibration(CalibrationDataReader):
    """Batches of photographs."""

    def __init__(self, batches: Iterator):
        self.batches = ({"images": images.numpy()} for images, _ in itertools.islice(batches, CALIBRATED))

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def with_torchao(network: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, bytes]:
    """The network with the weights of its linear layers quantized, and its file."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    quantized, file = copy.deepcopy(network), io.BytesIO()
    quantize_(quantized, IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerAxis(0)))
    torch.save(quantized.state_dict(), file)
    return quantized, file.getvalue()


def with_onnxruntime(model: onnx.ModelProto, quantize: Callable[[str, str], None]) -> tuple[nn.Module, bytes]:
    """The same by ONNX Runtime's tools, which take files."""
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (f"{folder}/{name}.onnx" for name in ("source", "prepared", "target"))
        onnx.save(model, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize(prepared, target)
        data = Path(target).read_bytes()
    return OnnxNetwork(data), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t-model", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="its builder, where it is one's own")
    parser.add_argument("--data-path", required=True, metavar="DIR")
    parser.add_argument("--calibration", required=True, metavar="DIR")
    args = parser.parse_args()
    checkpoint = read_network(args.t_model, {"name": args.model} if args.model else {})
    name = checkpoint.spec["name"]
    size = 224 if is_own(name) else row_of(name).image_size
    preprocessing = row_of(name).preprocessing
    request = ImageRequest(
        "ImageNet", args.data_path, size, val_batch_size=10, workers=1, preprocessing=preprocessing, train=False
    )
    machine = Machine(torch.device("cpu"))
    data = load_data(request, machine.device)
    others = load_data(replace(request, path=args.calibration, batch_size=10, train=True), machine.device)
    network = checkpoint.run_at(size).network().eval()
    model = exported(network, [torch.zeros(3, size, size)], 21)

    def dynamic(source: str, target: str) -> None:
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QUInt8)

    def static(bits: QuantType) -> Callable[[str, str], None]:
        def quantize(source: str, target: str) -> None:
            calibration = Calibration(replace(others, val=others.train, test=None).val_batches())
            quantize_static(source, target, calibration, per_channel=True, weight_type=bits)

        return quantize

    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    methods: dict[str, Callable[[], tuple[nn.Module, bytes]]] = {"as it is, 32 bit": lambda: (network, file.getvalue())}
    if find_spec("torchao"):
        methods["torchao, linear layers of 8 bit"] = lambda: with_torchao(network, torch.int8)
        methods["torchao, linear layers of 4 bit"] = lambda: with_torchao(network, torch.int4)
    methods["ONNX Runtime, 8 bit, dynamic"] = lambda: with_onnxruntime(model, dynamic)
    methods["ONNX Runtime, 8 bit, static"] = lambda: with_onnxruntime(model, static(QuantType.QInt8))
    methods["ONNX Runtime, 4 bit, static"] = lambda: with_onnxruntime(model, static(QuantType.QInt4))
    say("| method | accuracy | bytes | gzip -9 |\n|---|---|---|---|")
    for method, make in methods.items():
        quantized, content = make()
        accuracy = evaluate(quantized, data, machine).accuracy
        say(f"| {method} | {accuracy:.2f}% | {len(content):,} | {len(gzip.compress(content, 9)):,} |")


if __name__ == "__main__":
    main()
