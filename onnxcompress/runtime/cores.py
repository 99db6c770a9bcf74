"""How many processor cores this process can use now, and thread pools that do not spin while they wait.

Cores to be had are the least of

    affinity    cores that the process may run on (`taskset`, cpusets of containers)
    quota       processor time that its cgroup, of version 1 or 2, may use (`docker run --cpus`)
    load        cores that no other process has kept busy, one at least

OpenMP's worker threads (torch computes with them) by default spin while they wait for work. Beside other
processes they so take the cores that the waited-for thread needs, and a command takes minutes in place of
seconds. The environment variables against it are read once, when the libraries are loaded.
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
    """Have the libraries that are loaded from now on use the cores to be had, and not spin while they wait.

    The command line calls it before torch is loaded. A program that uses the Python API may call it before
    its first `import torch`; importing `onnxcompress` changes no environment variable. Afterwards it does
    nothing: the libraries have read the variables.

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
    """Number of cores that this process can use now, at least 1."""
    allowed = _affinity()
    free = round((os.cpu_count() or 1) - _load())
    quota = _quota()
    return max(1, min(allowed, free, allowed if quota is None else int(quota)))


def thread_count() -> int:
    """Threads to compute with: what OMP_NUM_THREADS says, else the cores to be had when first asked.

    Later the process would count its own work as the load of others.
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


def _load() -> float:
    """Cores that others keep busy: now, and on average over the last minute.

    The average alone would count a command that has just ended, the present alone a moment's work.
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
    """Limits of a cgroup and of all above it.

    Inside a container `root` may be the container's own group, of which `path` names nothing below.
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
