"""The mean input of each tap of layers: from the record, or measured on inputs. See `kernel_taps`.

Measured: inputs go through the reference, for `layerwise` as aligned with its recorded statistics
(`optimize.synthesis.statistics_alignment`); batches count by their number of samples, sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from onnxcompress.passes.fold_bn import FoldBatchNorm
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
        UnknownMoments: The size of the image is open and matters, or channels are not on axis 1.
    """
    if layer.node.op == "Gemm" and attribute(layer.node, "transA", 0):
        raise UnknownMoments("it is a Gemm with transA", "export it with transA 0")
    source, pads = _source(model, layer)
    shape = tensor_shapes(model).get(source.name)
    sizes = [d for d in (shape or ())[2:] if isinstance(d, int)]
    if layer.node.op in ("Conv", "ConvTranspose") and len(sizes) != layer.rank - 2:
        if np.prod(layer.weight.shape[2:]) != 1 or layer.node.op != "Conv" or pads is not None:
            raise UnknownMoments("the size of the image is open", "fix it in the file")
        sizes = [1] * (layer.rank - 2)
    return source, window(layer, tuple(sizes), pads)


def _source(model: Model, layer: Linear) -> tuple[gs.Tensor, tuple[int, ...] | None]:
    """Return the tensor that a layer reads, and the pads of a Pad of zeros between them, if any."""
    source = layer.node.inputs[layer.data_at]
    node = producer(source)
    if is_op(node, "Pad") and layer.node.op == "Conv" and (pads := _zeros(model, node)) is not None:
        return node.inputs[0], pads
    return source, None


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
    model: Model, layers: list[Linear], inputs: Inputs, progress: Progress
) -> Mapping[str, np.ndarray | Refusal]:
    """Measure the mean input of each tap of layers.

    Args:
        model: The network.
        layers: The layers.
        inputs: The inputs to measure on; where they are `layerwise`, in the network as aligned with its
            recorded statistics.
        progress: Called with the stage, the inputs done and the inputs in all.

    Returns:
        Name of the layer's output tensor -> means, (inputs, taps), or why there are none.

    Raises:
        InputError: The inputs do not fill one batch that the file fixes.
    """
    places: dict[str, Place] = {}
    found: dict[str, np.ndarray | Refusal] = {}
    for layer in layers:
        name = layer.output_name
        try:
            layer_window(model, layer)
            source, pads = _source(model, layer)
            places[name] = Place(source.name, layer, pads)
        except UnknownMoments as problem:
            rule = f"the mean of its input cannot be measured: {problem.rule}"
            found[name] = Refusal(layer.label, rule, problem.remedy)
    networks = [_aligned(model, inputs), model] if inputs.layerwise else [model]
    for network in networks:
        kept = network.graph.tensors()
        here = {n: at for n, at in places.items() if n not in found and at.source in kept}
        found |= _means(network, here, inputs.images, progress)
    return found


def _aligned(model: Model, inputs: Inputs) -> Model:
    """Copy the network, with BatchNorm folded, and align it with its recorded statistics on the inputs."""
    from onnxcompress.optimize.reconstruction.context import alignment_of, fixed_batch, whole_batches

    twin = model.copy()
    FoldBatchNorm().apply(twin)
    alignment_of(twin, whole_batches(twin, inputs, fixed_batch(twin))).apply(twin)
    return twin


@dataclass(frozen=True)
class Place:
    """Where a layer's input is measured."""

    source: str
    """Name of the tensor."""
    layer: Linear
    pads: tuple[int, ...] | None
    """Of a Pad between them."""

    def means(self, x: np.ndarray) -> np.ndarray:
        """Compute the mean input of each tap, for images of the size that they have.

        Args:
            x: Values of the tensor, (N, inputs, …).

        Returns:
            The means, (inputs, taps), float64.
        """
        return window(self.layer, x.shape[2:], self.pads).means(x)


def _means(
    model: Model, places: Mapping[str, Place], images: Samples, progress: Progress
) -> dict[str, np.ndarray]:
    """Return the mean of each tap over all images, by the keys of `places`."""
    from onnxcompress.optimize.deterministic_threads import in_turn

    if not places:
        return {}
    batches, values_of = _batches_of(model, sorted({at.source for at in places.values()}), images)

    def own_sums(index: int) -> dict[str, np.ndarray]:
        values = values_of(batches[index])
        size = len(batches[index])
        return {name: size * at.means(values[at.source]) for name, at in places.items()}

    sums = dict.fromkeys(places, np.zeros(()))
    done = 0
    for batch, own in zip(batches, in_turn(own_sums, len(batches)), strict=True):
        for name, value in own.items():
            sums[name] = sums[name] + value
        done += len(batch)
        progress("measuring means", done, len(images))
    progress("measuring means", len(images), len(images))
    return {name: value / done for name, value in sums.items()}


def _batches_of(
    model: Model, tensors: list[str], images: Samples
) -> tuple[list[range], Callable[[range], dict[str, np.ndarray]]]:
    """Return the batches, and what gives the values of the tensors, by name, in each."""
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

    count, size = len(images) - len(images) % (fixed or 1), fixed or BATCH
    return [range(start, min(start + size, count)) for start in range(0, count, size)], values_of
