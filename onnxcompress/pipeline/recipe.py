"""Recipes: passes in order with their options, checked as a whole before the first of them runs.

    variables:                    # names and defaults, replaced by `-D images=photos/`
      images: fashion-tiny.npz
    passes:                       # a name, or a name and its options
      - fold-bn
      - drop-blocks:
          images: ${images}
          blocks: 2
    timing:                       # where latency is measured (`onnxcompress.runtime.timing_options`)
      provider: cuda
    guard:                        # how much the outputs may change (`onnxcompress.evaluation.guard`)
      min_snr: 6
    gates:                        # conditions that the result must meet (`onnxcompress.evaluation.gates`)
      min_agreement: 95

An option has the name and the type of the pass's field: pydantic checks each value strictly against the
field's annotation, so `steps: "3"` is an error. A value from -D is text and is read as on the command line.
`${name}` on its own has the type of its variable, within a text it is text; `$${` stands for `${`. A path
in the recipe is relative to the recipe's folder, one from -D to the current folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from onnxcompress.errors import RuntimeUnavailable
from onnxcompress.evaluation.gates import Gates
from onnxcompress.evaluation.guard import Guard
from onnxcompress.option_fields import alias_fields, is_required, option_adapter
from onnxcompress.passes import CATALOGUE, load_pass
from onnxcompress.passes.base import Pass
from onnxcompress.passes.plugins import plugins
from onnxcompress.pipeline.recipe_yaml import Document, Place, dump, read_document, shown
from onnxcompress.runtime.timing_options import TimingOptions

SECTIONS = ("variables", "passes", "timing", "guard", "gates")
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}")
Built = TypeVar("Built", Pass, Gates, Guard, TimingOptions)


class Given(str):
    """A text with a value of -D in it: parsed as on the command line, paths not relative to the recipe."""

    __slots__ = ()


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe, with every option of its own type."""

    passes: tuple[Pass, ...]
    gates: Gates = field(default_factory=Gates)
    guard: Guard = field(default_factory=Guard)
    timing: TimingOptions = field(default_factory=TimingOptions)


def read_recipe(
    path: str | os.PathLike[str],
    variables: Mapping[str, str] | None = None,
    folder: str | os.PathLike[str] = "",
) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: The file.
        variables: Values of its variables, as given with -D.
        folder: Folder that paths in these values are relative to; empty: the current one.

    Returns:
        The recipe.

    Raises:
        OptionError: Something in the recipe is wrong; the message names the line.
        RuntimeUnavailable: The package of a pass cannot be imported.
    """
    return _read(read_document(path), variables, folder)


def variables_of(path: str | os.PathLike[str]) -> set[str]:
    """List the variables that a recipe file declares or uses.

    Args:
        path: The file.

    Returns:
        Their names.

    Raises:
        OptionError: The file cannot be read, or is not plain YAML.
    """
    document = read_document(path)
    top = document.mapping(document.value, (), "section", SECTIONS)
    declared = document.mapping(top.get("variables"), ("variables",), "variable", None)
    used = _VARIABLE.finditer(str(document.value))
    return {*declared, *(found[1] for found in used if found[1])}


def read_gates(document: Document, values: Any) -> Gates:
    """Build gates from the section `gates` of another kind of file.

    Args:
        document: The file.
        values: The section.

    Returns:
        The gates.

    Raises:
        OptionError: A key or a value is wrong.
    """
    return _Reader(document, None, {}, "").build(Gates, values, ("gates",))


def parse_recipe(text: str, name: str = "recipe", variables: Mapping[str, str] | None = None) -> Recipe:
    """Check the text of a recipe, as `read_recipe` does for a file.

    Args:
        text: The recipe.
        name: Its name in messages; paths in the recipe are relative to the folder of this name.
        variables: Values of its variables, as given with -D.

    Returns:
        The recipe.

    Raises:
        OptionError: Something in the recipe is wrong; the message names the line.
        RuntimeUnavailable: The package of a pass cannot be imported.
    """
    return _read(Document(text, name), variables)


def write_recipe(recipe: Recipe, folder: str | os.PathLike[str] = ".") -> str:
    """Write a recipe as text, with the options that differ from their defaults.

    Args:
        recipe: The recipe.
        folder: The folder that it will lie in; paths in the text are relative to it.

    Returns:
        The text.
    """
    passes = [{p.name: o} if (o := _set_options(p, folder)) else p.name for p in recipe.passes]
    parts: dict[str, TimingOptions | Guard | Gates] = {
        "timing": recipe.timing,
        "guard": recipe.guard,
        "gates": recipe.gates,
    }
    sections = {name: _set_options(part, folder) for name, part in parts.items()}
    return dump({"passes": passes} | {name: values for name, values in sections.items() if values})


def pass_names() -> list[str]:
    """List all passes that a recipe can name.

    Returns:
        The names of the catalogue, then those of other packages.
    """
    return [entry.name for entry in CATALOGUE] + list(plugins())


def _read(
    document: Document, variables: Mapping[str, str] | None, folder: str | os.PathLike[str] = ""
) -> Recipe:
    top = document.mapping(document.value, (), "section", SECTIONS)
    listed = top.get("passes")
    if not isinstance(listed, list) or not listed:
        document.fail(("passes",), "passes: expected a list of passes, such as `- fold-bn`")
    reader = _Reader(document, top.get("variables"), variables or {}, folder)
    passes = tuple(reader.read_pass(index, item) for index, item in enumerate(listed))
    guard = reader.build(Guard, top.get("guard"), ("guard",))
    gates = reader.build(Gates, top.get("gates"), ("gates",))
    timing = reader.build(TimingOptions, top.get("timing"), ("timing",))
    reader.check_used()
    return Recipe(passes, gates, guard, timing)


class _Reader:
    """Builds passes and gates from the values of a document, with variables replaced."""

    def __init__(
        self, document: Document, declared: Any, given: Mapping[str, str], folder: str | os.PathLike[str]
    ) -> None:
        self.document = document
        self.given = given
        self.folder = folder
        self.declared = document.mapping(declared, ("variables",), "variable", None)
        self.used: set[str] = set()

    def read_pass(self, index: int, item: Any) -> Pass:
        """Build one pass.

        Args:
            index: Its position in the list of passes.
            item: A name, or a mapping of a name to options.

        Returns:
            The pass.

        Raises:
            OptionError: The name or an option is wrong.
            RuntimeUnavailable: The package of the pass cannot be imported.
        """
        place: Place = ("passes", index)
        if isinstance(item, dict) and len(item) == 1:
            name, options = next(iter(item.items()))
        elif isinstance(item, str):
            name, options = item, None
        else:
            self.document.fail(place, f"expected one pass, with its options or without, got {shown(item)}")
        if name not in pass_names():
            self.document.unknown(place, "pass", name, pass_names())
        try:
            return self.build(load_pass(name), options, (*place, name) if item is not name else place)
        except RuntimeUnavailable as error:
            raise RuntimeUnavailable(f"{self.document.name}: {error}") from error

    def build(self, cls: type[Built], options: Any, place: Place) -> Built:
        """Build an instance of a class from its options.

        Args:
            cls: The class of a pass, or Gates.
            options: A mapping of the class's fields to values, or None.
            place: Where the options stand in the document.

        Returns:
            The instance.

        Raises:
            OptionError: An option is unknown, has a wrong value, or is required and missing.
        """
        fields: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(cls)}
        what = "gate" if cls is Gates else f"option of {place[-1]}"
        aliases: dict[str, str] = alias_fields(cls)
        values: dict[str, Any] = {}
        for key, value in self.document.mapping(options, place, what, [*fields, *aliases]).items():
            where, name = (*place, key), aliases.get(key, key)
            full = self._expanded(value, where)
            if fields[name].metadata.get("file") and isinstance(full, str) and full:
                full = self._rebased(full)
            if fields[name].metadata.get("lists") and isinstance(full, list):
                full = [f"@{self._rebased(t[1:])}" if str(t).startswith("@") else t for t in full]
            values[name] = self._checked(option_adapter(cls, name), full, where)
        for name, one in fields.items():
            if name not in values and is_required(one):
                whose = getattr(cls, "name", "gates")
                self.document.fail(place, f"{whose}: give option {name!r}, which has no default")
        return cls(**values)

    def check_used(self) -> None:
        """Check that something uses every value of -D.

        Raises:
            OptionError: Nothing does.
        """
        for name in self.given:
            known = sorted(self.used | self.declared.keys())
            if name not in known:
                self.document.unknown((), "variable", name, known)

    def _expanded(self, value: Any, place: Place) -> Any:
        """Replace the variables in a value."""
        if isinstance(value, list):
            return [self._expanded(one, (*place, at)) for at, one in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _VARIABLE.fullmatch(value)
        if whole is not None and whole[1] is not None:
            return self._variable(whole[1], place)
        names = [found[1] for found in _VARIABLE.finditer(value)]
        parts = [self._variable(name, place) if name is not None else "${" for name in names]
        replaced = iter(parts)
        text = _VARIABLE.sub(lambda _: str(next(replaced)), value)
        return Given(text) if any(isinstance(part, Given) for part in parts) else text

    def _variable(self, name: str, place: Place) -> Any:
        self.used.add(name)
        if name in self.given:
            return Given(self.given[name])
        if name not in self.declared:
            self.document.fail(place, f"${{{name}}} has no value; give it with -D {name}=...")
        value = self.declared[name]
        if isinstance(value, str) and _VARIABLE.search(value):
            self.document.fail(("variables", name), f"{name}: a default cannot use a variable")
        return value

    def _rebased(self, path: str) -> str:
        if isinstance(path, Given):
            return os.path.normpath(Path(self.folder) / path) if self.folder else path
        return os.path.normpath(Path(self.document.name).parent / path)

    def _checked(self, adapter: TypeAdapter[Any], value: Any, place: Place) -> Any:
        try:
            if isinstance(value, Given):
                return _from_text(adapter, value)
            return adapter.validate_json(json.dumps(value), strict=True)  # as JSON a list fits a tuple
        except ValidationError as error:
            message = str(error.errors()[0]["msg"]).split(", unable")[0]
            message = message.replace("Input should be", "expected")
            self.document.fail(place, f"{place[-1]}: {message}, got {shown(value)}")
        except TypeError:  # a value that JSON does not have, such as a mapping with a list as a key
            self.document.fail(place, f"{place[-1]}: not a valid option value, got {shown(value)}")


def _from_text(adapter: TypeAdapter[Any], text: str) -> Any:
    """Parse a value as the command line does: commas separate the items of a list."""
    if adapter.json_schema().get("type") == "array":
        return adapter.validate_python(tuple(t.strip() for t in text.split(",") if t.strip()))
    return adapter.validate_strings(str(text))


def _set_options(
    one: Pass | Gates | Guard | TimingOptions, folder: str | os.PathLike[str]
) -> dict[str, Any]:
    """Collect the fields that differ from their defaults, as YAML values that read back the same."""
    values = {}
    for f in dataclasses.fields(one):
        value = getattr(one, f.name)
        if value == f.default:
            continue
        if f.metadata.get("file") and value and not os.path.isabs(value):
            value = os.path.relpath(value, folder)
        if isinstance(value, str):
            value = value.replace("${", "$${")
        values[f.name] = list(value) if isinstance(value, tuple) else value
    return values
