"""When a step is run, recorded and replayed; that a replay trains as the step does is in test_on_a_gpu.py."""

import contextlib

import pytest
import torch

from engine import cuda_graph
from engine.program.errors import UserError


class NoStream:
    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """CUDA's part played by the CPU: what is recorded is done again by each replay."""
    recorded = []

    class Graph:
        def replay(self):
            recorded[-1]()

    @contextlib.contextmanager
    def record(graph, **options):
        recorded.append(lambda: None)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return recorded


def test_a_step_is_run_three_times_and_recorded_once(gpu):
    seen = []

    def step(images, labels):
        if gpu:  # it is being recorded
            gpu[-1] = lambda: seen.append((images.item(), labels.item()))
        else:
            seen.append((images.item(), labels.item()))

    replayed = cuda_graph.Replayed(step)
    for i in range(6):
        replayed(torch.tensor(float(i)), torch.tensor(-i))
    assert seen == [(i, -i) for i in range(6)] and len(gpu) == 1


def test_a_step_that_cannot_be_recorded_is_the_users_to_mend(gpu):
    def step(images):
        if gpu:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    replayed = cuda_graph.Replayed(step)
    with pytest.raises(UserError, match=r"--cuda-graphs: .*\(operation not permitted .* capturing\); leave it out"):
        for _ in range(4):
            replayed(torch.zeros(1))
