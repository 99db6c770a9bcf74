"""Pages of the site that lie nowhere as files: the README, the commands, the Python API (a hook of MkDocs).

mkdocs-click is not used: it knows no sections of options, nor when a lazily imported command has them.
"""

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from onnxcompress.cli.main import COMMANDS, GROUPS, cli
from onnxcompress.cli.options import sections
from onnxcompress.passes import CATALOGUE

TOP = Path(__file__).parents[1]
TOP_LEVEL = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Page -> file of the top level."""
API = (
    "onnxcompress.model",
    "onnxcompress.graph",
    "onnxcompress.data",
    "onnxcompress.statistics",
    "onnxcompress.runtime",
    "onnxcompress.evaluation",
    "onnxcompress.sensitivity",
    "onnxcompress.passes",
    "onnxcompress.passes.base",
    "onnxcompress.passes.proto",
    "onnxcompress.account",
    "onnxcompress.option_fields",
    "onnxcompress.progress",
    "onnxcompress.pipeline",
    "onnxcompress.errors",
)
"""Modules of the Python API."""


def on_config(config: MkDocsConfig) -> None:
    """List the commands and the modules in the navigation."""
    titles = {"Change a model": [entry.name for entry in CATALOGUE]}
    for word, title in GROUPS.items():
        titles[title] = [name for name, (group, _, _) in COMMANDS.items() if group == word]
    commands = [{title: [{n: f"commands/{n}.md"} for n in names]} for title, names in titles.items()]
    modules = [{name: f"api/{name}.md"} for name in API]
    _place(config.nav, {"Commands": commands, "Python API": modules})


def _place(nav: Any, lists: dict[str, Any]) -> None:
    """Fill the empty entries of the navigation."""
    for entry in nav:
        for title, value in entry.items():
            if value == []:
                entry[title] = lists[title]
            elif isinstance(value, list):
                _place(value, lists)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages."""
    pages = {page: _top_level(file) for page, file in TOP_LEVEL.items()}
    pages |= {f"commands/{name}.md": _command(name) for name in cli.list_commands(click.Context(cli))}
    pages |= {f"api/{name}.md": f"# `{name}`\n\n::: {name}\n" for name in API}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))


def _top_level(name: str) -> str:
    """Read a file of the top level; its links are made those of the site."""
    text = (TOP / name).read_text("utf-8").replace("onnxcompress/docs/", "")
    for page, file in TOP_LEVEL.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text


def _command(name: str) -> str:
    """Write the page of a command from its help: usage, text, and a list of options for each section."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = click.Context(command, info_name=f"onnxcompress {name}")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"# onnxcompress {name}", f"```text\n{usage}\n```", *_paragraphs(command.help or "")]
    for title, records in sections(command, context).items():
        parts.append(f"## {title}")
        parts += [f"`{names}`\n:   {_escaped(text)}" for names, text in records]
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> list[str]:
    """Turn click's help text into Markdown; what it does not wrap becomes a block of code."""
    parts = []
    for paragraph in dedent(text).strip().split("\n\n"):
        unwrapped, _, body = paragraph.rpartition("\b\n")
        lines = (body if unwrapped or paragraph.startswith("\b") else paragraph).splitlines()
        split = next((i for i, line in enumerate(lines) if line.startswith(" ")), len(lines))
        parts.append(_escaped("\n".join(lines[:split])))
        if lines[split:]:
            parts.append("```text\n" + dedent("\n".join(lines[split:])) + "\n```")
    return parts


def _escaped(text: str) -> str:
    """Escape what Markdown would take for its own, but for `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
