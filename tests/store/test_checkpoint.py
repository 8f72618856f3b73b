"""Checkpoints and runs on disk: what is written comes back, no moment leaves half a file, bad files are named."""

import errno
import io
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.program.network_flags import scaled, wanted_spec
from engine.store.checkpoint import find, network_content, read, read_network, save
from engine.store.files import write_whole
from helpers.disk import small_disk
from helpers.networks import TINY
from helpers.refusals import refusal
from model import build


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build(TINY)


@pytest.fixture(scope="module")
def tensors(network) -> dict:
    return network.state_dict()


# ------------------------------------------------------------------------------------- what is written comes back


def test_a_network_comes_back(network, tmp_path):
    path = tmp_path / "new folder" / "x.pt"
    save(network_content(TINY, network, dataset="digits", image_size=16, accuracy=93.5), path)
    checkpoint = read_network(path)
    assert checkpoint.spec == TINY
    assert checkpoint.extra == {"dataset": "digits", "image_size": 16, "accuracy": 93.5}
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(checkpoint.network().eval()(images), network.eval()(images))


def test_content_does_not_follow_the_network(network):
    copy = build(TINY)
    content = network_content(TINY, copy)
    before = content["state_dict"]["conv1.weight"].clone()
    with torch.no_grad():
        copy.conv1.weight.add_(1)
    assert torch.equal(content["state_dict"]["conv1.weight"], before)


def with_prefix(tensors: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def without_counters(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


LAYOUTS = {
    "bare": lambda t: t,
    "of DataParallel": with_prefix,
    "of 2019": lambda t: {"state_dict": with_prefix(without_counters(t)), "best_prec1": 81.46, "epoch": 200},
    "with an optimizer": lambda t: {"epoch": 3, "arch": "x", "state_dict": t, "optimizer": {"state": {}, "lr": 0.1}},
    "under net": lambda t: {"net": t, "acc": 91.7},
    "under model": lambda t: {"model": t},
    "with another program's model": lambda t: {"model": {"name": "mine", "depth": 3}, "state_dict": t},
    "with half a spec": lambda t: {"model": {"name": "cifar_micronet"}, "state_dict": t},
    "of parameters": lambda t: {name: nn.Parameter(v, requires_grad=v.is_floating_point()) for name, v in t.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts_are_read(layout, tensors, tmp_path):
    torch.save(layout(tensors), tmp_path / "x.th")
    checkpoint = read_network(tmp_path / "x.th")
    assert checkpoint.spec["name"] == "cifar_micronet" and checkpoint.spec["num_classes"] == TINY["num_classes"]
    restored = checkpoint.network().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in without_counters(tensors).items())


def test_the_old_file_format_is_read(tensors, tmp_path):
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_network(tmp_path / "x.pt").state_dict["conv1.weight"], tensors["conv1.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(dtype, tensors, tmp_path):
    torch.save({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, tmp_path / "x.pt")
    weight = read_network(tmp_path / "x.pt").network().conv1.weight
    assert torch.equal(weight, tensors["conv1.weight"].to(dtype).float())


def test_what_no_program_wrote_of_the_data_is_not_believed(tensors, tmp_path):
    torch.save({"state_dict": tensors, "dataset": "cifar-ten", "image_size": "32", "note": 1}, tmp_path / "x.pt")
    assert read_network(tmp_path / "x.pt").extra == {"note": 1}


# ------------------------------------------------------------------------------------- no moment leaves half a file


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.pt"
    save({"epoch": 1}, path)
    with small_disk(3000):
        message = refusal(save, {"epoch": 2, "weights": torch.ones(10_000)}, path)
    assert str(path) in message and os.strerror(errno.EFBIG) in message
    assert read(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_file_as_it_was(step, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save({"epoch": 1}, path)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save({"epoch": 2}, path)
    assert read(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_file_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    path, seen = tmp_path / "x.txt", []
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append((path.read_bytes(), os.fstat(handle).st_size)))
    write_whole(b"newer", path)
    assert seen[0] == (b"old", 5) and path.read_bytes() == b"newer"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save({"epoch": 1}, tmp_path / "x.pt")
    finally:
        os.umask(before)
    assert (tmp_path / "x.pt").stat().st_mode & 0o777 == 0o640


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "models").write_text("not a folder")
    message = refusal(save, {"epoch": 1}, tmp_path / "models" / "x.pt")
    assert f"{tmp_path}/models/x.pt: can't be written" in message


# ------------------------------------------------------------------------------------- bad files


class Executed:
    """Unpickling this makes a file."""

    def __init__(self, function, path: Path):
        self.function, self.path = function, path

    def __reduce__(self):
        return self.function, (self.path,)


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def scratched(data: bytes) -> bytes:
    return data[:3000] + b"\xff" * 64 + data[3064:]


BAD_BYTES = {
    "empty": (lambda t: b"", "is empty"),
    "text": (lambda t: b"accuracy 81.46\n" * 99, "is not a PyTorch checkpoint"),
    "another pickle": (lambda t: pickle.dumps({"a": 1}), "is not a PyTorch checkpoint"),
    "half": (lambda t: half(saved(t)), "is truncated or damaged"),
    "half, old": (lambda t: half(saved(t, _use_new_zipfile_serialization=False)), "is truncated or damaged"),
    "scratched": (lambda t: scratched(saved(t)), "is truncated or damaged"),
    "a whole module": (lambda t: saved(build(TINY)), "is a whole Python object (model.micronet.MicroNet)"),
    "a list": (lambda t: saved([1, 2]), "holds a list"),
    "a tensor": (lambda t: saved(torch.zeros(3)), "holds a Tensor"),
    "an empty dict": (lambda t: saved({}), "no tensors by name (its keys: none)"),
    "an empty state dict": (lambda t: saved({"state_dict": {}, "epoch": 1}), "(its keys: state_dict, epoch)"),
    "numbers for tensors": (lambda t: saved({"state_dict": {"conv1.weight": 1.0}}), "no tensors by name"),
}


@pytest.mark.parametrize("make, said", BAD_BYTES.values(), ids=BAD_BYTES)
def test_bad_files_are_named_and_their_folder_is_listed(make, said, tensors, tmp_path):
    (tmp_path / "bad.pt").write_bytes(make(tensors))
    (tmp_path / "good.pth").touch()
    message = refusal(read_network, tmp_path / "bad.pt")
    assert message.startswith(f"{tmp_path}/bad.pt: ") and said in message
    assert message.endswith(f"{tmp_path} holds bad.pt, good.pth)")


@pytest.mark.parametrize("function", [os.mkdir, Path.touch])
def test_nothing_in_a_file_is_executed(function, tmp_path):
    torch.save({"state_dict": Executed(function, tmp_path / "executed")}, tmp_path / "x.pt")
    assert "only tensors and plain values are read" in refusal(read_network, tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_a_packed_file_names_the_way_to_a_checkpoint(packed, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(packed)
    assert f"run_scoring.py --t-model {path} --unpack FILE.pt" in refusal(read_network, path)


def test_odd_pickles_cause_no_warning(tmp_path, recwarn):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": 1}, protocol=5))
    refusal(read, tmp_path / "x.pt")
    assert not recwarn.list


BAD_TENSORS = {
    "NaN": ({"linear.bias": torch.full((2,), torch.nan)}, "linear.bias holds NaN"),
    "infinite": ({"bn1.bias": torch.full((8,), -torch.inf)}, "bn1.bias holds NaN or infinite"),
    "beyond float32": ({"bn1.bias": torch.full((8,), 1e300, dtype=torch.float64)}, "bn1.bias holds NaN or infinite"),
    "integer": ({"conv1.weight": torch.ones(8, 3, 3, 3, dtype=torch.int8)}, "conv1.weight is strided of int8"),
    "complex": ({"conv1.weight": torch.ones(8, 3, 3, 3) * 1j}, "conv1.weight is strided of complex64"),
    "sparse": ({"linear.weight": torch.eye(2, 32).to_sparse()}, "linear.weight is sparse_coo of float32"),
    "without values": ({"bn1.bias": torch.zeros(8, device="meta")}, "bn1.bias is strided of float32 on meta"),
    "one value said to be many": ({"bn1.bias": torch.zeros(1).expand(8)}, "bn1.bias claims more values"),
    "missing": ({"layer1.0.conv1.weight": None}, "layer1.0.conv1.weight is missing"),
    "surplus": ({"head.weight": torch.zeros(3)}, "head.weight is not of this network"),
    "of another width": ({"bn1.bias": torch.zeros(16)}, "bn1.bias is 16 where 8 is needed"),
    "of absurd size": ({"bn1.bias": torch.zeros(1).expand(2**50)}, "bn1.bias claims more values"),
}


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "with spec"])
@pytest.mark.parametrize("changes, said", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_named(changes, said, bare, tensors, tmp_path):
    changed = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    torch.save(changed if bare else {"model": TINY, "state_dict": changed}, tmp_path / "x.pt")
    message = refusal(read_network, tmp_path / "x.pt")
    assert message.startswith(f"{tmp_path}/x.pt: ") and said in message


def test_tensors_of_no_known_network(tmp_path):
    torch.save({"fc.weight": torch.zeros(10, 512)}, tmp_path / "x.pt")
    assert "fit none of the known networks (cifar_micronet, " in refusal(read_network, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"depth": 0.2}, "--dw-multps 0.2 0.5 --phi 1, but layer1.1.bn1.weight is missing (and "),
        ({"num_classes": 7}, "linear.weight is 2x32 where 7x32 is needed (and 1 more)"),
        ({"name": "imagenet_micronet"}, "--model imagenet_micronet"),
        ({"name": "resnet20"}, "can't be built"),
        ({"depth": 1e6}, "the depth multiplier 1e+06 is not above 0 and at most 32"),
        ({"width": float("nan")}, "the width multiplier nan"),
        ({"num_classes": "10"}, "can't be built"),
        ({"num_classes": -1}, "can't be built"),
        ({"colour": 3}, "can't be built"),
    ],
)
def test_a_file_that_says_it_is_another_network(changes, said, tensors, tmp_path):
    torch.save({"model": {**TINY, **changes}, "state_dict": tensors}, tmp_path / "x.pt")
    message = refusal(read_network, tmp_path / "x.pt")
    assert f"{tmp_path}/x.pt: says that it is " in message and said in message


# ------------------------------------------------------------------------------------- what the flags ask for


def test_flags_left_out_ask_for_nothing():
    assert wanted_spec(None, None, None) == {}
    assert wanted_spec("resnet20", None, None) == {"name": "resnet20"}


@pytest.mark.parametrize(
    "dw_multps, phi, spec",
    [
        ([1.4, 1.2], 3.5, {"depth": 1.4**3.5, "width": 1.2**3.5}),
        ([1.2, 1.3], None, {"depth": 1.2**3.5, "width": 1.3**3.5}),
        (None, 2.0, {"depth": 1.4**2, "width": 1.2**2}),
        ([1.2, 1.3], 1.0, {"depth": 1.2, "width": 1.3}),
        ([9, 9], 0.0, {"depth": 1, "width": 1}),
    ],
)
def test_flags_ask_for_multipliers(dw_multps, phi, spec):
    assert wanted_spec(None, dw_multps, phi) == spec


@pytest.mark.parametrize("d, w, phi, said", [(14, 1, 3.5, "depth"), (1, 12, 3.5, "width"), (1e300, 1, 9, "depth")])
def test_multipliers_without_their_decimal_point_are_an_error(d, w, phi, said):
    assert f"a {said} multiplier of " in refusal(scaled, d, w, phi)


def test_multipliers_that_vanish_are_an_error():
    assert "a width multiplier of 0.1^1e+09 = 0" in refusal(scaled, 1, 0.1, 1e9)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(
    "wanted",
    [{"name": "cifar_micronet"}, {"depth": 0.1, "width": 0.5}, {"depth": 0.13, "width": 0.46}, {**TINY}, {}],
)
def test_flags_that_fit_are_accepted(wanted, bare, network, tmp_path):
    save(network.state_dict() if bare else network_content(TINY, network), tmp_path / "x.pt")
    assert read_network(tmp_path / "x.pt", wanted).state_dict.keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    "wanted, said",
    [
        ({"name": "resnet20"}, "--model resnet20"),
        ({"name": "imagenet_micronet", "depth": 0.1, "width": 0.5}, "--model imagenet_micronet"),
        ({"depth": 0.1, "width": 1.2}, "--model cifar_micronet --dw-multps 0.1 1.2 --phi 1"),
        ({"depth": 3, "width": 0.5}, "--model cifar_micronet --dw-multps 3 0.5 --phi 1"),
    ],
)
def test_contradictions_name_both_and_the_flags_that_fit(wanted, said, network, tmp_path):
    save(network_content(TINY, network), tmp_path / "x.pt")
    message = refusal(read_network, tmp_path / "x.pt", wanted)
    assert f"x.pt holds --model cifar_micronet --dw-multps 0.1 0.5 --phi 1, but the flags ask for {said}: " in message


def test_multipliers_do_not_matter_to_networks_without(tmp_path):
    save(build({"name": "resnet20"}).state_dict(), tmp_path / "x.pt")
    wanted = wanted_spec("resnet20", [1.4, 1.2], 3.5)
    assert read_network(tmp_path / "x.pt", wanted).spec == {"name": "resnet20", "num_classes": 10}


def test_another_number_of_classes_is_an_error(network, tmp_path):
    save(network_content(TINY, network), tmp_path / "x.pt")
    checkpoint = read_network(tmp_path / "x.pt")
    checkpoint.check_classes(["ant", "bee"], "folder", "insects")
    message = refusal(checkpoint.check_classes, ["ant", "bee", "cat"], "folder", "pets")
    assert "x.pt has 2 classes, but folder in pets has 3; pass the --dataset and --data-path" in message


# ------------------------------------------------------------------------------------- finding files


def test_a_name_is_looked_up_in_the_folder_first_and_a_path_works_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models"
    for file in (folder / "x.pt", tmp_path / "x.pt", tmp_path / "sub" / "y.pt"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert find("x.pt", folder) == folder / "x.pt"
    assert find(str(tmp_path / "x.pt"), folder) == tmp_path / "x.pt"
    assert find("sub/y.pt", folder) == Path("sub/y.pt")


def test_a_missing_name_lists_the_folder(tmp_path):
    for name in ("notes.txt", "b.th", "a.pt", ".gitkeep"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    listing = f"{tmp_path} holds a.pt, b.th, notes.txt, runs/"
    assert refusal(find, "x.pt", tmp_path) == f"no file 'x.pt', neither as a path nor in {tmp_path} ({listing})"


def test_a_missing_path_lists_the_folder_it_names(tmp_path):
    (tmp_path / "a.pt").touch()
    path = f"{tmp_path}/x.pt"
    assert refusal(find, path, tmp_path / "models") == f"no file '{path}' ({tmp_path} holds a.pt)"
    assert "(there is no folder nowhere)" in refusal(find, "nowhere/x.pt", tmp_path)


def test_long_listings_are_cut(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:02}.pt").touch()
    assert re.search(r"holds 00.pt, 01.pt, .* and 88 more\)$", refusal(find, "x.pt", tmp_path))


@pytest.mark.parametrize("name", ["", ".", "x" * 5000])
def test_what_can_not_be_a_file_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "holds no files" in refusal(find, name, tmp_path)
