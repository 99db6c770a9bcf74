"""Where the time of commands that learn goes: each stage, its share, and what the machine could do it in.

    python -m tests.benchmarks.stages NET.onnx --preprocess cifar10 [--only quantize,prune] [--effort fast]

One thread computes, so figures are processor seconds and hold on a busy machine, too. Stages are those that
the progress display names. The floor of a stage is the sum over torch's operators of the longer of

    floating-point operations / rate of a large matrix product,   bytes read and written / rate of a copy

both rates measured first. Time above the floor is overhead of small operators, Python, numpy and
onnxruntime, whose work is not counted. Counting takes a second run of each; --no-floors leaves it out.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from onnxcompress.api.making import synthesize
from onnxcompress.model import load
from onnxcompress.passes import load_pass
from onnxcompress.pipeline import Pipeline
from onnxcompress.progress import Progress

COMMANDS: dict[str, dict[str, Any]] = {
    "quantize": {},
    "prune": {"sparsity": 0.5},
    "drop-blocks": {"blocks": 2},
    "synthesize": {"count": 128},
}
OTHER = "before, between and after"
GATHERS = (torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather)
"""Operators that read no more than what they give."""


class Floors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the least time of all operators of torch that run inside."""

    def __init__(self, operations: float, bytes_: float) -> None:
        """Start at 0.

        Args:
            operations: Floating-point operations a second.
            bytes_: Bytes read or written a second.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.bytes = operations, bytes_
        self.seconds = 0.0

    def total(self) -> float:
        """Return the seconds so far."""
        return self.seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and add its least time; views take none."""
        result = func(*args, **(kwargs or {}))
        if any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns):
            return result
        touched = (result, result) if func._overloadpacket in GATHERS else (args, kwargs, result)
        moved = sum(t.nbytes for t in tree_leaves(touched) if isinstance(t, torch.Tensor))
        work = 0
        if func._overloadpacket is torch.ops.aten.convolution_backward:  # torch counts all groups as one
            (slopes, _, weight), needed = args[:3], args[-1]
            work = 2 * slopes.numel() * weight[0].numel() * sum(needed[:2])
        elif count := flop_registry.get(func._overloadpacket):
            work = count(*args, **(kwargs or {}), out_val=result)
        self.seconds += max(work / self.operations, moved / self.bytes)
        return result


def by_stage(run: Callable[[Progress], object], clock: Callable[[], float]) -> dict[str, float]:
    """Run something that reports its progress, and add up what a clock shows for each stage.

    Args:
        run: Takes the progress callback; a step is reported when it is done.
        clock: Seconds so far.

    Returns:
        Seconds by stage.
    """
    spent: dict[str, float] = defaultdict(float)
    last = clock()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = clock()
        spent[stage if done else OTHER] += now - last
        last = now

    run(progress)
    progress(OTHER, 0, 0)
    return spent


def rates() -> tuple[float, float]:
    """Measure this machine on one thread.

    Returns:
        Floating-point operations a second of a matrix product, and bytes a second of a copy.
    """
    a, big = torch.randn(1024, 1024), torch.randn(1 << 24)
    room = torch.empty_like(big)

    def fastest(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    return 2 * 1024**3 / fastest(lambda: a @ a), 2 * big.nbytes / fastest(lambda: room.copy_(big))


def work(name: str, net: str, preprocess: str | None, effort: str) -> Callable[[Progress], object]:
    """Prepare a command.

    Args:
        name: One of COMMANDS.
        net: Path of the network.
        preprocess: As --preprocess.
        effort: As --effort; `synthesize` has none.

    Returns:
        Carries the command out; takes the progress callback.
    """
    if name == "synthesize":
        return lambda progress: synthesize(
            net, **COMMANDS[name], preprocess=preprocess, device="cpu", progress=progress
        )
    pass_ = load_pass(name)(**COMMANDS[name], preprocess=preprocess, effort=effort)  # type: ignore[call-arg]
    return partial(Pipeline([pass_]).run, load(net))


@click.command(help=__doc__)
@click.argument("net", type=click.Path(exists=True, dir_okay=False))
@click.option("--preprocess", default=None)
@click.option("--only", default=",".join(COMMANDS), show_default=True)
@click.option("--effort", default="auto", show_default=True)
@click.option("--floors/--no-floors", default=True)
def main(net: str, preprocess: str | None, only: str, effort: str, floors: bool) -> None:
    """Print a table for each command."""
    operations, bytes_ = rates()
    click.echo(f"{operations / 1e9:.0f} GFLOP/s, {bytes_ / 1e9:.1f} GB/s on one thread")
    for name in only.split(","):
        run = work(name, net, preprocess, effort)
        spent, least = by_stage(run, time.process_time), {}
        if floors:
            counted = Floors(operations, bytes_)
            with counted:
                least = by_stage(run, counted.total)
        whole = sum(spent.values())
        click.echo(f"\n{name}: {whole:.1f} s, at least {sum(least.values()):.1f} s")
        for stage, seconds in sorted(spent.items(), key=lambda item: -item[1]):
            floor = f"{least[stage]:8.1f} s" if stage in least else ""
            click.echo(f"  {stage:44}{seconds:8.1f} s{seconds / whole:7.0%}{floor}")


if __name__ == "__main__":
    main()
