"""Search for the sets of blocks that reach a target at the lowest predicted loss.

    minimize Σ R(B) over the set      subject to  Σ τ(B) ≥ target

with the recoverability R and the latency share τ of each block alone (PRACTISE, arXiv 2202.07861, §3.2,
takes blocks by R / τ until the target is reached, which may be more than it needs). An integer program,
solved exactly (HiGHS); each solution is then forbidden, for the next best. No set has a block that the
target does not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

TIME_LIMIT = 5.0
"""Seconds for one solution, at most; networks of some fifty blocks take hundredths of one."""


def cheapest_sets(
    losses: Sequence[float], shares: Sequence[float], target: float, count: int
) -> Iterator[tuple[int, ...]]:
    """Search for the sets with the lowest sum of losses whose shares add up to a target.

    Args:
        losses: R of each block.
        shares: τ of each block, in the unit of the target.
        target: The sum of shares to reach.
        count: How many sets to find, at most.

    Yields:
        Positions of the blocks of each set in ascending order, the set with the lowest loss first.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import

    finite = np.isfinite(losses)  # what a block leaves may not be
    cost, gain = np.where(finite, np.maximum(losses, 0.0), 0.0), np.asarray(shares, float)
    rules = [LinearConstraint(gain[None], lb=target)]
    for _ in range(count):
        solved = milp(
            cost / max(cost.max(), 1e-30),
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, finite.astype(float)),
            constraints=rules,
            options={"time_limit": TIME_LIMIT, "mip_rel_gap": 0.0},
        )
        if solved.x is None:
            return
        taken = solved.x > 0.5
        rules.append(LinearConstraint(np.where(taken, 1.0, -1.0)[None], ub=taken.sum() - 1))
        chosen = np.flatnonzero(taken)
        if not (gain[chosen].sum() - gain[chosen] >= target).any():  # one of them costs nothing, else
            yield tuple(int(i) for i in chosen)
