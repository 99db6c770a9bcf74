"""Options of passes that learn from inputs, or measure on them: one declaration for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.optimize.effort import INPUTS, effort_option
from onnxcompress.option_fields import check_limits, input_shape_option, option

INPUTS_HELP = (
    "What to learn from; auto: --images if given, else distilled if the file has BatchNorm or a "
    "record of it, else procedural (`onnxcompress guide data-free`). --images with distilled or "
    "procedural: both."
)


@dataclass(frozen=True)
class ImageOptions:
    """Which images a pass is given, and how they are brought into the form that the network takes."""

    images: str | None = option(
        None,
        "Folder of images or an .npz to learn from, 50 to 500 are enough; labels are not used. "
        "Without it inputs are made.",
        metavar="DIR|NPZ",
        file="read",
    )
    preprocess: str | None = option(
        None,
        "What your own code does to pixels before the network: imagenet, cifar10, …, or 'mean=… "
        "std=… size=… layout=…', on pixels/255; default: what the model's metadata has under "
        "`preprocessing`, else unit for --images, mean 0.45 and std 0.25 for made ones.",
        metavar="TEXT",
    )
    count: int | None = option(
        None, "Use this many of --images, drawn with the seed; fewer are faster.", ge=1
    )
    input_shape: str | None = input_shape_option()
    seed: int = option(0, "Random seed.", advanced=True, ge=0)

    @property
    def request(self) -> InputRequest:
        """What is asked for, as the options say it."""
        names = ("images", "preprocess", "count", "inputs", "synthetic", "seed", "input_shape")
        given = {name: getattr(self, name, None) for name in names}
        return InputRequest(**{name: value for name, value in given.items() if value is not None})

    def check(self) -> None:
        """Check the limits of all options, and that the inputs asked for do not contradict each other.

        Raises:
            OptionError: A value is out of range, or options contradict each other.
        """
        check_limits(self)
        self.request.check()


@dataclass(frozen=True)
class InputOptions(ImageOptions):
    """What a pass learns from: images, made inputs, or both."""

    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = option("auto", INPUTS_HELP)
    synthetic: int | None = option(
        None, "Number of images to make; the default depends on --effort.", metavar="N", ge=1
    )
    effort: Literal["auto", "fast", "balanced", "best"] = effort_option()

    @property
    def request(self) -> InputRequest:
        """What is asked for, as the options say it."""
        request = super().request
        return request if self.synthetic is not None else replace(request, synthetic=INPUTS[self.effort])
