"""Files of other programs: formats that are named, plain safetensors, and networks of the user's own."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import model
from engine.program.errors import UserError
from engine.store.checkpoint import read_network
from helpers.checkpoints import prefixed, refusal
from helpers.networks import TINY
from model import build
from model_scoring import networks


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build(TINY).state_dict()


# ------------------------------------------------------------------------------------- other formats


class Scripted(nn.Module):
    def forward(self, x):
        return x + 1


def write(data: bytes):
    return lambda path: path.write_bytes(data)


def zipped(*names: str):
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"x" * 100)

    return make


def exported(path: Path) -> None:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Scripted(), (torch.ones(2),)), buffer)
    path.write_bytes(buffer.getvalue())


FOREIGN = {
    "TorchScript": (lambda path: torch.jit.script(Scripted()).save(str(path)), "is a TorchScript archive"),
    "torch.export": (exported, "is a program of torch.export"),
    "whole network": (lambda path: torch.save(build(TINY), path), "is a whole Python object (model.micronet.MicroNet)"),
    "whole network, old": (
        lambda path: torch.save(build(TINY), path, _use_new_zipfile_serialization=False),
        "is a whole Python object (model.micronet.MicroNet)",
    ),
    "a network under a key": (lambda path: torch.save({"model": build(TINY)}, path), "model.micronet.MicroNet"),
    "ONNX": (write(b"\x08\x07\x12\x07pytorch\x1a\x052.0.1" + bytes(99)), "is an ONNX file"),
    "HDF5": (write(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), "is a NumPy archive (.npz)"),
    "npy": (lambda path: np.save(path.open("wb"), np.ones(3)), "is a NumPy array"),
    "Keras": (zipped("metadata.json", "config.json", "model.weights.h5"), "is a Keras archive"),
    "folder": (zipped("run/best.pth", "run/log"), "is a zip archive of other files ('run/best.pth', 'run/log')"),
    "index": (write(b'{"metadata": {}, "weight_map": {"a": "1.safetensors"}}'), "is the index of a network in several"),
    "JSON": (write(b'{"lr": 0.1}'), "is a JSON text"),
    "web page": (write(b"\n<!DOCTYPE html><html>"), "is a web page"),
    "gzip": (write(b"\x1f\x8b\x08" + bytes(99)), "is compressed by gzip"),
    "LFS": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"), "is a pointer of Git LFS"),
    "TFLite": (write(b"\x1c\0\0\0TFL3" + bytes(99)), "is a file of TensorFlow"),
}  # fmt: skip


@pytest.mark.parametrize("make, said", FOREIGN.values(), ids=FOREIGN)
def test_other_formats_are_named_with_the_way_out(make, said, tmp_path):
    make(tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert said in message and any(way in message for way in ("save", "pass", "git lfs pull", "download"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_plain_safetensors_are_read_like_any(suffix, dtype, tensors, tmp_path):
    path = tmp_path / f"x.{suffix}"
    made = {name: t.to(dtype) if t.is_floating_point() else t for name, t in prefixed("model.", tensors).items()}
    save_file(made, path, {"format": "pt"})
    found = read_network(path)
    assert found.spec == TINY
    assert torch.equal(found.network().conv1.weight, tensors["conv1.weight"].to(dtype).float())
    assert networks.load(path, networks.Wanted({}), None)[0].spec == TINY


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: d[:40], lambda d: d[:9], lambda d: d + b"x"])
def test_damaged_safetensors_are_named(damage, tensors, tmp_path):
    save_file(dict(tensors), tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(damage(data))
    assert "is truncated or damaged" in refusal(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------- networks of the user's own


class Own(nn.Module):
    """Buffers of every kind, an attribute called `module`, and weights whose meaning has a version."""

    _version = 3

    def __init__(self):
        super().__init__()
        self.module = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("used", torch.tensor([True, False]))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.module(x)).mean((2, 3))

    def _load_from_state_dict(self, state_dict, prefix, metadata, *rest):
        if metadata.get("version") not in (2, 3):
            raise ValueError(f"unknown version {metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


def mnasnet():
    from torchvision.models import mnasnet0_5

    return mnasnet0_5(num_classes=4)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that reads what is saved of `Own`, changed, as the user's own network."""
    monkeypatch.setattr(model, "build_own", lambda builder, arguments: globals()[builder.partition(":")[2]]())

    def load(content: object, builder: str = "Own", path: Path = tmp_path / "x.pt") -> nn.Module:
        torch.save(content, path)
        return networks.load(path, networks.Wanted({"name": f"mine:{builder}"}), 64)[1]

    return load


def test_own_networks_with_buffers_of_every_kind(own):
    network = Own()
    assert torch.equal(own(network.state_dict()).mask, network.mask)
    for prefix in ("module.", "model.", "_orig_mod.module."):
        found = own({"state_dict": prefixed(prefix, network.state_dict())})
        assert torch.equal(found.module.weight, network.module.weight)


def test_versions_of_modules_are_kept(own):
    state_dict = nn.DataParallel(Own()).state_dict()
    assert state_dict._metadata["module"] == {"version": 3}
    own({"state_dict": state_dict, "epoch": 1})
    state_dict._metadata["module"] = {"version": 1}
    with pytest.raises(UserError, match="unknown version 1"):
        own(state_dict)


def test_mnasnet_of_torchvision(own, tmp_path):
    torch.manual_seed(0)
    network, image = mnasnet().eval(), torch.randn(1, 3, 64, 64)
    assert torch.equal(own(network.state_dict(), "mnasnet")(image), network(image))
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    found = networks.load(tmp_path / "x.safetensors", networks.Wanted({"name": "mine:mnasnet"}), 64)[1]
    assert torch.equal(found(image), network(image))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"module.weight": torch.full((4, 3, 3, 3), torch.nan)}, "module.weight holds NaN"),
        ({"module.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)}, "module.weight is strided of int8"),
        ({"norm.running_var": torch.full((4,), torch.inf)}, "norm.running_var holds NaN or infinite"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, "mask is strided of bool"),
        ({"used": torch.ones(2)}, "used is strided of float32"),
        ({"norm.bias": torch.ones(5)}, "does not fit what mine:Own builds: norm.bias is 5 where 4 is needed"),
    ],
)
def test_weights_of_own_networks_must_be_finite_numbers(change, said, own):
    with pytest.raises(UserError) as caught:
        own(Own().state_dict() | change)
    assert said in str(caught.value)
