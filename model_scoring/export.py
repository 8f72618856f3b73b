"""A scored network as files: `--save`, `--pt-sparse`, `--pack` and `--unpack`."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from engine.program.report import say
from engine.store.checkpoint import Checkpoint, network_content, save
from model.selection import is_ternary
from model_scoring.arguments import SAVED_LAYERS
from model_scoring.masks import save_layer
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
    """

    masks: bool = False
    coo: bool = False
    pack: str | None = None
    unpack: str | None = None
    half_precision: bool = True


def export(network: nn.Module, checkpoint: Checkpoint, exports: Exports) -> None:
    """Write what `exports` asks for."""
    if exports.masks or exports.coo:
        folder = Path(SAVED_LAYERS) / checkpoint.path.stem
        layers = {n: p.detach() for n, p in network.named_parameters() if p.ndim > 1 and is_ternary(p)}
        for name, weight in layers.items():
            save_layer(weight, folder / f"{name.removesuffix('.weight')}.pt", coo=exports.coo)
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
