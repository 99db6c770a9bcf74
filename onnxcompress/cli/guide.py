"""`onnxcompress guide`: the guides of the package, at the terminal."""

from __future__ import annotations

from importlib.resources import files

import click

GUIDES = (
    "faster", "quantize", "ci", "terminal", "python", "json", "trust", "hostile", "search", "data-free",
    "methods", "figures",
)  # fmt: skip
"""In the order of the help."""


@click.command()
@click.argument("name", type=click.Choice(GUIDES))
def guide(name: str) -> None:
    """Show a guide.

    \b
    Example:
      onnxcompress guide faster
    """
    from rich.markdown import Markdown

    from onnxcompress.cli.console import stdout

    text = (files("onnxcompress") / "docs" / f"{name}.md").read_text("utf-8")
    console = stdout()
    console.print(Markdown(text)) if console.is_terminal else click.echo(text, nl=False)
