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
from onnxcompress.formatting import counted
from onnxcompress.option_fields import INPUT_SHAPE_HELP as SHAPE_HELP
from onnxcompress.option_fields import INPUT_SHAPE_METAVAR as METAVAR
from onnxcompress.option_fields import PROVIDER_HELP, PROVIDER_OPTIONS_HELP

if TYPE_CHECKING:
    from onnxcompress.runtime.latency import Timing

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

FILE = click.Path(readable=False)
"""Any text; a shell completes it as a file's name."""
PREPROCESS_HELP = (
    "A preset (imagenet, imagenet-inception, cifar10, fashion-mnist, unit, raw), or pairs such as "
    '"mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=224 layout=nchw", on pixels/255. Further keys: '
    "resize (short side | stretch | none), channels, order (rgb | bgr), scale, filter.  [default: what the "
    "model's metadata has under `preprocessing`, else unit]"
)


def images(*, required: bool) -> Decorator[Any]:
    """Create the options --images, --preprocess and --count.

    Args:
        required: Whether --images must be given.

    Returns:
        A decorator of commands.
    """
    return _chain(
        click.option(
            "--images",
            type=FILE,
            metavar="DIR|NPZ",
            required=required,
            help="A folder of images, or an .npz with x and, where labels are needed, y.",
        ),
        click.option("--preprocess", metavar="TEXT", help=PREPROCESS_HELP),
        click.option("--count", type=click.IntRange(1), help="Use this many images, drawn at random."),
    )


def runtime(*, batch: int, several: bool = False) -> Decorator[Any]:
    """Create the options --provider, --provider-options, --threads and --batch.

    Args:
        batch: Default batch size.
        several: Let --batch take several sizes.

    Returns:
        A decorator of commands.
    """
    sizes = click.option(
        "--batch",
        metavar="N,…",
        default=str(batch),
        callback=_batches,
        help="Images per run; several sizes are timed one after the other: 1,8,64.",
        show_default=True,
    )
    size = click.option(
        "--batch", type=click.IntRange(1), default=batch, help="Images per run.", show_default=True
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


def added(options: Sequence[click.Option]) -> Decorator[Any]:
    """Add options that were built from the fields of a dataclass to a decorated function.

    Args:
        options: The options, in the order of the help.

    Returns:
        A decorator of commands.
    """

    def decorate(command: Any) -> Any:
        command.__click_params__ = [*getattr(command, "__click_params__", []), *reversed(options)]
        return command

    return decorate


def take_provider(chosen: dict[str, Any]) -> dict[str, Any]:
    """Join the arguments that `runtime` created to one Provider.

    Args:
        chosen: A command's arguments; `provider_options` is removed.

    Returns:
        The arguments, `provider` being a Provider.

    Raises:
        OptionError: The provider or one of its options does not exist.
    """
    from onnxcompress.runtime.providers import Provider

    texts = [text for text in chosen.pop("provider_options").split(",") if text]
    return chosen | {"provider": Provider.of(chosen["provider"], texts)}


def timing() -> Decorator[Any]:
    """Create the options --runs, --seconds, --tolerance and --input-shape, also called --shape.

    Returns:
        A decorator of commands.
    """
    return _chain(
        click.option("--runs", type=click.IntRange(1), help="Time exactly this many runs of each model."),
        click.option(
            "--seconds",
            type=click.FloatRange(0, min_open=True),
            help="Time limit, in seconds.  [default: 10, without --runs]",
        ),
        click.option(
            "--tolerance",
            type=click.FloatRange(0, 100, min_open=True),
            default=1.0,
            show_default=True,
            metavar="PERCENT",
            help="Stop once the 95 % intervals of the ratios are within ± this.",
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
    """Create the option --input-shape, which is passed on as text.

    Returns:
        A decorator of commands.
    """
    return click.option("--input-shape", metavar=METAVAR, help=SHAPE_HELP)


def seed() -> Decorator[Any]:
    """Create the option --seed.

    Returns:
        A decorator of commands.
    """
    kind = click.IntRange(0)
    return click.option("--seed", type=kind, default=0, show_default=True, help="Random seed.")


def as_json() -> Decorator[Any]:
    """Create the option --json.

    Returns:
        A decorator of commands.
    """
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")


def print_json(value: dict[str, Any]) -> None:
    """Print a JSON object to stdout; numbers that are not finite become null, since JSON has none.

    Args:
        value: The object.
    """
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def warn_placements(placements: Sequence[tuple[str, Any]]) -> None:
    """Report on stderr which nodes ran on the CPU although a GPU was asked for.

    Args:
        placements: Pairs of a model's name and its `Placement`.
    """
    for name, placement in placements:
        if left := placement.computed_on_cpu:
            shown = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
            nodes = counted(len(left), "node")
            click.echo(f"warning: {name}: {nodes} ran on the CPU, not the GPU: {shown}", err=True)
        if placement.shapes_on_cpu:
            count = len(placement.shapes_on_cpu)
            text = f"note: {name}: {count} nodes that compute shapes ran on the CPU, as is usual"
            click.echo(text, err=True)


def precision_of(timings: Mapping[str, Timing], asked: float | None) -> dict[str, Any]:
    """Compare the precision of timings with the tolerance.

    Args:
        timings: Timings by name, taken together.
        asked: The tolerance in percent; None: none was to be reached.

    Returns:
        JSON values: `within` and `asked` as shares, and whether it was `reached`.
    """
    from onnxcompress.runtime.latency import precision

    within = precision(timings)
    goal = None if asked is None else asked / 100
    return {"within": within, "asked": goal, "reached": None if goal is None else within <= goal}


def precision_text(precision: dict[str, Any], ratios: bool) -> str:
    """Describe whether the timings are as precise as asked.

    Args:
        precision: The result of `precision_of`.
        ratios: Whether several models were timed.

    Returns:
        A clause.
    """
    if precision["within"] == math.inf:
        return "a single run of each tells no interval: give it more --runs"
    text = f"{'ratios' if ratios else 'median'} within ± {100 * precision['within']:.2g} %"
    if precision["reached"] is None:
        return text
    asked = f"± {100 * precision['asked']:g} %"
    if precision["reached"]:
        return f"{text}, as asked ({asked})"
    return f"{text}, {asked} was asked for: give it more --seconds, or a quieter machine"


def warn_clocks(timings: Sequence[Timing]) -> None:
    """Report a GPU's clocks on stderr, with a warning where they drifted.

    Args:
        timings: A timing for each run.
    """
    for timing in timings:
        if timing.clocks is not None:
            click.echo(f"note: {timing.clocks.text}", err=True)
            if timing.clocks.drift:
                click.echo(f"warning: {timing.clocks.drift}; trust the ratios, not the times", err=True)
    if timings and timings[0].clocks is None and timings[0].provider in ("cuda", "tensorrt"):
        from onnxcompress.runtime.gpu_clocks import INSTALL

        click.echo(f"note: the GPU's clocks were not recorded; install {INSTALL}", err=True)


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
    """Return the type with which click reads a value.

    Args:
        hint: Annotation of the field.

    Returns:
        The type.
    """
    inner, _ = inner_type(hint)
    if typing.get_origin(inner) is typing.Literal:
        return click.Choice(typing.get_args(inner))
    return {int: int, float: float}.get(inner, str)


def inner_type(hint: Any) -> tuple[Any, bool]:
    """Unwrap an optional type.

    Args:
        hint: Annotation of a field.

    Returns:
        The type inside `X | None`, or the annotation itself, and whether it was optional.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [a for a in typing.get_args(hint) if a is not type(None)]
        return parts[0], True
    return hint, False


def split(value: str) -> tuple[str, ...]:
    """Split a list with commas; empty parts are dropped.

    Args:
        value: The text.

    Returns:
        The parts.
    """
    return tuple(part.strip() for part in value.split(",") if part.strip())
