"""Choosing among results: what a result loses, which limits it misses, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.evaluation.gates import Gates
from onnxcompress.search.aim import MARGIN
from onnxcompress.search.trial import TIMED, Row, verdicts

LOSS_LIMITS = ("max_drop", "min_agreement")
DOUBTFUL = 0.15
"""Part of the latency asked for within which a proxy's own measurement does not say on which side it is."""


def is_measured(row: Row) -> bool:
    """Return whether anything tells what a result lost.

    Args:
        row: Its figures.

    Returns:
        False where outputs are no numbers that can be compared, and no images judge them.
    """
    return any(row.get(name) is not None for name in ("top1", "agreement", "noise"))


def loss_of(row: Row) -> float:
    """Compute what a result lost, from the best that was measured.

    Args:
        row: Its figures.

    Returns:
        Points of top-1 accuracy where images have labels, else the share of images of another class, else
        the outputs' noise over their variation between inputs; the last two in percent.
    """
    if row.get("top1") is not None:
        return 100 * (float(row["top1_before"]) - float(row["top1"]))
    if row.get("agreement") is not None:
        return 100 * (1 - float(row["agreement"]))
    return 100 * float(row["noise"])


def loss_name(row: Row) -> str:
    """Name what `loss_of` computes.

    Args:
        row: The figures of a result.

    Returns:
        Words with the unit.
    """
    if row.get("top1") is not None:
        return f"top-1 accuracy lost on {row['inputs']}, points"
    if row.get("agreement") is not None:
        return f"{row['inputs']} with another class than before, %"
    return "noise of the outputs over their variation, %"


def violations(row: Row, gates: Gates, *, loss: bool, sure: float = 0.0) -> list[float]:
    """Compute how far limits are missed.

    Args:
        row: Figures of a result.
        gates: The limits.
        loss: Whether limits on the loss count, too.
        sure: Part of a limit on the latency by which it is to be kept.

    Returns:
        A value for each limit: above 0 where it is missed, relative to the limit.
    """
    skipped = () if loss else LOSS_LIMITS
    found = [v for v in verdicts(row, gates) if v.gate not in skipped]
    return [
        (1.0 if v.gate.startswith("max") else -1.0) * (v.measured - v.limit) / max(abs(v.limit), 1e-9)
        + sure * (v.gate in TIMED)
        for v in found
    ]


def pareto_front(values: Sequence[Sequence[float]]) -> list[int]:
    """Find the points that no other point beats or equals in everything, smaller being better.

    Args:
        values: The objectives of each point.

    Returns:
        Indices of the points, ascending; of equal points the first.
    """

    def beaten(index: int) -> bool:
        own = tuple(values[index])
        return any(
            all(a <= b for a, b in zip(other, own, strict=True)) and (tuple(other) != own or at < index)
            for at, other in enumerate(values)
        )

    return [index for index in range(len(values)) if not beaten(index)]


def pick(rows: Sequence[Row], gates: Gates) -> int | None:
    """Choose the result to take.

    Where speed or size is limited and the loss is not, or both are, it is the one that loses least; where
    only the loss is limited, the fastest.

    Args:
        rows: The results.
        gates: The limits.

    Returns:
        Index of the result; None where there is no limit, or none keeps all of them.
    """
    kept = [
        index for index, row in enumerate(rows) if all(verdict.passed for verdict in verdicts(row, gates))
    ]
    if not kept or not gates.limits:
        return None
    fastest = gates.limits.keys() <= set(LOSS_LIMITS)
    key = "ratio" if fastest else "loss"
    return min(kept, key=lambda index: (rows[index][key], rows[index]["ratio"]))


def contenders(rows: Sequence[Row], wanted: float, count: int) -> list[int]:
    """Find the proxies of which it is not sure whether they are fast enough, by what each measured alone.

    Args:
        rows: Figures of the proxies.
        wanted: The latency over the original's that is asked for.
        count: Number to find at most.

    Returns:
        Indices of those that are near it, the one that loses least first.
    """
    near = [index for index, row in enumerate(rows) if abs(row["ratio"] / wanted - 1) <= DOUBTFUL]
    return sorted(near, key=lambda index: float(rows[index]["loss"]))[:count]


def choose_for_repair(rows: Sequence[Row], gates: Gates, count: int) -> list[int]:
    """Choose proxies to repair in full, in the order of their promise: time may not be enough for all.

    Half of them are those of the front that miss limits least, or surely keep them (MARGIN), and then lose
    least; the others are spread evenly over the front's latencies.

    Args:
        rows: Figures of the proxies.
        gates: The limits.
        count: Number to choose.

    Returns:
        Indices of the chosen.
    """
    front = pareto_front([(row["ratio"], row["loss"], row["size"]) for row in rows])

    def promise(index: int) -> tuple[float, float, float]:
        hard = sum(max(0.0, v) for v in violations(rows[index], gates, loss=False, sure=MARGIN))
        soft = sum(max(0.0, v) for v in violations(rows[index], gates, loss=True, sure=MARGIN))
        return hard, soft, rows[index]["loss"]

    chosen = sorted(front, key=promise)[: (count + 1) // 2] if gates.limits else []
    rest = sorted((i for i in front if i not in chosen), key=lambda i: rows[i]["ratio"])
    wanted = min(count - len(chosen), len(rest))
    steps = [round(k * (len(rest) - 1) / max(wanted - 1, 1)) for k in range(wanted)]
    spread = [rest[step] for step in dict.fromkeys(steps)]
    return chosen + (sorted(spread, key=promise) if gates.limits else spread)
