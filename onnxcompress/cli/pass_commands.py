"""Create a command for each pass from the fields of its class.

--json prints one object:

    pass, options       as they stand in the provenance
    changes             [{node, what}]
    refusals            [{node, rule, remedy}]
    measured            figures of the pass, by name; `difference` of the outputs, if the pass keeps them
    cached              whether the result is that of an earlier run
    guard               how much the outputs changed (`onnxcompress guide json`), or null
    gates               [{gate, limit, measured, passed, text, preprocess}], one for each limit given
    provenance          all passes so far, oldest first
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import click

from onnxcompress.cli.cache import cache_options, chosen_cache
from onnxcompress.cli.gate_options import gate_options, gates_of, guard_of, guard_options
from onnxcompress.cli.options import FILE, inner_type, option_type, split
from onnxcompress.cli.report_option import report_option
from onnxcompress.cli.sections import ADVANCED, SectionedCommand, SectionedOption
from onnxcompress.cli.timing_options import TIMING_HELP, timing_of, timing_options
from onnxcompress.errors import OptionError
from onnxcompress.option_fields import INPUT_SHAPE_HELP, INPUT_SHAPE_METAVAR, flag, is_required
from onnxcompress.passes import load_pass
from onnxcompress.runtime.timing_options import TimingOptions

if typing.TYPE_CHECKING:
    from onnxcompress.passes.base import Pass

STREAMS_HELP = (
    "IN and OUT may be -, the standard streams. A result that misses a gate is written all the same."
)


def command(name: str) -> click.Command:
    """Create the click command of a pass: IN, OUT, one option for each field, the guard and the gates.

    Args:
        name: Name of the pass.

    Returns:
        The command.
    """
    cls = load_pass(name)
    hints = typing.get_type_hints(cls)
    fields = sorted(dataclasses.fields(cls), key=lambda f: not f.metadata.get("target"))
    own = {f.name for f in fields}
    clocked = {f.name for f in dataclasses.fields(TimingOptions)} if cls.timed else set()
    params: list[click.Parameter] = [
        click.Argument(["source"], metavar="IN", type=FILE),
        click.Argument(["target"], metavar="OUT", type=FILE),
        *(_option(f, hints[f.name], TIMING_HELP if f.name in clocked else "") for f in fields),
        *(cache_options() if _learns(cls) else []),
        *running_options(),
        *timing_options(without=_own_timing(cls)),
        *guard_options(),
        *gate_options(),
    ]
    if cls.preserves_function and "input_shape" not in own:
        option = click.Option(["--input-shape"], metavar=INPUT_SHAPE_METAVAR, help=INPUT_SHAPE_HELP)
        params.append(option)

    def callback(source: str, target: str, **options: Any) -> None:
        from onnxcompress.cli.execute import execute
        from onnxcompress.cli.job import Job, pass_account
        from onnxcompress.pipeline import Pipeline

        gates, guard = gates_of(options), guard_of(options)
        shape = gates.input_shape if "input_shape" in own else options.pop("input_shape", None)
        shared = {key: options.pop(key) for key in ("as_json", "quiet", "verbose", "dry_run", "report")}
        timing = timing_of(options, without=_own_timing(cls))
        kept = None
        if _learns(cls):
            kept = chosen_cache(options.pop("cache"), options.pop("no_cache"))
        chain = Pipeline([cls(**options)])
        timed = timing if cls.timed else None
        job = Job(source, target, chain, gates, pass_account, guard, kept, shape, timing=timed, **shared)
        execute(job)

    text = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{STREAMS_HELP}"
    return SectionedCommand(name, callback=callback, params=params, help=text)


def _parts(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Split a list; one without any part is an error, for it would be taken as if it had not been given."""
    parts = split(value or "")
    if value is not None and not parts:
        raise OptionError(f"{parameter.opts[0]} {value!r}: it is empty; leave the option out")
    return parts


def _own_timing(cls: type[Pass]) -> set[str]:
    """Return the options of timing that a command lacks: those that the pass has itself; --latency."""
    return {f.name for f in dataclasses.fields(cls)} | (set() if cls.timed else {"latency"})


def _learns(cls: type[Pass]) -> bool:
    """Return whether the pass optimizes something, or its inputs; that takes so long that it is kept."""
    return "torch" in cls.needs or "inputs" in {f.name for f in dataclasses.fields(cls)}


def running_options() -> list[click.Option]:
    """Create the options --dry-run, --json, --quiet, --verbose and --report.

    Returns:
        The options.
    """
    return [
        click.Option(
            ["--dry-run"], is_flag=True, help="Check everything, show what would be done, and stop."
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object, nothing else."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print nothing but errors and notes."),
        click.Option(
            ["--verbose", "-v"], is_flag=True, help="List each change, and all that was left unchanged."
        ),
        report_option(),
    ]


def _option(field: dataclasses.Field[Any], hint: Any, section: str) -> click.Option:
    """Create the option of a pass's field, in its section of the help."""
    default = None if field.default is dataclasses.MISSING else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    settings: dict[str, Any] = {
        "help": field.metadata.get("help", ""),
        **({"required": True} if is_required(field) else {"default": default}),
        "show_default": isinstance(default, int | float | str) and default is not False,
    }
    if field.metadata.get("metavar"):
        settings["metavar"] = field.metadata["metavar"]
    names = [flag(field.name), field.name]
    if field.metadata.get("alias"):
        names.insert(0, field.metadata["alias"])
    inner, optional = inner_type(hint)
    if inner is bool and not optional:
        settings["is_flag"] = True
        names[0] += f"/{flag('no_' + field.name)}" if default else ""
    elif typing.get_origin(inner) is tuple:
        settings["default"] = ",".join(default or ()) or None
        settings |= {"type": str, "callback": _parts}
    else:
        settings["type"] = FILE if field.metadata.get("file") else option_type(hint)
    option = SectionedOption(names, **settings)
    option.section = ADVANCED if field.metadata.get("advanced") else section
    return option
