"""A chain in a workflow of Microsoft Olive; needs olive-ai, which the test extra leaves out (160 MB)."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxcompress.model import load
from onnxcompress.pipeline import Pipeline
from onnxcompress.pipeline.recipe import parse_recipe


@pytest.fixture
def workflow(monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path) -> Any:
    """Runs Olive on the shipped ResNet with passes of a workflow; returns the model that comes out."""
    pytest.importorskip("olive", reason="olive-ai is not installed")
    monkeypatch.setenv("CI", "1")  # or Olive would send telemetry
    # torchmetrics, which Olive imports, imports torchvision: see tests/helpers/zoo.py.
    monkeypatch.setitem(sys.modules, "torchvision._meta_registrations", types.ModuleType("stub"))
    run = importlib.import_module("olive.workflows").run
    package = importlib.import_module("onnxcompress.integrations.olive").package_config()
    net = models / "resnet20-fashion.onnx"

    def start(passes: dict[str, Any]) -> onnx.ModelProto:
        where = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
        model = {"type": "OnnxModel", "model_path": str(net)}
        run({"input_model": model, "passes": passes, **where}, package_config=package)
        return onnx.load(tmp_path / "out" / "model.onnx")

    return start


def test_a_chain_is_a_pass_of_olive(workflow: Any, models: Path) -> None:
    passes = ["fold-bn", {"equalize": {"clip": "per-channel"}}]
    found = workflow({"small": {"type": "OnnxCompress", "passes": passes}})
    chain = Pipeline(parse_recipe("passes: [fold-bn, equalize: {clip: per-channel}]").passes)
    alone = chain.run(load(models / "resnet20-fashion.onnx")).model.to_proto()
    assert found.graph.SerializeToString(deterministic=True) == alone.graph.SerializeToString(
        deterministic=True
    )
    (record,) = [p.value for p in found.metadata_props if p.key == "onnxcompress.provenance"]
    assert '"fold-bn"' in record
    assert '"equalize"' in record


def test_beside_a_pass_of_olives_own(workflow: Any) -> None:
    ours = {"type": "OnnxCompress", "passes": ["fold-bn"]}
    found = workflow({"fold": ours, "tidy": {"type": "OnnxPeepholeOptimizer"}})
    assert "BatchNormalization" not in {node.op_type for node in found.graph.node}
    onnx.checker.check_model(found)


def test_what_is_wrong_is_told_before_any_pass_runs(
    workflow: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"type": "OnnxCompress", "passes": ["fold-bn"]}
    bad = {"type": "OnnxCompress", "passes": [{"equalize": {"clop": 1}}]}
    with pytest.raises(ValueError, match=r"no such option of equalize: 'clop'; did you mean 'clip'\?"):
        workflow({"first": good, "second": bad})
    assert "Running pass first" not in caplog.text
