"""Grids of quantized numbers, against the formula with figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.quantization.affine_grid import Grid, activation_grid, limits, weight_limits


@pytest.mark.parametrize(
    ("storage", "ends"),
    [
        ("int4", (-8, 7)),
        ("uint4", (0, 15)),
        ("int8", (-128, 127)),
        ("uint8", (0, 255)),
        ("uint16", (0, 65535)),
    ],
)
def test_the_integers_of_a_type(storage: str, ends: tuple[int, int]) -> None:
    assert limits(storage) == ends


@pytest.mark.parametrize(("bits", "ends"), [(8, (-127, 127)), (7, (-64, 63)), (4, (-8, 7)), (2, (-2, 1))])
def test_weights_use_all_integers_but_of_8_bits_as_many_on_both_sides(
    bits: int, ends: tuple[int, int]
) -> None:
    assert weight_limits(bits) == ends


@pytest.mark.parametrize(
    ("ends", "bits", "storage", "scale", "zero", "integers"),
    [
        ((-1.0, 3.0), 8, "uint8", 4 / 255, 64, (0, 255)),
        ((-1.0, 1.562), 8, "uint8", 2.562 / 255, 100, (0, 255)),  # 99.53 is nearer to 100
        ((0.5, 3.0), 8, "uint8", 3 / 255, 0, (0, 255)),  # zero is inside
        ((-3.0, -0.5), 8, "uint8", 3 / 255, 255, (0, 255)),
        ((-1.0, 3.0), 8, "int8", 4 / 255, -64, (-128, 127)),
        ((-1.0, 3.0), 6, "uint8", 4 / 63, 16, (0, 63)),
        ((-1.0, 3.0), 16, "uint16", 4 / 65535, 16384, (0, 65535)),
    ],
)
def test_a_grid_covers_its_range_and_zero(
    ends: tuple[float, float], bits: int, storage: str, scale: float, zero: int, integers: tuple[int, int]
) -> None:
    grid = activation_grid(*ends, bits, storage=storage)
    assert float(grid.scale) == pytest.approx(scale, rel=1e-6)
    assert (grid.zero_point, (grid.low, grid.high), grid.storage) == (zero, integers, storage)
    assert (grid.bits, grid.narrow) == (bits, bits == 6)
    low, high = min(ends[0], 0), max(ends[1], 0)
    assert grid.bounds == pytest.approx((low, high), abs=scale / 2 + 1e-6)
    assert grid.bounds[1] - grid.bounds[0] == pytest.approx(high - low, rel=1e-6)


@pytest.mark.parametrize(
    ("ends", "bits", "storage", "scale", "zero", "integers"),
    [
        ((-1.0, 3.0), 8, "int8", 3 / 127, 0, (-128, 127)),
        ((-3.0, 1.0), 8, "int8", 3 / 127, 0, (-128, 127)),
        ((-1.0, 3.0), 8, "uint8", 3 / 127, 128, (0, 255)),
        ((-1.0, 3.0), 6, "int8", 3 / 31, 0, (-31, 31)),
    ],
)
def test_a_symmetric_grid_has_as_many_steps_on_both_sides(
    ends: tuple[float, float], bits: int, storage: str, scale: float, zero: int, integers: tuple[int, int]
) -> None:
    grid = activation_grid(*ends, bits, storage=storage, symmetric=True)
    assert float(grid.scale) == pytest.approx(scale, rel=1e-6)
    assert (grid.zero_point, (grid.low, grid.high)) == (zero, integers)


def test_no_grid_ends_beyond_its_range() -> None:
    """In single precision, as a runtime computes it: only then is a Clip to that range needless."""
    highs = np.random.default_rng(0).uniform(0.1, 10, 300).astype(np.float32)
    grids = [activation_grid(0.0, float(high), 8) for high in highs]
    assert all(np.float32(255) * grid.scale <= high for grid, high in zip(grids, highs, strict=True))
    assert all(
        float(g.scale) == pytest.approx(float(h) / 255, rel=1e-6) for g, h in zip(grids, highs, strict=True)
    )


def test_a_tensor_of_zeros_has_a_scale() -> None:
    grid = activation_grid(0.0, 0.0, 8)
    assert float(grid.scale) == pytest.approx(1e-8)
    assert grid.zero_point == 0


def test_bits_are_those_that_the_integers_need() -> None:
    scale = np.asarray(1.0, np.float32)
    needed = {Grid(scale, 0, 0, high, "uint8").bits: high for high in (1, 3, 15, 16, 255)}
    assert needed == {1: 1, 2: 3, 4: 15, 5: 16, 8: 255}
