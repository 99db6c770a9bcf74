"""Dataclass fields that are options, for Python, the command line and recipes alike.

A field says once what an option is for, what it may be, and whether many have a reason to set it:

    weight_bits: int = option(8, "Bits of the weights.", ge=2, le=8)

The command line makes a flag of it, a recipe a key, its JSON Schema a property with those limits.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
import re
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from onnxcompress.errors import OptionError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

PROVIDER_HELP = (
    "Execution provider of onnxruntime, that on which the model will run: cpu, cuda, tensorrt, "
    "or another by its name, such as openvino; auto: cuda where it works, else cpu."
)
PROVIDER_OPTIONS_HELP = (
    "Settings of the provider. cuda: tf32=on|off, cudnn_search=exhaustive|heuristic|default, nhwc, memory "
    "(MB); tensorrt: fp16 (of TensorRT 10), cache (folder), workspace (MB); both: device, cuda_graph. "
    "Others: their own, or library=PATH where they are a library of its own."
)


def provider_options_option() -> Any:
    """Declare the field `provider_options` of whatever has a field `provider`.

    Returns:
        A dataclass field.
    """
    return option((), PROVIDER_OPTIONS_HELP, metavar="NAME=VALUE,…", advanced=True)


def parse_duration(name: str, text: str) -> float:
    """Read a duration.

    Args:
        name: Name of the option, for messages.
        text: Such as 90s, 30m or 2h.

    Returns:
        Seconds, above 0.

    Raises:
        OptionError: It is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise OptionError(f"--{name} {text}: expected a duration such as 90s, 30m or 2h")
    return float(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    file: Literal["read", "kept"] | None = None,
    advanced: bool = False,
    target: bool = False,
    or_zero: bool = False,
    lists: bool = False,
    alias: str | None = None,
    **limits: float,
) -> Any:
    """Declare a field of a dataclass that is an option.

    Args:
        default: Its value where it is not given; `dataclasses.MISSING`: it must be given.
        help: One plain sentence, with the unit where there is one.
        metavar: What the help shows in place of a value.
        file: It names a file or folder. "read": it must be there; "kept": it is read where it exists, else
            written.
        advanced: Whether few have a reason to set it: the help lists it apart.
        target: Whether it says what the result is to reach: the help lists it first.
        or_zero: Whether 0 is allowed beside what the limits say.
        lists: Whether its items may be `@FILE`, which stands for the lines of a file.
        alias: Another name of the option on the command line and, without dashes, in recipes, as `--for`.
        limits: Limits of a number, named as pydantic names them: `ge`, `gt`, `le`, `lt`.

    Returns:
        A dataclass field.
    """
    about = {"help": help, "metavar": metavar, "file": file, "advanced": advanced, "lists": lists}
    about |= {"alias": alias, "target": target}
    return field(default=default, metadata=about | {"limits": limits, "or_zero": or_zero})


def is_required(option_field: dataclasses.Field[Any]) -> bool:
    """Say whether an option must be given.

    Args:
        option_field: A field of a dataclass of options.

    Returns:
        Whether it has no default.
    """
    missing = dataclasses.MISSING
    return option_field.default is missing and option_field.default_factory is missing


def alias_fields(cls: type[Any]) -> dict[str, str]:
    """List the other names of options.

    Args:
        cls: A dataclass of options.

    Returns:
        Name in recipes -> name of the field.
    """
    fields = dataclasses.fields(cls)
    return {alias.removeprefix("--"): f.name for f in fields if (alias := f.metadata.get("alias"))}


def option_adapter(cls: type[Any], name: str) -> TypeAdapter[Any]:
    """Make what checks the value of an option: its type and its limits.

    Args:
        cls: A dataclass of options.
        name: Name of the field.

    Returns:
        A pydantic adapter of the field's annotation with its limits.
    """
    hashable: Any = cls  # mypy takes classes of dataclasses for unhashable
    return _option_adapter(hashable, name)


@functools.cache
def _option_adapter(cls: type[Any], name: str) -> TypeAdapter[Any]:
    from pydantic import Field, TypeAdapter

    about = cls.__dataclass_fields__[name].metadata
    hint = typing.get_type_hints(cls)[name]
    if not about.get("limits"):
        return TypeAdapter(hint)
    limited: Any = typing.Annotated[hint, Field(**about["limits"])]
    return TypeAdapter(Literal[0] | limited if about["or_zero"] else limited)


def flag(name: str) -> str:
    """Write a field's name as an option of the command line.

    Args:
        name: The field's name.

    Returns:
        `--weight-bits` for `weight_bits`.
    """
    return "--" + name.replace("_", "-")


def check_limits(options: Any, flag: Callable[[str], str] = flag) -> None:
    """Check that each option is a word that its field allows, several of them, or within its limits.

    A program may give what the command line and recipes never do: another word, or one in place of several.

    Args:
        options: An instance of a dataclass of options.
        flag: Writes the name of a field as its user knows it.

    Raises:
        OptionError: A value is out of range.
    """
    from pydantic import ValidationError

    own: Any = type(options)  # mypy takes classes of dataclasses for unhashable
    hints = _hints(own)
    for option_field in dataclasses.fields(options):
        limits = option_field.metadata.get("limits")
        value = getattr(options, option_field.name)
        words, is_list, kind = hints.get(option_field.name, _Hint((), False, ""))
        if words and value not in words:
            choices = ", ".join(str(word) for word in words if word is not None)
            raise OptionError(f"{flag(option_field.name)} {value!r}: expected one of {choices}")
        if is_list and not isinstance(value, tuple | list | None):
            raise OptionError(f"{flag(option_field.name)} {value!r}: expected several; give ({value!r},)")
        for one in value if is_list and value is not None else (value,):
            if kind and one is not None and not _is(one, kind):
                raise OptionError(f"{flag(option_field.name)} {one!r}: expected {kind}")
        if not limits or value is None:
            continue
        try:
            option_adapter(type(options), option_field.name).validate_python(value)
        except ValidationError as error:
            wanted = _range(**limits) + (", or 0" if option_field.metadata["or_zero"] else "")
            raise OptionError(f"{flag(option_field.name)} {_shown(value)}: expected {wanted}") from error


class _Hint(NamedTuple):
    words: tuple[object, ...]
    """The words that a field allows; none: it takes others."""
    is_list: bool
    kind: str
    """What it takes, or each of several: one of KINDS; empty: something else."""


KINDS: dict[frozenset[type[Any]], str] = {
    frozenset({str}): "a text",
    frozenset({bool}): "True or False",
    frozenset({int}): "a whole number",
    frozenset({float}): "a number",
    frozenset({int, float}): "a number",
}
"""Types of a field, and how they are called."""


def _is(value: object, kind: str) -> bool:
    """Return whether a value is of a kind: a whole number is a number, True is none, a path is a text."""
    is_switch = isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's, too
    if kind == "True or False" or is_switch:
        return kind == "True or False" and is_switch
    if kind == "a text":
        return isinstance(value, str | os.PathLike)
    return isinstance(value, numbers.Integral if kind == "a whole number" else numbers.Real)


@functools.cache
def _hints(cls: type[Any]) -> dict[str, _Hint]:
    try:
        known = typing.get_type_hints(cls)
    except NameError:  # a pass of another package, whose annotations are imported for a type checker alone
        return {}
    found = {}
    for name, hint in known.items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if is_union else (hint,)
        given = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
        alone = len(given) == len([kind for kind in kinds if kind is not type(None)])
        words = tuple(word for some in given for word in some) + (None,) * (type(None) in kinds)
        several = [kind for kind in kinds if typing.get_origin(kind) is tuple]
        values = {kind for kind in kinds if kind is not type(None)}
        if several:
            values = {one for one in typing.get_args(several[0]) if one is not Ellipsis}
        usable = frozenset(values) if not any(typing.get_origin(one) for one in values) else frozenset()
        kind = KINDS.get(usable, "")
        found[name] = _Hint(words if given and alone else (), bool(several), kind)
    return found


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(
    ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None
) -> str:
    """Say a range as a person would."""
    if ge is not None and le is not None:
        return f"{ge:g} to {le:g}"
    low = f"{ge:g} or more" if ge is not None else f"more than {gt:g}" if gt is not None else ""
    high = f"{le:g} or less" if le is not None else f"less than {lt:g}" if lt is not None else ""
    return " and ".join(filter(None, (low, high)))


INPUT_SHAPE_HELP = (
    "Sizes of an input that the file leaves open, as images=1x3x320x320 or 1x3x320x320; of several inputs "
    "with commas between. The file keeps its open sizes."
)


INPUT_SHAPE_METAVAR = "[NAME=]DIMS,…"


def input_shape_option() -> Any:
    """Declare the field `input_shape` of a pass that runs the network (`data.input_shapes` reads it).

    Returns:
        The field.
    """
    return option(None, INPUT_SHAPE_HELP, metavar=INPUT_SHAPE_METAVAR)
