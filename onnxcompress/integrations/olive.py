"""Passes of onnxcompress in a workflow of Microsoft Olive (0.13).

    python -m onnxcompress.integrations.olive > package.json     Olive's own passes, and OnnxCompress
    olive run --config workflow.json --package-config package.json

    workflow.json   "passes": {"small": {"type": "OnnxCompress", "passes": ["fold-bn", "equalize"]}}

`passes` is written as in a recipe: each entry a name, or a name with its options. Importing this module
needs olive, which nothing else does. Does not handle: `variables` and `gates` of recipes, search over
options.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from pydantic import field_validator

from onnxcompress.errors import CompressError
from onnxcompress.model import load, save
from onnxcompress.pipeline import Pipeline
from onnxcompress.pipeline.recipe import parse_recipe


def package_config() -> dict[str, Any]:
    """Build Olive's package configuration with the pass OnnxCompress added, for `olive.workflows.run`.

    Returns:
        The configuration as JSON values.
    """
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    anything = {f"supported_{what}": ["*"] for what in ("providers", "accelerators", "precisions")}
    config["passes"]["OnnxCompress"] = {
        "module_path": "onnxcompress.integrations.olive.OnnxCompress",
        **anything,
    }
    return config


class OnnxCompress(Pass):  # type: ignore[misc]
    """A chain of onnxcompress passes as one pass of Olive."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        text = "Passes in order, each a name, or a mapping of a name to its options."
        return {"passes": PassConfigParam(type_=list, required=True, description=text)}

    @classmethod
    def _validators(cls) -> dict[str, Any]:
        return {"readable": field_validator("passes")(_checked)}

    def _run_for_config(
        self, model: Any, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        target = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        save(_chain(config.passes).run(load(model.model_path)).model, target)
        return ONNXModelHandler(model_path=target)


def _chain(passes: list[Any]) -> Pipeline:
    return Pipeline(parse_recipe(json.dumps({"passes": passes}), "OnnxCompress").passes)


def _checked(passes: list[Any]) -> list[Any]:
    """Validate the passes; Olive calls this before its first pass runs, and expects a ValueError."""
    try:
        _chain(passes).check()
    except CompressError as error:
        raise ValueError(str(error)) from error
    return passes


if __name__ == "__main__":
    json.dump(package_config(), sys.stdout, indent=2)
