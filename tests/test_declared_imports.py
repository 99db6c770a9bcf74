"""Every package that the code imports is a requirement, or one of an extra."""

from __future__ import annotations

import ast
import re
import sys
from configparser import ConfigParser

from tests.helpers.paths import ROOT

DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "ml_dtypes": "ml_dtypes",
    "mlflow": "mlflow-skinny",
    "pynvml": "nvidia-ml-py",
    "ruamel": "ruamel.yaml",
}
"""Import -> name of its distribution, where they differ by more than a dash."""
HOSTS = {"onnxcompress", "olive"}
"""The package itself, and a program that loads it."""


def imported() -> set[str]:
    """Top-level packages that are imported anywhere, also in functions."""
    files = [*(ROOT / "onnxcompress").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - HOSTS


def test_what_is_imported_is_declared() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", "utf-8")
    extras = {name: text for name, text in settings["options.extras_require"].items() if name != "test"}
    lines = "\n".join([settings["options"]["install_requires"], *extras.values()]).split("\n")
    declared = {re.split(r"[<>=!;\[ ]", line)[0] for line in lines if line}
    names = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in imported()}
    assert not names - declared
