"""What each runtime fuses and accepts of a quantized network: where quantizers stand, and of what kind.

| runtime  | activations       | weights                | quantizers before      | sums          | bias  |
|----------|-------------------|------------------------|------------------------|---------------|-------|
| cpu      | uint8             | int8, by channel       | layers, sums, pools, … | both branches | int32 |
| cuda     | floats            | int8, by channel       | –                      | –             | float |
| tensorrt | int8, symmetric   | int8, by channel       | layers, sums, pools    | residual      | float |
| openvino | uint8             | int8, by channel       | layers, sums, pools, … | both branches | int32 |
| qnn      | uint8 (or uint16) | int8, convs by channel | all operators          | both branches | int32 |

Sources:
- cpu: integer kernels QLinearConv, QLinearAdd, … replace DequantizeLinear -> operator -> QuantizeLinear
  (onnxruntime documentation, Quantize ONNX models).
- cuda: onnxruntime fuses none of them there: W8A8 took 1.4 to 2.1 times as long as float32 on an H100.
- tensorrt: int8 with zero point 0, activations by tensor and weights by channel; inputs of weighted layers
  and not their outputs; of a sum behind a convolution the residual input alone, so that the sum is fused
  into the convolution (TensorRT documentation, Explicit Quantization: Q/DQ Layer-Placement Recommendations;
  NVIDIA's ModelOpt leaves out the same input, `build_non_residual_input_map`). A bias that is dequantized
  from int32 is refused, "only activation types allowed as input to this layer" (microsoft/onnxruntime issue
  14229, onnx/onnx-tensorrt issue 850). Where weights alone are integers they are int4, never int8 (TensorRT
  documentation, Working with Quantized Types).
- openvino: an operator is computed in integers where all its inputs are quantized, data and weights
  (OpenVINO documentation: Low Precision IR; Quantized models compute and restrictions).
- qnn: by channel only Conv and ConvTranspose (`get_qnn_qdq_config` of `onnxruntime.quantization`); what is
  not quantized does not run on the integer processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Runtime = Literal["cpu", "cuda", "tensorrt", "openvino", "qnn"]

ARITHMETIC = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid")
"""Operators with an integer kernel of their own in onnxruntime."""
POOLS = ("AveragePool", "GlobalAveragePool")
QNN = (
    *ARITHMETIC, "Sub", "Div", "HardSigmoid", "HardSwish", "Tanh", "Softmax", "Gelu", "Elu", "PRelu",
    "Resize", "ReduceMean", "ReduceSum", "ReduceMax", "LpPool", "Sqrt", "Exp",
)  # fmt: skip
"""Operators that Qualcomm's integer processor has."""


@dataclass(frozen=True)
class Placement:
    """Where quantizers stand besides the inputs of layers, and what biases become."""

    operators: tuple[str, ...] = ARITHMETIC
    """Operators other than layers whose inputs are quantized."""
    outputs: bool = True
    """Whether what a quantized node gives is quantized for all of its readers."""
    residual_alone: bool = False
    """Whether of a sum right behind a layer only the other branch is quantized."""
    integer_bias: bool = True
    """Whether biases are int32 behind a DequantizeLinear."""
    by_channel: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    """Layers whose weights may have a scale for each output channel."""


@dataclass(frozen=True)
class RuntimeRules:
    """What a runtime wants of a quantized network."""

    placement: Placement = Placement()
    symmetric: bool = False
    """Whether activations have their zero point in the middle."""
    activation_type: Literal["uint8", "int8"] = "uint8"
    activations: bool = True
    """Whether activations are quantized at all."""
    mixed_operands: bool = True
    """Whether a layer whose weight is quantized may read floats."""
    most_activation_bits: int = 16
    """Bits of activations, at most, that the runtime reads."""


RULES: dict[Runtime, RuntimeRules] = {
    "cpu": RuntimeRules(),
    "cuda": RuntimeRules(activations=False),
    "tensorrt": RuntimeRules(
        Placement(("Add", *POOLS), outputs=False, residual_alone=True, integer_bias=False),
        symmetric=True,
        activation_type="int8",
        mixed_operands=False,
        most_activation_bits=8,
    ),
    "openvino": RuntimeRules(),
    "qnn": RuntimeRules(Placement(QNN, by_channel=("Conv", "ConvTranspose"))),
}
"""Rules by runtime."""
