"""The `improved` ruler: the challenge's rules, with cheaper storage and cheaper additions for quantized layers.

The EC2T authors' follow-up (D. Becking, "Finding Storage- and Compute-Efficient Convolutional Neural
Networks", TU Berlin 2020, section 4.3), whose scores are 0.0130 for CIFAR-100 and 0.3639 for ImageNet. It is
`challenge` but for two things:

- Weights are also offered the compressed sparse row and compressed entropy row formats; see
  `storage.improved_formats`.
- The values that an output of a ternary layer sums over are added in a binary tree. The sum of two values of
  b bits needs b + 1 bits and no more, so that level by level the additions widen from b to 32 bits. Biases,
  residual additions and the additions of other layers have the stated width. By analogy, a layer of more bits, on a
  grid or with a codebook, has a tree over all weights of a filter that are not zero, as the challenge's winner
  counted.

The authors' widths are 16 bit for values and multiplications and 32 bit for additions. With these their
ResNet-20 (CIFAR-10, 63.90% zeros) counts 11,927 parameters and 8.638 MFLOP here, 11.8K and 8.5M in their
table. The differences, which leave exactly 11,798 and 8.495 as their program counts:

    parameters   + 133.9   masks of channels that they remove although a residual addition feeds or reads them
                 +   3.5   biases of such channels
                 -   7.9   they round every layer up to whole parameters
    MFLOP        + 0.082   of nine residual additions they count the last one's
                 + 0.037   their trees have one summand too few
                 + 0.020   a tree for each filter, where theirs has the layer's average number of summands
                 + 0.004   the global average pool, which they do not count
                 + 0.001   ReLU of the channels that they remove
"""

from typing import Any

import torch
from torch import Tensor, nn

from rulers.challenge import Graph, analysed, measure
from rulers.folding import Folding
from rulers.rules import RULES, Operations, Rule, layer_cost
from rulers.storage import improved_formats
from rulers.tally import Tally, Widths
from rulers.values import Node

WIDEST = 32


def count(network: nn.Module | Graph, shapes: Any, widths: Widths) -> Tally:
    """Count `network` for inputs of `shapes`, as `challenge.count` has it."""
    graph = network if isinstance(network, Graph) else analysed(network, shapes)
    return measure(graph, widths, "improved", TREE_RULES, improved_formats)


def tree_bits(summands: Tensor, b: int) -> Tensor:
    """The widths of all additions in trees over `summands` values each, added up tree by tree.

    A level pairs its values, of b bits in the first level and of one bit more in each after it, and a value
    left over waits for the next level: m values take m // 2 additions and leave (m + 1) // 2.
    """
    bits = torch.zeros_like(summands)
    width = b
    while (summands > 1).any():
        bits += summands // 2 * min(width, WIDEST)
        summands = (summands + 1) // 2
        width += 1
    return bits


def tree_cost(node: Node, folding: Folding, b: int) -> Operations | None:
    """A convolution or linear layer; the sum over a quantized filter runs in an adder tree, a bias does not."""
    operations = layer_cost(node, folding, b)
    layer = folding.layers.get(node)
    if operations is None or layer is None or layer.code is None or layer.transposed:
        return operations
    summands = layer.summands[layer.live]
    return Operations(
        operations.mults,
        operations.adds,
        tree_adds=int((summands - 1).sum()) * layer.positions,
        tree_bits=int(tree_bits(summands, b).sum()) * layer.positions,
    )


TREE_RULES = RULES | {
    operation: Rule(rule.group, tree_cost, rule.named) for operation, rule in RULES.items() if rule.cost is layer_cost
}
