"""Create the options of gates and of the guard from the fields of `Gates` and `Guard`."""

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
GUARD_HELP = "Guard (exit code 1, nothing written, where the outputs change too much)"


def gate_options(*, measuring: bool = True) -> list[click.Option]:
    """Create an option for each limit, and the options of the measurement.

    Args:
        measuring: Whether to include the options of the measurement (`--gate-…`).

    Returns:
        The options.
    """
    hints = typing.get_type_hints(Gates)
    fields = [f for f in dataclasses.fields(Gates) if measuring or f.name in LIMITS]
    return [_option(f, hints[f.name]) for f in fields]


def gated(command: Command) -> Command:
    """Add the options of the limits alone to a command that has its own options for the measurement.

    Args:
        command: The command to decorate.

    Returns:
        The command.
    """
    for option in reversed(gate_options(measuring=False)):
        command.__click_params__ = [*getattr(command, "__click_params__", []), option]  # type: ignore[attr-defined]
    return command


def take_gates(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of gates out of a command's arguments.

    Args:
        options: The arguments; what `gate_options` created is removed.

    Returns:
        The options that were given, by field of `Gates`.
    """
    names = {f.name: _name(f.name) for f in dataclasses.fields(Gates)}
    given = {field: options.pop(name) for field, name in names.items() if name in options}
    return {field: value for field, value in given.items() if value is not None}


def gates_of(options: dict[str, Any], base: Gates | None = None) -> Gates:
    """Build the gates of a command.

    Args:
        options: The arguments; what `gate_options` created is removed.
        base: Gates of a recipe, which the command line overrides.

    Returns:
        The gates.

    Raises:
        OptionError: A limit is out of range, or lacks the images that it needs.
    """
    gates = dataclasses.replace(base or Gates(), **take_gates(options))
    gates.check()
    return gates


def guard_options() -> list[click.Option]:
    """Create the options --verify, --warn-snr, --min-snr and --force.

    Returns:
        The options.
    """
    hints = typing.get_type_hints(Guard)
    return [_guard_option(f, hints[f.name]) for f in dataclasses.fields(Guard)]


def guard_of(options: dict[str, Any], base: Guard | None = None) -> Guard:
    """Build the guard of a command.

    Args:
        options: The arguments; what `guard_options` created is removed.
        base: Guard of a recipe, which the command line overrides.

    Returns:
        The guard.

    Raises:
        OptionError: Options contradict each other.
    """
    given = {f.name: options.pop(f.name) for f in dataclasses.fields(Guard)}
    explicit = {name: value for name, value in given.items() if value is not None}
    guard = dataclasses.replace(base or Guard(), **explicit)
    guard.check()
    return guard


def _guard_option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    from onnxcompress.cli.options import option_type

    flag = "--" + field.name.replace("_", "-")
    names = [f"{flag}/--no-{field.name}", field.name] if field.default is True else [flag, field.name]
    kind: dict[str, Any] = {"is_flag": True} if hint is bool else {"type": option_type(hint)}
    option = SectionedOption(
        names, default=None, metavar=field.metadata["metavar"], help=field.metadata["help"], **kind
    )
    option.section = GUARD_HELP
    return option


def _name(field: str) -> str:
    return field if field in LIMITS else f"gate_{field}"


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    name = _name(field.name)
    text = field.metadata["help"]
    if field.default not in (None, ()):
        text += f"  [default: {field.default}]"
    several = typing.get_origin(hint) is tuple
    option = SectionedOption(
        ["--" + name.replace("_", "-"), name],
        type=option_type(hint),
        callback=(lambda context, parameter, value: value and split(value)) if several else None,
        metavar=field.metadata["metavar"],
        help=text,
    )
    option.section = ADVANCED if field.metadata["advanced"] else GATES_HELP
    return option
