"""Numbers for a person: sizes in powers of 1000, counts in three digits, shares in percent."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for a person: 12.3 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """A count for a person: 1.23 M."""
    for unit in ("", " k", " M", " G"):
        if count < 1000 or unit == " G":
            return f"{count:.0f}" if unit == "" else f"{count:.2f}{unit}"
        count /= 1000
    raise AssertionError


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
