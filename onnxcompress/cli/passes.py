"""One command for each pass of the catalogue, made from the pass's declaration."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import print_json
from onnxcompress.errors import CompressError, ModelError, TargetMissed
from onnxcompress.passes import load_pass

if typing.TYPE_CHECKING:
    from onnxcompress.model import Model
    from onnxcompress.passing import Pass, PassResult


def command(name: str) -> click.Command:
    """The click command of a pass: IN, OUT, one option for each field."""
    cls = load_pass(name)
    hints = typing.get_type_hints(cls)
    params: list[click.Parameter] = [
        click.Argument(["source"], metavar="IN"),
        click.Argument(["target"], metavar="OUT"),
        *(_option(f, hints[f.name]) for f in dataclasses.fields(cls)),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object, nothing else."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print nothing but errors."),
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

    def callback(source: str, target: str, as_json: bool, quiet: bool, **options: Any) -> None:
        verify = bool(options.pop("verify", False))
        _run(cls(**options), Path(source), Path(target), verify, as_json, quiet)

    return click.Command(name, callback=callback, params=params, help=cls.__doc__)


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    names = ["--" + field.name.replace("_", "-"), field.name]
    default = None if field.default is dataclasses.MISSING else field.default
    common: dict[str, Any] = {
        "help": field.metadata.get("help", ""),
        "default": default,
        "show_default": isinstance(default, int | float | str) and default is not False,
    }
    if field.metadata.get("metavar"):
        common["metavar"] = field.metadata["metavar"]
    hint, optional = _inner(hint)
    if hint is bool and not optional:
        off = "--no-" + field.name.replace("_", "-")
        flag = [f"{names[0]}/{off}", field.name] if default else names
        return click.Option(flag, is_flag=True, **common)
    if typing.get_origin(hint) is typing.Literal:
        return click.Option(names, type=click.Choice(typing.get_args(hint)), **common)
    if typing.get_origin(hint) is tuple:
        return click.Option(names, type=str, callback=_split, **common | {"default": ""})
    return click.Option(names, type={int: int, float: float}.get(hint, str), **common)


def _inner(hint: Any) -> tuple[Any, bool]:
    """The type inside `X | None`, and whether it was optional."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [a for a in typing.get_args(hint) if a is not type(None)]
        return parts[0], True
    return hint, False


def _split(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def check_target(source: Path, target: Path) -> None:
    """Refuse at once what would fail after the work. Raises ModelError."""
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise ModelError(f"{target}: the output would replace the input; name another file")
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ModelError(f"{target}: cannot be written; name a file in an existing, writable folder")


def _check_external(model: Model, target: Path) -> None:
    """Refuse to write over the file that holds the input's weights. Raises ModelError."""
    for file in (target, target.with_name(target.name + ".data")):
        if any(file.exists() and os.path.samefile(file, one) for one in model.external_files):
            raise ModelError(f"{file}: it holds the input's weights; name another file or folder")


def _run(one: Pass, source: Path, target: Path, verify: bool, as_json: bool, quiet: bool) -> None:
    from onnxcompress.model import load, save
    from onnxcompress.passing import run

    check_target(source, target)
    model = load(source)
    _check_external(model, target)
    missed: TargetMissed | None = None
    if quiet or as_json:
        (result,) = run([one], model)
    else:
        from onnxcompress.cli.console import progress

        with progress() as report:
            (result,) = run([one], model, report)
    save(model, target)
    if verify:
        result.measured["difference"] = _verify(source, target)
    if "target_missed" in result.measured:
        missed = TargetMissed(str(result.measured["target_missed"]))
    if as_json:
        print_json(_summary(one, model, result))
    elif not quiet:
        from onnxcompress.cli.console import show_result

        show_result(one, result, source, target)
    if missed:
        raise missed


def _verify(source: Path, target: Path) -> dict[str, float | str]:
    from onnxcompress import verify

    try:
        found = verify.difference(source, target, verify.random_feeds(source))
    except CompressError as error:
        return {"skipped": str(error)}
    return {"max_abs": found.max_abs, "max_rel": found.max_rel, "output": found.output}


def _summary(one: Pass, model: Model, result: PassResult) -> dict[str, Any]:
    return {
        "pass": one.name,
        "options": one.options(),
        "changes": [dataclasses.asdict(c) for c in result.changes],
        "refusals": [dataclasses.asdict(r) for r in result.refusals],
        "measured": result.measured,
        "provenance": model.provenance(),
    }
