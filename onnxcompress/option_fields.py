"""Dataclass fields that are options, for Python, the command line and recipes alike."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass


PROVIDER_HELP = (
    "Of onnxruntime: cpu, cuda, tensorrt, or another by its name, such as openvino; auto: cuda where it "
    "works, else cpu."
)


PROVIDER_OPTIONS_HELP = (
    "How it runs. cuda: tf32=on|off, cudnn_search=exhaustive|heuristic|default, nhwc, memory (MB); "
    "tensorrt: fp16, cache (folder), workspace (MB); both: device, cuda_graph."
)


def provider_options_option() -> Any:
    """The field `provider_options` of whatever has a field `provider`."""
    return option((), PROVIDER_OPTIONS_HELP, metavar="NAME=VALUE,…")


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    file: Literal["read", "kept"] | None = None,
) -> Any:
    """A field of a pass that is an option. `help` states the unit where there is one.

    `file`: it names a file or folder. "read": it must be there; "kept": read if it is there, else written.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "file": file})


def is_required(one: dataclasses.Field[Any]) -> bool:
    """Whether an option must be given."""
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
