"""Recoverability of each block: how far the features stay off once adapters did what they can.

    R(B) = min_α ‖f(x; Θ) − f₋B(x; Θ, α)‖² / ‖f(x; Θ)‖²        (PRACTISE, arXiv 2202.07861 eq. 3)

f: the features before the global pool. The publication trains the adapters α of each block for 1,000
steps, both networks run whole in each. Here the adapters before the block's next readers are the
least-squares solution on what they read (see `adapters`), from second moments gathered in one pass, and
only what lies behind the block runs again, once: feeding the block's exit with its entry *is* the network
without the block. The teacher's features are computed once for all blocks and all rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.blocks import Block
from onnxcompress.graph import consumers, is_op
from onnxcompress.model import Model
from onnxcompress.optimize.adapters import fold_before, least_squares_adapter, moments
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.finetune import autocast
from onnxcompress.optimize.layers import conv_layers


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

    def head(self, count: int) -> Probe:
        """The first `count` images only."""
        return Probe(self.source, self.feature, self.images[:count], self.wanted[:count])

    @property
    def energy(self) -> float:
        return float(self.wanted.float().square().sum())


def probe(executor: Executor, images: Tensor, source: str, feature: str, batch: int = 64) -> Probe:
    """Compute the original network's features, once."""
    with torch.no_grad(), autocast(executor.device):
        parts = [
            executor.run({source: part.to(executor.device)}, [feature])[feature]
            for part in images.split(batch)
        ]
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
    values of initializers, where they differ from the executor's.
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
        adapters: bool = True,
        device: str = "cpu",
        batch: int = 64,
    ) -> None:
        self.executor = executor or Executor.from_model(model, device=device)
        self.probe, self.batch, self.feature = probe, batch, feature or probe.feature
        known = self.executor.parameters  # an adapted layer may have been dropped since
        self.parameters = {n: v for n, v in (parameters or {}).items() if n in known}
        self.readers = {b.exit: next_readers(model, b) if adapters else ("", ()) for b in blocks}
        taps = [b.entry for b in blocks] + [s for s, weights in self.readers.values() if weights]
        with torch.no_grad(), autocast(self.executor.device):
            self._stored = [
                self.executor.run(self._feed(part), list(dict.fromkeys(taps)), self.parameters)
                for part in probe.images.split(batch)
            ]

    def _feed(self, part: Tensor) -> dict[str, Tensor]:
        return {self.probe.source: part.to(self.executor.device)}

    def recover(self, block: Block) -> Recovery:
        """Adapters and R of dropping `block`."""
        with torch.no_grad(), autocast(self.executor.device):
            weights = self._adapted(block)
            return Recovery(self._loss(block, self.parameters | weights), weights)

    def _adapted(self, block: Block) -> dict[str, Tensor]:
        stream, weights = self.readers[block.exit]
        if not weights:
            return {}
        pairs = [moments(values[block.entry], values[stream]) for values in self._stored]
        cross, gram = (torch.stack(sums).double().sum(0) for sums in zip(*pairs, strict=True))
        adapter = least_squares_adapter(cross, gram)
        now = self.executor.parameters | self.parameters
        return {name: fold_before(now[name], adapter) for name in weights}

    def _loss(self, block: Block, parameters: Mapping[str, Tensor]) -> float:
        """Relative squared error of the features when the exit is fed with the entry."""
        feature = self.feature
        total = 0.0
        parts = zip(self.probe.images.split(self.batch), self.probe.wanted.split(self.batch), strict=True)
        for values, (image, wanted) in zip(self._stored, parts, strict=True):
            feeds = self._feed(image) | {block.exit: values[block.entry]}
            got = self.executor.run(feeds, [feature], parameters)[feature]
            total += float((got.float() - wanted.float()).square().sum())
        return total / self.probe.energy


def next_readers(model: Model, block: Block) -> tuple[str, tuple[str, ...]]:
    """(the stream behind the block, weights of the dense convolutions that read it there)."""
    stream = model.graph.tensors()[block.exit]
    after = consumers(stream)
    if len(after) == 1 and is_op(after[0], "Relu", "Clip"):
        stream = after[0].outputs[0]
    layers = conv_layers(model, consumers(stream)).values()
    return stream.name, tuple(x.weight for x in layers if x.groups == 1)
