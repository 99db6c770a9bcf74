"""The mean input of each tap of layers: from the record, or measured on inputs. See `kernel_taps`.

Measured: images go through the reference, or each layer's input is drawn from statistics
(`optimize.synthesis.layer_sampler`); batches count by their number of samples, sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.errors import InputError
from onnxcompress.graph.channel_groups.tracer import find_channel_groups
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import attribute, data_input, input_at, is_op, producer
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.synthesis.drawn_inputs import Samples
from onnxcompress.passes.correct_bias.kernel_taps import Window, window
from onnxcompress.progress import Progress
from onnxcompress.statistics.propagation import MomentPropagation, UnknownMoments
from onnxcompress.statistics.record import known_statistics

BATCH = 16
"""Samples at once, unless the file fixes a batch: the inputs of all layers are held."""


def recorded_means(model: Model, layers: list[Linear]) -> dict[str, np.ndarray | Refusal]:
    """Compute the mean input of each tap of layers from recorded statistics alone.

    Args:
        model: The network, with recorded statistics.
        layers: The layers.

    Returns:
        Name of the layer's output tensor -> means, (inputs, taps), or why they are not known.
    """
    moments = MomentPropagation(model, find_channel_groups(model), known_statistics(model))
    found: dict[str, np.ndarray | Refusal] = {}
    for layer in layers:
        name = layer.output_name
        try:
            source, geometry = layer_window(model, layer)
            mean, _ = moments.of(source)
            if len(mean) != layer.inputs:
                raise UnknownMoments(f"the channels of {source.name!r} are not those of the layer")
            found[name] = mean[:, None] * geometry.coverage()
        except UnknownMoments as problem:
            rule = f"the mean of its input is not known: {problem.rule}"
            found[name] = Refusal(layer.label, rule, problem.remedy)
    return found


def layer_window(model: Model, layer: Linear) -> tuple[gs.Tensor, Window]:
    """Find the tensor that a layer reads, through a Pad of zeros if there is one, and where its taps lie.

    Args:
        model: The network.
        layer: The layer.

    Returns:
        The tensor, and the places of the taps.

    Raises:
        UnknownMoments: The size of the image is open and matters.
    """
    source = layer.node.inputs[layer.data_at]
    pads = None
    node = producer(source)
    if is_op(node, "Pad") and layer.node.op == "Conv":
        pads = _zeros(model, node)
        source = source if pads is None else node.inputs[0]
    shape = tensor_shapes(model).get(source.name)
    sizes = [d for d in (shape or ())[2:] if isinstance(d, int)]
    if layer.node.op in ("Conv", "ConvTranspose") and len(sizes) != layer.rank - 2:
        if np.prod(layer.weight.shape[2:]) != 1 or layer.node.op != "Conv" or pads is not None:
            raise UnknownMoments("the size of the image is open", "fix it in the file")
        sizes = [1] * (layer.rank - 2)
    return source, window(layer, tuple(sizes), pads)


def _zeros(model: Model, node: gs.Node) -> tuple[int, ...] | None:
    """Return the pads of the image, begins first, of a Pad with zeros; None: it is another Pad."""
    given = attribute(node, "pads")
    value = np.asarray(given) if given is not None else constant_value(model, node.inputs[1])
    filled = input_at(node, 2)
    number = attribute(node, "value", 0.0) if filled is None else constant_value(model, filled)
    plain = attribute(node, "mode", "constant") in ("constant", b"constant") and input_at(node, 3) is None
    if value is None or number is None or np.any(number) or not plain:
        return None
    begins, ends = value.reshape(2, -1).tolist()
    if any(begins[:2]) or any(ends[:2]) or min(begins + ends) < 0:
        return None
    return tuple(begins[2:] + ends[2:])


def measured_means(
    model: Model, layers: list[Linear], inputs: Inputs, seed: int, progress: Progress
) -> Mapping[str, np.ndarray | Refusal]:
    """Measure the mean input of each tap of layers.

    Args:
        model: The network.
        layers: The layers.
        inputs: The inputs to measure on; each layer's own are drawn where they are `layerwise`.
        seed: Random seed of what is drawn.
        progress: Called with the stage, the inputs done and the inputs in all.

    Returns:
        Name of the layer's output tensor -> means, (inputs, taps), or why there are none.

    Raises:
        InputError: The inputs do not fill one batch that the file fixes.
    """
    from onnxcompress.optimize.deterministic_threads import in_turn

    windows: dict[str, tuple[str, Window]] = {}
    found: dict[str, np.ndarray | Refusal] = {}
    for layer in layers:
        name = layer.output_name
        try:
            source, geometry = layer_window(model, layer)
            windows[name] = (source.name, geometry)
        except UnknownMoments as problem:
            rule = f"the mean of its input cannot be measured: {problem.rule}"
            found[name] = Refusal(layer.label, rule, problem.remedy)
    tensors = sorted({source for source, _ in windows.values()})
    if not tensors:
        return found
    sums = dict.fromkeys(windows, np.zeros(()))
    total = len(inputs.images)
    if inputs.layerwise:
        batches, values_of = _drawn(model, tensors, total, seed)
    else:
        batches, values_of = _seen(model, tensors, inputs.images)

    def own_sums(index: int) -> dict[str, np.ndarray]:
        values = values_of(batches[index])
        size = len(batches[index])
        return {name: size * geometry.means(values[source]) for name, (source, geometry) in windows.items()}

    done = 0
    for batch, own in zip(batches, in_turn(own_sums, len(batches)), strict=True):
        for name, value in own.items():
            sums[name] = sums[name] + value
        done += len(batch)
        progress("measuring means", done, total)
    progress("measuring means", total, total)
    return found | {name: value / done for name, value in sums.items()}


Values = Callable[[range], dict[str, np.ndarray]]
"""Gives the values of the tensors, by name, for the samples with these numbers."""


def _seen(model: Model, tensors: list[str], images: Samples) -> tuple[list[range], Values]:
    """Return the batches, and what gives the values of the tensors in each."""
    import torch

    from onnxcompress.optimize.executor import Executor
    from onnxcompress.optimize.executor.open_batch import TRIED, file_batch, images_at_once

    executor = Executor.from_model(model)
    source = data_input(model)
    trial = images.normalized(slice(TRIED * (file_batch(model) or 1)))
    fixed = images_at_once(model, torch.from_numpy(trial))
    if len(images) < (fixed or 1):
        raise InputError(
            f"input {source.name!r}: the file fixes a batch of {fixed}, there are {len(images)}"
        )

    def values_of(batch: range) -> dict[str, np.ndarray]:
        x = images.normalized(slice(batch.start, batch.stop))
        with torch.no_grad():  # of each thread
            values = executor.run({source.name: torch.from_numpy(x)}, tensors)
        return {name: value.numpy() for name, value in values.items()}

    return _batches(len(images) - len(images) % fixed if fixed else len(images), fixed or BATCH), values_of


def _batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _drawn(model: Model, tensors: list[str], count: int, seed: int) -> tuple[list[range], Values]:
    import torch

    from onnxcompress.optimize.synthesis.layer_sampler import LayerSampler

    sampler = LayerSampler(model)

    def values_of(batch: range) -> dict[str, np.ndarray]:
        with torch.no_grad():  # of each thread
            values = sampler.sample_all(tensors, len(batch), seed + batch.start // BATCH)
        return {name: value.numpy() for name, value in values.items()}

    return _batches(count, BATCH), values_of
