"""Where trials run: in this process, or in processes of this machine (`ray_workers`: on a cluster).

A worker that dies, for example for want of memory, costs its own task alone. What is timed runs on its own:
no task runs beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from onnxcompress.errors import CompressError, OptionError

Returned = TypeVar("Returned")
Call = Callable[[], Returned]
"""A function with its arguments, such as a `functools.partial`, that can be pickled."""
THREADS = ("OMP_NUM_THREADS",)


class WorkerDied(CompressError):
    """The process that ran a task has ended, killed by the system or by a crash."""


class Workers(Protocol):
    """Where tasks run."""

    jobs: int
    """Tasks that run at a time."""

    def run(self, calls: Sequence[Call[Returned]]) -> Iterator[tuple[int, Returned | WorkerDied]]:
        """Run tasks, several at a time.

        Args:
            calls: The tasks.

        Yields:
            The index of a task and what it returned, in the order in which they end.
        """

    def run_alone(self, call: Call[Returned]) -> Returned:
        """Run a task that times something, with no other task beside it.

        Args:
            call: The task.

        Returns:
            What it returned.
        """

    def close(self) -> None:
        """End what waits for more tasks."""


class InProcess:
    """Tasks run one after the other in this process."""

    jobs = 1

    def run(self, calls: Sequence[Call[Returned]]) -> Iterator[tuple[int, Returned | WorkerDied]]:
        """Run tasks; see `Workers.run`.

        Args:
            calls: The tasks.

        Yields:
            The index of a task and what it returned.
        """
        for index, call in enumerate(calls):
            yield index, call()

    def run_alone(self, call: Call[Returned]) -> Returned:
        """Run a task; see `Workers.run_alone`.

        Args:
            call: The task.

        Returns:
            What it returned.
        """
        return call()

    def close(self) -> None:
        """Do nothing: nothing waits for tasks."""


class Processes:
    """Tasks run in processes of this machine, each of which shares the cores evenly with the others.

    A process that has ended its task is kept for the next, with what it has loaded.
    """

    def __init__(self, jobs: int) -> None:
        """Start no process yet: each starts with its first task.

        Args:
            jobs: Processes at a time.

        Raises:
            OptionError: There are fewer than 1.
        """
        if jobs < 1:
            raise OptionError(f"--jobs {jobs}: expected 1 or more")
        self.jobs = jobs
        self._idle: list[ProcessPoolExecutor] = []

    def run(self, calls: Sequence[Call[Returned]]) -> Iterator[tuple[int, Returned | WorkerDied]]:
        """Run tasks; see `Workers.run`.

        Args:
            calls: The tasks.

        Yields:
            The index of a task and what it returned, or that its process died.
        """
        todo = list(reversed(range(len(calls))))
        running: dict[Future[Returned], tuple[int, ProcessPoolExecutor]] = {}
        try:
            while todo or running:
                while todo and len(running) < self.jobs:
                    index = todo.pop()
                    future, process = self._submit(calls[index])
                    running[future] = index, process
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, process = running.pop(future)
                    try:
                        found: Returned | WorkerDied = future.result()
                        self._idle.append(process)
                    except BrokenProcessPool:
                        found = WorkerDied("its process died: out of memory, or killed")
                    yield index, found
        finally:
            for _, process in running.values():
                _stop(process)

    def close(self) -> None:
        """End the processes, which wait for more tasks until then."""
        while self._idle:
            _stop(self._idle.pop())

    def run_alone(self, call: Call[Returned]) -> Returned:
        """Run a task in this process: no process that `run` started is still at work then.

        Args:
            call: The task.

        Returns:
            What it returned.
        """
        return call()

    def _submit(self, call: Call[Returned]) -> tuple[Future[Returned], ProcessPoolExecutor]:
        """Begin a task in a process that waits for one, else in a new one."""
        while self._idle:
            process = self._idle.pop()
            try:
                return process.submit(call), process
            except BrokenProcessPool:  # it was killed since its last task
                continue
        process = self._process()
        return process.submit(call), process

    def _process(self) -> ProcessPoolExecutor:
        """A pool of one process: where that dies, no other task is lost with it."""
        given = os.environ.get(THREADS[0], "1").split(",")[0]
        threads = max(1, (int(given) if given.isdecimal() else 1) // self.jobs)
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, spawn, _prepare, (threads,))


def _prepare(threads: int) -> None:
    """Prepare a worker: its share of the cores, and an end when its parent ends, even if that is killed."""
    for name in THREADS:
        os.environ[name] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _stop(process: ProcessPoolExecutor) -> None:
    """End a process at once: what it was at is given up."""
    workers: dict[int, Any] = getattr(process, "_processes", None) or {}
    for worker in list(workers.values()):
        worker.terminate()
    process.shutdown(wait=False, cancel_futures=True)
