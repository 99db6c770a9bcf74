"""Channel groups: which layers share channels, and that a group can be scaled where it is said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcompress.graph.channel_groups.groups import ChannelGroup, ChannelGroups, ChannelLabels
from onnxcompress.graph.channel_groups.tracer import find_channel_groups
from onnxcompress.model import Model, load
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.inference import run as outputs
from tests.helpers.channel_scaling import scale_groups
from tests.helpers.folding import Arrays, feeds, graph, weight

IMAGE = "(float[N,4,6,6] x) => (float[N,C,H,W] y)"
VECTOR = "(float[N,4,6,6] x) => (float[N,5] y)"


def groups_of(signature: str, body: str, arrays: Arrays) -> tuple[Model, ChannelGroups]:
    model = Model.from_proto(graph(signature, body, arrays))
    return model, find_channel_groups(model)


def members(group: ChannelGroup) -> set[tuple[str, str]]:
    return {(member.layer.linear.output_name, member.side) for member in group.members}


def inner(groups: ChannelGroups) -> list[ChannelGroup]:
    """The groups that layers both write and read."""
    return [g for g in groups.groups() if {m.side for m in g.members} == {"inputs", "outputs"}]


def test_a_residual_stream_is_one_group_of_all_its_writers_and_readers() -> None:
    arrays = {"w": weight(6, 4, 3, 3), "u": weight(6, 6, 1, 1), "v": weight(3, 6, 1, 1)}
    _, groups = groups_of(
        IMAGE, "a = Conv(x, w) r = Relu(a) c = Conv(r, u) s = Add(a, c) y = Conv(s, v)", arrays
    )
    (stream,) = inner(groups)
    assert members(stream) == {("a", "outputs"), ("c", "inputs"), ("c", "outputs"), ("y", "inputs")}
    assert all((m.channels[:, 0] == np.arange(6)).all() for m in stream.members)
    assert stream.unscalable is None


def test_a_concat_shifts_the_channels_of_its_reader() -> None:
    arrays = {"w": weight(6, 4, 1, 1), "u": weight(2, 4, 1, 1), "v": weight(3, 8, 1, 1)}
    _, groups = groups_of(
        IMAGE, "a = Conv(x, w) b = Conv(x, u) c = Concat<axis = 1>(a, b) y = Conv(c, v)", arrays
    )
    read_at = {next(iter(members(g) - {("y", "inputs")}))[0]: g.members[-1].channels for g in inner(groups)}
    assert read_at["a"].tolist() == [[i] for i in range(6)]
    assert read_at["b"].tolist() == [[6], [7]]


def test_channels_that_a_layer_reads_more_often_are_a_group_of_their_own() -> None:
    """Two of four are read once more behind a pool: five times, the others four."""
    arrays: Arrays = {"w": weight(4, 4, 3, 3), "parts": np.array([2, 2]), "u": weight(5, 4 * 16 + 2)}
    body = (
        "a = Conv(x, w) p = GlobalAveragePool(a) h, i = Split<axis = 1>(p, parts) f = Flatten(a) "
        "g = Flatten(h) k = Concat<axis = 1>(f, g) y = Gemm<transB = 1>(k, u)"
    )
    _, groups = groups_of(VECTOR, body, arrays)
    more, once = inner(groups)
    assert [m.channels.shape for m in more.members] == [(2, 1), (2, 17)]
    assert [m.channels.shape for m in once.members] == [(2, 1), (2, 16)]
    assert more.members[1].channels[:, -1].tolist() == [64, 65]


def test_a_gemm_behind_a_flatten_reads_each_channel_once_per_pixel() -> None:
    arrays = {"w": weight(3, 4, 3, 3), "u": weight(5, 3 * 4 * 4)}
    _, groups = groups_of(VECTOR, "a = Conv(x, w) f = Flatten(a) y = Gemm<transB = 1>(f, u)", arrays)
    (group,) = inner(groups)
    (gemm,) = (m for m in group.members if m.side == "inputs")
    assert gemm.channels.tolist() == np.arange(48).reshape(3, 16).tolist()


def test_what_cannot_be_scaled_says_why_and_is_a_group_of_its_own() -> None:
    """Half of the channels go through a Sigmoid."""
    arrays = {"w": weight(4, 4, 1, 1), "u": weight(3, 4, 1, 1), "v": weight(2, 2, 1, 1)}
    body = (
        "a = Conv(x, w) p, q = Split<axis = 1>(a) s = Sigmoid(q) t = Conv(s, v) k = Concat<axis = 1>(p, t)"
    )
    _, groups = groups_of(IMAGE, f"{body} y = Conv(k, u)", arrays)
    reasons = {
        tuple(m.channels[:, 0].tolist()): g.unscalable
        for g in groups.groups()
        for m in g.members
        if (m.layer.linear.output_name, m.side) == ("a", "outputs")
    }
    assert reasons[0, 1] is None
    refusal = reasons[2, 3]
    assert refusal is not None
    assert "not positively homogeneous" in refusal.rule


NETWORKS = {
    "pair": (IMAGE, "a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)", 1),
    "depthwise": (
        IMAGE,
        "a = Conv(x, w, b) d = Conv<group = 6, pads = [1,1,1,1]>(a, dw, e) y = Conv(d, v)",
        2,
    ),
    "residual": (IMAGE, "a = Conv(x, w, b) r = Relu(a) c = Conv(r, u, e) s = Add(a, c) y = Conv(s, v)", 1),
    "constant": (IMAGE, "a = Conv(x, w, b) s = Add(a, k) r = LeakyRelu(s) y = Conv(r, v)", 1),
    "shuffled": (
        IMAGE,
        "a = Conv(x, w, b) p = Reshape(a, five) t = Transpose<perm = [0,2,1,3,4]>(p) "
        "q = Reshape(t, four) y = Conv(q, v)",
        1,
    ),
    "flattened": (VECTOR, "a = Conv(x, w, b) m = MaxPool<kernel_shape = [2,2]>(a) f = Flatten(m) "
                  "y = Gemm<transB = 1>(f, g)", 1),
}  # fmt: skip
ARRAYS: Arrays = {
    "w": weight(6, 4, 3, 3), "u": weight(6, 6, 1, 1), "v": weight(3, 6, 1, 1),
    "b": weight(6), "e": weight(6, seed=1),
    "dw": weight(6, 1, 3, 3), "k": weight(1, 6, 1, 1), "g": weight(5, 6 * 9),
    "five": np.array([0, 2, 3, 4, 4]), "four": np.array([0, 6, 4, 4]),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_each_group_that_can_be_scaled_leaves_the_outputs(name: str) -> None:
    signature, body, count = NETWORKS[name]
    used = {k: v for k, v in ARRAYS.items() if f" {k}," in body or f" {k})" in body}
    proto = graph(signature, body, used)
    model = Model.from_proto(proto)
    free = [group for group in inner(find_channel_groups(model)) if group.unscalable is None]
    assert len(free) == count
    assert scale_groups(model) == count
    after = model.to_proto()
    x = feeds(proto)
    before, now = outputs(proto, x)["y"], outputs(after, x)["y"]
    np.testing.assert_allclose(now, before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert after != proto


def test_the_streams_of_a_resnet(models: Path) -> None:
    model = load(models / "resnet20-fashion.onnx")
    FoldBatchNorm().apply(model)
    groups = [g for g in inner(find_channel_groups(model)) if g.unscalable is None]
    assert sorted(len(g.labels) for g in groups) == sorted([16, 32, 64] * 4)
    streams = [g for g in groups if sum(m.side == "outputs" for m in g.members) > 1]
    assert sorted(sum(m.side == "outputs" for m in g.members) for g in streams) == [4, 4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_joined_labels_have_one_representative(seed: int) -> None:
    """Against merging sets one pair at a time."""
    rng = np.random.default_rng(seed)
    labels = ChannelLabels()
    labels.new_labels((40,))
    sets = {i: {i} for i in range(40)}
    for _ in range(12):
        pair = rng.integers(40, size=(2, 3))
        labels.union(*pair)
        for a, b in pair.T.tolist():
            both = sets[a] | sets[b]
            sets.update(dict.fromkeys(both, both))
    assert labels.roots().tolist() == [min(sets[i]) for i in range(40)]
