"""Results on disk: the files of each trial in a folder, and all figures in one table.

folder/name.onnx (+ .data)      what came of a trial
folder/name.json                {}, then its key and its figures: with them, written last, the trial is done
table.csv | .jsonl | .parquet   a row for each trial, in the order of the plan
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from onnxcompress.errors import CompressError, OptionError, require
from onnxcompress.model.tensor_storage import write_files
from onnxcompress.search.trial import Result, Row, Trial

FORMATS = (".csv", ".jsonl", ".parquet")
FIGURES = (
    "status",
    "error",
    "missed",
    "notes",
    "output",
    "sha256",
    "bytes_before",
    "bytes",
    "noise",
    "inputs",
    "agreement",
    "top1_before",
    "top1",
    "latency_before_ms",
    "latency_ms",
    "ratio",
    "ratio_low",
    "ratio_high",
    "device",
    "clock",
    "seconds",
)
"""Columns of a table behind those that name the trial."""


class Results:
    """The results of trials in a folder."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is created where it does not exist.

        Args:
            folder: The folder.

        Raises:
            OptionError: It cannot be created.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"{folder}: cannot be made ({error.strerror})") from error

    def path(self, trial: Trial, suffix: str = ".onnx") -> Path:
        """Return the path of a file of a trial.

        Args:
            trial: The trial.
            suffix: Suffix of the file.

        Returns:
            The path.
        """
        return self.folder / (trial.name + suffix)

    def check_place(self, trial: Trial, inputs: Collection[Path]) -> None:
        """Refuse a place where something else than an earlier result lies.

        Args:
            trial: The trial.
            inputs: Files that are read, with links resolved.

        Raises:
            OptionError: One of its files is an input, or is there without the figures of a result.
        """
        own = self.path(trial, ".json").is_file()
        for suffix in (".onnx", ".onnx.data", ".md", ".json"):
            file = self.path(trial, suffix)
            if file.resolve() in inputs or (file.exists() and not own):
                raise OptionError(f"{file}: a result would replace it; name another folder for results")

    def find(self, trial: Trial) -> Row | None:
        """Look up the figures of a trial.

        Args:
            trial: The trial.

        Returns:
            The figures; None where it is not done, or its files are not those that were written.
        """
        try:
            saved = json.loads(self.path(trial, ".json").read_text("utf-8"))
            files = [self.path(trial, suffix).read_bytes() for suffix in saved["suffixes"]]
            row: Row = saved["row"]
            whole = hashlib.sha256(b"".join(files)).hexdigest() == row["sha256"]
            return row if whole and saved["key"] == trial.key else None
        except (OSError, ValueError, KeyError, TypeError, CompressError):  # or the model is broken now
            return None

    def store(self, trial: Trial, result: Result, key: str) -> None:
        """Store the result of a trial, completely or not at all.

        Args:
            trial: The trial.
            result: The result.
            key: The trial's key before the work began: files that it names may have changed since.

        Raises:
            ModelError: A file cannot be written.
        """
        suffixes = sorted(result.files)
        if not self.path(trial, ".json").exists():  # what a killed process leaves is a result's
            write_bytes(self.path(trial, ".json"), b"{}")
        write_files([(self.path(trial, suffix), _filler(result.files[suffix])) for suffix in suffixes])
        saved = {"key": key, "suffixes": suffixes, "row": result.row}
        write_bytes(self.path(trial, ".json"), json.dumps(saved, indent=2).encode())

    def add(self, trial: Trial, figures: Row) -> Row:
        """Add figures to those of a trial that is done.

        Args:
            trial: The trial.
            figures: More figures.

        Returns:
            All figures of the trial.
        """
        saved = json.loads(self.path(trial, ".json").read_text("utf-8"))
        saved["row"] |= figures
        write_bytes(self.path(trial, ".json"), json.dumps(saved, indent=2).encode())
        row: Row = saved["row"]
        return row


def check_table(path: Path) -> None:
    """Check that a table can be written.

    Args:
        path: The file.

    Raises:
        OptionError: Its suffix stands for no format, or its folder does not exist.
        RuntimeUnavailable: The package that writes the format is not installed.
    """
    if path.suffix not in FORMATS:
        raise OptionError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        require(f"{path}: a Parquet table", "pyarrow")
    if not path.parent.is_dir():
        raise OptionError(f"{path}: the folder {path.parent} does not exist")


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a table, completely or not at all.

    Args:
        path: The file; its suffix says the format.
        columns: The columns in order; what a row lacks is empty.
        rows: The rows.

    Raises:
        ModelError: The file cannot be written.
    """
    whole = [{name: row.get(name) for name in columns} for row in rows]
    writers: dict[str, Callable[[Sequence[str], list[Row]], bytes]] = {
        ".csv": _csv,
        ".jsonl": lambda _, rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
        ".parquet": _parquet,
    }
    write_bytes(path, writers[path.suffix](columns, whole))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, completely or not at all.

    Args:
        path: The file.
        data: Its content.

    Raises:
        ModelError: It cannot be written.
    """
    write_files([(path, _filler(data))])


def _csv(columns: Sequence[str], rows: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def _parquet(columns: Sequence[str], rows: list[Row]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({name: [row[name] for row in rows] for name in columns})
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue())


def _filler(data: bytes) -> Callable[[BinaryIO], Any]:
    return lambda file: file.write(data)
