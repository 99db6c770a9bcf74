"""What a command loads, how fast it starts, and what it says where a package is not there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from onnxcompress import passes
from onnxcompress.cli.main import COMMANDS
from onnxcompress.passes import CATALOGUE

NAMES = [*COMMANDS, *(entry.name for entry in CATALOGUE)]
NET = "resnet20-fashion.onnx"
WITHOUT = """
import sys
from importlib.machinery import PathFinder
gone, *argv = sys.argv[1:]

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == gone else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from onnxcompress.cli.main import main
sys.exit(main(argv))
"""
"""A command in a Python in which one package is not installed."""


def loaded(*argv: str) -> set[str]:
    """The heavy packages that a command imports."""
    return imported(*argv)[0]


def imported(*argv: str) -> tuple[set[str], int]:
    """The heavy packages that a command imports, and the number of modules."""
    code = (
        "import sys; from onnxcompress.cli.main import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'onnxruntime', 'matplotlib', 'pydantic', 'jinja2'}\n"
        "print(len(sys.modules), *sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, *heavy = done.stderr.splitlines()[-1].split()
    return set(heavy), int(count)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_help_comes_at_once(name: str) -> None:
    """What is imported is what takes the time, and no clock has to be read: 493 modules at most today."""
    heavy, count = imported(name, "--help")
    assert heavy == set()
    assert count < 500


def test_the_list_of_commands_imports_no_part_of_a_pass() -> None:
    """Names of `onnxcompress.passes` are imported when they are asked for, and all of them can be."""
    code = (
        "import sys, onnxcompress.cli.main as main; main.main(['--help'])\n"
        "assert not {'onnxcompress.passes.base', 'onnxcompress.account', 'dataclasses'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    declared = ast.parse(Path(passes.__file__).read_text("utf-8"))
    names = [
        a.name for n in ast.walk(declared) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname
    ]
    assert {"Pass", "PassResult", "option", "Refusal", "apply_to_proto"} <= set(names)
    assert [name for name in names if not hasattr(passes, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Passes'"):
        passes.Passes  # noqa: B018


def test_looking_needs_neither_torch_nor_onnxruntime(models: Path) -> None:
    """Of fold-bn its own tests say so."""
    assert loaded("inspect", str(models / NET)) == set()


RECIPE = "passes: [fold-bn, drop-blocks: {blocks: 1, images: few}]"
MISSING = [
    (
        "torch",
        ["run", "{recipe}"],
        "pass 2 of 2, drop-blocks: drop-blocks needs torch, which is not installed",
    ),
    ("torch", ["quantize"], "error: quantize needs torch, which is not installed here: pip install torch"),
    ("onnxruntime", ["fold-bn"], "comparing the outputs (or give --no-verify) needs onnxruntime"),
    (
        "onnxruntime",
        ["fold-bn", "--no-verify", "--max-latency", "1"],
        "No module named 'onnxruntime'; install",
    ),
]


@pytest.mark.parametrize(("gone", "command", "said"), MISSING)
def test_a_package_that_is_not_there_is_said_before_the_work(
    gone: str, command: list[str], said: str, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = [word.format(recipe=tmp_path / "r.yaml") for word in command]
    at = 2 if words[0] == "run" else 1
    words[at:at] = [str(models / NET), str(tmp_path / "o.onnx")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, gone, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o.onnx").exists()
