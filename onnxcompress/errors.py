"""Every error a user can meet: one line that names the place, what was expected, what to try."""

from __future__ import annotations


def require(who: str, *packages: str) -> None:
    """Raise RuntimeUnavailable where a package is not installed; none of them is imported."""
    from importlib.util import find_spec

    for name in packages:
        if find_spec(name) is None:
            raise RuntimeUnavailable(f"{who} needs {name}, which is not installed here: pip install {name}")


class CompressError(Exception):
    """Base of all errors of this package; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class ModelError(CompressError):
    """The ONNX file, or a place in its graph, is not what the operation needs."""


class InputError(CompressError):
    """Images or other inputs that cannot be used with this model."""


class RuntimeUnavailable(CompressError):
    """A library, an execution provider or a device that was asked for is not there."""


class OptionError(CompressError):
    """An option's value is wrong (exit code 2, as for any wrong usage)."""

    exit_code = 2


class CompressWarning(UserWarning):
    """What a user should know and need not act on; the command line prints it as a note."""


class TargetMissed(CompressError):
    """The result was written, but it is not what the user's target asked for (exit code 3)."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """An exception's message without line ends and without onnxruntime's own prefix."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= 300 else text[:297] + "..."


def printable(text: str) -> str:
    """One line of bounded length without control characters: names in a file may command a terminal."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= 1000 else line[:997] + "..."
