"""What the key of a cached step depends on."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.model import load
from onnxcompress.passes import CATALOGUE, load_pass
from onnxcompress.passes.base import Pass
from onnxcompress.passes.calibrate import Calibrate
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.pipeline import Pipeline, cache_keys
from onnxcompress.pipeline.cache import Cache
from onnxcompress.pipeline.cache_keys import content_digest, step_key, values_key


def other(kind: Any, value: Any) -> Any:
    """Another value of the type; the value itself where it has none."""
    if typing.get_origin(kind) is typing.Literal:
        return next(v for v in typing.get_args(kind) if v != value)
    if typing.get_args(kind) and type(None) in typing.get_args(kind):
        return other(typing.get_args(kind)[0], value)
    if kind is bool:
        return not value
    if kind in (int, float):
        return kind((value or 0) + 1)
    if kind is str:
        return f"{value or ''}x"
    return ("x",)


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE])
def test_every_option_of_a_pass_is_part_of_its_key(name: str) -> None:
    """The seed, too. Options that name files count by what the files hold, and have a test of their own."""
    cls = load_pass(name)
    plain = cls(**({"only_faster": True} if name == "quantize" else {}))  # else its clock decides nothing
    kinds = typing.get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if not f.metadata.get("file")]
    keys = {step_key("digest", plain), step_key("other digest", plain)}
    for one in fields:
        changed = dataclasses.replace(plain, **{one.name: other(kinds[one.name], getattr(plain, one.name))})
        keys.add(step_key("digest", changed))
    assert len(keys) == 2 + len(fields)


def test_two_seeds_have_two_results_in_one_cache(models: Path, tmp_path: Path) -> None:
    model, cache = load(models / "resnet20-fashion.onnx"), Cache(tmp_path / "cache")

    def run(one: Pass) -> tuple[str, bool]:
        run = Pipeline([one]).run(model, cache=cache)
        return run.model.digest(), run.steps[0].cached

    first = Calibrate(inputs="procedural", synthetic=4)
    results = [run(one) for one in (first, dataclasses.replace(first, seed=1), first)]
    assert [cached for _, cached in results] == [False, False, True]
    assert results[0][0] == results[2][0] != results[1][0]


def test_a_large_folder_counts_by_sizes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others count by contents, whatever the times."""
    file = tmp_path / "images" / "a.png"
    file.parent.mkdir()

    def digest(text: str, time: int) -> str:
        file.write_text(text)
        os.utime(file, (time, time))
        return content_digest(file.parent)

    assert digest("one", 1) == digest("one", 2) != digest("two", 2)
    monkeypatch.setattr(cache_keys, "HASHED", 2)
    assert len({digest("one", 1), digest("one", 2), digest("three", 2)}) == 3
    assert digest("one", 1) == digest("one", 1)


def test_names_in_a_folder_count(tmp_path: Path) -> None:
    """As labels, say: the same pictures of other classes."""
    digests = set()
    for first, second in (("a", "b"), ("b", "a"), ("a", "c")):
        folder = tmp_path / f"{first}{second}"
        for name, text in ((first, "one"), (second, "two")):
            (folder / name).mkdir(parents=True)
            (folder / name / "0.png").write_text(text)
        digests.add(content_digest(folder))
    assert len(digests) == 3


def test_keys_change_with_the_software_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> tuple[str, str]:
        return step_key("digest", Calibrate()), values_key("kind", {"a": 1})

    before = keys()
    assert keys() == before
    monkeypatch.setattr(cache_keys, "software", lambda cls: {"onnxcompress": "another"})
    assert all(one != other for one, other in zip(keys(), before, strict=True))


def test_values_are_kept_by_their_kind_and_all_that_they_depend_on() -> None:
    keys = [
        values_key(kind, parts)
        for kind in ("shares", "scores")
        for parts in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1})
    ]
    assert len(set(keys)) == 8
    assert values_key("scores", {"b": 1, "a": 1}) == keys[-1]


def test_a_reference_counts_by_its_weights_in_other_files_too(models: Path, tmp_path: Path) -> None:
    """One byte of the external data is another reference: a kept result of the old one would be wrong."""
    file, weights = tmp_path / "reference.onnx", tmp_path / "reference.onnx.data"
    proto = onnx.load(models / "resnet20-fashion.onnx")
    onnx.save(proto, file, save_as_external_data=True, location=weights.name)
    pass_ = CorrectBias(reference=str(file))
    keys = [step_key("digest", pass_)]
    held = bytearray(weights.read_bytes())
    held[100] ^= 1
    weights.write_bytes(held)
    keys.append(step_key("digest", pass_))
    weights.unlink()
    with pytest.raises(ModelError, match=r"reference\.onnx\.data"):
        step_key("digest", pass_)
    assert keys[0] != keys[1]
