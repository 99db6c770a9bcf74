"""The figures that `prune` measured."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.account import Figures


@dataclass(frozen=True)
class PrunedLayerRow:
    """A layer that was pruned."""

    name: str
    op: str
    weight: str
    """Name of the weight."""
    sparsity: float
    """Share of zeros that was asked of the layer, from 0 to 1."""
    snr_db: float | None = None
    """Signal to noise ratio of the layer's output, in decibels; None: its weights were not refitted."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of all linear layers, in several forms."""

    dense: int
    deflated: int
    """Compressed with zlib."""
    sparse: int | None = None
    """As the file stores them; None: it stores them dense."""


@dataclass(frozen=True)
class PruneFigures(Figures):
    """The figures of `prune`."""

    sparsity: float
    """Share of zeros among the weights of all linear layers, from 0 to 1."""
    weights: int
    """Number of these weights."""
    zeros: int
    """Number of zeros among them."""
    bytes: WeightBytes
    speed: str
    """What is to be expected of the speed, in one sentence."""
    layers: tuple[PrunedLayerRow, ...] | None = None
    """The layers that were pruned, in the order of the network; None: the model was pruned before."""

    @property
    def layer_snr_db(self) -> dict[str, float]:
        """Layer -> signal to noise ratio of its own output, in decibels, where it was refitted."""
        return {row.name: row.snr_db for row in self.layers or () if row.snr_db is not None}
