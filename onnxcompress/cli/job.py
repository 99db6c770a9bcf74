"""What a command line asks of a chain of passes, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxcompress.cli.files import Files
from onnxcompress.evaluation.gate_results import Verdict
from onnxcompress.evaluation.gates import Gates
from onnxcompress.evaluation.guard import Guard
from onnxcompress.pipeline import Pipeline, Run

if TYPE_CHECKING:
    from onnxcompress.pipeline.cache import Cache


@dataclass(frozen=True)
class Job:
    """What a command line asks for."""

    source: str
    target: str
    chain: Pipeline
    gates: Gates
    account: Callable[[Outcome], dict[str, Any]]
    """What --json prints."""
    guard: Guard = field(default_factory=Guard)
    cache: Cache | None = None
    input_shape: str | None = None
    """Of the inputs that are compared on."""
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    dry_run: bool = False
    report: str | None = None
    recipe: str | None = None
    """The file that the chain is of."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    run: Run
    files: Files
    verdicts: list[Verdict]
    bytes: tuple[int, int]
    """Of IN and OUT."""


def pass_account(found: Outcome) -> dict[str, Any]:
    """The JSON of a pass's command (`cli.pass_commands` has its keys)."""
    step = found.run.steps[0].as_dict()
    kept = {key: step[key] for key in ("pass", "options", "changes", "refusals", "measured", "guard")}
    gates = [dataclasses.asdict(v) for v in found.verdicts]
    return kept | {"gates": gates, "provenance": found.run.model.provenance()}
