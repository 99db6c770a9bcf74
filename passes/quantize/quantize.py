"""Quantize weights and activations after training, without data, to QDQ that runtimes fuse.

 1. BatchNorm and zero pads are folded                                       `graph.canonicalize`
 2. what is quantized where, and with how many bits                          `quantization.qdq_plan`
 3. inputs: images distilled from the record, procedural ones, …             `optimize.calibration`
 4. layer by layer, the student reading its own earlier error: ranges of activations by least squares,
    weights rounded in closed form, biases corrected                         `reconstruction.quantize`
 5. QuantizeLinear and DequantizeLinear are written                          `quantization.qdq_writer`
 6. onnxruntime loads the result: what fused, and how far the outputs are    `quantization.ort_fusion`

Sources: Nagel et al., Data-Free Quantization (ICCV 2019); Horton et al. (arXiv 2011.09058) §3.4 for
layer-wise reconstruction on generated inputs; GPTQ and QuantEase for its closed form (`gptq`).

Bits: weights and activations have 2 to 8 each. onnxruntime has integer kernels for 8 only: with fewer the
file is no faster. Fewer are held in 8-bit types, in the narrower range (`quantization.qdq_writer`), or with
`small_types` in 4-bit ones. The first and last layer keep 8 bits unless told otherwise, as is usual; so do
residual sums (`quantization.qdq_plan`).

Inputs: `auto` takes images if there are any; else, with 8 bits, procedural ones through the twin that has
the recorded statistics (`layerwise`: made at once); with fewer distilled ones, which take longer and are
better for EfficientNet-Lite0; without a record plain procedural ones.

`overflow_safe`: without it, onnxruntime's result on a CPU with AVX2 and no VNNI is far from what the file
says (`tests/benchmarks/overflow.py`). It costs next to nothing: no pair of weights is too large, but each
has 8 bits (`reconstruction.saturation`). uint8 weights cannot overflow, and are slower; depthwise kernels
add in 32 bits.

Does not handle: several inputs; models that are quantized already; see `plan` for the operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcompress.account import Refusal
from onnxcompress.errors import ModelError
from onnxcompress.model import Model
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.quantize.options import QuantizeOptions
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import QDQ

OPSET = 13
"""From which on scales may be per channel."""
SMALL_OPSET = 21
"""From which on there are int4 and uint4."""


@dataclass(frozen=True)
class Quantize(QuantizeOptions, Pass):
    """Quantize weights and activations to few bits, without data.

    \b
    Example:
      onnxcompress quantize net.onnx int8.onnx
      onnxcompress quantize net.onnx w4.onnx --weight-bits 4 --activation-bits 0
      onnxcompress quantize net.onnx mixed.onnx --bits-budget 4.5
    """

    name: ClassVar[str] = "quantize"
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Quantize in place; what cannot be comes back as refusals."""
        self.check()
        if model.opset < OPSET:
            raise ModelError(
                f"{model.name}: opset {model.opset}; {OPSET} or later is needed for scales per channel; "
                "convert it with onnx.version_converter"
            )
        if self.small_types and model.opset < SMALL_OPSET:
            raise ModelError(
                f"{model.name}: opset {model.opset}; --small-types needs {SMALL_OPSET} or later; "
                "convert it with onnx.version_converter"
            )
        if any(node.op in QDQ for node in model.graph.nodes):
            rule = "it is quantized already: it has QuantizeLinear or DequantizeLinear nodes"
            return PassResult(refusals=[Refusal(model.name, rule, "start from the float model")])
        from onnxcompress.passes.quantize.engine import quantize

        original = model.copy()
        changes = fold_and_canonicalize(model)
        return quantize(self, original, model, changes, progress)
