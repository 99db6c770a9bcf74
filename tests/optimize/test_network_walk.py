"""The walk of teacher and student: what it holds, in which sections, and that batches change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor import walk_plan as plan
from onnxcompress.optimize.executor.network_walk import NetworkWalk
from onnxcompress.optimize.executor.walk_plan import Step, sections
from onnxcompress.optimize.reconstruction.quantize import Quantizer, Settings
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)
    p = MaxPool<kernel_shape=[4,4], strides=[4,4]>(r)
    c = Conv<pads=[1,1,1,1]>(p, w1, b1) d = Relu(c) e = Conv<pads=[1,1,1,1]>(d, w2, b2) s = Add(p, e)
    t = Relu(s) g = GlobalAveragePool(t) f = Flatten(g) y = Gemm<transB=1>(f, w3, b3)"""


def network() -> Model:
    """Large tensors, then a block on small ones."""
    arrays = {"w0": weight(16, 3, 3, 3), "w1": weight(16, 16, 3, 3, seed=1), "b1": weight(16, seed=2)}
    arrays |= {"w2": weight(16, 16, 3, 3, seed=3), "b2": weight(16, seed=4), "b0": weight(16, seed=5)}
    arrays |= {"w3": weight(10, 16, seed=6), "b3": weight(10, seed=7)}
    return Model.from_proto(graph("(float[N,3,16,16] x) => (float[N,10] y)", BODY, arrays))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Watched(NetworkWalk):
    """Notes how many images go node by node at each node, and the bytes that are held behind it."""

    def visit(self, step: Step) -> None:
        """Visit the node.

        Args:
            step: The node.
        """
        super().visit(step)
        seen = self.__dict__.setdefault("seen", {})
        held = {id(t): t for b in self.all_batches for own in (b.teacher, b.student) for t in own.values()}
        seen[step.outputs[0]] = sum(b.images for b in self.batches), sum(t.nbytes for t in held.values())


def test_where_tensors_are_large_fewer_images_go_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images (3 x 256 numbers each) and the output of the first layer (16 x 256) against 16 x 16."""
    model, x = network(), images(40)
    monkeypatch.setattr(plan, "MEMORY", 4 * 2 * 40 * 3 * 256 * 2)
    monkeypatch.setattr(plan, "HANDOVER", 0.5)
    walk = Watched(model, batch=4)
    walk.own = {"b0": walk.executor.parameters["b0"] + 1}
    walk.pass_through(x, "")
    counts = {name: count for name, (count, _) in walk.__dict__["seen"].items()}
    assert counts["a"] == counts["r"] == counts["p"] == 12
    assert {count for name, count in counts.items() if name not in "arp"} == {40}
    assert max(held for _, held in walk.__dict__["seen"].values()) <= plan.MEMORY


def test_all_images_reach_the_end_of_a_part_whatever_the_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), images(20)
    executor = Executor.from_model(model)
    changed = {"b0": executor.parameters["b0"] + 1}
    for memory in (1 << 30, 200_000):
        monkeypatch.setattr(plan, "MEMORY", memory)
        walk = Watched(model, stop="t", batch=3)
        walk.own = dict(changed)
        walk.pass_through(x, "")
        assert (walk.__dict__["seen"]["a"][0] < 20) == (memory < 1 << 30)
        ours, theirs = (
            torch.cat([getattr(batch, own)["t"] for batch in walk.all_batches])
            for own in ("student", "teacher")
        )
        with torch.no_grad():
            torch.testing.assert_close(theirs, executor.run({"x": x}, ["t"])["t"])
            torch.testing.assert_close(ours, executor.run({"x": x}, ["t"], changed)["t"])
        assert all(batch.teacher.keys() == batch.student.keys() == {"t"} for batch in walk.all_batches)


def test_a_student_without_a_block_reads_what_lies_before_it() -> None:
    model, x = network(), images(8)
    student = model.copy()
    drop_blocks(student, [find_blocks(model).blocks[0].exit])
    walk = NetworkWalk(model, student=student, stop="f", batch=4)
    walk.pass_through(x, "")
    for own, network_ in (("teacher", model), ("student", student)):
        with torch.no_grad():
            wanted = Executor.from_model(network_).run({"x": x}, ["f"])["f"]
        torch.testing.assert_close(torch.cat([getattr(b, own)["f"] for b in walk.all_batches]), wanted)


def test_results_are_shared_until_the_student_differs() -> None:
    walk = NetworkWalk(network(), stop="t", batch=4)
    walk.own = {"b1": walk.executor.parameters["b1"] + 1}
    for step in walk.go(images(4)):
        (batch,) = walk.all_batches
        shared = all(batch.teacher[name] is batch.student[name] for name in batch.teacher)
        assert shared == (step.outputs[0] in "arp")


def test_layers_behind_large_tensors_are_fitted_on_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundredth of the memory the last layers lose hardly more."""
    model, x = network(), images(64)
    noise = []
    for memory in (1 << 30, 1_500_000):
        monkeypatch.setattr(plan, "MEMORY", memory)
        worker = Quantizer(model, make_plan(model, Bits(4, 8, 8)), Settings(batch=4))
        noise.append(list(worker.run(x).noise.values()))
    assert noise[0] != noise[1]
    assert noise[1][1:] == pytest.approx(noise[0][1:], rel=0.2)


def test_sections_hold_what_they_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MEMORY", 100_000)
    walk = NetworkWalk(network())
    found = sections(walk.steps, 50)
    assert [step for section in found for step in section.steps] == walk.steps
    before = 0
    for section in found:
        peak = max(step.held for step in section.steps)
        others = 50 * max(before, section.steps[-1].behind)
        assert 8 * (peak * section.images + others) <= 100_000 or section.images == 1
        before = section.steps[-1].behind
    assert [section.images for section in sections(walk.steps, 1)] == [1]


def test_batches_of_an_executor_come_in_order_and_keep_their_layout() -> None:
    model, x = network(), images(10).contiguous(memory_format=torch.channels_last)
    executor = Executor.from_model(model)
    with torch.no_grad():
        whole = executor.run({"x": x}, ["r", "y"])
    made = executor.run_batched({"x": x}, ["r", "y"], count=10, batch=4)
    for name in ("r", "y"):
        torch.testing.assert_close(made[name], whole[name])
        assert made[name].stride() == whole[name].stride()
        assert not made[name].requires_grad
    sizes = list(executor.map_batches({"x": x}, ["y"], lambda own: len(own["y"]), count=10, batch=4))
    assert sizes == [4, 4, 2]
