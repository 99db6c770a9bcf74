"""Figures of search and sweep, one command for each.

    python -m tests.benchmarks.search lite0   MODEL IMAGES --preprocess TEXT --out DIR
    python -m tests.benchmarks.search recipes MODEL TRAIN.npz TEST.npz --preprocess TEXT --out DIR
    python -m tests.benchmarks.search resume  MODEL --out DIR
    python -m tests.benchmarks.search cluster MODEL --out DIR

`lite0` searches without data for a model that is 1.6 times as fast, and judges what the search marks on the
images of IMAGES but 100, which nothing learned from and nothing chose by. `recipes` searches for 25, 40 and
65 percent less latency (--reductions), carries out 12 recipes as an engineer writes them (`RECIPES`), times
all results together, run by run, and shows the best of the search and of the recipes that save as much.
Both learn from the same 500 images of TRAIN, or with --made from none; both are chosen by 1,000 others of
TRAIN, and TEST judges. `resume` kills a search (SIGKILL) in its proxies, twice, and in its repairs, and
goes on: the front has to be that of the undisturbed search. Latencies are those that this one measured,
since two measurements are never equal. `cluster` carries out a plan of 12 runs by one process and by two,
by one node of a local Ray cluster and by two, and by two of which one is killed on the way.

What lies in --out is not made again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.evaluation.accuracy import logits, topk
from onnxcompress.model import load
from onnxcompress.runtime.latency import benchmark, ratio
from onnxcompress.runtime.stopwatch import Stopwatch

FOLDER = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of all results."
)
EFFORT = click.option("--effort", default="auto", help="Of full repair and of the recipes.")
LEARNED, GATED = 500, 1000
"""Images of TRAIN to learn from, and to choose by."""
LEFT_OUT = 100
"""Images of `lite0` that do not judge: those that other benchmarks learn from."""
WITHIN = 1.0
"""Points by which a result may save less than the reduction: what two measurements differ by."""

BLOCKS = "drop-blocks: {{latency_reduction: {}, {}}}"
CHANNELS = "drop-channels: {{latency_reduction: {}, {}}}"
W8A8 = "quantize: {{weight_bits: 8, activation_bits: 8, {1}}}"
RECIPES: dict[str, Sequence[tuple[str, int]]] = {
    "blocks 15": [(BLOCKS, 15)],
    "blocks 25": [(BLOCKS, 25)],
    "blocks 33": [(BLOCKS, 33)],
    "blocks 40": [(BLOCKS, 40)],
    "channels 25": [(CHANNELS, 25)],
    "channels 40": [(CHANNELS, 40)],
    "blocks 13, channels 14": [(BLOCKS, 13), (CHANNELS, 14)],
    "blocks 25, channels 20": [(BLOCKS, 25), (CHANNELS, 20)],
    "W8A8": [(W8A8, 0)],
    "blocks 10, W8A8": [(BLOCKS, 10), (W8A8, 0)],
    "blocks 25, W8A8": [(BLOCKS, 25), (W8A8, 0)],
    "blocks 33, W8A8": [(BLOCKS, 33), (W8A8, 0)],
}
"""Name -> passes behind fold-bn, with the percent of latency that a pass is to save. On a CPU fp16 saves
none: it is in no recipe."""


@click.group()
def cli() -> None:
    """Figures of search and sweep."""


@cli.command()
@click.argument("model")
@click.argument("images")
@click.option("--preprocess", required=True)
@click.option("--speedup", default=1.6)
@click.option("--trials", default=8)
@click.option("--repairs", default=1)
@EFFORT
@FOLDER
def lite0(
    model: str,
    images: str,
    preprocess: str,
    speedup: float,
    trials: int,
    repairs: int,
    effort: str,
    out: Path,
) -> None:
    """Speed and accuracy of what a search without data marks."""
    options = [
        "--effort",
        effort,
        "--min-speedup",
        f"{speedup:g}",
        "--trials",
        f"{trials}",
        "--repairs",
        f"{repairs}",
    ]
    found, seconds = searched(model, out / "best", ["--preprocess", preprocess, *options])
    (chosen,) = (row for row in found["front"] if row["picked"])
    how = Preprocess.parse(preprocess)
    judged = load_images(images, preprocess=how, labels=True, left_out=10**9, count=LEFT_OUT, seed=0)
    assert judged.y is not None
    before, after = (
        100 * topk(logits(file, judged, provider="cpu"), judged.y)[0] for file in (model, chosen["output"])
    )
    times = benchmark({"before": model, "after": chosen["output"]}, provider="cpu", seconds=20.0)
    saved = ratio(times["before"], times["after"])
    print(f"{chosen['candidate']}, by {trials} proxies and {repairs} repairs in {seconds:.0f} s:")
    print(f"{1 / saved.value:.2f} times as fast ({1 / saved.high:.2f} to {1 / saved.low:.2f})")
    print(f"top-1 on {len(judged)} images {before:.2f} -> {after:.2f} %")


@dataclass(frozen=True)
class Made:
    """A result that competes."""

    by: str
    """`search` or `recipe`."""
    name: str
    file: Path
    gate: float
    """Top-1 accuracy in percent on the images that decide."""
    test: float


@cli.command()
@click.argument("model")
@click.argument("train")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--reductions", default="25,40,65", help="Percent of the latency.")
@click.option("--time", "time_limit", default="20m", help="Of each search.")
@click.option("--jobs", default=2, help="Of the search.")
@click.option("--only", type=click.Choice(["search", "recipe"]), help="Leave the other out.")
@click.option("--recipe", "names", multiple=True, type=click.Choice(list(RECIPES)), help="Only these.")
@click.option("--made", is_flag=True, help="Learn from made inputs instead of TRAIN.")
@EFFORT
@FOLDER
def recipes(
    model: str,
    train: str,
    test: str,
    preprocess: str,
    reductions: str,
    time_limit: str,
    jobs: int,
    only: str | None,
    names: tuple[str, ...],
    made: bool,
    effort: str,
    out: Path,
) -> None:
    """Search against recipes written by hand, at equal latency."""
    out.mkdir(parents=True, exist_ok=True)
    learned, gated = split(train, out)
    inputs = {"preprocess": preprocess, "effort": effort} | ({} if made else {"images": str(learned)})
    asked, files = [float(text) for text in reductions.split(",")], list[tuple[str, str, Path]]()
    if only != "recipe":
        options = [f"--{name}={value}" for name, value in inputs.items()]
        options += ["--gate-images", str(gated), "--time", time_limit, "--jobs", f"{jobs}"]
        for percent in asked:
            limit = ["--min-speedup", f"{1 / (1 - percent / 100):.4f}"]
            own = [*options, *limit, "--cache", str(out / "cache-search")]
            found, seconds = searched(model, out / f"search-{percent:g}", own)
            files += [
                ("search", f"{percent:g}: {r['candidate']}", Path(r["output"])) for r in found["front"]
            ]
            looked = f"{len(found['proxies'])} proxies, {len(found['front'] + found['dominated'])} repairs"
            print(f"search for {percent:g} %: {looked}, {seconds:.0f} s", flush=True)
    if only != "search":
        for name in names or RECIPES:
            files.append(("recipe", name, by_hand(model, name, inputs, out)))
            print(f"made: {name}", flush=True)
    judging = ["--preprocess", preprocess]
    rows = [Made(by, name, file, *scores(file, [gated, test], judging)) for by, name, file in files]
    show(model, scores(model, [gated, test], judging), rows, asked)


def split(train: str, out: Path) -> tuple[Path, Path]:
    """Write the images of TRAIN to learn from, and those to choose by; returns the files."""
    values = np.load(train)
    x, y = values["x"], values["y"]
    order = np.random.default_rng(0).permutation(len(x))
    parts = {"learned": order[:LEARNED], "gated": order[LEARNED : LEARNED + GATED]}
    for name, chosen in parts.items():
        if not (out / f"{name}.npz").exists():
            np.savez(out / f"{name}.npz", x=x[chosen], y=y[chosen])
    return out / "learned.npz", out / "gated.npz"


def by_hand(model: str, name: str, inputs: dict[str, str], out: Path) -> Path:
    """Carry out one of `RECIPES` unless its result lies there; returns the file."""
    file = out / f"{name.replace(', ', '-').replace(' ', '')}.onnx"
    learning = ", ".join(f"{option}: {json.dumps(value)}" for option, value in inputs.items())
    lines = [text.format(percent, learning) for text, percent in RECIPES[name]]
    recipe = file.with_suffix(".yaml")
    recipe.write_text("passes:\n  - fold-bn\n" + "".join(f"  - {line}\n" for line in lines))
    if not file.exists():
        command("run", str(recipe), model, str(file), "--force", "--cache", str(out / "cache-recipes"))
    return file


def scores(file: str | Path, images: Sequence[str | Path], options: Sequence[str]) -> tuple[float, ...]:
    """Measure top-1 accuracy in percent on each set of images."""
    return tuple(
        100 * float(command("evaluate", str(file), "--images", str(one), *options)["top1"])
        for one in images
    )


def show(model: str, before: Sequence[float], rows: Sequence[Made], asked: Sequence[float]) -> None:
    """Time all results together, print them, and the best of each side at each reduction."""
    stopwatch, whole = Stopwatch("cpu"), load(model)
    shares = stopwatch.savings(whole, {str(row.file): load(row.file) for row in rows})
    saved = {row.file: 100 * shares[str(row.file)].value for row in rows}
    print(f"all timed together, by the {stopwatch.parts_clock} clock; the model before: {before[1]:.2f} %")
    print("| by | result | latency | chosen by | test |\n|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: saved[row.file]):
        figures = f"{-saved[row.file]:.1f} % | {row.gate:.2f} % | {row.test:.2f} %"
        print(f"| {row.by} | {row.name} | {figures} |")
    for percent in asked:
        for by in ("search", "recipe"):
            enough = [row for row in rows if row.by == by and saved[row.file] >= percent - WITHIN]
            if enough:
                best = max(enough, key=lambda row: row.gate)
                figures = f"{-saved[best.file]:.1f} %, {best.test:.2f} %"
                print(f"{percent:g} % less, best {by}: {best.name}, {figures}")


@cli.command()
@click.argument("model")
@click.option("--trials", default=12)
@click.option("--repairs", default=3)
@FOLDER
def resume(model: str, trials: int, repairs: int, out: Path) -> None:
    """Fronts of searches that were killed, against that of an undisturbed one."""
    options = ["--trials", f"{trials}", "--repairs", f"{repairs}", "--effort", "fast", "--max-size", "1000"]
    own = [*options, "--latency-seconds", "1", "--inputs", "procedural"]
    first = out / "undisturbed"
    expected = front_of(searched(model, first, [*own, "--cache", f"{first}-cache"])[0])
    print(f"undisturbed: {', '.join(name for name, *_ in expected)}")
    for kind, count in (("proxies", 2), ("proxies", trials // 2), ("repaired", 1)):
        folder = out / f"killed-{kind}-{count}"
        take_measured(first, folder)
        cached = [*own, "--cache", f"{folder}-cache"]
        call = search_call(model, folder, cached)
        with subprocess.Popen(call, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            left = killed_behind(process, folder / "work" / kind, count)
        found = front_of(searched(model, folder, cached)[0])
        same = "the same front" if found == expected else f"ANOTHER FRONT: {found}"
        print(f"killed with {left} results in {kind}, gone on with: {same}", flush=True)


def front_of(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Names, recipes and hashes of a front, and what marks the one to take."""
    return [
        (row["candidate"] + " *" * row["picked"], Path(row["recipe"]).read_text(), row["sha256"])
        for row in found["front"]
    ]


def take_measured(source: Path, target: Path) -> None:
    """Give a search the latencies that another has measured, and nothing else of it."""
    (target / "work").mkdir(parents=True, exist_ok=True)
    for name in ("latencies.json", "contenders-latency.json", "front-latency.json"):
        shutil.copy(source / "work" / name, target / "work" / name)


def killed_behind(process: subprocess.Popen[bytes], folder: Path, count: int) -> int:
    """Kill a search with its workers soon after so many results lie there; returns how many then do."""
    while process.poll() is None and len(list(folder.glob("*.json"))) < count:
        time.sleep(0.05)
    time.sleep(0.5)  # into the work on the next
    if process.poll() is not None:
        raise SystemExit("the search ended before it was killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(list(folder.glob("*.json")))


@cli.command()
@click.argument("model")
@click.option("--runs", default=12)
@click.option("--pass", "pass_", default="quantize", help="What a run carries out, behind fold-bn.")
@FOLDER
def cluster(model: str, runs: int, pass_: str, out: Path) -> None:
    """Throughput of a sweep on two nodes over that on one, beside two processes over one."""
    from onnxcompress.search.plan import read_plan
    from onnxcompress.search.ray_workers import RayWorkers
    from onnxcompress.search.results import Results
    from onnxcompress.search.sweep import sweep
    from onnxcompress.search.workers import Processes, Workers

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    chain = f"[fold-bn, {pass_}: {{inputs: procedural, seed: '${{seed}}'}}]"
    (out / "recipe.yaml").write_text(f"variables: {{seed: 0}}\npasses: {chain}\n")
    seeds = f"variables: {{seed: {list(range(runs))}}}\nlatency_seconds: 0\n"
    (out / "plan.yaml").write_text(f"models: [{Path(model).resolve()}]\nrecipes: [recipe.yaml]\n{seeds}")
    plan = read_plan(out / "plan.yaml")

    def timed(name: str, workers: Workers, report: Callable[[Any], None] = lambda rows: None) -> list[Any]:
        start = time.monotonic()
        rows = sweep(plan, Results(out / name), workers, report=report)
        seconds[name] = time.monotonic() - start
        done = sum(row["status"] == "done" for row in rows)
        print(f"{name}: {done} of {len(rows)} done in {seconds[name]:.1f} s", flush=True)
        return [(row["status"], row.get("sha256")) for row in rows]

    seconds: dict[str, float] = {}
    outcomes = [timed(f"{jobs} processes", Processes(jobs)) for jobs in (1, 2)]
    with local_nodes(1) as nodes, connected(RayWorkers, nodes.address) as workers:
        outcomes.append(timed("1 nodes", workers))
    with local_nodes(2) as nodes, connected(RayWorkers, nodes.address) as workers:
        outcomes.append(timed("2 nodes", workers))
        outcomes.append(timed("2 nodes, 1 killed", workers, kills(nodes)))
    print(f"all equal to the local results: {all(one == outcomes[0] for one in outcomes)}")
    by_nodes, by_processes = (
        seconds[f"1 {kind}"] / seconds[f"2 {kind}"] for kind in ("nodes", "processes")
    )
    print(f"throughput of two over one: nodes {by_nodes:.2f}, processes {by_processes:.2f}")


@contextmanager
def local_nodes(count: int) -> Iterator[Any]:
    """A cluster on this machine: nodes of one CPU each, and a head without one."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.own = [nodes.add_node(num_cpus=1) for _ in range(count)]
    nodes.wait_for_nodes()
    try:
        yield nodes
    finally:
        nodes.shutdown()


@contextmanager
def connected(kind: Any, address: str) -> Iterator[Any]:
    """Workers of a cluster, which is left at the end."""
    workers = kind(address)
    try:
        yield workers
    finally:
        workers.close()


def kills(nodes: Any) -> Callable[[Any], None]:
    """What kills a node as soon as two runs are done."""

    def look(rows: Sequence[dict[str, Any]]) -> None:
        if len(nodes.own) > 1 and sum(row["status"] == "done" for row in rows) >= 2:
            nodes.remove_node(nodes.own.pop(), allow_graceful=False)

    return look


def searched(model: str, folder: Path, options: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Search, or read what a search found; returns its JSON and the seconds that it took."""
    account = folder / "account.json"
    if not account.exists():
        start = time.monotonic()
        done = subprocess.run(search_call(model, folder, options), stdout=subprocess.PIPE, check=False)
        if done.returncode not in (0, 3):
            raise SystemExit(done.returncode)
        seconds = time.monotonic() - start
        account.write_text(json.dumps(json.loads(done.stdout) | {"seconds": seconds}))
    found: dict[str, Any] = json.loads(account.read_text())
    return found, float(found["seconds"])


def search_call(model: str, folder: Path, options: Sequence[str]) -> list[str]:
    """The command line of a search."""
    return [*COMMAND, "search", model, "--out", str(folder), "--provider", "cpu", *options, "--json"]


COMMAND = (sys.executable, "-m", "onnxcompress.cli.main")


def command(*argv: str) -> dict[str, Any]:
    """Run a command of ours; returns its JSON."""
    done = subprocess.run([*COMMAND, *argv, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: the target is missed, which the table shows
        raise SystemExit(f"{' '.join(argv)}: exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    cli()
