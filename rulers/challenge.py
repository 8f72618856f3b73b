"""The `challenge` ruler: the rules of the MicroNet Challenge, for any network.

NeurIPS 2019, https://micronet-challenge.github.io/scoring_and_submission.html. What counts is what runs (see
`graph`), less what is known before any image (see `folding`), and what is stored counts once (see `stored`).
`rules` says what each operation costs; one that it does not know is listed as uncounted, and one that only moves data
costs nothing.

    n        elements of an operation's output, for one image, without those of constant channels
    b        bits of a stored value
    nonzero  a layer's weights that are not zero; over its `live` filters, nonzero / live is what one output
             of it sums over

Widths are stated, not measured: every multiplication has `Widths.mul` bits and every addition `Widths.add`,
as the widest of their inputs. A network gets no width for free, quantized or not.

For MicroNet and EfficientNet, `published` differs by quirks of its closed forms only. Their sizes, for the
reference checkpoints of `tests/reference` with additions of 32 bit, as parameters / MFLOP to add to
`published`:

                                          cifar_micronet    imagenet_micronet    efficientnet-b1
                                                   32 px               200 px             256 px
    published                         450,942 /   255.50   965,912 /   245.18   1,468,834 / 265.52
    two masks, where signs do        -189,863              -316,832              -124,941
    resolution of layers                          + 1.23              + 632.62              + 59.30
    residual additions not counted                + 1.31                + 2.57               + 0.68
    BatchNorm before convolutions     + 2,440 /   + 0.69   + 1,500 /    + 3.58
    dead channels                    + 51,818 /  + 14.47 + 124,671 /   + 41.83        - 27 /  - 1.99
    challenge                         315,337 /   273.20   775,251 /   925.77   1,343,865 / 323.51

Resolution: strides that are taken too early, always or never, sizes rounded up, padding that counts as zero.
(EfficientNet's skip additions are counted, but far too few of them.) Dead channels: `published` removes
filters that sum to zero, and what they feed, whatever constant they are and whatever else feeds it; in
EfficientNet it removes none. BatchNorm: of one before a convolution, only the bias is counted. Besides, the
parameters of each group are cut to an integer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rulers.folding import Folding, fold
from rulers.graph import initialized, trace
from rulers.layers import Layer
from rulers.rules import GROUPS, RULES, Rule
from rulers.storage import challenge_formats
from rulers.stored import FormatsOf, Inventory, Share, shares, take_stock
from rulers.tally import Group, Line, Tally, Uncounted, Widths
from rulers.values import Node


@dataclass
class Graph:
    """A network as it runs and as it is stored, ready to be counted by any rules; `params` are all it has."""

    nodes: list[Node]
    folding: Folding
    inventory: Inventory
    params: int


def analysed(network: nn.Module, shapes: Any) -> Graph:
    """Run `network` once on inputs of `shapes`, as `graph.trace` takes them; it stays as it was."""
    network = initialized(network, shapes)
    nodes = trace(network, shapes)
    folding = fold(nodes)
    params = sum(parameter.numel() for parameter in network.parameters())
    return Graph(nodes, folding, take_stock(nodes, folding), params)


def count(network: nn.Module | Graph, shapes: Any, widths: Widths) -> Tally:
    """Count `network` for one RGB image of `shapes` x `shapes` pixels.

    `shapes` may also be the shape of an input that is no such image, without the batch, or a list of shapes. Every
    parameter that the network uses belongs to exactly one line of the tally, in `numel` and `nonzero`; `params` is
    the number of all of them. Stored values that a rule does not mention (a scale, a position embedding) take
    the fewest bits like any weights.
    """
    graph = network if isinstance(network, Graph) else analysed(network, shapes)
    return measure(graph, widths, "challenge", RULES, challenge_formats)


def measure(graph: Graph, widths: Widths, ruler: str, rules: Mapping[str, Rule], formats: FormatsOf) -> Tally:
    """Count `graph` by `rules` for its operations and by `formats` for what it stores."""
    lines: dict[str, dict[str, Line]] = {group: {} for group in GROUPS}
    uncounted: dict[tuple[str, str], Uncounted] = {}
    tally = Tally(ruler, widths, [], graph.params)
    stored = shares(graph.inventory, graph.folding, widths.value, formats)
    for node in graph.nodes:
        if node in graph.folding.merged:
            continue
        rule = rules.get(node.operation)
        operations = rule.cost(node, graph.folding, widths.value) if rule else None
        if operations is None:
            key = node.operation, node.place
            uncounted.setdefault(key, Uncounted(node.operation, 0, node.place)).count += 1
        line = _line(node, graph.folding, stored.get(node, Share()))
        if rule is not None and operations is not None and rule.group:
            line.mults, line.adds = operations.mults, operations.adds
            line.tree_adds, line.tree_bits = operations.tree_adds, operations.tree_bits
            line.mult_bits = line.mults * _width(graph.folding.layers.get(node), widths)
            _add(lines[rule.group], line)
            if not rule.named or (node.operation == "bmm" and node not in graph.folding.layers):
                mflop = tally.line_mflop(line)
                tally.by_analogy[node.operation] = tally.by_analogy.get(node.operation, 0.0) + mflop
        elif line.bits or line.numel:
            _add(lines["other values"], line)
    tally.groups = [Group(group, list(lines[group].values())) for group in GROUPS if lines[group]]
    tally.uncounted = list(uncounted.values())
    return tally


def _width(layer: Layer | None, widths: Widths) -> int:
    """Of an operation's multiplications, bits: a layer's weights may have more than activations."""
    if widths.act is None:
        return widths.mul
    weights = 0 if layer is None else layer.code.symbol if layer.code else widths.mul
    return max(widths.act, weights)


def _line(node: Node, folding: Folding, share: Share) -> Line:
    """The line of `node` with what is stored for it, named by the module that owns its weights."""
    owner = folding.layers[node].weight if node in folding.layers else node.arguments.get("running_mean")
    name = owner.stored.name.rpartition(".")[0] if owner and owner.stored else ""
    shape = folding.layers[node].shape if node in folding.layers else ""
    return Line(name or node.name, share.bits, numel=share.numel, nonzero=share.nonzero, note=share.note, shape=shape)


def _add(lines: dict[str, Line], line: Line) -> None:
    """Add `line` to those of a group: operations of one name share a line."""
    total = lines.setdefault(line.name, Line(line.name, note=line.note, shape=line.shape))
    for amount in ("bits", "mults", "adds", "numel", "nonzero", "tree_adds", "tree_bits", "mult_bits"):
        setattr(total, amount, getattr(total, amount) + getattr(line, amount))
