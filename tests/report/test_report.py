"""The report: right figures from a real run, well-formed, whole in itself, legible, and in a browser."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from onnxcompress.account import Change, Refusal
from onnxcompress.cli.main import main
from onnxcompress.model import load, save
from onnxcompress.optimize.block_drop.figures import BlockRow, DropBlocksFigures
from onnxcompress.passes import PassResult
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.prune.figures import PrunedLayerRow, PruneFigures, WeightBytes
from onnxcompress.pipeline import Step
from onnxcompress.report import LayerSize, Material, render, tell
from onnxcompress.report.charts import Bars, Point, Scatter, svgs
from onnxcompress.report.label_layout import elided_apart
from onnxcompress.runtime.block_latency import LatencyChange, Share
from tests.helpers.results import step_of

XHTML = "{http://www.w3.org/1999/xhtml}"
HOSTILE = "</title><script>alert(1)</script>$x$ & \x00\"'-->"


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Latency from a few rounds."""
    from onnxcompress.runtime import latency

    original = latency.interleave
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "interleave", lambda *a, **o: original(*a, **(o | {"runs": 30})))
        patch.setattr(latency, "_warm", lambda timed, seconds: None)
        yield


@pytest.fixture(scope="module")
def pictures(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = np.load(models / "fashion-test2k.npz")
    file = tmp_path_factory.mktemp("pictures") / "few.npz"
    np.savez(file, x=archive["x"][:40], y=archive["y"][:40])
    return file


@dataclasses.dataclass(frozen=True)
class Made:
    """A run with a report and an account."""

    page: Path
    account: dict[str, Any]
    code: int

    @property
    def text(self) -> str:
        return self.page.read_text("utf-8")


@pytest.fixture(scope="module")
def made(models: Path, pictures: Path, quick: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The shipped recipe with few images and no fine-tuning, and a gate that it misses."""
    folder = tmp_path_factory.mktemp("report")
    page, out = folder / "out.html", folder / "out.onnx"
    argv = ["run", str(models / "compress-resnet20.yaml"), str(models / "resnet20-fashion.onnx"), str(out)]
    argv += ["-D", f"images={pictures}", "-D", "blocks=1", "-D", "steps=0", "--no-cache", "--json"]
    argv += ["--max-size", "0.1", "--max-drop", "50", "--gate-images", str(pictures), "--report", str(page)]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("onnxcompress.cli.options.click.echo", lambda text, **_: printed.append(text))
        code = main(argv)
    return Made(page, json.loads(next(text for text in printed if text.startswith("{"))), code)


def parse(text: str) -> ElementTree.Element:
    """The page as XML, which is stricter than HTML."""
    return ElementTree.fromstring(text.replace("<!DOCTYPE html>", "", 1))


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def titles(page: ElementTree.Element) -> list[str]:
    return [words(next(iter(f))) for f in page.iter(f"{XHTML}figure")]


@pytest.mark.slow
def test_the_story_of_a_real_run(made: Made, pictures: Path) -> None:
    page = parse(made.text)
    text = words(page).replace("\u00a0", " ")
    assert made.code == 3
    assert titles(page) == [
        "What each block costs, and what is lost without it",
        "How long a run takes",
        "Top-1 accuracy",
        "Signal to noise of each layer's output",
        "Weights of each layer",
        f"Images of {pictures}",
    ]
    for step in made.account["steps"]:
        assert step["pass"] in text
        for refusal in step["refusals"]:
            assert refusal["node"] in text
            assert refusal["rule"] in text
    (order,) = (s["measured"]["order"] for s in made.account["steps"] if s["pass"] == "drop-blocks")
    assert f"1 of 9 blocks were dropped: {order[0]}." in text
    assert made.account["provenance"][2]["input_sha256"] in text
    assert f"-D images={pictures} \\ -D blocks=1 \\ -D steps=0" in text
    assert re.search(r"Top-1 accuracy goes from \d\d\.\d\d % .* on 40 images that the gates judge by", text)


@pytest.mark.slow
def test_what_was_missed_comes_first(made: Made) -> None:
    section = next(e for e in parse(made.text).iter(f"{XHTML}section") if e.get("id") == "outcome")
    gate = next(g for g in made.account["gates"] if not g["passed"])
    assert (
        words(section).replace("\u00a0", " ").startswith(f"Outcome Not what was asked for. {gate['text']}")
    )


@pytest.mark.slow
def test_nothing_is_fetched(made: Made) -> None:
    page = parse(made.text)
    for element in page.iter():
        assert element.tag != f"{XHTML}script"
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("src", "href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:")), value
            assert not name.startswith("on")
    assert re.findall(r"@import|url\((?!#)", made.text) == []
    assert made.page.stat().st_size < 400_000


@pytest.mark.slow
def test_it_can_be_read_without_seeing_it(made: Made) -> None:
    page = parse(made.text)
    assert page.get("lang") == "en"
    ids = [e.get("id") for e in page.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    linked = [e.get("href", "")[1:] for e in page.iter(f"{XHTML}a")]
    assert set(linked) <= set(ids)
    levels = [int(e.tag[-1]) for e in page.iter() if re.fullmatch(rf"{XHTML}h\d", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    for figure in page.iter(f"{XHTML}figure"):
        assert len(words(figure.findall(f"{XHTML}figcaption")[0])) > 20
        shown = [e.get("aria-label") or e.get("alt") for e in figure.iter()]
        assert any(shown)
    for table in page.iter(f"{XHTML}table"):
        assert table.find(f"{XHTML}caption") is not None
        assert {e.get("scope") for e in table.iter(f"{XHTML}th")} == {"col", "row"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_contrast(made: Made, scheme: int) -> None:
    """WCAG 2 AA in light, dark and print: 4.5 for text, 3 for what is drawn."""
    blocks = re.findall(r":root \{(.*?)\}", made.text, re.S)
    assert len(blocks) == 3
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme]))

    def light(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a: str, b: str) -> float:
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "muted", "accent", "missed"):
        assert min(contrast(name, ground) for ground in ("paper", "card", "missed-card")) >= 4.5, name
    assert contrast("second", "paper") >= 3


def hostile() -> Material:
    rows = tuple(
        BlockRow(HOSTILE + str(i), "x", i == 0, Share(0.1 + i / 100, 0.09, 0.12), 0.1 + i, 1.0)
        for i in range(2)
    )
    latency = LatencyChange(10.0, 9.0, 0.9, 0.8, 0.95)
    figures = DropBlocksFigures(
        HOSTILE, HOSTILE, latency, rows, order=(HOSTILE,), output_snr_db={HOSTILE: 1.0}
    )
    result = PassResult([Change(HOSTILE, "dropped")], [Refusal(HOSTILE, HOSTILE, HOSTILE)], figures)
    step = Step(DropBlocks(drop=(HOSTILE,)), result, 0.0)
    return Material("drop-blocks", {}, [step], argv=[HOSTILE], layers=[LayerSize(HOSTILE, 10, 5)])


def test_names_are_text() -> None:
    text = render(tell(hostile()))
    page = parse(text)
    assert not list(page.iter(f"{XHTML}script"))
    assert "<script" not in text
    name = "</title><script>alert(1)</script>$x$ & \ufffd\"'-->"
    assert name in words(page)
    drawn = "".join("".join(e.itertext()) for e in page.iter("{http://www.w3.org/2000/svg}text"))
    assert "$x$" in drawn  # not typeset as mathematics


def test_it_is_a_function_of_its_material() -> None:
    assert render(tell(hostile())) == render(tell(hostile()))


def test_a_bar_is_as_long_as_its_value() -> None:
    wide, _ = svgs(Bars([("a", [10.0, 5.0]), ("b", [None, 20.0])], "kB", ("before", "after")), "f")
    corners = [
        re.findall(r"[-\d.]+", d) for d in re.findall(r'<g id="f\w-patch_\d+">\s*<path d="([^"]+)"', wide)
    ]
    lengths = sorted(float(c[2]) - float(c[0]) for c in corners if len(c) == 8)
    bars = [one for one in lengths if one > 30][:3]  # without the legend's, and the frame
    assert bars[1] / bars[0] == pytest.approx(2, rel=1e-3)
    assert bars[2] / bars[0] == pytest.approx(4, rel=1e-3)


def test_crowded_points_leave_names_out() -> None:
    points = [Point(f"block {i}", 10.0, 9.9, 10.1, 0.5, i == 0) for i in range(40)]
    wide, narrow = svgs(Scatter(points, "x", "y", "dropped", "kept"), "f")
    for drawing in (wide, narrow):
        names = re.findall(r">(block \d+)<", drawing)
        assert names[0] == "block 0"  # what was picked is named first
        assert 1 <= len(names) <= 4


def test_sensitivity_has_a_chart() -> None:
    rows = [
        {"layer": name, "kind": "weight_bits", "value": bits, "error": error / bits, "changed": None}
        for name, error in (("first", 0.1), ("second", 0.4))
        for bits in (8, 4)
    ]
    text = render(tell(Material("sensitivity", {"rows": rows, "refusals": []})))
    page = parse(text)
    assert titles(page) == ["One layer with 4-bit weights, all others as they were"]
    assert "second matters most (10 %)" in words(page).replace("\u00a0", " ")


CHARTS_OF_A_MODEL = ["From the input to the output", "Weights of each layer"]
COMMANDS = {
    "inspect": (["{net}"], "9 blocks can be dropped", CHARTS_OF_A_MODEL),
    "benchmark": (["{net}", "{net}", "--runs", "9"], "takes", ["How long a run takes"]),
    "evaluate": (
        ["{net}", "--images", "{few}", "--preprocess", "fashion-mnist"],
        "of 40 images are classified right",
        ["Top-1 accuracy", "Images of {few}"],
    ),
    "compare": (
        ["{net}", "{net}", "--runs", "9"],
        "The file is as large as it was",
        ["How long a run takes", "Weights of each layer"],
    ),
    "synthesize": (
        ["{net}", "{out}.npz", "--kind", "procedural", "--count", "3"],
        "3 procedural images made in",
        ["The images"],
    ),
    "fold-bn": (
        ["{net}", "{out}.onnx"],
        "21 × folded into",
        ["How long a run takes", "Weights of each layer"],
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(name: str, models: Path, pictures: Path, tmp_path: Path) -> None:
    places = {"net": models / "resnet20-fashion.onnx", "few": pictures, "out": tmp_path / "out"}
    argv, said, figures = COMMANDS[name]
    page = tmp_path / "page.html"
    assert main([name, *(a.format(**places) for a in argv), "--report", str(page)]) == 0
    found = parse(page.read_text("utf-8"))
    assert said in words(found).replace("\u00a0", " ")
    assert titles(found) == [figure.format(**places) for figure in figures]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_images_that_a_pass_made_are_shown_once(models: Path, tmp_path: Path) -> None:
    """The cache keeps them: the report of a run that took all from it is no poorer."""
    recipe, page = tmp_path / "r.yaml", tmp_path / "page.html"
    recipe.write_text("passes: [calibrate: {inputs: procedural, synthetic: 6, overwrite: true}]")
    argv = ["run", str(recipe), str(models / "resnet20-fashion.onnx"), str(tmp_path / "o.onnx"), "-q"]
    title = "What calibrate made for itself: procedural"
    drawn = []
    for _ in range(2):
        assert main([*argv, "--cache", str(tmp_path / "cache"), "--report", str(page)]) == 0
        found = parse(page.read_text("utf-8"))
        assert titles(found).count(title) == 1
        drawn.append([e.get("src") for e in found.iter(f"{XHTML}img")])
    assert drawn[0] == drawn[1]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_images_that_correct_bias_made_are_shown(models: Path, tmp_path: Path) -> None:
    net, page, out = models / "resnet20-fashion.onnx", tmp_path / "page.html", tmp_path / "o.onnx"
    model = load(net)
    for node in model.graph.nodes:
        if node.op == "Conv":
            step = np.abs(node.inputs[1].values).max() / 15
            node.inputs[1].values = np.round(node.inputs[1].values / step) * step
    save(model, tmp_path / "rounded.onnx")
    argv = [
        "correct-bias",
        str(tmp_path / "rounded.onnx"),
        str(out),
        "--reference",
        str(net),
        "--report",
        str(page),
    ]
    assert main([*argv, "--inputs", "procedural", "--synthetic", "64", "-q"]) == 0
    text = page.read_text("utf-8")
    assert "What correct-bias made for itself: procedural" in titles(parse(text))
    assert "correct-bias learned from 64 procedural images (asked for; seed 0), preprocessed by" in text


def test_layers_that_were_pruned_have_a_chart() -> None:
    rows = [PrunedLayerRow(n, "Conv", n, 0.5, 9.0 + i) for i, n in enumerate("ab")]
    kept = PrunedLayerRow("c", "Conv", "c", 0.0)
    figures = PruneFigures(0.5, 10, 5, WeightBytes(10, 5), "", (kept, *rows))
    page = parse(render(tell(Material("prune", {}, [step_of(Prune(), figures)]))))
    assert titles(page) == ["Signal to noise of each layer's output"]
    assert "the more pruning costs there" in words(page)
    cells = [[words(cell).replace("\u00a0", " ") for cell in row] for row in page.iter(f"{XHTML}tr")]
    assert ["a", "50.0 %", "9.0 dB"] in cells


def test_names_that_would_look_alike_are_told_apart() -> None:
    names = [f"/blocks/blocks.{i}/shortcut/conv/Conv" for i in (3, 6)]
    assert elided_apart([*names, "/fc"], 30) == [
        "…/blocks.3/shortcut/conv/Conv",
        "…/blocks.6/shortcut/conv/Conv",
        "/fc",
    ]
    longer = [f"/{'x' * 30}/{i}{'y' * 30}" for i in "ab"]
    shown = elided_apart(longer, 20)
    assert len(set(shown)) == 2
    assert max(map(len, shown)) <= 20


def test_the_command_can_be_copied(tmp_path: Path) -> None:
    argv = ["fold-bn", "my net.onnx", "-", "-v", "--max-size", "1", "--report", "r.html"]
    text = render(tell(Material("fold-bn", {}, argv=argv)))
    shell = "".join(e.text or "" for e in parse(text).iter(f"{XHTML}code"))
    assert shlex.split(shell.replace("\\\n", " ")) == ["onnxcompress", *argv]
    assert [line.strip(" \\") for line in shell.splitlines()][1:] == [
        "-v",
        "--max-size 1",
        "--report r.html",
    ]


@pytest.mark.parametrize(("name", "said"), [("x.txt", "ends in .html"), ("no/x.html", "existing")])
def test_a_wrong_name_is_refused_before_the_work(
    name: str, said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    argv = ["fold-bn", str(models / "resnet20-fashion.onnx"), str(out), "--report", str(tmp_path / name)]
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_dry_run_has_no_report(models: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    argv = [
        "fold-bn",
        str(models / "resnet20-fashion.onnx"),
        str(tmp_path / "o.onnx"),
        "--report",
        str(page),
    ]
    assert main([*argv, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_made_leaves_the_old_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def broken(*given: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("onnxcompress.report.html.svgs", broken)
    assert main(["inspect", str(models / "resnet20-fashion.onnx"), "--report", str(page)]) == 1
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_who_wants_no_report_pays_nothing(models: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from onnxcompress.cli.main import main; "
        "assert main(sys.argv[1:]) == 0; "
        "sys.exit(any(m in sys.modules for m in ('matplotlib', 'jinja2', 'onnxcompress.report')))"
    )
    argv = ["fold-bn", str(models / "resnet20-fashion.onnx"), str(tmp_path / "o.onnx"), "--no-verify", "-q"]
    subprocess.run([sys.executable, "-c", code, *argv], check=True)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """
const shown = e => { const r = e.getBoundingClientRect(); return r.width > 40 && r.height > 40; };
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
const drawings = [...document.querySelectorAll('figure svg')].filter(shown);
const found = {
  figures: [...document.querySelectorAll('figure')].map(
    f => [...f.querySelectorAll('svg, img')].filter(shown).length),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  wide: matchMedia('(min-width: 41rem)').matches, dark: matchMedia('(prefers-color-scheme: dark)').matches,
  ground: getComputedStyle(document.body).backgroundColor,
  overlaps: drawings.flatMap(s => {
    const t = [...s.querySelectorAll('text')].filter(e => e.textContent.trim());
    const r = t.map(e => e.getBoundingClientRect());
    return t.flatMap((a, i) => t.slice(i + 1).filter((b, j) => meet(r[i], r[i + 1 + j]))
      .map(b => a.textContent + ' | ' + b.textContent));
  }),
  outside: drawings.flatMap(s => [...s.querySelectorAll('text')].filter(e => {
    const r = e.getBoundingClientRect(), b = s.getBoundingClientRect();
    return r.left < b.left - 3 || r.right > b.right + 3;
  }).map(e => e.textContent)),
  small: drawings.flatMap(s => [...s.querySelectorAll('text')].map(
    e => parseFloat(getComputedStyle(e).fontSize) * s.getBoundingClientRect().width
         / s.viewBox.baseVal.width)).reduce((a, b) => Math.min(a, b), 99),
};
parent.postMessage(JSON.stringify(found), '*');
"""
FRAME = """<!DOCTYPE html><body><pre id="found"></pre>
<script>addEventListener('message', e => document.getElementById('found').textContent = e.data);</script>
<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser(width: int, dark: bool, made: Made, tmp_path: Path) -> None:
    """Nothing in the console, each figure seen once, no text on another, nothing wider than the screen."""
    assert BROWSER is not None
    script = f"<script>{PROBE}</script></body>"
    (tmp_path / "page.html").write_text(made.text.replace("</body>", script), "utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), "utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    flags += ["--no-first-run", "--disable-quic", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update"]
    flags += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=4000",
        "--window-size=1400,1000",
    ]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [BROWSER, *flags, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)[0]))
    assert found["figures"] == [1] * 6
    assert found["overflow"] <= 0
    assert (found["wide"], found["dark"]) == (width > 700, dark)
    assert found["ground"] == ("rgb(21, 23, 26)" if dark else "rgb(252, 251, 249)")
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["small"] >= 11
