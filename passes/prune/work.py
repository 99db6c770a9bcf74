"""How much work `prune` does, chosen before it learns."""

from __future__ import annotations

from dataclasses import replace

from onnxcompress.model import Model
from onnxcompress.optimize.calibration import SMALL_PIXELS, InputRequest, quick
from onnxcompress.optimize.effort import PRUNE, Effort, announce, choose_effort, pixels_of
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.progress import Progress


def work_of(options: PruneOptions, model: Model) -> tuple[Effort, InputRequest]:
    """Choose the effort and the inputs.

    Args:
        options: The options.
        model: The model, prepared.

    Returns:
        The effort, and the inputs to gather.
    """
    effort = choose_effort(options.effort, model, "prune", PRUNE["best"].inputs)
    work, small = PRUNE[effort], 0 < pixels_of(model) <= SMALL_PIXELS
    count = options.synthetic or (work.small_inputs if small else work.inputs)
    return effort, replace(quick(options.request, model), synthetic=count)


def preview_work(options: PruneOptions, model: Model, progress: Progress) -> None:
    """Report the effort and the expected time, as the pass does before its work.

    Args:
        options: The options.
        model: The model, prepared.
        progress: Called once, with no steps.
    """
    effort, request = work_of(options, model)
    announce("prune", effort, model, progress, request.expected)
