"""Networks that tests build: the smallest ones, and those of the reference checkpoints."""

import functools

from torch import Tensor, nn

from model import build
from reference.make_checkpoint import make_state_dict

TINY = {"name": "cifar_micronet", "depth": 0.1, "width": 0.5, "num_classes": 2}  # 1-1-1 blocks of 8-16-32
SPECS = {  # of the reference checkpoints
    "cifar_micronet": {"depth": 1.4**3.5, "width": 1.2**3.5, "num_classes": 100},
    "imagenet_micronet": {"depth": 1.2, "width": 1.3},
}


def reference_state(network: nn.Module, name: str, salt: int = 1) -> dict[str, Tensor]:
    """Ternary, pruned and dense tensors for a network of this name."""
    return make_state_dict(network, "efficientnet" if name.startswith("efficientnet") else "micronet", salt)


@functools.cache
def reference_network(name: str, salt: int = 1) -> nn.Module:
    """The network of a reference checkpoint; shared, so not to be changed."""
    network = build({"name": name, **SPECS.get(name, {})})
    network.load_state_dict(reference_state(network, name, salt))
    return network
