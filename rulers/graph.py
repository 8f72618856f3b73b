"""What a network executes: the operations of one forward pass, in order, and where their inputs come from.

The pass runs in evaluation mode on one image, under a `TorchDispatchMode`: it sees what torch executes, so a
functional ReLU, an addition or a slice is seen like any module. The tensors are on the meta device, which
computes shapes and nothing else; a network that cannot run there (because its code looks at values) runs on
real tensors, which takes as long as one image takes.

What does not depend on the image, such as a weight that is transposed or normalized before use, is no
operation of the graph: it is computed once, ahead of inference. The values of such tensors are known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only


@dataclass(eq=False)
class Value:
    """A tensor of the forward pass.

    `fixed` says that it does not depend on the image; `data` are its values then, if they are known. `stored`
    is the name of the parameter or buffer that it is, or is a view of; `trained` says that it comes from
    parameters. `producer` is None if no operation of the graph made it: the image, and everything fixed.
    """

    tensor: Tensor
    fixed: bool = False
    data: Tensor | None = None
    stored: str | None = None
    trained: bool = False
    producer: "Node | None" = None
    consumers: "list[Node]" = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def numel(self) -> int:
        return self.tensor.numel()


@dataclass(eq=False)
class Node:
    """One executed operation.

    `operation` is aten's name without overload and in-place underscore; `arguments` are named as in aten's
    schema, with a `Value` for every tensor; `place` is the path of the innermost module that ran it, and
    `leaf` says that this module has no children, so that the path alone tells what it does.
    """

    operation: str
    arguments: dict[str, Any]
    outputs: list[Value]
    place: str
    leaf: bool

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def inputs(self) -> list[Value]:
        """The tensors among the arguments."""
        return _tensors(self.arguments)

    @property
    def name(self) -> str:
        """The module's path, and the operation where the path does not tell it."""
        return self.place if self.leaf and self.place else f"{self.place} {self.operation}".strip()


def trace(network: nn.Module, image_size: int | tuple[int, ...]) -> list[Node]:
    """Run `network` once and return what it executes, in order; the network is left as it was.

    `image_size` is the height and width of an RGB image, or the whole shape of an input without the batch.
    The last node is the "return" of the results, which are its inputs.
    """
    shape = (3, image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    with _evaluating(network):
        try:
            return _run(network, shape, torch.device("meta"))
        except Exception:  # whatever the network's code makes of tensors without values
            return _run(network, shape, next((p.device for p in network.parameters()), torch.device("cpu")))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _run(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> list[Node]:
    """Run `network` on `device` with copies of its parameters and buffers; the originals stay in `data`."""
    stored = dict(network.named_parameters(remove_duplicate=False))
    stored |= dict(network.named_buffers(remove_duplicate=False))
    copies = {id(tensor): tensor.detach().to(device, copy=True) for tensor in stored.values()}
    used = {name: copies[id(tensor)] for name, tensor in stored.items()}  # what is shared stays shared
    dtype = next((tensor.dtype for tensor in used.values() if tensor.is_floating_point()), torch.float32)
    image = torch.zeros(1, *shape, dtype=dtype, device=device)

    recorder = _Recorder(network)
    recorder.add(Value(image))
    for name in reversed(stored):  # a shared tensor goes by its first name
        tensor = stored[name]
        recorder.add(Value(used[name], True, tensor.detach().cpu(), name, isinstance(tensor, nn.Parameter)))
    with torch.no_grad(), recorder.places(), recorder:
        result = functional_call(network, used, (image,), tie_weights=False)
    recorder.add_return(result)
    return recorder.nodes


def _tensors(arguments: Any) -> list[Value]:
    return [value for value in tree_iter(arguments) if isinstance(value, Value)]


class _Recorder(TorchDispatchMode):
    """Writes down every operation that torch dispatches."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.nodes: list[Node] = []
        self._values: dict[int, Value] = {}  # by the id of the tensor, which the value keeps alive
        self._paths = {module: path for path, module in network.named_modules()}
        self._running = [network]

    def add(self, value: Value) -> None:
        self._values[id(value.tensor)] = value

    @contextmanager
    def places(self) -> Iterator[None]:
        """Follow which module is running; torch's hooks for all modules leave the network's own alone."""

        def enter(module, inputs) -> None:
            self._running.append(module)

        def leave(module, inputs, output) -> None:
            self._running.pop()

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = tree_map_only(Tensor, self._value, _by_name(function, args, kwargs))
        result = function(*args, **kwargs)
        tensors = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        if all(value.fixed for value in _tensors(arguments)):
            self._add_fixed(function, args, kwargs, tensors)
        else:
            operation = function._schema.name.removeprefix("aten::").removesuffix("_")
            self._add_node(operation, arguments, tensors)
        return result

    def _value(self, tensor: Tensor) -> Value:
        """The value of `tensor`; one that no operation made is a constant of the network's code."""
        if id(tensor) not in self._values:
            self.add(Value(tensor, fixed=True, data=None if tensor.is_meta else tensor))
        return self._values[id(tensor)]

    def _add_fixed(self, function, args, kwargs, results: list[Tensor]) -> None:
        """Compute on the real values what does not depend on the image."""
        inputs = [self._value(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        data = [None] * len(results)
        if inputs and all(value.data is not None for value in inputs):
            changes = function._schema.is_mutable

            def real(tensor: Tensor) -> Tensor:
                values = self._value(tensor).data
                return values.clone() if changes else values

            result = function(*tree_map_only(Tensor, real, args), **tree_map_only(Tensor, real, kwargs))
            data = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        stored = inputs[0].stored if inputs and views else None
        trained = any(value.trained for value in inputs)
        for tensor, values in zip(results, data, strict=True):
            self.add(Value(tensor, True, values, stored, trained))

    def add_return(self, result: Any) -> None:
        """Add the node that reads the network's results."""
        self._add_node("return", {"results": tree_map_only(Tensor, self._value, [result])}, [])

    def _add_node(self, operation: str, arguments: dict[str, Any], results: list[Tensor]) -> None:
        module = self._running[-1]
        node = Node(
            operation=operation,
            arguments=arguments,
            outputs=[Value(tensor) for tensor in results],
            place=self._paths.get(module, ""),
            leaf=next(module.children(), None) is None,
        )
        for value in node.inputs:
            value.consumers.append(node)
        for value in node.outputs:
            value.producer = node
            self.add(value)
        self.nodes.append(node)


def _by_name(function, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by their names in its schema, defaults included."""
    arguments = {}
    for position, argument in enumerate(function._schema.arguments):
        if position < len(args):
            arguments[argument.name] = args[position]
        else:
            arguments[argument.name] = kwargs.get(argument.name, argument.default_value)
    return arguments
