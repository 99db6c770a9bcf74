"""What each layer costs in output error at given bits or sparsity, one layer at a time.

    error(layer, change) = E (ŷ − y)² / Var y        ŷ: the outputs with that one change, y: without

averaged over the network's float outputs: 0.01 is 20 dB of signal to noise. `changed` is the share of
inputs whose top-1 class is another one. How a layer is changed: `sensitivity.layer_errors`; what budgets
make of it: `sensitivity.bit_allocation`.

The network is measured as `quantize` rounds it: BatchNorm folded, and with `stretch` the channels between
layers brought to equal ranges first. Errors of several layers add up roughly, as long as they are small.

Does not handle: networks with several inputs; layers that `quantization.qdq_plan` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from onnxcompress.account import Refusal
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, Used, gather_inputs, quick
from onnxcompress.progress import Progress, silent
from onnxcompress.sensitivity.rows import Row, make_variants

IMAGES = 96
"""Inputs that are used unless a number is given; a third of them is measured on."""


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found."""

    rows: list[Row]
    """In the order of the network; of each layer in the order of the variants."""
    inputs: tuple[Used, ...]
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
    """Measure what each layer costs alone; the model stays as it is.

    Args:
        model: The network with BatchNorm folded and canonicalized (`fold_and_canonicalize`), as `quantize`
            rounds it: rows name its weights.
        request: The inputs to measure on.
        bits: Bits of a layer's weight to try, 2 to 8.
        activation_bits: Bits of what a layer reads to try, 2 to 8.
        sparsity: Shares of zeros to try, between 0 and 1.
        per_channel: Whether a weight has a scale for each output channel.
        reconstruct: Whether rounding keeps the layer's output, as `quantize` does it.
        stretch: Whether channels between layers are brought to equal ranges first.
        workers: Layers measured at once, 0: one for each core; the result does not depend on it.

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
    from onnxcompress.optimize.reconstruction.context import Subject
    from onnxcompress.sensitivity.layer_errors import Measuring, layer_errors

    own = model.copy()
    inputs = gather_inputs(own, quick(request, own), progress=progress)
    subject = Subject.of(own, inputs, stretched=stretch)
    if not subject.plan.layers:
        why = f": {subject.plan.refusals[0]}" if subject.plan.refusals else ""
        raise ModelError(f"{model.name}: no layer with a constant float32 weight to measure{why}")
    how = Measuring(per_channel=per_channel, reconstruct=reconstruct, seed=request.seed, workers=workers)
    rows = layer_errors(subject, variants, how, progress)
    return Sensitivity(rows, inputs.sources, subject.plan.refusals)


def limited(request: InputRequest) -> InputRequest:
    """Of real images IMAGES, unless a number is given."""
    return replace(request, count=IMAGES) if request.images and request.count is None else request


def account(found: Sensitivity, digest: str) -> dict[str, Any]:
    """As JSON values; `read_rows` reads it back."""
    return {
        "sha256": digest,
        "inputs": [asdict(used) for used in found.inputs],
        "refusals": [asdict(refusal) for refusal in found.refusals],
        "rows": [asdict(row) for row in found.rows],
    }
