"""Prune weights after training, without data: unstructured, 2:4 or N:M.

 1. BatchNorm and zero pads are folded                                       `fold_and_canonicalize`
 2. inputs: procedural ones through the network with aligned
    statistics, images, …                                                    `optimize.calibration`
    the deep layers get many of their own, made to have the recorded
    statistics there, unless there are thousands of images                   `feature_inputs`
 3. how sparse each layer is to be                                           `sparsity_allocation`
 4. layer by layer, on inputs with the errors of earlier layers: the
    mask and new values of what stays in closed form, biases corrected       `reconstruction.prune`
    deep layers with inputs of their own are then tuned together, by
    gradient; their zeros stay                                               `reconstruction.global_tuning`
 5. how the zeros are stored                                                 `passes.prune.sparse_storage`

`scope`: with "layer" all layers are as sparse as each other. With "global" that differs: reconstructed, a
layer gets what costs the network's output least, tried and measured (or read from `sensitivity`); without,
the smallest of all magnitudes go, made comparable by assumption-free equalization (`equalize`). Its vectors
only choose the zeros: zeros stay zeros when they are folded back, so that no node remains.

Sources: Horton et al. (arXiv 2011.09058) §3.2 to 3.4 for both uses of magnitudes and for layer-wise
reconstruction on generated inputs. Its schedule of rising sparsity over gradient steps is replaced by the
closed form's own: a penalty that rises while the mask settles (`optimize.reconstruction.admm_mask`).

`sparsity` counts zeros among the weights of all linear layers: what stays dense (biases do not count;
depthwise convolutions, few weights that cost much, unless told otherwise) makes others sparser.

N:M keeps N of each M neighbouring input channels at each place of the kernel, as NVIDIA's sparse tensor
cores read 2:4. Layers whose inputs are no multiple of M stay dense, with the reason.

No speed: onnxruntime computes zeros as any other weight. A sparse file is smaller, on disk only.

Does not handle: several inputs; quantized models (prune first, then quantize). `quantization.qdq_plan` says
which operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcompress.account import Figures, Refusal
from onnxcompress.evaluation.guard import LOSSY, Floors
from onnxcompress.graph.batch_norm import OLDEST_OPSET
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import assume_sizes
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.opsets import at_opset
from onnxcompress.passes.preview import check_inputs, raised
from onnxcompress.passes.prune.figures import PruneFigures
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.quantized_models import refuse_quantized

SPARSE_OPSET = 11
"""Operator set from which on there is CumSum, which puts the zeros back."""


QUANTIZED = "prune the float model, then quantize"
"""What to do with a model that is quantized already."""


@dataclass(frozen=True)
class Prune(PruneOptions, Pass):
    """Set weights to zero and make up for them with the others, with images or without.

    For a smaller file (--storage sparse, or compressed). No runtime gets faster by it: zeros are
    multiplied, too. To be faster, drop blocks or channels.

    \b
    Example:
      onnxcompress prune net.onnx sparse.onnx --sparsity 0.6
      onnxcompress prune net.onnx two-of-four.onnx --pattern 2:4
    """

    name: ClassVar[str] = "prune"
    figures: ClassVar[type[Figures]] = PruneFigures
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    floors: ClassVar[Floors] = LOSSY
    timed: ClassVar[bool] = True

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[PruneFigures | None]:
        """Prune the model in place.

        Args:
            model: The model.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The changes, the layers that stay dense with the reasons, and the figures; none of these where
            there is nothing to do.

        Raises:
            OptionError: The options contradict each other, or too few weights may become 0.
            CompressError: The inputs cannot be gathered, or the model cannot be handled.
        """
        self.check()
        if refusal := refuse_quantized(model, QUANTIZED):
            return PassResult(refusals=[refusal])
        return at_opset(model, self.lowest_opset, lambda own: self._prune(own, progress))

    def _prune(self, model: Model, progress: Progress) -> PassResult[PruneFigures | None]:
        from onnxcompress.passes.prune.engine import prune

        assume_sizes(model, self.request)
        return prune(self, model, progress)

    def no_gain_on(self, provider: str, batch: int) -> str:
        """Say why the result is not expected to be faster, where that is known before the work.

        Args:
            provider: Short name of onnxruntime's execution provider.
            batch: Images in a run.

        Returns:
            One sentence; empty where it may be faster.
        """
        if provider == "tensorrt" and self.pattern == "2:4":
            return ""
        return (
            "zeros are computed as any other weight: the file compresses better, the network is not faster"
        )

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List the layers that would stay dense; check the sparsity and that inputs can be gathered.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            The layers that would stay dense, with the reasons.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        self.check()
        if refusal := refuse_quantized(model, QUANTIZED):
            return [refusal]
        from onnxcompress.passes.prune.engine import layers_of
        from onnxcompress.passes.prune.work import preview_work

        own = raised(model, self.lowest_opset)
        assume_sizes(own, self.request)
        fold_and_canonicalize(own, self.copy_shared)
        self.selection.check(model, own)
        refusals, work = layers_of(self, own)
        if work and self.reconstruct:
            check_inputs(own, self.request)
            preview_work(self, own, progress)
        return refusals

    @property
    def lowest_opset(self) -> int:
        """The lowest operator set that has what these options write, and that can be learned from."""
        return SPARSE_OPSET if self.storage == "sparse" else OLDEST_OPSET
