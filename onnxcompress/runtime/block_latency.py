"""The share of the latency that each block takes, measured in onnxruntime (PRACTISE §3.2, τ).

    τ(B) = (lat(M) − lat(M without B)) / lat(M)

One variant without each block is timed, all interleaved with the whole model. Blocks with the same
operators and shapes (`Block.signature`) take the same time, so one variant stands for all of them. That
shares add up is assumed when blocks are chosen; `drop-blocks` sets their sum (`added`) beside the measured
latency of what it made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import Block
from onnxcompress.model import Model
from onnxcompress.runtime.latency import Ratio, benchmark, ratio
from onnxcompress.runtime.providers import ProviderLike

FLOOR = 0.1
"""A share below this part of the largest counts as this: nothing is divided by next to nothing."""
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
) -> dict[str, Share]:
    """τ of each block by its exit tensor. Raises what `latency.benchmark` raises."""
    kinds = list(dict.fromkeys(b.signature for b in blocks))
    variants: dict[str, Model] = {"": model}
    for kind in kinds:
        twin = model.copy()
        drop_blocks(twin, [next(b.exit for b in blocks if b.signature == kind)])
        variants[kind] = twin
    timings = benchmark(
        variants,
        provider=provider,
        batch=batch,
        threads=threads,
        seconds=seconds,
        tolerance=0.003,
        seed=seed,
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


def usable(shares: Mapping[str, Share], blocks: Sequence[Block]) -> tuple[dict[str, float], bool]:
    """τ by exit to divide by, all above 0, and whether the clock was too noisy to tell blocks apart.

    On a busy machine the intervals are wider than the shares, and ranking by them would be ranking by
    noise: then τ is taken as proportional to the multiply-accumulates.
    """
    total = sum(max(s.value, 0.0) for s in shares.values())
    noisy = total <= 0 or any(
        s.high - s.low > NOISE * max(s.value, total / len(shares)) for s in shares.values()
    )
    if noisy:
        macs = {b.exit: float(max(b.macs, 1)) for b in blocks}
        scale = max(total, 0.5) / sum(macs.values())
        return {exit: scale * value for exit, value in macs.items()}, True
    floor = FLOOR * max(s.value for s in shares.values())
    return {exit: max(share.value, floor) for exit, share in shares.items()}, False
