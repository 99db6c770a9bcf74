"""Measure the share of the latency that each block takes, in onnxruntime (PRACTISE §3.2, τ).

    τ(B) = (lat(M) − lat(M without B)) / lat(M)

One variant without each block is timed, all interleaved with the whole model. Blocks with the same
operators and shapes (`Block.signature`) take the same time, so one variant stands for all of them.

On a busy machine wall-clock times are noisy. Where they cannot tell blocks apart, the measurement is
repeated with the processor time of one thread, which all later measurements use too (`Stopwatch`); where
that cannot tell blocks apart either, the multiply-accumulates are taken as shares.

Blocks are chosen as if shares added up; `drop-blocks` reports their sum (`added`) beside what is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from onnxcompress.formatting import milliseconds
from onnxcompress.graph.block_removal import drop_block
from onnxcompress.graph.blocks import Block
from onnxcompress.model import Model
from onnxcompress.runtime.bootstrap import Ratio
from onnxcompress.runtime.clocks import Clock
from onnxcompress.runtime.latency import benchmark, ratio
from onnxcompress.runtime.providers import ProviderLike

FLOOR = 0.1
"""Lower limit of a share, relative to the largest one: scores are divided by it."""
NOISE = 1.0
"""Width of a share's interval, relative to the share, above which the clock is too noisy."""


class Share(NamedTuple):
    """A share of the whole latency, from 0 to 1, with its 95 % interval; in JSON a list of the three.

    Noise makes it negative where a block costs next to nothing.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencyChange:
    """The latencies of two models, measured against each other."""

    before_ms: float
    """Median latency of the first model, in milliseconds."""
    after_ms: float
    """Median latency of the second model, in milliseconds."""
    ratio: float
    """Latency of the second model over that of the first."""
    low: float
    """Lower end of the ratio's 95 % interval."""
    high: float
    """Upper end of the ratio's 95 % interval."""
    provider: str = ""
    """The execution provider with its settings, such as `cuda (tf32 on)`."""
    batch: int = 1
    """Images in a run."""
    clock: Clock = "wall"
    """Clock by which they were measured: `wall`, or `processor` on a busy machine."""

    @property
    def saved(self) -> Share:
        """The share of the first model's latency that the second saves."""
        return Share(1 - self.ratio, 1 - self.high, 1 - self.low)


@dataclass(frozen=True)
class Additivity:
    """The share of the latency that dropping blocks saves."""

    predicted: Share
    """Sum of the shares of the dropped blocks."""
    measured: Share
    clock: Clock = "wall"
    """By which the blocks' shares were measured."""


def without_each_kind(model: Model, blocks: Sequence[Block]) -> dict[str, Model]:
    """Copy the model without one block of each kind, since blocks of the same kind take the same time.

    Args:
        model: The whole model.
        blocks: Blocks that can be dropped.

    Returns:
        The copies, by `Block.signature`.
    """
    variants: dict[str, Model] = {}
    for block in blocks:
        if block.signature not in variants:
            variants[block.signature] = model.copy()
            drop_block(variants[block.signature], block)
    return variants


def latency_shares(
    model: Model,
    blocks: Sequence[Block],
    *,
    without: Mapping[str, Model] | None = None,
    provider: ProviderLike = "auto",
    batch: int = 1,
    threads: int = 0,
    seconds: float = 8.0,
    seed: int = 0,
    clock: Clock = "wall",
) -> dict[str, Share]:
    """Measure the latency share τ of each block, by timing the model without it.

    Args:
        model: The whole model.
        blocks: Blocks that can be dropped.
        without: What `without_each_kind` returns for them; None: they are made here.
        provider: The execution provider.
        batch: Images per run.
        threads: Threads of one operator; 0: all cores.
        seconds: Time to measure for, at most.
        seed: Random seed of the inputs and of the order of runs.
        clock: `wall`, or `processor` for the processor time of one thread.

    Returns:
        τ by name of the block's exit tensor.

    Raises:
        OptionError: A number is out of range, or the provider is unknown.
        ModelError: onnxruntime refuses the model.
        RuntimeUnavailable: The provider cannot start.
    """
    variants = without_each_kind(model, blocks) if without is None else without
    timings = benchmark(
        {"": model, **variants},
        provider=provider,
        batch=batch,
        threads=threads,
        seconds=seconds,
        tolerance=0.003,
        seed=seed,
        clock=clock,
    )
    shares = {kind: share_saved(ratio(timings[""], timings[kind])) for kind in variants}
    return {b.exit: shares[b.signature] for b in blocks}


def share_saved(without: Ratio) -> Share:
    """Convert a ratio of latencies to the share that is saved.

    Args:
        without: Latency of a variant over that of the whole.

    Returns:
        The share, negative for a variant that is slower.
    """
    return Share(1 - without.value, 1 - without.high, 1 - without.low)


def added(shares: Iterable[Share]) -> Share:
    """Predict the saving of dropping several blocks, on the assumption that savings add up.

    Args:
        shares: Shares of the blocks.

    Returns:
        Their sum; the ends of the intervals are added, too.
    """
    terms = list(shares)
    return Share(sum(s.value for s in terms), sum(s.low for s in terms), sum(s.high for s in terms))


def additivity_text(found: Additivity) -> str:
    """Describe whether the shares of the dropped blocks add up to the measured saving.

    Args:
        found: The predicted and the measured saving.

    Returns:
        One sentence.
    """
    sums, saved = (Share(*(100 * v for v in share)) for share in (found.predicted, found.measured))
    by = ", shares of one thread's processor time" * (found.clock == "processor")
    apart = sums.high < saved.low or saved.high < sums.low
    verdict = "they do not add up" if apart else "they add up, within the intervals"
    return (
        f"the blocks' shares τ add up to {sums.value:.1f} % ({sums.low:.1f} to {sums.high:.1f} %), "
        f"measured are {saved.value:.1f} % ({saved.low:.1f} to {saved.high:.1f} %): {verdict}{by}"
    )


def latency_text(change: LatencyChange) -> str:
    """Describe a change of the latency, and say so where it is no gain.

    Args:
        change: The latencies before and after.

    Returns:
        One sentence.
    """
    share, *ends = (100 * value for value in change.saved)
    word = "less" if share >= 0 else "more"
    low, high = sorted(ends if share >= 0 else (-end for end in ends))
    where = f" on {change.provider}" * bool(change.provider) + f", batch {change.batch}" * (
        change.batch > 1
    )
    text = (
        f"latency {milliseconds(change.before_ms).removesuffix(' ms')} → {milliseconds(change.after_ms)} "
        f"in onnxruntime{where}: "
        f"{abs(share):.1f} % {word} (95 % interval {low:.1f} to {high:.1f} %)"
    )
    if change.clock == "processor":
        text += ", by processor time on one thread: the machine is too busy for a wall clock"
    if change.low > 1:
        return f"{text}; it is slower there, not faster"
    return text if change.high < 1 else f"{text}; no gain there that could be measured"


def noisy(shares: Mapping[str, Share]) -> bool:
    """Return whether the clock was too noisy to tell blocks apart.

    Args:
        shares: Measured shares by exit tensor.

    Returns:
        True where an interval is wider than the share itself.
    """
    total = sum(max(s.value, 0.0) for s in shares.values())
    return total <= 0 or any(
        s.high - s.low > NOISE * max(s.value, total / len(shares)) for s in shares.values()
    )


def usable(
    shares: Mapping[str, Share], blocks: Sequence[Block], whole: int | None = None
) -> tuple[dict[str, float], bool]:
    """Turn measured shares into positive numbers that scores can be divided by.

    Ranking by noise would be meaningless: where the clock was too noisy, τ is a block's share of the
    multiply-accumulates.

    Args:
        shares: Measured shares by exit tensor.
        blocks: The blocks.
        whole: Multiply-accumulates of the network; None: unknown, the blocks are assumed to have half of
            them.

    Returns:
        τ by exit tensor, all above 0, and whether the clock was too noisy.
    """
    if noisy(shares):
        macs = {b.exit: float(max(b.macs, 1)) for b in blocks}
        total = 2 * sum(macs.values()) if whole is None else max(whole, sum(macs.values()))
        return {exit: value / total for exit, value in macs.items()}, True
    floor = FLOOR * max(s.value for s in shares.values())
    return {exit: max(share.value, floor) for exit, share in shares.items()}, False
