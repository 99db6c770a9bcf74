"""Format numbers for people: sizes in powers of 1000, counts with three digits, shares in percent."""

from __future__ import annotations


def size(count: float) -> str:
    """Format a size, such as 12.3 MB.

    Args:
        count: Bytes, at least 0.

    Returns:
        The size in the unit that fits, in powers of 1000.
    """
    return _scaled(count, (" B", " kB", " MB", " GB"))


def number(count: float) -> str:
    """Format a count, such as 1.23 M.

    Args:
        count: A count, at least 0.

    Returns:
        The count with a prefix k, M or G that stands for a power of 1000.
    """
    return _scaled(count, ("", " k", " M", " G"))


def counted(count: int, noun: str) -> str:
    """Format a number of things, such as 1 layer or 2 layers.

    Args:
        count: How many there are.
        noun: What one of them is called.

    Returns:
        The number and the noun, with an s where the number is not 1.
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _scaled(count: float, units: tuple[str, ...]) -> str:
    """Express a count with three digits, in the first unit that puts at most three before the point."""
    if count < 999.5:
        return f"{count:.0f}{units[0]}"
    for unit in units[1:]:
        count /= 1000
        if count < 999.5 or unit == units[-1]:
            break
    return f"{count:.0f}{unit}" if count >= 99.95 else f"{count:#.3g}{unit}"


def percent(share: float, digits: int = 2) -> str:
    """Format a share, such as 12.34 %.

    Args:
        share: A fraction; 1 is 100 %.
        digits: Digits behind the point.

    Returns:
        The share in percent.
    """
    return f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """Format a difference between two shares, such as −0.70 points.

    Args:
        share: A difference of fractions; 0.01 is one percentage point.

    Returns:
        The difference in percentage points, with its sign.
    """
    text = f"{100 * share:+.2f}"
    return f"{'±0.00' if float(text) == 0 else text.replace('-', '−')} points"


def decimal(value: float) -> str:
    """Format a number that may be below zero, such as −0.70.

    Args:
        value: The number.

    Returns:
        Two decimals.
    """
    text = f"{value:.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def milliseconds(value: float) -> str:
    """Format a duration, such as 0.200 ms, 12.3 ms or 1234 ms.

    Args:
        value: Milliseconds, at least 0.

    Returns:
        The duration with three digits, or in whole milliseconds from 1000 on.
    """
    return f"{value:.0f} ms" if value >= 1000 else f"{value:#.3g}".rstrip(".") + " ms"


def roughly(seconds: float) -> str:
    """Format a time that is not known well, such as 35 s or 20 min.

    Args:
        seconds: Seconds.

    Returns:
        The time in steps of 5 seconds, 5 at least, and from 5 minutes on in whole minutes.
    """
    return f"{round(seconds / 60)} min" if seconds >= 300 else f"{max(5, 5 * round(seconds / 5))} s"


def where(provider: str) -> str:
    """Name the device that an execution provider of onnxruntime computes on.

    Args:
        provider: Short name of the provider, such as `cuda`.

    Returns:
        A phrase such as "the GPU (CUDA)"; an unknown name as it is.
    """
    known = {"cpu": "the CPU", "cuda": "the GPU (CUDA)", "tensorrt": "the GPU (TensorRT)"}
    return known.get(provider, provider)
