"""Where a network runs: devices, memory layout, several GPUs, mixed precision, compilation."""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from engine.report import say


@dataclass(frozen=True)
class Machine:
    """The device and the arithmetic of a run."""

    device: torch.device
    amp: str = "off"
    compile: bool = False

    def place(self, network: nn.Module) -> nn.Module:
        """Move `network` to the device, in channels-last layout where mixed precision gains by it."""
        if self.amp == "off":
            return network.to(self.device)
        return network.to(self.device, memory_format=torch.channels_last)

    def runner(self, network: nn.Module) -> nn.Module:
        """The module to call for training: `network` itself, compiled, or split over the visible GPUs."""
        if self.compile:
            network = torch.compile(network)
        if self.device.type == "cuda" and torch.cuda.device_count() > 1:
            return nn.DataParallel(network)
        return network

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which forward passes run."""
        if self.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def choose_machine(cuda: bool, amp: str = "off", compile: bool = False) -> Machine:
    """Take the GPUs if wanted and there, else the CPU, and say which."""
    if cuda and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        say(f"Running on {len(names)} GPU{'s' * (len(names) > 1)}: {', '.join(names)}")
        return Machine(torch.device("cuda"), amp, compile)
    say(f"Running on the CPU ({'no GPU found' if cuda else '--no-cuda'})")
    return Machine(torch.device("cpu"), amp, compile)
