"""The structure of the package in figures: `python -m tests.structure` prints them.

import cycles       groups of modules that import each other, imports for types alone included
import levels       longest chain of rooms (folders and files of the package) that import each other
top-level modules   files directly in the package
functions           lines of the median and of the longest one; files over 350 lines
undocumented        public functions with parameters and no Args, or with a result and no Returns
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import grimp

from tests.helpers.paths import ROOT

PACKAGE = "onnxcompress"
LONGEST_FILE = 350


@dataclass(frozen=True)
class Structure:
    """The figures."""

    cycle: list[str]
    levels: int
    top_level: list[str]
    median_function: float
    longest_functions: list[tuple[int, str]]
    long_files: list[tuple[int, str]]
    undocumented: list[str] = field(repr=False)


def measure() -> Structure:
    """Read the sources and their imports."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    imports = {m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}
    functions = list(_functions())
    lengths = sorted(((_length(node), name) for name, node in functions), reverse=True)
    files = [(len(path.read_text("utf-8").splitlines()), _name(path)) for path in sources()]
    return Structure(
        cycle=_cycle(imports),
        levels=_levels(imports),
        top_level=sorted(path.name for path in (ROOT / PACKAGE).glob("*.py")),
        median_function=median(length for length, _ in lengths),
        longest_functions=lengths[:3],
        long_files=[(lines, name) for lines, name in sorted(files, reverse=True) if lines > LONGEST_FILE],
        undocumented=[name for name, node in _public_functions() if not _is_documented(node)],
    )


def sources() -> list[Path]:
    """The package's own files; `onnxcompress/passes` is a link to `passes`."""
    found = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    return sorted(path for path in found if (ROOT / PACKAGE / "passes") not in path.parents)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _cycle(imports: dict[str, list[str]]) -> list[str]:
    """The modules of one cycle; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _levels(imports: dict[str, list[str]]) -> int:
    """Rooms on the longest chain of imports."""
    rooms: dict[str, set[str]] = {}
    for module, imported in imports.items():
        rooms.setdefault(_room(module), set()).update(map(_room, imported))

    level: dict[str, int] = {}
    below = {room: others - {room} for room, others in rooms.items()}
    for room in TopologicalSorter(below).static_order():
        level[room] = 1 + max((level[other] for other in below[room]), default=0)
    return max(level.values())


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{_name(path)}:{node.name}", node


def _public_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sources():
        for node in _public(ast.parse(path.read_text("utf-8")).body):
            yield f"{_name(path)}:{node.name}", node


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions and methods that other modules may call: none inside a function or a private class."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public(node.body)


def _length(node: ast.FunctionDef) -> int:
    """Lines of the body, without the docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def _is_documented(node: ast.FunctionDef) -> bool:
    """Whether a public function says what goes in and what comes out, where anything does."""
    if node.name.startswith("_") or any(_decorator(d) in _EXEMPT for d in node.decorator_list):
        return True
    text = ast.get_docstring(node) or ""
    parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    takes = bool(set(parameters) - {"self", "cls"})
    gives = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")
    return (not takes or "Args:" in text) and (not gives or "Returns:" in text or "Yields:" in text)


_EXEMPT = ("property", "cached_property", "setter", "option", "argument", "command", "overload")
"""Decorators of functions whose parameters are documented elsewhere: click's options, properties."""


def _decorator(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def main() -> None:
    """Print the figures."""
    found = measure()
    print("import cycles:      ", " -> ".join(found.cycle) or 0)
    print("import levels:      ", found.levels)
    print("top-level modules:  ", len(found.top_level), *found.top_level)
    print("median function:    ", found.median_function, "lines")
    print("longest functions:  ", *(f"{lines} {name}" for lines, name in found.longest_functions))
    print("files over 350:     ", *(f"{lines} {name}" for lines, name in found.long_files))
    print("without Args/Returns:", len(found.undocumented))


if __name__ == "__main__":
    main()
