"""The space that `search` looks through: which passes are applied, how strongly, and in which order.

    blocks        residual blocks to drop, least recoverable last; which ones, `drop-blocks` chooses
    channels      percent of the multiply-accumulates to cut with channels that `drop-channels` chooses
    weights       float32, float16, sparse (zeros left out of the file), int8, int4, mixed (by layer)
    activations   8 bits or float32, where weights are quantized
    budget        average bits of all weights, where they are mixed
    sparsity      share of zeros, where weights are sparse
    equalize      no, first (before blocks are dropped) or last (before quantization)

Blocks are dropped before channels are cut, and both before weights are pruned, quantized or halved: these
passes refuse or undo each other the other way round. Zeros and quantization exclude each other: quantized
zeros are no smaller, and leaving them out of the file makes it larger than int8 alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import optuna

    from onnxcompress.evaluation.gates import Gates
    from onnxcompress.model import Model
    from onnxcompress.passes.base import Pass

Weights = Literal["float32", "float16", "sparse", "int8", "int4", "mixed"]
WEIGHTS: tuple[Weights, ...] = ("float32", "float16", "sparse", "int8", "int4", "mixed")
QUANTIZED = ("int8", "int4", "mixed")
FASTER: tuple[Weights, ...] = ("float32", "float16", "int8")
"""Kinds of weights that a runtime may compute faster with; others are smaller in the file alone."""
SPARSITIES, BUDGETS, CHANNELS = (0.3, 0.8, 0.1), (4.5, 7.5, 0.5), (0, 40, 10)
"""Lowest and highest value, and the step between values."""

PROXY_IMAGES = 128
"""Images that a proxy learns from, at most: with more, closed forms take most of the time."""


class Extent(NamedTuple):
    """How far a network's structure can be cut."""

    blocks: int
    """Blocks that can be dropped."""
    channels: int
    """Multiply-accumulates that are cut with channels at most, in percent; 0: no channel can be cut."""
    weights: tuple[Weights, ...] = WEIGHTS
    """Kinds of weights to look at."""


@dataclass(frozen=True)
class Candidate:
    """A point of the space."""

    blocks: int = 0
    weights: Weights = "float32"
    activations: int = 0
    budget: float | None = None
    sparsity: float | None = None
    equalize: Literal["no", "first", "last"] = "no"
    channels: int = 0

    @property
    def name(self) -> str:
        """Name of its files."""
        words = [f"drop{self.blocks}", self.weights]
        words += [f"a{self.activations}"] if self.weights in QUANTIZED else []
        words += [f"{value:g}" for value in (self.budget, self.sparsity) if value is not None]
        words += [f"cut{self.channels}"] if self.channels else []
        return "-".join(words + ([] if self.equalize == "no" else [f"equalized-{self.equalize}"]))

    def milder(self) -> Iterator[Candidate]:
        """List the candidates that drop fewer blocks or channels and are the same otherwise.

        Yields:
            The candidates.
        """
        for blocks, channels in itertools.product(
            range(self.blocks + 1), range(0, self.channels + 1, CHANNELS[2])
        ):
            if (blocks, channels) != (self.blocks, self.channels):
                yield dataclasses.replace(self, blocks=blocks, channels=channels)

    def passes(
        self, inputs: Mapping[str, Any], *, effort: str, repair: bool, dropped: tuple[str, ...] = ()
    ) -> tuple[Pass, ...]:
        """Build the passes that make the candidate.

        Args:
            inputs: Options that say what the passes learn from.
            effort: The effort of each pass.
            repair: Whether the network without the blocks is fine-tuned, too.
            dropped: Names of the blocks to drop; empty: `drop-blocks` chooses them.

        Returns:
            The passes in order.
        """
        from onnxcompress.passes import load_pass

        learning = dict(inputs) | {"effort": effort}
        equalize = load_pass("equalize")()
        chain: list[Pass] = [load_pass("fold-bn")(), *([equalize] if self.equalize == "first" else [])]
        steps = {} if repair else {"steps": 0}
        if self.blocks:
            target: dict[str, Any] = {"drop": dropped} if dropped else {"blocks": self.blocks}
            chain.append(load_pass("drop-blocks")(**learning, **target, **steps))
        if self.channels:
            through = {"inputs": "procedural"} if learning.get("inputs") == "layerwise" else {}
            saved = {"macs_reduction": float(self.channels)}
            chain.append(load_pass("drop-channels")(**learning | through, **saved, **steps))
        chain += [equalize] if self.equalize == "last" else []
        if self.weights == "sparse":
            zeros: dict[str, Any] = {"sparsity": self.sparsity, "storage": "sparse"}
            chain.append(load_pass("prune")(**learning, **zeros))
        elif self.weights == "float16":
            measured_on = {name: value for name, value in inputs.items() if value != "layerwise"}
            chain.append(load_pass("fp16")(**measured_on))
        elif self.weights != "float32":
            chain.append(load_pass("quantize")(**learning, **self._bits()))
        return tuple(chain)

    def _bits(self) -> dict[str, Any]:
        if self.weights == "mixed":
            bits: dict[str, Any] = {"bits_budget": self.budget, "small_types": True}
        else:
            bits = {"weight_bits": 4, "small_types": True} if self.weights == "int4" else {"weight_bits": 8}
        return bits | {"activation_bits": self.activations}


def parameters(candidate: Candidate, extent: Extent) -> dict[str, Any]:
    """Return the values by which a sampler would choose a point.

    Args:
        candidate: The point.
        extent: How far the network can be cut.

    Returns:
        Values of the parameters.
    """
    values: dict[str, Any] = {"blocks": candidate.blocks, "weights": candidate.weights}
    values |= {"channels": candidate.channels} if extent.channels else {}
    optional = {"sparsity": candidate.sparsity, "budget": candidate.budget}
    values |= {name: value for name, value in optional.items() if value is not None}
    if candidate.weights in QUANTIZED:
        values |= {"activations": candidate.activations, "equalize": candidate.equalize}
    return values


def suggest(trial: optuna.Trial, extent: Extent) -> Candidate:
    """Let a sampler choose a point.

    Args:
        trial: The sampler's trial.
        extent: How far the network can be cut.

    Returns:
        The point.
    """
    blocks = trial.suggest_int("blocks", 0, extent.blocks)
    channels = trial.suggest_int("channels", 0, extent.channels, step=CHANNELS[2]) if extent.channels else 0
    weights: Weights = trial.suggest_categorical("weights", extent.weights)
    if weights == "sparse":
        low, high, step = SPARSITIES
        sparsity = trial.suggest_float("sparsity", low, high, step=step)
        return Candidate(blocks, weights, sparsity=round(sparsity, 3), channels=channels)
    if weights not in QUANTIZED:
        return Candidate(blocks, weights, channels=channels)
    budget = None
    if weights == "mixed":
        low, high, step = BUDGETS
        budget = round(trial.suggest_float("budget", low, high, step=step), 3)
    activations = trial.suggest_categorical("activations", (8, 0))
    equalize = trial.suggest_categorical("equalize", ("no", "first", "last"))
    return Candidate(blocks, weights, activations, budget, equalize=equalize, channels=channels)


def first_points(extent: Extent) -> list[dict[str, Any]]:
    """List the points that are looked at first, as an engineer would try them: the quick ones first.

    Args:
        extent: How far the network can be cut.

    Returns:
        Values of the parameters for each.
    """
    int8 = {"weights": "int8", "activations": 8, "equalize": "no"}
    most = extent.blocks
    few = sorted({min(k, most) for k in (max(1, most // 4), max(1, most // 2))} - {0})
    points: list[dict[str, Any]] = [{"blocks": 0, **int8}, {"blocks": 0, "weights": "float16"}]
    for blocks in few:
        points += [{"blocks": blocks, "weights": "float32"}, {"blocks": blocks, **int8}]
    points.append({"blocks": 0, "weights": "sparse", "sparsity": 0.5})
    points = [point for point in points if point["weights"] in extent.weights]
    if not extent.channels:
        return points
    cut = [{"blocks": k, "weights": "float32", "channels": 20} for k in (0, *few[:1])]
    return [*({"channels": 0} | point for point in points), *cut]


def few_images(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Limit the images that a proxy learns from, where there are more.

    Args:
        inputs: Options that say what passes learn from.

    Returns:
        The options to change.
    """
    from onnxcompress.data.image_set import image_count

    if "images" not in inputs:
        return {}
    there = inputs.get("count") or image_count(inputs["images"])
    return {"count": PROXY_IMAGES} if there > PROXY_IMAGES else {}


def extent_of(model: Model, inputs: Mapping[str, Any] | None = None) -> Extent:
    """Look how far a network's structure can be cut.

    Args:
        model: The network; it stays as it is.
        inputs: Options that say what passes learn from: sizes that the file leaves open follow from them.

    Returns:
        The extent; 0 of what its pass cannot be applied to at all.
    """
    from onnxcompress.errors import CompressError
    from onnxcompress.graph.canonicalize import canonicalize
    from onnxcompress.graph.channel_groups.cut_tracer import find_cut_groups
    from onnxcompress.graph.macs import count_macs
    from onnxcompress.optimize.calibration import InputRequest, assume_sizes

    own = model.copy()
    sized = {name: (inputs or {}).get(name) for name in ("images", "preprocess", "input_shape")}
    try:
        assume_sizes(own, InputRequest(**dict[str, Any](sized)))
        canonicalize(own)
        count_macs(own)  # raises where sizes stay open
        free = find_cut_groups(own).free
    except CompressError:
        free = ()
    return Extent(_count_blocks(model), CHANNELS[1] if free else 0)


def extent_for(model: Model, gates: Gates, inputs: Mapping[str, Any]) -> Extent:
    """Look how far a network's structure can be cut, and which weights help to keep the limits.

    Args:
        model: The network; it stays as it is.
        gates: The limits.
        inputs: As for `extent_of`.

    Returns:
        The extent; weights that make nothing but the file smaller are left out where speed is limited and
        the size is not.
    """
    limits = gates.limits.keys()
    speed_alone = {"min_speedup", "max_latency"} & limits and "max_size" not in limits
    extent = extent_of(model, inputs)
    return extent._replace(weights=FASTER) if speed_alone else extent


def _count_blocks(model: Model) -> int:
    from onnxcompress.errors import CompressError
    from onnxcompress.graph.blocks import find_blocks
    from onnxcompress.passes.fold_bn import FoldBatchNorm

    own = model.copy()
    try:
        FoldBatchNorm().apply(own)
        return len(find_blocks(own).blocks)
    except CompressError:
        return 0
