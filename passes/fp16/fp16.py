"""Half precision: weights and tensors in float16, but for the nodes that measurably suffer from it.

 1. BatchNorm is folded: onnxruntime would fold it later, in float16           `fold_bn`
 2. which nodes can be computed in float16                                    `candidates`
 3. inputs: images, or made ones                                              `optimize.calibration`
 4. float16 is simulated node by node, and what makes the outputs' error
    exceed `max_error` stays float32                                          `error_search`
 5. the model is written, with Casts between the types                        `convert`
 6. the result runs in onnxruntime, on the provider that is named: its error there

Inputs and outputs stay float32 unless `float16_io` is set, so that callers notice nothing. A GPU with
tensor cores runs the result faster; a CPU computes it in float32, with Casts, and is slower. TensorRT 10
chooses its own precisions with `--provider-options fp16=on`; TensorRT 11 takes them from the file.

A quantized model keeps its integers and gets float16 around them (`quantized`), in opset 19 or later.

Does not handle: several inputs, or inputs that are no images; bodies of If, Loop and Scan; models of 2 GB
and more.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from onnxcompress.account import Change, Figures, InputSource, Refusal
from onnxcompress.errors import CompressWarning, InputError, ModelError
from onnxcompress.evaluation.accuracy import image_input
from onnxcompress.formatting import counted
from onnxcompress.graph.node_selection import SelectionOptions
from onnxcompress.graph.reshape_targets import batch_free_targets
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, assume_sizes, gather_inputs
from onnxcompress.optimize.input_options import ImageOptions
from onnxcompress.option_fields import PROVIDER_HELP, option, provider_options_option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fp16.candidates import FLOAT, HALF, Candidate, candidates, element_types
from onnxcompress.passes.fp16.constants import make_plain, stored_halves
from onnxcompress.passes.fp16.convert import convert
from onnxcompress.passes.fp16.error_search import Float32Nodes, Simulation, choose, worst_error
from onnxcompress.passes.fp16.figures import HalfPrecisionFigures, KeptNode, ProviderRun
from onnxcompress.passes.fp16.quantized import MAX_ERROR, MISCOMPUTED, QUANTIZED_ERROR
from onnxcompress.passes.opsets import at_opset
from onnxcompress.passes.preview import check_inputs, raised
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.quantized_models import is_quantized
from onnxcompress.runtime.inference import or_one_by_one, unread_feeds
from onnxcompress.runtime.providers import Provider

if TYPE_CHECKING:
    import onnx

    from onnxcompress.optimize.calibration import Inputs

OPSET = 9
"""From which on there is Where, by which float16 is switched on and off when it is measured."""
QDQ_OPSET = 19
"""From which on scales of QuantizeLinear and DequantizeLinear may be float16."""
FARTHER = (
    "where it ran, the outputs' error is {:.3g} %, more than was asked for and foreseen: compare the file "
    "there before you use it, or give a smaller --max-error"
)
IMAGES, BATCH = 16, 4
"""Images that are measured on, at most, and how many at once where the file leaves it open."""


@dataclass(frozen=True)
class HalfPrecision(SelectionOptions, ImageOptions, Pass):
    """Compute in half precision (float16), but for the nodes that measurably suffer from it.

    Inputs and outputs stay float32. It is for GPUs: a CPU computes the result in float32 and is slower.

    \b
    Example:
      onnxcompress fp16 net.onnx half.onnx
      onnxcompress fp16 net.onnx half.onnx --images photos/ --preprocess imagenet --max-error 0.002
    """

    name: ClassVar[str] = "fp16"
    figures: ClassVar[type[Figures]] = HalfPrecisionFigures
    timed: ClassVar[bool] = True

    inputs: Literal["auto", "images", "distilled", "procedural"] = option(
        "auto", "What to measure on; auto: --images if given, else procedural ones, made at once."
    )
    max_error: float | None = option(
        None,
        "Largest error of an output: root mean square of the difference over the output's "
        "deviation; smaller keeps more nodes in float32.  "
        "[default: 0.01; of a quantized network 0.1]",
        gt=0,
        lt=1,
    )
    float16_io: bool = option(
        False, "Make the inputs and outputs float16, too, where the program around the model feeds them so."
    )
    provider: str = option("auto", PROVIDER_HELP, metavar="NAME")
    provider_options: tuple[str, ...] = provider_options_option()
    threads: int = option(0, "CPU threads of onnxruntime; 0: all cores.", advanced=True, ge=0)

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[HalfPrecisionFigures | None]:
        """Convert in place.

        Args:
            model: The model to change.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The nodes that compute in float16, those that stay float32 with the reasons, and the figures;
            none of these where no node can be converted.

        Raises:
            OptionError: Options contradict each other.
            InputError: The images cannot be used.
            ModelError: onnxruntime or the converter cannot handle the model.
        """
        self.check()
        if refusal := _whole(model):
            return PassResult(refusals=[refusal])
        return at_opset(model, _lowest_opset(model), lambda own: self._convert(own, progress))

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List the nodes that cannot be computed in float16, and check that inputs can be gathered.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            The nodes, with the reasons.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        self.check()
        if refusal := _whole(model):
            return [refusal]
        own = raised(model, _lowest_opset(model))
        assume_sizes(own, self.request)
        make_plain(own)
        self.selection.check(model, own)
        nodes, cannot = candidates(own.to_proto(), self.selection)
        if nodes:
            check_inputs(own, self.request)
        return [Refusal(name, why) for name, why in cannot]

    def _convert(self, model: Model, progress: Progress) -> PassResult[HalfPrecisionFigures | None]:
        assume_sizes(model, self.request)
        start = time.perf_counter()
        folded = model.copy()
        make_plain(folded)
        count = FoldBatchNorm().apply(folded).measured.folded
        self.selection.check(model, folded)
        nodes, cannot = candidates(proto := folded.to_proto(), self.selection)
        refusals = [Refusal(name, why) for name, why in cannot]
        if not nodes:
            return PassResult(refusals=refusals)
        inputs = gather_inputs(model, self.request, progress=progress)
        simulation = or_one_by_one(
            lambda batch: Simulation(
                proto, nodes, _batches(model, inputs, batch), self.threads, half_ends=self.float16_io
            ),
            BATCH,
        )
        bound = self._bound(model)
        if simulation.ends_error > bound:
            raise ModelError(
                f"{model.name}: float16 inputs and outputs alone make an error of "
                f"{100 * simulation.ends_error:.2g} %, {100 * bound:g} % is allowed; leave --float16-io "
                "out, or give a larger --max-error"
            )
        choice = choose(simulation, bound, progress)
        kept = set(choice.kept)
        half = [c for i, c in enumerate(nodes) if i not in kept]
        changes = [Change(c.name, "computed in float16") for c in half]
        runtime = None
        if half:
            converted = convert(proto, {c.index for c in half}, keep_io=not self.float16_io)
            runtime = self._runtime(converted, simulation)
            if runtime.error > 2 * bound:
                text = MISCOMPUTED if is_quantized(model) else FARTHER
                warnings.warn(text.format(100 * runtime.error), CompressWarning, stacklevel=2)
            if self.float16_io and (stay := _float_ends(converted)):
                warnings.warn(
                    f"--float16-io: {', '.join(map(repr, stay))}: float32 as before (bodies of If, Loop or "
                    "Scan read them, or several inputs are joined)",
                    CompressWarning,
                    stacklevel=2,
                )
            model.become(Model.from_proto(converted, model.name))
            changes += [Change(model.name, f"{counted(count, 'BatchNorm')} folded")] * bool(count)
        figures = HalfPrecisionFigures(
            error=choice.error,
            all_float16=choice.whole,
            max_error=bound,
            converted=len(half),
            kept_float32=tuple(KeptNode(nodes[i].name, nodes[i].op, choice.alone[i]) for i in choice.kept),
            total_seconds=time.perf_counter() - start,
            runtime=runtime,
            inputs=tuple(map(self._explained, inputs.sources)),
        )
        return PassResult(changes, refusals + _kept(nodes, choice, bound), figures, inputs.shown)

    def no_gain_on(self, provider: str, batch: int) -> str:
        """Say why the result is not expected to be faster, where that is known before the work.

        Args:
            provider: Short name of onnxruntime's execution provider.
            batch: Images in a run.

        Returns:
            One sentence; empty where it may be faster.
        """
        if provider == "cpu":
            return (
                "a CPU computes float16 in float32, with Casts: the file is smaller, the network not faster"
            )
        if provider == "cuda" and batch == 1:
            return (
                "at batch 1 small networks on cuda wait for kernels to start, which float16 does not make "
                "shorter (7 % slower on an H100); --latency-batch 8 shows what larger batches gain"
            )
        return ""

    def check(self) -> None:
        """Check all options.

        Raises:
            OptionError: A value is out of range.
        """
        super().check()
        self.runs_on  # noqa: B018  it checks itself

    def hints(self) -> list[str]:
        """Suggest options that leave more of the network as it is.

        Returns:
            Options with their values, as on the command line.
        """
        return [f"--max-error {(self.max_error or MAX_ERROR) / 10:g}"]

    def _bound(self, model: Model) -> float:
        """Return the largest error of an output that is allowed."""
        return self.max_error or (QUANTIZED_ERROR if is_quantized(model) else MAX_ERROR)

    @property
    def runs_on(self) -> Provider:
        """Where the result is run. Raises OptionError."""
        return Provider.of(self.provider, self.provider_options)

    @property
    def request(self) -> InputRequest:
        """What to measure on: `auto` makes procedural images."""
        kind = "procedural" if self.inputs == "auto" and self.images is None else self.inputs
        return replace(super().request, inputs=kind, synthetic=IMAGES)

    def _explained(self, source: InputSource) -> InputSource:
        """Give the reason for inputs that nobody asked for."""
        auto = self.inputs == "auto" and self.images is None
        return replace(source, why="no --images; a few that are made at once do") if auto else source

    def _runtime(self, converted: onnx.ModelProto, simulation: Simulation) -> ProviderRun:
        """Run the result on the provider that the options name, and compare the outputs."""
        from onnxcompress.errors import one_line
        from onnxcompress.runtime.session import pick_provider, session

        chosen = pick_provider(self.runs_on)
        opened = session(converted, provider=chosen, threads=self.threads)
        fed, others = image_input(converted).name, unread_feeds(converted)
        outputs = opened.get_outputs()
        floats = [o.name for o in outputs if o.type in ("tensor(float)", "tensor(float16)")]
        names = floats or [o.name for o in outputs]
        exact = simulation.exact_values(names)
        kind = image_input(converted).dtype
        try:
            found = [opened.run(names, {fed: _in_type(x, kind), **others}) for x in simulation.batches]
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(
                f"the float16 model does not run on {chosen.text} ({one_line(error)})"
            ) from error
        return ProviderRun(chosen.text, worst_error(exact, found))


def _float_ends(proto: onnx.ModelProto) -> list[str]:
    """List the inputs and outputs that are float32."""
    weights = {t.name for t in proto.graph.initializer}
    ends = [*proto.graph.input, *proto.graph.output]
    return [e.name for e in ends if e.type.tensor_type.elem_type == FLOAT and e.name not in weights]


def _lowest_opset(model: Model) -> int:
    """Return the lowest operator set that has what the pass writes, and what it measures with."""
    return QDQ_OPSET if is_quantized(model) else OPSET


def _whole(model: Model) -> Refusal | None:
    """Why nothing of the model is converted."""
    proto = model.skeleton()
    stored = {cast.inputs[0].name for cast, _ in stored_halves(model)}
    halves = [name for name, kind in element_types(proto).items() if kind == HALF and name not in stored]
    if halves:
        return Refusal(model.name, f"it is in half precision already: {halves[0]!r} is float16")
    return None


def _in_type(x: np.ndarray, kind: np.dtype[Any]) -> np.ndarray:
    """What the converted model is fed: inputs of other types than float32 stay as they are."""
    return x.astype(kind) if x.dtype == np.float32 else x


def _kept(nodes: Sequence[Candidate], choice: Float32Nodes, bound: float) -> list[Refusal]:
    return [
        Refusal(
            nodes[i].name,
            f"{nodes[i].op} stays float32: alone in float16 it makes an error of {choice.alone[i]:.2g}"
            + ", together with others more than is allowed" * (choice.alone[i] < bound),
            "a larger --max-error",
        )
        for i in choice.kept
    ]


def _batches(model: Model, inputs: Inputs, batch: int) -> list[np.ndarray]:
    """Some of the images, in whole batches. Raises InputError where there is none."""
    shape = image_input(model).shape
    fixed = shape[0] if shape and isinstance(shape[0], int) else None
    size = fixed or (1 if batch_free_targets(model) else batch)
    images = inputs.images.spread(max(IMAGES, size))
    found = [x for x in images.batches(size) if fixed is None or len(x) == fixed]
    if not found:
        raise InputError(f"{model.name}: the file fixes a batch of {fixed}, there are {len(images)} images")
    return found
