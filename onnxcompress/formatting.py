"""Numbers for a person: sizes in powers of 1000, counts in three digits, shares in percent."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for a person: 12.3 MB (powers of 1000)."""
    return _scaled(count, (" B", " kB", " MB", " GB"))


def number(count: float) -> str:
    """A count for a person: 1.23 M."""
    return _scaled(count, ("", " k", " M", " G"))


def _scaled(count: float, units: tuple[str, ...]) -> str:
    """In the first unit that leaves fewer than four digits before the point; three digits in all."""
    if count < 999.5:
        return f"{count:.0f}{units[0]}"
    for unit in units[1:]:
        count /= 1000
        if count < 999.5 or unit == units[-1]:
            break
    return f"{count:.0f}{unit}" if count >= 99.95 else f"{count:#.3g}{unit}"


def percent(share: float, digits: int = 2) -> str:
    """A share for a person: 12.34 %."""
    return f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """A difference of shares for a person: −0.70 points."""
    text = f"{100 * share:+.2f}"
    return f"{'±0.00' if float(text) == 0 else text.replace('-', '−')} points"


def milliseconds(value: float) -> str:
    """A time for a person: 0.200 ms, 12.3 ms, 1234 ms."""
    return f"{value:.0f} ms" if value >= 1000 else f"{value:#.3g}".rstrip(".") + " ms"


def where(provider: str) -> str:
    """Where onnxruntime computes, for a person: the GPU (CUDA)."""
    known = {"cpu": "the CPU", "cuda": "the GPU (CUDA)", "tensorrt": "the GPU (TensorRT)"}
    return known.get(provider, provider)
