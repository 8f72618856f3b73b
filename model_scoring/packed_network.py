"""Which network a packed file holds, and which tensors: of a built-in one as its spec has them, of others as listed."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from model import ROWS, Spec
from model.identify import expected_state_dict
from model.names import mismatches
from model.own import is_own
from model_scoring.container import BadFile, Content, short

# A file that claims more is refused before anything of that size is made.
MAX_WEIGHTS = 2**28  # twice those of VGG-16
MAX_BYTES = 4 * MAX_WEIGHTS
MAX_TENSORS = 2**14

TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.complex64, torch.complex128),
    )
}


def type_name(tensor: Tensor) -> str:
    """The type of a tensor's elements, without `torch.`."""
    return str(tensor.dtype).removeprefix("torch.")


def described(content: Content) -> tuple[Spec, dict[str, Any], dict[str, Tensor]]:
    """What a file says: the spec, what the checkpoint said of its training, and the tensors.

    These are meta tensors, which take no memory, whatever is claimed. Raises BadFile and ValueError.
    """
    index = content.index
    spec, extra = index.get("spec"), index.get("extra")
    if not isinstance(spec, dict) or not isinstance(extra, dict):
        raise BadFile("does not say which network it holds; pack the network again")
    return spec, extra, _built_in(spec) if content.version == 1 else fitting(spec, _claimed(index))


def fitting(spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to store, or stored, in their order, without BatchNorm's counters of batches.

    Raises ValueError where they are not those of the built-in network that `spec` describes, BadFile where it
    describes none.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_counter(name, tensor)}
    if len(tensors) > MAX_TENSORS or sum(t.numel() * t.dtype.itemsize for t in tensors.values()) > MAX_BYTES:
        raise BadFile(f"more than {MAX_TENSORS:,} tensors or {MAX_BYTES:,} bytes; pack a smaller network")
    if is_own_network(spec):
        return tensors
    network = _built_in(spec)
    others = [f"{name} is {type_name(tensor)}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if differences := mismatches(network, tensors) + others:
        raise ValueError(differences[0])
    return {name: tensors[name] for name in network}


def is_own_network(spec: Spec) -> bool:
    """Whether a spec is that of a network of the user's own."""
    return (
        spec.keys() | {"num_classes"} == {"name", "arguments", "num_classes"}
        and isinstance(spec["name"], str)
        and is_own(spec["name"])
        and isinstance(spec["arguments"], dict)
        and isinstance(spec.get("num_classes", 1), int)
        and _is_positive(spec.get("num_classes", 1))
    )


def _built_in(spec: Spec) -> dict[str, Tensor]:
    row = ROWS.get(str(spec.get("name")))
    if row is None or spec.keys() != {"name", *row.arguments} or not all(_is_positive(spec[a]) for a in row.arguments):
        raise BadFile(f"{short(spec)} describes no network; pack another")
    try:
        state_dict = expected_state_dict(spec)
    except Exception as error:  # a made-up spec leads to anything
        raise BadFile(f"its network can't be built ({short(error)}); pack another") from None
    network = {name: tensor for name, tensor in state_dict.items() if not _is_counter(name, tensor)}
    if sum(tensor.numel() for tensor in network.values()) > MAX_WEIGHTS:
        raise BadFile(f"its network has more than {MAX_WEIGHTS:,} weights; pack a smaller one")
    return network


def _claimed(index: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that an index lists, as meta tensors; ValueError where it lists none, or more than there may be."""
    names, shapes, types = index.get("names"), index.get("shapes"), index.get("types")
    if not (type(names) is type(shapes) is list and type(types) is dict and len(names) == len(shapes)):
        raise ValueError("no list of tensors")
    if len(names) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS:,} tensors")
    network, total = {}, 0
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        dtype = TYPES.get(str(types.get(str(i), "float32")))
        if type(name) is not str or name in network or dtype is None:
            raise ValueError("a tensor without a name of its own, or of a type that is none")
        if type(shape) is not list or len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("a tensor of a shape that is none")
        total += prod(max(n, 1) for n in shape) * dtype.itemsize
        if total > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes of tensors")
        network[name] = torch.empty(shape, dtype=dtype, device="meta")
    return network


def _is_counter(name: str, tensor: Tensor) -> bool:
    return name.endswith("num_batches_tracked") and not tensor.is_floating_point()


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
