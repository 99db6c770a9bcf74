"""The optimizer on a GPU, as far as a CPU can show it; what needs one is marked `gpu`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from onnxcompress.cli.console import stdout
from onnxcompress.cli.main import main
from onnxcompress.cli.results.drop_blocks import show_drop_blocks
from onnxcompress.errors import CompressWarning, RuntimeUnavailable
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, load
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.block_latency import Additivity, Share, added, additivity_text
from onnxcompress.runtime.session import cuda_devices

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from onnxcompress.optimize.block_drop.recoverability import Scorer, probe  # noqa: E402
from onnxcompress.optimize.device import fitting, pick_device, resident  # noqa: E402
from onnxcompress.optimize.executor import Executor  # noqa: E402
from onnxcompress.optimize.reconstruction.augment import augment, windows  # noqa: E402
from onnxcompress.optimize.reconstruction.feature_loss import Matched, Objective  # noqa: E402
from onnxcompress.optimize.reconstruction.finetune import CHECKS, Schedule, finetune  # noqa: E402
from onnxcompress.optimize.reconstruction.held_out import HeldOut  # noqa: E402

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(scope="module")
def pair(models: Path) -> tuple[Model, Model, str]:
    """A network, the same without a block, and the feature tensor's name in both."""
    model = load(models / "resnet20-fashion.onnx")
    FoldBatchNorm().apply(model)
    feature = Topology(model).feature()
    assert feature is not None
    pruned = model.copy()
    drop_blocks(pruned, [find_blocks(model).blocks[1].exit])
    return model, pruned, feature.name


def images(count: int = 32) -> Any:
    x = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


# what does not fit


def limited(most: int) -> Any:
    """Work that a GPU's memory holds for `most` images, as torch tells it."""

    def work(batch: int) -> int:
        if batch > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return batch

    return work


def test_what_does_not_fit_goes_in_smaller_batches_and_is_said() -> None:
    with pytest.warns(CompressWarning, match="images at once do not fit") as said:
        assert fitting("scoring", 64, limited(10)) == 8
    assert [str(w.message).split()[3] for w in said] == ["32", "16", "8"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitting("scoring", 64, limited(64)) == 64


def test_what_never_fits_is_one_line_with_a_way_out() -> None:
    with (
        pytest.warns(CompressWarning),
        pytest.raises(RuntimeUnavailable, match="use --device cpu") as caught,
    ):
        fitting("scoring", 64, limited(0))
    assert "\n" not in str(caught.value)


def argv(models: Path, out: Path) -> list[str]:
    net, photos = str(models / "resnet20-fashion.onnx"), str(models / "fashion-tiny.npz")
    options = ["--images", photos, "--count", "16", "--steps", "2", "--batch", "16", "--drop", "blocks.1"]
    return ["drop-blocks", net, str(out), *options, "--preprocess", "fashion-mnist", "--provider", "cpu"]


@pytest.mark.slow
def test_fine_tuning_goes_on_with_fewer_images(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    quick_clock: None,
) -> None:  # fmt: skip
    from onnxcompress.optimize.reconstruction import taught_views as module

    def small(x: Any, batch: int, *rest: Any) -> Any:
        return augment(x, limited(8)(batch), *rest)

    monkeypatch.setattr(module, "augment", small)
    assert main(argv(models, tmp_path / "o.onnx")) == 0
    said = capsys.readouterr().err
    assert said.count("note: fine-tuning: more than 8 images at once do not fit") == 1
    assert (tmp_path / "o.onnx").exists()


def test_memory_that_runs_out_elsewhere_is_one_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "onnxcompress.optimize.reconstruction.tuning_inputs.resident"
    monkeypatch.setattr(name, lambda *_: limited(0)(1))
    assert main(argv(models, tmp_path / "o.onnx")) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: out of the GPU's memory; try a smaller --batch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeUnavailable, match="torch sees no GPU"):
        pick_device("cuda")
    if not cuda_devices():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pick_device("auto") == "cpu"


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.optimize.device.cuda_devices", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(CompressWarning, match="optimizing on the CPU"):
        assert pick_device("auto") == "cpu"


# views


@settings(max_examples=25, deadline=None, derandomize=True)
@given(count=st.integers(1, 4), channels=st.integers(1, 3), side=st.integers(2, 7), seed=st.integers(0, 9))
def test_windows_are_the_slices(count: int, channels: int, side: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, channels, 8, 9, generator=generator)
    top, left = (torch.randint(n - side + 1, (count,), generator=generator) for n in (8, 9))
    found = windows(x, top, left, side, side)
    for i in range(count):
        t, s = int(top[i]), int(left[i])
        assert torch.equal(found[i], x[i, :, t : t + side, s : s + side])


def test_half_of_the_views_have_a_rectangle_of_their_neighbour() -> None:
    flat = torch.arange(20.0).view(-1, 1, 1, 1).expand(20, 1, 16, 16).contiguous()  # an image of one value
    views = augment(flat, 12, torch.Generator().manual_seed(4))
    values = [set(view.unique().tolist()) for view in views]
    for i in range(1, 12, 2):
        assert len(values[i]) == 1
    for i in range(0, 12, 2):
        (behind,) = values[i - 1]
        assert behind in values[i]
        rows, columns = (views[i, 0] == behind).nonzero(as_tuple=True)
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert len(values[i]) == 1 or len(rows) == area


def test_a_seed_means_the_same_views() -> None:
    first, second = (augment(images(), 16, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)


# no step asks the device for a number


class _HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what on a GPU makes the host wait: numbers read back, shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_step_reads_back(pair: tuple[Model, Model, str]) -> None:
    model, pruned, feature = pair
    teacher, student = Executor.from_model(model), Executor.from_model(pruned)
    used = {t.name for n in student.needed(["input"], [feature]) for t in n.inputs}
    values = {n: v.clone().requires_grad_() for n, v in student.parameters.items() if n in used}
    matched = Matched("input", (feature, feature))
    loss_of = Objective(student, matched, list(values), [1.0]).loss
    wanted = teacher.run({"input": images()}, [feature])[feature]
    blocks = find_blocks(model).blocks
    scorer = Scorer(model, blocks, probe(teacher, images(), "input", feature), executor=teacher, steps=3)
    assert scorer.probe.energy > 0  # known from here on
    site = scorer.sites[blocks[1].exit]
    with _HostReads() as reads:
        loss_of(images(), wanted, *values.values()).backward()  # type: ignore[no-untyped-call]
        scorer._train(blocks[1], site, site.adapters(teacher.device))
    assert reads.found == []
    with _HostReads() as reads:
        scorer.recover(blocks[1])
    assert reads.found == ["_local_scalar_dense"]  # the block's score


# additivity


def test_shares_add_up_with_their_intervals() -> None:
    total = added([Share(0.1, 0.08, 0.12), Share(0.2, 0.19, 0.22)])
    assert (total.value, total.low, total.high) == pytest.approx((0.3, 0.27, 0.34))
    found = Additivity(total, Share(0.28, 0.26, 0.3))
    assert "add up to 30.0 % (27.0 to 34.0 %), measured are 28.0 %" in additivity_text(found)
    assert "within the intervals" in additivity_text(found)
    assert "do not add up" in additivity_text(Additivity(total, Share(0.2, 0.18, 0.22)))


@pytest.mark.slow
def test_drop_blocks_tells_it_in_json_table_and_report(
    models: Path,
    tmp_path: Path,
    quick_clock: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "r.html"
    words = [w if w != "--drop" else "--blocks" for w in argv(models, tmp_path / "o.onnx")]
    words[words.index("blocks.1")] = "2"
    assert main([*words, "--json", "--report", str(page)]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    shares = {row["name"]: row["latency_share"] for row in measured["blocks"] if row["dropped"]}
    assert len(shares) == 2
    for place, value in enumerate(measured["additivity"]["predicted"]):
        assert value == pytest.approx(sum(share[place] for share in shares.values()))
    assert measured["additivity"]["measured"][0] == pytest.approx(1 - measured["latency"]["ratio"])
    show_drop_blocks(
        stdout(), PassResult(measured=TypeAdapter(DropBlocksFigures).validate_python(measured))
    )
    assert "the blocks' shares τ add up to" in " ".join(capsys.readouterr().out.split())
    assert "shares τ add up to" in page.read_text("utf-8")


# on a GPU


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("captured", [False, True])
def test_fine_tuning_on_the_gpu_never_waits_and_gives_what_the_cpu_gives(
    captured: bool, pair: tuple[Model, Model, str]
) -> None:
    model, pruned, feature = pair
    found = {}
    for device in ("cpu", "cuda"):
        teacher, student = (Executor.from_model(m, device=device) for m in (model, pruned))
        x = resident(images(64), device)
        schedule = Schedule(steps=40, batch=32, learning_rate=1e-3, seed=0, captured=captured, whole=True)
        start: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int, device: str = device) -> None:
            if device == "cuda":  # from the second step on all is planned, and recorded; looks wait
                looks = (done + 1) % (total // CHECKS) == 0 or done == total
                torch.cuda.set_sync_debug_mode("default" if looks else "error")

        with warnings.catch_warnings():
            warnings.simplefilter("error", CompressWarning)
            aside = HeldOut(teacher, x, "input", feature)
            matched = Matched("input", (feature, feature))
            found[device] = finetune(
                student, teacher, matched, x, schedule, aside, start=start, progress=progress
            ).values
    for name, value in found["cpu"].items():
        assert torch.allclose(found["cuda"][name].cpu(), value, atol=0.02 * float(value.abs().max()) + 1e-3)


@pytest.mark.gpu
@GPU
def test_drop_blocks_on_the_gpu(models: Path, tmp_path: Path, quick_clock: None) -> None:
    words = [w if w != "cpu" else "cuda" for w in argv(models, tmp_path / "o.onnx")]
    assert main([*words, "--device", "cuda"]) == 0


@pytest.mark.gpu
@GPU
def test_weights_lie_in_the_order_of_the_gpus_convolutions(pair: tuple[Model, Model, str]) -> None:
    executor = Executor.from_model(pair[0], device="cuda")
    weights = [v for v in executor.parameters.values() if v.dim() == 4]
    assert weights
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in weights)
