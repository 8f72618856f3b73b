"""Which layers of a checkpoint's network are quantized: chosen, shown, and what a run over them will cost."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from engine.device import Machine
from engine.evaluation import dense_flop
from engine.images.batches import Data
from engine.program.errors import UserError
from engine.program.report import duration, say, table, with_unit
from engine.store.checkpoint import Checkpoint
from model.levels import bits_of_grid
from model.own import is_own, run_once
from model.selection import (
    NoSuchLayer,
    Patterns,
    chosen,
    is_ternary,
    overridden,
    pruning_candidates,
    ternary_candidates,
)

STEPS = 4  # of training that a dry run times; the fastest counts


@dataclass(frozen=True)
class Layers:
    """Names of weights: those that are `chosen`, with their bits, and those that are `fixed`: they do not move.

    `g` has the entropy constraint of chosen ones that do not take the pair's.
    """

    chosen: dict[str, int]
    fixed: list[str]
    g: dict[str, float] = field(default_factory=dict)

    def strengths(self, g: float) -> dict[str, float]:
        """The entropy constraint of each chosen layer, where the pair's is `g`."""
        return dict.fromkeys(self.chosen, g) | self.g


def choose(checkpoint: Checkpoint, image_size: int, patterns: Patterns, kind: str = "quantize") -> Layers:
    """The layers of a checkpoint's network that are treated; UserError where there are none.

    `image_size` is that of an RGB image on which a network of the user's own is run, pixels. `kind` is "quantize",
    "prune", or "retrain": layers that are on a grid already, and as many bits as that needs.
    """
    prune = kind == "prune"
    network, name = checkpoint.network(), checkpoint.spec["name"]
    ran = run_once(network, image_size).layers if is_own(name) else []
    candidates = ternary_candidates(network, name, ran)
    if kind == "retrain":
        widths = {name: width for name, p in network.named_parameters() if p.ndim > 1 and (width := bits_of_grid(p))}
        candidates, patterns = list(widths), replace(patterns, bits=(*widths.items(), *patterns.bits))
    try:
        bits = chosen(network, pruning_candidates(network, name, ran) if prune else candidates, patterns)
        of_pair: dict[str, float | None] = dict.fromkeys(bits)
        strengths = overridden(of_pair, patterns.g)
    except NoSuchLayer as error:
        raise UserError(f"{checkpoint.path}: {error}; pass another pattern") from None
    weights, fixed = dict(network.named_parameters()), []
    if prune:
        bits = {name: 2 for name in bits if not is_ternary(weights[name])}
        fixed = [name for name in candidates if name not in bits and is_ternary(weights[name])]
    if not bits and kind == "retrain":
        raise UserError(f"{checkpoint.path}: holds no quantized layer to retrain; leave --retrain-only out")
    if not bits and prune:
        raise UserError(f"{checkpoint.path}: all layers that --do-prune prunes are ternary; leave it out")
    if not bits:
        raise UserError(f"{checkpoint.path}: no layer is left to quantize; pass --layers PATTERN")
    return Layers(bits, fixed, {name: g for name in bits if (g := strengths[name]) is not None})


def show(checkpoint: Checkpoint, layers: Layers, verb: str, listed: bool, tell: Callable[[str], None]) -> None:
    """Tell which layers are chosen; if `listed`, list them, each with its share of all parameters."""
    weights = dict(checkpoint.network().named_parameters())
    sizes = {name: weights[name].numel() for name in layers.chosen}
    total = sum(p.numel() for p in weights.values())
    if listed:
        rows = [
            [name, "x".join(map(str, weights[name].shape)), f"{size:,}", f"{100 * size / total:.2f}%", bits]
            + [f"{layers.g[name]:g}" if name in layers.g else "the pair's"] * bool(layers.g)
            for (name, size), bits in zip(sizes.items(), layers.chosen.values(), strict=True)
        ]
        heads = [f"{verb.lower()} layer", "shape", "weights", "share", "bits", *["g"] * bool(layers.g)]
        tell("\n" + table(heads, rows))
    tell(
        f"{verb}: {len(sizes)} layers with {with_unit(sum(sizes.values()))} of {with_unit(total)} parameters "
        f"({100 * sum(sizes.values()) / total:.1f}%){'' if listed else '; --dry-run lists them'}"
    )


def say_costs(checkpoint: Checkpoint, data: Data, machine: Machine) -> None:
    """Say the parameters and FLOP of the dense network, and the time of an epoch, from a few steps of its training."""
    network = machine.place(checkpoint.network())
    parameters = sum(p.numel() for p in network.parameters())
    flop = with_unit(dense_flop(network, data.image_size))
    say(f"{parameters:,} parameters, {flop} FLOP an image of {data.image_size} px")
    if not data.train:
        return
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0)
    runner, seconds = machine.runner(network.train()), []
    batches = data.train_batches(seed=0)
    for images, labels in itertools.islice(batches, STEPS):
        began = time.monotonic()
        with machine.autocast():
            loss = F.cross_entropy(runner(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        seconds.append(time.monotonic() - began)
    epoch = data.num_train_batches * min(seconds)
    say(f"An epoch of {data.num_train_batches:,} steps will take about {duration(epoch)}, without validation")
