"""Results of the calls: those of the rooms they come from, which a notebook shows as tables and plots."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.data.image_set import ImageSet
from onnxcompress.evaluation import accuracy, compare, gate_results, inspection
from onnxcompress.evaluation.guard import GuardMeasurements, Verdict
from onnxcompress.model import Model, save
from onnxcompress.pipeline import Step
from onnxcompress.report.elements import Story
from onnxcompress.report.run_data import Material
from onnxcompress.runtime.block_latency import LatencyChange
from onnxcompress.runtime.latency import Ratio, Timing
from onnxcompress.search import search
from onnxcompress.sensitivity import analysis

if TYPE_CHECKING:
    import onnx

HEIGHT = 520
"""Pixels of the page in a notebook; it scrolls."""
F_co = TypeVar("F_co", bound=Figures | None, covariant=True)
R = TypeVar("R", bound="Shown")


class Shown:
    """A result that a notebook shows as the page that `--report` writes."""

    _story: Callable[[], Story]
    """Builds the content of the page."""

    def write_report(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file.

        Args:
            path: The file.

        Raises:
            ModelError: The file cannot be written.
        """
        from onnxcompress.report.html import write_page

        write_page(path, self._story())

    def _repr_html_(self) -> str:
        from onnxcompress.report.html import render

        page = html.escape(render(self._story()))  # a frame keeps the page's style from the notebook's
        return f'<iframe srcdoc="{page}" style="width:100%;height:{HEIGHT}px;border:0"></iframe>'


@dataclass(frozen=True)
class Compressed(Shown, Generic[F_co]):
    """A compressed model, and how it came about."""

    model: Model
    """The result; `onnxcompress.model.save` and `save` write it."""
    steps: tuple[Step, ...]
    """Each pass with its result."""
    measured: F_co
    """The figures of the last pass; None where it refused the whole model."""
    guard: GuardMeasurements | None
    """How much the outputs changed, from the first pass to the last."""
    verdict: Verdict | None
    """The guard's verdict on that."""
    latency: LatencyChange | None
    """Latency before and after, where it was measured."""
    gates: tuple[gate_results.Verdict, ...] = ()
    """Verdicts of the gates."""

    @property
    def changes(self) -> tuple[Change, ...]:
        """What all passes changed."""
        return tuple(change for step in self.steps for change in step.result.changes)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What they left as it was, with the reasons."""
        return tuple(refusal for step in self.steps for refusal in step.result.refusals)

    @property
    def proto(self) -> onnx.ModelProto:
        """The result as a proto. Raises ModelError from 2 GB on."""
        return self.model.to_proto()

    @property
    def ir(self) -> Any:
        """The result as an `onnx_ir.Model`; needs onnx_ir."""
        import onnx_ir

        return onnx_ir.from_proto(self.model.to_proto())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result, completely or not at all.

        Args:
            path: The file.

        Raises:
            ModelError: The file cannot be written.
        """
        save(self.model, path)


@dataclass(frozen=True)
class Benchmark(Shown):
    """Latency of several models, timed interleaved."""

    timings: Mapping[str, Timing]
    """Name of the model -> its latency."""
    ratios: Mapping[str, Ratio]
    """Name of each but the first -> its latency over the first's."""


@dataclass(frozen=True)
class Comparison(compare.Comparison, Shown):
    """Two models side by side."""


@dataclass(frozen=True)
class Accuracy(accuracy.Accuracy, Shown):
    """Accuracy on labelled images."""


@dataclass(frozen=True)
class Sensitivity(analysis.Sensitivity, Shown):
    """What each layer costs alone."""


@dataclass(frozen=True)
class Inspection(inspection.Inspection, Shown):
    """A model, which of its blocks can be dropped, and which channels be cut."""


@dataclass(frozen=True)
class Images(Shown):
    """Images that were made for a network."""

    images: ImageSet


@dataclass(frozen=True)
class Front(search.Front, Shown):
    """The models that a search found, none worse than another in every respect."""


def shown(cls: type[R], values: Any, story: Callable[[], Story] | Material) -> R:
    """Make a result that has a page.

    Args:
        cls: Class of the result.
        values: Its fields, or an instance of the dataclass that it is derived from.
        story: Builds the page, or the facts that the command's report is made from.

    Returns:
        The result.
    """
    if not isinstance(values, Mapping):
        values = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    made = cls(**values)
    built = partial(_told, story) if isinstance(story, Material) else story
    object.__setattr__(made, "_story", built)
    return made


def _told(material: Material) -> Story:
    """Build a page without its last section: a call is no command line that could be repeated."""
    from onnxcompress.report.build import tell

    told = tell(material)
    return dataclasses.replace(told, sections=[s for s in told.sections if s.name != "repeat"])
