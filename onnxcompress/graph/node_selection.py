"""Which nodes a pass may change, by patterns of names and operators.

| pattern             | nodes                                                                   |
|---------------------|-------------------------------------------------------------------------|
| `/head/conv/Conv`   | the node of that name (where it has none, of its first output's name)   |
| `/head/*`           | names that fit: `*` any characters, `?` one, `[ab]` one of these        |
| `re:head\\.[0-3]`    | names in which the regular expression is found                          |
| `op:Gemm`, `op:*Norm*` | operators                                                            |
| `@FILE`             | the patterns in a file, one a line; `#` begins a comment                |

`include` names what may be changed (nothing named: everything), `exclude` what may not. A pattern that
fits no node, an empty one, and patterns that leave nothing to change are errors: they are slips more often
than not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

import onnx_graphsurgeon as gs

from onnxcompress.errors import OptionError, one_line
from onnxcompress.formatting import counted
from onnxcompress.graph.query import node_label
from onnxcompress.model import Model
from onnxcompress.option_fields import option

REGEX, OPERATOR, FILE, COMMENT = "re:", "op:", "@", "#"
_NAMES = "names (* ? [ab]), re:REGEX, op:OPERATOR or @FILE with one a line"

Named = tuple[str, str]
"""A node: its name, and its operator."""


@dataclass(frozen=True)
class NodeSelection:
    """Patterns of the nodes that a pass may change, and of those that it may not."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def refusal(self, name: str, op: str) -> str:
        """Say why a node may not be changed.

        Args:
            name: Its name.
            op: Its operator.

        Returns:
            The rule; empty where it may be changed.
        """
        out = next((pattern for pattern in self.exclude if fits(pattern, name, op)), None)
        if out is not None:
            return f"--exclude {out} leaves it as it is"
        if self.include and not any(fits(pattern, name, op) for pattern in self.include):
            return "it is not among --include"
        return ""

    def takes(self, node: gs.Node) -> bool:
        """Return whether a node may be changed.

        Args:
            node: The node.

        Returns:
            Whether it may.
        """
        return not self.refusal(node_label(node), node.op)

    def check(self, *models: Model) -> None:
        """Check that each pattern fits a node.

        Args:
            models: The model, also as it was before it was prepared.

        Raises:
            OptionError: A pattern fits none; the message suggests what is alike.
        """
        if not (self.include or self.exclude):
            return
        nodes = {(node_label(node), node.op) for model in models for node in model.graph.nodes}
        for flag, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(fits(pattern, *node) for node in nodes):
                    raise OptionError(f"{flag} {pattern!r}: no node fits{_near(pattern, sorted(nodes))}")

    def check_taken(self, taken: int, all_nodes: Callable[[], int], change: str) -> None:
        """Check that the patterns leave something to change.

        Args:
            taken: Number of nodes that can be changed and that the patterns take.
            all_nodes: Counts the nodes that could be changed without any pattern; asked only where needed.
            change: What is done to a node, as "quantized".

        Raises:
            OptionError: They take none, and there are some.
        """
        if taken or not (self.include or self.exclude) or not (count := all_nodes()):
            return
        given = [f"--{name} {','.join(patterns)}" for name in ("include", "exclude")
                 if (patterns := getattr(self, name))]  # fmt: skip
        raise OptionError(
            f"{' '.join(given)}: nothing is left that can be {change}; without it there would be "
            f"{counted(count, 'node')}"
        )


EVERY_NODE = NodeSelection()
"""All nodes may be changed."""


@dataclass(frozen=True)
class SelectionOptions:
    """The options of a pass whose nodes can be chosen."""

    include: tuple[str, ...] = option(
        (),
        f"Change these nodes alone: {_NAMES}.",
        metavar="PATTERN,…",
        advanced=True,
        lists=True,
    )
    exclude: tuple[str, ...] = option(
        (), f"Leave these nodes as they are: {_NAMES}.", metavar="PATTERN,…", lists=True
    )

    def __post_init__(self) -> None:
        given = self.include
        for name in ("include", "exclude"):
            object.__setattr__(self, name, read_patterns(getattr(self, name), f"--{name}"))
        if given and not self.include:  # no pattern at all would let everything be changed
            raise OptionError(f"--include {','.join(given)}: it has no pattern; leave the option out")

    @property
    def selection(self) -> NodeSelection:
        """The nodes that may be changed."""
        return NodeSelection(self.include, self.exclude)


def read_patterns(given: Sequence[str], flag: str) -> tuple[str, ...]:
    """Replace files by the patterns in them, and check regular expressions.

    Args:
        given: Patterns, and files as `@FILE`.
        flag: The option, for messages.

    Returns:
        The patterns.

    Raises:
        OptionError: A file cannot be read, a regular expression is wrong, or there is one word alone,
            or something else than a text.
    """
    if isinstance(given, str):  # from a program: its letters would be taken for patterns
        raise OptionError(f"{flag} {given!r}: expected several; give ({given!r},)")
    found: list[str] = []
    for pattern in given:
        if not isinstance(pattern, str):
            raise OptionError(f"{flag} {pattern!r}: expected a text")
        found += _lines(pattern[1:], flag) if pattern.startswith(FILE) else [pattern]
    for pattern in found:
        if pattern in ("", REGEX, OPERATOR):
            raise OptionError(f"{flag} {pattern!r}: it is empty; give {_NAMES}")
        if pattern.startswith(REGEX):
            try:
                re.compile(pattern[len(REGEX) :])
            except re.error as error:
                raise OptionError(f"{flag} {pattern!r}: not a regular expression ({error})") from error
    return tuple(dict.fromkeys(found))


def fits(pattern: str, name: str, op: str) -> bool:
    """Return whether a pattern fits a node.

    Args:
        pattern: The pattern, not a file.
        name: The node's name.
        op: Its operator.

    Returns:
        Whether it fits.
    """
    if pattern.startswith(REGEX):
        return re.search(pattern[len(REGEX) :], name) is not None
    if pattern.startswith(OPERATOR):
        return fnmatchcase(op, pattern[len(OPERATOR) :])
    return pattern == name or fnmatchcase(name, pattern)


def _lines(path: str, flag: str) -> list[str]:
    if not path:
        raise OptionError(f"{flag} {FILE}: name a file after it, with one pattern a line")
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise OptionError(f"{flag} @{path}: cannot be read ({one_line(error)})") from error
    return [text for line in lines if (text := line.strip()) and not text.startswith(COMMENT)]


def _near(pattern: str, nodes: Iterable[Named]) -> str:
    """Suggest the most similar name or operator."""
    by_op = pattern.startswith(OPERATOR)
    plain = pattern.removeprefix(OPERATOR).removeprefix(REGEX).strip("*^$")
    known = dict.fromkeys(op if by_op else name for name, op in nodes)
    near = get_close_matches(plain, known, 1) or [name for name in known if plain and plain in name][:1]
    if not near:
        return (
            f"; operators are {', '.join(known)}"
            if by_op
            else "; `onnxcompress sensitivity` lists the layers"
        )
    return f"; did you mean {(OPERATOR if by_op else '') + near[0]!r}?"
