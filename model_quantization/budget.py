"""Bits a layer for a budget: each layer's cost at each width beside what that width does to the network's answers.

A sensitivity pass quantizes one layer at a time, without training, and measures how far the network's answers move from
its own in full precision, on a few hundred images. From the widest layers on, the narrowing that moves them least for
what it saves is taken again and again, until the budget holds.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rulers
from engine.device import Machine
from engine.images.batches import Data
from engine.program.errors import UserError
from engine.program.report import progress, say, table
from engine.store.checkpoint import Checkpoint
from model_quantization import ec2t
from model_quantization.quantized_layers import AUTO, QuantizedLayers
from rulers.tally import task_of

WIDTHS = (8, 6, 5, 4, 3, 2)
IMAGES = 512


@dataclass(frozen=True)
class Budget:
    """What a network may cost: bytes of its values, or a score on the `challenge` ruler."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:,.0f} bytes" if self.unit == "bytes" else f"a score of {self.amount:g}"


@dataclass(frozen=True)
class Option:
    """A layer at a width: what it costs, and the divergence (nats an image) of the answers that it leads to."""

    bits: int
    cost: float
    divergence: float


def widths_within(
    budget: Budget, checkpoint: Checkpoint, names: list[str], g: float, data: Data, machine: Machine
) -> dict[str, int]:
    """The bits of each of the layers `names`, of which a table is printed, and the flags that repeat them.

    UserError where not even two bits a layer hold the budget.
    """
    network = machine.place(checkpoint.network()).eval()
    dense = sum(p.numel() for p in network.parameters())
    quantized, costs, rest = {}, {}, 0.0
    for bits in WIDTHS:
        narrow = checkpoint.network().eval()
        layers = QuantizedLayers(narrow, dict.fromkeys(names, bits), AUTO, g)
        quantized[bits] = {name: narrow.get_parameter(name).detach().clone() for name in names}
        if budget.unit == "bytes":
            costs[bits] = dict(zip(names, _bytes(layers), strict=True))
            rest = 2.0 * (dense - sum(map(torch.Tensor.numel, quantized[bits].values())))
        else:
            costs[bits], rest = _scores(narrow, names, data)
    divergences = _divergences(network, names, quantized, data)
    options = {n: [Option(bits, costs[bits][n], divergences[n][bits]) for bits in WIDTHS] for n in names}
    chosen = choose(options, budget.amount - rest)
    if chosen is None:
        least = rest + sum(of_layer[-1].cost for of_layer in options.values())
        smallest = Budget(least, budget.unit)
        raise UserError(f"--budget: two bits a layer take {smallest}, more than {budget}; choose --layers, or raise it")
    _show(chosen, budget, rest)
    return {name: option.bits for name, option in chosen.items()}


def choose(options: dict[str, list[Option]], amount: float) -> dict[str, Option] | None:
    """One option a layer, from widest to narrowest in each list, that together cost at most `amount`; None: can't be.

    Greedy: of all narrowings of any layer, to any of its narrower options, that with the least divergence for what it
    saves comes next.
    """
    at = dict.fromkeys(options, 0)

    def price(name: str, to: int) -> float:
        now, then = options[name][at[name]], options[name][to]
        saved = now.cost - then.cost
        return (then.divergence - now.divergence) / saved if saved > 0 else float("inf")

    while sum(options[name][i].cost for name, i in at.items()) > amount:
        moves = [(price(name, to), name, to) for name, i in at.items() for to in range(i + 1, len(options[name]))]
        if not moves:
            return None
        _, name, to = min(moves)
        at[name] = to
    return {name: options[name][i] for name, i in at.items()}


def _bytes(layers: QuantizedLayers) -> list[float]:
    """What each layer's symbols take at their entropy, with its two steps."""
    return (ec2t.entropy(layers.cluster_sizes(), layers.numel) * layers.numel / 8 + 8).tolist()


def _scores(network: nn.Module, names: list[str], data: Data) -> tuple[dict[str, float], float]:
    """What each layer adds to the network's score on the `challenge` ruler, and what all else does."""
    task, costs = task_of(data.name), dict.fromkeys(names, 0.0)
    tally = rulers.count(network, data.val_image_size)["challenge"]
    for line in (line for group in tally.groups for line in group.lines):
        if (name := f"{line.name}.weight") in costs:
            costs[name] += line.bits / 32 / task.base_params + 1e6 * tally.line_mflop(line) / task.base_ops
    return costs, tally.score(task) - sum(costs.values())


@torch.no_grad()
def _divergences(
    network: nn.Module, names: list[str], quantized: dict[int, dict[str, Tensor]], data: Data
) -> dict[str, dict[int, float]]:
    """The mean Kullback-Leibler divergence of the answers, with each layer at each width, from the network's own."""
    images, seen = [], 0
    for batch, _ in data.val_batches():
        images.append(batch[: IMAGES - seen])
        seen += len(images[-1])
        if seen == IMAGES:
            break

    def answers() -> Tensor:
        return torch.cat([F.log_softmax(network(batch).float(), 1) for batch in images])

    own, found = answers(), {name: dict[int, float]() for name in names}
    for name in progress(names, "sensitivity", len(names)):
        weight = network.get_parameter(name)
        before = weight.detach().clone()
        for bits in WIDTHS:
            weight.copy_(quantized[bits][name])
            found[name][bits] = F.kl_div(answers(), own, reduction="batchmean", log_target=True).item()
        weight.copy_(before)
    return found


def _show(chosen: dict[str, Option], budget: Budget, rest: float) -> None:
    form = "{:,.0f}" if budget.unit == "bytes" else "{:.6f}"
    rows = [[name, o.bits, form.format(o.cost), f"{o.divergence:.5f}"] for name, o in chosen.items()]
    total = rest + sum(option.cost for option in chosen.values())
    say("\n" + table(["layer", "bits", budget.unit, "divergence"], [*rows, ["all else", "", form.format(rest), ""]]))
    say(f"{form.format(total)} for a budget of {budget}; the same again:")
    say("  --bits " + " ".join(f"{name}={option.bits}" for name, option in chosen.items()))
