"""The text of a recipe: YAML 1.2 without tags and references, and the line number of each value.

    text --compose--> nodes with marks --construct--> plain values        line(path) from the nodes

ruamel.yaml is used instead of PyYAML because it reads YAML 1.2, where `no` is a text and `5e-3` a number,
and because it refuses duplicate keys. Tags (`!!python/object`), anchors and aliases are refused, so that a
recipe runs no code and means what its text says.
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
    """The values of a file (dict, list, str, int, float, bool, None), with the place of each."""

    def __init__(self, text: str, name: str) -> None:
        """Parse the text.

        Args:
            text: The YAML text.
            name: Its name in messages.

        Raises:
            OptionError: It is not plain YAML; the message names the line.
        """
        self.name = name
        yaml = YAML(typ="safe", pure=True)
        try:
            self._root: Node | None = yaml.compose(text)
            self._refuse(self._root, set())
            self.value: Any = yaml.load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark is not None else ""
            lines = text.splitlines()[mark.line : mark.line + 1] if mark is not None else []
            hint = (
                "; within { } a variable wants quotes: '${name}'"
                if any("${" in text for text in lines)
                else ""
            )
            raise OptionError(f"{name}{line}: not valid YAML ({_one_line(error.problem)}){hint}") from error
        except (YAMLError, ValueError) as error:  # ValueError: an invalid character, or a year 0
            raise OptionError(f"{name}: not valid YAML ({_one_line(error)})") from error
        except RecursionError as error:
            raise OptionError(f"{name}: not a recipe (nested too deep)") from error

    def fail(self, place: Place, message: str) -> NoReturn:
        """Raise an error that names the line of a value.

        Args:
            place: Where the value stands; the nearest value around it is named where it does not exist.
            message: What is wrong.

        Raises:
            OptionError: Always.
        """
        raise OptionError(f"{self.name}:{self._line(place)}: {message}")

    def unknown(self, place: Place, what: str, name: object, known: Sequence[str]) -> NoReturn:
        """Raise an error for an unknown name, with the most similar known name.

        Args:
            place: Where the name stands.
            what: What it should be the name of.
            name: The name.
            known: The names that are allowed.

        Raises:
            OptionError: Always.
        """
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
        self.fail(place, f"no such {what}: {name!r}; {hint}")

    def mapping(self, value: Any, place: Place, what: str, known: Sequence[str] | None) -> dict[str, Any]:
        """Check that a value is a mapping with text keys.

        Args:
            value: The value; None counts as an empty mapping.
            place: Where it stands.
            what: What its keys are the names of, for messages.
            known: The keys that are allowed; None: all.

        Returns:
            The mapping.

        Raises:
            OptionError: It is something else, or has another key.
        """
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
    """Read a YAML file.

    Args:
        path: The file.

    Returns:
        Its values, with their places.

    Raises:
        OptionError: It cannot be read, or is not plain YAML.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file}: not a recipe (no UTF-8 text); expected YAML") from error
    except OSError as error:
        raise OptionError(f"{file}: the recipe cannot be read ({error.strerror})") from error
    return Document(text, str(file))


def dump(value: dict[str, Any]) -> str:
    """Write values as YAML that `Document` reads back.

    Args:
        value: The mapping to write.

    Returns:
        The YAML text.
    """
    from io import StringIO

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = StringIO()
    yaml.dump(value, out)
    return out.getvalue()


def shown(value: Any) -> str:
    """Format a value for a message.

    Args:
        value: The value.

    Returns:
        JSON of at most 60 characters.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
