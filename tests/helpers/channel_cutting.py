"""Cut channels, and compare with the network whose weights that read them are zero."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx

from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.graph.channel_groups.cut_tracer import CutGroup, CutGroups, find_cut_groups
from onnxcompress.graph.channel_removal import cut_channels
from onnxcompress.graph.edit import set_constant
from onnxcompress.model import Model
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.inference import run as outputs


def with_groups(make: Callable[[], Model]) -> tuple[Model, CutGroups]:
    model = make()
    canonicalize(model)
    return model, find_cut_groups(model)


def blind(model: Model, groups: CutGroups, gone: Collection[int]) -> None:
    """Set all weights to zero that read channels, so that nothing depends on them."""
    for layer in groups.channels.layers:
        linear = layer.linear
        mask = ~np.isin(layer.reads, list(gone)).reshape(linear.groups, 1, -1, 1)
        if not mask.all():
            weight = linear.weight.copy()
            view = linear.view(weight)
            view *= mask
            set_constant(model, linear.node, linear.weight_at, weight, f"{linear.weight_name}_blind")
    model.touch()


def some_of(groups: Collection[CutGroup], seed: int = 0) -> set[int]:
    """A third of the channels of each group, but one at least."""
    rng = np.random.default_rng(seed)
    gone: set[int] = set()
    for group in groups:
        count = max(1, group.width // 3)
        gone |= set(rng.choice(group.group.labels, count, replace=False).tolist())
    return gone


def cut_agrees(make: Callable[[], Model], names: Collection[str] = (), *, tolerance: float = 1e-5) -> None:
    """Cut some channels of the named groups (none named: of all), and hold that nothing else changes."""
    whole, groups = with_groups(make)
    own, theirs = with_groups(make)
    chosen = [g for g in theirs.free if g.width > 1 and (not names or g.name in names)]
    gone = some_of(chosen)
    blind(whole, groups, gone)
    assert cut_channels(own, theirs, gone)
    proto = own.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    feeds = random_feeds(whole, batch=2, seed=1)
    expected, found = outputs(whole, feeds), outputs(Model.from_proto(proto), feeds)
    for name, before in expected.items():
        after = found[name]
        assert after.shape == before.shape
        limit = tolerance * max(float(np.abs(before).max()), 1e-30)
        np.testing.assert_allclose(after, before, rtol=0, atol=limit)
