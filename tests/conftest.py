"""Every test computes the same on every machine: in 32 bit, on one thread, from the same seed; and what tests share.

torch is imported where it is needed: it takes seconds, and the process that hands out the tests does without.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: several threads wait longer for each other than one computes
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background; programs started here inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def plain_cpu() -> Iterator[None]:
    """`--amp auto` means 32 bit: the CPU shows none of what it can. Tests of arithmetic say what it shows."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(autouse=True)
def own_seed() -> None:
    """What a test draws does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Programs that run in this process leave the signals to the system when they end."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what must leave their number as it was."""
    import torch

    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def make_folders(tmp_path) -> Callable[..., Path]:
    """A function that writes `number` images a class and returns the folder, with train/ and test/ or as told."""
    from helpers.images import random_image

    def make(
        name: str = "images",
        classes: tuple[str, ...] = ("cat", "dog"),
        splits: tuple[str, ...] = ("train", "test"),
        number: int = 2,
        size: tuple[int, int] = (8, 8),
        mode: str = "RGB",
        suffix: str = "png",
    ) -> Path:
        files = [
            tmp_path / name / split / label / f"{i}.{suffix}"
            for split in splits
            for label in classes
            for i in range(number)
        ]
        for seed, file in enumerate(files):
            file.parent.mkdir(parents=True, exist_ok=True)
            random_image(size, mode, seed).save(file)
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    """The packed file of a small network with tensors of every kind."""
    from helpers.packed_files import mixed
    from model_scoring.packing import Kind, write_packed

    path = tmp_path_factory.mktemp("packed") / "mixed.safetensors"
    report = write_packed(mixed(), path)
    assert {layer.kind for layer in report.layers} == set(Kind)
    return path.read_bytes()


@pytest.fixture(scope="module")
def packed_1() -> bytes:
    """A packed file of version 1."""
    return (Path(__file__).parent / "reference" / "packed_version_1.safetensors").read_bytes()


@pytest.fixture(scope="session")
def resnet(tmp_path_factory) -> Path:
    """The checkpoint of a ResNet-20 for digits, untrained: enough wherever accuracy does not matter."""
    import torch

    from engine.store.checkpoint import network_content, save
    from model import build

    torch.manual_seed(0)
    spec = {"name": "resnet20", "num_classes": 10}
    path = tmp_path_factory.mktemp("fp") / "resnet.pt"
    save(network_content(spec, build(spec), dataset="digits", image_size=8), path)
    return path
