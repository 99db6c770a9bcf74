"""What SECURITY.md promises has a test, the package's source keeps to it, and the lock is whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.paths import ROOT

SOURCES = sorted([*ROOT.glob("onnxcompress/**/*.py"), *ROOT.glob("passes/**/*.py")])
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "xml",
    "ctypes",
}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load",
    "torch.hub.load", "numpy.load", "np.load", "pickle.load", "pickle.loads",
}  # fmt: skip
ALLOWED = {
    ("onnxcompress/cli/main.py", "exec('')"),  # of a constant: see the comment there
    ("onnxcompress/runtime/session.py", "import ctypes"),  # whether a CUDA driver is there
    ("onnxcompress/optimize/device.py", "import ctypes"),  # freed memory goes back to the system
}


def found(text: str, file: str) -> Iterator[str]:
    """What may run code, in one source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            yield from (f"import {n}" for n in names if n.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            safe = (
                name in ("np.load", "numpy.load")
                and ast.unparse(keywords.get("allow_pickle", ast.Constant(None))) == "False"
            )
            shell = "shell" in keywords and ast.unparse(keywords["shell"]) != "False"
            if (name in CALLS and not safe) or shell:
                yield ast.unparse(node)
            if name == "YAML" and ast.unparse(node) != "YAML(typ='safe', pure=True)":
                yield ast.unparse(node)


@pytest.mark.slow
def test_nothing_in_the_package_runs_what_a_file_says() -> None:
    seen = set()
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        seen |= {(name, what) for what in found(path.read_text("utf-8"), name)}
    assert seen <= ALLOWED, seen - ALLOWED


@pytest.mark.parametrize(
    "text",
    ["eval(x)", "import pickle", "from pickle import loads", "np.load(f)", "np.load(f, allow_pickle=True)",
     "torch.load(f)", "run(c, shell=True)", "YAML(typ='unsafe')", "exec(open(f).read())"],
)  # fmt: skip
def test_the_check_finds_what_it_is_for(text: str) -> None:
    assert list(found(text, "x.py"))


def test_each_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    promises = [line for line in text.splitlines() if line.startswith("| ") and "`tests/" in line]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line) for line in promises]
    assert len(promises) > 10
    assert all(named)
    for file, test in {pair for pairs in named for pair in pairs}:
        functions = {
            n.name
            for n in ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
            if isinstance(n, ast.FunctionDef)
        }
        assert test in functions, f"{file}::{test}"


def test_the_lock_has_a_hash_for_every_package() -> None:
    """And the versions of constraints.txt, which the README's command installs by."""
    text = (ROOT / "requirements.lock").read_text("utf-8").replace("\\\n", " ")
    rows = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert rows
    pinned = {}
    for row in rows:
        name, version, rest = re.fullmatch(r"([\w.-]+)==([\w.+]+)([^#]*)", row).groups()  # type: ignore[union-attr]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", rest), row
        pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            assert pinned.get(re.sub(r"[-_.]+", "-", name).lower(), version) == version, name
