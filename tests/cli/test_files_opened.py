"""How often a command reads its files and walks its graphs."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from onnxcompress.cli.main import main
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, load, protobuf_stream, save
from onnxcompress.model.export import Exported


@pytest.mark.slow
def test_each_file_is_parsed_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that folds, compares, judges and reports: IN and OUT once each."""
    parsed: list[int] = []
    split_model = protobuf_stream._split_model

    def counted(data: mmap.mmap) -> tuple[bytes, dict[int, tuple[int, int]]]:
        parsed.append(len(data))
        return split_model(data)

    monkeypatch.setattr(protobuf_stream, "_split_model", counted)
    protobuf_stream._split_file.cache_clear()
    net, out = models / "resnet20-fashion.onnx", tmp_path / "out.onnx"
    argv = ["fold-bn", str(net), str(out), "--report", str(tmp_path / "page.html"), "--max-size", "5", "-q"]
    assert main(argv) == 0
    assert sorted(parsed) == sorted(file.stat().st_size for file in (net, out))


def test_a_file_that_changed_is_read_anew(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = load(models / "resnet20-fashion.onnx")
    save(model, path)
    assert load(path).producer == model.producer
    other = load(models / "mobilenetv2-fashion.onnx")
    save(other, path)
    assert len(load(path).graph.nodes) == len(other.graph.nodes) != len(model.graph.nodes)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(Exception, match="not a readable ONNX model"):
        load(path)


@pytest.mark.slow
def test_a_graph_is_walked_once_for_each_state(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_clock: None
) -> None:
    """Blocks and features, the trial batch, scores, what is left after a drop, and the repair."""
    walked: list[Model] = []
    exported: list[Model] = []
    make, export = Topology.__init__, Model._new_export

    def counted(self: Topology, model: Model) -> None:
        walked.append(model)
        make(self, model)

    def counted_export(model: Model) -> Exported:
        exported.append(model)
        return export(model)

    monkeypatch.setattr(Topology, "__init__", counted)
    monkeypatch.setattr(Model, "_new_export", counted_export)
    monkeypatch.setattr(Model, "_export", Model._export.unchecked)  # type: ignore[attr-defined]
    net, out = models / "resnet20-fashion.onnx", tmp_path / "out.onnx"
    argv = ["drop-blocks", str(net), str(out), "--blocks", "1", "--steps", "0", "--synthetic", "8"]
    assert main([*argv, "--preprocess", "fashion-mnist", "-q", "--no-verify"]) == 0
    assert len(walked) <= 6
    assert len(exported) <= 10  # five of them are timed, each without one kind of block
