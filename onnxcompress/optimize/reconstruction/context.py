"""A prepared network, and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from onnxcompress.errors import InputError
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.executor.open_batch import file_batch, images_per_run
from onnxcompress.optimize.reconstruction.range_equalization import stretch
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment, standardize
from onnxcompress.quantization.qdq_plan import Bits, Plan, make_plan


@dataclass
class CalibrationContext:
    """A prepared network and what it is measured on."""

    model: Model
    plan: Plan
    images: Tensor
    """(N, …) at the network's one input, N a multiple of the batch."""
    alignment: StatisticsAlignment
    batch: int
    real: int = 0
    """The first of the images, so many, are real ones."""
    plain: dict[str, Tensor] = field(default_factory=dict)
    """Weights whose magnitudes decide what is pruned, where they are not the model's."""

    @staticmethod
    def of(model: Model, inputs: Inputs, *, stretched: bool) -> CalibrationContext:
        """Prepare a model for a pass that fits its layers.

        Args:
            model: The model, changed in place with `stretched`.
            inputs: The inputs to fit on.
            stretched: Whether channels between layers are brought to equal ranges.

        Returns:
            The network with its inputs.

        Raises:
            InputError: There are fewer images than the file's batch.
        """
        x = whole_batches(model, inputs, fixed_batch(model))
        alignment = alignment_of(model, x) if inputs.layerwise else StatisticsAlignment()
        bits = Bits(8, None, None)
        plan = make_plan(model, bits)
        batch = images_per_run(model, x)
        plain = {
            one.linear.weight_name: torch.from_numpy(one.linear.weight) for one in plan.layers.values()
        }
        if stretched and stretch(model, plan, x, alignment, batch):
            plan = make_plan(model, bits)
        return CalibrationContext(model, plan, x, alignment, batch, min(inputs.real_count, len(x)), plain)


def fixed_batch(model: Model) -> int:
    """Read the batch that the file fixes.

    Args:
        model: The network, with one input.

    Returns:
        The batch; 1 where it is open.
    """
    return file_batch(model) or 1


def whole_batches(model: Model, inputs: Inputs, batch: int) -> Tensor:
    """Read all inputs but for the rest of the last batch.

    Args:
        model: The network.
        inputs: The inputs.
        batch: The batch that the file fixes, or 1.

    Returns:
        The inputs as the network takes them, (N, …).

    Raises:
        InputError: No batch is full.
    """
    x = torch.from_numpy(inputs.images.array())
    x = x[: len(x) // batch * batch]
    if not len(x):
        raise InputError(
            f"{model.name}: the file fixes a batch of {batch}, there are {len(inputs.images)} images"
        )
    return x


def alignment_of(model: Model, x: Tensor) -> StatisticsAlignment:
    """Compute the maps that give the network its recorded statistics on inputs.

    Args:
        model: The network.
        x: The inputs, (N, …).

    Returns:
        The maps.
    """
    topology = model.analysis(Topology)
    last = topology.feature() or topology.trunk()[-1]
    return standardize(model, x, last.name, batch=images_per_run(model, x))
