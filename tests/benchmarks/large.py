"""Memory and time of `inspect` and `fold-bn` on a network of 3 GB whose weights lie in external data.

    python tests/benchmarks/large.py [--gigabytes 3] [--folder DIR]

Layers are convolutions with a BatchNorm each, of 128 MB. Peak memory is the kernel's maximum resident set
of the whole process; pages of files that are only mapped count too. Takes twice the size on the disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

COMMANDS = {
    "inspect": ["inspect", "in.onnx", "--json"],
    "fold-bn": ["fold-bn", "in.onnx", "out.onnx", "-q", "--no-verify"],
}
CHANNELS, TAPS = 1024, 32
"""A weight has CHANNELS * CHANNELS * TAPS floats: 128 MB."""
LIMIT = 2.0
"""Peak memory over the size of the model."""


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option("--gigabytes", default=3.0, show_default=True)
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Where there is room.")
def main(gigabytes: float, folder: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        make = [sys.executable, __file__, "--make", work, str(gigabytes)]
        subprocess.run(make, check=True)  # numpy's memory goes with it: a child counts its parent's
        size = sum(p.stat().st_size for p in Path(work).iterdir())
        click.echo(f"{size / 1e9:.2f} GB; limit {LIMIT:g} times that in memory")
        worst = 0.0
        for name, argv in COMMANDS.items():
            seconds, peak = measure(argv, work)
            worst = max(worst, peak / size)
            click.echo(
                f"{name:10}{seconds:8.1f} s, peak {peak / 1e9:.2f} GB, {peak / size:.2f} times the size"
            )
    if worst > LIMIT:
        raise click.ClickException(f"{worst:.2f} times the size in memory, over {LIMIT:g}")


def measure(argv: list[str], work: str) -> tuple[float, int]:
    """Seconds, and peak memory in bytes, of a whole process."""
    command = [sys.executable, "-m", "onnxcompress.cli.main", *argv]
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise click.ClickException(f"exit code {child.returncode}: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit


def make(work: Path, gigabytes: float) -> None:
    """in.onnx and in.data."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    count = CHANNELS * CHANNELS * TAPS
    nodes, tensors, x = [], [], "x"
    with (work / "in.data").open("wb") as data:
        for at in range(max(1, round(gigabytes * 1e9 / (4 * count)))):
            weight = rng.standard_normal(count, dtype=np.float32)
            proto = TensorProto(
                name=f"w{at}", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
            )
            proto.dims.extend([CHANNELS, CHANNELS, TAPS, 1])
            for key, value in (("location", "in.data"), ("offset", data.tell()), ("length", 4 * count)):
                proto.external_data.add(key=key, value=str(value))
            data.write(weight.data)
            tensors.append(proto)
            nodes.append(helper.make_node("Conv", [x, f"w{at}"], [f"c{at}"], pads=[16, 0, 15, 0]))
            norm = [f"{n}{at}" for n in "gbmv"]
            tensors += [
                numpy_helper.from_array(rng.uniform(0.5, 1.5, CHANNELS).astype("f4"), n) for n in norm
            ]
            nodes.append(helper.make_node("BatchNormalization", [f"c{at}", *norm], [f"n{at}"]))
            x = f"n{at}"
    image = [1, CHANNELS, 8, 8]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, image) for n in ("x", x)]
    graph = helper.make_graph(nodes, "large", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (work / "in.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
