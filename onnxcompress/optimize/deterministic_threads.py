"""How many threads torch computes with, and jobs that run beside each other, each with one thread of torch.

LAPACK's solvers and the gradients of convolutions' weights add in an order that goes by the number of
threads: the last digits of their results do, too, and then a rounded weight, or which weights stay. And the
threads of one operator wait for each other at its end, thousands of times a second in a small network:
where other processes keep the cores busy, each wait lasts until the slowest thread has had its turn.

So a pass that learns runs within `one_thread_each`: each operator has one thread, and what is independent
(batches, blocks, parts of a step's images) goes through `in_turn` to as many threads as torch had. Results
are the same whatever their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class _Workers:
    """Threads for independent jobs; the pool starts them when the first job comes."""

    count: int
    pool: ThreadPoolExecutor


_workers: ContextVar[_Workers | None] = ContextVar("workers", default=None)
"""The workers of the pass that runs; None within a job, so that a job starts no threads of its own."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, in the whole process: it has no setting for a thread alone.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Give each operator one thread, and the jobs of `in_turn` as many threads as torch has now.

    Within another such context it changes nothing.

    Yields:
        Nothing.
    """
    if _workers.get() is not None:
        yield
        return
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count)
    token = _workers.set(_Workers(count, pool))
    try:
        with one_thread():
            yield
    finally:
        _workers.reset(token)
        pool.shutdown(cancel_futures=True)


def worker_count() -> int:
    """Count the jobs of `in_turn` that run at once.

    Returns:
        The number of threads.
    """
    workers = _workers.get()
    return torch.get_num_threads() if workers is None else workers.count


def in_turn(
    work: Callable[[int], T], count: int, device: str | torch.device = "cpu"
) -> Generator[T, None, None]:
    """Run work(0), work(1), … in parallel, each with one thread of torch, and yield the results in order.

    Results are the same whatever the number of threads. No more jobs are under way, or wait to be taken,
    than there are threads. Gradients are recorded in a job unless it says otherwise, as in any new thread.

    Args:
        work: The job, given its number.
        count: Number of jobs.
        device: Where jobs compute. On a GPU, which they would share, they run one after the other.

    Yields:
        The results, by number of the job.
    """
    with one_thread_each():
        workers = _workers.get()
        if workers is None or min(workers.count, count) < 2 or torch.device(device).type != "cpu":
            for index in range(count):
                yield _alone(work, index)
            return
        waiting: deque[Future[T]] = deque()
        try:
            for index in range(count):
                if len(waiting) == workers.count:
                    yield waiting.popleft().result()
                waiting.append(workers.pool.submit(work, index))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


def _alone(work: Callable[[int], T], index: int) -> T:
    """Run the job in the caller's own thread, recording gradients as a new thread would."""
    with torch.enable_grad():
        return work(index)
