"""What `quantize` makes of its options and inputs before layers are fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.quantize import Settings
from onnxcompress.optimize.reconstruction.range_equalization import stretch
from onnxcompress.passes.base import run
from onnxcompress.passes.quantize import Quantize, engine
from onnxcompress.statistics.record import ChannelStatistics, write_record
from tests.helpers.folding import graph, weight


class Caught(Exception):
    """Ends the pass where layers would be fitted."""


def network() -> Model:
    arrays = {"w": weight(8, 3, 3, 3), "b": weight(8, seed=5), "v": weight(6, 8, 1, 1, seed=2)}
    arrays["c"] = weight(6, seed=6)
    body = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v, c)"
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,6,8,8] y)", body, arrays))
    write_record(model, {"a": ChannelStatistics(np.zeros(8, np.float32), np.ones(8, np.float32))})
    model.touch()
    return model


def settings(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Settings, list[float]]:
    """What layers would be fitted with, and the powers with which ranges were equalized before."""
    seen: dict[str, Settings] = {}
    powers: list[float] = []

    def fitted(model: Any, plan: Any, settings: Settings, *given: Any, **named: Any) -> Any:
        seen["settings"] = settings
        raise Caught

    def stretched(
        model: Any, plan: Any, x: Any, alignment: Any, batch: int, power: float, few_bits: int | None
    ) -> int:
        powers.append(power)
        assert few_bits == (4 if options.get("activation_bits") == 4 else None)
        return stretch(model, plan, x, alignment, batch, power, few_bits=few_bits)

    monkeypatch.setattr(engine, "Quantizer", fitted)
    monkeypatch.setattr(engine, "stretch", stretched)
    with pytest.raises(Caught):
        run([Quantize(synthetic=4, **options)], network())
    return seen["settings"], powers


@pytest.fixture
def real(tmp_path: Path) -> str:
    file = tmp_path / "real.npz"
    np.savez(file, x=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8))
    return str(file)


@pytest.mark.parametrize(
    ("options", "repair", "generic", "power"),
    [
        ({"images": "real"}, True, False, 1.0),
        ({"inputs": "procedural"}, False, True, 0.5),
        ({"inputs": "layerwise"}, False, False, 0.5),
        ({"inputs": "procedural", "weight_bits": 4}, True, False, 1.0),
        ({"inputs": "procedural", "activation_bits": 6}, True, False, 1.0),
        ({"images": "real", "activation_bits": 4}, True, False, 1.0),
        ({"images": "real", "per_channel": False}, True, False, 0.5),
    ],
)
def test_inputs_that_are_made_are_not_trusted_as_real_ones_are(
    options: dict[str, Any],
    repair: bool,
    generic: bool,
    power: float,
    real: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 8 bits they repair nothing, ranges are equalized by half; procedural ones get headroom."""
    if "images" in options:
        options = options | {"images": real}
    found, powers = settings(monkeypatch, **options)
    assert (found.repair, found.generic_inputs, powers) == (repair, generic, [power])


def test_options_reach_the_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {"inputs": "procedural"}
    plain, _ = settings(monkeypatch, **made)
    assert (plain.seed, plain.minmax, plain.reconstruct, plain.per_channel) == (0, False, True, True)
    assert (plain.storage, plain.symmetric, plain.small_types) == ("uint8", False, False)
    assert (plain.places, plain.ratios, plain.sweeps) == (256, 30, 3)
    changed, powers = settings(
        monkeypatch, **made, seed=5, ranges="minmax", reconstruct=False, activation_type="int8",
        symmetric=True, stretch=False, effort="balanced", overflow_safe=not plain.saturation_safe,
    )  # fmt: skip
    assert (changed.seed, changed.minmax, changed.reconstruct, powers) == (5, True, False, [])
    assert (changed.storage, changed.symmetric) == ("int8", True)
    assert (changed.places, changed.ratios, changed.sweeps) == (128, 20, 1)
    assert changed.saturation_safe != plain.saturation_safe
