"""Where a network runs: devices, memory layout, several GPUs, mixed precision, compilation."""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import UserError, distributed
from engine.report import say

BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of CPUs that multiply bfloat16 in hardware
LOSS_SCALE = 2.0**12  # of float16's gradients at the start of an epoch


@dataclass(frozen=True)
class Machine:
    """The device and the arithmetic of a run: `amp` is "off", "bf16" or "fp16"."""

    device: torch.device
    amp: str = "off"
    compile: bool = False

    def place(self, network: nn.Module) -> nn.Module:
        """Move `network` to the device, in channels-last layout where mixed precision gains by it."""
        if self.amp == "off":
            return network.to(self.device)
        return network.to(self.device, memory_format=torch.channels_last)

    def runner(self, network: nn.Module) -> nn.Module:
        """The module to call for training: `network` itself, or split over processes or GPUs; compiled if wanted.

        Over several processes, backward leaves the gradients' average in each of them.
        """
        if distributed.world_size() > 1:
            network = DistributedDataParallel(network)
        elif self.device.type == "cuda" and torch.cuda.device_count() > 1:
            network = nn.DataParallel(network)
        return torch.compile(network) if self.compile else network

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which forward passes run."""
        if self.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.amp == "bf16" else torch.float16)

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """What keeps float16's gradients in range; does nothing in other arithmetic.

        Each epoch takes a new one, so that a resumed run needs no scale from the epoch before.
        """
        return torch.amp.GradScaler(self.device.type, init_scale=LOSS_SCALE, enabled=self.amp == "fp16")


def choose_machine(cuda: bool, amp: str = "off", compile: bool = False) -> Machine:
    """Take the GPUs if wanted and there, else the CPU, and say which; `amp` as `--amp`."""
    on_gpu = cuda and torch.cuda.is_available()
    if distributed.world_size() > 1:
        device = distributed.join(on_gpu)
    else:
        device = torch.device("cuda" if on_gpu else "cpu")
    amp = fastest_arithmetic(device) if amp == "auto" else amp
    if on_gpu and compile and distributed.world_size() == 1 < torch.cuda.device_count():
        raise UserError(
            f"--compile on {torch.cuda.device_count()} GPUs needs one process a GPU: start the program with torchrun "
            f"--nproc_per_node={torch.cuda.device_count()}, or let CUDA_VISIBLE_DEVICES name one GPU"
        )
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        where = f"{len(names)} GPU{'s' * (len(names) > 1)}: {', '.join(names)}"
    else:
        where = f"the CPU ({'no GPU found' if cuda else '--no-cuda'})"
    processes = f", {distributed.world_size()} processes" * (distributed.world_size() > 1)
    say(f"Running on {where}, {'32 bit' if amp == 'off' else amp}{', compiled' * compile}{processes}")
    return Machine(device, amp, compile)


def fastest_arithmetic(device: torch.device) -> str:
    """What `--amp auto` means on `device`: bf16 where the hardware has it, fp16 on older GPUs, else off."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(capabilities.get(name) for name in BF16_CAPABILITIES) else "off"
