"""How far layers of few bits are to make up for earlier ones' losses: chosen by inputs kept aside.

Where activations have few bits, a layer's input has lost so much that its least squares target makes up for
what few inputs lost, not for what all do. How strongly that target is to be damped (`ridge`) depends on how
much inputs vary and how many there are, so all layers are fitted several times.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from onnxcompress.graph.query import data_input
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.optimize.reconstruction.held_out import HeldOut
from onnxcompress.optimize.reconstruction.quantize import QuantizationResults
from onnxcompress.optimize.reconstruction.quantized_tuning import fake_quantized

DAMPINGS = (1.0, 4.0, 16.0)
"""Factors of the target's λ that are tried, until one is worse than the one before."""


def least_error_fit(
    context: CalibrationContext,
    fit: Callable[[float], QuantizationResults],
    aside: Tensor,
    device: str = "cpu",
) -> QuantizationResults:
    """Fit the layers with several dampings of their targets.

    Args:
        context: The float network, with one output, and the plan.
        fit: Fits all layers, given the factor of λ.
        aside: Inputs that nothing learned from, (N, …).
        device: Where torch computes.

    Returns:
        The fitted layers with the least error of the network's output on `aside`.
    """
    source, output = str(data_input(context.model).name), str(context.model.graph.outputs[0].name)
    teacher = Executor.from_model(context.model, device=device)
    held_out = HeldOut(teacher, aside, source, output, batch=context.batch)
    best, least = None, float("inf")
    for damping in DAMPINGS:
        found = fit(damping)
        student = fake_quantized(context.model, context.plan, found, device).executor
        error = held_out.error(student, output)
        if best is not None and error >= least:
            break
        best, least = found, error
    assert best is not None
    return best
