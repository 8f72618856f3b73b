#!/usr/bin/env python3
"""What the symbols of a quantized network take: their entropy, in the packed file, and as DeepCABAC codes them.

    python benchmarks/packing.py resnet20_cifar10.pt [--bits 2 3 4 5 6 8]

Convolutions and linear layers are rounded to the nearest of 2**b - 1 equidistant levels, the outermost weight being the
last; 0 bits takes the layers that are quantized already. DeepCABAC (arXiv:1907.11900) is that of Fraunhofer's reference
software: `pip install nncodec`, which wants numpy below 2, so in an environment of its own. Its column is the shortest
over the settings of its context models, each layer a stream of its own without header.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.program.report import table
from engine.store.checkpoint import Checkpoint, read_network
from model.levels import is_quantized, levels_of, numbers
from model_scoring.packing import write_packed


def quantized(weight: torch.Tensor, bits: int) -> torch.Tensor:
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def deep_cabac(weight: torch.Tensor) -> int | None:
    """Bytes of a layer; None where nncodec is not installed."""
    try:
        from nncodec.extensions import deepCABAC
        from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF
    except ImportError:
        return None
    symbols = levels_of(numbers(weight)).symbols.astype(np.int32).reshape(weight.shape)
    whole = (symbols + 1) // 2 * np.where(symbols % 2, 1, -1)  # of a grid's symbols 0, 1, 2, 3, ...: 0, 1, -1, 2, ...
    sizes = []
    for unary, optimised in ((1, 0), (1, 1), (10, 0), (10, 1)):
        encoder = deepCABAC.Encoder()
        encoder.initCtxModels(unary, optimised)
        encoder.encodeLayer(
            whole.astype(np.int32), 0, 0, 0, 0, 0, np.zeros(len(whole), np.int32), *HDSP_OPTS_OFF(), 0, 0
        )
        sizes.append(len(encoder.finish()))
    return min(sizes)


def row(checkpoint: Checkpoint, bits: int) -> list[str]:
    """One row of the table."""
    tensors = dict(checkpoint.state_dict)
    for name, weight in tensors.items() if bits else ():
        if weight.ndim > 1:
            tensors[name] = quantized(weight, bits)
    with tempfile.TemporaryDirectory() as folder:
        report = write_packed(Checkpoint(checkpoint.path, checkpoint.spec, tensors), Path(folder) / "packed")
    sizes = [deep_cabac(t) for t in tensors.values() if t.ndim > 1 and is_quantized(t)]
    others = "-" if None in sizes else f"{sum(sizes):,}"
    packed = [f"{report.symbol_bytes:,}", f"{report.symbol_bytes / report.entropy_bytes:.1%}", f"{report.file_bytes:,}"]
    return [str(bits or "as it is"), f"{report.entropy_bytes:,.0f}", *packed, others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", nargs="+", type=int, choices=[0, *range(2, 9)], default=[2, 3, 4, 5, 6, 8])
    args = parser.parse_args()
    checkpoint = read_network(args.checkpoint)
    headers = ["bits", "entropy", "packed symbols", "of entropy", "file", "DeepCABAC"]
    print(table(headers, [row(checkpoint, bits) for bits in args.bits]))


if __name__ == "__main__":
    main()
