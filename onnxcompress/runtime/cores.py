"""Count the processor cores that this process can use now, and keep waiting threads from spinning.

The number of available cores is the least of

    affinity    cores that the process may run on (`taskset`, cpusets of containers)
    quota       processor time that its cgroup, of version 1 or 2, may use (`docker run --cpus`)
    load        cores that no other process has kept busy, one at least

OpenMP's worker threads (torch computes with them) by default spin while they wait for work. On a busy
machine they then occupy the cores that the thread they wait for needs, and a command takes minutes instead
of seconds. The environment variables that prevent this are read once, when the libraries are loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, MutableMapping
from functools import cache
from pathlib import Path

COUNT = "OMP_NUM_THREADS"
"""Environment variable with the number of threads; a user's own value is kept."""
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Let waiting threads sleep: the standard's variable, GNU's and Intel's own."""
NUMPY = {"OPENBLAS_NUM_THREADS": "1"}
"""Numpy's own pool, which would compete with torch's and has little to do."""
PROCESS_GROUPS, GROUPS, LOAD = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/loadavg")


def prepare_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make libraries that are loaded from now on use the available cores, and not spin while they wait.

    The command line calls it before torch is loaded. A program that uses the Python API may call it before
    its first `import torch`; importing `onnxcompress` changes no environment variable. Once torch is loaded
    it does nothing, because the libraries have read the variables.

    Args:
        environment: Variables to set; those that are set already keep their values.
    """
    if "torch" in sys.modules:
        return
    for name, value in (WAITING | NUMPY).items():
        environment.setdefault(name, value)
    if COUNT not in environment:
        environment[COUNT] = str(available_cores())


def available_cores() -> int:
    """Count the cores that this process can use now.

    Returns:
        The number of cores, at least 1.
    """
    allowed = _affinity()
    free = round((os.cpu_count() or 1) - other_load())
    quota = _quota()
    return max(1, min(allowed, free, allowed if quota is None else int(quota)))


def thread_count() -> int:
    """Return the number of threads to compute with.

    The available cores are counted at the first call only: later the process would count its own work as
    the load of others.

    Returns:
        The value of OMP_NUM_THREADS, else the available cores at the first call.
    """
    given = os.environ.get(COUNT, "").split(",")[0].strip()
    return max(1, int(given)) if given.isdecimal() else _cores_at_first()


@cache
def _cores_at_first() -> int:
    return available_cores()


def _affinity() -> int:
    """Cores that the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def other_load() -> float:
    """Count the cores that others keep busy: the smaller of the present load and the last minute's average.

    The average alone would count a command that has just ended, the present alone a momentary load.

    Returns:
        The number of cores; 0 where the system does not tell.
    """
    try:
        words = LOAD.read_text().split()
        return max(0.0, min(float(words[0]), int(words[3].split("/")[0]) - 1))
    except (OSError, ValueError, IndexError):
        return 0.0


def _quota() -> float | None:
    """Cores' worth of time that the process' cgroup and those above it may use; None: no limit."""
    try:
        lines = [line.split(":", 2) for line in PROCESS_GROUPS.read_text().splitlines()]
    except OSError:
        return None
    limits: list[float] = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            limits += _limits(GROUPS, path, _limit_of_version_2)
        elif "cpu" in controllers.split(","):
            limits += _limits(GROUPS / "cpu", path, _limit_of_version_1)
    return min(limits, default=None)


def _limits(root: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    """Read the limits of a cgroup and of all its parents.

    Inside a container `root` may be the container's own group, below which `path` does not exist.
    """
    group = root / path.lstrip("/")
    folders = [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return [limit for folder in dict.fromkeys([*folders, root]) if (limit := read(folder)) is not None]


def _limit_of_version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _limit_of_version_1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
