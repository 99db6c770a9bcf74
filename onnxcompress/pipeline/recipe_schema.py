"""The JSON Schema of recipes, with which an editor completes and checks them."""

from __future__ import annotations

import dataclasses
from typing import Any

from onnxcompress.evaluation.gates import Gates
from onnxcompress.evaluation.guard import Guard
from onnxcompress.option_fields import alias_fields, is_required, option_adapter
from onnxcompress.passes import load_pass
from onnxcompress.passes.base import Pass
from onnxcompress.pipeline.recipe import pass_names
from onnxcompress.runtime.timing_options import TimingOptions


def recipe_schema() -> dict[str, Any]:
    """Build the JSON Schema of recipes for the installed passes; any option may be a `${variable}`.

    Returns:
        The schema as JSON values.
    """
    names = pass_names()
    steps = {name: {"anyOf": [_object_schema(load_pass(name)), {"type": "null"}]} for name in names}
    step = {"type": "object", "properties": steps, "additionalProperties": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of onnxcompress",
        "type": "object",
        "properties": {
            "variables": {
                "description": "Names and defaults; -D NAME=VALUE replaces a default.",
                "type": ["object", "null"],
            },
            "passes": {
                "description": "The passes in order: a name, or a name and its options.",
                "type": "array",
                "minItems": 1,
                "items": {"anyOf": [{"enum": names}, step | {"minProperties": 1, "maxProperties": 1}]},
            },
            "timing": {"anyOf": [_object_schema(TimingOptions), {"type": "null"}]},
            "guard": {"anyOf": [_object_schema(Guard), {"type": "null"}]},
            "gates": {"anyOf": [_object_schema(Gates), {"type": "null"}]},
        },
        "required": ["passes"],
        "additionalProperties": False,
    }


def _object_schema(cls: type[Pass] | type[Gates] | type[Guard] | type[TimingOptions]) -> dict[str, Any]:
    properties = {}
    for one in dataclasses.fields(cls):
        schema = option_adapter(cls, one.name).json_schema()
        about = {"description": one.metadata.get("help", "")}
        if one.default is not dataclasses.MISSING:
            about["default"] = one.default
        variable = {"type": "string", "pattern": r"\$\{"}
        properties[one.name] = about | {"anyOf": [*schema.get("anyOf", [schema]), variable]}
    properties |= {alias: properties[name] for alias, name in alias_fields(cls).items()}
    required = [f.name for f in dataclasses.fields(cls) if is_required(f)]
    return {
        "description": (cls.__doc__ or "").strip().partition("\n\n")[0],
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
