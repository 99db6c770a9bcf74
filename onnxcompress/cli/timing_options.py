"""Create the options of the latency's measurement from the fields of `TimingOptions`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from typing import Any

import click

from onnxcompress.cli.options import option_type, split
from onnxcompress.cli.sections import ADVANCED, SectionedOption
from onnxcompress.option_fields import flag
from onnxcompress.runtime.timing_options import TimingOptions

TIMING_HELP = "Latency"
VARIABLE = "ONNXCOMPRESS_LATENCY"
"""Environment variable that switches the measurement off, with the value `off`."""


def timing_options(*, without: Collection[str] = ()) -> list[click.Option]:
    """Create the options --latency, --provider, --latency-batch, --provider-options and --threads.

    Args:
        without: Fields for which the command has options of its own.

    Returns:
        The options.
    """
    hints = typing.get_type_hints(TimingOptions)
    fields = [f for f in dataclasses.fields(TimingOptions) if f.name not in without]
    return [_option(f, hints[f.name]) for f in fields]


def timing_of(
    options: dict[str, Any], base: TimingOptions | None = None, *, without: Collection[str] = ()
) -> TimingOptions:
    """Read how a command measures latency.

    Args:
        options: The arguments; what `timing_options` created is removed.
        base: What a recipe says, which the command line overrides.
        without: As for `timing_options`.

    Returns:
        How to measure.
    """
    names = [f.name for f in dataclasses.fields(TimingOptions) if f.name not in without]
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    return dataclasses.replace(base or TimingOptions(), **given)


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    names = [flag(field.name), field.name]
    how: dict[str, Any]
    if hint is bool:
        names[0] += f"/{flag('no_' + field.name)}"
        how = {"is_flag": True, "envvar": VARIABLE}
    elif typing.get_origin(hint) is tuple:
        how = {"callback": lambda context, parameter, value: None if value is None else split(value)}
    else:
        how = {"type": option_type(hint)}
    text = field.metadata["help"]
    if hint in (int, str):
        text += f"  [default: {field.default}]"
    option = SectionedOption(names, default=None, metavar=field.metadata["metavar"], help=text, **how)
    option.section = ADVANCED if field.metadata["advanced"] else TIMING_HELP
    return option
