"""Several processes that train one network, as `torchrun` starts them; all of it does nothing in a single process.

Every process computes on its own device with its shard of each batch. All share one file system: the first
process (rank 0) writes and prints, the others only read.
"""

import atexit
import datetime
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.program import meeting
from engine.program.errors import UserError
from engine.program.processes import is_first, place, rank, world_size

Items = TypeVar("Items", Tensor, list[int], range)

PATIENCE = datetime.timedelta(hours=2)  # one process scores and plots while the others wait
ARITHMETIC = ("off", "fp16", "bf16")  # hardware that has one has those before it, but no CPU has fp16


def own_device(cuda: bool) -> torch.device:
    """The device of this one among several processes: the GPU with its local number, or the CPU."""
    if not cuda:
        return torch.device("cpu")
    here = place()
    local = here.local_rank if here else 0
    if local >= torch.cuda.device_count():
        raise UserError(
            f"{local + 1} or more processes on a machine with {torch.cuda.device_count()} GPU(s): "
            f"start one process a GPU with --nproc_per_node, or pass --no-cuda"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join(device: torch.device, amp: str, fastest: str) -> str:
    """Join the other processes; return the arithmetic that is fastest in each of them, of those that all have."""
    cuda = device.type == "cuda"
    gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}" if cuda else ""
    here = place()
    assert here is not None  # there are several processes
    facts = meeting.meet(here, {"gpu": gpu, "amp": amp, "fastest": fastest})
    gpus, amps = ([fact[key] for fact in facts] for key in ("gpu", "amp"))
    if any(gpus) and not all(gpus):
        raise UserError(f"process {gpus.index('')} has no GPU and others have one; pass --no-cuda to all processes")
    if any(gpus) and len(set(gpus)) < len(gpus):
        raise UserError(f"several processes share one of {len(set(gpus))} GPU(s); give each its own by LOCAL_RANK")
    if len(set(amps)) > 1:
        raise UserError(f"processes were started with --amp {' and '.join(sorted(set(amps)))}; pass the same to all")
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=meeting.store_of_group(),
            rank=rank(),
            world_size=world_size(),
            timeout=PATIENCE,
        )
        atexit.register(dist.destroy_process_group)
    return min((fact["fastest"] for fact in facts), key=ARITHMETIC.index)


def barrier() -> None:
    """Wait until every process is here: what the first one wrote before is then there for all."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process does what is in here before the others: what it downloads or caches is there for them.

    Where it fails, it alone says why, and the others end while they wait.
    """
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def all_reduce(tensor: Tensor) -> Tensor:
    """`tensor` summed over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def shard(items: Items) -> Items:
    """This process's part of a sequence or tensor: every `world_size()`-th item, so that each is in one part."""
    return items[rank() :: world_size()]


@torch.no_grad()
def average_buffers(network: nn.Module) -> None:
    """Average what BatchNorm has seen, so that all processes hold the same network."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(all_reduce(buffer) / world_size())
