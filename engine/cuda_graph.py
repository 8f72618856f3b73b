"""A training step as one CUDA graph: recorded once, then replayed with a single launch."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.program.errors import UserError

STEPS_BEFORE = 3  # what a graph may not do is done in these: cuDNN's choice of kernels, an optimizer's first moments


class Replayed:
    """`step`, a function of the tensors of a batch; the first calls run it, one records it, all others replay that.

    A replay costs the launch of one graph, where a small network's step is a thousand launches that take longer than
    what they launch. `step` must find everything but its arguments at the same place in every call, read nothing back,
    and draw from the device's own generator. Numbers of the host, such as a learning rate, stay as they were when it
    was recorded. All calls have the shapes of the first. (docs.pytorch.org, "CUDA Graphs") UserError where a step does
    what can't be recorded, as a network does that looks at its own values.
    """

    def __init__(self, step: Callable[..., object]):
        self.step, self.stream = step, torch.cuda.Stream()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        self.calls += 1
        if self.calls <= STEPS_BEFORE:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            self.inputs, self.graph = tuple(tensor.clone() for tensor in inputs), torch.cuda.CUDAGraph()
            self._record(self.graph)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()

    def _record(self, graph: torch.cuda.CUDAGraph) -> None:
        """Note what the step launches, without running it; other threads, as one that pins memory, go on."""
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"--cuda-graphs: this training step can't be recorded ({reason}); leave it out") from error
