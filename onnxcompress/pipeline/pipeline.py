"""Chains of passes: in Python, from a recipe and to one, resumable.

    model --pass 1--> --pass 2--> …      each between a look into the cache and a note in it (`resume`)

A Pipeline is a pass itself: what takes a pass takes a chain, and chains in chains are one chain.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from onnxcompress.errors import CompressError, InputError, RuntimeUnavailable, require
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.base import run as run_passes
from onnxcompress.progress import Progress, silent

if TYPE_CHECKING:
    from onnxcompress.model import Model
    from onnxcompress.pipeline.cache import Cache, Entry


@dataclass(frozen=True)
class Step:
    """One pass of a chain that has run."""

    pass_: Pass
    result: PassResult
    seconds: float
    """What the pass took, when it ran."""
    cached: bool = False
    """Whether the cache had its result."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values: pass, options, changes, refusals, measured, seconds, cached."""
        return {
            "pass": self.pass_.name,
            "options": self.pass_.options(),
            "changes": [dataclasses.asdict(c) for c in self.result.changes],
            "refusals": [dataclasses.asdict(r) for r in self.result.refusals],
            "measured": self.result.measured,
            "seconds": self.seconds,
            "cached": self.cached,
        }


@dataclass
class Run:
    """What a chain made, and how."""

    model: Model
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, init=False)
class Pipeline(Pass):
    """Passes one after the other; each notes itself in the provenance."""

    name: ClassVar[str] = "pipeline"
    composite: ClassVar[bool] = True

    passes: tuple[Pass, ...] = ()

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        flat = [part for one in passes for part in (one.passes if isinstance(one, Pipeline) else (one,))]
        object.__setattr__(self, "passes", tuple(flat))

    @classmethod
    def from_recipe(
        cls, path: str | os.PathLike[str], variables: Mapping[str, str] | None = None
    ) -> Pipeline:
        """The passes of a recipe file. Raises OptionError with the line for what is not right in it."""
        from onnxcompress.pipeline.recipe import read_recipe

        return cls(read_recipe(path, variables).passes)

    def to_recipe(self, folder: str | os.PathLike[str] = ".") -> str:
        """The text of a recipe that will lie in `folder`, from which `from_recipe` makes an equal chain."""
        from onnxcompress.pipeline.recipe import Recipe, write_recipe

        return write_recipe(Recipe(self.passes), folder)

    def check(self) -> None:
        """Raise for anything that can be told to fail before the first pass runs: see `check_ready`."""
        for at, one in enumerate(self.passes):
            with self._placed(at):
                check_ready(one)

    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Apply all passes to `model` in place; `measured`: the names of `passes`, what each `measured`."""
        self.check()
        results = run_passes(self.passes, model, progress)
        return PassResult(
            [c for r in results for c in r.changes],
            [c for r in results for c in r.refusals],
            {"passes": [p.name for p in self.passes], "measured": [r.measured for r in results]},
        )

    def run(
        self,
        model: Model,
        progress: Progress = silent,
        *,
        cache: Cache | None = None,
    ) -> Run:
        """Apply all passes; `model` stays as it is. Results in `cache` are taken, new ones put there.

        Raises as `check` and the passes do; which of several passes it was is said.
        """
        self.check()
        chain = _Chain(model, cache)
        steps = []
        for at, one in enumerate(self.passes):
            with self._placed(at):
                steps.append(chain.step(one, _named(progress, one, len(self.passes))))
        return Run(chain.model(), steps)

    def cached(self, model: Model, cache: Cache) -> int:
        """How many of the first passes the cache has the results of."""
        chain = _Chain(model, cache)
        for index, one in enumerate(self.passes):
            if chain.known(one) is None:
                return index
        return len(self.passes)

    @contextmanager
    def _placed(self, at: int) -> Iterator[None]:
        """Errors say which pass of several they are of."""
        try:
            yield
        except CompressError as error:
            if len(self.passes) == 1:
                raise
            where = f"pass {at + 1} of {len(self.passes)}, {self.passes[at].name}"
            raise type(error)(f"{where}: {error}") from error


def check_ready(one: Pass) -> None:
    """Raise for what would make a pass fail later whatever the model is.

    OptionError: options that contradict each other; InputError: a file that is not there;
    RuntimeUnavailable: a package is not installed; onnxruntime's provider, or torch's device, cannot start.
    """
    one.check()
    require(one.name, *one.needs)
    for f in dataclasses.fields(one):
        path = getattr(one, f.name)
        if f.metadata.get("file") == "read" and path and not Path(path).exists():
            flag = "--" + f.name.replace("_", "-")
            raise InputError(f"{flag} {path}: no such file or folder")
    if getattr(one, "provider", "auto") not in ("auto", "cpu"):
        from onnxcompress.runtime.providers import Provider
        from onnxcompress.runtime.session import check_provider

        check_provider(Provider.of(one.provider, getattr(one, "provider_options", ())))  # type: ignore[attr-defined]
    if getattr(one, "device", "auto") not in ("auto", "cpu"):
        try:
            from onnxcompress.optimize.device import pick_device
        except ImportError as error:
            raise RuntimeUnavailable(f"torch cannot be imported ({error})") from error
        pick_device(one.device)  # type: ignore[attr-defined]


class _Chain:
    """The model between two passes. Of results in the cache only the last is ever loaded."""

    def __init__(self, model: Model, cache: Cache | None) -> None:
        self._given = model
        self._own: Model | None = None
        self._last: Entry | None = None
        self._cache = cache
        if cache is not None:
            from onnxcompress.pipeline.cache import model_digest

            self._digest = model_digest(model)

    def model(self) -> Model:
        """The model as it is now, to be changed."""
        if self._own is None:
            name = self._given.name
            self._own = self._given.copy() if self._last is None else self._last.load(name)
        return self._own

    def known(self, one: Pass) -> Entry | None:
        """The cache's entry for applying `one` now; if there is one, this becomes the state."""
        if self._cache is None:
            return None
        from onnxcompress.pipeline.cache import step_key

        entry = self._cache.find(step_key(self._digest, one))
        if entry is not None:
            self._last, self._own = entry, None
            if entry.result.modified:
                self._digest = entry.digest
        return entry

    def step(self, one: Pass, progress: Progress) -> Step:
        entry = self.known(one)
        if entry is not None:
            return Step(one, entry.result, entry.seconds, cached=True)
        key = self._key(one)
        model = self.model()
        start = time.monotonic()
        (result,) = run_passes([one], model, progress)
        seconds = time.monotonic() - start
        if self._cache is not None:
            self._store(key, one, model, result, seconds)
        return Step(one, result, seconds)

    def _key(self, one: Pass) -> str:
        if self._cache is None:
            return ""
        from onnxcompress.pipeline.cache import step_key

        return step_key(self._digest, one)

    def _store(self, key: str, one: Pass, model: Model, result: PassResult, seconds: float) -> None:
        from onnxcompress.pipeline.cache import writes_files

        assert self._cache is not None
        if writes_files(one):  # the next run finds the file there
            key = self._key(one)
        if result.modified:
            digest = self._digest = model.digest()
            model.input_digest = lambda: digest
        self._cache.store(key, model, result, seconds)


def _named(progress: Progress, one: Pass, count: int) -> Progress:
    """In a chain the stages say whose they are."""
    if count == 1:
        return progress
    return lambda stage, done, total: progress(f"{one.name}: {stage}", done, total)
