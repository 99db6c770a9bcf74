"""Standard output that ends early, is full, or is named as a file: nothing else of the work is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.evaluation.guard import Guard
from onnxcompress.model import load, save
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.prune import Prune
from onnxcompress.pipeline import Pipeline

COMMAND = [sys.executable, "-m", "onnxcompress.cli.main"]
NET = "resnet20-fashion.onnx"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_leaves_costs_neither_the_report_nor_the_exit_code(
    models: Path, tmp_path: Path
) -> None:
    arguments = ["fold-bn", str(models / NET), "o.onnx", "--report", "r.html", "--max-size", "0.1"]
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.stderr is not None
        told = run.stderr.read().decode()
    assert run.returncode == 3, told
    assert (tmp_path / "r.html").exists()
    assert (tmp_path / "o.onnx").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["fold-bn", "-"]])
def test_a_full_disk_is_no_defect(arguments: list[str], models: Path) -> None:
    command, *rest = arguments
    with Path("/dev/full").open("w") as full:
        line = [*COMMAND, command, str(models / NET), *rest]
        run = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "error: the output cannot be written (No space left on device)"


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/null"])
def test_the_system_s_names_of_streams_are_not_replaced(
    name: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(name).is_symlink()
    assert main(["fold-bn", str(models / NET), name, "-q"]) == 1
    assert "no regular file; for standard output write -" in capsys.readouterr().err
    with pytest.raises(ModelError, match="no regular file"):
        save(load(models / NET), name)
    assert Path(name).is_symlink() == before


def test_floors_of_the_guard_are_numbers(models: Path, tmp_path: Path) -> None:
    line = ["prune", str(models / NET), str(tmp_path / "o.onnx"), "--min-snr", "nan"]
    assert main(line) == 2
    for floor in (np.nan, np.inf):
        with pytest.raises(OptionError, match="expected a number of decibels"):
            Pipeline([FoldBatchNorm()]).run(load(models / NET), guard=Guard(min_snr=floor))


def test_layers_whose_weights_are_not_finite_stay_and_do_not_stop_the_others(models: Path) -> None:
    model = load(models / NET)
    (conv,) = [n for n in model.graph.nodes if n.op == "Conv"][2:3]
    values = conv.inputs[1].values.copy()
    values.flat[0] = np.nan
    conv.inputs[1].values = values
    result = Prune(sparsity=0.5, reconstruct=False).apply(model)
    assert [r.node for r in result.refusals if "not finite" in r.rule] == [conv.name]
    zeros = [np.mean(n.inputs[1].values == 0) for n in model.graph.nodes if n.op == "Conv"]
    assert sum(share > 0.1 for share in zeros) >= len(zeros) - 2
