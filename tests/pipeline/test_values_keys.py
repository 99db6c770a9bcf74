"""What values on the way depend on: another model, other images or options never get kept ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.model import Model
from onnxcompress.optimize.intermediate_results import Values, keeping
from onnxcompress.optimize.synthesis.distillation import distill
from onnxcompress.statistics.record import ChannelStatistics
from tests.helpers.folding import graph, norm, weight
from tests.optimize.test_block_drop import FAST, network


class Store:
    """Values by their kind and by all that they depend on."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Values] = {}
        self.hits: list[str] = []

    def find_values(self, kind: str, parts: Mapping[str, Any]) -> Values | None:
        """Look up values, and note that there were some."""
        found = self.values.get((kind, json.dumps(parts, sort_keys=True)))
        self.hits += [kind] * (found is not None)
        return found

    def store_values(self, kind: str, parts: Mapping[str, Any], values: Values) -> None:
        """Keep values."""
        self.values[kind, json.dumps(parts, sort_keys=True)] = values

    def count(self, kind: str) -> int:
        """How many values of a kind there are."""
        return sum(key == kind for key, _ in self.values)


def normed(seed: int = 0) -> Model:
    body = "c = Conv<pads=[1,1,1,1]>(x, w) y = BatchNormalization(c, g, b, m, v)"
    arrays = {"w": weight(4, 3, 3, 3, seed=seed), **norm(4)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays))


def pictures(seed: int = 0) -> ImageSet:
    x = np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    return ImageSet(x, None, tuple("abcd"), Preprocess())


def test_distilled_images_are_of_their_model_images_statistics_and_options() -> None:
    store, known = Store(), ChannelStatistics(np.zeros(4, np.float32), np.ones(4, np.float32))
    variants: list[tuple[Model, ImageSet, dict[str, Any]]] = [
        (normed(), pictures(), {}),
        (normed(1), pictures(), {}),
        (normed(), pictures(1), {}),
        (normed(), replace(pictures(), preprocess=Preprocess(std=(0.5,))), {}),
        (normed(), pictures(), {"seed": 1}),
        (normed(), pictures(), {"steps": 2}),
        (normed(), pictures(), {"statistics": {"y": known}}),
        (normed(), pictures(), {"statistics": {"y": replace(known, std=2 * known.std)}}),
    ]
    found = []
    with keeping(store):
        for model, start, options in variants:
            found.append(distill(model, start, **({"steps": 1} | options)).x)
        assert store.hits == []
        again = distill(*variants[4][:2], steps=1, seed=1)
    assert store.count("distilled images") == len(variants)
    assert store.hits == ["distilled images"]
    assert np.array_equal(again.x, found[4])


@pytest.mark.slow
def test_scores_of_blocks_are_of_their_images_and_how_they_run(
    fixed_clock: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recoverabilities do not depend on how latency is measured, nor shares on the images."""
    fixed_clock([10, 6, 9.5, 8])
    one, store = replace(FAST, blocks=1, steps=0, synthetic=8), Store()
    kinds = ("recoverability", "latency shares")

    def kept(options: dict[str, Any]) -> tuple[int, ...]:
        before = [store.count(kind) for kind in kinds]
        with keeping(store):
            replace(one, **options).apply(network())
        return tuple(store.count(kind) - old for kind, old in zip(kinds, before, strict=True))

    assert kept({}) == (3, 1)
    assert kept({}) == (0, 0)
    assert kept({"seed": 1}) == (3, 0)
    assert kept({"preprocess": "raw"}) == (3, 1)
    assert kept({"latency_batch": 2}) == (0, 1)
    assert kept({"feature": "l"}) == (3, 1)
