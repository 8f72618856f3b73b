"""EC2T in a training loop of one's own."""

from collections.abc import Mapping, Sequence

from torch import nn

from model.selection import TERNARY, Patterns, chosen, inner_layers, overridden
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import AUTO, QuantizedLayers


class EC2T(QuantizedLayers):
    """Quantizes layers of `network` in place: its parameters are quantized from now on, and after every step.

    Put the network on its device before. What `torch.compile`, DistributedDataParallel or a scaler of gradients make
    of it afterwards trains as well, and so do its shared modules; parameters that require no gradient stay as they are.
    What else there is of the state (`centroids`, `entropy()`, `state_dict()`) is that of `QuantizedLayers`.

        quantizer = EC2T(network, s=0.3, g=0.1)
        optimizer = quantizer.optimizer(lr=1e-4)
        for images, labels in batches:
            optimizer.zero_grad()
            loss(network(images), labels).backward()
            optimizer.step()
        quantizer.freeze()
        optimizer = quantizer.optimizer(lr=1e-4)  # and the same loop again

    Args:
        network: any; its weights are those to begin with.
        s: where the outermost centroids begin, as a share of a layer's largest and smallest weight; "auto" takes the
            two steps of least squared error.
        g: the entropy constraint, as a share of the lambda at which a cluster would vanish, from 0 to below 1; or by
            pattern of layers' names, 0 for all others.
        bits: 2 (ternary) to 8, or by pattern of layers' names.
        layers: patterns of the names of weights or their modules; of none, all convolutions and linear layers but the
            first and the last that were made, and depthwise ones.
        without: patterns of those that are left out.

    Raises model.selection.NoSuchLayer where a pattern matches no layer, and ValueError where no layer is left or a
    number is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        s: float | str = AUTO,
        g: float | Mapping[str, float] = 0.1,
        *,
        bits: int | Mapping[str, int] = TERNARY,
        layers: Sequence[str] = (),
        without: Sequence[str] = (),
    ):
        widths = {"*": bits} if isinstance(bits, int) else dict(bits)
        if not all(2 <= width <= 8 for width in widths.values()):
            raise ValueError(f"bits {bits}: from 2 to 8")
        strengths = dict(g) if isinstance(g, Mapping) else {"*": g}
        in_range = all(0 <= strength < 1 for strength in strengths.values())
        if not (s == AUTO or (isinstance(s, int | float) and 0 < s <= 1)) or not in_range:
            raise ValueError(f"s {s}, g {g}: s is {AUTO!r} or above 0 and at most 1, g from 0 to below 1")
        candidates = inner_layers(network, list(network.modules()))
        found = chosen(network, candidates, Patterns(tuple(layers), tuple(without), tuple(widths.items())))
        if not found:
            raise ValueError("no layer is left to quantize; name some by layers=")
        super().__init__(network, found, s, overridden(dict.fromkeys(found, 0.0), strengths.items()))
        self.network = network

    def optimizer(self, lr: float = 1e-4, lr2: float = 1e-5, weight_decay: float = 5e-6) -> EC2TOptimizer:
        """Adam with the steps of EC2T; a new one after `freeze`.

        Args:
            lr: of the full-precision weights and of the parameters that stay dense.
            lr2: of the centroids.
            weight_decay: L2 penalty of the parameters that stay dense.

        Its `adam` is what learning rate schedulers of torch take.
        """
        own = {id(parameter) for parameter in self.parameters}
        others = [p for p in self.network.parameters() if p.requires_grad and id(p) not in own]
        return EC2TOptimizer(self, others, lr, lr2, weight_decay)

    def freeze(self) -> None:
        """Keep every weight's level: from now on only centroids and dense parameters are trained."""
        self.frozen = True
