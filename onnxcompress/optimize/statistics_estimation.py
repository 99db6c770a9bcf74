"""Estimate the record: mean and deviation of each channel of tensors, while images go through the network.

Over all images and positions, channel c of a tensor x (axis 1) has

    mean = E[x_c]        std = √E[(x_c − mean)²]        (`running_moments`)

What is measured (`measurable`): the image, and the output of each linear layer as it is once all that folds
into it is folded: behind a BatchNorm or an added constant, where nothing else reads what lies before.
A tool that folds keeps these values, under this name or another; it may give an earlier tensor's name to
another value. The estimates are of the network on these very images: taken of procedural ones, they are not
those of the training set.

Does not handle: networks with several inputs; MatMul whose channels are not axis 1 (attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.errors import InputError
from onnxcompress.graph.batch_norm import is_batch_norm
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.linear_layer import LINEAR_OPS, as_linear
from onnxcompress.graph.query import attribute, data_input, is_op, only_consumer, read_inputs, value_readers
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.running_moments import RunningMoments
from onnxcompress.optimize.synthesis.drawn_inputs import NormalizedImages
from onnxcompress.progress import Progress, silent
from onnxcompress.statistics.record import ChannelStatistics

if TYPE_CHECKING:
    import torch

    from onnxcompress.optimize.executor import Executor
    from onnxcompress.optimize.synthesis.drawn_inputs import Samples

BYTES = 1 << 28
"""Memory that the measured tensors of a batch may take; fewer images go at once where it is more."""
CHANNELS_FIRST = [0, 3, 1, 2]


def estimate_statistics(
    model: Model,
    images: torch.Tensor | Samples,
    tensors: Sequence[str] | None = None,
    *,
    source: str,
    batch: int = 64,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, ChannelStatistics]:
    """Estimate mean and deviation of each channel of tensors, while images go through the network once.

    A batch that the file fixes is kept to; images that do not fill it are left out. On the CPU the same
    images give the same numbers.

    Args:
        model: The network, with one input.
        images: Inputs as the network takes them, float (N, …), or a set of inputs.
        tensors: Names of the tensors; None: all that `measurable` names.
        source: What the entries give as their source.
        batch: Images that run at once, at most.
        device: Where torch computes.
        progress: Called with the stage, the images done and the images in all.

    Returns:
        Name of the tensor -> its statistics.

    Raises:
        InputError: A tensor is not finite, or the images do not fill one fixed batch.
        OptionError: A tensor has no channels on axis 1.
    """
    import torch

    from onnxcompress.optimize.deterministic_threads import one_thread_each
    from onnxcompress.optimize.executor import Executor

    names = list(measurable(model)[0] if tensors is None else tensors)
    from onnxcompress.optimize.executor.open_batch import TRIED, file_batch, images_at_once

    input = data_input(model)
    executor = Executor.from_model(model, device=device)
    fixed: int | None = file_batch(model) or 1
    if fixed == 1:
        fixed = images_at_once(model, _part(images, 0, TRIED))
    if len(images) < (fixed or 1):
        raise InputError(
            f"input {input.name!r}: the file fixes a batch of {fixed}, there are {len(images)} images"
        )
    found = {name: RunningMoments() for name in names}

    def measured(values: dict[str, torch.Tensor]) -> dict[str, RunningMoments]:
        return {name: RunningMoments.of(values.pop(name), name) for name in names}

    with one_thread_each():
        size = fixed or _batch(images, batch, executor, input.name, names)
        count = len(images) // (fixed or 1) * (fixed or 1)
        feeds = {input.name: images if isinstance(images, torch.Tensor) else NormalizedImages(images)}
        runs = executor.map_batches(feeds, names, measured, count=count, batch=size)
        for done, own in enumerate(runs, 1):
            for name in names:
                found[name].merge(own[name])
            progress("estimating statistics", min(done * size, len(images)), len(images))
    return {name: one.statistics(source) for name, one in found.items()}


def measurable(model: Model) -> tuple[list[str], list[Refusal]]:
    """Find the tensors of the main graph worth measuring.

    Args:
        model: The network.

    Returns:
        Names of the tensors in topological order, and the layers that have none, with the reason.
    """
    topology = model.analysis(Topology)
    ranks = {name: len(shape) for name, shape in tensor_shapes(model).items()}
    found: dict[str, None] = {}
    refusals: list[Refusal] = []
    for tensor in read_inputs(model):
        image = channels_first(tensor)
        if image is None:
            rule = "its channels are not on axis 1, and no Transpose puts them there"
            refusals.append(Refusal(f"input {tensor.name!r}", rule))
        else:
            found[image.name] = None
    for node in topology.order:
        if (
            not (is_op(node, *LINEAR_OPS) or is_batch_norm(node))
            or id(node.outputs[0]) not in topology.data
        ):
            continue
        if is_op(node, "MatMul"):  # only here may the channels be elsewhere than on axis 1
            layer = as_linear(model, node, lambda t: ranks.get(t.name))
            if isinstance(layer, Refusal):
                refusals.append(layer)
                continue
        found[_settled(model, topology, node.outputs[0]).name] = None
    return list(found), refusals


def channels_first(tensor: gs.Tensor) -> gs.Tensor | None:
    """Find the tensor that holds an input with its channels on axis 1.

    Args:
        tensor: An input of the network.

    Returns:
        The input itself, or what a Transpose makes of it; None: neither has its channels there.
    """
    readers = value_readers(tensor)
    if readers and all(is_op(n, "Transpose") and attribute(n, "perm") == CHANNELS_FIRST for n in readers):
        return readers[0].outputs[0]
    last = tensor.shape[-1] if tensor.shape is not None and len(tensor.shape) == 4 else None
    return None if last in (1, 3) and tensor.shape[1] not in (1, 3) else tensor


def _settled(model: Model, topology: Topology, tensor: gs.Tensor) -> gs.Tensor:
    """Return the tensor behind all that folds into the layer that makes this one."""
    while True:
        node = only_consumer(model, tensor)
        if node is None or id(node) not in topology.index:
            return tensor
        adds = is_op(node, "Add") and any(constant_value(model, t) is not None for t in node.inputs)
        if not adds and not is_batch_norm(node):
            return tensor
        tensor = node.outputs[0]


def _batch(
    images: torch.Tensor | Samples, most: int, executor: Executor, input: str, names: list[str]
) -> int:
    """Choose how many images go at once."""
    import torch

    with torch.no_grad():
        values = executor.run({input: _part(images, 0, 1)}, names)
    each = sum(t.numel() * t.element_size() for t in values.values())
    return max(1, min(most, BYTES // max(each, 1)))


def _part(images: torch.Tensor | Samples, start: int, stop: int) -> torch.Tensor:
    import torch

    return images[start:stop] if isinstance(images, torch.Tensor) else NormalizedImages(images)[start:stop]
