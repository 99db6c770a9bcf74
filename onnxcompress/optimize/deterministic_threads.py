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
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
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
def one_thread_each(count: int = 0) -> Iterator[None]:
    """Give each operator one thread, and the jobs of `in_turn` as many threads as torch has now.

    Within another such context it changes nothing.

    Args:
        count: Threads for jobs; 0: as many as torch has.

    Yields:
        Nothing.
    """
    if _workers.get() is not None:
        yield
        return
    count = count or torch.get_num_threads()
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
    jobs = (partial(work, index) for index in range(count))
    return run_jobs(jobs, device if count > 1 else None)


def run_jobs(
    jobs: Iterable[Callable[[], T]], device: str | torch.device | None = "cpu"
) -> Generator[T, None, None]:
    """Run jobs in parallel as `in_turn` does, each as soon as it is there, and yield the results in order.

    Args:
        jobs: The jobs; the next one is asked for when a thread is free, in the caller's own thread.
        device: Where jobs compute. On a GPU, which they would share, they run one after the other; None:
            they do so anywhere.

    Yields:
        The results, in the order of the jobs.
    """
    with one_thread_each():
        workers = _workers.get()
        if device is None or workers is None or workers.count < 2 or torch.device(device).type != "cpu":
            for job in jobs:
                with torch.enable_grad():  # as in a new thread
                    result = job()
                del job  # it keeps what it reads in memory
                yield result
            return
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(workers.pool.submit(job))
                del job
                if len(waiting) == workers.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)
