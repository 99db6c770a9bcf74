"""Create the options of gates and of the guard from the fields of `Gates` and `Guard`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import click

from onnxcompress.cli.options import option_type
from onnxcompress.cli.sections import ADVANCED, SectionedOption
from onnxcompress.evaluation.gates import LIMITS, Gates
from onnxcompress.evaluation.guard import Guard
from onnxcompress.option_fields import flag

GATES_HELP = "Gates (exit code 3 where the result is not worth it)"
GUARD_HELP = "Guard (exit code 1, nothing written, where the outputs change too much)"


JUDGED = ("images", "preprocess")
"""Fields of Gates that are options of their own, --gate-images and --gate-preprocess."""

MEASURED = {
    "provider": "provider",
    "provider_options": "provider_options",
    "threads": "threads",
    "batch": "latency_batch",
    "input_shape": "input_shape",
}
"""Field of Gates -> the command's option whose value it takes: gates measure as the command does."""


def gate_options(judged: Sequence[str] = JUDGED) -> list[click.Option]:
    """Create an option for each limit, and those of the images to judge by.

    Args:
        judged: Which fields of `JUDGED` to include.

    Returns:
        The options.
    """
    hints = typing.get_type_hints(Gates)
    fields = [f for f in dataclasses.fields(Gates) if f.name in (*LIMITS, *judged)]
    return [_option(f, hints[f.name]) for f in fields]


def take_gates(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of gates out of a command's arguments.

    Args:
        options: The arguments; what `gate_options` created is removed.

    Returns:
        The options that were given, by field of `Gates`.
    """
    names = {field: _name(field) for field in (*LIMITS, *JUDGED)}
    given = {field: options.pop(name) for field, name in names.items() if name in options}
    return {field: value for field, value in given.items() if value is not None}


def gates_of(options: dict[str, Any], base: Gates | None = None) -> Gates:
    """Build the gates of a command, which measure with its own provider, batch, threads and shapes.

    Args:
        options: The arguments; what `gate_options` created is removed.
        base: Gates of a recipe, which the command line overrides.

    Returns:
        The gates.

    Raises:
        OptionError: A limit is out of range, or lacks the images that it needs.
    """
    own = {field: options[name] for field, name in MEASURED.items() if options.get(name) is not None}
    gates = dataclasses.replace(base or Gates(), **own, **take_gates(options))
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
    names = [flag(field.name), field.name]
    names[0] += f"/{flag('no_' + field.name)}" if field.default is True else ""
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
    option = SectionedOption(
        [flag(name), name],
        type=option_type(hint),
        metavar=field.metadata["metavar"],
        help=field.metadata["help"],
    )
    option.section = ADVANCED if field.metadata["advanced"] else GATES_HELP
    return option
