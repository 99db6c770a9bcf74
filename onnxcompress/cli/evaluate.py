"""`onnxcompress evaluate`: top-1 and top-5 on labelled images."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options, report_option

if TYPE_CHECKING:
    from onnxcompress.data.preprocessing_choice import PreprocessingChoice
    from onnxcompress.evaluation.accuracy import Accuracy


@click.command()
@click.argument("model", metavar="MODEL", type=options.FILE)
@options.images(required=True)
@click.option("--output", metavar="NAME", help="The output with the scores.  [default: the first such]")
@options.input_shape()
@options.runtime(batch=64)
@options.seed()
@options.as_json()
@report_option.report()
def evaluate(
    model: str,
    images: str,
    preprocess: str | None,
    count: int | None,
    input_shape: str | None,
    seed: int,
    as_json: bool,
    report: str | None,
    **chosen: Any,
) -> None:
    """Measure top-1 and top-5 accuracy on labelled images.

    Labels are the first level of folders in DIR (numbers: class indices; names: in sorted order), or y in
    the .npz beside x (uint8, N,H,W,C).

    \b
    Example:
      onnxcompress evaluate net.onnx --images val/ --preprocess imagenet
    """
    from onnxcompress.cli.console import progress
    from onnxcompress.data.image_set import load_images
    from onnxcompress.evaluation import accuracy as measure

    chosen = options.take_provider(chosen)
    choice = measure.preprocessing(model, preprocess, input_shape)
    draw: dict[str, Any] = {"preprocess": choice.preprocess, "count": count, "seed": seed}
    with progress(lines=not as_json) as show:
        loaded = load_images(images, labels=True, progress=show, **draw)
        accuracy = measure.evaluate(model, loaded, progress=show, **chosen)
    given = {"model": model, "images": images, **choice.as_dict()}
    account = {**given, **asdict(accuracy), "top1_interval": list(accuracy.interval)}
    options.print_json(account) if as_json else _show(model, images, choice, accuracy)
    if report:
        from onnxcompress.report.collect import pictures

        files = [("model", model), ("images", images)]
        report_option.write_report(
            report, account, files, pictures=[pictures(f"Images of {images}", loaded)]
        )


def _show(model: str, images: str, choice: PreprocessingChoice, accuracy: Accuracy) -> None:
    from onnxcompress.cli.console import stdout, table
    from onnxcompress.model.model_like import display_names
    from onnxcompress.runtime.providers import described

    low, high = accuracy.interval
    row = [
        *display_names([model]),
        f"{accuracy.top1:.2%}",
        f"{low:.2%} to {high:.2%}",
        f"{accuracy.top5:.2%}",
        str(accuracy.count),
        f"{accuracy.seconds:.1f} s",
    ]
    columns = ["model", "top-1", "95 % interval", "top-5", "images", "took"]
    console = stdout()
    where = described(accuracy.provider, accuracy.settings)
    console.print(table(f"accuracy on {images}, {where}", columns, [row]))
    console.print(f"images are {choice}", markup=False)
