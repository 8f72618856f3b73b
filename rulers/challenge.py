"""The `challenge` ruler: the rules of the MicroNet Challenge, for any network.

NeurIPS 2019, https://micronet-challenge.github.io/scoring_and_submission.html. What counts is what runs (see
`graph`), less what is known before any image (see `folding`). `RULES` says what each operation costs; one
that it does not know is listed as uncounted, and one that only moves data costs nothing.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from model.selection import is_ternary
from rulers.folding import BATCH_NORMS, Folding, fold, is_batch_norm
from rulers.graph import Node, Value, trace
from rulers.storage import Formats, Matrix, challenge_formats, smallest
from rulers.tally import Group, Line, Tally, Uncounted, Widths


@dataclass(frozen=True)
class Operations:
    """What an operation costs; `tree_adds` of its additions run in adder trees, with `tree_bits` in all."""

    mults: int
    adds: int
    tree_adds: int = 0
    tree_bits: int = 0


# What an operation costs, None if the rule does not hold for it; from the operation, what is folded, and b.
Cost = Callable[[Node, Folding, int], Operations | None]


@dataclass(frozen=True)
class Rule:
    """What an operation costs, and under which heading it is listed."""

    group: str
    cost: Cost


# ---------------------------------------------------------------------------------------------------- rules


def per_element(group: str, mults: int, adds: int) -> Rule:
    """A rule of `mults` multiplications and `adds` additions for each element of the output."""

    def cost(node: Node, folding: Folding, b: int) -> Operations:
        n = folding.varying(node.output)
        return Operations(mults * n, adds * n)

    return Rule(group, cost)


def layer_cost(node: Node, folding: Folding, b: int) -> Operations | None:
    """A convolution or linear layer: a product for each weight that is not zero, and their sum.

    In a ternary layer the summands of either value are added first, and the two sums multiplied.
    """
    layer = folding.layers.get(node)
    if layer is None:
        return None
    live, nonzero = int(layer.live.sum()), int(layer.summands.sum())
    products = min(nonzero, 2 * live) if layer.ternary else nonzero
    biases = live if layer.biased else 0
    return Operations(products * layer.positions, (nonzero - live + biases) * layer.positions)


def batch_norm_cost(node: Node, folding: Folding, b: int) -> Operations | None:
    """A BatchNorm that does not merge: a multiplication and an addition for each element."""
    n = folding.varying(node.output)
    return Operations(n, n) if is_batch_norm(node) else None


def average_cost(node: Node, folding: Folding, b: int) -> Operations:
    """A mean over dimensions, such as the global average pool: a sum, and a division for each output."""
    n = folding.varying(node.output)
    summands = node.arguments["self"].numel // node.output.numel
    return Operations(n, (summands - 1) * n)


def average_pool_cost(node: Node, folding: Folding, b: int) -> Operations:
    """An average over square windows; padding counts, as it does in convolutions."""
    n = folding.varying(node.output)
    kernel = node.arguments["kernel_size"]
    dimensions = len(node.output.shape) - 2
    return Operations(n, (prod(kernel) ** (dimensions // len(kernel)) - 1) * n)


def adaptive_pool_cost(node: Node, folding: Folding, b: int) -> Operations:
    """An average over windows that divide the input evenly, overlapping where they must."""
    sizes = zip(node.arguments["self"].shape[2:], node.output.shape[2:], strict=True)
    summands = prod(sum(-(-(i + 1) * old // new) - i * old // new for i in range(new)) for old, new in sizes)
    windows = prod(node.output.shape[2:])
    channels = folding.varying_channels(node.output)
    return Operations(windows * channels, (summands - windows) * channels)


def free(node: Node, folding: Folding, b: int) -> Operations:
    """Data that only moves."""
    return Operations(0, 0)


MOVES = (
    "view", "_unsafe_view", "squeeze", "unsqueeze", "t", "transpose", "permute", "expand", "repeat", "unfold",
    "slice", "select", "split", "split_with_sizes", "unbind", "index", "index_select", "gather", "as_strided",
    "cat", "stack", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "roll",
    "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "upsample_nearest2d", "clone", "copy",
    "_to_copy", "detach", "alias", "fill", "zero", "empty_like", "zeros_like", "ones_like", "full_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "return",
)  # fmt: skip

# The rules name convolutions, linear layers, averages, products, additions, ReLU, swish, sigmoid and h-swish.
# By analogy, a clipped ReLU counts as ReLU, a hard sigmoid as h-swish without its product, a difference as a
# sum and a quotient as a product. The comparisons of a max pool are like none of them, and stay uncounted.
RULES: dict[str, Rule] = {
    "convolution": Rule("convolutions", layer_cost),
    "addmm": Rule("linear layers", layer_cost),
    "mm": Rule("linear layers", layer_cost),
    **dict.fromkeys(BATCH_NORMS, Rule("batch norms", batch_norm_cost)),
    "relu": per_element("activations", 1, 0),
    "hardtanh": per_element("activations", 1, 0),  # ReLU6
    "clamp_min": per_element("activations", 1, 0),
    "clamp": per_element("activations", 1, 0),
    "silu": per_element("activations", 3, 1),  # swish
    "sigmoid": per_element("activations", 2, 1),
    "hardswish": per_element("activations", 4, 1),
    "hardsigmoid": per_element("activations", 3, 1),  # h-swish without its product
    "mean": Rule("poolings", average_cost),
    "avg_pool2d": Rule("poolings", average_pool_cost),
    "avg_pool3d": Rule("poolings", average_pool_cost),
    "_adaptive_avg_pool2d": Rule("poolings", adaptive_pool_cost),
    "_adaptive_avg_pool3d": Rule("poolings", adaptive_pool_cost),
    "add": per_element("additions", 0, 1),  # residual
    "sub": per_element("additions", 0, 1),
    "rsub": per_element("additions", 0, 1),
    "mul": per_element("products", 1, 0),  # squeeze and excitation
    "div": per_element("products", 1, 0),
    **dict.fromkeys(MOVES, Rule("", free)),
}

GROUPS = (*dict.fromkeys(rule.group for rule in RULES.values() if rule.group), "other values")


# ------------------------------------------------------------------------------------------------- counting


def count(network: nn.Module, image_size: int | tuple[int, ...], widths: Widths) -> Tally:
    """Count `network` for one RGB image of `image_size` x `image_size` pixels.

    `image_size` may also be the shape of an input that is no such image, without the batch. Every parameter
    that the network uses belongs to exactly one line of the tally, in `numel` and `nonzero`; `params` is the
    number of all of them. Stored values that a rule does not mention (a scale, a position embedding) take
    the fewest bits like any weights.
    """
    return measure(network, image_size, widths, "challenge", RULES, challenge_formats)


def measure(
    network: nn.Module,
    image_size: int | tuple[int, ...],
    widths: Widths,
    ruler: str,
    rules: Mapping[str, Rule],
    formats: Callable[[Matrix, int], Formats],
) -> Tally:
    """Count `network` by `rules` for its operations and by `formats` for its stored weights."""
    lines: dict[str, dict[str, Line]] = {group: {} for group in GROUPS}
    uncounted: dict[tuple[str, str], Uncounted] = {}
    seen: set[str | Value] = set()
    nodes = trace(network, image_size)
    folding = fold(nodes)
    for node in nodes:
        if node in folding.merged:
            continue
        rule = rules.get(node.operation)
        operations = rule.cost(node, folding, widths.value) if rule else None
        if operations is None:
            key = node.operation, node.place
            uncounted.setdefault(key, Uncounted(node.operation, 0, node.place)).count += 1
        line = _stored(node, folding, widths.value, formats, seen)
        if operations is not None and rule.group:
            line.mults, line.adds = operations.mults, operations.adds
            line.tree_adds, line.tree_bits = operations.tree_adds, operations.tree_bits
            _add(lines[rule.group], line)
        elif line.bits:
            _add(lines["other values"], line)
    groups = [Group(group, list(lines[group].values())) for group in GROUPS if lines[group]]
    params = sum(parameter.numel() for parameter in network.parameters())
    return Tally(ruler, widths, groups, params, uncounted=list(uncounted.values()))


def _stored(
    node: Node, folding: Folding, b: int, formats: Callable[[Matrix, int], Formats], seen: set[str | Value]
) -> Line:
    """The line of `node`, with those values it reads that are stored, unless `seen` has them."""
    layer = folding.layers.get(node)
    readers = [node, *layer.norms] if layer else [node]
    values = {value.stored or value: value for reader in readers for value in reader.inputs if value.fixed}
    new = [value for key, value in values.items() if key not in seen and value.data is not None]
    seen.update(values)

    name, note, bits = node.name, "", 0
    if layer:
        name = _module(layer.weight) or name
        if layer.weight in new:
            note, bits = smallest(formats(layer.matrix, b))
            bits += int(layer.kept.sum()) * b if layer.biased else 0
    elif is_batch_norm(node):
        name = _module(node.arguments["running_mean"]) or name
        bits = 2 * b * folding.varying_channels(node.output) if new else 0
    else:
        bits = sum(smallest(formats(_matrix(value.data), b))[1] for value in new)
    weights = [value.data for value in new if value.trained]
    numel = sum(weight.numel() for weight in weights)
    nonzero = sum(int(weight.count_nonzero()) for weight in weights)
    return Line(name, bits, numel=numel, nonzero=nonzero, note=note)


def _module(value: Value) -> str:
    """The path of the module that a stored value belongs to, "" if none does."""
    return (value.stored or "").rpartition(".")[0]


def _matrix(values: Tensor) -> Matrix:
    """Stored values that belong to no layer, as a matrix with one row."""
    return Matrix(1, values.numel(), values.numel(), int(values.count_nonzero()), is_ternary(values))


def _add(lines: dict[str, Line], line: Line) -> None:
    """Add `line` to those of a group: operations of one name share a line."""
    total = lines.setdefault(line.name, Line(line.name, note=line.note))
    for amount in ("bits", "mults", "adds", "numel", "nonzero", "tree_adds", "tree_bits"):
        setattr(total, amount, getattr(total, amount) + getattr(line, amount))
