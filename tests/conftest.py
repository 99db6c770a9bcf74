"""Shared by all tests: one thread for each process (they run beside each other), the shipped files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.brief import few_rounds, little_learning
from tests.helpers.paths import MODELS

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ["ONNXCOMPRESS_CACHE"] = "none"  # a second run would not compute what a test compares
os.environ["ONNXCOMPRESS_LATENCY"] = "off"  # seconds a command; tests of it switch it on


@pytest.fixture(scope="session", autouse=True)
def exports_of_the_present() -> Iterator[None]:
    """Hold that an export which is not made anew is still the graph's, of one such export in four."""
    from onnxcompress.model.model import Model

    kept, turns = Model._export, count()

    def checked(model: Model) -> Any:
        before = model._kept_export
        proto, tensors = kept(model)
        if model._kept_export is not before or next(turns) % 4:
            return proto, tensors
        now, values = model._new_export()
        assert proto == now, "an export of an earlier state"
        assert [t for t, _ in tensors] == [t for t, _ in values], "tensors of an earlier state"
        assert all(a is b for (_, a), (_, b) in zip(tensors, values, strict=True)), "earlier values"
        return proto, tensors

    checked.unchecked = kept  # type: ignore[attr-defined]  # for tests that count exports
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "_export", checked)
        yield


@pytest.fixture(scope="session", autouse=True)
def images_drawn_once() -> Iterator[None]:
    """Draw each procedural image once: most tests begin with the same ones."""
    from onnxcompress.data import dead_leaves

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_leaves, "_image", lru_cache(maxsize=4096)(dead_leaves._image))
        yield


@pytest.fixture(scope="session", autouse=True)
def learning_little() -> Iterator[pytest.MonkeyPatch]:
    """Learn little in all tests that do not ask for `whole_learning`."""
    with pytest.MonkeyPatch.context() as patch:
        little_learning(patch)
        yield patch


@pytest.fixture
def whole_learning(learning_little: pytest.MonkeyPatch) -> Iterator[None]:
    """Learn as users do, for tests that judge what was learned."""
    learning_little.undo()
    yield
    little_learning(learning_little)


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the shipped networks and images."""
    return MODELS


@pytest.fixture(scope="session")
def more_threads() -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch has one thread more."""
    import torch

    @contextmanager
    def context() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return context


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency from a few rounds, for tests of what is done with it."""
    few_rounds(monkeypatch)


@pytest.fixture
def fixed_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A clock that says what a run of each model takes, in milliseconds, in the order they are timed in.

    Called with lists of milliseconds, one for each number of models that are timed together (others take
    10 ms each); `jitter`: half the width of the last model's times, relative, evenly spread.
    """
    import numpy as np

    from onnxcompress.runtime import latency

    def install(*sets: list[float], jitter: float = 0.0) -> None:
        by_count = {len(one): one for one in sets}
        spread = np.random.default_rng(0).permutation(np.linspace(1 - jitter, 1 + jitter, 60))

        def interleave(timed: Any, **options: Any) -> np.ndarray:
            samples = np.tile(by_count.get(len(timed), [10.0] * len(timed)), (60, 1)).astype(float)
            samples[:, -1] *= spread
            return samples

        monkeypatch.setattr(latency, "interleave", interleave)
        monkeypatch.setattr(latency, "_warm", lambda timed, seconds: None)

    return install


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Images of noise, each of another mean and contrast, as `--images`."""
    import numpy as np

    rng = np.random.default_rng(0)
    mean, spread = rng.uniform(60, 190, (96, 1, 1, 3)), rng.uniform(10, 60, (96, 1, 1, 1))
    pixels = rng.normal(mean, spread, (96, 8, 8, 3)).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "photos.npz", x=pixels)
    return str(tmp_path / "photos.npz")
