"""Each learning pass with each source of inputs on a card, which a machine without one can only pretend."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.model import load
from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.passes import load_pass
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.runtime.latency import benchmark

torch = pytest.importorskip("torch")

from onnxcompress.optimize.reconstruction.admm_mask import Problem  # noqa: E402
from onnxcompress.optimize.reconstruction.global_tuning import finetune_sparse  # noqa: E402
from onnxcompress.optimize.synthesis.distillation import distill  # noqa: E402
from onnxcompress.sensitivity.analysis import sensitivity  # noqa: E402
from tests.helpers.pretended_card import pretended_card  # noqa: E402

SOURCES = ("images", "distilled", "procedural", "layerwise")
COMMANDS: dict[str, dict[str, Any]] = {
    "quantize": {},
    "quantize --weight-bits 4 --activation-bits 0": {"weight_bits": 4, "activation_bits": 0},
    "quantize --weight-bits 4 --activation-bits 4": {"weight_bits": 4, "activation_bits": 4, "steps": 2},
    "quantize --bits-budget 6": {"bits_budget": 6.0, "steps": 0},
    "quantize --for tensorrt": {"for_runtime": "tensorrt", "effort": "fast"},
    "prune": {"sparsity": 0.5},
    "prune --pattern 2:4": {"sparsity": 0.5, "pattern": "2:4"},
    "drop-blocks": {"blocks": 1, "steps": 2, "batch": 8},
    "drop-channels": {"macs_reduction": 20.0, "steps": 2, "batch": 8},
    "calibrate": {},
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, depthwise and deep layers, residual blocks, a squeeze-excite product; BatchNorm kept."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    lines: list[str] = []

    def layer(
        source: str, name: str, outputs: int, inputs: int, kernel: int = 3, group: int = 1, stride: int = 1
    ) -> str:
        arrays[f"{name}w"] = rng.standard_normal((outputs, inputs // group, kernel, kernel)) / inputs
        for part in ("scale", "shift", "mean", "var"):
            arrays[f"{name}{part}"] = rng.uniform(0.5, 1.5, outputs)
        pads, strides = [kernel // 2] * 4, [stride, stride]
        lines.append(f"{name}c = Conv<pads={pads},group={group},strides={strides}>({source}, {name}w)")
        norm = ", ".join(f"{name}{part}" for part in ("scale", "shift", "mean", "var"))
        lines.append(f"{name} = BatchNormalization({name}c, {norm})")
        return name

    def relu(source: str) -> str:
        lines.append(f"{source}r = Relu({source})")
        return f"{source}r"

    def add(a: str, b: str) -> str:
        lines.append(f"{a}{b} = Add({a}, {b})")
        return relu(f"{a}{b}")

    x = relu(layer("x", "a", 4, 3))
    x = add(layer(relu(layer(x, "b", 4, 4)), "c", 4, 4), x)
    inner = relu(layer(relu(layer(x, "d", 8, 4, 1)), "e", 8, 8, 3, 8))
    lines += [f"m = GlobalAveragePool({inner})", "s = HardSigmoid(m)", f"p = Mul({inner}, s)"]
    x = add(layer("p", "f", 4, 8, 1), x)
    x = relu(layer(x, "g", 8, 4, stride=4))
    for name in "hi":
        x = relu(layer(x, name, 8, 8))
    arrays |= {"v": rng.standard_normal((10, 8)), "k": rng.standard_normal(10)}
    lines += [f"q = GlobalAveragePool({x})", "z = Flatten(q)", "y = Gemm<transB=1>(z, v, k)"]
    body = "\n".join(lines)
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    proto = onnx.parser.parse_model(f"{header} net (float[N,3,16,16] x) => (float[N,10] y) {{ {body} }}")
    for name, values in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    path = tmp_path_factory.mktemp("card") / "network.onnx"
    onnx.save(proto, path)
    np.savez(path.with_suffix(".npz"), x=rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8))
    return path


FEWER_STEPS: tuple[Any, ...] = (distill, Problem.solve, finetune_sparse)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of what takes time and is no different on a card: each operator passes through Python."""

    def timed(*given: Any, **options: Any) -> Any:
        return benchmark(*given, **{**options, "seconds": 0.1})

    for module in ("block_latency", "stopwatch"):
        monkeypatch.setattr(f"onnxcompress.runtime.{module}.benchmark", timed)
    monkeypatch.setattr("onnxcompress.optimize.reconstruction.feature_inputs.STEPS", 2)
    for function in FEWER_STEPS:
        unwrapped: Any = inspect.unwrap(function)
        monkeypatch.setitem(unwrapped.__kwdefaults__, "steps", 2)
    solve: Any = Problem.solve
    monkeypatch.setitem(solve.__kwdefaults__, "refits", 2)


REFUSED = {("calibrate", "layerwise"), ("drop-channels", "layerwise")}
CASES = [
    (command, source)
    for at, command in enumerate(COMMANDS)
    for source in SOURCES
    if (command, source) not in REFUSED and ("--" not in command or source == SOURCES[at % len(SOURCES)])
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "source"), CASES)
def test_no_tensor_lies_elsewhere(command: str, source: str, network: Path) -> None:
    given = {"images": str(network.with_suffix(".npz"))} if source == "images" else {"synthetic": 24}
    pass_type: Any = load_pass(command.split()[0])
    model = load(network)
    with pretended_card():
        result = pass_type(**COMMANDS[command], **given, inputs=source, device="cuda").apply(model)
    assert result.modified


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilled", "procedural"])
def test_images_are_made_on_a_card(kind: str, network: Path, tmp_path: Path) -> None:
    command = ["synthesize", str(network), str(tmp_path / "o.npz"), "--kind", kind, "--count", "4"]
    with pretended_card():
        assert main([*command, "--device", "cuda", "--no-sheet", "--json"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_sensitivity_is_measured_beside_a_card(source: str, network: Path) -> None:
    images = str(network.with_suffix(".npz")) if source == "images" else None
    prepared = load(network)
    fold_and_canonicalize(prepared)
    with pretended_card():
        request = InputRequest(images, inputs=source, synthetic=8)
        found = sensitivity(prepared, request, bits=(8,), activation_bits=(8,), sparsity=(0.5,), workers=1)
    assert {row.kind for row in found.rows} == {"weight_bits", "activation_bits", "sparsity"}


def test_two_devices_do_not_meet() -> None:
    """What the tests above rest on."""
    here = torch.ones(3)
    with pretended_card():
        there = torch.ones(3, device="cuda", requires_grad=True)
        (there * 2).sum().backward()
        assert there.grad is not None
        assert str(there.grad.device) == "cuda:0"
        with pytest.raises(RuntimeError, match="device"):
            here + there
        with pytest.raises(RuntimeError, match="device"):
            torch.cat([here, there])
        with pytest.raises(RuntimeError, match="device"):
            here[there.long()]
        with pytest.raises(TypeError, match="numpy"):
            there.detach().numpy()
        assert type(there.detach().cpu()) is torch.Tensor
        assert (there[here.long()] == 1).all()
