"""Apply a pass to a ModelProto, for programs that hold one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxcompress.account import Figures
from onnxcompress.evaluation.guard import Guard
from onnxcompress.passes.base import Pass, PassResult, run
from onnxcompress.progress import Progress, silent

if TYPE_CHECKING:
    import onnx


def apply_to_proto(
    pass_: Pass, proto: onnx.ModelProto, progress: Progress = silent, *, guard: Guard | None = None
) -> tuple[onnx.ModelProto, PassResult[Figures | None]]:
    """Apply one pass to a ModelProto whose weights are in memory.

    Args:
        pass_: The pass.
        proto: The model; it is not changed.
        progress: Called with the stage, the steps done and the steps in all.
        guard: How the result is judged; None: it is not.

    Returns:
        The new model and the result of the pass.

    Raises:
        ModelError: Weights lie in external data, or the result has 2 GB or more.
        CompressError: The pass cannot handle the model.
    """
    from onnxcompress.model import Model

    model = Model.from_proto(proto, proto.graph.name or "model")
    (result,) = run([pass_], model, progress, guard=guard)
    return model.to_proto(), result
