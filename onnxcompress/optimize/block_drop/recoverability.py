"""Recoverability of each block: how far the features stay off once adapters did what they can.

    R(B) = min_α ‖f(x; Θ) − f₋B(x; Θ, α)‖² / ‖f(x; Θ)‖²        (PRACTISE, arXiv 2202.07861 eq. 3)

f: the features before the global pool. The publication trains the adapters α of each block for 1,000
steps, both networks run whole in each. Here only what lies behind the first adapter runs (feeding the
block's exit with its entry *is* the network without the block), the original's features are computed once
for all blocks and rounds, and few steps of a faster rate rank the blocks alike. Adapters sit before all
convolutions that read the stream behind the block, and after the last one that writes to it before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from onnxcompress.graph.blocks import Block
from onnxcompress.graph.conv_layers import ConvLayer, readers, writers
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.adapters import fold_after, fold_before
from onnxcompress.optimize.device import autocast
from onnxcompress.optimize.executor import Executor

BATCH = 64
"""Images that run at once when nothing is trained."""
STEPS = 16
TRAIN_BATCH = 32
RATE = 0.1
"""Of SGD on the relative squared error, falling to zero."""


@dataclass(frozen=True)
class Probe:
    """The images that blocks are scored on and the original network's features for them."""

    source: str
    """Name of the graph's input."""
    feature: str
    images: Tensor
    """(N, …), normalized."""
    wanted: Tensor
    """(N, …) features of the original network."""

    @cached_property
    def energy(self) -> float:
        return float(self.wanted.float().square().sum())


def probe(executor: Executor, images: Tensor, source: str, feature: str, *, batch: int = BATCH) -> Probe:
    """Compute the original network's features, once. The images lie on the executor's device then."""
    images = images.to(executor.device)
    with torch.no_grad(), autocast(executor.device):
        parts = [executor.run({source: part}, [feature])[feature] for part in torch.split(images, batch)]
    return Probe(source, feature, images, torch.cat(parts))


@dataclass(frozen=True)
class Recovery:
    """What is left of a block's loss, and the weights that recover the rest."""

    loss: float
    """R: relative squared error of the features, 0: nothing lost."""
    weights: dict[str, Tensor]
    """Initializer -> value with the adapter folded in."""


class Scorer:
    """Scores the blocks of a network that may lack others already; R counts their loss, too.

    feature: the tensor that stands for the probe's, where the model has another. parameters: current
    values of initializers, where they differ from the executor's. steps: of adapter training a block; 0
    scores the plain damage. batch: images that run at once, at most.
    """

    def __init__(
        self,
        model: Model,
        blocks: Sequence[Block],
        probe: Probe,
        *,
        feature: str | None = None,
        executor: Executor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        steps: int = STEPS,
        batch: int = BATCH,
        device: str = "cpu",
    ) -> None:
        self.batch = batch
        self.executor = executor or Executor.from_model(model, device=device)
        self.probe, self.steps, self.feature = probe, steps, feature or probe.feature
        known = self.executor.parameters  # an adapted layer may have been dropped since
        self.parameters = {n: v for n, v in (parameters or {}).items() if n in known}
        self.sites = {b.exit: adapter_site(model, b) if steps else AdapterSite(b.entry) for b in blocks}
        cuts = list(dict.fromkeys(site.cut for site in self.sites.values()))
        with torch.no_grad(), autocast(self.executor.device):
            parts = [
                self.executor.run(self._feed(part), cuts, self.parameters)
                for part in torch.split(probe.images, batch)
            ]
        self._prefix = {cut: torch.cat([part[cut] for part in parts]) for cut in cuts}

    def _feed(self, part: Tensor) -> dict[str, Tensor]:
        return {self.probe.source: part}

    def _places(self, low: int, high: int) -> Tensor:
        """Indices of images, on the device, around the end."""
        return torch.arange(low, high, device=self.executor.device) % len(self.probe.images)

    def recover(self, block: Block) -> Recovery:
        """Adapters and R of dropping `block`."""
        site = self.sites[block.exit]
        adapters = site.adapters(self.executor.device)
        weights = self._train(block, site, adapters) if adapters else {}
        count = len(self.probe.images)
        with torch.no_grad(), autocast(self.executor.device):
            lost = [
                self._error(block, site, self._places(at, min(at + self.batch, count)), weights)
                .sum()
                .double()
                for at in range(0, count, self.batch)
            ]
        return Recovery(float(torch.stack(lost).sum()) / self.probe.energy, weights)

    def _train(self, block: Block, site: AdapterSite, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
        """A few steps of SGD on all adapters, from the identity; returns the folded weights."""
        now = self.executor.parameters | self.parameters
        sgd = torch.optim.SGD(adapters.values(), lr=RATE, momentum=0.9)
        mean = self.probe.energy / self.probe.wanted.numel()
        size = min(TRAIN_BATCH, self.batch)
        for step in range(self.steps):
            sgd.param_groups[0]["lr"] = RATE * (1 - step / self.steps)
            index = self._places(step * size, (step + 1) * size)
            with autocast(self.executor.device):
                error = self._error(block, site, index, site.folded(now, adapters))
            sgd.zero_grad()
            (error.mean() / mean).backward()  # type: ignore[no-untyped-call]
            sgd.step()
        with torch.no_grad():
            return site.folded(now, adapters)

    def _error(
        self, block: Block, site: AdapterSite, index: Tensor, weights: Mapping[str, Tensor]
    ) -> Tensor:
        """Squared errors of the features when the block's exit is fed with its entry."""
        parameters = self.parameters | dict(weights)
        entry = self._prefix[site.cut][index]
        if site.cut != block.entry:
            entry = self.executor.run({site.cut: entry}, [block.entry], parameters)[block.entry]
        feeds = self._feed(self.probe.images[index]) | {block.exit: entry}
        got = self.executor.run(feeds, [self.feature], parameters)[self.feature]
        return (got.float() - self.probe.wanted[index].float()).square()


@dataclass(frozen=True)
class AdapterSite:
    """Where the adapters of one block sit."""

    cut: str
    """The tensor in front of the first adapter; what comes before never changes."""
    before: tuple[ConvLayer, ...] = ()
    """Dense convolutions that read the stream behind the block."""
    after: tuple[ConvLayer, ...] = ()
    """Dense convolutions that write to it in front of the block, the last one only."""

    def adapters(self, device: torch.device) -> dict[str, Tensor]:
        """Identities, one for each layer, to be trained."""
        return {
            **{f"before {x.node}": _identity(x.inputs, device) for x in self.before},
            **{f"after {x.node}": _identity(x.outputs, device) for x in self.after},
        }

    def folded(self, now: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{initializer: value with its adapters folded in}, differentiable."""
        values: dict[str, Tensor] = {}
        for layer in self.before:
            values[layer.weight] = fold_before(now[layer.weight], adapters[f"before {layer.node}"])
        for layer in self.after:
            weight = values.get(layer.weight, now[layer.weight])
            bias = None if layer.bias is None else now[layer.bias]
            weight, bias = fold_after(weight, bias, adapters[f"after {layer.node}"])
            values[layer.weight] = weight
            if layer.bias is not None and bias is not None:
                values[layer.bias] = bias
        return values


def _identity(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, device=device, requires_grad=True)


def adapter_site(model: Model, block: Block) -> AdapterSite:
    """The convolutions that take adapters when `block` goes, and the tensor in front of them."""
    topology = Topology(model)
    tensors = model.graph.tensors()
    entry = tensors[block.entry]
    after = sorted(writers(model, entry), key=lambda x: topology.position(tensors[x.node]))[-1:]
    cut = block.entry
    if after:
        place = topology.position(tensors[after[0].node])
        earlier = [t for t in topology.trunk() if topology.position(t) < place]
        cut = earlier[-1].name if earlier else block.entry
        after = after if earlier else []
    return AdapterSite(str(cut), tuple(readers(model, tensors[block.exit])), tuple(after))
