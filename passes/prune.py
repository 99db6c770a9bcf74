"""Prune weights after training, without data: unstructured, 2:4 or N:M.

 1. BatchNorm and zero pads are folded                                       `_quantize_prepare`
 2. inputs: procedural ones through the twin that has the recorded
    statistics, images, …                                                    `inputs.source`
    the deep layers get many of their own, made to have the recorded
    statistics there, unless there are thousands of images                   `optimize.deep`
 3. how sparse each layer is to be                                           `sparsities`
 4. layer by layer, the student reading its own earlier error: mask and new values of what stays in closed
    form, biases corrected                                                   `optimize.sparsify`, `sparse`
    deep layers with inputs of their own are then tuned together, by
    gradient; their zeros stay                                               `optimize.joint`
 5. how the zeros are stored                                                 `_prune_storage`

`scope`: with "layer" all layers are as sparse as each other. With "global" that differs: reconstructed, a
layer gets what costs the network's output least, tried and measured (or read from `sensitivity`); without,
the smallest of all magnitudes go, made comparable by assumption-free equalization (`equalize`). Its vectors
only choose the zeros: zeros stay zeros when they are folded back, so that no node remains.

Sources: Horton et al. (arXiv 2011.09058) §3.2 to 3.4 for both uses of magnitudes and for layer-wise
reconstruction on generated inputs. Its schedule of rising sparsity over gradient steps is replaced by the
closed form's own: a penalty that rises while the mask settles (`optimize.sparse`).

`sparsity` counts zeros among the weights of all linear layers: what stays dense (biases do not count;
depthwise convolutions, few weights that cost much, unless told otherwise) makes others sparser.

N:M keeps N of each M neighbouring input channels at each place of the kernel, as NVIDIA's sparse tensor
cores read 2:4. Layers whose inputs are no multiple of M stay dense, with the reason.

No speed: onnxruntime computes zeros as any other weight. A sparse file is smaller, on disk only.

Does not handle: several inputs; quantized models (prune first, then quantize); see `quantization.plan` for
the operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxcompress.errors import OptionError
from onnxcompress.inputs.source import (
    InputRequest,
    count_option,
    images_option,
    inputs_option,
    preprocess_option,
)
from onnxcompress.model import Model
from onnxcompress.passes.quantize import QDQ
from onnxcompress.passing import Pass, PassResult, Progress, Refusal, option, silent

LARGE, SMALL = 128, 512
"""Images that are made of a network with large and with small inputs."""
SMALL_PIXELS = 64 * 64


@dataclass(frozen=True)
class Prune(Pass):
    """Set weights to zero and make up for them with the others, without data.

    The file gets smaller (--storage sparse, or compressed); runtimes compute zeros, too: no faster.

    \b
    Example:
      onnxcompress prune net.onnx sparse.onnx --sparsity 0.6
      onnxcompress prune net.onnx two-of-four.onnx --pattern 2:4
    """

    name: ClassVar[str] = "prune"
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    images: str | None = images_option()
    preprocess: str | None = preprocess_option()
    count: int | None = count_option()
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = inputs_option()
    synthetic: int | None = option(
        None, "Images to make; default: 512, of more than 64x64 pixels 128.", metavar="N"
    )
    sparsity: float = option(0.5, "Share of zeros among all weights; an N:M pattern has its own.")
    pattern: str = option(
        "unstructured", "unstructured, or N:M: N of M neighbouring inputs stay (2:4).", metavar="TEXT"
    )
    scope: Literal["global", "layer"] = option(
        "global", "Zeros where they cost least in the whole network, or as many in each layer."
    )
    sensitivity: str | None = option(
        None,
        "With --scope global, what `onnxcompress sensitivity MODEL --sparsity … --json` printed: instead "
        "of measuring.",
        metavar="JSON",
        file="read",
    )
    reconstruct: bool = option(
        True, "New values for the weights that stay; else the smallest go and no inputs are needed."
    )
    depthwise: bool = option(False, "Prune depthwise convolutions, too.")
    skip_first_last: bool = option(False, "Leave the first and last layer dense.")
    storage: Literal["dense", "sparse"] = option(
        "dense", "Zeros as they are, or left out of the file; put back when a runtime loads it."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where torch makes inputs and tunes layers.")
    seed: int = option(0, "Of all draws.")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Prune in place; what cannot be comes back as refusals."""
        self.check()
        if any(node.op in QDQ for node in model.graph.nodes):
            rule = "it is quantized already: it has QuantizeLinear or DequantizeLinear nodes"
            return PassResult(refusals=[Refusal(model.name, rule, "prune the float model, then quantize")])
        from onnxcompress.passes._prune_work import prune

        return prune(self, model, progress)

    def check(self) -> None:
        """Raises OptionError for wrong options."""
        from onnxcompress.sparsities import Pattern

        self.request.check()
        if not 0 < self.sparsity < 1:
            raise OptionError(f"--sparsity {self.sparsity:g}: expected a share between 0 and 1")
        if self.synthetic is not None and self.synthetic < 1:
            raise OptionError(f"--synthetic {self.synthetic}: expected 1 or more")
        pattern = Pattern.parse(self.pattern)
        if pattern is None:
            raise OptionError(f"--pattern {self.pattern!r}: expected unstructured, or N:M with 0 < N < M")
        if self.sensitivity is not None and (self.scope != "global" or pattern.group):
            raise OptionError("--sensitivity goes with --scope global and --pattern unstructured")

    @property
    def request(self) -> InputRequest:
        return InputRequest(
            self.images, self.preprocess, self.count, self.inputs, self.synthetic or LARGE, self.seed
        )
