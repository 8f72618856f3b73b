"""What a network executes: the operations of one forward pass, in order, and where their inputs come from.

The pass runs in evaluation mode on one image, under a `TorchDispatchMode`: it sees what torch executes, so a
functional ReLU, an addition or a slice is seen like any module. The tensors are on the meta device, which
computes shapes and nothing else; a network that cannot run there (because its code looks at values) runs on
real tensors, which takes as long as one image takes.

What does not depend on the image, such as a weight that is transposed or normalized before use, is no
operation of the graph: it is computed once, ahead of inference. The values of such tensors are known.

Tensors may share memory, so what is followed is `Memory`: a tensor is a region of one. A write into it, through
whatever view, makes new values of everything that lies there. Nothing is ever written into the network's own.
"""

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only, tree_unflatten

from model.own import every_operation
from rulers.untouched import untouched, untouched_randomness
from rulers.values import Memory, Node, Region, Shape, Stored, Value


def trace(network: nn.Module, shapes: Any) -> list[Node]:
    """Run `network` once and return what it executes, in order; the network is left as it was.

    `shapes` is an input's shape without the batch, or the height and width of an RGB image; or a list of such
    things, or of example tensors, for several arguments. The last node is the "return" of the results, which are its
    inputs. ValueError where the network has no values.
    """
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.is_meta for tensor in tensors if not is_lazy(tensor)):
        raise ValueError("the network is on the meta device, where its weights have no values to count")
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    inputs = [one if isinstance(one, Tensor) else torch.zeros(1, *one, dtype=dtype) for one in input_shapes(shapes)]
    with untouched(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            return _Recorder(network, on_meta=True).run(inputs)
        except Exception:  # whatever the network's code makes of tensors without values
            pass
    with untouched(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return _Recorder(network, on_meta=False).run(inputs)


def initialized(network: nn.Module, shapes: Any) -> nn.Module:
    """`network`, or a copy of it whose lazy modules have seen an input and know their sizes."""
    if not any(is_lazy(tensor) for tensor in [*network.parameters(), *network.buffers()]):
        return network
    network = copy.deepcopy(network)
    with untouched_randomness(), torch.no_grad():
        network(*(one if isinstance(one, Tensor) else torch.zeros(1, *one) for one in input_shapes(shapes)))
    return network


def input_shapes(shapes: Any) -> list[Shape | Tensor]:
    """The shape, without the batch, or the example of each argument: `shapes` as `trace` takes it."""
    if isinstance(shapes, int):
        return [(3, shapes, shapes)]
    if isinstance(shapes, Tensor):
        return [shapes]
    if all(isinstance(n, int) for n in shapes):
        return [tuple(shapes)]
    return [one for shape in shapes for one in input_shapes(shape)]


# Written, but not read; and operations whose result depends on the shape of what they read.
_OVERWRITTEN = ("copy", "fill", "zero")
_SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_empty_strided", "new_zeros",
               "new_ones", "new_full")  # fmt: skip


class _Twins(TorchFunctionMode):
    """Hands the network's own tensors to torch as tensors of the meta device, so that all are on one."""

    def __init__(self, recorder: "_Recorder"):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self.recorder.executable, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Writes down every operation that torch dispatches."""

    def __init__(self, network: nn.Module, on_meta: bool):
        super().__init__()
        self.network, self.on_meta = network, on_meta
        self.nodes: list[Node] = []
        self._memories: dict[int, Memory] = {}  # by the address of each storage
        self._alive: list[UntypedStorage] = []  # so that no address is used again
        self._keys: dict[Hashable, int] = {}
        self._paths = {module: path for path, module in network.named_modules()}
        self._running = [network]
        for trained, named in ((True, network.named_parameters()), (False, network.named_buffers())):
            for name, tensor in named:
                self._keep(tensor, name, trained)

    def run(self, inputs: list[Tensor]) -> list[Node]:
        """Call the network, and add the node that reads its results."""
        own = [tensor.to("meta") if self.on_meta else tensor.clone() for tensor in inputs]
        for tensor in own:
            memory = self._enter(tensor.untyped_storage(), Memory(False, None))
            memory.values[Region.of(tensor)] = Value(Region.of(tensor))
        with every_operation(), self._places(), self, _Twins(self) if self.on_meta else nullcontext():
            results = self.network(*own)
        self._add_node("return", {"results": [self.value(tensor) for tensor in tensors_in(results)]})
        return self.nodes

    @contextmanager
    def _places(self) -> Iterator[None]:
        """Follow which module is running; torch's hooks for all modules leave the network's own alone."""

        def enter(module: nn.Module, inputs: Any) -> None:
            self._running.append(module)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
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

    # ------------------------------------------------------------------------------------------ memories

    def _enter(self, storage: UntypedStorage, memory: Memory) -> Memory:
        self._alive.append(storage)
        self._memories[storage._cdata] = memory
        return memory

    def _keep(self, tensor: Tensor, name: str = "", trained: bool = False) -> Memory:
        """The memory of a tensor that the network, or its code, holds."""
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is None:
            values = tensor.cpu().untyped_storage() if tensor.device.type != "cpu" else storage
            memory = self._enter(storage, Memory(True, ("kept", storage._cdata), values))
            self._memories[values._cdata] = memory
        memory.kept.append(Stored(name, tensor, trained))
        return memory

    def _memory(self, tensor: Tensor) -> Memory:
        memory = self._memories.get(tensor.untyped_storage()._cdata)
        return memory or self._keep(tensor, trained=isinstance(tensor, nn.Parameter))

    def executable(self, tensor: Tensor) -> Tensor:
        """What torch computes with in place of `tensor`."""
        memory = self._memory(tensor)
        if not self.on_meta:
            same = memory.storage is None or memory.storage._cdata == tensor.untyped_storage()._cdata
            return tensor if same else Region.of(tensor).on(memory.storage)
        return tensor if tensor.is_meta else self._twin(memory, Region.of(tensor))

    def _twin(self, memory: Memory, region: Region) -> Tensor:
        if memory.shapes is None:
            memory.shapes = UntypedStorage(memory.storage.nbytes(), device="meta")
            self._enter(memory.shapes, memory)
        return region.on(memory.shapes)

    def value(self, tensor: Tensor) -> Value:
        """The value of `tensor` now."""
        memory, region = self._memory(tensor), Region.of(tensor)
        if region not in memory.values:
            if memory.fixed:
                value = Value(region, True, (memory.key, region), memory.storage, sources=memory.sources)
                if memory.kept:
                    value.stored, value.sources = _containing(memory.kept, region), frozenset([value])
                memory.values[region] = value
            else:  # something was written here through another view
                memory.values[region] = Value(region)
                self._add_node("update", {"parts": list(memory.parts)}, [memory.values[region]])
        return memory.values[region]

    # ---------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = _by_name(function, args, kwargs or {})
        name = function._schema.name.rpartition("::")[2].removesuffix("_")
        written = [
            tensor
            for argument in function._schema.arguments
            if argument.alias_info and argument.alias_info.is_write
            for tensor in tree_iter(arguments[argument.name])
            if isinstance(tensor, Tensor)
        ]
        if torch.Tag.inplace_view in function.tags:  # the tensor changes, not what lies there
            return function(*tree_map_only(Tensor, self.executable, args), **(kwargs or {}))
        if name in _OVERWRITTEN or "out" in function._overloadname:
            unread = {id(tensor) for tensor in written}
            arguments = {n: a for n, a in arguments.items() if id(a) not in unread}
        reads = [tensor for tensor in tree_iter(arguments) if isinstance(tensor, Tensor)]
        random = torch.Tag.nondeterministic_seeded in function.tags
        fixed = name in _SHAPE_ONLY or all(self._memory(tensor).fixed for tensor in reads + written)
        if fixed and not random:
            return self._execute_fixed(function, name, args, kwargs or {}, reads, written)

        arguments = tree_map_only(Tensor, self.value, arguments)
        for tensor in written:
            self._protect(self._memory(tensor))
        args, kwargs = tree_map_only(Tensor, self.executable, (args, kwargs or {}))
        result = function(*args, **_on(function, kwargs, "meta" if self.on_meta else "cpu"))
        outputs = self._outputs(result, written)
        if outputs or not tensors_in(result):
            self._add_node(name, arguments, outputs)
        return _as_given(result, written)

    def _outputs(self, result: Any, written: list[Tensor]) -> list[Value]:
        """The values that an operation makes: of what it wrote, and of its results, unless they were there."""
        outputs = []
        for tensor in written:
            memory, region = self._memory(tensor), Region.of(tensor)
            if memory.fixed:
                memory.fixed, memory.parts = False, sorted(memory.sources, key=lambda value: value.region.span)
            memory.kept, memory.values = [], {region: Value(region)}
            memory.parts.append(memory.values[region])
            outputs.append(memory.values[region])
        for tensor in tensors_in(result):
            region = Region.of(tensor)
            known = self._memories.get(tensor.untyped_storage()._cdata)
            memory = known or self._enter(tensor.untyped_storage(), Memory(False, None))
            if known is None:
                memory.parts.append(Value(region))
                memory.values[region] = memory.parts[0]
            elif region in memory.values:
                continue
            else:
                memory.values[region] = Value(region)
            outputs.append(memory.values[region])
        return outputs

    def _execute_fixed(
        self, function: Any, name: str, args: Any, kwargs: Any, reads: list[Tensor], written: list[Tensor]
    ) -> Any:
        """Compute on the real values what does not depend on the image."""
        leaves, structure = tree_flatten((args, kwargs))
        shape_only = name in _SHAPE_ONLY
        inputs = [] if shape_only else [self.value(tensor) for tensor in reads]
        sources = frozenset().union(*(value.sources for value in inputs))
        keys = [self._leaf_key(leaf, shape_only) for leaf in leaves]
        key = self._keys.setdefault((function, *keys, repr(structure)), len(self._keys))
        for tensor in written:
            self._protect(self._memory(tensor))

        def real(tensor: Tensor) -> Tensor:
            memory = self._memory(tensor)
            return Region.of(tensor).on(memory.storage) if memory.fixed else tensor

        args, kwargs = tree_unflatten([real(x) if isinstance(x, Tensor) else x for x in leaves], structure)
        result = function(*args, **_on(function, kwargs, "cpu"))
        for i, tensor in enumerate(written):
            memory = self._memory(tensor)
            memory.key, memory.sources = (key, "written", i), memory.sources | sources
            memory.kept, memory.values = [], {}
        for i, tensor in enumerate(tensors_in(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._memories:
                if "empty" in name:
                    tensor.zero_()
                self._enter(storage, Memory(True, (key, i), storage, sources=sources))

        def given(tensor: Tensor) -> Tensor:
            return self._twin(self._memory(tensor), Region.of(tensor)) if self.on_meta else tensor

        return _as_given(tree_map_only(Tensor, given, result), written)

    def _leaf_key(self, leaf: Any, shape_only: bool) -> Hashable:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        return Region.of(leaf) if shape_only else self.value(leaf).key

    def _protect(self, memory: Memory) -> None:
        """Before a write: what was read before it keeps its values, and the network keeps its own."""
        if memory.storage is None:
            return
        old = memory.storage
        copy = old.clone()
        if memory.kept:
            memory.sources = frozenset().union(
                *(self.value(stored.tensor).sources for stored in memory.kept), memory.sources
            )
            memory.storage = copy
            self._enter(copy, memory)
        else:
            for value in memory.values.values():
                value.storage = copy

    def _add_node(self, operation: str, arguments: dict[str, Any], outputs: list[Value] | None = None) -> None:
        module = self._running[-1]
        node = Node(
            operation=operation,
            arguments=arguments,
            outputs=outputs or [],
            place=self._paths.get(module, ""),
            leaf=next(module.children(), None) is None,
        )
        for value in node.inputs:
            value.consumers.append(node)
        for value in node.outputs:
            value.producer = node
        self.nodes.append(node)


def _as_given(result: Any, written: list[Tensor]) -> Any:
    """What an operation returns: where it wrote into an argument, that argument."""
    return written[0] if len(written) == 1 and isinstance(result, Tensor) else result


def _on(function: Any, kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    """The keyword arguments that make `function` compute on `device`, whatever the network asks for."""
    takes_device = any(argument.name == "device" for argument in function._schema.arguments)
    return {**kwargs, "device": torch.device(device)} if takes_device else kwargs


def tensors_in(results: Any) -> list[Tensor]:
    """The tensors in whatever a network returns: nested containers, dataclasses, objects with attributes."""
    found, tensors, seen = [results], [], set()
    while found:
        thing = found.pop(0)
        if isinstance(thing, Tensor):
            tensors.append(thing)
        elif id(thing) in seen or isinstance(thing, str | bytes | nn.Module | type):
            continue
        elif isinstance(thing, dict):
            found = [*thing.values(), *found]
        elif isinstance(thing, list | tuple | set):
            found = [*thing, *found]
        elif isinstance(attributes := getattr(thing, "__dict__", None), dict):
            found.append(attributes)
        seen.add(id(thing))
    return tensors


def _containing(kept: list[Stored], region: Region) -> Stored:
    """The stored tensor that `region` lies in."""
    start, end = region.span
    for stored in kept:
        first, last = Region.of(stored.tensor).span
        if first <= start and end <= last:
            return stored
    return kept[0]


def _by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by their names in its schema, defaults included."""
    arguments = {}
    for position, argument in enumerate(function._schema.arguments):
        if position < len(args):
            arguments[argument.name] = args[position]
        else:
            arguments[argument.name] = kwargs.get(argument.name, argument.default_value)
    return arguments
