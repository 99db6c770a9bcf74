"""Which state of a fine-tuning was kept. It imports no torch: figures and reports read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TuningOutcome:
    """The state of a fine-tuning that was kept, judged by inputs that nothing learned from."""

    held_out: int
    """Number of inputs that were kept aside to judge by."""
    steps: int
    """Steps taken; fewer than were asked for where more did not help."""
    kept_step: int
    """Step whose weights were kept; 0: those before the first step, all tuning was discarded."""
    error_before: float
    """Relative squared error of the features before the first step, on the inputs kept aside."""
    error: float
    """The same of the weights that were kept."""
    planned_steps: int
    """Steps that rates were planned for: with the same seed, `--steps` of so many gives the same file."""

    @property
    def discarded(self) -> bool:
        """Whether no step made the features better."""
        return self.kept_step == 0


def tuning_text(outcome: TuningOutcome) -> str:
    """Tell what fine-tuning achieved.

    Args:
        outcome: The state that was kept.

    Returns:
        A sentence without its full stop.
    """
    before = f"relative error {outcome.error_before**0.5:.3f}"
    if outcome.discarded:
        return f"fine-tuning was discarded: none of {outcome.steps} steps was better than the {before}"
    ended = f", planned for {outcome.planned_steps}" * (outcome.steps < outcome.planned_steps)
    return (
        f"fine-tuning: {before} before it, the weights of step {outcome.kept_step} of {outcome.steps} kept"
        f"{ended}"
    )
