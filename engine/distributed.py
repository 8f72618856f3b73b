"""Several processes that train one network, as `torchrun` starts them; all of it does nothing in a single process.

Every process computes on its own device with its shard of each batch. All share one file system: the first
process (rank 0) writes and prints, the others only read.
"""

import atexit
import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.program.errors import EXIT_WRONG_INPUT, UserError
from engine.program.processes import is_first, rank, world_size

Items = TypeVar("Items", Tensor, list[int], range)

PATIENCE = datetime.timedelta(hours=2)  # one process scores and plots while the others wait


def join(cuda: bool) -> torch.device:
    """Join the other processes; return this one's device: the GPU with its local rank, or the CPU."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"{local + 1} or more processes on a machine with {torch.cuda.device_count()} GPU(s): "
                f"start one process a GPU with --nproc_per_node, or pass --no-cuda"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def barrier() -> None:
    """Wait until every process is here: what the first one wrote before is then there for all."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process does what is in here before the others: what it downloads or caches is there for them.

    Where it fails, it alone says why, and the others end.
    """
    if is_first():
        try:
            yield
        except BaseException:
            broadcast(False)
            raise
        broadcast(True)
    elif broadcast(None):
        yield
    else:
        sys.exit(EXIT_WRONG_INPUT)


def broadcast(value: object) -> object:
    """The first process's `value`, in all processes."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


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
