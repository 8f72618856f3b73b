"""A guard for GPUs that needs none: meta tensors stand for a GPU's, and nothing may wait for their values."""

import sys

import pytest
import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import engine.images.batches
import model_quantization.ec2t
from engine.device import Machine
from engine.evaluation import evaluate
from engine.images.augment import Augmentation
from engine.images.batches import ImagesInMemory
from engine.objective import Objective
from engine.training import Epoch, train_epoch
from model import build
from model.selection import ternary_candidates
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers

META = torch.device("meta")
STEPS = 4
OF_UNKNOWN_SIZE = ("nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount")


class Accelerator(TorchDispatchMode):
    """Counts operations, read-backs and copies from the CPU; mixing a GPU's tensors with the CPU's, 0-dim ones aside,
    is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.read_backs = self.uploads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.is_meta]
        from_cpu = not on_gpu and kwargs.get("device") == META
        self.uploads += name in ("_to_copy", "copy_") and (from_cpu or not args[-1].is_meta)
        if not on_gpu:
            return func(*args, **kwargs)
        self.operations += 1
        if name == "_local_scalar_dense":
            self.read_backs += 1
            return 1.0
        if name == "_to_copy" and torch.device(kwargs.get("device", META)) != META:
            self.read_backs += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        assert name not in OF_UNKNOWN_SIZE, f"{name} waits for the number of its results"
        assert name != "repeat_interleave" or kwargs.get("output_size"), "repeat_interleave waits for its size"
        indices = args[1] if name in ("index", "index_put_") else ()
        assert all(index is None or index.dtype != torch.bool for index in indices), f"{name} waits for a mask's sum"
        assert all(tensor.is_meta or not tensor.ndim for tensor in tensors), f"{name} mixes devices"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def meta_device(monkeypatch):
    """The meta device has fused optimizers that do nothing, and the CPU's random numbers."""
    optimizers = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim hides it
    supported = optimizers._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"])
    kernels = library.Library("aten", "IMPL", "Meta")
    for name in ("_fused_adam_", "_fused_sgd_"):
        kernels.impl(name, lambda *args, **kwargs: None, allow_override=True)

    class OnCpu(torch.Generator):
        def __new__(cls, device=None):
            return super().__new__(cls, "cpu")

    class Torch:
        Generator = OnCpu

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(engine.images.batches, "torch", Torch())
    yield
    kernels._destroy()


def images() -> ImagesInMemory:
    shape = 64 * STEPS, 3, 32, 32
    data = torch.empty(shape, dtype=torch.uint8, device=META), torch.empty(shape[0], dtype=torch.int64, device=META)
    augmentation = Augmentation(True, 4, (0.3, 0.3, 0.3, 0.075), 16)
    return ImagesInMemory("x", ["a"] * 10, data, data, augmentation, 64, 64)


def quantization(bits: int = 2, prune: bool = False, frozen: bool = False):
    network = build({"name": "resnet20", "num_classes": 10}).to(META, memory_format=torch.channels_last)
    names = dict.fromkeys(ternary_candidates(network, "resnet20"), bits)
    layers = QuantizedLayers(network, names, 0.3, 0.1, prune=prune)
    layers.frozen = frozen
    others = [p for name, p in network.named_parameters() if name not in names]
    return network, EC2TOptimizer(layers, others, 1e-3, 1e-4, 0.0)


def epoch(network, optimizer) -> None:
    train_epoch(network, optimizer, images(), Machine(META), Epoch(0, ""), Objective(cutmix=0.5))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 280),
        ({"frozen": True}, 140),
        ({"prune": True}, 250),
        ({"prune": True, "frozen": True}, 190),
        ({"bits": 3}, 380),
        ({"bits": 6}, 1100),
    ],
)
def test_ec2t_reads_back_once_an_epoch_and_its_step_can_be_recorded(options, most, monkeypatch):
    """A CUDA graph takes no copy from the CPU."""
    with Accelerator() as gpu:
        network, optimizer = quantization(**options)
        assert gpu.read_backs == 0
        epoch(network, optimizer)
        assert gpu.read_backs == 1
        operations, uploads = gpu.operations, gpu.uploads
        monkeypatch.setattr(torch, "tensor", None)  # which copies without being seen here
        optimizer.step()
        assert gpu.operations - operations < most and gpu.uploads == uploads


def test_an_epoch_of_stage_1_reads_back_once_and_an_evaluation_twice():
    network = build({"name": "cifar_micronet", "depth": 0.3, "width": 0.3, "num_classes": 10}).to(META)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, fused=True)
    with Accelerator() as gpu:
        epoch(network, optimizer)
        assert gpu.read_backs == 1
        evaluate(network, images(), Machine(META))
        assert gpu.read_backs == 3


def planted(monkeypatch, fault: str) -> None:
    """Make EC2T's step or an epoch's wait for the device, or mix devices."""
    original = model_quantization.ec2t.bounded_steps

    def bounded(steps, extent, levels):
        faults = {
            "item": lambda: steps.sum().item(),
            "condition": lambda: bool((steps > 0).all()),
            "mask": lambda: steps[steps > 0],
            "nonzero": lambda: steps.nonzero(),
            "table on the CPU": lambda: steps + torch.ones(2, 18),
            "repeat without a size": lambda: torch.repeat_interleave(levels.long()),
            "to the CPU": lambda: steps.cpu(),
            "unique": lambda: steps.unique(),
        }
        faults[fault]()
        return original(steps, extent, levels)

    monkeypatch.setattr(model_quantization.ec2t, "bounded_steps", bounded)


FAULTS = ("item", "condition", "mask", "nonzero", "table on the CPU", "repeat without a size", "to the CPU", "unique")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, monkeypatch):
    network, optimizer = quantization()
    planted(monkeypatch, fault)
    with Accelerator() as gpu:
        try:
            epoch(network, optimizer)
        except (AssertionError, RuntimeError, NotImplementedError):
            return  # refused
        assert gpu.read_backs > 1
