"""The features: the tensor at which a network without some of its parts is matched with the whole one."""

from __future__ import annotations

from onnxcompress.errors import ModelError, OptionError
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model


def matched_feature(model: Model, name: str | None) -> str:
    """Choose the tensor at which a student is matched with its teacher.

    Args:
        model: The network, its BatchNorms folded.
        name: The name that the user gives; None: the last spatial tensor that everything goes through.

    Returns:
        The name of the tensor.

    Raises:
        OptionError: Nodes give no tensor of that name, or it does not hold floats.
        ModelError: No name is given, and everything goes through no spatial tensor.
    """
    topology = model.analysis(Topology)
    if name is None:
        if (feature := topology.feature()) is None:
            raise ModelError(
                f"{model.name}: no spatial tensor that all goes through; name one with --feature"
            )
        return str(feature.name)
    found = next((t for node in model.graph.nodes for t in node.outputs if t.name == name), None)
    if found is None:
        kind = "is an input" if name in {t.name for t in model.graph.inputs} else "is no tensor"
        raise OptionError(
            f"--feature {name!r}: it {kind} of the network with its BatchNorms folded; name what a node "
            "gives, of a folded layer the output of its BatchNorm"
        )
    if not topology.is_float(found):
        raise OptionError(f"--feature {name!r}: it holds no floats; name a tensor in front of it")
    return name
