"""Recoverability of each block: the error of the features that remains after adapters were trained.

    R(B) = min_α ‖f(x; Θ) − f₋B(x; Θ, α)‖² / ‖f(x; Θ)‖²        (PRACTISE, arXiv 2202.07861 eq. 3)

f: the features before the global pool. The paper trains the adapters α of each block for 1,000 steps and
runs both whole networks in each step. Here only the part after the first adapter runs (feeding the block's
exit with its entry *is* the network without the block), the original's features are computed once for all
blocks and rounds, and few steps at a higher learning rate rank the blocks alike. Adapters sit before all
convolutions that read the stream after the block, and after the last convolution that writes to it before
the block.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.formatting import counted
from onnxcompress.graph.blocks import Block
from onnxcompress.graph.conv_layers import readers, writers
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.adapters import fold_after, fold_before
from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.device import autocast
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.gradient_steps import Momentum

BATCH = 64
"""Images that run at once when nothing is trained."""
SCORING_IMAGES = 128
"""Images that blocks are scored on, at most."""
STEPS = 8
"""Training steps of the adapters of a block."""
TRAIN_BATCH, PIECE = 32, 16
"""Images in a training step, and how many of them go through at once on a CPU."""
RATE = 0.15
"""Initial learning rate of SGD on the relative squared error; it falls to zero."""


@dataclass(frozen=True)
class Probe:
    """The images on which blocks are scored, with the original network's features."""

    source: str
    """Name of the graph's input."""
    feature: str
    """Name of the tensor whose values are the features."""
    images: Tensor
    """Normalized images, (N, …)."""
    wanted: Tensor
    """Features of the original network, (N, …)."""

    @cached_property
    def energy(self) -> float:
        """The sum of squares of the original features."""
        return float(self.wanted.float().square().sum())


def probe(executor: Executor, images: Tensor, source: str, feature: str, *, batch: int = BATCH) -> Probe:
    """Compute the original network's features, once for all blocks.

    Args:
        executor: The original network.
        images: Normalized images, (N, …); they are moved to the executor's device.
        source: Name of the graph's input.
        feature: Name of the tensor whose values are the features.
        batch: Images that run at once.

    Returns:
        The images with their features.

    Raises:
        ModelError: The features are not those of one image after the other.
    """
    images = images.to(executor.device)
    made = executor.run_batched({source: images}, [feature], count=len(images), batch=batch, mixed=True)
    rows = len(made[feature])
    if rows != len(images):
        raise ModelError(
            f"tensor {feature!r} has {rows} rows for {counted(len(images), 'image')}: networks that mix "
            "the images of a batch are not handled; export it with an open batch"
        )
    return Probe(source, feature, images, made[feature])


@dataclass(frozen=True)
class Recovery:
    """The loss that remains when a block is dropped, and the weights that recover the rest."""

    loss: float
    """R: relative squared error of the features; 0: nothing is lost."""
    weights: dict[str, Tensor]
    """Initializer -> value with the adapter folded in."""


class Scorer:
    """Scores the blocks of a network from which others may be missing already; R includes their loss."""

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
        """Compute the part of the network before the first adapter, once.

        Args:
            model: The network.
            blocks: The blocks that may be scored.
            probe: Images, with the original network's features.
            feature: The tensor that takes the place of the probe's feature, where the model has another.
            executor: The executor of the model; None: make one.
            parameters: Current values of initializers that differ from the executor's.
            steps: Training steps of the adapters of a block; 0 scores the damage without repair.
            batch: Images that run at once, at most.
            device: Where the executor runs, if one is made.
        """
        self.batch = batch
        self.executor = executor or Executor.from_model(model, device=device)
        self.probe, self.steps, self.feature = probe, steps, feature or probe.feature
        known = self.executor.parameters  # an adapted layer may have been dropped since
        self.parameters = {n: v for n, v in (parameters or {}).items() if n in known}
        topology = model.analysis(Topology)
        self.sites = {b.exit: adapter_site(topology, b) if steps else AdapterSite(b.entry) for b in blocks}
        cuts = list(dict.fromkeys(site.cut for site in self.sites.values()))
        self._prefix = self.executor.run_batched(
            {probe.source: probe.images},
            cuts,
            count=len(probe.images),
            batch=batch,
            parameters=self.parameters,
            mixed=True,
        )

    def _places(self, low: int, high: int) -> Tensor:
        """Return the indices of images, on the device, starting over after the last image."""
        return torch.arange(low, high, device=self.executor.device) % len(self.probe.images)

    def recover_each(self, blocks: Sequence[Block]) -> Generator[Recovery, None, None]:
        """Recover blocks in order (`recover`), some ahead on other threads.

        Args:
            blocks: The blocks.

        Yields:
            R and the weights for each block.
        """
        return in_turn(lambda index: self.recover(blocks[index]), len(blocks), self.executor.device)

    def recover(self, block: Block) -> Recovery:
        """Train the adapters for dropping a block, and measure R.

        Args:
            block: The block.

        Returns:
            R, infinite where features without the block are not finite, and the weights with the adapters
            folded in.
        """
        site = self.sites[block.exit]
        adapters = site.adapters(self.executor.device)
        weights = self._train(block, site, adapters) if adapters else {}
        count = len(self.probe.images)

        def lost(part: int) -> Tensor:
            places = self._places(part * self.batch, min((part + 1) * self.batch, count))
            with torch.no_grad(), autocast(self.executor.device):
                return self._error(block, site, places, weights).sum().double()

        parts = list(in_turn(lost, -(-count // self.batch), self.executor.device))
        loss = float(torch.stack(parts).sum()) / self.probe.energy
        return Recovery(loss if loss < float("inf") else float("inf"), weights)  # not a number neither

    def _train(self, block: Block, site: AdapterSite, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train all adapters by a few steps of SGD, starting at the identity; return the folded weights."""
        now = self.executor.parameters | self.parameters
        momentum = Momentum(list(adapters.values()), 0.9)
        size = min(TRAIN_BATCH, self.batch)
        energy = self.probe.energy * size / len(self.probe.images)
        for step in range(self.steps):
            index = self._places(step * size, (step + 1) * size)
            pieces = torch.split(index, PIECE if self.executor.device.type == "cpu" else size)

            def slopes(part: int, pieces: Sequence[Tensor] = pieces) -> tuple[Tensor, ...]:
                with autocast(self.executor.device):
                    error = self._error(block, site, pieces[part], site.folded(now, adapters))
                loss = error.sum() / energy
                return torch.autograd.grad(loss, momentum.values, allow_unused=True, materialize_grads=True)

            columns = zip(*in_turn(slopes, len(pieces), self.executor.device), strict=True)
            found = [torch.stack(parts).sum(0) for parts in columns]
            momentum.step(found, RATE * (1 - step / self.steps))
        with torch.no_grad():
            return site.folded(now, adapters)

    def _error(
        self, block: Block, site: AdapterSite, index: Tensor, weights: Mapping[str, Tensor]
    ) -> Tensor:
        """Compute the squared errors of the features when the block's exit is fed with its entry."""
        parameters = self.parameters | dict(weights)
        entry = self._prefix[site.cut][index]
        if site.cut != block.entry:
            entry = self.executor.run({site.cut: entry}, [block.entry], parameters)[block.entry]
        feeds = {self.probe.source: self.probe.images[index], block.exit: entry}
        got = self.executor.run(feeds, [self.feature], parameters)[self.feature]
        return (got.float() - self.probe.wanted[index].float()).square()


@dataclass(frozen=True)
class AdapterSite:
    """The layers next to which the adapters of one block sit."""

    cut: str
    """The tensor before the first adapter; the network up to it never changes."""
    before: tuple[Linear, ...] = ()
    """Dense convolutions that read the stream after the block."""
    after: tuple[Linear, ...] = ()
    """The last dense convolution that writes to the stream before the block, if any."""

    def adapters(self, device: torch.device) -> dict[str, Tensor]:
        """Create the adapters, one for each layer, as identities that require gradients.

        Args:
            device: Where they lie.

        Returns:
            Key of the layer -> adapter, (channels, channels).
        """
        return {
            **{f"before {x.output_name}": _identity(x.inputs, device) for x in self.before},
            **{f"after {x.output_name}": _identity(x.outputs, device) for x in self.after},
        }

    def folded(self, now: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold the adapters into the weights, differentiably.

        Args:
            now: Current values of the initializers, by name.
            adapters: The adapters, as from `adapters`.

        Returns:
            Initializer -> value with its adapters folded in.
        """
        values: dict[str, Tensor] = {}
        for layer in self.before:
            values[layer.weight_name] = fold_before(
                now[layer.weight_name], adapters[f"before {layer.output_name}"]
            )
        for layer in self.after:
            weight = values.get(layer.weight_name, now[layer.weight_name])
            bias = None if layer.bias_name is None else now[layer.bias_name]
            weight, bias = fold_after(weight, bias, adapters[f"after {layer.output_name}"])
            values[layer.weight_name] = weight
            if layer.bias_name is not None and bias is not None:
                values[layer.bias_name] = bias
        return values


def _identity(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, device=device, requires_grad=True)


def adapter_site(topology: Topology, block: Block) -> AdapterSite:
    """Find the convolutions that take adapters when a block is dropped, and the tensor before them.

    Args:
        topology: The topology of the network as it is.
        block: A block of it.

    Returns:
        The convolutions; the last one before the block is left out where no tensor of the trunk precedes
        it.
    """
    model = topology.model
    tensors = model.graph.tensors()
    entry = tensors[block.entry]
    after = sorted(writers(model, entry), key=lambda x: topology.position(tensors[x.output_name]))[-1:]
    cut = block.entry
    if after:
        place = topology.position(tensors[after[0].output_name])
        earlier = [t for t in topology.trunk() if topology.position(t) < place]
        cut = earlier[-1].name if earlier else block.entry
        after = after if earlier else []
    return AdapterSite(str(cut), tuple(readers(model, tensors[block.exit])), tuple(after))
