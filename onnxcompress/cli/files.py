"""Read and write models on the standard streams, `-` for IN or OUT, so that a shell can chain commands.

A stream is spooled to a temporary file, because reading weights needs random access and the next command
must get a complete model. With OUT `-` only the model goes to standard output, messages to standard error.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from onnxcompress.errors import CompressError, ModelError, OptionError

STREAM = "-"
PIECE = 1 << 20
"""Number of bytes copied at a time."""


@dataclass(frozen=True)
class Files:
    """A command's input and output as files, also where they are streams."""

    source: Path
    target: Path
    source_name: str
    """The name that the user knows, for messages."""
    target_name: str
    """The same of `target`."""
    to_stream: bool = False

    def shown(self, text: str) -> str:
        """Replace temporary file names in a message by the names that the user gave.

        Args:
            text: The message.

        Returns:
            The message with the user's names.
        """
        for file, name in ((self.source, self.source_name), (self.target, self.target_name)):
            if str(file) != name:
                text = text.replace(str(file), name).replace(file.name, name)
        return text

    def send(self) -> None:
        """Copy the output to standard output, if that is where it goes.

        Raises:
            ModelError: The model is too large for a stream.
        """
        if not self.to_stream:
            return
        if self.target.with_name(self.target.name + ".data").exists():
            raise ModelError("standard output: a stream cannot carry 2 GB and more; name a file for OUT")
        out = sys.stdout.buffer
        with self.target.open("rb") as file:
            shutil.copyfileobj(file, out, PIECE)
        out.flush()


def discard_output() -> None:
    """Let what is still to go to standard output go nowhere: at its end, Python would try to write it."""
    with suppress(OSError, ValueError):  # no file, in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Go on where the reader of standard output closes it: what else a command has to do is done.

    Yields:
        Nothing.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # the latter is rich's answer to it
        discard_output()


@contextmanager
def opened(source: str, target: str, *, as_json: bool = False) -> Iterator[Files]:
    """Provide the files of a command, temporary ones for `-`.

    Args:
        source: IN, as the user gave it.
        target: OUT, as the user gave it.
        as_json: Whether --json is given.

    Yields:
        The files.

    Raises:
        OptionError: A stream is closed or a terminal, or --json and the model would go to the same stream.
        ModelError: The stream has no model, or a model without its weights.
    """
    if target == STREAM and as_json:
        raise OptionError("OUT - and --json: both go to standard output; name a file for OUT")
    if (target == STREAM and sys.stdout is None) or (source == STREAM and sys.stdin is None):
        raise OptionError("-: the standard stream is closed; name a file")
    if target == STREAM and sys.stdout.isatty():
        raise OptionError("OUT -: standard output is a terminal; pipe it into a command, or name a file")
    if source == STREAM and sys.stdin.isatty():
        raise OptionError("IN -: standard input is a terminal; pipe a model into it, or name a file")
    files = Files(Path(source), Path(target), source, target)
    if STREAM not in (source, target):
        yield files
        return
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        if source == STREAM:
            files = replace(files, source=_spool(Path(folder)), source_name="standard input")
        if target == STREAM:
            file = Path(folder) / "stdout.onnx"
            files = replace(files, target=file, target_name="standard output", to_stream=True)
        try:
            yield files
        except CompressError as error:
            raise type(error)(files.shown(str(error))) from error


def _spool(folder: Path) -> Path:
    file = folder / "stdin.onnx"
    with file.open("wb") as out:
        shutil.copyfileobj(sys.stdin.buffer, out, PIECE)
    if file.stat().st_size == 0:
        raise ModelError("standard input is empty; did the command before it fail?")
    if _lacks_weights(file):
        raise ModelError(
            "standard input: the weights are in external data, which a stream cannot carry; name the file"
        )
    return file


def _lacks_weights(file: Path) -> bool:
    """Return whether the file is a model with external data; False for files that `load` refuses."""
    import onnx
    from google.protobuf.message import DecodeError

    from onnxcompress.model import protobuf_stream
    from onnxcompress.model.envelope import nested_tensors

    try:
        graph = onnx.ModelProto.FromString(protobuf_stream.split(file)[0]).graph
    except (DecodeError, ModelError):
        return False
    external = onnx.TensorProto.EXTERNAL
    return any(t.data_location == external for t in [*graph.initializer, *nested_tensors(graph)])
