"""The output error that each layer costs at given bits or sparsity, measured one layer at a time.

    error(layer, change) = E (ŷ − y)² / Var y        ŷ: the outputs with that one change, y: without

averaged over the network's float outputs: 0.01 is 20 dB of signal to noise. `changed` is the share of
inputs whose top-1 class changes. `sensitivity.layer_errors` changes the layers;
`sensitivity.bit_allocation` allocates a budget by the errors.

The network is measured as `quantize` rounds it: BatchNorm folded and, with `stretch`, the channels between
layers brought to equal ranges first. Errors of several layers add up roughly, as long as they are small.

Does not handle: networks with several inputs; layers that `quantization.qdq_plan` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from onnxcompress.account import InputSource, Refusal
from onnxcompress.data.image_set import image_count
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, assume_sizes, gather_inputs, quick
from onnxcompress.progress import Progress, silent
from onnxcompress.sensitivity.rows import Row, make_variants

IMAGES = 96
"""Number of inputs unless one is given; a third of them is measured on."""


@dataclass(frozen=True)
class Sensitivity:
    """The result of a sensitivity analysis."""

    rows: list[Row]
    """Rows in the order of the network, and for each layer in the order of the variants."""
    inputs: tuple[InputSource, ...]
    refusals: list[Refusal]
    """Layers that cannot be changed."""


def sensitivity(
    model: Model,
    request: InputRequest,
    bits: Sequence[int] = (8, 4),
    activation_bits: Sequence[int] = (),
    sparsity: Sequence[float] = (),
    *,
    per_channel: bool = True,
    reconstruct: bool = True,
    stretch: bool = True,
    workers: int = 0,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure the output error that each layer costs alone; the model stays as it is.

    Args:
        model: The network with BatchNorm folded and canonicalized (`fold_and_canonicalize`), as `quantize`
            rounds it: rows name its weights.
        request: The inputs to measure on.
        bits: Numbers of bits to try for each weight, 2 to 8.
        activation_bits: Numbers of bits to try for each layer's input, 2 to 8.
        sparsity: Shares of zeros to try, between 0 and 1.
        per_channel: Whether a weight has a scale for each output channel.
        reconstruct: Whether weights are rounded so that the layer's output is kept, as `quantize` does,
            rather than to nearest.
        stretch: Whether channels between layers are brought to equal ranges first.
        workers: Number of layers measured at once, which does not change the result; 0: one for each core.
        progress: Called with the stage, the layers done and the layers in all.

    Returns:
        A row for each layer and each change, the inputs used, and the layers that cannot be changed.

    Raises:
        OptionError: An amount is out of range.
        ModelError: No layer can be measured.
        CompressError: As `gather_inputs`.
    """
    variants = make_variants(bits, activation_bits, sparsity)
    if workers < 0:
        raise OptionError(f"--workers {workers}: expected 0 or more")
    request = limited(request)
    request.check()
    from onnxcompress.optimize.reconstruction.context import CalibrationContext
    from onnxcompress.sensitivity.layer_errors import Measuring, layer_errors

    own = model.copy()
    assume_sizes(own, request)
    inputs = gather_inputs(own, quick(request, own), progress=progress)
    context = CalibrationContext.of(own, inputs, stretched=stretch)
    if not context.plan.layers:
        why = f": {context.plan.refusals[0]}" if context.plan.refusals else ""
        raise ModelError(f"{model.name}: no layer with a constant float32 weight to measure{why}")
    settings = Measuring(
        per_channel=per_channel, reconstruct=reconstruct, seed=request.seed, workers=workers
    )
    rows = layer_errors(context, variants, settings, progress)
    return Sensitivity(rows, inputs.sources, context.plan.refusals)


def limited(request: InputRequest) -> InputRequest:
    """Limit real images to IMAGES where there are more, unless the request gives a number.

    Args:
        request: The inputs that were asked for.

    Returns:
        The request with the limit.
    """
    if request.images is None or request.count is not None:
        return request
    return replace(request, count=IMAGES) if image_count(request.images) > IMAGES else request


def account(result: Sensitivity, digest: str) -> dict[str, Any]:
    """Convert the result to JSON values, which `read_rows` reads back.

    Args:
        result: The result.
        digest: SHA-256 of the model that was measured.

    Returns:
        The keys sha256, inputs, refusals and rows.
    """
    return {
        "sha256": digest,
        "inputs": [asdict(used) for used in result.inputs],
        "refusals": [asdict(refusal) for refusal in result.refusals],
        "rows": [asdict(row) for row in result.rows],
    }
