"""Time of commands that need no data, over graphs of more and more nodes.

    python tests/benchmarks/size.py [--nodes 1250,2500,5000,10000,20000] [--only fold-bn,inspect]

Seconds are those of the CPU, of a whole process with one thread, on a chain of residual blocks (Conv,
BatchNorm, Relu, Conv, BatchNorm, Add, Relu; 4 channels, 8 by 8 pixels). What is subtracted is the time on a
graph of one block: start and imports. The exponent is the slope of log(time) over log(nodes), by least
squares: 1 is linear.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 4
BLOCK = 7
"""Nodes of a residual block."""
COMMANDS: dict[str, tuple[list[str], bool]] = {
    "inspect": (["inspect", "{source}", "--json"], False),
    "fold-bn": (["fold-bn", "{source}", "{target}", "-q", "--no-verify"], False),
    "equalize": (["equalize", "{source}", "{target}", "-q", "--no-verify"], True),
    "absorb-bias": (["absorb-bias", "{source}", "{target}", "-q"], True),
}
"""Name -> (arguments, whether its input is folded first)."""


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option("--nodes", default="1250,2500,5000,10000,20000", show_default=True)
@click.option("--only", default="inspect,fold-bn,equalize,absorb-bias", show_default=True)
def main(nodes: str, only: str) -> None:
    sizes = [int(n) for n in nodes.split(",")]
    click.echo(f"{'':14}{'nodes':>8}{'seconds':>9}{'ms a node':>11}")
    for name in only.split(","):
        start = measure(name, BLOCK)
        seconds = [measure(name, n) - start for n in sizes]
        for n, took in zip(sizes, seconds, strict=True):
            click.echo(f"{name:14}{n:8}{took:9.2f}{1e3 * took / n:11.3f}")
        click.echo(f"{name:14}exponent {slope(sizes, seconds):.2f}, and {start:.2f} s for one block")


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Of log(seconds) over log(sizes), by least squares; nan where there is one size."""
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-3)), 1)[0])


def measure(name: str, nodes: int) -> float:
    """Seconds of a command on a chain of about `nodes` nodes."""
    arguments, folded = COMMANDS[name]
    nodes = nodes * BLOCK // (BLOCK - 2) if folded else nodes  # folding leaves as many as were asked for
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        onnx.save(chain(nodes), source)
        if folded:
            run(["fold-bn", str(source), str(target), "-q", "--no-verify"])
            os.replace(target, source)
        return run([a.format(source=source, target=target) for a in arguments])


def run(arguments: list[str]) -> float:
    """Seconds of the CPU that a whole process takes."""
    command = [sys.executable, "-m", "onnxcompress.cli.main", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise click.ClickException(f"exit code {child.returncode}: {' '.join(command)}")
    return usage.ru_utime + usage.ru_stime


def chain(nodes: int, *, channels: int = CHANNELS, seed: int = 0) -> onnx.ModelProto:
    """Residual blocks one after the other, `nodes` nodes up to a block more."""
    rng = np.random.default_rng(seed)
    made: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weight(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv_norm(at: str, x: str) -> str:
        w = weight(f"{at}.w", rng.normal(size=(channels, channels, 3, 3)) / (3 * channels**0.5))
        made.append(helper.make_node("Conv", [x, w], [f"{at}.c"], f"{at}.conv", pads=[1, 1, 1, 1]))
        norm = [weight(f"{at}.{n}", rng.uniform(0.5, 1.5, channels)) for n in "gbmv"]
        made.append(helper.make_node("BatchNormalization", [f"{at}.c", *norm], [f"{at}.n"], f"{at}.bn"))
        return f"{at}.n"

    x = "x"
    for number in range(max(1, -(-nodes // BLOCK))):
        at = f"blocks.{number}"
        inner = conv_norm(f"{at}.1", x)
        made.append(helper.make_node("Relu", [inner], [f"{at}.r"], f"{at}.relu"))
        inner = conv_norm(f"{at}.2", f"{at}.r")
        made.append(helper.make_node("Add", [inner, x], [f"{at}.a"], f"{at}.add"))
        made.append(helper.make_node("Relu", [f"{at}.a"], [f"{at}.y"], f"{at}.out"))
        x = f"{at}.y"
    made.append(helper.make_node("GlobalAveragePool", [x], ["y"], "pool"))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, 8, 8])
    pooled = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", channels, 1, 1])
    graph = helper.make_graph(made, "chain", [image], [pooled], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    main()
