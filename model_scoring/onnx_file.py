"""A network as an ONNX file for standard runtimes, as it is evaluated, with its quantized weights as symbols.

torch exports the network and merges BatchNorm; `onnx_decoding` makes the weights small. Runtimes decode them to
dense ones: the file is small, the speed is at most the dense network's. What ONNX Runtime computes from the file is
compared with torch before it is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine.program.errors import UserError
from engine.store.files import write_whole
from model.own import reason
from model_scoring.onnx_decoding import compact
from model_scoring.onnx_shrinking import shrink

if TYPE_CHECKING:
    import onnx

COMPARED = 16  # inputs
RUNS = 30  # whose least time is taken
TOLERANCE = 1e-3  # of the largest output, or of 1: rounding in other orders stays far below
HINT = "pip install onnx onnxscript"


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how it compares with torch.

    Attributes:
        quantized: names of the weights that are symbols.
        runtime: ONNX Runtime's version; None where it is not installed, and nothing was compared.
        difference: the largest one between outputs.
        equal: how many of COMPARED first outputs have their maximum in the same place.
        removed: how many channels `shrink` removed, and
        channels: how many there were in all groups that it knows.
        milliseconds: of the first input in ONNX Runtime, before and after that.
    """

    path: Path
    file_bytes: int
    quantized: list[str]
    runtime: str | None
    difference: float = 0.0
    equal: int = 0
    removed: int = 0
    channels: int = 0
    milliseconds: tuple[float, float] | None = None


class OnnxNetwork(nn.Module):
    """An ONNX file as a module that gives its first output, computed by ONNX Runtime on the CPU."""

    def __init__(self, model: bytes):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def outputs(self, inputs: Sequence[Tensor]) -> list[np.ndarray]:
        names = [each.name for each in self.session.get_inputs()]
        return self.session.run(None, {n: each.numpy() for n, each in zip(names, inputs, strict=True)})

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.outputs([images.cpu().contiguous()])[0]).to(images.device)


def write_onnx(
    network: nn.Module,
    inputs: Sequence[Tensor],
    path: Path,
    opset: int,
    metadata: dict[str, Any],
    without_dead: bool = False,
) -> OnnxReport:
    """Write `network`, on the CPU and with the values that are to be stored, as the ONNX file `path`.

    Args:
        inputs: examples of its inputs, without the batch, which is of any size in the file.
        opset: ONNX's version of operations, from 18 on.
        metadata: plain values, which the file has as JSON by name.
        without_dead: remove dead channels before, as `shrink` does.

    UserError where a package is missing, torch can't export the network, or the file computes something else.
    """
    model = exported(network.eval(), inputs, opset)
    weights = {name: t.detach().numpy() for name, t in network.named_parameters() if t.dtype == torch.float32}
    dense = model.SerializeToString()
    removed, channels = shrink(model, weights) if without_dead else (0, 0)
    _strip(model)
    quantized = compact(model.graph, weights)
    _describe(model, metadata)
    data = model.SerializeToString()
    compared = _compared(network, inputs, data)
    times = (_milliseconds(dense, inputs), _milliseconds(data, inputs)) if removed and compared[0] else None
    report = OnnxReport(path, len(data), quantized, *compared, removed, channels, times)
    write_whole(data, path)
    return report


def exported(network: nn.Module, inputs: Sequence[Tensor], opset: int) -> onnx.ModelProto:
    examples = tuple(torch.stack([each, each]) for each in inputs)
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                examples,
                dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in examples),
                input_names=["images"] if len(examples) == 1 else None,
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        return program.model_proto
    except ImportError as error:
        raise UserError(f"--onnx needs packages that are not installed ({reason(error)}): {HINT}") from None
    except Exception as error:  # whatever the network's code makes of being traced
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(f"--onnx: torch.onnx.export can't export this network ({reason(cause)})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says of its own steps to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    """Leave out what no runtime needs: a tenth of a small file."""
    from onnx import helper

    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.name = node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    _shorten_names(model.graph)
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Number the values between operations; inputs, outputs and stored values keep their names."""
    kept = {each.name for each in (*graph.input, *graph.output, *graph.initializer)}
    made = [name for node in graph.node for name in node.output if name and name not in kept]
    numbers = {name: f"v{i}" for i, name in enumerate(made)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [numbers.get(name, name) for name in names]


def _describe(model: onnx.ModelProto, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))


def _compared(network: nn.Module, inputs: Sequence[Tensor], data: bytes) -> tuple[str | None, float, int]:
    """ONNX Runtime's version, the largest difference to torch, and equal maxima; UserError where it is too large."""
    try:
        import onnxruntime
    except ImportError:
        return None, 0.0, 0
    generator = torch.Generator().manual_seed(0)
    batch = [_drawn(each, generator) for each in inputs]
    with torch.no_grad():
        expected = [leaf.numpy() for leaf in tree_leaves(network(*batch)) if isinstance(leaf, Tensor)]
    try:
        found = OnnxNetwork(data).outputs(batch)
    except Exception as error:  # it has no types of its own for them
        raise UserError(f"--onnx: ONNX Runtime can't run the file ({reason(error)}); it is not written") from None
    differences = [np.abs(a - b).max(initial=0) for a, b in zip(expected, found, strict=True)]
    allowed = TOLERANCE * max(1.0, *(np.abs(a).max(initial=0) for a in expected))
    if not max(differences) <= allowed:
        raise UserError(
            f"--onnx: in ONNX Runtime {onnxruntime.__version__} the file's outputs differ from torch's by "
            f"{max(differences):.2g}; it is not written"
        )
    equal = int((expected[0].argmax(-1) == found[0].argmax(-1)).reshape(COMPARED, -1).all(1).sum())
    return onnxruntime.__version__, float(max(differences)), equal


def _milliseconds(data: bytes, inputs: Sequence[Tensor]) -> float:
    """The least time of some runs of one input in ONNX Runtime."""
    network, times = OnnxNetwork(data), []
    for _ in range(RUNS):
        began = time.perf_counter()
        network.outputs([each[None] for each in inputs])
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def _drawn(example: Tensor, generator: torch.Generator) -> Tensor:
    """COMPARED inputs like `example`: drawn, or the same again if they are whole numbers."""
    if not example.is_floating_point():
        return torch.stack([example] * COMPARED)
    return torch.randn(COMPARED, *example.shape, generator=generator, dtype=example.dtype)
