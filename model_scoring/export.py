"""A scored network as files: `--save`, `--pt-sparse`, `--pack`, `--unpack` and `--onnx`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.evaluation import as_stored
from engine.images.datasets import SMALL
from engine.program.report import say
from engine.store.checkpoint import Checkpoint, network_content, save
from model import row_of
from model.selection import is_ternary
from model_scoring.arguments import SAVED_LAYERS
from model_scoring.masks import save_layer
from model_scoring.onnx_file import COMPARED, write_onnx
from model_scoring.packing import write_packed


@dataclass(frozen=True)
class Exports:
    """What is written of a network.

    Attributes:
        masks: each ternary layer, as two masks.
        coo: each ternary layer, as a sparse tensor.
        pack: the packed file to write, if any.
        unpack: the checkpoint to write, if any.
        half_precision: whether the packed file keeps 16 bits of values that are not quantized, else all.
        onnx: the ONNX file to write, if any.
        opset: ONNX's version of operations in it.
        shrink: whether dead channels are left out of it.
    """

    masks: bool = False
    coo: bool = False
    pack: str | None = None
    unpack: str | None = None
    half_precision: bool = True
    onnx: str | None = None
    opset: int = 18
    shrink: bool = False


def export(network: nn.Module, checkpoint: Checkpoint, exports: Exports, shapes: Any) -> None:
    """Write what `exports` asks for; `shapes` of the network's inputs are as `rulers.count` takes them."""
    for coo in [False] * exports.masks + [True] * exports.coo:
        folder = Path(SAVED_LAYERS) / f"{checkpoint.path.stem}{'_coo' * coo}"
        layers = {n: p.detach() for n, p in network.named_parameters() if p.ndim > 1 and is_ternary(p)}
        for name, weight in layers.items():
            save_layer(weight, folder / f"{name.removesuffix('.weight')}.pt", coo)
        say(f"{len(layers)} ternary layers -> {folder}")
    if exports.pack:
        current = Checkpoint(checkpoint.path, checkpoint.spec, network.state_dict(), checkpoint.extra)
        report = write_packed(current, Path(exports.pack), exports.half_precision)
        say(
            f"{report.file_bytes:,} bytes -> {exports.pack} ({report.float32_bytes:,} as 32 bit values; quantized "
            f"layers' symbols {report.symbol_bytes:,}, their entropy {report.entropy_bytes:,.0f})"
        )
    if exports.unpack:
        save(network_content(checkpoint.spec, network, **checkpoint.extra), Path(exports.unpack))
        say(f"checkpoint -> {exports.unpack}")
    if exports.onnx:
        _export_onnx(network, checkpoint, exports, shapes)


def _export_onnx(network: nn.Module, checkpoint: Checkpoint, exports: Exports, shapes: Any) -> None:
    path, images = Path(exports.onnx or ""), isinstance(shapes, int)
    listed = [(3, shapes, shapes)] if images else shapes
    inputs = [shape[0] if isinstance(shape, torch.Tensor) else torch.zeros(shape) for shape in listed]
    about = preprocessing_of(checkpoint, shapes) if images else {}
    stored = as_stored(network, exports.half_precision)
    report = write_onnx(stored, inputs, path, exports.opset, about, exports.shrink)
    say(
        f"{report.file_bytes:,} bytes -> {path} (ONNX, opset {exports.opset}; {len(report.quantized)} weights as "
        f"symbols, which runtimes decode to 32 bit)"
    )
    if exports.shrink:
        before, after = report.milliseconds or (0, 0)
        saved = f": {after:.2f} ms an input in ONNX Runtime instead of {before:.2f}" if report.milliseconds else ""
        say(f"  removed {report.removed:,} of {report.channels:,} channels{saved}")
    if report.runtime:
        say(
            f"  in ONNX Runtime {report.runtime} outputs differ from torch's by {report.difference:.1e} at most, "
            f"{report.equal} of {COMPARED} predictions are equal"
        )
    else:
        say("  not compared with torch: ONNX Runtime is not installed (pip install onnxruntime)")


def preprocessing_of(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    """What a user of the file has to know: how an image of `size` pixels is made, and what the logits stand for."""
    how = row_of(checkpoint.spec["name"]).preprocessing
    statistics = how.photographs if size > SMALL else how.small_images
    about: dict[str, Any] = {"image_size": size, "mean": statistics.mean, "std": statistics.std}
    if size > SMALL:
        about |= {"resize_shorter_side": how.shorter_side(size), "interpolation": how.interpolation}
    known = {key: checkpoint.extra[key] for key in ("classes", "dataset") if key in checkpoint.extra}
    return about | known
