"""Record README's first command as a terminal shows it, for the page.

    python -m tests.benchmarks.recording [OUT.svg]

It runs in a folder with a link to models/; the picture has what it prints, stage by stage. Take it on an
idle machine: the times are in it.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from tests.helpers.paths import ROOT

PICTURE = ROOT / "onnxcompress" / "docs" / "first-command.svg"
WIDTH = 112
ELSEWHERE = re.compile(r"\s*@font-face \{.*?\}|\s*<!--.*?-->", re.S)
"""Rich's picture asks another host for its font, and names one in a comment."""


def first_command() -> str:
    """Find the command that README shows first.

    Returns:
        The call of onnxcompress, as it is typed.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    (line,) = re.findall(r"^    pip install .* && (onnxcompress .*)$", text, re.M)
    return str(line)


def printed(command: str) -> str:
    """Run a command beside models/.

    Args:
        command: The call of onnxcompress.

    Returns:
        What a terminal without colours shows of it.
    """
    words = [sys.executable, "-m", "onnxcompress.cli.main", *shlex.split(command)[1:]]
    terminal = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": str(WIDTH), "ONNXCOMPRESS_CACHE": "none"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(ROOT / "models")
        done = subprocess.run(
            words,
            cwd=folder,
            env=os.environ | terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
    return done.stdout


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path), default=PICTURE)
def main(out: Path) -> None:
    """Write the picture."""
    command = first_command()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(printed(command)))
    out.write_text(ELSEWHERE.sub("", console.export_svg(title="onnxcompress")), "utf-8")


if __name__ == "__main__":
    main()
