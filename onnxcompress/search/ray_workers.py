"""Trials as tasks of a Ray cluster: compressed in parallel, timed one at a time where nothing else runs.

A worker for latency is a node that was started without CPUs for other tasks, and with a resource:

    ray start --address HEAD:6379 --num-cpus 0 --resources '{"onnxcompress_latency": 1}'

Files that a task reads are sent once through Ray's object store, a model with its external data. A worker
that has files of the same path and content, for example on a shared disk, uses those; the provenance then
has the same path everywhere. Folders of images are not sent: they lie on a shared disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

from onnxcompress.errors import ModelError, RuntimeUnavailable, one_line, require
from onnxcompress.model import load
from onnxcompress.model.tensor_storage import file_digest
from onnxcompress.search.results import write_bytes
from onnxcompress.search.trial import Trial
from onnxcompress.search.workers import Call, Returned, WorkerDied

LATENCY = "onnxcompress_latency"
"""Resource of a node that is reserved for timing."""
RETRIES = 3
"""How often a task is begun anew elsewhere when its worker dies."""
PATIENCE = 10.0
"""Seconds between looks whether the node that is waited for is still there."""


@dataclass(frozen=True)
class Part:
    """One of the files that make up what a task names by a path: a model and its external data."""

    place: str
    """Path in the folder of the file that the task names."""
    sha: str
    """SHA-256 in hexadecimal."""
    content: Any
    """Reference of the content in the object store."""


class RayWorkers:
    """Tasks run on a cluster."""

    def __init__(
        self, address: str, *, jobs: int | None = None, cpus: float = 1.0, gpus: float = 0.0
    ) -> None:
        """Connect to a cluster.

        Args:
            address: Its address; `auto`: that which runs on this machine, or which RAY_ADDRESS names.
            jobs: Tasks at a time; None: as many as there is room for now.
            cpus: CPUs of a task.
            gpus: GPUs of a task.

        Raises:
            RuntimeUnavailable: Ray is not installed, or there is no cluster, or it has no room for a task.
        """
        require("--ray", "ray")
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RuntimeUnavailable(f"--ray {address}: no cluster answers ({one_line(error)})") from error
        self._ray, self._needs = ray, {"num_cpus": cpus, "num_gpus": gpus}
        self._sent: dict[tuple[str, str], Any] = {}
        resources = ray.cluster_resources()
        room = int(resources.get("CPU", 0) // cpus)
        if gpus:
            room = min(room, int(resources.get("GPU", 0) // gpus))
        if not room:
            raise RuntimeUnavailable(
                f"--ray {address}: no node has {cpus:g} CPUs and {gpus:g} GPUs for a task"
            )
        self.jobs = jobs or room

    def run(self, calls: Sequence[Call[Returned]]) -> Iterator[tuple[int, Returned | WorkerDied]]:
        """Run tasks; see `Workers.run`.

        Args:
            calls: The tasks.

        Yields:
            The index of a task and what it returned, or that its worker died again and again.
        """
        submitted = {self._submit(call, self._needs): index for index, call in enumerate(calls)}
        try:
            while submitted:
                (done, *_), _ = self._ray.wait(list(submitted), num_returns=1)
                yield submitted.pop(done), self._returned(done)
        finally:
            for task in submitted:
                self._ray.cancel(task, force=True)

    def run_alone(self, call: Call[Returned]) -> Returned:
        """Run a task on a node that is reserved for timing.

        Args:
            call: The task.

        Returns:
            What it returned.

        Raises:
            RuntimeUnavailable: No such node is left.
            WorkerDied: It died again and again.
        """
        task = self._submit(call, {"num_cpus": 0, "resources": {LATENCY: 1}})
        while not self._ray.wait([task], timeout=PATIENCE)[0]:
            if not self._ray.cluster_resources().get(LATENCY):
                self._ray.cancel(task)
                raise RuntimeUnavailable(
                    "--ray: no node is reserved for latency; start one with: ray start --address HEAD:6379 "
                    f"--num-cpus 0 --resources '{{\"{LATENCY}\": 1}}'"
                )
        found = self._returned(task)
        if isinstance(found, WorkerDied):
            raise found
        return cast(Returned, found)

    def close(self) -> None:
        """Leave the cluster, which goes on."""
        self._ray.shutdown()

    def _submit(self, call: Call[Any], needs: Mapping[str, Any]) -> Any:
        assert isinstance(call, partial)
        remote = self._ray.remote(max_retries=RETRIES, **needs)(carry_out)
        return remote.remote(call, {path: self._send(path) for path in files_of(call.args)})

    def _send(self, path: str) -> list[Part]:
        """Put a file, and what belongs to it, into the object store, unless it is there."""
        folder, parts = Path(path).parent.resolve(), list[Part]()
        for file in [Path(path), *external_files(path)]:
            known = str(file), file_digest(file)
            if known not in self._sent:
                self._sent[known] = self._ray.put(file.read_bytes())
            place = file.name if not parts else str(file.relative_to(folder))
            parts.append(Part(place, known[1], self._sent[known]))
        return parts

    def _returned(self, task: Any) -> Any:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            return WorkerDied(f"its worker died ({one_line(error)})")


def files_of(value: Any) -> list[str]:
    """List the files that the arguments of a task name.

    Args:
        value: Arguments: paths, trials, and collections of them.

    Returns:
        Paths of files that exist here, each once.
    """
    paths: list[str] = []

    def note(path: str) -> str:
        if Path(path).is_file():
            paths.append(path)
        return path

    _with_paths(value, note)
    return list(dict.fromkeys(paths))


def external_files(path: str) -> list[Path]:
    """List the files with external data of a model.

    Args:
        path: A file that a task names, of any kind.

    Returns:
        The files; none for what is no model, or a broken one, which the task refuses.
    """
    try:
        return sorted(load(path).external_files)
    except ModelError:
        return []


def carry_out(call: partial[Returned], files: Mapping[str, Sequence[Part]]) -> Returned:
    """Carry out a task on a worker, with its files in place.

    Args:
        call: The task.
        files: Path -> the file and what belongs to it.

    Returns:
        What the task returned.
    """
    import ray

    places = {path: placed(path, parts, ray.get) for path, parts in files.items()}
    args = _with_paths(call.args, lambda path: places.get(path, path))
    return call.func(*args, **call.keywords)


def placed(path: str, parts: Sequence[Part], content: Callable[[Any], bytes]) -> str:
    """Find a file on this machine with what belongs to it, or write them to a temporary folder.

    Args:
        path: Its path on the machine that sent the task.
        parts: The file, then its external data.
        content: Gives the content of a reference.

    Returns:
        Its path here: the same, where all parts have the same content.
    """
    file = Path(path)
    if all(_digest(file.parent / part.place) == part.sha for part in parts):
        return path
    digest = hashlib.sha256("".join(part.sha for part in parts).encode()).hexdigest()
    folder = Path(tempfile.gettempdir(), "onnxcompress-files", digest)
    for part in parts:
        copy = folder / part.place
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(copy, content(part.content))
    return str(folder / file.name)


def _with_paths(value: Any, change: Callable[[str], str]) -> Any:
    """Arguments with each path changed: strings themselves, and what passes and gates name as files."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_paths(one, change) for one in value)
    if isinstance(value, dict):
        return {name: _with_paths(one, change) for name, one in value.items()}
    if isinstance(value, Trial):
        recipe = dataclasses.replace(
            value.recipe,
            passes=tuple(_with_files(pass_, change) for pass_ in value.recipe.passes),
            gates=_with_files(value.recipe.gates, change),
        )
        return dataclasses.replace(value, model=change(value.model), recipe=recipe)
    return value


def _with_files(options: Any, change: Callable[[str], str]) -> Any:
    named = [f.name for f in dataclasses.fields(options) if f.metadata.get("file") == "read"]
    given = {name: value for name in named if (value := getattr(options, name))}
    return dataclasses.replace(options, **{name: change(value) for name, value in given.items()})


def _digest(file: Path) -> str | None:
    return _digest_at(file, file.stat().st_mtime_ns) if file.is_file() else None


@lru_cache(maxsize=64)
def _digest_at(file: Path, stamp: int) -> str:
    return file_digest(file)
