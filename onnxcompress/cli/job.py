"""The job that a command line describes, a chain of passes on a file, and its outcome."""

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
    from onnxcompress.runtime.timing_options import TimingOptions


@dataclass(frozen=True)
class Job:
    """A chain of passes to apply to a file, with the conditions on the result."""

    source: str
    target: str
    chain: Pipeline
    gates: Gates
    account: Callable[[Outcome], dict[str, Any]]
    """Computes the object that --json prints."""
    guard: Guard = field(default_factory=Guard)
    cache: Cache | None = None
    input_shape: str | None = None
    """Shapes of the inputs on which the outputs are compared, as the text of --input-shape."""
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    dry_run: bool = False
    report: str | None = None
    timing: TimingOptions | None = None
    """How the latency before and after is measured; None: no pass of the chain is to be timed."""
    recipe: str | None = None
    """The recipe file that the chain was read from."""


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    run: Run
    files: Files
    verdicts: list[Verdict]
    bytes: tuple[int, int]
    """Sizes of IN and OUT in bytes."""


KEYS = ("pass", "options", "changes", "refusals", "measured", "cached", "guard")
"""Keys of a step in the JSON of a pass's command."""


def pass_account(outcome: Outcome) -> dict[str, Any]:
    """Build the JSON of a pass's command (`cli.pass_commands` has its keys).

    Args:
        outcome: The outcome of the command.

    Returns:
        The values by key.
    """
    step = outcome.run.steps[0].as_dict()
    kept = {key: step[key] for key in KEYS}
    gates = [dataclasses.asdict(v) for v in outcome.verdicts]
    return kept | {"gates": gates, "provenance": outcome.run.model.provenance()}
