"""Each command line and Python block of README.md and the guides runs, in order, in a folder with models/.

What is shortened: the .npz files have their first IMAGES images, latency is taken from a few rounds, few
inputs are made for deep layers, adapters are hardly trained, and what is in SHORT is appended to commands
that have the option. A GPU's provider becomes the CPU's, and loses its options.
Templates are lines with a word in capitals, which stands for a file: of them only the command is looked up.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from importlinter.api import read_configuration

from onnxcompress.cli.guide import GUIDES
from onnxcompress.cli.main import COMMANDS, cli, main
from onnxcompress.passes import CATALOGUE
from tests.benchmarks.recording import PICTURE, first_command
from tests.benchmarks.report_plots import PLOTS, page_colours
from tests.helpers.brief import COMMAND
from tests.helpers.detector import detector
from tests.helpers.paths import ROOT
from tests.structure import sources

DOCS = ROOT / "onnxcompress" / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / f"{name}.md" for name in GUIDES)]
NAMES = [*COMMANDS, *(entry.name for entry in CATALOGUE)]
IMAGES = 32
SHORT = {"--steps": "2", "--count": "16", "--synthetic": "8", "--seconds": "1", "--effort": "fast"}
LIMITS = ("--latency-reduction", "--min-", "--max-")
"""What a shortened run may miss: exit code 3."""
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}(\.\w+)?\b")


def lines(page: Path) -> list[str]:
    """Indented lines that call onnxcompress, joined where they go on; fenced ones have their own tests."""
    text, found, fence = page.read_text("utf-8").replace("\\\n", " "), [], ""
    for line in text.splitlines():
        if line.startswith("```"):
            fence = "" if fence else line.strip("`") or "text"
        elif line.startswith("    ") and not fence and re.search(r"(^|[|&] )onnxcompress ", line.strip()):
            found.append(line.strip())
    return found


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def shortened(call: str) -> list[str]:
    """The arguments of one call of onnxcompress, made short."""
    words = shlex.split(call, comments=True)[1:]
    words = ["cpu" if word in ("cuda", "tensorrt") else word for word in words]
    if "--provider-options" in words:  # of a GPU
        at = words.index("--provider-options")
        del words[at : at + 2]
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, call
    known = {name for parameter in command.params for name in parameter.opts}
    words += [word for name, value in SHORT.items() if name in known for word in (name, value)]
    if "--count" in known and "--images" in known and "--images" not in words:
        at = len(words) - 1 - words[::-1].index("--count")
        del words[at : at + 2]  # of images that are not there
    return words + (["-D", "steps=2"] if words[0] == "run" else [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/ with links to the shipped files, and the start of each set of images; a detector."""
    made = tmp_path_factory.mktemp("docs")
    onnx.save(detector(), made / "yolov8n.onnx")
    (made / "models").mkdir()
    for file in (ROOT / "models").iterdir():
        if file.suffix == ".npz":
            arrays = np.load(file)
            np.savez(made / "models" / file.name, **{key: arrays[key][:IMAGES] for key in arrays.files})
        elif file.is_file():
            (made / "models" / file.name).symlink_to(file)
    return made


@pytest.fixture(autouse=True)
def here(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick_clock: None,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ONNXCOMPRESS_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


def run_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [part.strip() for part in line.split(" && ")]
    for call in calls:
        if not call.startswith("onnxcompress "):
            assert call.startswith("pip install "), f"what is this? {call}"
            continue
        call, _, target = call.partition(" > ")
        if " | " in call:
            parts = [shlex.join(["onnxcompress", *shortened(part)]) for part in call.split(" | ")]
            subprocess.run(["bash", "-o", "pipefail", "-c", " | ".join(parts)], check=True)
            continue
        words = shortened(call)
        code = main(words)
        said = capsys.readouterr()
        allowed = (0, 3) if any(word.startswith(LIMITS) for word in words) else (0,)
        assert code in allowed, f"{call}\n{said.err}"
        if target:
            Path(target).write_text(said.out)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_line_and_python_block(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    todo = [line for line in lines(page) if "--help" not in line]
    for line in todo:
        if PLACEHOLDER.search(line):
            assert line.split()[1] in NAMES, line
        else:
            run_line(line, capsys)
    scope: dict[str, object] = {}
    for text in blocks(page, "python"):
        run_python(text, scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_sentences_have_their_options(page: Path) -> None:
    for call in re.findall(r"`onnxcompress ([^`]+)`", page.read_text("utf-8")):
        words = call.split()
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None or words[0] in ("--help", "COMMAND"), call
        known = [name for parameter in getattr(command, "params", ()) for name in parameter.opts]
        assert {w for w in words[1:] if w.startswith("--")} <= {*known, "--help"}, call


def run_python(text: str, scope: dict[str, object]) -> None:
    """Passes get the numbers of SHORT; `torch_model` and `example` are the reader's."""
    import torch

    short = {name.strip("-"): value for name, value in SHORT.items() if value.isdigit()}
    text = re.sub(rf"\b({'|'.join(short)})=\d+,? ?", "", text)
    for entry in CATALOGUE:
        cls = getattr(import_module(f"onnxcompress.passes.{entry.module}"), entry.cls)
        names = [name for name in short if name in cls.__dataclass_fields__]
        given = ", ".join(f"{n}={short[n]}" for n in names if n != "count" or "images=" in text)
        if given:
            text = text.replace(f"{entry.cls}(", f"{entry.cls}({given}, ")
            call = rf"\boc\.{entry.name.replace('-', '_')}\([^,)]+"
            text = re.sub(call, rf"\g<0>, {given}", text)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    scope |= {"torch_model": net.eval(), "example": torch.zeros(1, 3, 8, 8)}
    exec(compile(text, "block", "exec"), scope)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "code"), [("10", 0), ("0.01", 3)])
def test_the_script_for_ci(limit: str, code: int, folder: Path, tmp_path: Path) -> None:
    """It compresses, judges, and archives whether the gates were kept or not."""
    (script,) = [text for text in blocks(DOCS / "ci.md", "bash") if text.startswith("#!")]
    (folder / "compress.sh").write_text(script)
    brief = tmp_path / "onnxcompress"
    brief.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    brief.chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    limits = {"MAX_SIZE": limit, "MAX_DROP": "100", "STEPS": "2", "OUT": "artifacts"}
    summary = tmp_path / "summary"
    done = subprocess.run(
        ["bash", "compress.sh"],
        env=os.environ | limits | path | {"GITHUB_STEP_SUMMARY": str(summary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert ("not kept" in summary.read_text()) == bool(code)
    import tarfile

    with tarfile.open("artifacts.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert names >= {"small.onnx", "report.html", "run.json"}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    text = inspect.cleandoc(command.help or "").replace("\\\n", " ")
    examples = re.findall(r"(onnxcompress .*)", text.split("Example")[1])
    assert examples
    for example in examples:
        words = shlex.split(example.split(" > ")[0])[1:]
        if words[:1] and words[0] in NAMES and "…" not in example:
            other = cli.get_command(click.Context(cli), words[0])
            assert other is not None
            other.make_context(words[0], words[1:])


@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [("onnxcompress qu", 1, "plain,quantize"), ("onnxcompress quantize mo", 2, "file,mo")],
)
def test_the_shell_completes(words: str, place: int, expected: str) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(place), "_ONNXCOMPRESS_COMPLETE": "bash_complete"}
    done = subprocess.run(
        ["onnxcompress"], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected]


def test_completion_is_installed_as_the_guide_says() -> None:
    (line,) = re.findall(r"^eval .*bash_source.*$", (DOCS / "terminal.md").read_text("utf-8"), re.M)
    ask = ["bash", "-c", f"{line}\ncomplete -p onnxcompress"]
    done = subprocess.run(ask, capture_output=True, text=True, check=True)
    assert "-F _onnxcompress_completion" in done.stdout


NET = "models/resnet20-fashion.onnx"
JSON = {
    "a pass": ["fold-bn", NET, "j.onnx"],
    "`run`": ["run", "j.yaml", NET, "j.onnx"],
    "with `--dry-run`": ["fold-bn", NET, "j.onnx", "--dry-run"],
    "`inspect`": ["inspect", NET],
    "`cache`": ["cache"],
    "`benchmark`": ["benchmark", NET],
    "`evaluate`": ["evaluate", NET, "--images", "models/fashion-tiny.npz"],
    "`compare`": ["compare", NET, NET],
    "`synthesize`": ["synthesize", NET, "j.npz", "--kind", "procedural", "--count", "2"],
    "`sweep`, also with `--dry-run`": ["sweep", "plan.yaml", "table.csv", "--dry-run"],
    "`search --dry-run`": ["search", NET, "--out", "best", "--min-speedup", "1.5", "--dry-run"],
    "`sensitivity`": [
        "sensitivity",
        NET,
        "--synthetic",
        "6",
        "--weight-bits",
        "8",
        "--activation-bits",
        "",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", JSON)
def test_json_has_the_keys_that_the_guide_names(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    rows = dict(re.findall(r"^\| (.+?) \| (`.+`) \|$", (DOCS / "json.md").read_text("utf-8"), re.M))
    assert rows.keys() == {*JSON, "`search`"}  # tests/search has that one
    Path("j.yaml").write_text("passes: [fold-bn, equalize]")
    Path("plan.yaml").write_text(f"models: [{NET}]\nrecipes: [j.yaml]")
    assert main([*JSON[command], "--json"]) == 0
    assert set(json.loads(capfd.readouterr().out)) == set(re.findall(r"`(\w+)`", rows[command]))


def test_the_map_of_the_house_has_all_rooms_from_the_top() -> None:
    layers = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"][0]["layers"]
    rooms = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    assert rooms == [room for layer in layers for room in layer.split(" | ")]


def test_pages_have_lines_to_run() -> None:
    counts = {page.stem: len(lines(page)) + len(blocks(page, "python")) for page in PAGES}
    assert [name for name, count in counts.items() if not count] == ["methods", "figures"]


def test_pictures_are_told_in_words_and_have_colours_for_dark_pages() -> None:
    found = [
        (page.parent / name, words)
        for page in PAGES
        for words, name in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text("utf-8"))
    ]
    assert {path.name for path, _ in found} == {path.name for path in DOCS.glob("*.svg")}
    for path, words in found:
        assert len(words.split()) >= 20, path
        text = path.read_text("utf-8")  # a recorded terminal is dark on any page
        assert "prefers-color-scheme: dark" in text or "rich-terminal" in text, path
        assert "http" not in text.replace("http://www.w3.org", ""), path


@pytest.mark.parametrize("name", PLOTS)
def test_plots_have_the_colours_of_reports(name: str) -> None:
    """`python -m tests.benchmarks.report_plots` where this fails."""
    assert page_colours() in (DOCS / name).read_text("utf-8")


def test_the_recorded_session_is_that_of_the_first_command() -> None:
    """`python -m tests.benchmarks.recording` where this fails."""
    shown = html.unescape(re.sub(r"<[^>]+>", "", PICTURE.read_text("utf-8")))
    assert "".join(first_command().split()) in "".join(shown.split())


def test_verbose_lists_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fold-bn", "models/mobilenetv2-fashion.onnx", "v.onnx", "--no-verify"]
    assert main([*argv, "-v"]) == 0
    assert capsys.readouterr().out.count(": folded into the Conv") == 32
    assert main([*argv, "-v", "-q"]) == 2


def test_tables_are_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "models/resnet20-fashion.onnx", "--runs", "3"]) == 0
    assert not re.search("[\u2500-\u257f]", capsys.readouterr().out)


@pytest.mark.parametrize("name", GUIDES)
def test_guides_are_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are, but for pictures and for links to other pages, which become commands that exist."""
    assert main(["guide", name]) == 0
    shown, page = capsys.readouterr().out, (DOCS / f"{name}.md").read_text("utf-8")
    assert [line for line in page.splitlines() if "](" not in line] == [
        line for line in shown.splitlines() if line in page.splitlines()
    ]
    assert "](" not in shown
    for words in re.findall(r"\(`onnxcompress (.*?)`\)", shown):
        assert words.removeprefix("guide ").removesuffix(" --help") in (*GUIDES, *NAMES), words


def test_guides_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(GUIDES)
    assert sorted(names) == sorted(page.stem for page in DOCS.glob("*.md"))


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """Between the dots, which stand for values, each is part of one text in the sources."""
    texts = [text for path in sources() for text in messages(path)]
    titles = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.M)
    quoted = [message for title in titles for message in re.findall(r"`(.+?)`", title)]
    assert len(quoted) >= 20
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.S)
        assert any(map(pattern.search, texts)), message


def messages(path: Path) -> list[str]:
    """All strings of a source file; values within are left out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else " " for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.mark.slow
def test_sensitivity_writes_a_report() -> None:
    argv = ["sensitivity", "models/resnet20-fashion.onnx", "--synthetic", "8", "--weight-bits", "4"]
    assert main([*argv, "--activation-bits", "", "--report", "s.html"]) == 0
    assert "One layer with 4-bit weights" in Path("s.html").read_text("utf-8")
