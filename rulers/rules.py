"""What each operation costs: one table from aten's operations to their rules.

The challenge's rules name convolutions, linear layers, averages, products, additions, ReLU, swish, sigmoid and
h-swish. Everything else is counted by analogy, and every summary says how much of its total that is:

- a product, a quotient, a square and every transcendental function (exp, log, tanh, erf, sqrt, sin) is one
  multiplication, as the exponential and the quotient of a sigmoid are;
- a sum, a difference, a comparison, a selection, a rounding and a step of logic is one addition;
- a function that is made of such steps costs what they cost, and a matrix product what a linear layer of as many
  weights does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from rulers.folding import BATCH_NORMS, Folding, is_batch_norm
from rulers.layers import PRODUCTS
from rulers.storage import TERNARY
from rulers.values import Node, Value


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
    """What an operation costs, under which heading it is listed, and whether the challenge's rules name it."""

    group: str
    cost: Cost
    named: bool = True


def _tensor(node: Node) -> Value:
    """The tensor that an operation is about."""
    return node.arguments["input"] if "input" in node.arguments else node.arguments["self"]


def per_element(mults: int, adds: int) -> Cost:
    """`mults` multiplications and `adds` additions for each element of the output."""

    def cost(node: Node, folding: Folding, b: int) -> Operations:
        n = folding.varying(node.output)
        return Operations(mults * n, adds * n)

    return cost


def layer_cost(node: Node, folding: Folding, b: int) -> Operations | None:
    """A convolution or linear layer: a product for each weight that is not zero, and their sum.

    Where few weights are distinct, the summands of each value are added first, and the sums multiplied: of a ternary
    layer two an output, of others as many as the layer has levels, or the filter weights. A product of
    features with features has no weights: each output sums over as many products as a row has elements.
    """
    layer = folding.layers.get(node)
    if layer is None:
        return _product_of_features(node)
    live, nonzero = int(layer.live.sum()), int(layer.summands.sum())
    products, outputs = nonzero * layer.positions, live * layer.outputs
    mults = products
    if layer.code is TERNARY or (layer.code and layer.transposed):
        mults = min(products, layer.code.levels * outputs)
    elif layer.code:
        mults = int(layer.summands.clamp(max=layer.code.levels).sum()) * layer.positions
    return Operations(mults, max(products - outputs, 0) + (outputs if layer.biased else 0))


def _product_of_features(node: Node) -> Operations | None:
    if node.operation not in PRODUCTS:
        return None
    left, _, bias = (node.arguments.get(name or "") for name in PRODUCTS[node.operation])
    if left is None:
        return None
    n, summands = node.output.numel, left.shape[-1]
    return Operations(n * summands, n * (summands - 1) + (n if bias else 0))


def batch_norm_cost(node: Node, folding: Folding, b: int) -> Operations | None:
    """A BatchNorm that does not merge: a multiplication and an addition for each element."""
    if not is_batch_norm(node):
        return norm_cost(node, folding, b)
    n = folding.varying(node.output)
    return Operations(n, n)


def norm_cost(node: Node, folding: Folding, b: int) -> Operations:
    """Mean and variance of each group of elements, which are then shifted and scaled, and the weight and bias."""
    n, arguments = node.output.numel, node.arguments
    if "normalized_shape" in arguments:
        groups = n // prod(arguments["normalized_shape"])
    else:
        groups = node.output.shape[0] * arguments["group"] if "group" in arguments else node.output.shape[1]
    if "rms" in node.operation:
        mults, adds = 2 * n + 2 * groups, n  # squares, scale; their mean, its root; the sum, epsilon
    else:
        mults, adds = 2 * n + 3 * groups, 3 * n - groups  # and the mean, twice the sum, less one, and the shift
    weight, bias = arguments.get("weight"), arguments.get("bias")
    return Operations(mults + (n if weight else 0), adds + (n if bias else 0))


def average_cost(node: Node, folding: Folding, b: int) -> Operations:
    """A mean over dimensions, such as the global average pool: a sum, and a division for each output."""
    n = folding.varying(node.output)
    summands = _tensor(node).numel // max(node.output.numel, 1)
    return Operations(n, (summands - 1) * n)


def reduction_cost(node: Node, folding: Folding, b: int) -> Operations:
    """A sum, a maximum or a test over dimensions: an addition for each element but the first."""
    return Operations(0, _tensor(node).numel - node.output.numel)


def variance_cost(node: Node, folding: Folding, b: int) -> Operations:
    """Mean, differences, squares, and their mean; a root for a deviation."""
    n, groups = _tensor(node).numel, node.output.numel
    return Operations(n + groups * (3 if "std" in node.operation else 2), 3 * n - 2 * groups)


def length_cost(node: Node, folding: Folding, b: int) -> Operations:
    """The root of a sum of squares."""
    n, groups = _tensor(node).numel, node.output.numel
    return Operations(n + groups, n - groups)


def softmax_cost(node: Node, folding: Folding, b: int) -> Operations:
    """The maximum, differences to it, their exponentials, the sum of these, and a quotient for each.

    The logarithm of a softmax subtracts the logarithm of the sum instead.
    """
    n = node.output.numel
    rows = n // max(node.output.shape[node.arguments["dim"]] if node.output.shape else 1, 1)
    if "log" in node.operation:
        return Operations(n + rows, 4 * n - 2 * rows)
    return Operations(2 * n, 3 * n - 2 * rows)


def power_cost(node: Node, folding: Folding, b: int) -> Operations:
    """A whole power is repeated products, any other one operation."""
    exponent, n = node.arguments["exponent"], folding.varying(node.output)
    whole = isinstance(exponent, int | float) and exponent == int(exponent) and abs(exponent) >= 1
    return Operations(n * (max(int(abs(exponent)) - 1 + (exponent < 0), 0) if whole else 1), 0)


def _window(node: Node) -> int:
    """Elements of a pooling's window."""
    kernel, dimensions = node.arguments["kernel_size"], len(node.output.shape) - 2
    return prod(kernel) ** (dimensions // len(kernel))


def average_pool_cost(node: Node, folding: Folding, b: int) -> Operations:
    """An average over windows; padding counts, as it does in convolutions."""
    n = folding.varying(node.output)
    return Operations(n, (_window(node) - 1) * n)


def max_pool_cost(node: Node, folding: Folding, b: int) -> Operations:
    """The maximum of windows; padding counts, as it does in convolutions."""
    return Operations(0, (_window(node) - 1) * folding.varying(node.output))


def adaptive_pool_cost(node: Node, folding: Folding, b: int) -> Operations:
    """An average, or a maximum, over windows that divide the input evenly, overlapping where they must."""
    sizes = zip(node.arguments["self"].shape[2:], node.output.shape[2:], strict=True)
    summands = prod(sum(-(-(i + 1) * old // new) - i * old // new for i in range(new)) for old, new in sizes)
    windows = prod(node.output.shape[2:])
    channels = folding.varying_channels(node.output)
    mults = 0 if "max" in node.operation else windows * channels
    return Operations(mults, (summands - windows) * channels)


def resampling(points: int) -> Cost:
    """The weighted sum of `points` elements for each output; the weights are known before any image."""
    return per_element(points, points - 1)


def gelu_cost(node: Node, folding: Folding, b: int) -> Operations | None:
    """x / 2 * (1 + erf(x / sqrt 2)), or its approximation by tanh of a cubic polynomial."""
    return per_element(*((8, 2) if node.arguments["approximate"] == "tanh" else (4, 1)))(node, folding, b)


def free(node: Node, folding: Folding, b: int) -> Operations:
    """Data that only moves."""
    return Operations(0, 0)


MOVES = (
    "view", "_unsafe_view", "squeeze", "unsqueeze", "t", "transpose", "permute", "expand", "repeat", "unfold",
    "slice", "select", "split", "split_with_sizes", "unbind", "index", "index_select", "gather", "as_strided",
    "cat", "stack", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "roll", "flip", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "clone", "copy",
    "_to_copy", "detach", "alias", "fill", "zero", "return", "update", "unsafe_split", "unsafe_split_with_sizes",
    "_reshape_alias", "diagonal", "im2col", "rot90", "tril", "triu", "embedding", "index_put", "scatter",
    "slice_scatter", "select_scatter", "lift_fresh", "view_as_real", "view_as_complex", "take",
    "_local_scalar_dense", "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "real", "imag",
    "_conj", "masked_select", "diag_embed", "native_channel_shuffle",
)  # fmt: skip

_ONE_MULTIPLICATION = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
    "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "erf", "erfinv", "neg", "square",
)  # fmt: skip
_ONE_ADDITION = (
    "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where", "masked_fill", "abs", "sign", "sgn", "round",
    "floor", "ceil", "trunc", "frac", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and",
    "bitwise_or", "bitwise_not", "bitwise_xor", "isnan", "isinf", "heaviside", "cumsum",
)  # fmt: skip
_REDUCTIONS = ("sum", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all")

# Activations by analogy: multiplications and additions an element.
_ACTIVATIONS = {
    "hardsigmoid": (3, 1),  # h-swish without its product
    "hardtanh": (1, 0),  # ReLU6 and its kin, as ReLU
    "clamp": (1, 0),
    "clamp_min": (1, 0),
    "clamp_max": (1, 0),
    "threshold": (1, 0),
    "leaky_relu": (1, 1),  # a comparison, and a product
    "prelu": (1, 1),
    "_prelu_kernel": (1, 1),
    "rrelu_with_noise": (1, 1),
    "elu": (2, 2),  # a comparison, a product, an exponential, less one
    "selu": (2, 2),
    "celu": (3, 2),
    "softplus": (2, 1),
    "log_sigmoid_forward": (2, 1),
    "mish": (4, 1),
    "glu": (3, 1),  # a sigmoid, and a product
    "hardshrink": (0, 1),
    "softshrink": (0, 2),
}


def _table() -> dict[str, Rule]:
    rules = {operation: Rule("", free) for operation in MOVES}

    def add(group: str, cost: Cost, *operations: str, named: bool = False) -> None:
        rules.update(dict.fromkeys(operations, Rule(group, cost, named)))

    add("convolutions", layer_cost, "convolution", named=True)
    add("linear layers", layer_cost, *PRODUCTS, named=True)
    add("batch norms", batch_norm_cost, *BATCH_NORMS, named=True)
    add("norms", batch_norm_cost, "_native_batch_norm_legit", "_batch_norm_with_update")
    add("norms", norm_cost, "native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm")
    add("activations", per_element(1, 0), "relu", named=True)
    add("activations", per_element(3, 1), "silu", named=True)  # swish
    add("activations", per_element(2, 1), "sigmoid", named=True)
    add("activations", per_element(4, 1), "hardswish", named=True)
    for operation, (mults, adds) in _ACTIVATIONS.items():
        add("activations", per_element(mults, adds), operation)
    add("activations", gelu_cost, "gelu")
    add("activations", softmax_cost, "_softmax", "_safe_softmax", "_log_softmax")
    add("poolings", average_cost, "mean", named=True)
    add("poolings", average_pool_cost, "avg_pool1d", "avg_pool2d", "avg_pool3d", named=True)
    add("poolings", adaptive_pool_cost, "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", named=True)
    add("poolings", adaptive_pool_cost, "adaptive_max_pool2d", "adaptive_max_pool3d")
    add("poolings", max_pool_cost, "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool3d")
    add("resampling", resampling(2), "upsample_linear1d")
    add("resampling", resampling(4), "upsample_bilinear2d")
    add("resampling", resampling(8), "upsample_trilinear3d")
    add("resampling", resampling(16), "upsample_bicubic2d")
    add("additions", per_element(0, 1), "add", named=True)  # residual
    add("additions", per_element(0, 1), "sub", "rsub", *_ONE_ADDITION)
    add("additions", per_element(1, 1), "lerp", "addcmul", "addcdiv")
    add("additions", reduction_cost, *_REDUCTIONS, "col2im")  # which adds up patches where they overlap
    add("products", per_element(1, 0), "mul", named=True)  # squeeze and excitation
    add("products", per_element(1, 0), "div", "remainder", "fmod", *_ONE_MULTIPLICATION)
    add("products", power_cost, "pow")
    add("statistics", variance_cost, "var", "var_mean", "std", "std_mean")
    add("statistics", length_cost, "linalg_vector_norm", "norm")
    return rules


RULES: dict[str, Rule] = _table()
"""The rule of each operation, by aten's name."""

GROUPS = (*dict.fromkeys(rule.group for rule in RULES.values() if rule.group), "other values")
