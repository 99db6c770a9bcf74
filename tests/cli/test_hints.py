"""Options that messages name exist, on a command that can print the message."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import numpy as np
import pytest

import onnxcompress
from onnxcompress.cli.main import COMMANDS, cli
from onnxcompress.errors import OptionError
from onnxcompress.model import Model
from onnxcompress.passes import CATALOGUE
from onnxcompress.passes.prune import Prune
from tests.helpers.folding import graph, weight

ROOT = Path(onnxcompress.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")
NO_OPTIONS = {"--ink", "--help", "--address", "--num-cpus", "--resources"}
"""A name of the report's style sheet; what click gives each command itself; options of `ray start`."""


def sources() -> dict[str, ast.Module]:
    """All modules of the package by dotted name."""
    files = {path: path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py")}
    passes = (ROOT / "passes").resolve()
    files |= {
        path: "onnxcompress" / path.relative_to(passes.parent).with_suffix("")
        for path in passes.rglob("*.py")
    }
    return {
        ".".join(name.parts).removesuffix(".__init__"): ast.parse(p.read_text())
        for p, name in files.items()
    }


SOURCES = sources()


def options_named(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, text, option) of the strings of a module; its own docstring draws diagrams."""
    own = tree.body[0].value if tree.body and isinstance(tree.body[0], ast.Expr) else None
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node is not own:
            for option in OPTION.findall(node.value):
                if option not in NO_OPTIONS:
                    yield node.lineno, node.value, option


@cache
def reached(module: str) -> frozenset[str]:
    """The modules that a module imports, itself or through others."""
    found, pending = set[str](), [module]
    while pending:
        name = pending.pop()
        if name in found or name not in SOURCES:
            continue
        found.add(name)
        for node in ast.walk(SOURCES[name]):
            if isinstance(node, ast.ImportFrom) and node.module:
                pending += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(found)


@cache
def commands() -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Command -> the modules that it can reach, and its options."""
    context = click.Context(cli)
    modules = {name: f"onnxcompress.cli.{module}" for name, (_, module, _) in COMMANDS.items()}
    modules |= {entry.name: f"onnxcompress.passes.{entry.module}" for entry in CATALOGUE}
    found = {}
    for name, module in modules.items():
        command = cli.get_command(context, name)
        assert command is not None
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        shared = set() if name in COMMANDS else reached("onnxcompress.cli.pass_commands")
        found[name] = (reached(module) | shared, frozenset(options))
    return found


def named_in(text: str) -> list[frozenset[str]]:
    """The options of the commands that a text names."""
    return [options for name, (_, options) in commands().items() if name in text]


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(SOURCES))
def test_options_in_messages_exist(module: str) -> None:
    able = [options for modules, options in commands().values() if module in modules]
    able = able or [options for _, options in commands().values()]
    for line, text, option in options_named(SOURCES[module]):
        assert any(option in options for options in able + named_in(text)), (
            f"{module}:{line}: there is no {option}"
        )


@pytest.mark.parametrize("name", [e.name for e in CATALOGUE])
def test_a_pass_names_its_own_options(name: str) -> None:
    """What only one pass can print names options of that pass."""
    modules, options = commands()[name]
    others = [m for other, (m, _) in commands().items() if other not in (name, "run")]
    for module in sorted(modules):
        if module.startswith("onnxcompress.passes.") and not any(module in m for m in others):
            for line, text, option in options_named(SOURCES[module]):
                assert any(option in known for known in (options, *named_in(text))), (
                    f"{module}:{line}: {name} has no {option}"
                )


def network() -> Model:
    arrays = {
        "w": weight(8, 3, 3, 3),
        "t": weight(8, 8, 2, 2),
        "d": weight(8, 1, 3, 3),
        "u": weight(4, 8, 1, 1),
    }
    body = """c = Conv<pads = [1,1,1,1]>(x, w) r = Relu(c) z = ConvTranspose<strides = [2,2]>(r, t)
        e = Conv<pads = [1,1,1,1], group = 8>(z, d) y = Conv(e, u)"""
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,16,16] y)", body, arrays))


def test_what_allows_more_sparsity_is_said_before_any_work() -> None:
    def never(*_: object) -> None:
        raise AssertionError("it began to work")

    for options, hints in (
        ({}, ["--scope layer prunes z", "--depthwise"]),
        (
            {"skip_first_last": True, "depthwise": True},
            ["--scope layer prunes z", "without --skip-first-last"],
        ),
        ({"scope": "layer", "skip_first_last": True}, ["--depthwise", "without --skip-first-last"]),
    ):
        with pytest.raises(OptionError) as caught:
            Prune(sparsity=0.9, **options).apply(network(), never)
        assert all(hint in str(caught.value) for hint in hints)
        assert str(caught.value).count("--") == len([h for h in hints if "--" in h]) + 1
    model = network()
    Prune(sparsity=0.7, scope="layer", synthetic=4).apply(model)
    weights = [t.values for t in model.graph.tensors().values() if t.name in ("w", "t", "u")]
    assert sum(np.count_nonzero(w) for w in weights) < 0.5 * sum(w.size for w in weights)
