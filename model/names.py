"""A state dict's names made those of a network, where only what wrappers add stands between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

# attributes that torch's wrappers put in front of a network, or of a part of it
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
COUNTERS = ("total_ops", "total_params")  # which thop leaves in the networks that it counted
# parts of the names of networks that follow another
AVERAGES = ("ema", "teacher", "momentum", "target", "average", "_k.")


@dataclass(frozen=True)
class Fit:
    """The tensors of a file by a network's names.

    Attributes:
        tensors: those of the network, with `_metadata` if the file's have it; and those that are surplus, if any.
        notes: what was done to make them fit, a phrase each.
        differences: what does not fit, a phrase each; empty if all does.
        renaming: whether renaming, which `differences` names first, would make them fit.
    """

    tensors: OrderedDict[str, Tensor]
    notes: list[str]
    differences: list[str]
    renaming: bool


def fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Fit:
    """Find the tensors of a network, whose names and shapes are `expected`, in what a file holds.

    A prefix of any depth is stripped where more names fit without it, and so are the attributes of torch's wrappers
    anywhere in a name, unless the network has them itself. What lies outside the prefix is left out. Weights are
    multiplied by the masks that pruning leaves beside them, unless the network has masks of these names.

    >>> import torch
    >>> bias = torch.zeros(2)
    >>> fit({"fc.bias": bias}, {"model.module.fc.bias": bias, "loss.margin": bias}).notes
    ["'model.' stripped, 'module.' stripped, so that the names fit", 'left out loss.margin, beside the network']
    """
    found, masks = _masked(expected, found)
    prefix, claimed, rivals = _best_prefix(expected, found)
    targets = {name: target for target, name in claimed.items()}
    wrapped = bool(prefix) or all(name != target for name, target in targets.items())
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    names: dict[str, str] = {}
    changes: dict[str, None] = {f"{prefix!r} stripped": None} if prefix else {}
    left: list[str] = []
    counters: list[str] = []
    for name, tensor in found.items():
        rest = _within(name, prefix)
        target = targets.get(name) or (_free(rest, expected, claimed) if rest else rest)
        if rest is None or target is None or (wrapped and target == name and name not in expected):
            left.append(name)
        elif target not in expected and target.rpartition(".")[2] in COUNTERS:
            counters.append(name)
        else:
            tensors[target], names[target] = tensor, name
            changes |= _changes(name, target)
    left = [name for name in left if not any(_within(name, rival) for rival in rivals)]
    notes = [f"{', '.join(changes)}, so that the names fit"] if changes else []
    notes += [f"{prefix!r} taken, {_listed(rivals)} has the same names"] if rivals else []
    notes += [f"left out {_listed(left)}, beside the network"] if left else []
    notes += [f"left out {_listed(counters)}, counters of thop"] if counters else []
    notes += [f"weights multiplied by the masks beside them ({_listed(masks)})"] if masks else []
    _keep_versions(found, tensors, names)
    differences = mismatches(expected, tensors)
    renaming = _renaming(expected, tensors) if differences else ""
    return Fit(tensors, notes, [renaming] if renaming else differences, bool(renaming))


def unwrapped(name: str) -> str:
    """The name without the attributes of torch's wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Say how the names and shapes of two state dicts differ, a phrase each; empty if they do not."""
    wanted, given = _shapes(expected), _shapes(found)
    missing = [f"{name} is missing" for name in _lacking(wanted, given)]
    surplus = [f"{name} is not of this network" for name in _lacking(given, wanted)]
    other = [
        f"{name} is {_shape(given[name])} where {_shape(wanted[name])} is needed"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    return other + missing + surplus


def first(differences: list[str]) -> str:
    """The first of some differences, and how many more there are."""
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return differences[0] + more


def _masked(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """`found` with products for weights and their masks, and the names of these masks.

    A mask of zeros and ones is `X_mask` beside `X_orig`, as `torch.nn.utils.prune` names them, or `mask` beside
    `weight`.
    """
    products: dict[str, tuple[str, Tensor]] = {}  # by the weight's name: that of the product, and itself
    masks: list[str] = []
    own = {name.rpartition(".")[2] for name in expected}
    for name, mask in found.items():
        module, dot, last = name.rpartition(".")
        if last in own or not last.endswith("mask"):
            continue
        weight, plain = (f"{module}{dot}weight",) * 2 if last == "mask" else (name[:-4] + "orig", name[:-5])
        if weight in found and found[weight].shape == mask.shape and bool(((mask == 0) | (mask == 1)).all()):
            products[weight] = plain, found[weight] * mask.to(found[weight].dtype)
            masks.append(name)
    if not masks:
        return found, []
    rest = [(name, (name, tensor)) for name, tensor in found.items() if name not in masks]
    product: OrderedDict[str, Tensor] = OrderedDict(products.get(name, same) for name, same in rest)
    if hasattr(found, "_metadata"):
        vars(product)["_metadata"] = found._metadata
    return product, masks


def _best_prefix(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[str, dict[str, str], list[str]]:
    """The prefix under which most expected names are; the names in the file by expected ones; prefixes as good.

    It is "", unless another makes half of the expected names fit, and more than fit without.
    """
    bare: dict[str, str | None] = {}
    for name in expected:
        bare[unwrapped(name)] = None if unwrapped(name) in bare else name  # None: only exact names tell
    claims: dict[str, dict[str, str]] = {"": {}}
    for name, tensor in found.items():
        for prefix, rest in _splits(name):
            target = rest if rest in expected else bare.get(unwrapped(rest))
            if target and (expected[target].shape == tensor.shape or not prefix):
                claimed = claims.setdefault(prefix, {})
                if rest == target or target not in claimed:
                    claimed[target] = name
    most = max(map(len, claims.values()))
    best = [prefix for prefix, claimed in claims.items() if len(claimed) == most]
    if len(claims[""]) == most or 2 * most < len(expected):
        best = [""]
    best.sort(key=_follows)
    return best[0], claims[best[0]], best[1:]


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name's prefixes without the attributes of wrappers, and the rest of it with them."""
    parts, before = name.split("."), None
    for i in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:i] if part not in WRAPPERS)
        if prefix != before:
            yield prefix, ".".join(parts[i:])
        before = prefix


def _within(name: str, prefix: str) -> str | None:
    """The rest of `name` after `prefix`; None if it does not begin so."""
    return dict(_splits(name)).get(prefix)


def _free(rest: str, expected: Mapping[str, object], claimed: Mapping[str, object]) -> str:
    """What a tensor is called that is none of the network's, or has another shape."""
    if rest in expected or any(part in WRAPPERS for name in expected for part in name.split(".")):
        return rest
    return rest if unwrapped(rest) in claimed else unwrapped(rest)


def _changes(rest: str, target: str) -> dict[str, None]:
    """Which attributes of wrappers make a name another, a phrase each."""
    given, wanted = ([part for part in name.split(".") if part in WRAPPERS] for name in (rest, target))
    changes = {f"'{part}.' stripped": None for part in given if given.count(part) > wanted.count(part)}
    return changes | {f"'{part}.' added": None for part in wanted if wanted.count(part) > given.count(part)}


def _follows(prefix: str) -> bool:
    return any(part in prefix for part in AVERAGES)


def _keep_versions(found: Mapping[str, object], tensors: OrderedDict[str, Tensor], names: Mapping[str, str]) -> None:
    """Give `tensors` the versions of modules that `found` has, whose names are `names` by the network's names."""
    if not (versions := getattr(found, "_metadata", None)):
        return
    kept = vars(tensors)["_metadata"] = {}
    for target, name in names.items():
        ours, theirs = target.split("."), name.split(".")
        while ours and theirs and ours.pop() == theirs.pop():
            module = ".".join(theirs)
            if module in versions:
                kept[".".join(ours)] = versions[module]


def _renaming(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Say the renaming of modules that would make all names fit; empty if none does."""
    missing, surplus = _modules(expected, found), _modules(found, expected)
    pairs: list[tuple[str, str]] = []
    for shapes in dict.fromkeys(missing.values()):
        ours, theirs = ([m for m, own in modules.items() if own == shapes] for modules in (missing, surplus))
        if len(ours) != len(theirs):
            return ""
        pairs += zip(theirs, ours, strict=True)
    if not pairs or len(pairs) != len(surplus) or mismatches(expected, _renamed(found, dict(pairs))):
        return ""
    theirs, ours = [f"{m}.*" for m, _ in pairs], [f"{m}.*" for _, m in pairs]
    return f"{_listed(theirs)} {'are' if len(theirs) > 1 else 'is'} named {_listed(ours)} in this network: rename them"


Named = tuple[str, tuple[int, ...]]  # a tensor's name in its module, and its shape


def _modules(tensors: Mapping[str, Tensor], others: Mapping[str, object]) -> dict[str, tuple[Named, ...]]:
    """The modules with names that `others` lacks: names within them, and shapes."""
    modules: dict[str, list[Named]] = {}
    for name in _lacking(tensors, others):
        modules.setdefault(_module(name), []).append((name.rpartition(".")[2], tuple(tensors[name].shape)))
    return {module: tuple(sorted(shapes)) for module, shapes in modules.items()}


def _renamed(tensors: Mapping[str, Tensor], pairs: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        module, dot, last = name.rpartition(".")
        renamed[f"{pairs.get(module, module)}{dot}{last}"] = tensor
    return renamed


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _lacking(names: Mapping[str, object], others: Mapping[str, object]) -> list[str]:
    return [name for name in names if name not in others and not name.endswith("num_batches_tracked")]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
