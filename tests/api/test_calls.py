"""One call for each command: forms of a model, results with types and pages, files as the commands'."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest

import onnxcompress as oc
from onnxcompress.api import call
from onnxcompress.api.results import Shown
from onnxcompress.api.stubs import stubs
from onnxcompress.cli.main import COMMANDS, main
from onnxcompress.errors import CompressError, ModelError, ResultRefused
from onnxcompress.evaluation.guard import Guard
from onnxcompress.model import load
from onnxcompress.passes import CATALOGUE, load_pass
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.search.workers import InProcess

NET, PHOTOS = "resnet20-fashion.onnx", "fashion-tiny.npz"
OTHER_NAMES = {"search": "search_best", "sensitivity": "layer_sensitivity"}
"""`search` and `sensitivity` are names of packages."""
QUICK: dict[str, Any] = {"effort": "fast", "inputs": "procedural", "synthetic": 8, "timing": None}


@pytest.fixture
def net(models: Path) -> str:
    return str(models / NET)


def test_each_command_has_its_call_and_each_call_its_signature() -> None:
    commands = [*(entry.name for entry in CATALOGUE), *(set(COMMANDS) - {"cache", "guide"})]
    for command in commands:
        name = OTHER_NAMES.get(command, command.replace("-", "_"))
        function = call(name)
        assert function is not None, name
        assert "Returns:" in str(function.__doc__)
    for entry in CATALOGUE:
        parameters = inspect.signature(getattr(oc, entry.name.replace("-", "_"))).parameters
        assert {f.name for f in dataclasses.fields(load_pass(entry.name))} <= set(parameters)
    with pytest.raises(AttributeError, match="no attribute 'fold'"):
        oc.fold  # type: ignore[attr-defined]  # noqa: B018


def test_the_stub_file_is_that_of_the_passes() -> None:
    """`python -m onnxcompress.api.stubs > onnxcompress/__init__.pyi` where this fails."""
    assert Path(oc.__file__).with_suffix(".pyi").read_text("utf-8") == stubs()


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, onnxcompress; assert not {'onnx', 'numpy', 'torch', 'click'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


FORMS: dict[str, Callable[[str], Any]] = {
    "Path": Path,
    "proto": onnx.load,
    "bytes": lambda path: Path(path).read_bytes(),
    "Model": load,
    "onnx_ir": onnx_ir.load,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_model_comes_in_any_form(form: str, net: str) -> None:
    given = FORMS[form](net)
    before = given.SerializeToString() if form == "proto" else None
    found = oc.fold_bn(given)
    expected = oc.fold_bn(net)
    assert found.measured == expected.measured
    assert found.model.to_proto().graph.initializer == expected.model.to_proto().graph.initializer
    assert before is None or given.SerializeToString() == before
    assert oc.inspect(given).macs == oc.inspect(net).macs
    assert isinstance(found.ir, onnx_ir.Model)


def test_a_file_is_that_of_the_command(net: str, models: Path, tmp_path: Path) -> None:
    by_call, by_command = tmp_path / "a.onnx", tmp_path / "b.onnx"
    exclude = ["/fc/Gemm"]
    found = oc.quantize(net, by_call, images=models / PHOTOS, preprocess="fashion-mnist", count=16,
                        effort="fast", exclude=exclude, timing=None)  # fmt: skip
    words = ["--images", str(models / PHOTOS), "--preprocess", "fashion-mnist", "--count", "16"]
    words += ["--effort", "fast", "--exclude", ",".join(exclude), "-q"]
    assert main(["quantize", net, str(by_command), *words]) == 0
    assert by_call.read_bytes() == by_command.read_bytes()
    assert isinstance(found.measured, QuantizeFigures)
    assert found.verdict is not None
    assert found.verdict.status == "kept"
    found.save(tmp_path / "c.onnx")
    assert (tmp_path / "c.onnx").read_bytes() == by_call.read_bytes()


def test_what_cannot_be_written_is_said_before_the_work(net: str, tmp_path: Path) -> None:
    for out, why in ((net, "would replace the input"), (tmp_path / "no" / "o.onnx", "cannot be written")):
        with pytest.raises(ModelError, match=why):
            oc.quantize(net, out, **QUICK)
    out = tmp_path / "o.onnx"
    with pytest.raises(ResultRefused):
        oc.prune(net, out, sparsity=0.95, reconstruct=False, timing=None)
    assert not out.exists()
    beside = tmp_path / NET  # the same name in another folder
    beside.write_bytes(b"")
    oc.fold_bn(load(net), beside)
    assert beside.stat().st_size > 0
    forced = oc.prune(net, out, sparsity=0.95, reconstruct=False, timing=None, guard=Guard(force=True))
    assert forced.verdict is not None
    assert forced.verdict.status == "forced"
    with pytest.raises(TypeError, match="blcoks"):
        oc.drop_blocks(net, blcoks=1)  # type: ignore[call-arg]
    with pytest.raises(CompressError, match="no such file"):
        oc.drop_blocks(net, images="nowhere", blocks=1)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
def test_each_result_has_its_page(net: str, models: Path, tmp_path: Path) -> None:
    """A notebook shows it in a frame; `write_report` writes it. Each states what the result holds."""
    photos: dict[str, Any] = {"images": models / PHOTOS, "preprocess": "fashion-mnist"}
    folded = oc.fold_bn(net)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [fold-bn, equalize]\ngates: {max_size: 5}")
    chain = oc.run(recipe, net)
    assert [verdict.passed for verdict in chain.gates] == [True]
    results: list[tuple[Shown, str]] = [
        (folded, "fold-bn"),
        (chain, "equalize"),
        (oc.drop_blocks(net, **photos, count=16, blocks=1, steps=1), "1 of 9 blocks were dropped"),
        (oc.inspect(net), "9 blocks can be dropped"),
        (oc.benchmark(net, folded.model, runs=3), "the fastest of 2"),
        (oc.compare(net, folded.proto, **photos, runs=3), "Top-1 accuracy"),
        (oc.evaluate(net, **photos), "are classified right"),
        (oc.layer_sensitivity(net, synthetic=6, reconstruct=False), "matters most"),
        (oc.synthesize(net, kind="procedural", count=4), "4 procedural images"),
    ]
    for result, text in results:
        frame = result._repr_html_()
        assert text in frame, text
        assert frame.startswith("<iframe srcdoc=")
        assert "How to repeat it" not in frame
        result.write_report(tmp_path / "page.html")
        assert text in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
def test_a_search_and_a_sweep(net: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    front = oc.search_best(onnx.load(net), tmp_path / "best", trials=1, repairs=1, inputs="procedural",
                           effort="fast", latency_seconds=0.1, workers=InProcess())  # fmt: skip
    assert (tmp_path / "best" / "search.html").is_file()
    assert front.found
    assert "Pareto front" in front._repr_html_()
    (tmp_path / "r.yaml").write_text("passes: [fold-bn]")
    plan = tmp_path / "p.yaml"
    plan.write_text(f"models: [{net}]\nrecipes: [r.yaml]\nlatency_seconds: 0")
    (row,) = oc.sweep(plan, tmp_path / "t.csv")
    assert row["status"] == "done"
