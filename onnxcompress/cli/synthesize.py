"""`onnxcompress synthesize`: make images from the network's statistics or from a seed, and write them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from onnxcompress.cli import options, report_option
from onnxcompress.cli.cache import cache_options, chosen_cache
from onnxcompress.errors import ModelError, OptionError

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.data.preprocessing_choice import PreprocessingChoice
    from onnxcompress.model import Model
    from onnxcompress.progress import Progress


@click.command()
@click.argument("source", metavar="MODEL", type=options.FILE)
@click.argument("target", metavar="OUT.npz", type=options.FILE)
@click.option(
    "--kind",
    type=click.Choice(["distilled", "procedural"]),
    help="distilled: images whose statistics in the network match the training set's; procedural: dead "
    "leaves, which need only the size of the input.  [default: distilled where the file has statistics]",
)
@click.option("--count", type=click.IntRange(1), default=500, show_default=True, help="Images to make.")
@options.seed()
@click.option(
    "--preprocess",
    metavar="TEXT",
    help="How the network's inputs are normalized, as for drop-blocks.  [default: `preprocessing` in the "
    "model's metadata, else mean=0.45 std=0.25]",
)
@options.input_shape()
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where images are distilled; auto: cuda where torch has it.",
)
@click.option(
    "--sheet", metavar="OUT.png", help="Contact sheet of the first 100.  [default: OUT with .png]"
)
@click.option("--no-sheet", is_flag=True, help="Write no contact sheet.")
@options.as_json()
@report_option.report()
def synthesize(
    source: str,
    target: str,
    kind: str | None,
    count: int,
    seed: int,
    preprocess: str | None,
    input_shape: str | None,
    device: str,
    sheet: str | None,
    no_sheet: bool,
    as_json: bool,
    report: str | None,
    cache: str | None,
    no_cache: bool,
) -> None:
    """Make images for the network and write them to OUT.npz, for the other commands to learn from.

    OUT.npz holds x (uint8, N,H,W,C), and kind, seed and preprocess. The same seed gives the same images; a
    smaller procedural set is the start of a larger one.

    \b
    Example:
      onnxcompress synthesize net.onnx images.npz --count 500 --preprocess imagenet
    """
    from onnxcompress.cli.console import progress
    from onnxcompress.data.preprocessing_choice import choose
    from onnxcompress.optimize.calibration import InputRequest, assume_sizes
    from onnxcompress.optimize.intermediate_results import keeping
    from onnxcompress.optimize.synthesis.synthetic_inputs import best_kind, image_input

    kept = chosen_cache(cache, no_cache)
    files = _files(Path(target), sheet, no_sheet)
    model = _load(Path(source), files)
    assume_sizes(model, InputRequest(preprocess=preprocess, input_shape=input_shape))
    choice = choose(preprocess, model.metadata, source, image_input(model).dtype)
    kind, why = (kind, "asked for") if kind else best_kind(model)
    device = _device(model, kind, device)
    start = time.perf_counter()
    with progress(lines=not as_json) as show, keeping(kept):
        images = _make(model, kind, count, choice, seed, device, show)
    _write(files, images, kind, seed)
    asked = {"model": source, "kind": kind, "why": why, "count": count, "seed": seed, "device": device}
    written = {"output": str(files[0]), "sheet": str(files[1]) if len(files) > 1 else None}
    made = {"shape": list(images.x.shape[1:]), **choice.as_dict(), "preprocess": str(images.preprocess)}
    account = {**asked, **written, **made, "seconds": time.perf_counter() - start}
    options.print_json(account) if as_json else _show(account)
    if report:
        from onnxcompress.report.collect import pictures

        report_option.write_report(
            report,
            account,
            [("model", source), ("images", target)],
            pictures=[pictures("The images", images)],
        )


synthesize.params[-2:-2] = cache_options()


def _load(source: Path, files: list[Path]) -> Model:
    """Load the model. Raises ModelError where an output file is its own, or cannot be written."""
    from onnxcompress.model import load
    from onnxcompress.model.onnx_file import check_external, check_target

    for file in files:
        check_target(source, file)
    model = load(source)
    for file in files:
        check_external(model, file)
    return model


def _device(model: Model, kind: str, name: str) -> str:
    """Choose the device; torch is loaded only if images are to be distilled. Raises RuntimeUnavailable."""
    from onnxcompress.statistics.record import known_statistics

    if kind == "procedural" or not known_statistics(model):
        return "cpu"
    from onnxcompress.optimize.device import pick_device

    return pick_device(name)


def _files(target: Path, sheet: str | None, no_sheet: bool) -> list[Path]:
    """Return the paths of OUT.npz and, unless switched off, of the contact sheet. Raises OptionError."""
    if target.suffix.lower() != ".npz":
        raise OptionError(f"OUT.npz: {str(target)!r}; expected a name that ends in .npz")
    if no_sheet and sheet is not None:
        raise OptionError("--no-sheet and --sheet: give one of them")
    if no_sheet:
        return [target]
    second = Path(sheet) if sheet is not None else target.with_suffix(".png")
    if second.suffix.lower() != ".png":
        raise OptionError(f"--sheet {sheet!r}: expected a name that ends in .png")
    return [target, second]


def _make(
    model: Model,
    kind: str,
    count: int,
    choice: PreprocessingChoice,
    seed: int,
    device: str,
    progress: Progress,
) -> ImageSet:
    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.optimize.synthesis.synthetic_inputs import STANDARDIZED, image_input, synthetic_images

    if choice.explicit is None and image_input(model).dtype.kind == "f":
        click.echo(
            f"note: no --preprocess, and none in the model's metadata: {STANDARDIZED} is assumed", err=True
        )
    made = synthetic_images(model, kind, count, choice.explicit, seed, device=device, progress=progress)
    if not isinstance(made, ImageSet):
        raise ModelError(
            f"{model.name}: its input takes no images of 1 or 3 channels, and only those can be written; "
            "passes make other inputs themselves where none are given"
        )
    return made


def _write(files: list[Path], images: ImageSet, kind: str, seed: int) -> None:
    """Write all files or none. The archive holds no times, so that the same images give the same bytes."""
    import numpy as np

    from onnxcompress.data.contact_sheet import contact_sheet
    from onnxcompress.model.tensor_storage import write_files

    arrays: dict[str, Any] = {
        "x": images.x,
        "kind": np.array(kind),
        "seed": np.array(seed, np.int64),
        "preprocess": np.array(str(images.preprocess)),
    }

    def archive(file: BinaryIO) -> None:
        np.savez(file, **arrays)

    def picture(file: BinaryIO) -> None:
        contact_sheet(images.x).save(file, "PNG")

    write_files(list(zip(files, (archive, picture), strict=False)))


def _show(account: dict[str, Any]) -> None:
    size = "x".join(str(n) for n in account["shape"])
    sheet = f", to look at: {account['sheet']}" if account["sheet"] else ""
    click.echo(
        f"{account['count']} {account['kind']} images ({account['why']}), {size}, in "
        f"{account['seconds']:.1f} s: {account['output']}{sheet}"
    )
    click.echo(
        f"use with quantize and others: --images {account['output']} --preprocess '{account['preprocess']}'"
    )
