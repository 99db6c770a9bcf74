"""Operators that act on each element: arithmetic, comparison, logic, activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import Kernel, Op, Site, plain


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers are rounded towards zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(site: Site) -> Kernel:
    """Build the kernel of Pow; the result has the type of the base."""
    exponent = site.scalar(1)
    if exponent is not None and site.constants[1].ndim == 0:  # type: ignore[union-attr]
        return lambda a, _: torch.pow(a, exponent).to(a.dtype)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        if not a.is_floating_point() and b.is_floating_point():
            return torch.pow(a.double(), b.double()).to(a.dtype)
        return torch.pow(a, b).to(a.dtype)

    return kernel


def _modulo(site: Site) -> Kernel:
    """Build the kernel of Mod."""
    return torch.fmod if site.flag("fmod") else torch.remainder


def _shift(site: Site) -> Kernel:
    """Build the kernel of BitShift."""
    left = site.text("direction") == "LEFT"
    return torch.bitwise_left_shift if left else torch.bitwise_right_shift


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    """Define an operator that reduces any number of inputs by a binary function."""
    return plain(lambda *tensors: reduce(function, tensors))


def _mean(*tensors: Tensor) -> Tensor:
    """Average the inputs."""
    return reduce(torch.add, tensors) / len(tensors)


def _between(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Clamp like `torch.clamp`, with a faster gradient, which is 0 at the bounds, as for Relu."""
    if low is None and high is None:
        return x
    if low is None or high is None or low > high or not x.is_floating_point():
        return torch.clamp(x, low, high)
    return F.hardtanh(x, low, high)


def _clip(site: Site) -> Kernel:
    """Build the kernel of Clip: bounds are attributes before opset 11, optional inputs from then on."""
    if site.opset < 11:
        low, high = site.attributes.get("min"), site.attributes.get("max")
        return lambda x: _between(x, low, high)
    if all(not site.has(i) or site.scalar(i) is not None for i in (1, 2)):
        low, high = site.scalar(1), site.scalar(2)
        return lambda x, *_: _between(x, low, high)

    def kernel(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        if low is not None:
            x = torch.maximum(x, low.to(x.dtype).reshape(()))
        return x if high is None else torch.minimum(x, high.to(x.dtype).reshape(()))

    return kernel


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Apply PRelu with a slope that broadcasts."""
    return torch.where(x >= 0, x, x * slope)


def _leaky_relu(site: Site) -> Kernel:
    """Build the kernel of LeakyRelu."""
    alpha = site.real("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


def _elu(site: Site) -> Kernel:
    """Build the kernel of Elu."""
    alpha = site.real("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def _celu(site: Site) -> Kernel:
    """Build the kernel of Celu."""
    alpha = site.real("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


def _selu(site: Site) -> Kernel:
    """Build the kernel of Selu."""
    alpha = site.real("alpha", 1.67326319217681884765625)
    gamma = site.real("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


def _hard_sigmoid(site: Site) -> Kernel:
    """Build the kernel of HardSigmoid: alpha · x + beta, clamped to [0, 1]."""
    alpha, beta = site.real("alpha", 0.2), site.real("beta", 0.5)
    return lambda x: _between(alpha * x + beta, 0.0, 1.0)


def _thresholded_relu(site: Site) -> Kernel:
    """Build the kernel of ThresholdedRelu."""
    alpha = site.real("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def _shrink(site: Site) -> Kernel:
    """Build the kernel of Shrink."""
    bias, lambd = site.real("bias"), site.real("lambd", 0.5)

    def kernel(x: Tensor) -> Tensor:
        inner = torch.where(x > lambd, x - bias, torch.zeros_like(x))
        return torch.where(x < -lambd, x + bias, inner).to(x.dtype)

    return kernel


def _gelu(site: Site) -> Kernel:
    """Build the kernel of Gelu."""
    approximate = site.text("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def _swish(site: Site) -> Kernel:
    """Build the kernel of Swish."""
    alpha = site.real("alpha", 1.0)
    return F.silu if alpha == 1.0 else lambda x: x * torch.sigmoid(alpha * x)


def _is_inf(site: Site) -> Kernel:
    """Build the kernel of IsInf."""
    negative, positive = site.flag("detect_negative", True), site.flag("detect_positive", True)
    if negative and positive:
        return torch.isinf
    if not negative and not positive:
        return lambda x: torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf if positive else torch.isneginf


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Select elements by a condition."""
    return torch.where(condition, x, y)


_UNARY: dict[str, Kernel] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": lambda x: F.softplus(x, threshold=40.0),
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

_BINARY: dict[str, Kernel] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Div": _divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": _prelu,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}

OPS: dict[str, Op] = {
    **{name: plain(function) for name, function in _UNARY.items()},
    **{name: plain(function) for name, function in _BINARY.items()},
    "BitShift": Op(_shift),
    "Celu": Op(_celu),
    "Clip": Op(_clip),
    "Elu": Op(_elu),
    "Gelu": Op(_gelu),
    "HardSigmoid": Op(_hard_sigmoid),
    "IsInf": Op(_is_inf),
    "LeakyRelu": Op(_leaky_relu),
    "Max": _variadic(torch.maximum),
    "Mean": plain(_mean),
    "Min": _variadic(torch.minimum),
    "Mod": Op(_modulo),
    "Pow": Op(_power),
    "Selu": Op(_selu),
    "Shrink": Op(_shrink),
    "Sum": _variadic(torch.add),
    "Swish": Op(_swish),
    "ThresholdedRelu": Op(_thresholded_relu),
    "Where": plain(_where),
}
