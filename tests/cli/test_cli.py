"""The command line's frame: help without libraries, errors in one line, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from onnxcompress.cli.main import COMMANDS, main
from onnxcompress.passes import CATALOGUE, load_pass


def test_help_imports_no_library() -> None:
    code = (
        "import sys; from onnxcompress.cli.main import main; main(['--help'])\n"
        "heavy = {'numpy', 'onnx', 'onnx_graphsurgeon', 'onnxruntime', 'torch', 'rich'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in [*COMMANDS, *(entry.name for entry in CATALOGUE)]:
        assert name in done.stdout


def test_interrupted_inside_exec_it_ends_with_130(tmp_path: Path) -> None:
    """As while a library is imported that makes dataclasses."""
    (tmp_path / "interrupted.py").write_text(
        "import sys; from onnxcompress.cli import main as m\n"
        "m.cli.main = lambda **_: exec('raise KeyboardInterrupt')\n"
        "sys.exit(m.main([]))"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("name", [*COMMANDS, *(entry.name for entry in CATALOGUE)])
def test_each_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"onnxcompress {name}" in capsys.readouterr().out.split("Example")[1]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("drop-blocks", ["latency-reduction", "blocks", "drop"]),
        ("drop-channels", ["latency-reduction", "macs-reduction", "channels-kept"]),
    ],
)
def test_the_help_begins_with_what_is_asked_for(
    name: str, targets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    options = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out.split("\nOptions:")[1], re.MULTILINE)
    assert options[: len(targets)] == targets


def test_the_catalogue_names_its_passes() -> None:
    assert [load_pass(entry.name).name for entry in CATALOGUE] == [entry.name for entry in CATALOGUE]


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspct"]) == 2
    assert "Did you mean 'inspect'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["fold-bn"]])
def test_a_broken_file_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07\x3a\xff\xff\x03")
    rest = [str(tmp_path / "out.onnx")] if command == ["fold-bn"] else []
    assert main([*command, str(broken), *rest]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()


def test_the_input_is_not_overwritten(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "net.onnx"
    copy.write_bytes((models / "mobilenetv2-fashion.onnx").read_bytes())
    assert main(["fold-bn", str(copy), str(copy)]) == 1
    assert "would replace the input" in capsys.readouterr().err
    assert copy.read_bytes() == (models / "mobilenetv2-fashion.onnx").read_bytes()


def test_the_inputs_external_data_is_not_overwritten(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load(models / "mobilenetv2-fashion.onnx")
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, location="fast.onnx.data")
    before = (tmp_path / "fast.onnx.data").read_bytes()
    for out in ("fast.onnx", "fast.onnx.data"):
        assert main(["fold-bn", str(tmp_path / "net.onnx"), str(tmp_path / out)]) == 1
        assert "it holds the input's weights" in capsys.readouterr().err
    assert (tmp_path / "fast.onnx.data").read_bytes() == before


def test_an_open_image_size_is_shown_and_compared_at_a_usual_one(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load(models / "mobilenetv2-fashion.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "net.onnx")
    assert main(["inspect", str(tmp_path / "net.onnx")]) == 0
    assert "N×1×H×28" in capsys.readouterr().out
    assert main(["fold-bn", str(tmp_path / "net.onnx"), str(tmp_path / "o.onnx")]) == 0
    assert "largest output difference: " in capsys.readouterr().out
    written = onnx.load(tmp_path / "o.onnx").graph.input[0].type.tensor_type.shape
    assert written.dim[2].dim_param == "H"


def test_fold_bn_reports_and_compares(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folded.onnx"
    assert main(["fold-bn", str(models / "mobilenetv2-fashion.onnx"), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["changes"]) == 32
    assert report["measured"]["difference"]["max_rel"] < 1e-5
    assert main(["inspect", str(out), "--statistics"]) == 0
    shown = capsys.readouterr().out
    assert "statistics of 32 tensors" in shown
    assert "8 blocks that can be dropped" in shown
    assert main(["fold-bn", str(out), str(tmp_path / "again.onnx")]) == 0
    assert "nothing to change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fold-bn", "net.onnx"], "error: Missing argument 'OUT'. See 'onnxcompress fold-bn --help'.\n"),
        (["fold-bn", "a", "b", "--verfy"], "error: No such option '--verfy'. (Did you mean one of: "),
        (
            ["quantize", "a", "b", "--seed", "x"],
            "error: Invalid value for '--seed': 'x' is not a valid integer.",
        ),
        (["qantize"], "error: No such command 'qantize'. Did you mean 'quantize'?\n"),
        (["xyz"], "error: No such command 'xyz'. See 'onnxcompress --help'.\n"),
        (["inspect", "."], "error: .: a folder; name an ONNX file\n"),
    ],
)
def test_a_wrong_use_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) in (1, 2)
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith(said)
    assert caught.err.count("\n") == 1
