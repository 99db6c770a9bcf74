"""Whole processes that fold the BatchNorms of a 100 MB ResNet-50: wall time and peak memory.

    python tests/benchmarks/fold_bn.py [--rounds 7] [--model FILE]

Rows: plain `onnx.load` and `onnx.save` (the yardstick of the ratios), `onnxcompress fold-bn --no-verify`,
onnxoptimizer (its fusions of BatchNorm alone), onnxslim, onnxsim. The processes of a round run one after
the other, so that a slow spell of the machine hits all. Peak memory is the kernel's maximum resident set.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import onnx

PYTHON = {
    "load + save": "import onnx; onnx.save(onnx.load(source), target)",
    "onnxoptimizer": (
        "import onnx, onnxoptimizer as o; "
        "onnx.save(o.optimize(onnx.load(source), "
        "['fuse_bn_into_conv', 'fuse_add_bias_into_conv', 'eliminate_unused_initializer']), target)"
    ),
    "onnxslim": "import onnxslim; onnxslim.slim(source, target)",
    "onnxsim": "import onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(source))[0], target)",
}


@dataclass
class Row:
    """Measurements of one tool."""

    command: list[str]
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    left: int = -1
    """BatchNorms in its output; -1: it failed."""


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--rounds", default=7, show_default=True, help="Runs of each tool, interleaved.")
@click.option("--model", type=click.Path(exists=True, dir_okay=False), help="Instead of the ResNet-50.")
@click.option("--only", multiple=True, help="Tools to run (default: all).")
def main(rounds: int, model: str | None, only: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = model or str(Path(folder, "resnet50.onnx")), str(Path(folder, "out.onnx"))
        if model is None:
            export_resnet50(source)
        rows = {n: Row(c) for n, c in commands(source, target).items() if not only or n in only}
        for number in range(rounds + 1):  # the first round warms the file cache
            for row in rows.values():
                measure(row, target, keep=number > 0)
        click.echo(f"{Path(source).stat().st_size / 1e6:.1f} MB, {rounds} rounds, medians")
        report(rows)


def commands(source: str, target: str) -> dict[str, list[str]]:
    """The command line of each tool, ours second."""
    names = f"source, target = {source!r}, {target!r}; "
    found = {name: [sys.executable, "-c", names + code] for name, code in PYTHON.items()}
    ours = [sys.executable, "-m", "onnxcompress.cli.main", "fold-bn", source, target, "--no-verify", "-q"]
    return {"load + save": found.pop("load + save"), "onnxcompress": ours, **found}


def measure(row: Row, target: str, *, keep: bool) -> None:
    """Run once; the child's own usage gives the memory."""
    Path(target).unlink(missing_ok=True)
    start = time.perf_counter()
    child = subprocess.Popen(row.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0 or not keep:
        return
    row.seconds.append(seconds)
    row.megabytes.append(usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))
    if row.left < 0:
        nodes = onnx.load(target, load_external_data=False).graph.node
        row.left = sum(node.op_type == "BatchNormalization" for node in nodes)


def report(rows: dict[str, Row]) -> None:
    base = next(iter(rows.values()))
    click.echo(f"{'':16}{'seconds':>9}{'min':>7}{'ratio':>7}{'peak MB':>10}{'ratio':>7}{'BN left':>9}")
    for name, row in rows.items():
        if row.left < 0:
            click.echo(f"{name:16} failed")
            continue
        seconds, megabytes = statistics.median(row.seconds), statistics.median(row.megabytes)
        times = seconds / statistics.median(base.seconds)
        memory = megabytes / statistics.median(base.megabytes)
        click.echo(
            f"{name:16}{seconds:9.2f}{min(row.seconds):7.2f}{times:7.2f}{megabytes:10.0f}{memory:7.2f}"
            f"{row.left:9}"
        )


def export_resnet50(path: str) -> None:
    """torchvision's ResNet-50 with random weights and random BatchNorm statistics, BatchNorm kept."""
    subprocess.run([sys.executable, __file__, "--export", path], check=True)  # torch's memory goes with it


def _export(path: str) -> None:
    import torch

    sys.modules.setdefault(
        "torchvision._meta_registrations", types.ModuleType("stub")
    )  # no CPU build has it
    import torchvision

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = torchvision.models.resnet50(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                drawn = rng.uniform(low, high, module.num_features)
                assert values is not None
                values.data = torch.from_numpy(drawn.astype(np.float32))
    torch.onnx.export(
        network, (torch.zeros(1, 3, 224, 224),), path, dynamo=False, do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE, input_names=["input"], output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}}, opset_version=17,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--export"]:
        _export(sys.argv[2])
    else:
        main()
