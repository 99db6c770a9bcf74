"""Errors and warnings for users: one line with the place, what was expected, and what to try."""

from __future__ import annotations

import re


def require(who: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        who: What needs them, as it begins the message.
        *packages: Import names, the same as on the package index.

    Raises:
        RuntimeUnavailable: A package is not installed.
    """
    from importlib.util import find_spec

    for name in packages:
        if find_spec(name) is None:
            raise RuntimeUnavailable(f"{who} needs {name}, which is not installed here: pip install {name}")


class CompressError(Exception):
    """Base of all errors of this package; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class ModelError(CompressError):
    """The ONNX file or its graph is broken, or lacks what the operation needs."""


class InputError(CompressError):
    """Images or other inputs cannot be used with this model."""


class RuntimeUnavailable(CompressError):
    """A requested library, execution provider or device is not available."""


class OptionError(CompressError):
    """An option's value is wrong (exit code 2, as for any wrong usage)."""

    exit_code = 2


class CompressWarning(UserWarning):
    """Something that a user should know but need not act on; the command line prints it as a note."""


class ResultRefused(CompressError):
    """A pass made a model whose outputs are too far from what they were; nothing was written."""


class TargetMissed(CompressError):
    """The result was written, but it misses the target that the user set (exit code 3)."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """Shorten an exception's message to one line, without onnxruntime's prefix and the path of a copy.

    Args:
        error: Any exception.

    Returns:
        At most 300 characters without line breaks.
    """
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = re.sub(r"^Load model from .* failed:", "", text.split(" : ", 3)[-1])
    return text if len(text) <= 300 else text[:297] + "..."


def printable(text: str) -> str:
    """Make a text safe to print: names in a file may contain control sequences for the terminal.

    Args:
        text: Any text.

    Returns:
        One line of at most 1000 characters, unprintable ones replaced.
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= 1000 else line[:997] + "..."
