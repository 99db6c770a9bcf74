"""Gates: limits that a result must keep to be worth using, measured on the two files.

    Gates --prepare(before)--> Baseline --measure(after)--> GateMeasurements --judge--> [Verdict]

Only what a gate needs is measured: accuracy and agreement in onnxruntime on images that may be new to all
passes, latency as the median of interleaved runs (`latency`). A gate judges the measured value itself, and
its interval is in the verdict's text: where the limit is within the noise, the next verdict may differ.
Does not handle: networks without class scores (`max_drop`, `min_agreement`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from onnxcompress.errors import OptionError
from onnxcompress.evaluation.gate_results import GateMeasurements
from onnxcompress.formatting import counted
from onnxcompress.option_fields import INPUT_SHAPE_METAVAR, PROVIDER_HELP, option, provider_options_option
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.providers import Provider

if TYPE_CHECKING:
    import numpy as np

    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.model.model_like import ModelLike

LIMITS = ("max_drop", "min_agreement", "max_latency", "min_speedup", "max_size")
"""The fields of Gates that are limits; the others control the measurement."""


@dataclass(frozen=True)
class Gates:
    """Limits, none by default, and how to measure. Fields are keys of a recipe's `gates`.

    On the command line the limits and the images are options, the rest is as the command's own options.
    """

    max_drop: float | None = option(
        None, "Largest fall of top-1 accuracy, in points; needs labelled images.", metavar="POINTS"
    )
    min_agreement: float | None = option(
        None,
        "Smallest share of images with the same top-1 class as before, in percent; needs no labels.",
        metavar="PCT",
    )
    max_latency: float | None = option(None, "Largest median latency, in milliseconds.", metavar="MS")
    min_speedup: float | None = option(
        None, "Smallest speedup, latency before over latency after: 1.25 is 20 % less time.", metavar="X"
    )
    max_size: float | None = option(None, "Largest size, in MB (10⁶ bytes).", metavar="MB")
    images: str | None = option(
        None,
        "Images to judge by, best none that a pass learned from; with labels for --max-drop.",
        metavar="DIR|NPZ",
        file="read",
    )
    preprocess: str | None = option(
        None,
        "What is done to --gate-images, as --preprocess. [default: the model's metadata, else unit]",
        metavar="TEXT",
        advanced=True,
    )
    provider: str = option("auto", PROVIDER_HELP, metavar="NAME", advanced=True)
    provider_options: tuple[str, ...] = provider_options_option()
    threads: int = option(0, "CPU threads of onnxruntime; 0: all cores.", advanced=True)
    batch: int = option(1, "Images in a run when latency is measured.", advanced=True)
    input_shape: str | None = option(None, "As --input-shape.", metavar=INPUT_SHAPE_METAVAR, advanced=True)

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {n: v for n in LIMITS if (v := getattr(self, n)) is not None}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of inputs that the file leaves open, by name. Raises OptionError."""
        from onnxcompress.data.input_shapes import parse_input_shapes

        return parse_input_shapes(self.input_shape)

    @property
    def runs_on(self) -> Provider:
        """The provider with its options. Raises OptionError."""
        return Provider.of(self.provider, self.provider_options)

    def check(self, *, images: str | None = "--gate-images") -> None:
        """Check the limits and the options of the measurement.

        Args:
            images: Name of the option with the images, for messages; None: images are given elsewhere.

        Raises:
            OptionError: A value is out of range, or a limit lacks the images that it needs.
        """
        for name, value in self.limits.items():
            low, high = _RANGES[name]
            if not low < value <= high or not isfinite(value):
                allowed = f"more than {low:g}" + (f" and at most {high:g}" if high < float("inf") else "")
                raise OptionError(f"{_flag(name)} {value:g}: expected {_UNITS[name]}, {allowed}")
        needing = [n for n in ("max_drop", "min_agreement") if n in self.limits]
        if needing and self.images is None and images is not None:
            what = "labelled images" if "max_drop" in needing else "images"
            raise OptionError(f"{_flag(needing[0])} needs {what}: name them with {images} DIR|NPZ")
        self.runs_on, self.shapes  # noqa: B018  reading them checks the options
        for name, option_name, least in (("threads", "--threads", 0), ("batch", "--latency-batch", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"{option_name} {getattr(self, name)}: expected {least} or more")

    def prepare(self, before: ModelLike, progress: Progress = silent) -> Baseline:
        """Measure what the result will be compared with; all that can fail on the model before fails here.

        Args:
            before: The model before.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The baseline.

        Raises:
            InputError: Images cannot be used, or labels are missing.
            OptionError: The model does not take the batch, or an option is wrong.
            RuntimeUnavailable: The provider cannot start.
            ModelError: The model has no class scores.
        """
        if {"max_latency", "min_speedup"} & self.limits.keys():
            from onnxcompress.runtime.inference import random_feeds
            from onnxcompress.runtime.session import check_provider

            check_provider(self.runs_on)
            random_feeds(before, batch=self.batch, fixed_batch_ok=False, shapes=self.shapes)
        if self.images is None or not {"max_drop", "min_agreement"} & self.limits.keys():
            return Baseline(before)
        from onnxcompress.data.image_set import load_images
        from onnxcompress.evaluation.accuracy import logits, preprocessing

        choice = preprocessing(before, self.preprocess, self.input_shape)
        labels = self.max_drop is not None
        images = load_images(self.images, preprocess=choice.preprocess, labels=labels, progress=progress)
        scores = logits(before, images, provider=self.runs_on, threads=self.threads, progress=progress)
        return Baseline(before, images, scores, self._top1(scores, images), str(choice))

    def measure(
        self, baseline: Baseline, after: ModelLike, progress: Progress = silent
    ) -> GateMeasurements:
        """Measure what the limits need.

        Args:
            baseline: The baseline of the model before.
            after: The result.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The measurements.

        Raises:
            CompressError: The result cannot be measured, for example because it has no class scores.
        """
        from onnxcompress.model.model_like import model_bytes

        measurements = GateMeasurements(bytes=model_bytes(after))
        if baseline.images is not None:
            measurements = dataclasses.replace(measurements, **self._scores(baseline, after, progress))
        if {"max_latency", "min_speedup"} & self.limits.keys():
            measurements = dataclasses.replace(
                measurements, **self._latency(baseline.model, after, progress)
            )
        return measurements

    def _scores(self, baseline: Baseline, after: ModelLike, progress: Progress) -> dict[str, Any]:
        from onnxcompress.evaluation.accuracy import agreement, logits

        images = baseline.images
        assert images is not None
        assert baseline.scores is not None
        scores = logits(after, images, provider=self.runs_on, threads=self.threads, progress=progress)
        found: dict[str, Any] = {"inputs": counted(len(images), "image"), "preprocess": baseline.preprocess}
        found["agreement"] = agreement(baseline.scores, scores)
        if baseline.top1 is not None:
            found["top1"] = baseline.top1, self._top1(scores, images)
        return found

    def _top1(self, scores: np.ndarray, images: ImageSet) -> float | None:
        """Accuracy, where a limit is on it."""
        from onnxcompress.evaluation.accuracy import topk

        if self.max_drop is None or images.y is None:
            return None
        return topk(scores, images.y)[0]

    def _latency(self, before: ModelLike, after: ModelLike, progress: Progress) -> dict[str, Any]:
        from onnxcompress.runtime.latency import benchmark, ratio

        models = {"before": before, "after": after} if self.min_speedup is not None else {"after": after}
        timings = benchmark(
            models,
            provider=self.runs_on,
            batch=self.batch,
            threads=self.threads,
            shapes=self.shapes,
            progress=progress,
        )
        last = timings["after"]
        device = f"{last.device}, batch {last.batch}"
        found: dict[str, Any] = {"latency_ms": last.median_ms, "device": device}
        if "before" in timings:
            found["ratio"] = ratio(timings["before"], last)
        return found


@dataclass(frozen=True)
class Baseline:
    """The model before, and its scores where the limits need images."""

    model: ModelLike
    images: ImageSet | None = None
    scores: np.ndarray | None = None
    top1: float | None = None
    preprocess: str = ""
    """Description of how images are preprocessed."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_INFINITE = float("inf")
_RANGES = {
    "max_drop": (-100.0, 100.0),
    "min_agreement": (1.0, 100.0),  # with a share such as 0.98, every model would pass
    "max_latency": (0.0, _INFINITE),
    "min_speedup": (0.0, _INFINITE),
    "max_size": (0.0, _INFINITE),
}
"""Allowed range of each limit, without its lower end."""
_UNITS = {
    "max_drop": "points of percent",
    "min_agreement": "percent",
    "max_latency": "milliseconds",
    "min_speedup": "a factor",
    "max_size": "megabytes",
}
