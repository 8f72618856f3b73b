"""Bits and g a layer for a budget: each layer's cost at each of them beside what it does to the network's answers.

A sensitivity pass quantizes one layer at a time, without training, and measures how far the network's answers move from
its own in full precision, on a few hundred images. From the costliest layers on, the saving that moves them least for
what it saves is taken again and again, until the budget holds; what is left of it then goes back where it helps most.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rulers
from engine import distributed
from engine.device import Machine
from engine.images.batches import Data
from engine.program.errors import UserError
from engine.program.report import progress, say, table
from engine.store.checkpoint import Checkpoint
from model_quantization import ec2t
from model_quantization.quantized_layers import AUTO, QuantizedLayers
from rulers.tally import task_of

WIDTHS = (8, 6, 5, 4, 3, 2)
IMAGES = 256


@dataclass(frozen=True)
class Budget:
    """What a network may cost: bytes of its values, or a score on the `challenge` ruler."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:,.0f} bytes" if self.unit == "bytes" else f"a score of {self.amount:g}"


@dataclass(frozen=True)
class Option:
    """A layer at a width and a g: what it costs, and the divergence (nats an image) of the answers that it leads to."""

    bits: int
    g: float
    cost: float
    divergence: float


def options_within(
    budget: Budget, checkpoint: Checkpoint, names: list[str], strengths: list[float], data: Data, machine: Machine
) -> dict[str, Option]:
    """The bits of each of the layers `names`, and its g of `strengths`; a table is printed, and the flags of them.

    UserError where nothing holds the budget.
    """
    network = machine.place(checkpoint.network()).eval()
    probe, options, rest = Probe(network, data), {name: list[Option]() for name in names}, 0.0
    candidates = list(itertools.product(WIDTHS, dict.fromkeys(strengths)))
    for bits, g in progress(candidates, "sensitivity", len(candidates)):
        narrow = checkpoint.network().eval()
        layers = QuantizedLayers(narrow, dict.fromkeys(names, bits), AUTO, g)
        if budget.unit == "bytes":
            costs = dict(zip(names, _bytes(layers), strict=True))
            rest = 2.0 * sum(p.numel() for name, p in narrow.named_parameters() if name not in costs)
        else:
            costs, rest = _scores(narrow, names, data)
        for name in names:
            options[name].append(Option(bits, g, costs[name], probe.divergence(name, narrow.get_parameter(name))))
    chosen = choose(options, budget.amount - rest)
    if chosen is None:
        least = rest + sum(min(option.cost for option in of_layer) for of_layer in options.values())
        smallest = Budget(least, budget.unit)
        raise UserError(f"--budget: two bits a layer take {smallest}, more than {budget}; choose --layers, or raise it")
    _show(chosen, budget, rest)
    return chosen


def choose(options: dict[str, list[Option]], amount: float) -> dict[str, Option] | None:
    """One option a layer, which together cost at most `amount`; None: can't be.

    Greedy: from the costliest ones on, that change of any layer to any of its cheaper options comes next which adds
    least divergence for what it saves. What is left of `amount` in the end goes to the changes that take most
    divergence away for what they cost.
    """
    at = {name: max(of_layer, key=lambda option: option.cost) for name, of_layer in options.items()}

    def changes(left: float) -> Iterator[tuple[float, str, Option]]:
        """Of any layer to any option that is cheaper or, within what is left, better; each with its divergence a cost.

        That is what it adds for what it saves: the least comes first both ways.
        """
        for name, now in at.items():
            for then in options[name]:
                saved, added = now.cost - then.cost, then.divergence - now.divergence
                is_wanted = saved > 0 if left < 0 else added < 0 and -saved <= left
                if is_wanted:
                    yield (added / abs(saved) if saved else added * inf), name, then

    while True:
        left = amount - sum(option.cost for option in at.values())
        best = min(changes(left), key=itemgetter(0), default=None)
        if best is None:
            return at if left >= 0 else None
        at[best[1]] = best[2]


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


class Probe:
    """A network's own answers to some images, and how far those with another weight are from them."""

    def __init__(self, network: nn.Module, data: Data):
        some = data.spread(IMAGES)
        self.network, self.number = network, some.num_val_images
        self.images = [batch for batch, _ in some.val_batches()]
        self.own = list(self.answers())

    @torch.no_grad()
    def answers(self) -> Iterator[Tensor]:
        """Log-probabilities, a batch at a time; of several processes each has some of the images."""
        for batch in self.images:
            yield F.log_softmax(self.network(batch).float(), 1)

    @torch.no_grad()
    def divergence(self, name: str, values: Tensor) -> float:
        """The mean Kullback-Leibler divergence (nats) of the answers with `values` as the weight `name`."""
        weight = self.network.get_parameter(name)
        before = weight.detach().clone()
        weight.copy_(values)
        total = torch.zeros((), device=weight.device)
        for answers, own in zip(self.answers(), self.own, strict=True):
            total += F.kl_div(answers, own, reduction="sum", log_target=True)
        weight.copy_(before)
        return distributed.all_reduce(total).item() / self.number


def _show(chosen: dict[str, Option], budget: Budget, rest: float) -> None:
    form = "{:,.0f}" if budget.unit == "bytes" else "{:.6f}"
    rows = [[name, o.bits, f"{o.g:g}", form.format(o.cost), f"{o.divergence:.5f}"] for name, o in chosen.items()]
    total = rest + sum(option.cost for option in chosen.values())
    heads = ["layer", "bits", "g", budget.unit, "divergence"]
    say("\n" + table(heads, [*rows, ["all else", "", "", form.format(rest), ""]]))
    say(f"{form.format(total)} for a budget of {budget}; the same again:")
    bits, strengths = ([f"{name}={getattr(o, what):g}" for name, o in chosen.items()] for what in ("bits", "g"))
    say(f"  --bits {' '.join(bits)} --g {' '.join(strengths)}")
