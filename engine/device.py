"""Where a network runs: devices, memory layout, several GPUs, mixed precision, compilation."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from engine import distributed
from engine.depthwise import DepthwiseIn32Bit
from engine.program import processes
from engine.program.errors import UserError
from engine.program.report import narrate, say

BF16_HARDWARE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # capabilities of CPUs that multiply bfloat16
BF16_IS_FASTER = ("amx_bf16",)  # of these, those on which bf16 is never slower than 32 bit
# buffers are averaged after each epoch, and need no exchange before each forward pass; the flag's name in torch changes
_FLAGS = inspect.signature(DistributedDataParallel).parameters
WITHOUT_BUFFERS: dict[str, Any] = {next(f for f in ("forward_sync_buffers", "broadcast_buffers") if f in _FLAGS): False}
LOSS_SCALE = 2.0**12  # of float16's gradients at the start of an epoch


@dataclass(frozen=True)
class Machine:
    """The device and the arithmetic of a run: `amp` is "off", "bf16" or "fp16"; with `graphs` steps are replayed."""

    device: torch.device
    amp: str = "off"
    compile: bool = False
    graphs: bool = False

    def place(self, network: nn.Module) -> nn.Module:
        """Move `network` to the device, in channels-last layout: faster on CPUs, and on GPUs in mixed precision."""
        if self.device.type == "cuda" and self.amp == "off":
            return network.to(self.device)
        layout: dict[str, Any] = {"memory_format": torch.channels_last}  # which torch does not annotate
        return network.to(self.device, **layout)

    def in_32_bit(self) -> "Machine":
        """The same device without mixed precision: accuracy that others can reproduce."""
        return replace(self, amp="off")

    def runner(self, network: nn.Module) -> nn.Module:
        """The module to call for training: `network` itself, or split over processes or GPUs; compiled if wanted.

        Over several processes, backward leaves the gradients' average in each of them.
        """
        if processes.world_size() > 1:
            network = DistributedDataParallel(network, **WITHOUT_BUFFERS)
        elif self.device.type == "cuda" and torch.cuda.device_count() > 1:
            network = nn.DataParallel(Autocast(network, self))
        compiled: Any = torch.compile(network) if self.compile else network
        return compiled

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context in which forward passes run."""
        if self.amp == "off":
            yield
            return
        is_bf16 = self.amp == "bf16"
        on_cpu = DepthwiseIn32Bit() if is_bf16 and self.device.type == "cpu" else contextlib.nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16 if is_bf16 else torch.float16), on_cpu:
            yield

    def gradient_scaler(self) -> GradScaler:
        """What keeps float16's gradients in range; does nothing in other arithmetic.

        Each epoch takes a new one, so that a resumed run needs no scale from the epoch before.
        """
        return GradScaler(self.device.type, init_scale=LOSS_SCALE, enabled=self.amp == "fp16")


class Autocast(nn.Module):
    """`network`, in mixed precision whatever thread calls it.

    DataParallel's replicas run in threads of their own, which know no autocast type and would take float16.
    """

    def __init__(self, network: nn.Module, machine: Machine):
        super().__init__()
        self.network, self.machine = network, machine

    def forward(self, images: Tensor) -> Tensor:
        with self.machine.autocast():
            return self.network(images)


def choose_machine(cuda: bool, amp: str = "off", compile: bool = False, graphs: bool = False) -> Machine:
    """Take the GPUs if wanted and there, else the CPU, and say which; `amp` as `--amp`."""
    on_gpu = cuda and torch.cuda.is_available()
    if graphs and not on_gpu:
        raise UserError("--cuda-graphs: there is no GPU here; leave it out")
    if graphs and (processes.world_size() > 1 or torch.cuda.device_count() > 1):
        raise UserError("--cuda-graphs: one process on one GPU, which CUDA_VISIBLE_DEVICES names; see --shard any")
    if processes.world_size() > 1:
        device = distributed.own_device(on_gpu)
        fastest = distributed.join(device, amp, fastest_arithmetic(device))
    else:
        device = torch.device("cuda" if on_gpu else "cpu")
        fastest = fastest_arithmetic(device)
    amp = fastest if amp == "auto" else amp
    if on_gpu and compile and processes.world_size() == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"--compile on {torch.cuda.device_count()} GPUs needs one process a GPU: start the program with torchrun "
            f"--nproc_per_node={torch.cuda.device_count()}, or let CUDA_VISIBLE_DEVICES name one GPU"
        )
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # 32 bit means 32 bit; mixed precision does not need it
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        where = f"{len(names)} GPU{'s' * (len(names) > 1)}: {', '.join(names)}"
    else:
        where = f"the CPU ({'no GPU found' if cuda else '--no-cuda'})"
    how = ["32 bit" if amp == "off" else amp]
    how += ["compiled"] * compile + ["CUDA graphs"] * graphs
    if processes.world_size() > 1:
        how.append(f"{processes.world_size()} processes")
    narrate(f"Running on {where}, {', '.join(how)}")
    if on_gpu and processes.world_size() == 1 and torch.cuda.device_count() > 1:
        narrate(
            "Each batch is split over these GPUs; one process a GPU is faster: torchrun, or a sweep with --shard any"
        )
    if compile and not on_gpu:
        narrate("--compile on a CPU: most networks train slower so (docs/devices.md)")
    if amp != "off" and not on_gpu and not (amp == "bf16" and _cpu_has(BF16_HARDWARE)):
        say(f"This CPU has no {amp}: emulating it is many times slower than --amp auto, which takes 32 bit here")
    return Machine(device, amp, compile, graphs)


def fastest_arithmetic(device: torch.device) -> str:
    """What `--amp auto` means on `device`: on GPUs bf16, or fp16 on older ones; on CPUs bf16 with AMX, else off.

    With AVX-512 BF16 alone it depends on the CPU: training in bf16 was 12 to 18% slower on one, a third faster on
    another (benchmarks/README.md). `--amp bf16` is for the latter.
    """
    if device.type == "cuda":
        used = range(torch.cuda.device_count()) if device.index is None else [device.index]
        return "bf16" if torch.version.hip or all(torch.cuda.get_device_capability(i)[0] >= 8 for i in used) else "fp16"
    return "bf16" if _cpu_has(BF16_IS_FASTER) else "off"


def _cpu_has(capabilities: tuple[str, ...]) -> bool:
    """Whether the CPU has one of these, by torch's names."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in capabilities)
