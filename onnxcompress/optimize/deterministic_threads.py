"""How many threads torch computes with, where results depend on it.

LAPACK's solvers and the gradients of convolutions' weights add in an order that goes by the number of
threads: the last digits of their results do, too, and then a rounded weight, or which weights stay. What
must not depend on it runs with one thread, several such jobs beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread; of the whole process, since it has no setting of a thread's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turn(work: Callable[[int], T], count: int) -> Iterator[T]:
    """work(0), work(1), … on as many threads as torch has: results are the same whatever their number.

    No more of them are under way, or wait to be taken, than there are threads.
    """
    workers = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, workers):
            yield from pool.map(work, range(start, min(start + workers, count)))
