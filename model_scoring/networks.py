"""Which network is scored: of a checkpoint, of a packed file, or what the user's own builder builds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.program.errors import UserError, is_out_of_memory
from engine.store.checkpoint import Checkpoint, as_built, naming, own_spec, read_network, tensors_of_own
from engine.store.formats import is_packed
from model import Spec
from model.identify import check_wanted
from model.own import is_own, reason
from model_scoring.packing import read_packed
from rulers.graph import initialized, trace


@dataclass(frozen=True)
class Wanted:
    """Which network is asked for.

    Attributes:
        spec: possibly partial; see `engine.program.network_flags`.
        shapes: of the inputs, as `rulers.count` takes them; None for images.
    """

    spec: Spec
    shapes: list[Any] | None = None

    @property
    def builder(self) -> str | None:
        """The user's own builder, `module:function` or `file.py:function`."""
        name = self.spec.get("name", "")
        return name if is_own(name) else None


@contextmanager
def running(wanted: Wanted, image_size: int) -> Iterator[None]:
    """What a user's own network makes of an input that it does not fit is an error of the user's."""
    try:
        yield
    except Exception as error:
        if not (wanted.builder or wanted.shapes) or is_out_of_memory(error):
            raise
        inputs = said(wanted.shapes) if wanted.shapes else f"an image of {image_size} px"
        raise UserError(
            f"--model {wanted.spec.get('name', '')} does not run on {inputs} ({reason(error)}); "
            "pass --image-size or --input-shape"
        ) from None


def said(shapes: list[Any]) -> str:
    """Shapes of inputs as `--input-shape` has them."""
    sides = (shape.shape[1:] if isinstance(shape, Tensor) else shape for shape in shapes)
    return ", ".join("x".join(map(str, shape)) for shape in sides)


def examples(shapes: list[tuple[tuple[int, ...], str | None]]) -> list[Any] | None:
    """What `--input-shape` asks for, as `rulers.count` takes it; None if nothing."""
    return [torch.zeros(1, *shape, dtype=getattr(torch, dtype)) if dtype else shape for shape, dtype in shapes] or None


def load(path: Path | None, wanted: Wanted, image_size: int | None) -> tuple[Checkpoint, nn.Module]:
    """Read the network that `path` holds, in evaluation mode; without a path, the user's own as it is built.

    `image_size` is that at which a network of the user's own is asked how many classes it has, pixels; the file's, or
    32, if None.
    """
    if path is None:
        checkpoint = as_built(wanted.spec)
    elif is_packed(path):
        checkpoint = read_packed(path)
        if spec := own_spec(checkpoint.spec, wanted.spec, path):
            checkpoint.spec, checkpoint.state_dict = spec, tensors_of_own(spec, checkpoint.state_dict, path)
        else:
            with naming(path):
                check_wanted(wanted.spec, checkpoint.spec, checkpoint.state_dict)
    else:
        checkpoint = read_network(path, wanted.spec)
    network = checkpoint.network().eval()
    if is_own(checkpoint.spec["name"]):
        wanted = replace(wanted, spec=checkpoint.spec)  # what it does not run on is an error of the user's
        size = image_size or checkpoint.image_size or 32
        with running(wanted, size):
            network = initialized(network, wanted.shapes or size)
        checkpoint.spec = {**checkpoint.spec, "num_classes": number_of_outputs(network, wanted, size)}
        checkpoint.state_dict = network.state_dict()
    return checkpoint, network


def number_of_outputs(network: nn.Module, wanted: Wanted, image_size: int) -> int:
    """How many logits a user's own network gives: the last dimension of its first output; 1 without any."""
    with running(wanted, image_size):
        outputs = trace(network, wanted.shapes or image_size)[-1].inputs
    return outputs[0].shape[-1] if outputs and outputs[0].shape else 1
