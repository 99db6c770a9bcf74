"""Channels whose number, or whose place, the network computes with: cut rightly, or kept with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.graph.channel_groups.channel_counts import ChannelCounts
from onnxcompress.graph.channel_groups.cut_tracer import find_cut_groups
from onnxcompress.graph.channel_removal import cut_channels
from onnxcompress.model import Model
from tests.graph.test_channel_cuts import ARRAYS, IMAGE, STEM, P, ints
from tests.helpers.channel_cutting import cut_agrees, with_groups
from tests.helpers.folding import Arrays, graph, norm, weight

OPEN = "(float[N,4,H,W] x) => (float[N,C,K,L] y)"
TWO = "(float[N,4,8,8] x) => (float[N,C,H,W] y, float[N,D,E,F] z)"
SQUARE = "(float[N,4,12,12] x) => (float[N,C,H,W] y)"
OWN: Arrays = {
    "second": np.array(1), "flattened": ints(0, 12, 36), "three": ints(3), "zero": ints(0), "high": ints(2),
    "third1": np.array(3), "w13": weight(5, 13, 1, 1), "image": ints(12, 12, 12), "row6": weight(6, 6),
    "all6": weight(12, 6, 6), "ones": np.ones((12, 12, 1), np.float32), "six6": ints(6, 6),
    "minus": ints(-1), "begin": ints(-(2**62)), "two": ints(2), "twelve": ints(12), **norm(6, "6"),
}  # fmt: skip


def model_of(signature: str, body: str, opset: int = 17) -> Model:
    arrays = ARRAYS | OWN
    used = {
        k: v for k, v in arrays.items() if any(f"{start}{k}{end}" in body for start in " (" for end in ",)")
    }
    return Model.from_proto(graph(signature, body, used, opset=opset))


CUT = {  # signature, widths of the groups that can be cut, body
    "a tensor takes the shape of another": (IMAGE, [12], f"""
        {STEM} d = Conv<{P}>(r, u, e) f = Reshape(d, flattened) g = Sigmoid(f) s = Shape(r)
        q = Reshape(g, s) y = Conv(q, v)"""),
    "an image takes the size of another": (IMAGE, [12], f"""
        {STEM} m = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r) d = Conv<{P}>(m, u, e) s = Shape(r)
        n = Resize<mode="nearest">(d, , , s) k = Concat<axis=1>(n, r) y = Conv(k, wide)"""),
    "a mean by the size of an open image": (OPEN, [12], f"""
        {STEM} s = Shape<start=2,end=4>(r) p = ReduceProd(s) f = Cast<to=1>(p) m = ReduceSum(r, spatial)
        q = Div(m, f) y = Conv(q, v)"""),
    "a crop of an open image": (OPEN, [12], f"""
        {STEM} s = Shape<start=2,end=3>(x) t = Sub(s, three) q = Slice(r, zero, t, high) y = Conv(q, v)"""),
    "every second place of the image": (IMAGE, [12], f"""
        {STEM} q = Slice(r, zero, twelve, high, two) y = Conv(q, v)"""),
    "one channel beside all": (IMAGE, [11], f"""
        {STEM} q = Gather<axis=1>(r, third1) t = Unsqueeze(q, axis) k = Concat<axis=1>(t, r)
        y = Conv(k, w13)"""),
    "sizes of some axes": (IMAGE, [12], f"""
        {STEM} q = Resize<mode="nearest", axes=[1,2,3]>(r, , , image) y = Conv(q, v)"""),
    "a constant that is cut along two axes": (SQUARE, [12], """
        a = Conv(x, third) s = Add(a, ones) l = Transpose<perm=[0,2,1,3]>(s) t = Add(l, ones)
        m = Mul(t, ones) q = Transpose<perm=[0,2,1,3]>(m) y = Conv(q, v)"""),
    "halves that pools see": (IMAGE, [6, 6], """
        a = Conv(x, w, b) p, q = Split<axis=1>(a, six6) i = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(p)
        j = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(q) k = Concat<axis=1>(i, j) r = Relu(k)
        y = Conv(r, v)"""),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_what_is_computed_from_shapes_goes_on_to_be_right(name: str) -> None:
    signature, widths, body = CUT[name]

    def make() -> Model:
        return model_of(signature, body, 18 if "axes=[1" in body else 17)

    assert [group.width for group in with_groups(make)[1].free] == widths
    cut_agrees(make)


KEPT = [
    (IMAGE, "(Div) computes with the number of channels", f"""
        {STEM} s = Shape(r) c1 = Gather(s, second) f = Cast<to=1>(c1) q = Div(r, f) y = Conv(q, v)"""),
    (IMAGE, "(Div) computes with the number of channels", f"""
        {STEM} s = Size(r) f = Cast<to=1>(s) q = Div(r, f) y = Conv(q, v)"""),
    (IMAGE, "(Shape) reads the shape of a parameter", f"""
        {STEM} s = Shape(v) c1 = Gather(s, second) f = Cast<to=1>(c1) q = Div(r, f) y = Conv(q, v)"""),
    (TWO, "gives the number of its channels", f"""
        {STEM} y = Conv(r, v) s = Shape(r) t = ConstantOfShape(s) z = Cos(t)"""),
    (IMAGE, "(Add) has an operand 't' that is computed from shapes", f"""
        {STEM} s = Shape(r) t = ConstantOfShape(s) q = Add(r, t) y = Conv(q, v)"""),
    (IMAGE, "(BatchNormalization) normalizes axis 1", """
        t = Conv(x, w, b) l = Transpose<perm=[0,2,3,1]>(t) s = BatchNormalization(l, g6, b6, m6, v6)
        f = Transpose<perm=[0,3,1,2]>(s) y = Conv(f, v)"""),
    (SQUARE, "(BatchNormalization) normalizes axis 1", """
        t = Conv(x, third) l = Transpose<perm=[0,2,3,1]>(t) s = BatchNormalization(l, gn, bn, mn, vn)
        f = Transpose<perm=[0,3,1,2]>(s) y = Conv(f, v)"""),
    (IMAGE, "(Slice) takes channels in steps", f"""
        {STEM} q = Slice(r, minus, begin, axis, minus) y = Conv(q, v)"""),
    (TWO, "(LayerNormalization) gives its mean", f"""
        {STEM} s, z = LayerNormalization<axis=2>(r, row6) y = Conv(s, v)"""),
    (IMAGE, "(LayerNormalization) has parameters that vary over channels", f"""
        {STEM} s = LayerNormalization<axis=2>(r, all6) y = Conv(s, v)"""),
]  # fmt: skip


@pytest.mark.parametrize(("signature", "why", "body"), KEPT)
def test_what_computes_with_a_number_of_channels_keeps_them(signature: str, why: str, body: str) -> None:
    _, groups = with_groups(lambda: model_of(signature, body))
    assert not groups.free
    assert any(why in str(refusal) for refusal in groups.refusals), groups.refusals


def test_an_old_softmax_mixes_all_axes_from_the_first_on() -> None:
    """`inspect` looks at the file as it is, before its operator set is raised."""
    body = f"{STEM} s = Softmax(r) y = Conv(s, v)"
    assert [group.width for group in find_cut_groups(model_of(IMAGE, body)).free] == [12]
    assert not find_cut_groups(model_of(IMAGE, body, 11)).free


def test_the_sizes_of_all_tensors_are_looked_at_behind_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that lose no channels, too: here the walk over sizes is left out."""
    monkeypatch.setattr(ChannelCounts, "run", lambda self: None)
    signature, _, body = CUT["an image takes the size of another"]
    model, groups = with_groups(lambda: model_of(signature, body.replace("float[N", "float[1")))
    with pytest.raises(ModelError, match="computes a size that is not handled"):
        cut_channels(model, groups, groups.free[0].group.labels[:4].tolist())
