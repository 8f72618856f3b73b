"""A network is run, and is afterwards what it was."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (str, bytes, int, float, complex, type, type(None), ModuleType, FunctionType, BuiltinFunctionType, torch.dtype)


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, also after an error, everything that can be reached from `network` is as it was.

    Attributes, modes, lists, dicts and sets get their contents back, parameters and buffers their tensors, and
    the generators of random numbers their states. (What the tensors hold is not looked after here: see `graph`.)
    """
    restorations = list(_restorations(network))
    with untouched_randomness():
        try:
            network.eval()
            yield
        finally:
            for restore in restorations:
                restore()


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Afterwards, torch's and Python's generators of random numbers go on as if nothing had been drawn."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)


def _restorations(network: nn.Module) -> Iterator[Callable[[], None]]:
    found: list[Any] = [network]
    seen = set()
    while found:
        thing = found.pop()
        if isinstance(thing, _ATOMS) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield _of_tensor(thing)
        elif isinstance(thing, dict):
            found += thing.values()
            yield _of_container(thing, dict(thing), thing.update)
        elif isinstance(thing, list | deque):
            found += thing
            yield _of_container(thing, list(thing), thing.extend)
        elif isinstance(thing, set):
            yield _of_container(thing, set(thing), thing.update)
        elif isinstance(thing, tuple | frozenset):
            found += thing
        elif isinstance(attributes := getattr(thing, "__dict__", None), dict):
            found.append(attributes)


def _of_container(thing: Any, contents: Any, refill: Callable[[Any], object]) -> Callable[[], None]:
    def restore() -> None:
        thing.clear()
        refill(contents)

    return restore


def _of_tensor(tensor: Tensor) -> Callable[[], None]:
    data, grad, requires_grad = tensor.data, tensor.grad if tensor.is_leaf else None, tensor.requires_grad

    def restore() -> None:
        if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
            tensor.data = data
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return restore
