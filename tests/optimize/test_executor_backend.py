"""The executor against onnx's own backend node tests: every case whose operators it claims.

`python -m tests.optimize.test_executor_backend` prints the totals and what is left out, with the reasons.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx.backend.test.runner import Runner

from onnxcompress.errors import CompressError
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.ops import supported_ops
from onnxcompress.optimize.executor.ops.dtypes import TORCH_TYPES, tensor_from
from tests.helpers.suites import backend_tests

_UNSIGNED = "uint16, uint32 and uint64 arithmetic, for which torch has no kernels"
_TRAINING = "training mode"

OUT_OF_SCOPE: dict[str, str] = {
    r"test_(add|sub|div|mod|min|max)_uint(16|32|64)": _UNSIGNED,
    r"test_(less|greater)(_equal)?_uint(16|32|64)(_expanded)?": _UNSIGNED,
    r"test_bitshift_(left|right)_uint(16|32|64)": _UNSIGNED,
    r"test_bitwise_not_3d": _UNSIGNED,
    r"test_training_dropout(_default)?(_mask)?": _TRAINING,
    r"test_not_[234]d": "opset below 7",
    r"test_resize_downsample_scales_(linear|cubic)_align_corners": (
        "what onnxruntime computes otherwise, which is followed"
    ),
}
"""Pattern of the case's name -> why it is left out."""


@cache
def cases() -> dict[str, Any]:
    """Backend cases by name whose nodes all have claimed operators."""
    claimed = supported_ops()
    return {
        case.name: case
        for case in backend_tests("node")
        if case.model is not None
        and all(n.domain in ("", "ai.onnx") and n.op_type in claimed for n in case.model.graph.node)
    }


def reason(case: Any) -> str | None:
    """Why a case is out of scope; None where it is in scope."""
    graph = case.model.graph
    for info in (*graph.input, *graph.output):
        kind = info.type.WhichOneof("value")
        if kind == "sequence_type" and info in graph.output:
            continue
        if kind != "tensor_type":
            return f"{kind.removesuffix('_type')} values"
        if info.type.tensor_type.elem_type not in TORCH_TYPES:
            return "element types torch cannot compute with (strings, 8-bit floats, 2- and 4-bit)"
    for pattern, why in OUT_OF_SCOPE.items():
        if re.fullmatch(pattern, case.name):
            return why
    return None


def in_scope() -> list[str]:
    return [name for name, case in cases().items() if reason(case) is None]


def run(case: Any, inputs: list[Any]) -> list[Any]:
    graph = gs.import_onnx(case.model)
    executor = Executor(graph, dtype=None, training=True)
    feeds = {
        info.name: tensor_from(as_numpy(value))
        for info, value in zip(case.model.graph.input, inputs, strict=False)
    }
    names = [info.name for info in case.model.graph.output]
    results = executor.run({k: v for k, v in feeds.items() if v is not None}, names)
    return [as_array(results[name]) for name in names]


def as_numpy(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def as_array(tensor: torch.Tensor | list[torch.Tensor]) -> Any:
    if isinstance(tensor, list):
        return [as_array(part) for part in tensor]
    if tensor.dtype == torch.bfloat16:
        bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
        return tensor.contiguous().view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def check(case: Any) -> None:
    for inputs, expected in case.data_sets:
        outputs = run(case, inputs)
        expected = [as_numpy(value) for value in expected]
        # As onnx's runner does for bfloat16: two units in the last place, for chains of operators.
        half = any(getattr(value, "dtype", None) == "float16" for value in expected)
        rtol = max(case.rtol, 2**-9) if half else case.rtol
        Runner.assert_similar_outputs(expected, outputs, rtol=rtol, atol=case.atol)


def test_every_case_in_scope() -> None:
    """One test, since each process that has a part of it would make all the cases."""
    assert not {name: why for name in in_scope() if (why := failure(cases()[name]))}


def summary() -> str:
    """The totals, without running anything."""
    excluded = Counter(why for case in cases().values() if (why := reason(case)))
    lines = [
        f"operators claimed: {len(supported_ops())}",
        f"backend node cases with only these: {len(cases())}; in scope: {len(in_scope())}",
        *(f"  left out, {why}: {count}" for why, count in excluded.most_common()),
    ]
    return "\n".join(lines)


def test_summary_and_that_each_exclusion_is_needed() -> None:
    print(summary())
    excluded = [name for name, case in cases().items() if reason(case)]
    assert len(in_scope()) + len(excluded) == len(cases())
    assert len(in_scope()) > 5 * len(excluded)
    for pattern in OUT_OF_SCOPE:
        for name in excluded:
            if re.fullmatch(pattern, name):
                with pytest.raises((AssertionError, CompressError)):
                    check(cases()[name])


def failure(case: Any) -> str:
    """Why a case fails; empty where it passes."""
    try:
        check(case)
    except Exception as error:
        return repr(error)
    return ""


if __name__ == "__main__":
    print(summary())
    print(f"passed: {sum(not failure(cases()[name]) for name in in_scope())} of {len(in_scope())}")
