"""Others' models through every pass: the fast part; `python -m tests.benchmarks.trust` runs all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import islice
from pathlib import Path

import onnxruntime.datasets
import pytest

from onnxcompress.model import Model
from onnxcompress.passes import CATALOGUE
from tests.helpers import suites
from tests.helpers.embedding import embedded_cases
from tests.helpers.suites import Case
from tests.robustness.through_passes import EXACT, MAKERS, Subject, outcome

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_clock")]

DATASETS = sorted(Path(onnxruntime.datasets.__file__).parent.glob("*.onnx"))
SAMPLES: dict[str, tuple[Callable[[], Iterable[Case]], slice]] = {
    "simple": (lambda: suites.backend_cases("simple"), slice(None)),
    "pytorch-converted": (lambda: suites.backend_cases("pytorch-converted"), slice(0, None, 2)),
    "pytorch-operator": (lambda: suites.backend_cases("pytorch-operator"), slice(None)),
    "pytorch-converted, opset 21": (lambda: suites.converted_cases("pytorch-converted"), slice(1, None, 2)),
    "node": (lambda: suites.backend_cases("node"), slice(0, None, 40)),
    "onnxruntime.datasets": (lambda: suites.file_cases(DATASETS), slice(None)),
}
"""Suite -> its cases, and which of them are run here."""
CHANGED = {
    "pytorch-converted": ("prune 2:4 sparse", "fp16"),
    "pytorch-operator": ("prune 2:4 sparse",),
    "pytorch-converted, opset 21": ("correct-bias", "prune", "prune 2:4 sparse", "quantize", "fp16"),
    "node": ("fp16",),
    "onnxruntime.datasets": ("fold-bn", "equalize", "prune", "prune 2:4 sparse"),
}
"""Suite -> those that change some of its cases: most have neither a norm nor a constant weight."""
SHARE_EXACT, SHARE_OTHER = 5, 35
"""Of node cases between layers."""


@cache
def _subjects(suite: str) -> list[Subject]:
    make, which = SAMPLES[suite]
    return [Subject(case) for case in islice(make(), which.start, which.stop, which.step)]


@cache
def _embedded() -> list[Subject]:
    return [Subject(case) for case in embedded_cases()]


def _check(subjects: Iterable[Subject], name: str) -> int:
    """Take all through; returns how many changed."""
    found = {subject.case.name: outcome(subject, name) for subject in subjects}
    assert found
    assert not {case: one.why for case, one in found.items() if one.kind == "failed"}
    return sum(one.changed for one in found.values())


@pytest.mark.parametrize("suite", suites.BACKEND)
def test_reading_and_writing_loses_nothing(suite: str) -> None:
    lost = [c.name for c in suites.backend_cases(suite) if Model.from_proto(c.model).to_proto() != c.model]
    assert not lost


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("suite", SAMPLES)
def test_a_suite_of_others(suite: str, name: str) -> None:
    changed = _check(_subjects(suite), name)
    assert changed or name not in CHANGED.get(suite, ())


@pytest.mark.parametrize("name", MAKERS)
def test_any_operator_between_two_layers(name: str) -> None:
    subjects = _embedded()[:: SHARE_EXACT if name in EXACT and name != "calibrate" else SHARE_OTHER]
    changed = _check(subjects, name)
    assert changed or not name.startswith(("fold-bn", "equalize", "correct", "prune", "quantize", "fp16"))


FOUND = {
    "test_gemm_all_attributes": "correct-bias",  # transA
    "test_stft": "correct-bias",  # onnx infers another size than onnxruntime computes
    "test_reshape_reordered_all_dims": "drop-blocks",  # mixes the images of a batch
    "test_reshape_negative_extended_dims": "drop-blocks",
    "test_flexattention_double_expanded_ver26": "fp16",  # outputs that are float16 already
    "test_if_opt": "calibrate",  # a body that graphsurgeon cannot export
}
"""Case of onnx's node suite -> the pass that once ended in a traceback, as found by the whole suite."""


def test_cases_that_failed_once() -> None:
    cases = [*suites.backend_cases("node"), *embedded_cases()]
    found = {(c.name, outcome(Subject(c), FOUND[c.name])) for c in cases if c.name in FOUND}
    assert {name for name, _ in found} == FOUND.keys()
    assert not {(name, one.why) for name, one in found if one.kind == "failed"}


@pytest.mark.parametrize("name", ["fold-bn", "equalize", "equalize --assumption-free", "prune 2:4 sparse"])
@pytest.mark.parametrize("network", ["shufflenet", "squeezenet"])
def test_a_light_network_with_weights(network: str, name: str) -> None:
    (case,) = suites.light_cases(filled=True, only=[network])
    changed = _check([Subject(case)], name)
    assert changed == (name != "fold-bn" or network == "shufflenet")


def test_each_pass_of_the_catalogue_is_here() -> None:
    assert {entry.name for entry in CATALOGUE} <= {name.split()[0] for name in MAKERS}
