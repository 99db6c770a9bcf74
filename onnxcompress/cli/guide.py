"""`onnxcompress guide`: the guides of the package, at the terminal."""

from __future__ import annotations

import re
from importlib.resources import files

import click

GUIDES = (
    "faster", "latency", "slow-int8", "detector", "data-free", "troubleshooting", "quantize", "search",
    "ci", "terminal", "python", "own-pass", "json", "methods", "figures", "trust", "hostile",
)  # fmt: skip
"""In the order of the help; mkdocs.yml makes a site of the same pages."""


@click.command()
@click.argument("name", type=click.Choice(GUIDES), required=False)
def guide(name: str | None) -> None:
    """Show a guide; without a name, list them.

    \b
    Example:
      onnxcompress guide
      onnxcompress guide faster
    """
    from rich.markdown import Markdown

    from onnxcompress.cli.console import stdout

    if name is None:
        width = max(map(len, GUIDES))
        click.echo("\n".join(f"{guide:{width}}  {_title(_page(guide))}" for guide in GUIDES))
        return
    text = for_terminal(_page(name))
    console = stdout()
    console.print(Markdown(text)) if console.is_terminal else click.echo(text, nl=False)


def _page(name: str) -> str:
    return (files("onnxcompress") / "docs" / f"{name}.md").read_text("utf-8")


def _title(page: str) -> str:
    return page.splitlines()[0].removeprefix("# ")


def for_terminal(page: str) -> str:
    """Replace what a terminal cannot show: pictures by their texts, links by commands.

    Args:
        page: Markdown of a guide.

    Returns:
        Markdown.
    """
    page = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"Figure: \1", page)
    page = re.sub(r"\[([^\]]*)\]\(([\w-]+)\.md[^)]*\)", r"\1 (`onnxcompress guide \2`)", page)
    return re.sub(r"\[([^\]]*)\]\(commands/([\w-]+)\.md[^)]*\)", r"\1 (`onnxcompress \2 --help`)", page)
