"""Estimate the record of statistics where no BatchNorm knows it, from whatever inputs there are.

Both modes of torch.onnx.export fold BatchNorm unless told otherwise, so most files know nothing of the data
they were trained on. Here images go through the network, and mean and deviation of each channel of the
image and of each linear layer's output are written to the record, so that whatever needs statistics works.
`onnxcompress.optimize.statistics_estimation` has the sums, and says which tensors.

 1. What a BatchNorm knows, in the graph or recorded before it was folded, holds for the training set: it is
    kept. What was estimated before is estimated anew.
 2. Inputs are made without what was estimated before, or is overwritten: images distilled from estimates
    would bring the estimates back, and the second run would differ from the first.
 3. An entry says what it was taken of: procedural images give the statistics of the network on procedural
    images. How far they are from the training set's shows where a BatchNorm knows better.

Where the new numbers are the old ones but for rounding, the old ones stay: a second run changes nothing.
Does not handle: several inputs; samples of single layers, which are drawn from the very record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from onnxcompress.account import Change, Figures, InputSource, Refusal
from onnxcompress.errors import OptionError
from onnxcompress.graph.batch_norm import OLDEST_OPSET
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import (
    InputRequest,
    assume_sizes,
    gather_inputs,
)
from onnxcompress.optimize.input_options import INPUTS_HELP, InputOptions
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.opsets import at_opset
from onnxcompress.passes.preview import check_inputs, raised
from onnxcompress.progress import Progress, silent
from onnxcompress.statistics.record import (
    ESTIMATED,
    ChannelStatistics,
    known_statistics,
    live_record,
    read_record,
    write_record,
)

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet

Record = dict[str, ChannelStatistics]

ROUNDING = 1e-4
"""Largest change, in deviations of a channel, that is taken for rounding: devices and threads differ so."""


@dataclass(frozen=True)
class Agreement:
    """How far estimates are from what BatchNorm knows: medians over the channels that vary."""

    tensors: int
    """Number of tensors that were compared."""
    mean_error: float
    """Difference of the means, in standard deviations."""
    std_ratio: float
    """Estimated standard deviation over the known one."""


@dataclass(frozen=True)
class CalibrateFigures(Figures):
    """The figures of `calibrate`."""

    tensors: int
    """Number of tensors whose statistics are wanted."""
    estimated: int
    """Number of them whose statistics were estimated."""
    kept: int
    """Number of them whose statistics BatchNorm knows."""
    dead: Mapping[str, tuple[int, ...]]
    """Tensor -> its channels that do not vary; tensors without such a channel are absent."""
    agreement: Agreement | None
    """Comparison of the estimates with BatchNorm; None: it knows none of the estimated tensors."""


@dataclass(frozen=True)
class Calibrate(InputOptions, Pass):
    """Estimate the statistics that passes without data need, and write them into the file.

    What BatchNorm knows of the training set is kept. The network itself stays as it is.

    \b
    Example:
      onnxcompress calibrate net.onnx calibrated.onnx --images photos/ --preprocess imagenet
      onnxcompress calibrate net.onnx calibrated.onnx --inputs procedural
    """

    name: ClassVar[str] = "calibrate"
    figures: ClassVar[type[Figures]] = CalibrateFigures
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    preserves_function: ClassVar[bool] = True

    inputs: Literal["auto", "images", "distilled", "procedural"] = option("auto", INPUTS_HELP)
    overwrite: bool = option(
        False,
        "Estimate also what BatchNorm knows; for weights that were changed after training, or "
        "images of another kind.",
    )
    batch: int = option(
        64, "Images that go through at once, at most; fewer need less memory.", advanced=True, ge=1
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device on which torch computes.", advanced=True
    )

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[CalibrateFigures]:
        """Write the record of a model.

        Args:
            model: The model; only its metadata is changed.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The entries that changed, the layers that cannot be measured with the reasons, and the figures.

        Raises:
            OptionError: Options contradict each other.
            InputError: The images cannot be used.
            ModelError: The image size is open, and no images are given.
        """
        self.check()
        return at_opset(model, OLDEST_OPSET, lambda own: self._estimate(own, progress))

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List the layers whose outputs cannot be measured, and check that inputs can be gathered.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            The layers, with the reasons.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        self.check()
        from onnxcompress.optimize.statistics_estimation import measurable

        own = raised(model, OLDEST_OPSET)
        assume_sizes(own, self.request)
        check_inputs(own, self.request)
        return measurable(own)[1]

    def _estimate(self, model: Model, progress: Progress) -> PassResult[CalibrateFigures]:
        from onnxcompress.optimize.device import pick_device
        from onnxcompress.optimize.statistics_estimation import estimate_statistics, measurable

        assume_sizes(model, self.request)
        wanted, refusals = measurable(model)
        wanted += [name for name in live_record(model) if name not in wanted]
        exact = {n: s for n, s in known_statistics(model).items() if not s.estimated}
        kept = {} if self.overwrite else exact
        found: Record = {}
        used: tuple[InputSource, ...] = ()
        shown: ImageSet | None = None
        if any(name not in kept for name in wanted):
            device = pick_device(self.device)
            inputs = gather_inputs(_only(model, kept), self.request, device=device, progress=progress)
            used, shown = inputs.sources, inputs.shown
            assert inputs.images is not None  # layerwise is no choice here
            found = estimate_statistics(
                model, inputs.images, wanted, source=source_of(used), batch=self.batch, device=device,
                progress=progress,
            )  # fmt: skip
        record = found | kept
        figures = CalibrateFigures(
            tensors=len(wanted),
            estimated=sum(name not in kept for name in wanted),
            kept=sum(name in kept for name in wanted),
            dead={name: tuple(record[name].dead) for name in wanted if record[name].dead},
            agreement=_agreement(found, exact),
            inputs=used,
        )
        return PassResult(_write(model, record), refusals, figures, shown)

    def check(self) -> None:
        """Check all options, and that the inputs asked for can serve.

        Raises:
            OptionError: A value is out of range, or the inputs cannot serve.
        """
        super().check()
        if self.inputs not in ("auto", "images", "distilled", "procedural"):
            raise OptionError(f"--inputs {self.inputs}: calibrate takes images, distilled or procedural")
        if self.overwrite and self.inputs == "distilled":
            raise OptionError(
                "--overwrite --inputs distilled: images distilled from what is overwritten would bring it "
                "back; take --images or --inputs procedural"
            )

    @property
    def request(self) -> InputRequest:
        """What is asked for; what is overwritten gives no inputs."""
        request = super().request
        circular = self.overwrite and self.inputs == "auto" and self.images is None
        return replace(request, inputs="procedural") if circular else request


def source_of(used: Sequence[InputSource]) -> str:
    """Describe inputs in the entries of the record that were estimated on them.

    Args:
        used: The sources of the inputs.

    Returns:
        Such as `estimated: procedural 500, seed 0`.
    """
    inputs = " + ".join(f"{source.source} {source.count}" for source in used)
    return f"{ESTIMATED}: {inputs}, seed {used[0].seed}"


def _only(model: Model, exact: Record) -> Model:
    """The model as it is with nothing but these statistics on record."""
    twin = model.copy()
    write_record(twin, exact)
    return twin


def _write(model: Model, record: Record) -> list[Change]:
    """Put the statistics into the record where they differ from what is there."""
    before, new = read_record(model), dict(record)
    changes = []
    for name, found in record.items():
        if name in before and _same(before[name], found):
            new[name] = before[name]
        else:
            what = "estimated" if found.estimated else "recorded"
            changes.append(Change(name, f"statistics {what}{' anew' if name in before else ''}"))
    gone = sorted(before.keys() - new.keys())
    write_record(model, new)
    return changes + [Change(name, "statistics forgotten: the tensor is gone") for name in gone]


def _same(before: ChannelStatistics, found: ChannelStatistics) -> bool:
    """Whether the two say the same, but for rounding."""
    if before.source != found.source or before.mean.shape != found.mean.shape:
        return False
    limit = ROUNDING * np.maximum(found.std, float(found.std.mean()))
    close = (np.abs(before.mean - found.mean) <= limit) & (np.abs(before.std - found.std) <= limit)
    return bool(close.all())


def _agreement(found: Record, exact: Record) -> Agreement | None:
    """How far the estimates are from what BatchNorm knows, over channels that vary; None: it knows none."""
    both = [(found[name], exact[name]) for name in found if name in exact]
    if not both:
        return None
    mean, std, true_mean, true_std = (
        np.concatenate([getattr(pair[side], key) for pair in both])
        for side, key in ((0, "mean"), (0, "std"), (1, "mean"), (1, "std"))
    )
    alive = true_std > 0
    if not alive.any():
        return None
    return Agreement(
        tensors=len(both),
        mean_error=float(np.median(np.abs(mean - true_mean)[alive] / true_std[alive])),
        std_ratio=float(np.median(std[alive] / true_std[alive])),
    )
