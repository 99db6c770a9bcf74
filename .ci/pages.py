"""Pages of the site that lie nowhere as files: the README, the commands, the Python API (a hook of MkDocs).

mkdocs-click is not used: it writes all options of a command as one list, without the sections of its help.
"""

import dataclasses
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from textwrap import dedent
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from onnxcompress.cli.main import COMMANDS, GROUPS, cli
from onnxcompress.cli.sections import sections
from onnxcompress.option_fields import is_required
from onnxcompress.passes import CATALOGUE, Entry, load_pass

TOP = Path(__file__).parents[1]
TOP_LEVEL = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Page -> file of the top level."""
API = (
    "onnxcompress.api",
    "onnxcompress.passes",
    "onnxcompress.pipeline",
    "onnxcompress.model",
    "onnxcompress.graph",
    "onnxcompress.data",
    "onnxcompress.statistics",
    "onnxcompress.runtime",
    "onnxcompress.evaluation",
    "onnxcompress.sensitivity",
    "onnxcompress.optimize.executor",
    "onnxcompress.torch_export",
    "onnxcompress.account",
    "onnxcompress.option_fields",
    "onnxcompress.progress",
    "onnxcompress.errors",
)
"""The Python API; each module of a package has a page."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def modules(name: str) -> list[str]:
    """List the modules of a package, without the packages in it; passes have pages of their own."""
    if name == "onnxcompress.passes":
        return [f"{name}.{module}" for module in ("base", "proto", "plugins")]
    inner = iter_modules(getattr(import_module(name), "__path__", []))
    return [f"{name}.{module.name}" for module in inner if not module.ispkg]


def on_config(config: MkDocsConfig) -> None:
    """List the commands and the modules in the navigation."""
    titles = {"Change a model": [entry.name for entry in CATALOGUE]}
    for word, title in GROUPS.items():
        titles[title] = [name for name, (group, _, _) in COMMANDS.items() if group == word]
    commands = [{title: [{n: f"commands/{n}.md"} for n in names]} for title, names in titles.items()]
    api = [{name: _pages(name)} for name in API]
    _place(config.nav, {"Commands": commands, "Python API": api})


def _pages(name: str) -> Any:
    """List the pages of a package for the navigation, or name that of a module."""
    inner = modules(name)
    own = f"api/{name}.md"
    rows = [{module.rpartition(".")[2]: f"api/{module}.md"} for module in inner]
    if name == "onnxcompress.passes":
        rows += [{entry.cls: f"api/{entry.cls}.md"} for entry in CATALOGUE]
    return [{"The package": own}, *rows] if inner else own


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
    pages |= {f"commands/{name}.md": _command(name) for name in (*COMMANDS, *(e.name for e in CATALOGUE))}
    for package in API:
        for name in (package, *modules(package)):
            pages[f"api/{name}.md"] = f"# `{name}`\n\n::: {name}\n"
    pages |= {f"api/{entry.cls}.md": _pass(entry) for entry in CATALOGUE}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep options in one piece: browsers break lines behind the dashes."""
    parts = re.split("(<[^>]+>)", html)
    parts[::2] = [OPTION.sub(r'<span class="option">\g<0></span>', text) for text in parts[::2]]
    return "".join(parts)


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


def _pass(entry: Entry) -> str:
    """Write the page of a pass's class: its fields, which are options, and what it measures."""
    cls = load_pass(entry.name)
    figures = cls.figures
    call = f"onnxcompress.{entry.name.replace('-', '_')}(model, …)"
    text = (
        f"{entry.summary} As a call `{call}`, as a pass `onnxcompress.passes.{entry.module}.{entry.cls}`, "
    )
    command = f"as a command [`onnxcompress {entry.name}`](../commands/{entry.name}.md)."
    parts = [f"# `{entry.cls}`", text + command, "## Options"]
    for field in dataclasses.fields(cls):
        default = "" if is_required(field) else f" = {field.default!r}"
        parts.append(
            f"`{field.name}: {field.type}{default}`\n:   {_escaped(field.metadata.get('help', ''))}"
        )
    parts.append(f"## What it measures\n\n::: {figures.__module__}.{figures.__qualname__}")
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
