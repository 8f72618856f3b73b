"""One training step of EC2T, in the shape of an optimizer."""

import torch
from torch import nn

from engine.store.checkpoint import Content
from engine.training import load_moments
from model_quantization.quantized_layers import QuantizedLayers


class EC2TOptimizer:
    """Adam on the full-precision weights, the centroids and all other parameters, then a new assignment.

    With frozen layers the assignment stays: ternary weights then follow their centroids alone, and pruned
    weights that were kept go on learning.

    Args:
        others: the parameters outside the ternary layers.
        lr: of the full-precision weights and the other parameters.
        lr2: of the centroids.
        weight_decay: of the other parameters.
    """

    _step_supports_amp_scaling = True  # a gradient scaler need not wait to know whether gradients overflow

    def __init__(self, layers: QuantizedLayers, others: list[nn.Parameter], lr: float, lr2: float, weight_decay: float):
        self.layers, self.others = layers, others
        groups = [{"params": others, "weight_decay": weight_decay}]
        if not layers.prune:
            groups.append({"params": [layers.centroids], "lr": lr2})
        if layers.prune or not layers.frozen:
            groups.append({"params": [layers.weights]})
        on_gpu = layers.weights.is_cuda
        self.adam = torch.optim.Adam(groups, lr=lr, fused=True, capturable=on_gpu)  # by a CUDA graph
        # the parameters whose gradients backward leaves: a gradient scaler unscales them
        self.param_groups = [{"params": [*others, *layers.parameters]}]
        self._initial_lr = [group["lr"] for group in self.adam.param_groups]

    @property
    def lr(self) -> float:
        """The learning rate of the next step, centroids aside."""
        return self.adam.param_groups[0]["lr"]

    def scale_learning_rates(self, factor: float) -> None:
        """Set every learning rate to `factor` times its initial value."""
        for group, lr in zip(self.adam.param_groups, self._initial_lr, strict=True):
            group["lr"] = factor * lr

    def zero_grad(self) -> None:
        for parameter in self.others:
            parameter.grad = None
        self.layers.gradient.zero_()

    def step(self) -> None:
        """One step; a gradient scaler's factor passes to Adam, which skips the step where gradients overflow."""
        self.layers.collect_gradients()
        self.layers.scale_gradients()
        scaling = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        vars(self.adam).update(scaling)
        self.adam.step()
        for name in scaling:
            delattr(self.adam, name)
        self.layers.assign()

    def state_dict(self) -> Content:
        return {"adam": self.adam.state_dict(), "layers": self.layers.state_dict()}

    def load_state_dict(self, state: Content) -> None:
        load_moments(self.adam, state["adam"])
        self.layers.load_state_dict(state["layers"])
