"""What tests/benchmarks/gpu.py measures, a function for each part."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from onnxcompress.errors import CompressError
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.model import Model
from onnxcompress.runtime.block_latency import Share, added, latency_shares
from onnxcompress.runtime.latency import Ratio, Timing, benchmark, ratio
from onnxcompress.runtime.providers import Provider, ProviderOptions, full_name
from onnxcompress.runtime.session import session
from tests.benchmarks.gpu_networks import NETWORKS, read

MOST = 4
"""Blocks that are dropped, at most."""


@dataclass
class Bench:
    """What is asked for, and what was found so far."""

    folder: Path
    provider: str
    batch: int
    seconds: float
    images: int
    steps: int
    """Of the published procedure, a block."""
    blocks: int
    """That the published procedure scores."""
    threads: int
    """Of onnxruntime on a CPU."""
    json: Path | None
    found: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def model(self, name: str, *, folded: bool = True) -> Model:
        from onnxcompress.passes.fold_bn import FoldBatchNorm

        model = Model.from_proto(read(self.folder / f"{name}.onnx"), name)
        if folded:
            FoldBatchNorm().apply(model)
        return model

    def timed(self, models: Mapping[str, Any], provider: Provider) -> dict[str, Timing]:
        """Interleaved; each session's first provider is the one asked for, and it ran nodes."""
        wanted = full_name(provider.name)
        assert session(next(iter(models.values())), provider=provider).get_providers()[0] == wanted
        found = benchmark(
            models, provider=provider, batch=self.batch, threads=self.threads, seconds=self.seconds,
            tolerance=0.003,
        )  # fmt: skip
        for one in found.values():
            assert one.placement.nodes.get(wanted), f"{one.name}: {one.placement.nodes}"
        return found

    def row(self, part: str, what: str, value: str) -> None:
        self.rows.append((part, what, value))
        print(f"{part}: {what}: {value}", flush=True)

    def keep(self, part: str, what: str, value: Any) -> None:
        self.found.setdefault(part, {})[what] = value

    def save(self) -> None:
        if self.json is not None:
            self.json.write_text(json.dumps(self.found | {"table": self.rows}, indent=1, default=str))


def timer(bench: Bench) -> None:
    from onnxcompress.runtime.timer_check import check_timer

    for name in NETWORKS:
        for graph in (False, True) if bench.provider == "cuda" else (False,):
            how = Provider(bench.provider, ProviderOptions(cuda_graph=graph))
            found = check_timer(
                bench.model(name), provider=how, batch=bench.batch, threads=bench.threads, runs=30
            )
            what = f"{name}, {how.text}"
            verdict = "within" if abs(found.gap) < 0.03 else "BEYOND"
            text = f"{found.ours_ms:.3f} ms, {found.timer} {found.other_ms:.3f} ms"
            bench.row("timer", what, f"{text}: {100 * found.gap:+.2f} % ({verdict} 3 %)")
            bench.keep("timer", what, vars(found))


def drop(bench: Bench) -> None:
    provider = Provider(bench.provider)
    for name in NETWORKS:
        model = bench.model(name)
        blocks = find_blocks(model).blocks
        start = time.perf_counter()
        shares = latency_shares(
            model,
            blocks,
            provider=provider,
            batch=bench.batch,
            threads=bench.threads,
            seconds=bench.seconds,
        )
        took = time.perf_counter() - start
        costly = sorted(shares, key=lambda e: -shares[e].value)
        timings = bench.timed(_without(model, costly, MOST), provider)
        whole = timings["0"]
        values = [100 * s.value for s in shares.values()]
        span = f"shares {min(values):.1f} to {max(values):.1f} %, mean {sum(values) / len(values):.1f} %"
        text = f"{whole.median_ms:.3f} ms, {whole.device}; {span} (all in {took:.0f} s)"
        bench.row("drop", f"{name}, {len(blocks)} blocks", text)
        if whole.clocks is not None:
            bench.row("drop", f"{name}, clocks", f"{whole.clocks.text} {whole.clocks.drift}")
        bench.keep(
            "drop", name, {"whole": whole.as_dict(), "shares": {e: vars(s) for e, s in shares.items()}}
        )
        for count in range(1, len(timings)):
            less = ratio(whole, timings[str(count)])
            total = added(shares[e] for e in costly[:count])
            text = f"{_less(less)} less; the shares' sum is {_share(total)}"
            bench.row("drop", f"{name} without {count}", text)
            found = {"ratio": vars(less), "predicted": vars(total)}
            bench.keep("drop", f"{name} without {count}", found)


def tensorrt(bench: Bench) -> None:
    model = bench.model("resnet34")
    exits = [b.exit for b in find_blocks(model).blocks]
    variants = _without(model, exits[1:], 3)
    with tempfile.TemporaryDirectory() as folder:
        for fp16 in (False, True):
            how = Provider("tensorrt", ProviderOptions(fp16=fp16, cache=folder))
            timings = bench.timed(variants, how)
            for count, one in timings.items():
                text = f"{one.median_ms:.3f} ms, {_less(ratio(timings['0'], one))} less"
                bench.row("tensorrt", f"resnet34 without {count}{', fp16' if fp16 else ''}", text)
                bench.keep("tensorrt", f"{count} fp16={fp16}", one.as_dict())


def precision(bench: Bench) -> None:
    from onnxcompress.passes.quantize import Quantize

    for name in NETWORKS:
        models = {"float32": bench.model(name)}
        models |= {kind: bench.model(name, folded=False) for kind in ("fp16", "W8A8")}
        half = _half(bench, models["fp16"])
        Quantize(reconstruct=False, stretch=False, inputs="procedural", synthetic=8).apply(models["W8A8"])
        error = 100 * half["runtime"]["error"]
        kept = len(half["kept_float32"])
        bench.row("precision", f"{name}, fp16", f"outputs off by {error:.2g} %, {kept} nodes float32")
        for tf32 in (True, False) if bench.provider == "cuda" else (True,):
            timings = bench.timed(models, Provider(bench.provider, ProviderOptions(tf32=tf32)))
            for kind in ("fp16", "W8A8"):
                found, one = ratio(timings["float32"], timings[kind]), timings[kind]
                left = len(one.placement.computed_on_cpu)
                text = f"{found.value:.3f} of float32's time ({found.low:.3f} to {found.high:.3f})"
                text += f"; {left} nodes computed on the CPU" if left else ""
                bench.row("precision", f"{name}, {kind}, {one.device}", text)
                bench.keep("precision", f"{name} {kind} tf32={tf32}", {"ratio": vars(found), "fp16": half})


def _half(bench: Bench, model: Model) -> dict[str, Any]:
    """To fp16 in place, however far the outputs of random weights are off; what was measured."""
    from onnxcompress.passes.fp16 import HalfPrecision

    one = HalfPrecision(provider=bench.provider, threads=bench.threads, max_error=0.99)
    return one.apply(model).measured_json()


def scoring(bench: Bench) -> None:
    import torch

    from onnxcompress.graph.topology import Topology
    from onnxcompress.optimize.block_drop.recoverability import SCORING_IMAGES, Scorer, probe
    from onnxcompress.optimize.device import pick_device
    from onnxcompress.optimize.executor import Executor
    from tests.benchmarks.practise import published_recoverability

    device = pick_device("cpu" if bench.provider == "cpu" else "cuda")
    model = bench.model("resnet34")
    blocks = find_blocks(model).blocks
    source, feature = model.graph.inputs[0].name, Topology(model).feature()
    assert feature is not None
    shape = (bench.images, *model.graph.inputs[0].shape[1:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last).to(device)
    executor = Executor.from_model(model, device=device)
    probe(executor, x[:8], source, feature.name)  # libraries load
    start = time.perf_counter()
    target = probe(executor, x[:SCORING_IMAGES], source, feature.name)
    scorer = Scorer(model, blocks, target, executor=executor)
    losses = {block.name: scorer.recover(block).loss for block in blocks}
    ours = time.perf_counter() - start
    latency_shares(model, blocks, provider=bench.provider, batch=bench.batch, threads=bench.threads)
    both = time.perf_counter() - start
    chosen = blocks[1 : 1 + bench.blocks]
    start = time.perf_counter()
    for block in chosen:
        published_recoverability(model, block, x, source, feature.name, steps=bench.steps, device=device)
    theirs = (time.perf_counter() - start) * len(blocks) / len(chosen)
    what = f"resnet34, {len(blocks)} blocks, {bench.images} images, {device}"
    bench.row("scoring", what, f"{ours:.1f} s, with the shares {both:.1f} s")
    what = f"published, {bench.steps} steps a block, {len(chosen)} of {len(blocks)} run"
    ratios = f"{theirs / ours:.1f} × ours, {theirs / both:.1f} × ours with the shares"
    bench.row("scoring", what, f"{theirs:.1f} s for all: {ratios}")
    found = {"ours": ours, "with_shares": both, "published": theirs, "losses": losses}
    bench.keep("scoring", "resnet34", found)


PARTS: dict[str, Callable[[Bench], None]] = {
    "timer": timer, "drop": drop, "precision": precision, "scoring": scoring, "tensorrt": tensorrt
}  # fmt: skip


def run(bench: Bench, parts: list[str]) -> int:
    """Run the parts, then print the table; 1 where one failed."""
    bench.found["versions"] = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    failed = False
    for part in parts:
        start = time.perf_counter()
        try:
            PARTS[part](bench)
        except (CompressError, AssertionError, RuntimeError) as error:
            failed = True
            bench.row(part, "FAILED", " ".join(str(error).split())[:300])
        bench.row(part, "took", f"{time.perf_counter() - start:.0f} s")
        bench.save()
    print(f"\n{bench.provider}, batch {bench.batch}, onnxruntime {onnxruntime.__version__}")
    width = max(len(what) for _, what, _ in bench.rows)
    for part, what, value in bench.rows:
        print(f"{part:10} {what:{width}}  {value}")
    return int(failed)


def _without(model: Model, exits: list[str], most: int) -> dict[str, Model]:
    """The model without the first 0, 1, … of these blocks."""
    variants = {str(count): model.copy() for count in range(min(most, len(exits)) + 1)}
    for count, variant in variants.items():
        drop_blocks(variant, exits[: int(count)])
    return variants


def _less(found: Ratio) -> str:
    value, low, high = (100 * (1 - v) for v in (found.value, found.high, found.low))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def _share(found: Share) -> str:
    return f"{100 * found.value:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"
