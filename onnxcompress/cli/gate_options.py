"""The options of gates and of the guard, made from their declarations, and help in sections."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click

from onnxcompress.cli.options import ADVANCED, SectionedOption, option_type, split
from onnxcompress.evaluation.gates import LIMITS, Gates
from onnxcompress.evaluation.guard import Guard

Command = TypeVar("Command", bound=Callable[..., Any])

GATES_HELP = "Gates (exit code 3 where the result is not worth it)"
GUARD_HELP = "Guard (exit code 1, nothing written, where outputs are too far from what they were)"


def gate_options(*, measuring: bool = True) -> list[click.Option]:
    """One option for each limit, and with `measuring` those that say how to measure (`--gate-…`)."""
    hints = typing.get_type_hints(Gates)
    fields = [f for f in dataclasses.fields(Gates) if measuring or f.name in LIMITS]
    return [_option(f, hints[f.name]) for f in fields]


def gated(command: Command) -> Command:
    """Decorator: the limits alone, for a command that says itself how to measure."""
    for one in reversed(gate_options(measuring=False)):
        command.__click_params__ = [*getattr(command, "__click_params__", []), one]  # type: ignore[attr-defined]
    return command


def take_gates(options: dict[str, Any]) -> dict[str, Any]:
    """Remove what `gate_options` made from a command's arguments; those that were given, by field."""
    names = {f.name: _name(f.name) for f in dataclasses.fields(Gates)}
    found = {field: options.pop(name) for field, name in names.items() if name in options}
    return {field: value for field, value in found.items() if value is not None}


def gates_of(options: dict[str, Any], base: Gates | None = None) -> Gates:
    """The gates of a command: what was given wins over `base`. Raises OptionError."""
    gates = dataclasses.replace(base or Gates(), **take_gates(options))
    gates.check()
    return gates


def guard_options() -> list[click.Option]:
    """--verify, --warn-snr, --min-snr and --force."""
    hints = typing.get_type_hints(Guard)
    return [_guard_option(f, hints[f.name]) for f in dataclasses.fields(Guard)]


def guard_of(options: dict[str, Any], base: Guard | None = None) -> Guard:
    """The guard of a command, whose options are taken out.

    Args:
        options: A command's arguments; what `guard_options` made is removed.
        base: What holds where the command line does not say: a recipe's.

    Returns:
        The guard.

    Raises:
        OptionError: Options contradict each other.
    """
    given = {f.name: options.pop(f.name) for f in dataclasses.fields(Guard)}
    found = {name: value for name, value in given.items() if value is not None}
    guard = dataclasses.replace(base or Guard(), **found)
    guard.check()
    return guard


def _guard_option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    from onnxcompress.cli.options import option_type

    flag = "--" + field.name.replace("_", "-")
    names = [f"{flag}/--no-{field.name}", field.name] if field.default is True else [flag, field.name]
    how: dict[str, Any] = {"is_flag": True} if hint is bool else {"type": option_type(hint)}
    made = SectionedOption(
        names, default=None, metavar=field.metadata["metavar"], help=field.metadata["help"], **how
    )
    made.section = GUARD_HELP
    return made


def _name(field: str) -> str:
    return field if field in LIMITS else f"gate_{field}"


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    name = _name(field.name)
    text = field.metadata["help"]
    if field.default not in (None, ()):
        text += f"  [default: {field.default}]"
    several = typing.get_origin(hint) is tuple
    made = SectionedOption(
        ["--" + name.replace("_", "-"), name],
        type=option_type(hint),
        callback=(lambda context, parameter, value: value and split(value)) if several else None,
        metavar=field.metadata["metavar"],
        help=text,
    )
    made.section = ADVANCED if field.metadata["advanced"] else GATES_HELP
    return made
