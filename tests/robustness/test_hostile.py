"""Checkpoints from strangers: whatever is done to a file, it is refused with one line or read as it was."""

import io
import math
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.program.errors import UserError
from engine.store.checkpoint import Checkpoint, network_content, own_spec, read, read_network, save
from engine.store.run_folder import Run, resume_from
from helpers import ROOT
from helpers.networks import TINY
from helpers.refusals import refusal
from model import build
from model.selection import ternary_candidates
from model_quantization.quantized_layers import QuantizedLayers
from model_scoring import networks
from model_scoring.packing import write_packed

pytestmark = pytest.mark.robustness


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """What the programs write, and a bare state dict, by name."""
    torch.manual_seed(0)
    network = build(TINY)
    told = {"dataset": "digits", "classes": ["0", "1"], "image_size": 8, "accuracy": 50.0}
    best = network_content(TINY, network, **told)
    layers = QuantizedLayers(network, ternary_candidates(network, TINY["name"]), s=0.3, g=0.1)
    ternary = network_content(TINY, network, **told, **layers.by_layer(), layers=layers.state_dict())
    contents = {"best": best, "ternary": ternary, "bare": build(TINY).state_dict()}
    made = {}
    for name, content in contents.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        made[name] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(contents["bare"], buffer, _use_new_zipfile_serialization=False)
    return made | {"old": buffer.getvalue()}


def equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


def outcome(path: Path) -> Checkpoint | None:
    """The network in a file, or None where it is refused with one line."""
    try:
        return read_network(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
        return None


# ------------------------------------------------------------------------------------- damaged bytes: 760 mutations


@pytest.mark.parametrize("name", ["best", "ternary", "bare", "old"])
def test_truncated_anywhere(name, files, tmp_path):
    path = tmp_path / "x.pt"
    for percent in range(100):
        path.write_bytes(files[name][: len(files[name]) * percent // 100])
        assert outcome(path) is None, f"{percent}%"


@pytest.mark.parametrize("name", ["best", "ternary", "bare"])
def test_no_flipped_bit_enters_a_network(name, files, tmp_path):
    path, draw = tmp_path / "x.pt", random.Random(0)
    path.write_bytes(files[name])
    original, refused = read_network(path), 0
    for _ in range(120):
        changed = bytearray(files[name])
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        found = outcome(path)
        refused += found is None
        assert found is None or (equal(found.state_dict, original.state_dict) and equal(found.extra, original.extra))
    assert refused > 60  # the rest are dates and padding in the archive's directory


def test_a_flipped_bit_in_a_weight_is_found_by_its_checksum(files, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(files["bare"])
    weight = read_network(path).state_dict["conv1.weight"].numpy().tobytes()
    changed = bytearray(files["bare"])
    changed[files["bare"].index(weight) + 2] ^= 1
    path.write_bytes(changed)
    assert torch.load(path)["conv1.weight"].numpy().tobytes() != weight, "torch.load compares checksums itself now"
    with pytest.raises(UserError, match="is truncated or damaged"):
        read(path)


# ------------------------------------------------------------------------------------- made-up content: 240 mutations

warnings.filterwarnings("ignore", message=".*(CSR|quantize_per_tensor)")
ODD_TENSORS = [
    torch.tensor(3.0),
    torch.zeros(7),
    torch.zeros(2, 3, 3, 3) * 1j,
    torch.zeros(0),
    torch.eye(3).to_sparse(),
    torch.eye(3).to_sparse_csr(),
    torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    torch.zeros(3, device="meta"),
    torch.zeros(1).expand(2**40),
    torch.full((8,), math.nan),
    torch.full((8,), math.inf, dtype=torch.float64),
    torch.ones(8, dtype=torch.bool),
    torch.ones(8, dtype=torch.int32),
]
ODD_VALUES = [None, -1, 10**300, math.nan, "x\n\x1b[2Jy", b"", [], {}, {1: 2}, [[]], (0,), torch.float16, *ODD_TENSORS]


def mutated(content: object, draw: random.Random) -> object:
    """`content` with one entry, anywhere in it, made odd, removed, or added."""
    if isinstance(content, dict) and content:
        key, changed = draw.choice(list(content)), dict(content)
        if draw.random() < 0.15:
            changed[draw.choice(["surplus", 3, ("a", 1)])] = draw.choice(ODD_VALUES)
        elif draw.random() < 0.15:
            del changed[key]
        else:
            changed[key] = mutated(content[key], draw)
        return changed
    if isinstance(content, list) and content and draw.random() < 0.8:
        return [mutated(content[0], draw), *content[1:]]
    if isinstance(content, Tensor) and content.ndim and draw.random() < 0.5:
        other_type = content.to(draw.choice([torch.float64, torch.int8, torch.bool, torch.complex64]))
        return draw.choice([content[:-1], content[None], other_type, content.flatten()[:1].expand(content.shape)])
    return draw.choice(ODD_VALUES)


@pytest.mark.parametrize("name", ["best", "ternary", "bare"])
def test_made_up_networks(name, files, tmp_path):
    path, draw, accepted = tmp_path / "x.pt", random.Random(1), 0
    path.write_bytes(files[name])
    original = read(path)
    for _ in range(40):
        changed = mutated(original, draw)
        torch.save(changed, path)
        if found := outcome(path):
            accepted += 1
            tensors = changed.get("state_dict", changed)
            for key, tensor in found.network().state_dict().items():
                assert key not in tensors or torch.equal(tensor, tensors[key].to(tensor.dtype))
            save(network_content(found.spec, found.network(), **found.extra), tmp_path / "again.pt")
    assert 0 < accepted < 40


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"lr": None}, {"wd": 1}])
def test_a_state_of_other_arguments_is_named(change, tmp_path):
    run = Run(tmp_path, "x", {"lr": 0.01, "seed": 0})
    content = {"arguments": run.arguments | change, "state": {"network": {}}, "history": [{"epoch": 1}]}
    save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match=f"{next(iter(change))} was"):
        resume_from(tmp_path / "last.pt", [run])
    save(content, run.last)
    with pytest.raises(UserError, match="--no-resume starts this run afresh"):
        run.open(resume=True)


# ------------------------------------------------------------------------------------- code, bombs, absurd claims


def archive(path: Path, code: bytes, record: bytes = bytes(64), how: int = zipfile.ZIP_STORED) -> None:
    """An archive as torch.save writes it, of any pickle."""
    with zipfile.ZipFile(path, "w", how) as file:
        entries = {"data.pkl": code, "byteorder": b"little", "version": b"3\n", "data/0": record}
        for name, content in entries.items():
            file.writestr(f"x/{name}", content)


def storage(numel: int) -> bytes:
    """The pickle of a dict of one tensor of `numel` float32, which lie in the record `data/0`."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(16)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        code = file.read("archive/data.pkl")
    assert code.count(b"K\x10") == 2
    return code.replace(b"K\x10", b"\x8a\x08" + struct.pack("<q", numel))


def calling(name: bytes, argument: bytes) -> bytes:
    """The pickle of {"a": name(argument)}."""
    return b"\x80\x02}X\x01\x00\x00\x00ac" + name + b"\n" + argument + b"\x85Rs."


class System:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


HUGE = b"\x8a\x08" + struct.pack("<q", 10**12)  # LONG1
TEXT = b"X\x04\x00\x00\x00exit"
ITSELF = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."
HOSTILE = {
    "os.system": lambda path: archive(path, pickle.dumps({"a": System(f"touch {path.parent}/run")}, 2)),
    "builtins.eval": lambda path: archive(path, calling(b"builtins\neval", TEXT)),
    "torch.load": lambda path: archive(path, calling(b"torch.serialization\nload", TEXT)),
    "numpy": lambda path: archive(path, calling(b"numpy.core.multiarray\n_reconstruct", TEXT)),
    "a subclass": lambda path: archive(path, calling(b"torch._tensor\n_rebuild_from_type_v2", TEXT)),
    "a huge bytearray": lambda path: archive(path, calling(b"__builtin__\nbytearray", HUGE)),
    "a huge tensor": lambda path: archive(path, calling(b"torch\nFloatTensor", HUGE)),
    "old, a huge bytearray": lambda path: path.write_bytes(calling(b"__builtin__\nbytearray", HUGE)),
    "claimed size": lambda path: archive(path, storage(10**12)),
    "negative size": lambda path: archive(path, storage(-1)),
    "bomb": lambda path: archive(path, storage(2**24), bytes(2**26), zipfile.ZIP_DEFLATED),
    "bomb in the pickle": lambda path: archive(path, b"\x80\x02" + bytes(2**26), how=zipfile.ZIP_DEFLATED),
    "holds itself": lambda path: archive(path, ITSELF),
    "expanded": lambda path: torch.save({"a": torch.zeros(1).expand(2**45)}, path),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(make, tmp_path):
    path = tmp_path / "x.pt"
    make(path)
    with pytest.raises(UserError, match=rf"^{path}: ") as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_containers_that_share_their_parts_do_not_grow_without_end(tmp_path):
    content = ["x"]
    for _ in range(60):  # 2^60 lists, if each is looked at
        content = [content, content]
    torch.save({"a": content}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds more than 1,000,000 values"):
        read(tmp_path / "x.pt")


def test_memory_stays_bounded(tmp_path):
    """Hostile files of less than 2 MB, all read by one process: its peak hardly rises."""
    for name, make in HOSTILE.items():
        make(tmp_path / f"{name}.pt")
    program = """
import resource, sys
from pathlib import Path
from engine.program.errors import UserError
from engine.store.checkpoint import read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path(sys.argv[1]).glob("*.pt"):
    assert path.stat().st_size < 2e6
    try:
        print("read", path, read(path))
    except UserError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = f"{sys.executable} -c {shlex.quote(program)} {tmp_path}"
    grown = int(subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, check=True).stdout)
    assert grown < 40_000  # KiB


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("torchvision.models:resnet.torch.os.system", {"command": "touch {}/called"}),
        ("torchvision.models:_api.importlib.import_module", {"name": "planted"}),
        ("torchvision.models:get_model", {"name": "resnet18"}),
        ("torchvision.models.resnet:torch.os.system", {"command": "touch {}/called"}),
        ("planted:net", {}),
        ("planted.py:net", {}),
    ],
)
def test_code_that_only_a_file_names_is_never_run(name, arguments, tmp_path, monkeypatch):
    """Neither by a checkpoint nor by a packed file, and whatever torchvision's modules lead to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("model.own._built", set())
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path('called').touch()\ndef net(): pass\n")
    arguments = {key: value.format(tmp_path) for key, value in arguments.items()}
    spec = {"name": name, "arguments": arguments, "num_classes": 10}
    tensors = {"a.weight": torch.zeros(2, 2)}
    torch.save({"model": spec, "state_dict": tensors}, "x.pt")
    write_packed(Checkpoint(tmp_path / "x.pt", spec, tensors), tmp_path / "x.safetensors")
    for file in ("x.pt", "x.safetensors"):
        message = refusal(networks.load, tmp_path / file, networks.Wanted({}), None)
        assert "code that only a file names is not imported" in message
    assert not (tmp_path / "called").exists() and "planted" not in sys.modules


@pytest.mark.parametrize("arguments", [["a"], {1: 2}, "x", torch.zeros(1), None])
def test_specs_that_no_program_here_wrote_say_nothing(arguments, tmp_path):
    spec = {"name": "torchvision.models:resnet18", "arguments": arguments, "num_classes": 10}
    torch.save({"model": spec, "state_dict": {"a.weight": torch.zeros(2, 2)}}, tmp_path / "x.pt")
    assert "the tensors fit none of the known networks" in refusal(read_network, tmp_path / "x.pt")


def test_a_file_can_not_have_weights_downloaded(tmp_path):
    spec = {"name": "torchvision.models:resnet18", "arguments": {"weights": "DEFAULT", "num_classes": 10}}
    assert own_spec(spec, {}, tmp_path / "x.pt")["arguments"] == {"num_classes": 10}
