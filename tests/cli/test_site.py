"""The site: built without a warning, no link is dead, every guide, command and module is there."""

from __future__ import annotations

import inspect
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from onnxcompress.cli.guide import GUIDES
from tests.cli.test_docs import NAMES
from tests.helpers.paths import ROOT


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_it_has_all_pages_and_no_dead_link(site: Path) -> None:
    pages = {page.relative_to(site).as_posix(): Links(page) for page in site.rglob("*.html")}
    assert {f"{name}.html" for name in GUIDES} | {f"commands/{name}.html" for name in NAMES} <= pages.keys()
    assert {f"api/{name}.html" for name in api()} <= pages.keys()
    dead = []
    for page, found in pages.items():
        for link in found.links if page != "404.html" else []:  # its links begin at the server's root
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (site / page).parent / unquote(parts.path) if parts.path else site / page
            other = pages.get(target.resolve().relative_to(site.resolve()).as_posix())
            if not target.is_file() or (parts.fragment and other and parts.fragment not in other.anchors):
                dead.append(f"{page}: {link}")
    assert not [link for link in dead if not link.endswith(("#", "#__skip"))]


@pytest.mark.slow
def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    """A page works without a network, and tells nobody who reads it."""
    assert not [p.name for p in site.rglob("*.html") if 'src="http' in p.read_text("utf-8")]


def api() -> tuple[str, ...]:
    """The modules that the Python API consists of."""
    spec = spec_from_file_location("pages", ROOT / ".ci" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    names: tuple[str, ...] = module.API
    return names


def test_all_that_is_public_in_the_python_api_has_a_docstring() -> None:
    bare = []
    for name in api():
        module: Any = import_module(name)
        bare += [] if module.__doc__ else [name]
        for key, value in vars(module).items():
            own = inspect.isclass(value) or inspect.isfunction(value)
            if own and not key.startswith("_") and value.__module__ == name and not value.__doc__:
                bare.append(f"{name}.{key}")
    assert not bare


def test_the_wheel_has_the_guides_and_their_figures() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", "utf-8")
    patterns = settings["options.package_data"]["onnxcompress"].split(", ")
    package = ROOT / "onnxcompress"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path.name for path in {*(package / "docs").iterdir()} - packed} == {"site.css"}
