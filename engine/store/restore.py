"""Taking over the state of a run from a file: only what fits the network, and nothing that the arguments decide."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.identify import mismatches

MOMENTS = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}


def restore_network(network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a network's `state_dict`; ValueError where names, shapes or types are not the network's."""
    if differences := mismatches(network.state_dict(), state_dict):
        raise ValueError(differences[0])
    for name, tensor in network.state_dict().items():
        check_alike(name, state_dict[name], tensor)
    network.load_state_dict(state_dict)


def restore_optimizer(optimizer: Optimizer, state_dict: Mapping) -> None:
    """Load the moments of an optimizer's `state_dict`; ValueError where they are not those of its parameters.

    Learning rates and the like stay as they are: they follow from a run's arguments.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = MOMENTS[type(optimizer).__name__]
    for index, moments in state_dict["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or moments.keys() != names:
            raise ValueError("the optimizer's moments are not those of its parameters")
        for name, moment in moments.items():
            check_alike(name, moment, torch.ones(()) if name == "step" else parameters[index])
            if name in ("step", "exp_avg_sq") and (moment < 0).any():
                raise ValueError(f"{name} of the optimizer is negative")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state_dict["state"], "param_groups": groups})


def check_alike(name: str, tensor: Tensor, wanted: Tensor) -> None:
    """Raise ValueError unless `tensor` is a plain one on the CPU, with the shape and the dtype of `wanted`."""
    plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        raise ValueError(f"{name} is no tensor of {str(wanted.dtype).removeprefix('torch.')}, {list(wanted.shape)}")
