"""The share of the latency that each block takes, measured in onnxruntime (PRACTISE §3.2, τ).

    τ(B) = (lat(M) − lat(M without B)) / lat(M)

One variant without each block is timed, all interleaved with the whole model. Blocks with the same
operators and shapes (`Block.signature`) take the same time, so one variant stands for all of them.

On a busy machine wall clocks are noise. What they cannot tell apart is timed again by the processor's time
of one thread, and all that comes later, too (`Stopwatch`); where not even that tells blocks apart, shares
are taken by multiply-accumulates.

That shares add up is assumed when blocks are chosen; `drop-blocks` sets their sum (`added`) beside the
measured latency of what it made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcompress.graph.block_removal import drop_block
from onnxcompress.graph.blocks import Block
from onnxcompress.model import Model
from onnxcompress.runtime.latency import Clock, Ratio, benchmark, has_processor_clock, ratio
from onnxcompress.runtime.providers import ProviderLike

FLOOR = 0.1
"""A share below this part of the largest counts as this: nothing is divided by next to nothing."""
UNSURE = 0.02
"""Half the 95 % interval of a network's latency over another's from which on the clock is too noisy."""
NOISE = 1.0
"""Width of an interval, as a part of the share itself, from which on the clock is too noisy."""


@dataclass(frozen=True)
class Share:
    """τ of one block."""

    value: float
    """Part of the whole latency, as measured; may be negative where a block costs nothing."""
    low: float
    high: float
    """95 % interval."""


def latency_shares(
    model: Model,
    blocks: Sequence[Block],
    *,
    provider: ProviderLike = "auto",
    batch: int = 1,
    threads: int = 0,
    seconds: float = 8.0,
    seed: int = 0,
    clock: Clock = "wall",
) -> dict[str, Share]:
    """τ of each block by its exit tensor. Raises what `latency.benchmark` raises."""
    kinds = list(dict.fromkeys(b.signature for b in blocks))
    variants: dict[str, Model] = {"": model}
    for kind in kinds:
        twin = model.copy()
        drop_block(twin, next(block for block in blocks if block.signature == kind))
        variants[kind] = twin
    timings = benchmark(
        variants,
        provider=provider,
        batch=batch,
        threads=threads,
        seconds=seconds,
        tolerance=0.003,
        seed=seed,
        clock=clock,
    )
    shares = {kind: _share(ratio(timings[""], timings[kind])) for kind in kinds}
    return {b.exit: shares[b.signature] for b in blocks}


def _share(found: Ratio) -> Share:
    return Share(1 - found.value, 1 - found.high, 1 - found.low)


def added(shares: Iterable[Share]) -> Share:
    """What dropping all of them would save if savings added up; the ends of the intervals add up, too."""
    found = list(shares)
    return Share(sum(s.value for s in found), sum(s.low for s in found), sum(s.high for s in found))


def additivity_text(found: Mapping[str, Sequence[float]]) -> str:
    """Whether the shares add up to what was saved: `predicted` and `measured`, each value, low, high."""
    told = {k: [100 * v for v in found[k]] for k in ("predicted", "measured")}
    sums, saved = told["predicted"], told["measured"]
    apart = sums[2] < saved[1] or saved[2] < sums[1]
    verdict = "they do not add up" if apart else "they add up, within the intervals"
    return (
        f"the blocks' shares τ add up to {sums[0]:.1f} % ({sums[1]:.1f} to {sums[2]:.1f} %), measured are "
        f"{saved[0]:.1f} % ({saved[1]:.1f} to {saved[2]:.1f} %): {verdict}"
    )


def noisy(shares: Mapping[str, Share]) -> bool:
    """Whether the clock was too noisy to tell blocks apart: intervals are wider than the shares."""
    total = sum(max(s.value, 0.0) for s in shares.values())
    return total <= 0 or any(
        s.high - s.low > NOISE * max(s.value, total / len(shares)) for s in shares.values()
    )


def usable(
    shares: Mapping[str, Share], blocks: Sequence[Block], whole: int | None = None
) -> tuple[dict[str, float], bool]:
    """τ by exit to divide by, all above 0, and whether the clock was too noisy to tell blocks apart.

    Ranking by noise would be no ranking: then τ is a block's part of the multiply-accumulates. whole: those
    of the network; None: not known, the blocks are taken to have half of the latency.
    """
    if noisy(shares):
        macs = {b.exit: float(max(b.macs, 1)) for b in blocks}
        total = 2 * sum(macs.values()) if whole is None else max(whole, sum(macs.values()))
        return {exit: value / total for exit, value in macs.items()}, True
    floor = FLOOR * max(s.value for s in shares.values())
    return {exit: max(share.value, floor) for exit, share in shares.items()}, False


@dataclass
class Stopwatch:
    """Times networks against each other, by a clock that is of use on the machine as it is."""

    provider: ProviderLike = "auto"
    batch: int = 1
    threads: int = 0
    seed: int = 0
    clock: Clock = "wall"
    """`processor` from the first measurement on that the wall clock could not make."""

    def shares(self, model: Model, blocks: Sequence[Block]) -> dict[str, Share]:
        """τ of each block by its exit tensor. Raises what `latency.benchmark` raises."""
        shares = latency_shares(model, blocks, **self._how())
        if not noisy(shares) or not self._turn_to_processor():
            return shares
        return latency_shares(model, blocks, **self._how())

    def compare(self, before: Model, after: Model, seconds: float) -> dict[str, float]:
        """Ratio of the latencies with its 95 % interval, and both in milliseconds.

        Raises what `latency.benchmark` raises.
        """
        latencies = self._compare(before, after, seconds)
        unsure = (latencies["high"] - latencies["low"]) / 2 > UNSURE
        if not unsure or not self._turn_to_processor():
            return latencies
        return self._compare(before, after, seconds)

    def _compare(self, before: Model, after: Model, seconds: float) -> dict[str, float]:
        models = {"before": before, "after": after}
        timings = benchmark(models, seconds=seconds, tolerance=0.005, **self._how())
        first, second = timings["before"], timings["after"]
        of = ratio(first, second)
        return {
            "before_ms": first.median_ms,
            "after_ms": second.median_ms,
            "ratio": of.value,
            "low": of.low,
            "high": of.high,
        }

    def _turn_to_processor(self) -> bool:
        """Use the processor's clock from now on; whether that is new, and possible."""
        if self.clock == "processor" or not has_processor_clock(self.provider):
            return False
        self.clock = "processor"
        return True

    def _how(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "batch": self.batch,
            "threads": self.threads,
            "seed": self.seed,
            "clock": self.clock,
        }
