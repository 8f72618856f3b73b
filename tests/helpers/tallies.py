"""What a tally holds, in few words, and layers to count."""

from torch import nn

from rulers.tally import Line, Tally


def total(tally: Tally) -> tuple[float, float, float]:
    """Bits, multiplications and additions."""
    return tuple(sum(group.total(field) for group in tally.groups) for field in ("bits", "mults", "adds"))


def lines(tally: Tally) -> dict[str, Line]:
    return {line.name: line for group in tally.groups for line in group.lines}


def counted(line: Line) -> tuple[float, float, float]:
    return line.bits, line.mults, line.adds


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm whose statistics and parameters are all different."""
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm
