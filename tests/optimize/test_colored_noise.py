"""Random inputs: their spectrum, what channels have in common, and the same bytes for a seed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from onnxcompress.errors import OptionError  # noqa: E402
from onnxcompress.optimize.synthesis.colored_noise import (  # noqa: E402
    WHITE,
    Noise,
    draw,
    draw_input,
    generator,
)
from onnxcompress.statistics.record import ChannelStatistics  # noqa: E402


def spectrum(noise: Noise) -> tuple[np.ndarray, float]:
    """Power by distance from frequency 0, and the share of the variance that is between samples."""
    statistics = ChannelStatistics(np.full(4, 5.0, np.float32), np.full(4, 2.0, np.float32))
    x = draw((200, 4, 32, 32), statistics, noise, generator(0, "t", 200)) - 5
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    f = torch.fft.fftfreq(32) * 32
    radius = (f[:, None] ** 2 + f**2).sqrt().round().int()
    rings = np.array([power[radius == r].mean().item() for r in range(1, 15)])
    return rings, float(x.mean((2, 3)).square().mean()) / 4


def test_spectrum_and_offset_are_what_was_asked_for() -> None:
    white, between = spectrum(WHITE)
    assert white.std() < 0.05 * white.mean()
    assert between == pytest.approx(1 / 32**2, rel=0.1)
    rings, between = spectrum(Noise(exponent=2, offset=0.3))
    slope = np.polyfit(np.log(np.arange(1, 15)), np.log(rings), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)
    assert between == pytest.approx(0.3, rel=0.1)


def test_channels_of_an_input_are_alike_as_asked_for() -> None:
    x = draw_input((500, 3, 12, 12), None, Noise(shared=0.8), generator(0, "x", 500))
    correlation = torch.corrcoef(x.transpose(0, 1).flatten(1))
    assert correlation[0, 1].item() == pytest.approx(0.8, abs=0.05)
    assert x.std((0, 2, 3), correction=0).numpy() == pytest.approx(np.ones(3), abs=1e-5)


def test_an_input_with_channels_last_is_drawn_as_one() -> None:
    x = draw_input(
        (300, 16, 12, 3), None, Noise(exponent=2, offset=0.3, shared=0.8), generator(0, "x", 300)
    )
    rows = x.reshape(-1, 3).T
    assert torch.corrcoef(rows)[0, 2].item() == pytest.approx(0.8, abs=0.05)
    assert rows.std(1, correction=0).numpy() == pytest.approx(np.ones(3), abs=1e-5)
    assert x.mean((1, 2)).square().mean().item() == pytest.approx(0.3, abs=0.05)


def test_values_depend_on_seed_name_and_count() -> None:
    def drawn(seed: int, name: str, count: int) -> Tensor:
        return draw_input((4, 3, 6, 6), None, Noise(), generator(seed, name, count))

    assert torch.equal(drawn(7, "x", 4), drawn(7, "x", 4))
    for other in ((8, "x", 4), (7, "z", 4), (7, "x", 5)):
        assert not torch.allclose(drawn(7, "x", 4), drawn(*other), atol=1e-2)


@pytest.mark.parametrize("wrong", [{"offset": 1.5}, {"shared": -1.0}, {"exponent": -1.0}])
def test_what_no_noise_can_have_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=f"noise: {next(iter(wrong))}"):
        Noise(**wrong)
