"""Options that several commands share, each defined once, and how commands print JSON."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onnxcompress.errors import OptionError
from onnxcompress.option_fields import INPUT_SHAPE_HELP as SHAPE_HELP
from onnxcompress.option_fields import INPUT_SHAPE_METAVAR as METAVAR
from onnxcompress.option_fields import PROVIDER_HELP, PROVIDER_OPTIONS_HELP

if TYPE_CHECKING:
    from onnxcompress.runtime.latency import Timing

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

ADVANCED = "Advanced"
"""Title of the options that few have a reason to set."""
FILE = click.Path(readable=False)
"""Any text, which a shell completes as a file's name."""
PREPROCESS_HELP = (
    "A preset (imagenet, imagenet-inception, cifar10, fashion-mnist, unit, raw), or pairs such as "
    '"mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=224 layout=nchw", on pixels/255. Further keys: '
    "resize (short side | stretch | none), channels, order (rgb | bgr), scale, filter.  [default: what the "
    "model's metadata has under `preprocessing`, else unit]"
)


def images(*, required: bool) -> Decorator[Any]:
    """--images, --preprocess and --count."""
    return _chain(
        click.option(
            "--images",
            type=FILE,
            metavar="DIR|NPZ",
            required=required,
            help="A folder of images or an .npz.",
        ),
        click.option("--preprocess", metavar="TEXT", help=PREPROCESS_HELP),
        click.option("--count", type=click.IntRange(1), help="Use this many images, drawn at random."),
    )


def runtime(*, batch: int, several: bool = False) -> Decorator[Any]:
    """--provider, --provider-options, --threads and --batch; `several`: of more than one size."""
    sizes = click.option(
        "--batch",
        metavar="N,…",
        default=str(batch),
        callback=_batches,
        help="Images a run; several are timed one after the other: 1,8,64.",
        show_default=True,
    )
    size = click.option(
        "--batch", type=click.IntRange(1), default=batch, help="Images a run.", show_default=True
    )
    return _chain(
        click.option("--provider", metavar="NAME", default="auto", show_default=True, help=PROVIDER_HELP),
        click.option("--provider-options", metavar="NAME=VALUE,…", default="", help=PROVIDER_OPTIONS_HELP),
        click.option(
            "--threads",
            type=click.IntRange(0),
            default=0,
            help="CPU threads; 0: all cores.",
            show_default=True,
        ),
        sizes if several else size,
    )


def take_provider(chosen: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments with what `runtime` gave joined to one Provider. Raises OptionError."""
    from onnxcompress.runtime.providers import Provider

    texts = [text for text in chosen.pop("provider_options").split(",") if text]
    return chosen | {"provider": Provider.of(chosen["provider"], texts)}


def timing() -> Decorator[Any]:
    """--runs, --seconds, --tolerance and --shape."""
    return _chain(
        click.option("--runs", type=click.IntRange(1), help="Time exactly this many runs of each model."),
        click.option(
            "--seconds",
            type=click.FloatRange(0, min_open=True),
            help="Time for at most this long.  [default: 10, without --runs]",
        ),
        click.option(
            "--tolerance",
            type=click.FloatRange(0, 100, min_open=True),
            default=1.0,
            show_default=True,
            metavar="PERCENT",
            help="End once the ratios' intervals are within ± this.",
        ),
        click.option(
            "--input-shape",
            "--shape",
            "shapes",
            multiple=True,
            metavar=METAVAR,
            callback=_shapes,
            help=SHAPE_HELP,
        ),
    )


def input_shape() -> Decorator[Any]:
    """--input-shape, as text."""
    return click.option("--input-shape", metavar=METAVAR, help=SHAPE_HELP)


def seed() -> Decorator[Any]:
    kind = click.IntRange(0)
    return click.option("--seed", type=kind, default=0, show_default=True, help="Of all random draws.")


def as_json() -> Decorator[Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout; what is not finite becomes null, which JSON has."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def warn_placements(placements: Sequence[tuple[str, Any]]) -> None:
    """Say on stderr which nodes of a GPU run the CPU computed, by model."""
    for name, placement in placements:
        left = placement.computed_on_cpu
        if left:
            shown = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
            click.echo(f"warning: {name}: the CPU ran {len(left)} nodes that compute: {shown}", err=True)
        if placement.shapes_on_cpu:
            count = len(placement.shapes_on_cpu)
            click.echo(f"note: {name}: the CPU ran {count} nodes on shapes, as is usual", err=True)


def precision_of(timings: Mapping[str, Timing], asked: float | None) -> dict[str, Any]:
    """How sure the ratios are: `within`, `asked` and whether it was `reached`; asked: percent, or None."""
    from onnxcompress.runtime.latency import precision

    within = precision(timings)
    goal = None if asked is None else asked / 100
    return {"within": within, "asked": goal, "reached": None if goal is None else within <= goal}


def precision_text(found: dict[str, Any], ratios: bool) -> str:
    """Whether the clock was as sure as asked: `found` has `within`, `asked` and `reached`."""
    text = f"{'ratios' if ratios else 'median'} within ± {100 * found['within']:.2g} %"
    if found["reached"] is None:
        return text
    if found["reached"]:
        return f"{text}, as asked (± {100 * found['asked']:g} %)"
    return (
        f"{text}, ± {100 * found['asked']:g} % was asked for: give it more --seconds, or a quieter machine"
    )


def warn_clocks(timings: Sequence[Timing]) -> None:
    """Of each run on a GPU: its clocks, and a warning where they drifted, on stderr."""
    for one in timings:
        if one.clocks is not None:
            click.echo(f"note: {one.clocks.text}", err=True)
            if one.clocks.drift:
                click.echo(f"warning: {one.clocks.drift}; trust the ratios, not the times", err=True)
    if timings and timings[0].clocks is None and timings[0].provider in ("cuda", "tensorrt"):
        from onnxcompress.runtime.gpu_clocks import INSTALL

        click.echo(f"note: the GPU's clocks were not noted: {INSTALL}", err=True)


def _batches(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    sizes = [text.strip() for text in value.split(",")]
    if not all(text.isdecimal() and int(text) > 0 for text in sizes):
        raise OptionError(f"--batch {value}: expected numbers of images, such as 8 or 1,8,64")
    return tuple(dict.fromkeys(int(text) for text in sizes))


def _shapes(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    from onnxcompress.data.input_shapes import parse_input_shapes

    return {name: shape for value in values for name, shape in parse_input_shapes(value).items()}


def _chain(*options: Decorator[Any]) -> Decorator[Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def option_type(hint: Any) -> click.ParamType[Any] | type:
    """What click reads a value of this annotation with."""
    inner, _ = inner_type(hint)
    if typing.get_origin(inner) is typing.Literal:
        return click.Choice(typing.get_args(inner))
    return {int: int, float: float}.get(inner, str)


def inner_type(hint: Any) -> tuple[Any, bool]:
    """The type inside `X | None`, and whether it was optional."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [a for a in typing.get_args(hint) if a is not type(None)]
        return parts[0], True
    return hint, False


def split(value: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


class SectionedOption(click.Option):
    """An option that the help lists under a heading of its own."""

    section: str = ""


class SectionedCommand(click.Command):
    """A command whose help has one list of options for each section, the advanced ones last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        lists: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                lists.setdefault(getattr(parameter, "section", "") or "Options", []).append(record)
        for title, records in sorted(lists.items(), key=lambda section: section[0] == ADVANCED):
            with formatter.section(title):
                formatter.write_dl(records)
