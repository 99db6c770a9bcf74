"""The text of a recipe: YAML 1.2 without anything that runs code or refers elsewhere, and its line numbers.

    text --compose--> nodes with marks --construct--> plain values        line(path) from the nodes

ruamel.yaml, not PyYAML: it reads YAML 1.2, where `no` is a text and `5e-3` a number, and refuses a key that
is given twice. Tags (`!!python/object`), anchors and aliases are refused, so that a recipe is what it says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from onnxcompress.errors import OptionError

Place = tuple[str | int, ...]
"""Keys and indices from the top of the file to a value."""

_PREFIX = "tag:yaml.org,2002:"
_PLAIN = {_PREFIX + name for name in ("map", "seq", "str", "int", "float", "bool", "null")}


class Document:
    """The values of a file (dict, list, str, int, float, bool, None), and where each of them stands."""

    def __init__(self, text: str, name: str) -> None:
        """Raises OptionError, with the line, for what is not plain YAML."""
        self.name = name
        yaml = YAML(typ="safe", pure=True)
        try:
            self._root: Node | None = yaml.compose(text)
            self._refuse(self._root, set())
            self.value: Any = yaml.load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark is not None else ""
            said = text.splitlines()[mark.line : mark.line + 1] if mark is not None else []
            hint = (
                "; within { } a variable wants quotes: '${name}'"
                if any("${" in one for one in said)
                else ""
            )
            raise OptionError(f"{name}{line}: not valid YAML ({_one_line(error.problem)}){hint}") from error
        except (YAMLError, ValueError) as error:  # ValueError: a character that is none, a year 0
            raise OptionError(f"{name}: not valid YAML ({_one_line(error)})") from error
        except RecursionError as error:
            raise OptionError(f"{name}: not a recipe (nested too deep)") from error

    def fail(self, place: Place, message: str) -> NoReturn:
        """Raise OptionError for the value at `place`, or the nearest around it, with its line."""
        raise OptionError(f"{self.name}:{self._line(place)}: {message}")

    def unknown(self, place: Place, what: str, name: object, known: Sequence[str]) -> NoReturn:
        """Raise OptionError for a name that is none of `known`, with the nearest that is."""
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
        self.fail(place, f"no such {what}: {name!r}; {hint}")

    def mapping(self, value: Any, place: Place, what: str, known: Sequence[str] | None) -> dict[str, Any]:
        """`value`, which must be a mapping with text keys, all of them `known`; nothing is an empty one."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.fail(place, f"expected a mapping, each {what} with its value, got {shown(value)}")
        for key in value:
            if known is not None and key not in known:
                self.unknown((*place, key), what, key, known)
            if not isinstance(key, str):
                self.fail(place, f"expected the name of a {what}, got {shown(key)}")
        return value

    def _line(self, place: Place) -> int:
        node = self._root
        line = node.start_mark.line if node is not None else 0
        for step in place:
            if isinstance(node, MappingNode):
                pair = next(((k, v) for k, v in node.value if k.value == str(step)), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line, pair[1]
            elif isinstance(node, SequenceNode) and isinstance(step, int):
                node = node.value[step]
                line = node.start_mark.line
            else:
                break
        return int(line) + 1

    def _refuse(self, node: Node | None, seen: set[int]) -> None:
        """Raise OptionError at a tag, an anchor or an alias."""
        if node is None:
            return
        line = node.start_mark.line + 1
        if id(node) in seen or node.anchor is not None:
            raise OptionError(
                f"{self.name}:{line}: anchors (&, *) are not read; write it out, or use a variable"
            )
        seen.add(id(node))
        if str(node.tag) not in _PLAIN:
            kind = str(node.tag).removeprefix(_PREFIX)
            hint = (
                "quote it" if isinstance(node, ScalarNode) and kind == "timestamp" else "leave the tag out"
            )
            raise OptionError(f"{self.name}:{line}: a value of type {kind!r} is not read; {hint}")
        children = node.value if isinstance(node, MappingNode | SequenceNode) else ()
        for child in children:
            for one in child if isinstance(child, tuple) else (child,):
                self._refuse(one, seen)


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read a recipe file. Raises OptionError where it cannot be read."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file}: not a recipe (no UTF-8 text); expected YAML") from error
    except OSError as error:
        raise OptionError(f"{file}: the recipe cannot be read ({error.strerror})") from error
    return Document(text, str(file))


def dump(value: dict[str, Any]) -> str:
    """YAML that `Document` reads back."""
    from io import StringIO

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = StringIO()
    yaml.dump(value, out)
    return out.getvalue()


def shown(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
