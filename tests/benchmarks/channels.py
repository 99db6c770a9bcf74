"""Accuracy against measured latency: blocks dropped, channels cut, both, and channels by other criteria.

    python -m tests.benchmarks.channels MODEL TRAIN.npz TEST.npz --preprocess TEXT --reductions 20,30

Every row is a whole command with the same images, seed and tuner; OPTIONS behind -- go to all of them. Rows
with `same` have the widths of the row `channels` and so its latency; they differ in which channels go. Rows
with `uniform` keep the same share of every group, as Torch-Pruning does by default: the largest that saves
what was asked, in multiples of ROUND_TO. Torch-Pruning acts on torch modules alone: its group norm
(`--criterion group-norm`) is computed on the graph. `both` is the best of blocks alone, channels alone and
half of each, by the outputs of images that --count leaves out of TRAIN. `practise` drops the same blocks as
`blocks` and tunes by the published procedure. At the end all networks are timed against the
original, interleaved in one measurement. It prints a table, and draws it where --plot names a file.
Networks stay in --out, and those that lie there are not made again.

With `--macs` reductions are of the multiply-accumulates: for a look on a machine that is too busy to time.
With `--made` nothing is learned from TRAIN: the inputs are made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
import torch

from onnxcompress.data.image_set import ImageSet, load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.evaluation.accuracy import logits
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.graph.channel_groups.cut_tracer import find_cut_groups
from onnxcompress.graph.channel_removal import cut_channels
from onnxcompress.graph.macs import count_macs
from onnxcompress.model import Model, load, save
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.report.svg import ACCENT, INK, MUTED, PAPER
from onnxcompress.report.svg import draw as svg_of
from onnxcompress.runtime.stopwatch import Stopwatch
from tests.benchmarks.practise_finetuning import published_finetuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = {
    "blocks": "blocks",
    "channels": "channels",
    "both": "blocks and channels",
    "same-group-norm": "the same widths, by group norm",
    "same-magnitude": "the same widths, by magnitude",
    "group-norm": "channels by group norm",
    "magnitude": "channels by magnitude",
    "uniform-group-norm": "uniform widths, group norm (Torch-Pruning)",
    "uniform-magnitude": "uniform widths, magnitude",
    "onnxsim": "onnxsim's Wanda, no repair",
    "practise": "the same blocks, tuned as PRACTISE published",
}
"""Name of a row -> how the table calls it."""
SHARES = [step / 40 for step in range(39, 9, -1)]
"""Shares of its channels that a group keeps in rows of one share."""
MOST_ASIDE = 1000
"""Images left out of TRAIN that decide between networks, at most."""
PUBLISHED_STEPS = 200
"""Steps of the published fine-tuning, of 64 images each."""
ROUND_TO = 4
"""Multiples of channels that uniform rows keep: as few as `drop-channels` keeps multiples of."""

LOOKS = {
    "blocks": (ACCENT, "s", "-"),
    "channels": (ACCENT, "o", "--"),
    "both": (INK, "D", "-"),
    "practise": (MUTED, "s", ":"),
    "group-norm": (MUTED, "^", "--"),
    "uniform-group-norm": (MUTED, "^", "--"),
    "magnitude": (MUTED, "v", ":"),
}
"""Colour, marker and line of a row in the plot."""
FALL = 17.0
"""Points of accuracy that the plot shows, at most."""
STYLE = """
svg { --ink: #1d1c1a; --muted: #6b6860; --grid: #d8d4cc; --accent: #0a6a8c; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #eae8e3; --muted: #a8a69f; --grid: #3d434a; --accent: #5cb9db; --paper: #15171a; }
}
text { font-family: system-ui, sans-serif; }
"""


@dataclass(frozen=True)
class Row:
    """A network of the table."""

    kind: str
    asked: float
    """Percent of the latency, or of the multiply-accumulates."""
    top1: float
    """Percent."""
    file: Path


@dataclass(frozen=True)
class Bench:
    """The network, and what all commands have in common."""

    model: str
    images: str
    preprocess: str
    count: int
    learned: Sequence[str]
    judged: Sequence[str]
    target: str
    """Option that a reduction is given to."""
    folder: Path

    def accuracy(self, file: str | Path) -> float:
        """Measure top-1 accuracy in percent."""
        return 100 * float(command("evaluate", str(file), *self.judged)["top1"])

    def row(self, kind: str, asked: float) -> Row:
        """Make a network unless it lies there, and judge it."""
        file = self._file(kind, asked)
        return Row(kind, asked, self.accuracy(file), file)

    def _file(self, kind: str, asked: float) -> Path:
        file = self.folder / f"{kind}-{asked:g}.onnx"
        if not file.exists():
            self._make(kind, asked, file)
        return file

    def error(self, file: Path) -> float:
        """Squared error of the scores of images that nothing learned from, relative to their squares."""
        images = self.drawn(left_out=MOST_ASIDE)
        wanted, found = (logits(path, images, provider="cpu") for path in (self.model, file))
        return float(np.square(found - wanted).sum() / np.square(wanted).sum())

    def drawn(self, left_out: int | None = None) -> ImageSet:
        """Draw the images of TRAIN that commands learn from, or those that they leave out."""
        how = Preprocess.parse(self.preprocess)
        return load_images(self.images, preprocess=how, count=self.count, left_out=left_out, seed=0)

    def published(self, asked: float) -> Model:
        """Tune by the published procedure what the row `blocks` left, from the original weights."""
        folded, left = load(self.model), load(self._file("blocks", asked)).graph.tensors()
        FoldBatchNorm().apply(folded)
        names = [block.name for block in find_blocks(folded).blocks if block.inner[0] not in left]
        images = torch.from_numpy(self.drawn().array())
        return published_finetuning(load(self.model), names, images, steps=PUBLISHED_STEPS)

    def _make(self, kind: str, asked: float, file: Path) -> None:
        target = (self.target, f"{asked:g}")
        if kind == "blocks":
            self._run("drop-blocks", self.model, file, "--latency-reduction", f"{asked:g}")
        elif kind == "mixed":  # half of the reduction by blocks
            whole, half = 1 - asked / 100, (1 - asked / 100) ** 0.5
            between = file.with_suffix(".blocks.onnx")
            self._run("drop-blocks", self.model, between, "--latency-reduction", f"{100 * (1 - half):g}")
            saved = Stopwatch("cpu").compare(load(self.model), load(between), seconds=8.0).saved.value
            rest = 100 * (1 - whole / (1 - saved))
            self._run("drop-channels", str(between), file, self.target, f"{rest:g}")
        elif kind == "both":
            shutil.copy(
                min((self._file(k, asked) for k in ("blocks", "channels", "mixed")), key=self.error), file
            )
        elif kind == "practise":
            save(self.published(asked), file)
        elif kind.startswith("uniform-"):
            widths = self.uniform_widths(asked)
            criterion = ("--criterion", kind.removeprefix("uniform-"))
            self._run("drop-channels", self.model, file, "--channels-kept", widths, *criterion)
        elif kind == "onnxsim":
            onnx.save(self.onnxsim(asked), file)
        elif kind.startswith("same-"):
            widths = self._widths(asked).read_text()
            criterion = ("--criterion", kind.removeprefix("same-"))
            self._run("drop-channels", self.model, file, "--channels-kept", widths, *criterion)
        elif kind == "channels":
            groups = self._run("drop-channels", self.model, file, *target)["measured"]["groups"]
            cut = [f"{g['name']}={g['kept']}" for g in groups if g["kept"] < g["channels"]]
            self._widths(asked).write_text(",".join(cut))
        else:
            self._run("drop-channels", self.model, file, *target, "--criterion", kind)

    def _widths(self, asked: float) -> Path:
        return self.folder / f"channels-{asked:g}.widths"

    def _run(self, name: str, source: str, file: Path, *options: str) -> dict[str, Any]:
        return command(name, source, str(file), *options, *self.learned, "--force", "--no-cache")

    def onnxsim(self, asked: float) -> onnx.ModelProto:
        """Cut channels with onnxsim's Wanda, as few as save enough; it repairs no convolution."""
        import onnxsim

        whole = load(self.model)
        FoldBatchNorm().apply(whole)
        steps = Preprocess.parse(self.preprocess)
        images = load_images(self.images, preprocess=steps, count=64).array()
        feeds = [{whole.graph.inputs[0].name: images[start : start + 16]} for start in range(0, 64, 16)]

        def cut(kept: float) -> onnx.ModelProto:
            found: onnx.ModelProto = onnxsim.apply_structured_wanda_pruning_cpp(
                whole.to_proto(), feeds, sparsity=1 - kept
            )
            return found

        return cut(self.largest_share(asked, lambda kept: Model.from_proto(cut(kept))))

    def uniform_widths(self, asked: float) -> str:
        """Find the share of its channels that each group keeps; returns `--channels-kept`."""
        whole = load(self.model)
        FoldBatchNorm().apply(whole)
        canonicalize(whole)
        groups = find_cut_groups(whole)

        def cut(share: float) -> Model:
            own, gone = whole.copy(), set[int]()
            for group in groups.free:
                gone.update(group.group.labels[rounded(share * group.width) :].tolist())
            cut_channels(own, groups, gone)
            return own

        share = self.largest_share(asked, cut)
        return ",".join(f"{g.name}={min(g.width, rounded(share * g.width))}" for g in groups.free)

    def largest_share(self, asked: float, cut: Callable[[float], Model]) -> float:
        """Find the largest of SHARES with which a network saves enough, else the smallest."""
        before, stopwatch = load(self.model), Stopwatch("cpu")

        def enough(share: float) -> bool:
            after = cut(share)
            if self.target == "--macs-reduction":
                return 1 - count_macs(after) / count_macs(before) >= asked / 100
            return stopwatch.compare(before, after, seconds=5.0).saved.value >= asked / 100

        return SHARES[min(bisect_left(SHARES, True, key=enough), len(SHARES) - 1)]


def rounded(width: float) -> int:
    """Round a width to a multiple of ROUND_TO, which it keeps at least."""
    return max(1, round(width / ROUND_TO)) * ROUND_TO


def command(*argv: str) -> dict[str, Any]:
    """Run a command of ours; returns its JSON."""
    full = [sys.executable, "-m", "onnxcompress.cli.main", *argv, "--json"]
    done = subprocess.run(full, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: the target is missed, which the table shows
        raise SystemExit(f"{' '.join(argv)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@click.command()
@click.argument("model")
@click.argument("train")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--reductions", default="20,30", help="Percent of the latency.")
@click.option("--rows", default=",".join(ROWS))
@click.option("--count", default=500)
@click.option("--made", is_flag=True, help="Learn from made inputs instead of TRAIN.")
@click.option("--macs", is_flag=True, help="Reductions are of the multiply-accumulates.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the networks.")
@click.option("--plot", type=click.Path(path_type=Path), help="An SVG file.")
@click.argument("options", nargs=-1)
def cli(
    model: str,
    train: str,
    test: str,
    preprocess: str,
    reductions: str,
    rows: str,
    count: int,
    made: bool,
    macs: bool,
    out: Path,
    plot: Path | None,
    options: tuple[str, ...],
) -> None:
    """Accuracy on TEST against measured latency; OPTIONS go to every command (behind --)."""
    out.mkdir(parents=True, exist_ok=True)
    images = [] if made else ["--images", train, "--count", str(count)]
    bench = Bench(
        model,
        train,
        preprocess,
        count,
        [*images, "--preprocess", preprocess, *options],
        ["--images", test, "--preprocess", preprocess],
        "--macs-reduction" if macs else "--latency-reduction",
        out,
    )
    whole = bench.accuracy(model)
    print(f"{Path(model).name}: {whole:.2f} %", flush=True)
    table = []
    for asked in reductions.split(","):
        for kind in rows.split(","):
            table.append(bench.row(kind, float(asked)))
            print(f"{ROWS[kind]}, {asked} %: {table[-1].top1:.2f} %", flush=True)
    show(model, whole, table, plot)


def show(model: str, whole: float, rows: Sequence[Row], plot: Path | None) -> None:
    """Time all networks together, and print the table."""
    stopwatch = Stopwatch("cpu")
    before = load(model)
    saved = stopwatch.savings(before, {row.file.stem: load(row.file) for row in rows})
    print(f"all timed together, by the {stopwatch.parts_clock} clock:")
    print("| | asked | latency in onnxruntime | 95 % interval | MACs | accuracy | lost |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        share, low, high = (100 * value for value in saved[row.file.stem])
        macs = 100 * (1 - count_macs(load(row.file)) / count_macs(before))
        print(
            f"| {ROWS[row.kind]} | {row.asked:g} % | {-share:.1f} % | {-high:.1f} to {-low:.1f} % | "
            f"{-macs:.1f} % | {row.top1:.2f} % | {whole - row.top1:.2f} |"
        )
    if plot is not None:
        draw(plot, whole, [(row.kind, 100 * saved[row.file.stem].value, row.top1) for row in rows])


def draw(file: Path, whole: float, points: Sequence[tuple[str, float, float]]) -> None:
    """Draw accuracy against latency, in colours of their own on light and on dark pages."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in points))

    def paint(axes: Axes) -> None:
        for kind in kinds:
            own = sorted([(0.0, whole), *((x, y) for k, x, y in points if k == kind)])
            colour, marker, line = LOOKS.get(kind, (MUTED, "x", ":"))
            face = colour if line == "-" else PAPER
            axes.plot(
                *zip(*own, strict=True), color=colour, marker=marker, linestyle=line, linewidth=1.8,
                markersize=7, markerfacecolor=face, label=ROWS[kind],
            )  # fmt: skip
        axes.set(xlabel="latency saved in onnxruntime, %", ylabel="accuracy, %")
        lowest = min(y for _, _, y in points)
        axes.set_ylim(max(lowest, whole - FALL) - 0.5, whole + 0.5)
        axes.grid(axis="y")
        axes.legend(loc="lower left", fontsize=11.5)

    name = file.stem
    svg = svg_of(paint, 720, 400, name).replace('aria-hidden="true" focusable="false"', 'role="img"')
    head, rest = svg.split(">", 1)
    file.write_text(f"{head}>\n<style>{STYLE}</style>{rest}\n", encoding="utf-8")


if __name__ == "__main__":
    cli()
