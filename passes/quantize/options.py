"""The options of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from onnxcompress.errors import OptionError
from onnxcompress.graph.node_selection import SelectionOptions
from onnxcompress.optimize.input_options import InputOptions
from onnxcompress.option_fields import option
from onnxcompress.quantization.runtimes import RULES, Placement, RuntimeRules
from onnxcompress.runtime.timing_options import RuntimeOptions


@dataclass(frozen=True)
class QuantizeOptions(RuntimeOptions, SelectionOptions, InputOptions):
    """What `quantize` is asked for; its fields are the options of the command."""

    for_runtime: Literal["cpu", "cuda", "tensorrt", "openvino", "qnn"] | None = option(
        None,
        "The runtime that will run the file: types, symmetry and places of quantizers become "
        "what it fuses and accepts. Other values than the defaults of --activation-bits, "
        "--activation-type, --symmetric and --float-tensors win.",
        alias="--for",
    )
    only_faster: bool = option(
        False,
        "Leave layers in floats that gain no time on --provider by being quantized, as measured, and cost "
        "accuracy; with 8 bits.",
    )
    weight_bits: int = option(
        8,
        "Bits of the weights: 8 for speed, fewer for a smaller file; with a budget the most that "
        "a layer gets.",
        ge=2,
        le=8,
    )
    activation_bits: int = option(
        8,
        "Bits of what layers read; 0: only weights are quantized, smaller and not faster; 16 as "
        "Qualcomm's processors take them (opset 21).",
        ge=2,
        le=16,
        or_zero=True,
    )
    bits_budget: float | None = option(
        None,
        "Average bits of all weights, at most: each layer gets the bits with which the error is "
        "least. Only --small-types makes the file smaller by it, and has 4 or 8 bits a layer.",
        metavar="BITS",
        ge=2,
        le=8,
    )
    size_budget: float | None = option(
        None, "As --bits-budget, in MB (10⁶ bytes) of all weights, scales not counted.", metavar="MB", ge=0
    )
    steps: int | None = option(
        None,
        "Steps of tuning all layers together where activations have fewer bits than 8; 0: none; the "
        "default depends on --effort.",
        metavar="N",
        ge=0,
    )
    small_types: bool = option(
        False, "Store 4 bits and fewer as int4 and uint4: half the size, where the runtime knows opset 21."
    )
    per_channel: bool = option(
        True, "A scale for each output channel of a weight, or one per tensor, which some runtimes ask for."
    )
    symmetric: bool = option(
        False, "Activations with the zero point in the middle, as TensorRT wants them (with int8)."
    )
    activation_type: Literal["uint8", "int8"] = option(
        "uint8", "Type in which activations are stored; beyond 8 bits uint16 or int16."
    )
    first_last: int = option(
        8,
        "Bits of the first and the last layer, at least; 0: the same as the others.",
        advanced=True,
        ge=2,
        le=8,
        or_zero=True,
    )
    depthwise: int = option(
        8,
        "Bits of depthwise convolutions, at least, where only weights are quantized (they have "
        "few weights, and errors do not average out); 0: the same as the others.",
        advanced=True,
        ge=2,
        le=8,
        or_zero=True,
    )
    sensitivity: str | None = option(
        None,
        "With a budget: the file that `onnxcompress sensitivity MODEL --json` wrote, instead of measuring.",
        metavar="JSON",
        file="read",
        advanced=True,
    )
    weight_type: Literal["int8", "uint8"] = option(
        "int8", "Type in which weights are stored; --for chooses it.", advanced=True
    )
    overflow_safe: bool = option(
        True,
        "Keep pairs of 8-bit weights so small that onnxruntime's kernels for CPUs without VNNI cannot "
        "overflow.",
        advanced=True,
    )
    ranges: Literal["mse", "minmax"] = option(
        "mse",
        "Ranges of activations: those of the least squared error, or from the smallest to the "
        "largest value seen.",
        advanced=True,
    )
    reconstruct: bool = option(
        True,
        "Round weights so that the layer's output is kept; without it each to the nearest value, "
        "faster and worse.",
        advanced=True,
    )
    stretch: bool = option(
        True,
        "Bring the channels between layers to equal ranges first, by factors folded into the layers; not "
        "where activations stay floats.",
        advanced=True,
    )
    copy_shared: bool = option(
        False,
        "Give layers that share a weight copies of their own, also where the file grows by more than 1 %.",
        advanced=True,
    )
    float_tensors: bool = option(
        True,
        "Where the guard would warn of an 8-bit result, leave the few activations in floats that "
        "cost the outputs most.",
        advanced=True,
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device on which torch computes.", advanced=True
    )

    def check(self) -> None:
        """Check all options.

        Raises:
            OptionError: A value is out of range, or options contradict each other.
        """
        super().check()
        if self.activation_bits > (most := self.rules.most_activation_bits):
            raise OptionError(
                f"--for {self.for_runtime} reads activations of {most} bits at most, got --activation-bits "
                f"{self.activation_bits}"
            )
        if self.only_faster and not self.rules.activations:
            raise OptionError(
                f"--only-faster: {self.for_runtime} has no kernels for 8-bit activations; leave it out, or "
                "--for"
            )
        if self.only_faster and self.activation_bits != 8:
            raise OptionError(
                "--only-faster: runtimes have kernels for 8-bit activations alone; leave it out, or give "
                "--activation-bits 8"
            )
        self._check_pairs()
        if self.sensitivity is not None and not self.mixed:
            raise OptionError("--sensitivity: give a budget with it, --bits-budget or --size-budget")

    def _check_pairs(self) -> None:
        """Refuse pairs of types that a runtime which takes every type from the file has no kernels for."""
        if self.rules.mixed_operands:
            return
        small = self.small_types and (self.weight_bits <= 4 or self.mixed)
        if not self.activation_bits and not (small and not self.mixed):
            raise OptionError(
                f"--activation-bits 0: {self.for_runtime} reads no 8-bit weights beside floats; give "
                "--weight-bits 4 --small-types, or --activation-bits 8"
            )
        if self.activation_bits and small:
            raise OptionError(
                f"--small-types: {self.for_runtime} reads no 4-bit weights beside 8-bit activations; leave "
                "it out, or give --activation-bits 0"
            )
        if self.weight_type != "int8":
            raise OptionError(f"--weight-type {self.weight_type}: {self.for_runtime} reads int8 alone")

    def options(self) -> dict[str, Any]:
        """Collect the options as JSON values, for the provenance.

        Returns:
            Option name -> value; without those of the clock where it decides nothing.
        """
        found: dict[str, Any] = super().options()  # type: ignore[misc]
        clocked = () if self.only_faster else [f.name for f in fields(RuntimeOptions)]
        return {name: value for name, value in found.items() if name not in clocked}

    def hints(self) -> list[str]:
        """Suggest options that leave more of the network as it is.

        Returns:
            Options with their values, as on the command line.
        """
        found = ["--effort best"] if self.effort != "best" else []
        found.append("--exclude with the layers that lose most")
        found += ["--weight-bits 8"] if self.weight_bits < 8 else []
        if self.activation_bits:
            found.append("--activation-bits 8" if self.activation_bits < 8 else "--activation-bits 0")
        if not self.images:
            found.append("--images with a hundred real ones")
            found += [f"--inputs {kind}" for kind in ("distilled", "procedural") if kind != self.inputs]
        return found

    @property
    def rules(self) -> RuntimeRules:
        """What the runtime wants."""
        return RULES[self.for_runtime or "cpu"]

    @property
    def placement(self) -> Placement:
        """Where quantizers stand besides the inputs of layers."""
        return self.rules.placement

    def runtime_options(self) -> dict[str, Any]:
        """Choose the values that the runtime wants, for options that are at their default.

        Returns:
            Values by name of the option.
        """
        rules, defaults = self.rules, {f.name: f.default for f in fields(self)}
        wanted = {
            "symmetric": rules.symmetric,
            "activation_type": rules.activation_type,
            "activation_bits": 8 if rules.activations else 0,
            "float_tensors": rules.mixed_operands,
        }
        return {name: value for name, value in wanted.items() if getattr(self, name) == defaults[name]}

    @property
    def mixed(self) -> bool:
        """Whether layers get bits of their own, under a budget."""
        return self.bits_budget is not None or self.size_budget is not None

    @property
    def saturation_safe(self) -> bool:
        """Whether pairs of 8-bit weights stay small (`optimize.reconstruction.saturation`)."""
        if self.activation_bits > 8:  # computed with floats
            return False
        return self.overflow_safe and (self.weight_type, self.activation_type) == ("int8", "uint8")
