"""What each layer costs in output error at given bits or sparsity, one layer at a time.

    error(layer, change) = E (ŷ − y)² / Var y        ŷ: the outputs with that one change, y: without

averaged over the network's float outputs: 0.01 is 20 dB of signal to noise. `changed` is the share of
inputs whose top-1 class is another one. How a layer is changed: `optimize.layer_errors`; what budgets make
of it: `optimize.budget`.

The network is measured as `quantize` rounds it: BatchNorm folded, and with `stretch` the channels between
layers brought to equal ranges first. Errors of several layers add up roughly, as long as they are small.

Does not handle: networks with several inputs; layers that `quantization.plan` refuses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onnxcompress.errors import InputError, ModelError, OptionError, one_line
from onnxcompress.inputs.source import InputRequest, Used, best_kind, gather_inputs
from onnxcompress.model import Model
from onnxcompress.passing import Progress, Refusal, silent

Kind = Literal["weight_bits", "activation_bits", "sparsity"]
IMAGES = 96
"""Inputs that are used unless a number is given; a third of them is measured on."""


@dataclass(frozen=True)
class Variant:
    """One change of a layer: bits of its weight, bits of what it reads, or the share of zeros."""

    kind: Kind
    value: float


@dataclass(frozen=True)
class Row:
    """What one change of one layer costs."""

    layer: str
    op: str
    weight: str
    """Name of the initializer, as in the file with BatchNorm folded."""
    parameters: int
    """Of that weight."""
    kind: Kind
    value: float
    """Bits, or share of zeros."""
    error: float
    """Of the outputs: squared error over variance."""
    changed: float | None
    """Share of inputs with another top-1 class; None: no output has class scores."""


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
    """Measure all layers; the model stays as it is.

    workers: layers measured at once, 0: one for each core; the result does not depend on it. Raises
    OptionError for amounts out of range, ModelError where no layer can be measured, and as `gather_inputs`.
    """
    variants = make_variants(bits, activation_bits, sparsity)
    if workers < 0:
        raise OptionError(f"--workers {workers}: expected 0 or more")
    request = limited(request)
    request.check()
    from onnxcompress.optimize.layer_errors import Measuring, layer_errors
    from onnxcompress.optimize.subject import Subject
    from onnxcompress.passes._quantize_prepare import prepare

    own = model.copy()
    prepare(own)
    inputs = gather_inputs(own, quick(request, own), progress=progress)
    subject = Subject.of(own, inputs, stretched=stretch)
    if not subject.plan.layers:
        why = f": {subject.plan.refusals[0]}" if subject.plan.refusals else ""
        raise ModelError(f"{model.name}: no layer with a constant float32 weight to measure{why}")
    how = Measuring(per_channel=per_channel, reconstruct=reconstruct, seed=request.seed, workers=workers)
    rows = layer_errors(subject, variants, how, progress)
    return Sensitivity(rows, inputs.sources, subject.plan.refusals)


def make_variants(
    bits: Sequence[int], activation_bits: Sequence[int], sparsity: Sequence[float]
) -> list[Variant]:
    """Raises OptionError for none, or for amounts out of range."""
    for name, amounts in (("weight", bits), ("activation", activation_bits)):
        for one in amounts:
            if not 2 <= one <= 8:
                raise OptionError(f"--{name}-bits {one}: expected 2 to 8")
    for share in sparsity:
        if not 0 < share < 1:
            raise OptionError(f"--sparsity {share:g}: expected a share between 0 and 1")
    found = [Variant("weight_bits", b) for b in dict.fromkeys(bits)]
    found += [Variant("activation_bits", b) for b in dict.fromkeys(activation_bits)]
    found += [Variant("sparsity", s) for s in dict.fromkeys(sparsity)]
    if not found:
        raise OptionError("nothing to measure: give --weight-bits, --activation-bits or --sparsity")
    return found


def quick(request: InputRequest, model: Model) -> InputRequest:
    """What `auto` means where distilled images would take longer than all the rest: layer-wise ones."""
    if request.inputs == "auto" and request.images is None and best_kind(model)[0] == "distilled":
        why = "no --images; the file has statistics of its BatchNorms, and these inputs are made at once"
        return replace(request, inputs="layerwise", why=why)
    return request


def limited(request: InputRequest) -> InputRequest:
    """Of real images IMAGES, unless a number is given."""
    return replace(request, count=IMAGES) if request.images and request.count is None else request


def read_rows(path: Path, digest: str) -> list[Row]:
    """Rows from a file that `onnxcompress sensitivity --json` wrote of the model with this SHA-256.

    Raises InputError for any other file.
    """
    from pydantic import TypeAdapter

    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        rows = TypeAdapter(list[Row]).validate_python(saved["rows"])
        of = saved["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--sensitivity {path}: no file of sensitivities ({one_line(error)}); write one with "
            "onnxcompress sensitivity MODEL --json > FILE"
        ) from error
    if of != digest:
        raise InputError(
            f"--sensitivity {path}: it was measured on another model (SHA-256 {str(of)[:12]}…, this one "
            f"has {digest[:12]}…); measure this one"
        )
    return rows


def account(found: Sensitivity, digest: str) -> dict[str, Any]:
    """As JSON values; `read_rows` reads it back."""
    return {
        "sha256": digest,
        "inputs": [asdict(used) for used in found.inputs],
        "refusals": [asdict(refusal) for refusal in found.refusals],
        "rows": [asdict(row) for row in found.rows],
    }
