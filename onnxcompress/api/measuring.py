"""Calls that look at models and measure them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from onnxcompress.api.models import like, model_of
from onnxcompress.api.results import Accuracy, Benchmark, Comparison, Inspection, Sensitivity, shown
from onnxcompress.errors import OptionError
from onnxcompress.evaluation import accuracy as accuracies
from onnxcompress.evaluation.compare import compare as compare_models
from onnxcompress.evaluation.inspection import chain_shares, inspect_model
from onnxcompress.model.model_like import display_names, input_specs, label, model_bytes
from onnxcompress.progress import Progress, silent
from onnxcompress.report.run_data import File, Material
from onnxcompress.runtime import latency
from onnxcompress.runtime.providers import ProviderLike


def inspect(model: Any, *, input_shape: str | None = None) -> Inspection:
    """Look at a model: inputs, size, operators, blocks that can be dropped, channels that can be cut.

    Args:
        model: A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`.
        input_shape: Sizes of an input that the file leaves open, as `images=1x3x320x320`.

    Returns:
        What it is made of.

    Raises:
        ModelError: It cannot be read.
        OptionError: The sizes contradict it.
    """
    from onnxcompress.errors import ModelError
    from onnxcompress.optimize.calibration import InputRequest, assume_sizes

    read = model_of(model).copy()
    try:
        fed = bool(input_specs(read))
    except ModelError:  # less is shown of models whose inputs have types that cannot be fed
        fed = False
    if input_shape is not None or fed:
        assume_sizes(read, InputRequest(input_shape=input_shape))
    found = inspect_model(read, _name(model), model_bytes(like(model)))
    account = found.as_dict() | chain_shares(read, found, None).as_dict(found.chain)
    return shown(Inspection, found, _material("inspect", account, model))


def benchmark(
    *models: Any,
    batch: int = 1,
    provider: ProviderLike = "auto",
    threads: int = 0,
    runs: int | None = None,
    seconds: float | None = None,
    tolerance: float | None = 0.01,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = silent,
) -> Benchmark:
    """Measure latency in onnxruntime, models interleaved run by run.

    Args:
        models: Paths, ModelProtos or their bytes, `Model`s, or `onnx_ir.Model`s.
        batch: Images per run.
        provider: The execution provider.
        threads: Threads of one operator; 0: all cores.
        runs: Number of timed rounds; None: as many as `seconds` and `tolerance` allow.
        seconds: Time limit; 10 where neither `runs` nor `seconds` is given.
        tolerance: Precision at which timing stops; None: it uses all of `seconds`.
        seed: Random seed.
        shapes: Whole shapes by input name.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The timings by name, and the ratio of each to the first with its 95 % interval.

    Raises:
        CompressError: As `onnxcompress.runtime.latency.benchmark`.
    """
    forms = [like(model) for model in models]
    timings = latency.benchmark(
        dict(zip(_names(models), forms, strict=True)),
        batch=batch,
        provider=provider,
        threads=threads,
        runs=runs,
        seconds=seconds,
        tolerance=tolerance,
        seed=seed,
        shapes=shapes,
        progress=progress,
    )
    first, *others = timings.values()
    ratios = {one.name: latency.ratio(first, one) for one in others}
    account = {
        "models": [one.as_dict() for one in timings.values()],
        "ratios_to_first": {name: asdict(ratio) for name, ratio in ratios.items()},
    }
    samples = {name: one.samples_ms for name, one in timings.items()}
    told = _material("benchmark", account, *models, samples=samples)
    return shown(Benchmark, {"timings": timings, "ratios": ratios}, told)


def evaluate(
    model: Any,
    images: str | os.PathLike[str],
    *,
    preprocess: str | None = None,
    count: int | None = None,
    seed: int = 0,
    input_shape: str | None = None,
    output: str | None = None,
    provider: ProviderLike = "auto",
    batch: int = 64,
    threads: int = 0,
    progress: Progress = silent,
) -> Accuracy:
    """Measure top-1 and top-5 accuracy on labelled images.

    Args:
        model: A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`.
        images: A folder of images whose subfolders are the classes, or an .npz with x and y.
        preprocess: As --preprocess; None: what the model's metadata has, else unit.
        count: Use this many of the images, drawn with the seed.
        seed: Random seed.
        input_shape: Sizes of an input that the file leaves open.
        output: Name of the output with the scores; None: the first of that form.
        provider: The execution provider.
        batch: Images per run.
        threads: Threads of one operator; 0: all cores.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The accuracy.

    Raises:
        CompressError: The images or their labels cannot be used, or the model cannot be run on them.
    """
    from onnxcompress.data.image_set import load_images

    form, path = like(model), os.fspath(images)
    choice = accuracies.preprocessing(form, preprocess, input_shape)
    loaded = load_images(
        path, preprocess=choice.preprocess, count=count, seed=seed, labels=True, progress=progress
    )
    found = accuracies.evaluate(
        form, loaded, provider=provider, batch=batch, threads=threads, output=output, progress=progress
    )
    given = {"model": _name(model), "images": path, **choice.as_dict()}
    account = {**given, **asdict(found), "top1_interval": list(found.interval)}
    return shown(Accuracy, found, _material("evaluate", account, model))


def compare(
    a: Any,
    b: Any,
    *,
    images: str | os.PathLike[str] | None = None,
    preprocess: str | None = None,
    count: int | None = None,
    provider: ProviderLike = "auto",
    batch: int = 1,
    threads: int = 0,
    runs: int | None = None,
    seconds: float | None = None,
    tolerance: float | None = 0.01,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare model `b` with the reference `a`: size, latency, outputs, agreement, accuracy.

    Args:
        a: The reference: a path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`.
        b: The other model.
        images: A folder of images or an .npz, with or without labels; None: random inputs.
        preprocess: As --preprocess; None: what the metadata of `a` has, else unit.
        count: Use this many of the images, drawn with the seed.
        provider: The execution provider.
        batch: Images per timed run.
        threads: Threads of one operator; 0: all cores.
        runs: Number of timed rounds; None: as many as `seconds` and `tolerance` allow.
        seconds: Time limit of the timing.
        tolerance: Precision at which timing stops; None: it uses all of `seconds`.
        seed: Random seed.
        shapes: Whole shapes by input name.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The comparison.

    Raises:
        CompressError: As `onnxcompress.evaluation.compare.compare`.
    """
    from onnxcompress.data.image_set import load_images

    left, right, loaded = like(a), like(b), None
    if images is not None:
        choice = accuracies.preprocessing(left, preprocess, shapes)
        loaded = load_images(
            images, preprocess=choice.preprocess, count=count, seed=seed, progress=progress
        )
    elif preprocess is not None or count is not None:
        raise OptionError("preprocess and count need images")
    found = compare_models(
        left,
        right,
        images=loaded,
        provider=provider,
        batch=batch,
        threads=threads,
        runs=runs,
        seconds=seconds,
        tolerance=tolerance,
        seed=seed,
        shapes=shapes,
        progress=progress,
    )
    account, samples = found.as_dict(), {s.name: s.timing.samples_ms for s in (found.a, found.b)}
    told = _material("compare", account, b, samples=samples, comparison=account)
    return shown(Comparison, found, told)


def layer_sensitivity(
    model: Any,
    *,
    weight_bits: Sequence[int] = (8, 4),
    activation_bits: Sequence[int] = (8,),
    sparsity: Sequence[float] = (),
    images: str | os.PathLike[str] | None = None,
    preprocess: str | None = None,
    count: int | None = None,
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = "auto",
    synthetic: int = 96,
    seed: int = 0,
    input_shape: str | None = None,
    per_channel: bool = True,
    reconstruct: bool = True,
    workers: int = 0,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure what each layer costs in output error, quantized or pruned alone.

    Args:
        model: A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`; it is not changed.
        weight_bits: Bits of weights to try, each 2 to 8.
        activation_bits: Bits of layer inputs to try, each 2 to 8.
        sparsity: Shares of zeros to try, between 0 and 1.
        images: A folder of images or an .npz; None: inputs are made.
        preprocess: As --preprocess.
        count: Use this many of the images, drawn with the seed.
        inputs: Inputs to measure on.
        synthetic: Number of images to make.
        seed: Random seed.
        input_shape: Sizes of an input that the file leaves open.
        per_channel: Whether a weight has a scale for each output channel.
        reconstruct: Whether roundings are chosen that keep the layer's output, as `quantize` does.
        workers: Number of layers measured at once, which does not change the result; 0: one for each core.
        progress: Called with the stage, the layers done and the layers in all.

    Returns:
        A row for each layer and each change.

    Raises:
        CompressError: As `onnxcompress.sensitivity.analysis.sensitivity`.
    """
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
    from onnxcompress.passes.opsets import without_functions
    from onnxcompress.sensitivity import analysis

    path = None if images is None else os.fspath(images)
    request = InputRequest(path, preprocess, count, inputs, synthetic, seed, input_shape=input_shape)
    start, read = time.perf_counter(), model_of(model)
    canonical = without_functions(read).copy()
    fold_and_canonicalize(canonical, False)
    found = analysis.sensitivity(
        canonical,
        request,
        weight_bits,
        activation_bits,
        sparsity,
        per_channel=per_channel,
        reconstruct=reconstruct,
        workers=workers,
        progress=progress,
    )
    facts = {"model": _name(model), "seed": seed, "seconds": time.perf_counter() - start, "exclude": None}
    account = facts | analysis.account(found, read.digest())
    return shown(Sensitivity, found, _material("sensitivity", account, model))


def _name(model: Any) -> str:
    return label(like(model))


def _names(models: Sequence[Any]) -> list[str]:
    return display_names([like(model) for model in models])


def _material(command: str, account: Mapping[str, Any], *models: Any, **more: Any) -> Material:
    files = tuple(File("model", name, 0, "") for name in _names(models))
    return Material(command=command, account=account, files=files, **more)
