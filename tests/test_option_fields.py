"""Limits of options, and what of them a user sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from onnxcompress.errors import OptionError
from onnxcompress.option_fields import check_limits, option, option_adapter


@dataclass(frozen=True)
class Options:
    """Options with every kind of limit."""

    weight_bits: int = option(8, "Bits of the weights.", ge=2, le=8)
    share: float = option(0.5, "Share of zeros.", gt=0, lt=1)
    steps: int | None = option(None, "Steps.", ge=1)
    factor: float = option(1.0, "Factor.", gt=0)
    free: int = option(0, "Anything.")
    kind: Literal["left", "right"] = option("left", "A side.")
    other: Literal["up", "down"] | None = option(None, "A direction.")
    names: tuple[str, ...] = option((), "Names.")
    text: str | None = option(None, "A text.")
    alone: bool = option(False, "A switch.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 9}, "--weight-bits 9: expected 2 to 8"),
        ({"weight_bits": 1}, "--weight-bits 1: expected 2 to 8"),
        ({"share": 0.0}, "--share 0: expected more than 0 and less than 1"),
        ({"share": 1.0}, "--share 1: expected more than 0 and less than 1"),
        ({"share": float("nan")}, "--share nan: expected more than 0 and less than 1"),
        ({"steps": 0}, "--steps 0: expected 1 or more"),
        ({"factor": -2.5}, "--factor -2.5: expected more than 0"),
        ({"kind": "middle"}, "--kind 'middle': expected one of left, right"),
        ({"kind": None}, "--kind None: expected one of left, right"),
        ({"other": "left"}, "--other 'left': expected one of up, down"),
        ({"steps": "3"}, "--steps '3': expected a whole number"),
        ({"free": "3"}, "--free '3': expected a whole number"),
        ({"free": 3.0}, "--free 3.0: expected a whole number"),
        ({"free": True}, "--free True: expected a whole number"),
        ({"factor": "3"}, "--factor '3': expected a number"),
        ({"text": (1, 3)}, "--text (1, 3): expected a text"),
        ({"names": 3}, "--names 3: expected several; give (3,)"),
        ({"names": (3,)}, "--names 3: expected a text"),
        ({"alone": "no"}, "--alone 'no': expected True or False"),
        ({"text": 3}, "--text 3: expected a text"),
        ({"names": "conv1"}, "--names 'conv1': expected several; give ('conv1',)"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_limits(Options(**values))  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_the_ends_of_a_range_and_what_was_not_given_pass() -> None:
    check_limits(Options())
    for values in ({"weight_bits": 2}, {"weight_bits": 8}, {"steps": 1}, {"free": -(10**9)}):
        check_limits(Options(**values))  # type: ignore[arg-type]
    check_limits(Options(kind="right", other="down", names=("conv1",), text="a"))
    check_limits(Options(steps=np.int64(3), factor=np.float32(2)))


def test_a_caller_names_flags_its_own_way() -> None:
    with pytest.raises(OptionError, match=r"^--gate-steps 0: expected 1 or more$"):
        check_limits(Options(steps=0), lambda name: f"--gate-{name}")


def test_the_schema_of_an_option_has_its_limits() -> None:
    schema = option_adapter(Options, "weight_bits").json_schema()
    assert (schema["minimum"], schema["maximum"]) == (2, 8)


def test_annotations_that_only_a_type_checker_has_are_not_looked_at() -> None:
    @dataclass(frozen=True)
    class Foreign:
        several: "Missing" = option(3, "Something.")  # type: ignore[name-defined]  # noqa: F821, RUF009, UP037

    check_limits(Foreign())


def test_a_switch_of_numpy_is_one() -> None:
    check_limits(Options(alone=np.True_))  # type: ignore[arg-type]
