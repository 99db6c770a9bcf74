"""Passes that are wrong on purpose, as real ones could be: what the guard has to catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Change
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.linear_layer import stored_value
from onnxcompress.model import Model
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.progress import Progress, silent

Edit = Callable[[np.ndarray], np.ndarray]


FAULTS: dict[str, Edit] = {
    "a layer's scale": lambda weight: weight * 4,
    "a layer's sign": lambda weight: -weight,
    "permuted output channels": lambda weight: np.roll(weight, 1, axis=0),
    "constant outputs": np.zeros_like,
    "outputs that are not finite": lambda weight: np.full_like(weight, np.nan),
}
"""Name -> what becomes of a layer's weight."""


def broken(model: Model, fault: str, layer: int) -> Model:
    """A copy of the model with a fault in a layer, counted in the order of the graph."""
    twin = model.copy()
    layers = [n for n in twin.graph.nodes if n.op in ("Conv", "Gemm", "MatMul") and is_weighted(n)]
    weight = layers[layer].inputs[1]
    values = stored_value(weight)
    assert isinstance(weight, gs.Constant)
    assert values is not None
    set_values(weight, FAULTS[fault](values).astype(values.dtype))
    twin.touch()
    return twin


def is_weighted(node: gs.Node) -> bool:
    """Whether a layer has a weight of its own."""
    return isinstance(node.inputs[1], gs.Constant)


@dataclass(frozen=True)
class Break(Pass):
    """Do to a layer's weight what `FAULTS` says."""

    name: ClassVar[str] = "break"

    fault: str = option("a layer's scale", "Which fault.")
    layer: int = option(1, "Of which layer, in the order of the graph.")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[None]:
        model.become(broken(model, self.fault, self.layer))
        return PassResult([Change(model.name, self.fault)])
