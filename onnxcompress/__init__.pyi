# Written by `python -m onnxcompress.api.stubs`; a test holds it to the passes.
import os
from collections.abc import Sequence
from typing import Any, Literal

from onnxcompress.account import Figures
from onnxcompress.api.results import Compressed as Compressed
from onnxcompress.api.compressing import run as run
from onnxcompress.api.making import synthesize as synthesize
from onnxcompress.api.measuring import benchmark as benchmark
from onnxcompress.api.measuring import compare as compare
from onnxcompress.api.measuring import evaluate as evaluate
from onnxcompress.api.measuring import inspect as inspect
from onnxcompress.api.measuring import layer_sensitivity as layer_sensitivity
from onnxcompress.api.searching import search_best as search_best
from onnxcompress.api.searching import sweep as sweep
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.optimize.channel_drop.figures import DropChannelsFigures
from onnxcompress.passes.absorb_bias.absorb_bias import AbsorbBiasFigures
from onnxcompress.passes.calibrate import CalibrateFigures
from onnxcompress.passes.correct_bias.correct_bias import CorrectBiasFigures
from onnxcompress.passes.equalize.equalize import EqualizeFigures
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNormFigures
from onnxcompress.passes.fp16.figures import HalfPrecisionFigures
from onnxcompress.passes.prune.figures import PruneFigures
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.evaluation.guard import Guard
from onnxcompress.pipeline.cache import Cache
from onnxcompress.progress import Progress
from onnxcompress.runtime.timing_options import TimingOptions
from onnxcompress.torch_export import export as export
from onnxcompress.version import __version__ as __version__

def fold_bn(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    copy_shared: bool = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[FoldBatchNormFigures]: ...

def calibrate(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    images: str | os.PathLike[str] | None = ...,
    preprocess: str | None = ...,
    count: int | None = ...,
    input_shape: str | None = ...,
    seed: int = ...,
    inputs: Literal['auto', 'images', 'distilled', 'procedural'] = ...,
    synthetic: int | None = ...,
    effort: Literal['auto', 'fast', 'balanced', 'best'] = ...,
    overwrite: bool = ...,
    batch: int = ...,
    device: Literal['auto', 'cpu', 'cuda'] = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[CalibrateFigures]: ...

def equalize(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    clip: Literal['keep', 'per-channel'] = ...,
    assumption_free: bool = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[EqualizeFigures]: ...

def absorb_bias(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    deviations: float = ...,
    approximate: bool = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[AbsorbBiasFigures]: ...

def correct_bias(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    images: str | os.PathLike[str] | None = ...,
    preprocess: str | None = ...,
    count: int | None = ...,
    input_shape: str | None = ...,
    seed: int = ...,
    inputs: Literal['record', 'layerwise', 'images', 'distilled', 'procedural'] = ...,
    synthetic: int | None = ...,
    effort: Literal['auto', 'fast', 'balanced', 'best'] = ...,
    reference: str | os.PathLike[str] = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[CorrectBiasFigures]: ...

def drop_blocks(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    images: str | os.PathLike[str] | None = ...,
    preprocess: str | None = ...,
    count: int | None = ...,
    input_shape: str | None = ...,
    seed: int = ...,
    inputs: Literal['auto', 'images', 'distilled', 'procedural', 'layerwise'] = ...,
    synthetic: int | None = ...,
    effort: Literal['auto', 'fast', 'balanced', 'best'] = ...,
    provider: str = ...,
    latency_batch: int = ...,
    provider_options: Sequence[str] = ...,
    threads: int = ...,
    latency_reduction: float | None = ...,
    steps: int | None = ...,
    time: str | None = ...,
    feature: str | None = ...,
    batch: int | None = ...,
    learning_rate: float | None = ...,
    device: Literal['auto', 'cpu', 'cuda'] = ...,
    capture: bool = ...,
    blocks: int | None = ...,
    drop: Sequence[str] = ...,
    scores: str | os.PathLike[str] | None = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[DropBlocksFigures]: ...

def drop_channels(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    images: str | os.PathLike[str] | None = ...,
    preprocess: str | None = ...,
    count: int | None = ...,
    input_shape: str | None = ...,
    seed: int = ...,
    inputs: Literal['auto', 'images', 'distilled', 'procedural', 'layerwise'] = ...,
    synthetic: int | None = ...,
    effort: Literal['auto', 'fast', 'balanced', 'best'] = ...,
    provider: str = ...,
    latency_batch: int = ...,
    provider_options: Sequence[str] = ...,
    threads: int = ...,
    latency_reduction: float | None = ...,
    steps: int | None = ...,
    time: str | None = ...,
    feature: str | None = ...,
    batch: int | None = ...,
    learning_rate: float | None = ...,
    device: Literal['auto', 'cpu', 'cuda'] = ...,
    capture: bool = ...,
    macs_reduction: float | None = ...,
    channels_kept: Sequence[str] = ...,
    criterion: Literal['refit', 'group-norm', 'magnitude'] = ...,
    width_step: int = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[DropChannelsFigures]: ...

def prune(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    images: str | os.PathLike[str] | None = ...,
    preprocess: str | None = ...,
    count: int | None = ...,
    input_shape: str | None = ...,
    seed: int = ...,
    inputs: Literal['auto', 'images', 'distilled', 'procedural', 'layerwise'] = ...,
    synthetic: int | None = ...,
    effort: Literal['auto', 'fast', 'balanced', 'best'] = ...,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    sparsity: float = ...,
    pattern: str = ...,
    storage: Literal['dense', 'sparse'] = ...,
    skip_first_last: bool = ...,
    depthwise: bool = ...,
    scope: Literal['global', 'layer'] = ...,
    sensitivity: str | os.PathLike[str] | None = ...,
    reconstruct: bool = ...,
    copy_shared: bool = ...,
    device: Literal['auto', 'cpu', 'cuda'] = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[PruneFigures]: ...

def quantize(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    images: str | os.PathLike[str] | None = ...,
    preprocess: str | None = ...,
    count: int | None = ...,
    input_shape: str | None = ...,
    seed: int = ...,
    inputs: Literal['auto', 'images', 'distilled', 'procedural', 'layerwise'] = ...,
    synthetic: int | None = ...,
    effort: Literal['auto', 'fast', 'balanced', 'best'] = ...,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    provider: str = ...,
    latency_batch: int = ...,
    provider_options: Sequence[str] = ...,
    threads: int = ...,
    for_runtime: Literal['cpu', 'cuda', 'tensorrt', 'openvino', 'qnn'] | None = ...,
    only_faster: bool = ...,
    weight_bits: int = ...,
    activation_bits: int = ...,
    bits_budget: float | None = ...,
    size_budget: float | None = ...,
    steps: int | None = ...,
    small_types: bool = ...,
    per_channel: bool = ...,
    symmetric: bool = ...,
    activation_type: Literal['uint8', 'int8'] = ...,
    first_last: int = ...,
    depthwise: int = ...,
    sensitivity: str | os.PathLike[str] | None = ...,
    weight_type: Literal['int8', 'uint8'] = ...,
    overflow_safe: bool = ...,
    ranges: Literal['mse', 'minmax'] = ...,
    reconstruct: bool = ...,
    stretch: bool = ...,
    copy_shared: bool = ...,
    float_tensors: bool = ...,
    device: Literal['auto', 'cpu', 'cuda'] = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[QuantizeFigures]: ...

def fp16(
    model: Any,
    out: str | os.PathLike[str] | None = ...,
    *,
    images: str | os.PathLike[str] | None = ...,
    preprocess: str | None = ...,
    count: int | None = ...,
    input_shape: str | None = ...,
    seed: int = ...,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    inputs: Literal['auto', 'images', 'distilled', 'procedural'] = ...,
    max_error: float | None = ...,
    float16_io: bool = ...,
    provider: str = ...,
    provider_options: Sequence[str] = ...,
    threads: int = ...,
    guard: Guard | None = ...,
    timing: TimingOptions | None = ...,
    cache: Cache | None = ...,
    progress: Progress = ...,
) -> Compressed[HalfPrecisionFigures]: ...
