"""The flags that say which network is meant. Imports no torch."""

import argparse

from engine.program.arguments import Parser, nonnegative_float, positive_float
from engine.program.errors import UserError
from model import ROWS
from model.registry import MAX_MULTIPLIER, Spec


def _known_model(text: str) -> str:
    if text not in ROWS:
        raise argparse.ArgumentTypeError(f"unknown model {text!r} (choose from {', '.join(ROWS)})")
    return text


def _own_or_known_model(text: str) -> str:
    return text if ":" in text else _known_model(text)


def add_model_arguments(
    parser: Parser, checkpoint: str, default: str, description: str, own: bool = False, pretrained: bool = False
) -> argparse._ArgumentGroup:
    """Add the checkpoint's argument, and `--model`, `--dw-multps`, `--phi`, which it makes superfluous.

    `default` is the checkpoint of 2019; with `own`, the caller takes it where no builder is given. With `own`,
    `--model` also takes the user's own builder, `module:function`, which needs no checkpoint. With
    `pretrained`, the flag of that name stands in for the checkpoint.
    """
    group = parser.add_argument_group("network")
    if pretrained:
        source = group.add_mutually_exclusive_group()
        source.add_argument(checkpoint, default=default, metavar="NAME", help=description)
        source.add_argument("--pretrained", action="store_true", help="--model's published ImageNet weights instead")
    else:
        group.add_argument(checkpoint, metavar="NAME", help=f"{description} (default: {default}, or a builder's own)")
    group.add_argument(
        "--model",
        type=_own_or_known_model if own else _known_model,
        metavar="NAME",
        help=f"one of {', '.join(ROWS)}{', or your own module:function or file.py:function' if own else ''}; "
        "the checkpoint knows, and a contradiction is an error",
    )
    group.add_argument(
        "--dw-multps", type=positive_float, nargs=2, metavar=("D", "W"), help="depth and width multipliers, likewise"
    )
    group.add_argument("--phi", type=nonnegative_float, help="their exponent: MicroNet(d^phi, w^phi), likewise")
    return group


def wanted_spec(model: str | None, dw_multps: list[float] | None, phi: float | None) -> Spec:
    """The part of a spec that `--model`, `--dw-multps` and `--phi` ask for; flags left out ask for nothing."""
    name = {"name": model} if model else {}
    if not dw_multps and phi is None:
        return name
    d, w = dw_multps or (1.4, 1.2)
    return name | scaled(d, w, 3.5 if phi is None else phi)


def scaled(d: float, w: float, phi: float) -> dict[str, float]:
    """The part of a spec that says MicroNet(d^phi, w^phi); UserError where nobody can mean such a network."""
    spec = {}
    for part, multiplier in (("depth", d), ("width", w)):
        try:
            spec[part] = multiplier**phi
        except OverflowError:
            spec[part] = float("inf")
        if not 0 < spec[part] <= MAX_MULTIPLIER:
            raise UserError(
                f"a {part} multiplier of {multiplier:g}^{phi:g} = {spec[part]:.3g} makes no usable network: "
                f"take multipliers and phi for more than 0 and at most {MAX_MULTIPLIER:g}, such as 1.4^3.5"
            )
    return spec
