"""The flags that say which network is meant. Imports no torch."""

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from engine.program.arguments import Parser, nonnegative_float, positive_float
from engine.program.errors import UserError
from model import ROWS
from model.own import is_own
from model.registry import MAX_MULTIPLIER


def _model(text: str) -> str:
    if text not in ROWS and not is_own(text):
        raise argparse.ArgumentTypeError(
            f"unknown model {text!r} (choose from {', '.join(ROWS)}, or pass module:function)"
        )
    return text


def _keyword(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as num_classes=10")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_network_arguments(parser: Parser, known: str, scaled: bool = True) -> argparse._ArgumentGroup:
    """Add `--model` and `--model-args`, and `--dw-multps` and `--phi` if MicroNet can be `scaled`.

    `known` says what makes them superfluous.
    """
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        type=_model,
        metavar="NAME",
        help=f"one of {', '.join(ROWS)}, or your own module:function or file.py:function; {known}",
    )
    group.add_argument(
        "--model-args",
        nargs="+",
        type=_keyword,
        default=[],
        metavar="KEY=VALUE",
        help="arguments of your own builder, such as num_classes=10",
    )
    if scaled:
        group.add_argument(
            "--dw-multps",
            type=positive_float,
            nargs=2,
            metavar=("D", "W"),
            help="depth and width multipliers, likewise",
        )
        group.add_argument("--phi", type=nonnegative_float, help="their exponent: MicroNet(d^phi, w^phi), likewise")
    return group


def add_model_arguments(
    parser: Parser, checkpoint: str, default: str, description: str, pretrained: bool = False
) -> argparse._ArgumentGroup:
    """Add the checkpoint's argument, None unless given, and the network's, which it makes superfluous.

    `default` is the checkpoint of 2019, which the caller takes where no builder is given. With `pretrained`, the flag
    of that name stands in for the checkpoint.
    """
    group = add_network_arguments(parser, "the checkpoint knows, and a contradiction is an error")
    source = group.add_mutually_exclusive_group() if pretrained else group
    source.add_argument(checkpoint, metavar="NAME", help=f"{description} (default: {default}, or your builder's own)")
    if pretrained:
        source.add_argument("--pretrained", action="store_true", help="--model's published ImageNet weights instead")
    return group


def wanted_spec(
    model: str | None,
    dw_multps: Sequence[float] | None = None,
    phi: float | None = None,
    arguments: Sequence[tuple[str, object]] = (),
) -> dict[str, Any]:
    """The part of a spec that the flags of these names ask for, `--model-args` last; those left out ask for nothing."""
    spec: dict[str, Any] = {"name": model} if model else {}
    if arguments:
        if not is_own(model or ""):
            raise UserError("--model-args are for a builder of your own; pass --model module:function")
        spec["arguments"] = dict(arguments)
    if not dw_multps and phi is None:
        return spec
    d, w = dw_multps or (1.4, 1.2)
    return spec | scaled(d, w, 3.5 if phi is None else phi)


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
