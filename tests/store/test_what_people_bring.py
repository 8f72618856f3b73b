"""Checkpoints of other programs: wrappers' names, keys around the weights, objects beside them."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import io
import os
import pathlib
import types
import uuid
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._weights_only_unpickler import Unpickler

from engine.store.checkpoint import read_network
from engine.store.torch_file import Inert
from helpers.checkpoints import check_read, prefixed, refusal
from helpers.networks import TINY
from model import build
from model.names import fit


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build(TINY).state_dict()


# ------------------------------------------------------------------------------------- names


PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "network.",
    "encoder.",
    "backbone.body.",
    "_fsdp_wrapped_module.",
]
PREFIXES += [
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "module.model.",
    "model.module.",
    "x.y.z.module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_stripped_and_said(prefix, tensors, tmp_path, capsys):
    check_read({"state_dict": prefixed(prefix, tensors)}, tensors, tmp_path / "x.pt")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "stripped, so that the names fit" in said
    assert all(f"{part}." in said for part in prefix.split(".") if part)


def test_plain_names_are_not_talked_about(tensors, tmp_path, capsys):
    check_read(tensors, tensors, tmp_path / "x.pt")
    assert capsys.readouterr().out == ""


def test_wrappers_within_a_network(tensors, tmp_path, capsys):
    inner = {name.replace("layer1.0.", "layer1.module.0._orig_mod."): tensor for name, tensor in tensors.items()}
    check_read(inner, tensors, tmp_path / "x.pt")
    assert "'module.' stripped, '_orig_mod.' stripped" in capsys.readouterr().out


def test_wrappers_of_some_names_only(tensors, tmp_path):
    mixed = {("module." if "layer" in name else "") + name: tensor for name, tensor in tensors.items()}
    check_read(mixed, tensors, tmp_path / "x.pt")


def test_what_is_beside_the_network_is_left_out(tensors, tmp_path, capsys):
    """As Lightning and torch.optim.swa_utils.AveragedModel write it."""
    extra = {"loss.weight": torch.ones(3), "metric.total": torch.ones(())}
    check_read({"state_dict": prefixed("model.", tensors) | extra}, tensors, tmp_path / "x.pt")
    assert "left out loss.weight, metric.total, beside the network" in capsys.readouterr().out
    check_read({"n_averaged": torch.tensor(3)} | prefixed("module.", tensors), tensors, tmp_path / "x.pt")
    assert "left out n_averaged" in capsys.readouterr().out


def test_of_two_networks_in_one_the_one_that_is_trained_is_taken(tensors, tmp_path, capsys):
    teacher = {name: tensor + 1 for name, tensor in tensors.items()}
    check_read(prefixed("teacher.", teacher) | prefixed("student.", tensors), tensors, tmp_path / "x.pt")
    assert "'student.' taken, teacher. has the same names" in capsys.readouterr().out


def test_a_surplus_within_the_network_is_still_refused(tensors, tmp_path):
    torch.save(prefixed("model.", tensors | {"head.weight": torch.ones(3)}), tmp_path / "x.pt")
    assert "head.weight is not of this network" in refusal(tmp_path / "x.pt")


def names(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2) for name in names}


@pytest.mark.parametrize(
    "expected, found",
    [
        (("module.a", "b"), ("module.a", "b")),
        (("module.a", "b"), ("module.module.a", "module.b")),
        (("module.a", "a"), ("module.a", "a")),
        (("module.a", "a"), ("net.module.a", "net.a")),
        (("module.a", "module.b"), ("a", "b")),
    ],
)
def test_an_attribute_called_module_stays(expected, found):
    result = fit(names(*expected), names(*found))
    assert not result.differences and sorted(result.tensors) == sorted(expected)


def test_counters_of_thop_are_left_out(tensors, tmp_path, capsys):
    counted = {"total_ops": torch.zeros(1), "conv1.total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)}
    check_read(tensors | counted, tensors, tmp_path / "x.pt")
    assert "left out total_ops, conv1.total_ops, conv1.total_params, counters of thop" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("spec", [TINY, {"name": "efficientnet-b1", "num_classes": 5}], ids=lambda spec: spec["name"])
def test_the_renaming_that_would_fit_is_said(spec, prefix, tmp_path):
    names = {"linear": "fc", "_fc": "classifier.1", "layer1.0.bn1": "layer1.0.norm1"}
    torch.save(
        {prefix + names.get(m := n.rpartition(".")[0], m) + "." + n.rpartition(".")[2]: t
         for n, t in build(spec).state_dict().items()}, tmp_path / "x.pt",
    )  # fmt: skip
    classifier = {"cifar_micronet": ("fc", "linear")}.get(spec["name"], ("classifier.1", "_fc"))
    said = refusal(tmp_path / "x.pt")
    assert " in this network: rename them" in said and f"{classifier[0]}.*" in said and f"{classifier[1]}.*" in said


def test_a_renaming_that_would_not_fit_is_not_said(tensors, tmp_path):
    changed = {n.replace("linear", "fc"): t for n, t in tensors.items() if n != "bn1.weight"}
    torch.save(changed, tmp_path / "x.pt")
    assert "rename" not in refusal(tmp_path / "x.pt")


# ------------------------------------------------------------------------------------- keys around the weights


KEYS = ["state_dict", "model_state_dict", "model_state", "net", "model", "network", "weights", "params", "module"]
AVERAGES = ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema"]


@pytest.mark.parametrize("key", [*KEYS, "backbone", "G"])
def test_weights_under_other_keys(key, tensors, tmp_path):
    check_read({key: tensors, "epoch": 3, "optimizer": {"state": {0: tensors["bn1.bias"]}}}, tensors, tmp_path / "x.pt")


@pytest.mark.parametrize("inner", ["state_dict", "module", "model"])
@pytest.mark.parametrize("key", ["model", "ema", "checkpoint"])
def test_weights_nested_once(key, inner, tensors, tmp_path):
    check_read({key: {inner: tensors, "decay": 0.99}}, tensors, tmp_path / "x.pt")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_a_moving_average(average, nested, tensors, tmp_path, capsys):
    averaged = {name: tensor * 2 for name, tensor in tensors.items()}
    content = {average: {"module": averaged} if nested else averaged}
    check_read(content, averaged, tmp_path / "x.pt")
    assert f"the weights are those of the moving average {average}\n" in capsys.readouterr().out
    check_read({**content, "state_dict": tensors}, tensors, tmp_path / "x.pt")
    said = capsys.readouterr().out
    assert f"holds weights as state_dict, {average}; state_dict is taken; for the moving average" in said


def test_plain_values_beside_the_names(tensors, tmp_path):
    check_read({"epoch": 3, "note": "x", **tensors, "bn1._extra_state": None}, tensors, tmp_path / "x.pt")


# ------------------------------------------------------------------------------------- objects beside the weights


class Config(dict):
    pass


class Ordered(OrderedDict):
    pass


class Rows(list):
    pass


class Colour(enum.Enum):
    RED = 1


class Member:
    def __reduce__(self):
        return getattr, (Colour, "RED")


@dataclasses.dataclass
class Plain:
    lr: float = 0.1


@dataclasses.dataclass(slots=True)
class Slotted:
    lr: float = 0.1


class Reduced:
    """What unpickling would run must not be run."""

    def __reduce__(self):
        return Reduced, ("x",), {"a": 1}, iter([1]), iter([(1, 2)])

    def __init__(self, *arguments):
        if arguments:
            raise AssertionError("was built by reading it")


Point = collections.namedtuple("Point", "x y")
OBJECTS = {
    "namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    "numpy scalar": np.float64(91.5),
    "numpy bool": np.bool_(1),
    "numpy text": np.str_("a"),
    "numpy array": np.arange(3),
    "numpy dtype": np.dtype("f4"),
    "numpy generator": np.random.default_rng(0),
    "numpy random state": np.random.RandomState(0),
    "path": pathlib.Path("a/b"),
    "defaultdict": collections.defaultdict(list, {"a": [1, 2]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("abc"),
    "namedtuple": Point(1, 2),
    "time": datetime.datetime.now(datetime.UTC),
    "interval": datetime.timedelta(1),
    "enum": Colour.RED,
    "enum of Python 3.11.2": Member(),
    "decimal": decimal.Decimal("1.5"),
    "uuid": uuid.UUID(int=3),
    "simple namespace": types.SimpleNamespace(a=1),
    "set": {1, 2},
    "frozenset": frozenset([1]),
    "range": range(3),
    "slice": slice(1, 2),
    "complex": 1j,
    "dict subclass": Config(a=Config(b=1)),
    "OrderedDict subclass": Ordered(a=1),
    "list subclass": Rows([1, 2]),
    "dataclass": Plain(),
    "dataclass with slots": Slotted(),
    "whole optimizer": torch.optim.Adam([nn.Parameter(torch.ones(2))]),
    "whole network": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "version": torch.__version__,
    "reduced": Reduced(),
    "parameter": nn.Parameter(torch.ones(2)),
}


LIKE_LISTS = ("deque", "list subclass", "reduced")
SKIPS_LISTS = hasattr(Unpickler, "_check_append_target")  # torch 2.11 appends to plain lists only


@pytest.mark.parametrize("new", [True, False], ids=["archive", "before 2020"])
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_beside_the_weights_are_skipped(name, new, tensors, tmp_path, capsys):
    path = tmp_path / "x.pt"
    content = {"object": OBJECTS[name], "in a list": [1, OBJECTS[name]], "state_dict": tensors, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    if name == "whole network" and not new:
        assert "is a whole Python object" in refusal(path)
        return
    if name in LIKE_LISTS and not SKIPS_LISTS:
        assert "which this torch can't skip; install a newer one, or save the state_dict alone" in refusal(path)
        return
    found = read_network(path)
    assert all(torch.equal(found.state_dict[key], tensor) for key, tensor in tensors.items())
    assert found.extra["epoch"] == 3 and found.extra["in a list"][0] == 1
    assert not any(isinstance(value, Inert) for value in (*found.extra.values(), *found.extra["in a list"]))
    said = capsys.readouterr().out
    if name not in ("counter", "set", "complex", "parameter"):  # these are plain enough
        assert said.count("\n") == 1 and "nothing of it is executed (" in said


def test_subclasses_of_dict_and_list_are_read_as_plain_ones(tensors, tmp_path):
    content = {
        "state_dict": Ordered(tensors),
        "config": Config(a=[Rows([1]) if SKIPS_LISTS else [1]]),
        "d": collections.defaultdict(list, a=[1]),
    }
    torch.save(content, tmp_path / "x.pt")
    found = read_network(tmp_path / "x.pt")
    assert found.extra == {"config": {"a": [[1]]}, "d": {"a": [1]}} and type(found.extra["config"]) is dict


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_objects_that_run_something_are_refused(tensors, tmp_path):
    import subprocess
    import webbrowser

    for function in (
        os.system,
        eval,
        exec,
        __import__,
        subprocess.run,
        webbrowser.open,
        torch.load,
        os.remove,
    ):
        torch.save({"state_dict": tensors, "x": Calls(function, str(tmp_path / "y"))}, tmp_path / "x.pt")
        assert "holds the Python object" in refusal(tmp_path / "x.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_functions_of_other_packages_are_not_called(tensors, tmp_path):
    """They are neither imported nor called, whatever they do."""
    target = tmp_path / "y.npy"
    torch.save({"state_dict": tensors, "x": Calls(np.save, str(target), 1), "y": Calls(fit)}, tmp_path / "x.pt")
    assert read_network(tmp_path / "x.pt").spec == TINY and not target.exists()


def test_more_names_than_any_program_has_are_refused(tensors, tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    code = b"\x80\x02" + b"".join(b"cm%d\nA\n0" % i for i in range(1000)) + b"}."
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, code if entry.endswith("data.pkl") else old.read(entry))
    assert "is made up" in refusal(tmp_path / "x.pt")
