"""Judge the result of a pass before it is written, on inputs that no pass learned from.

    outputs before, outputs after --fidelity--> GuardMeasurements --verdict(., Floors)--> Verdict

Each output and each of its parts has two floors (`fidelity`: ratio of the variation between inputs to the
noise). Below the first the result is written with a warning; below the second it is refused, unless the
user forces it. A pass that preserves the function also has a limit on the relative difference. Outputs that
are no longer finite, or no longer depend on the input, are refused whatever the ratio.

A pass that repairs a model towards a reference (`correct-bias`) is judged by comparing the models before
and after it with that reference: the model after must not be further from it than the model before.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from onnxcompress.errors import OptionError
from onnxcompress.option_fields import option

if TYPE_CHECKING:
    from onnxcompress.evaluation.fidelity import Fidelity, OutputFidelity

Status = Literal["kept", "warned", "refused", "forced", "not compared"]

WORSE_WARN_DB, WORSE_REFUSE_DB = 0.5, 3.0
"""Decibels that a model may lose against its reference without a warning, and without a refusal."""
EXACT_REL, EXACT_HALF_REL = 1e-4, 5e-2
"""Largest relative difference for a pass that preserves the function, in float32 and in float16."""
EXACT_INTEGERS = 1e-3
"""Share of integers that such a pass may change: rounding decides between scores that are nearly equal."""
NAMED = 3
"""Number of layers that a warning names."""


@dataclass(frozen=True)
class Floors:
    """Lower limits of the ratio of the variation between inputs to the noise, in decibels."""

    warn_db: float = 7.0
    refuse_db: float = 3.0


LOSSY = Floors(5.0, 0.0)
"""Floors of passes that remove parts of the network: below 0 dB there is more noise than variation."""


@dataclass(frozen=True)
class Guard:
    """How results are judged. The fields are options of passes and keys of a recipe's `guard`."""

    verify: bool = option(
        True,
        "Compare the outputs before and after in onnxruntime, on inputs that no pass learned from. From "
        "160 images on, without --count, 16 of --images are set aside for this.",
    )
    warn_snr: float | None = option(
        None,
        "Warn where an output's signal to noise is below this; signal is how much it varies "
        "between inputs, noise what the pass changed in it. [default: the pass's own]",
        metavar="DB",
    )
    min_snr: float | None = option(
        None, "Write nothing where it is below this. [default: the pass's own]", metavar="DB"
    )
    force: bool = option(False, "Write the result even where the guard refuses it, to see how bad it is.")

    def check(self) -> None:
        """Check that the options do not contradict each other.

        Raises:
            OptionError: They do, or one is no number.
        """
        set_options = [n for n in ("warn_snr", "min_snr") if getattr(self, n) is not None]
        for name in set_options:
            if not math.isfinite(value := getattr(self, name)):
                raise OptionError(f"--{name.replace('_', '-')} {value}: expected a number of decibels")
        set_options += ["force"] * self.force
        if set_options and not self.verify:
            raise OptionError(
                f"--{set_options[0].replace('_', '-')} and --no-verify: nothing is compared; leave one out"
            )

    def floors(self, own: Floors) -> Floors:
        """Return the floors that apply: the user's, else the pass's own.

        Args:
            own: The pass's own floors.

        Returns:
            The floors.
        """
        warn = own.warn_db if self.warn_snr is None else self.warn_snr
        return Floors(warn, own.refuse_db if self.min_snr is None else self.min_snr)


@dataclass(frozen=True)
class GuardMeasurements:
    """The guard's measurements of one result, or the reason why there are none."""

    inputs: str
    """Description of the inputs that both models were run on."""
    count: int
    """Number of inputs: images, or rows of a random batch."""
    seconds: float
    """Time for making inputs and running the models."""
    fidelity: Fidelity | None = None
    """Fidelity of the result to the model before, or to the reference where the pass has one."""
    before: Fidelity | None = None
    """Fidelity of the model before to the reference, where the pass has one."""
    max_rel: float | None = None
    """Largest relative difference that the pass may make; None: it may change the function."""
    problem: str = ""
    """Why the result is refused without a comparison, for example because onnxruntime cannot run it."""
    skipped: str = ""
    """Why nothing was compared, for example because onnxruntime cannot run the model before."""


@dataclass(frozen=True)
class Verdict:
    """Whether a result may be written."""

    status: Status
    text: str
    """The measurement and the limit, in one sentence."""
    advice: tuple[str, ...] = ()
    """Layers that cost most, and remedies; empty where the result was kept."""
    floors: Floors = Floors()

    @property
    def sentence(self) -> str:
        """Text and advice in one line."""
        return "; ".join([self.text, *self.advice])


def verdict(
    measured: GuardMeasurements, floors: Floors, *, advice: tuple[str, ...] = (), force: bool = False
) -> Verdict:
    """Judge the measurements by the floors.

    Args:
        measured: The guard's measurements.
        floors: The floors that apply.
        advice: Remedies to name where the result is not kept.
        force: Write the result even if it is refused.

    Returns:
        The verdict, with the reason.
    """
    if measured.skipped:
        return Verdict("not compared", f"outputs not compared: {measured.skipped}", floors=floors)
    faults, warnings = _complaints(measured, floors)
    if faults:
        return Verdict("forced" if force else "refused", "; ".join(faults), advice, floors)
    if warnings:
        return Verdict("warned", "; ".join(warnings), advice, floors)
    return Verdict("kept", _kept(measured), (), floors)


def _complaints(measured: GuardMeasurements, floors: Floors) -> tuple[list[str], list[str]]:
    """List the reasons to refuse, and the reasons to warn."""
    if measured.problem:
        return [measured.problem], []
    assert measured.fidelity is not None
    faults = [text for output in measured.fidelity.outputs for text in _broken(output)]
    warnings: list[str] = []
    if measured.fidelity.not_compared:
        names = ", ".join(map(repr, measured.fidelity.not_compared))
        warnings.append(f"output {names} was not compared: its shape depends on the input's values")
    if measured.fidelity.never_finite:
        names = ", ".join(map(repr, measured.fidelity.never_finite))
        warnings.append(f"output {names} was not compared: it is not finite on any of these inputs")
    if not measured.fidelity.outputs:
        return faults, warnings
    warnings += [
        f"output {one.name!r} says no everywhere on these inputs, which tell nothing of a yes: compare the "
        "files on --images of your own"
        for one in measured.fidelity.outputs
        if one.unseen and measured.max_rel is None
    ]
    if measured.before is not None:
        before, after = measured.before.worst.judged_db, measured.fidelity.worst.judged_db
        lost = before - after
        text = f"outputs kept {before:.1f} dB of the reference's before, and would keep {after:.1f} dB"
        if lost > WORSE_REFUSE_DB:
            faults.append(text)
        elif lost > WORSE_WARN_DB:
            warnings.append(text)
        return faults, warnings
    worst = measured.fidelity.worst
    inexact, reordered = _inexact(measured.fidelity, measured.max_rel)
    faults, warnings = faults + inexact, warnings + reordered
    warnings += [
        f"{_snr_text(one)}, below {floors.refuse_db:g} dB"
        for one in measured.fidelity.outputs
        if one.snr_db is None and one is not worst and one.judged_db < floors.refuse_db
    ]
    if worst.judged_db < floors.refuse_db:
        faults.append(f"{_snr_text(worst)}, below {floors.refuse_db:g} dB")
    elif worst.judged_db < floors.warn_db:
        warnings.append(f"{_snr_text(worst)}, below {floors.warn_db:g} dB")
    return faults, warnings


def _inexact(found: Fidelity, max_rel: float | None) -> tuple[list[str], list[str]]:
    """List the outputs that a pass changes although it preserves the function: the worst of each kind.

    Integers beside floats, such as places in a ranking, are a reason to warn.
    """
    faults: list[str] = []
    warnings: list[str] = []
    if max_rel is None:
        return faults, warnings
    furthest = found.furthest
    if found.floats and furthest.max_rel > max_rel:
        faults.append(
            f"output {furthest.name!r} changes by {furthest.max_rel:.2g} of its largest magnitude, and the "
            f"pass may change it by {max_rel:g} at most"
        )
    changed = {one.name: 1 - (one.agreement or 0.0) for one in found.outputs if one.snr_db is None}
    name = max(changed, key=lambda one: changed[one], default="")
    limit = max(max_rel, EXACT_INTEGERS)
    if changed and changed[name] > limit:
        (warnings if found.floats else faults).append(
            f"output {name!r}: {100 * changed[name]:.2g} % of the values change, and the pass may change "
            f"{100 * limit:g} % of them at most"
        )
    return faults, warnings


def _broken(output: OutputFidelity) -> list[str]:
    faults = []
    if output.not_finite:
        faults.append(f"output {output.name!r} would have {output.not_finite} values that are not finite")
    if output.constant:
        faults.append(f"output {output.name!r} would no longer depend on the input")
    return faults


def _snr_text(output: OutputFidelity) -> str:
    """Format the ratio that is judged, and the plain signal to noise ratio beside it."""
    if output.variation_db is None:
        same = f"output {output.name!r}: {100 * (output.agreement or 0):.1f} % of the values are the same"
        return same if output.agreement == 1 else f"{same}, which counts as {output.judged_db:.1f} dB"
    part = output.worst_part
    low = part if part is not None and part.judged_db < output.whole_db else output
    where = f" in {part.text}" if part is low and part is not None else ""
    return (
        f"output {output.name!r}: variation to noise {low.variation_db:.1f} dB (signal to noise "
        f"{low.snr_db:.1f} dB){where}"
    )


def _kept(measured: GuardMeasurements) -> str:
    if measured.fidelity is None or not measured.fidelity.outputs:
        return "no output could be compared"
    return _snr_text(measured.fidelity.worst)


def as_dict(measured: GuardMeasurements, judged: Verdict) -> dict[str, Any]:
    """Convert measurements and verdict to JSON values (`onnxcompress guide json` has the keys).

    Args:
        measured: The guard's measurements.
        judged: The verdict.

    Returns:
        The values by key.
    """
    return {
        "status": judged.status,
        "text": judged.text,
        "advice": list(judged.advice),
        "warn_snr_db": judged.floors.warn_db,
        "min_snr_db": judged.floors.refuse_db,
        "max_rel": measured.max_rel,
        "inputs": measured.inputs,
        "count": measured.count,
        "seconds": measured.seconds,
        "outputs": _outputs(measured.fidelity),
        "outputs_before": _outputs(measured.before),
    }


def _outputs(measured: Fidelity | None) -> list[dict[str, Any]]:
    return [] if measured is None else [dataclasses.asdict(one) for one in measured.outputs]


def difference(measured: GuardMeasurements) -> dict[str, Any]:
    """Return `measured.difference` of a pass that preserves the function, in the published form.

    Args:
        measured: The guard's measurements.

    Returns:
        max_abs, max_rel and output, or the reason `skipped`.
    """
    if measured.fidelity is None or not measured.fidelity.outputs:
        return {"skipped": measured.skipped or measured.problem or "no output could be compared"}
    furthest = measured.fidelity.furthest
    return {"max_abs": furthest.max_abs, "max_rel": furthest.max_rel, "output": furthest.name}
