"""The space that `search` looks through: which passes are applied, how strongly, and in which order.

    blocks        residual blocks to drop, least recoverable last; which ones, `drop-blocks` chooses
    weights       float32, float16, sparse (zeros left out of the file), int8, int4, mixed (by layer)
    activations   8 bits or float32, where weights are quantized
    budget        average bits of all weights, where they are mixed
    sparsity      share of zeros, where weights are sparse
    equalize      no, first (before blocks are dropped) or last (before quantization)

Blocks are dropped before weights are pruned, quantized or halved: these passes refuse or undo each other
the other way round. Zeros and quantization exclude each other: quantized zeros are no smaller, and leaving
them out of the file makes it larger than int8 alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import optuna

    from onnxcompress.model import Model
    from onnxcompress.passes.base import Pass

Weights = Literal["float32", "float16", "sparse", "int8", "int4", "mixed"]
WEIGHTS: tuple[Weights, ...] = ("float32", "float16", "sparse", "int8", "int4", "mixed")
QUANTIZED = ("int8", "int4", "mixed")
SPARSITIES, BUDGETS = (0.3, 0.8, 0.1), (4.5, 7.5, 0.5)
"""Lowest and highest value, and the step between values."""


@dataclass(frozen=True)
class Candidate:
    """A point of the space."""

    blocks: int = 0
    weights: Weights = "float32"
    activations: int = 0
    budget: float | None = None
    sparsity: float | None = None
    equalize: Literal["no", "first", "last"] = "no"

    @property
    def name(self) -> str:
        """Name of its files."""
        words = [f"drop{self.blocks}", self.weights]
        words += [f"a{self.activations}"] if self.weights in QUANTIZED else []
        words += [f"{value:g}" for value in (self.budget, self.sparsity) if value is not None]
        return "-".join(words + ([] if self.equalize == "no" else [f"equalized-{self.equalize}"]))

    def milder(self) -> Iterator[Candidate]:
        """List the candidates that drop fewer blocks and are the same otherwise.

        Yields:
            The candidates.
        """
        for blocks in range(self.blocks):
            yield dataclasses.replace(self, blocks=blocks)

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
        if self.blocks:
            target: dict[str, Any] = {"drop": dropped} if dropped else {"blocks": self.blocks}
            steps = {} if repair else {"steps": 0}
            chain.append(load_pass("drop-blocks")(**learning, **target, **steps))
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


def suggest(trial: optuna.Trial, most_blocks: int) -> Candidate:
    """Let a sampler choose a point.

    Args:
        trial: The sampler's trial.
        most_blocks: Blocks that can be dropped.

    Returns:
        The point.
    """
    blocks = trial.suggest_int("blocks", 0, most_blocks)
    weights: Weights = trial.suggest_categorical("weights", WEIGHTS)
    if weights == "sparse":
        low, high, step = SPARSITIES
        sparsity = trial.suggest_float("sparsity", low, high, step=step)
        return Candidate(blocks, weights, sparsity=round(sparsity, 3))
    if weights not in QUANTIZED:
        return Candidate(blocks, weights)
    budget = None
    if weights == "mixed":
        low, high, step = BUDGETS
        budget = round(trial.suggest_float("budget", low, high, step=step), 3)
    activations = trial.suggest_categorical("activations", (8, 0))
    equalize = trial.suggest_categorical("equalize", ("no", "first", "last"))
    return Candidate(blocks, weights, activations, budget, equalize=equalize)


def first_points(most_blocks: int) -> list[dict[str, Any]]:
    """List the points that are looked at first, as an engineer would try them by hand.

    Args:
        most_blocks: Blocks that can be dropped.

    Returns:
        Values of the parameters for each.
    """
    int8 = {"weights": "int8", "activations": 8, "equalize": "no"}
    sparse = {"blocks": 0, "weights": "sparse", "sparsity": 0.5}
    few = sorted({min(k, most_blocks) for k in (0, max(1, most_blocks // 4), max(1, most_blocks // 2))})
    points = [{"blocks": k, "weights": "float32"} for k in few if k] + [{"blocks": k, **int8} for k in few]
    return [*points, {"blocks": 0, "weights": "float16"}, sparse]


def count_blocks(model: Model) -> int:
    """Count the blocks of a network that can be dropped.

    Args:
        model: The network; it stays as it is.

    Returns:
        Their number; 0 where `drop-blocks` cannot be applied at all.
    """
    from onnxcompress.errors import CompressError
    from onnxcompress.graph.blocks import find_blocks
    from onnxcompress.passes.fold_bn import FoldBatchNorm

    own = model.copy()
    try:
        FoldBatchNorm().apply(own)
        return len(find_blocks(own).blocks)
    except CompressError:
        return 0
