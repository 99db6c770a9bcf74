"""One command for each pass, made from the pass's declaration.

--json prints one object:

    pass, options       as they stand in the provenance
    changes             [{node, what}]
    refusals            [{node, rule, remedy}]
    measured            figures of the pass, by name; `difference` of the outputs where they were compared
    gates               [{gate, limit, measured, passed, text, preprocess}], one for each limit given
    provenance          all passes so far, oldest first
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import types
import typing
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.gating import SectionedCommand, gate_options, gates_of
from onnxcompress.cli.options import FILE
from onnxcompress.cli.reporting import report_option
from onnxcompress.errors import ModelError
from onnxcompress.passes import load_pass
from onnxcompress.passing import is_required

if typing.TYPE_CHECKING:
    from onnxcompress.model import Model

STREAMS_HELP = (
    "IN and OUT may be -, the standard streams. A result that misses a gate is written all the same."
)


def command(name: str) -> click.Command:
    """The click command of a pass: IN, OUT, one option for each field, the gates."""
    cls = load_pass(name)
    hints = typing.get_type_hints(cls)
    params: list[click.Parameter] = [
        click.Argument(["source"], metavar="IN", type=FILE),
        click.Argument(["target"], metavar="OUT", type=FILE),
        *(_option(f, hints[f.name]) for f in dataclasses.fields(cls)),
        *running_options(),
        *gate_options(),
    ]
    if cls.preserves_function:
        params.append(
            click.Option(
                ["--verify/--no-verify"],
                default=True,
                show_default=True,
                help="Compare the outputs in onnxruntime on random input.",
            )
        )

    def callback(source: str, target: str, **options: Any) -> None:
        from onnxcompress.cli.execute import Job, execute, pass_account
        from onnxcompress.pipeline import Pipeline

        gates = gates_of(options)
        how = {key: options.pop(key) for key in ("as_json", "quiet", "verbose", "dry_run", "report")}
        verify = bool(options.pop("verify", False))
        chain = Pipeline([cls(**options)])
        execute(Job(source, target, chain, gates, account=pass_account, verify=verify, **how))

    text = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{STREAMS_HELP}"
    return SectionedCommand(name, callback=callback, params=params, help=text)


def running_options() -> list[click.Option]:
    """--dry-run, --json, --quiet, --verbose and --report."""
    return [
        click.Option(["--dry-run"], is_flag=True, help="Check all, say what would be done, and end."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object, nothing else."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print nothing but errors."),
        click.Option(["--verbose", "-v"], is_flag=True, help="List each change, and all left alone."),
        report_option(),
    ]


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    names = ["--" + field.name.replace("_", "-"), field.name]
    default = None if field.default is dataclasses.MISSING else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    common: dict[str, Any] = {
        "help": field.metadata.get("help", ""),
        **({"required": True} if is_required(field) else {"default": default}),
        "show_default": isinstance(default, int | float | str) and default is not False,
    }
    if field.metadata.get("metavar"):
        common["metavar"] = field.metadata["metavar"]
    inner, optional = _inner(hint)
    if inner is bool and not optional:
        off = "--no-" + field.name.replace("_", "-")
        flag = [f"{names[0]}/{off}", field.name] if default else names
        return click.Option(flag, is_flag=True, **common)
    if typing.get_origin(inner) is tuple:
        if default is not None:
            common["default"] = ",".join(default)
        return click.Option(names, type=str, callback=lambda c, p, value: split(value or ""), **common)
    return click.Option(names, type=FILE if field.metadata.get("file") else option_type(hint), **common)


def option_type(hint: Any) -> click.ParamType[Any] | type:
    """What click reads a value of this annotation with."""
    inner, _ = _inner(hint)
    if typing.get_origin(inner) is typing.Literal:
        return click.Choice(typing.get_args(inner))
    return {int: int, float: float}.get(inner, str)


def _inner(hint: Any) -> tuple[Any, bool]:
    """The type inside `X | None`, and whether it was optional."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [a for a in typing.get_args(hint) if a is not type(None)]
        return parts[0], True
    return hint, False


def split(value: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def check_target(source: Path, target: Path) -> None:
    """Refuse at once what would fail after the work. Raises ModelError."""
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise ModelError(f"{target}: the output would replace the input; name another file")
    if target.exists() and not target.is_file() and not target.is_dir():
        raise ModelError(f"{target}: no regular file; for standard output write -")
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ModelError(f"{target}: cannot be written; name a file in an existing, writable folder")


def check_external(model: Model, target: Path) -> None:
    """Refuse to write over the file that holds the input's weights. Raises ModelError."""
    for file in (target, target.with_name(target.name + ".data")):
        if any(file.exists() and os.path.samefile(file, one) for one in model.external_files):
            raise ModelError(f"{file}: it holds the input's weights; name another file or folder")
