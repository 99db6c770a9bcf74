"""Which layers are to be pruned, their equalized magnitudes, and whether they are pruned already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from onnxcompress.account import Refusal
from onnxcompress.errors import OptionError
from onnxcompress.graph.query import NAMED
from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.admm_mask import MaskChoice
from onnxcompress.optimize.reconstruction.patches import patches_of
from onnxcompress.optimize.reconstruction.prune import kept
from onnxcompress.optimize.reconstruction.sparsity_pattern import UNSTRUCTURED, Pattern
from onnxcompress.passes.equalize.equalize import assumption_free_scales, equalized_weight
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.quantization.qdq_plan import Bits, Plan, QuantizedLayer, make_plan
from onnxcompress.sensitivity.sparsity_allocation import LARGEST

FLOATS = Bits(8, None, None)
"""Bits of a plan that quantizes nothing."""
ENDS = Bits(2, None, 8)
"""Bits of a plan in which only the first and the last layers have more than 2 bits."""


@dataclass(frozen=True)
class Target:
    """The layers of a model that are to be pruned, and the pattern."""

    model: Model
    plan: Plan
    pattern: Pattern
    layers: dict[str, QuantizedLayer]
    """Layers to prune, by name of the weight."""
    refusals: list[Refusal]

    @property
    def weights(self) -> dict[str, QuantizedLayer]:
        """All linear layers, those that stay dense as well."""
        return {layer.linear.weight_name: layer for layer in self.plan.layers.values()}

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of weights of the layers to prune, by name of the weight."""
        return {name: int(layer.linear.weight.size) for name, layer in self.layers.items()}

    @property
    def total(self) -> int:
        """Weights of all linear layers."""
        return sum(int(layer.linear.weight.size) for layer in self.weights.values())


def choose_target(options: PruneOptions, model: Model) -> Target:
    """Choose the layers to prune.

    Args:
        options: The options.
        model: The model, prepared (`fold_and_canonicalize`).

    Returns:
        The layers, and those that stay dense, with the reasons.

    Raises:
        OptionError: Layers could be pruned, and the patterns leave none.
    """
    pattern = Pattern.parse(options.pattern) or UNSTRUCTURED
    plan = make_plan(model, FLOATS)
    layers, refusals = {}, list(plan.refusals)
    ends = {
        layer.linear.weight_name
        for layer in make_plan(model, ENDS).layers.values()
        if layer.weight_bits > 2
    }
    for layer in plan.layers.values():
        groups, _, inputs, _ = layer.linear.view(layer.linear.weight).shape
        if rule := options.selection.refusal(layer.linear.label, layer.linear.node.op):
            refusals.append(Refusal(layer.linear.label, rule))
            continue
        if options.skip_first_last and layer.linear.weight_name in ends:
            continue
        if groups > 1 and inputs == 1 and not options.depthwise:
            continue
        if not pattern.fits(inputs):
            rule = f"{inputs} inputs are no multiple of {pattern.group}: it stays dense"
            refusals.append(Refusal(layer.linear.label, rule, "prune it with --pattern unstructured"))
            continue
        if not np.isfinite(layer.linear.weight).all():
            rule = "its weight has values that are not finite: it stays dense"
            refusals.append(Refusal(layer.linear.label, rule, "repair the file"))
            continue
        layers[layer.linear.weight_name] = layer

    def all_layers() -> int:
        return len(choose_target(replace(options, include=(), exclude=()), model).layers)

    options.selection.check_taken(len(layers), all_layers, "pruned")
    return Target(model, plan, pattern, layers, refusals)


def check_reachable(options: PruneOptions, target: Target) -> None:
    """Check that enough weights may become 0.

    Args:
        options: The options.
        target: What is to be pruned.

    Raises:
        OptionError: They are too few; the message names the options that would allow more.
    """
    if target.pattern.group:
        return
    measured = options.reconstruct and options.scope == "global" and options.sensitivity is None
    untried = {
        n for n, layer in target.layers.items() if measured and patches_of(target.model, layer) is None
    }
    if untried == target.layers.keys():  # then magnitudes choose
        untried = set()
    most = LARGEST * sum(size for name, size in target.sizes.items() if name not in untried) / target.total
    if options.sparsity <= most:
        return
    hints = []
    if untried:
        names = ", ".join(sorted(target.layers[name].linear.label for name in untried)[:NAMED])
        hints.append(f"--scope layer prunes {names}, too, whose cost cannot be measured")
    hints += what_allows_more(options, target)
    raise OptionError(
        f"--sparsity {options.sparsity:g}: at most {math.floor(1000 * most) / 1000:.3f} of {target.total} "
        "weights may become 0" + (f" ({'; '.join(hints)})" if hints else "")
    )


def what_allows_more(options: PruneOptions, target: Target) -> list[str]:
    """Name the options by which layers stay dense that could be pruned.

    Args:
        options: The options.
        target: What is to be pruned.

    Returns:
        One hint for each option.
    """
    hints = []
    if not options.depthwise and any(layer.linear.depthwise for layer in target.weights.values()):
        hints.append("--depthwise prunes depthwise convolutions")
    if options.skip_first_last:
        hints.append("without --skip-first-last the ends are pruned")
    if options.include or options.exclude:
        hints.append("without --include and --exclude all layers are pruned")
    return hints


def is_pruned(target: Target, sparsity: float) -> bool:
    """Return whether there are as many zeros as asked for, except for rounding in each layer.

    Args:
        target: What is to be pruned.
        sparsity: Share of zeros of the whole network, from 0 to 1.

    Returns:
        Whether there are.
    """
    if target.pattern.group:
        return all(_matches(layer, target.pattern) for layer in target.layers.values())
    weights = [layer.linear.weight for layer in target.weights.values()]
    zeros = sum(w.size - np.count_nonzero(w) for w in weights)
    return bool(zeros >= sparsity * target.total - len(weights))


def _matches(layer: QuantizedLayer, pattern: Pattern) -> bool:
    view = layer.linear.view(layer.linear.weight)
    groups, outputs, inputs, taps = view.shape
    split = view.reshape(groups, outputs, inputs // pattern.group, pattern.group, taps)
    return bool((np.count_nonzero(split, axis=3) <= pattern.kept).all())


def magnitudes(target: Target) -> dict[str, np.ndarray]:
    """Compute the magnitudes of the equalized weights, which are comparable between layers.

    Source: assumption-free equalization, Horton et al. (arXiv 2011.09058), §3.2.

    Args:
        target: What is to be pruned.

    Returns:
        Name of the weight -> magnitudes, (groups, outputs, inputs x taps).
    """
    scales = assumption_free_scales(target.model)
    found = {}
    for name, layer in target.layers.items():
        own = scales.get(layer.linear.output_name)
        weight = layer.linear.weight if own is None else equalized_weight(layer.linear, own)
        view = layer.linear.view(np.ascontiguousarray(np.abs(weight)))
        found[name] = view.reshape(*view.shape[:2], -1)
    return found


def magnitude_prune(target: Target, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Set the smallest equalized magnitudes of each layer to zero.

    Args:
        target: What is to be pruned.
        shares: Name of the weight -> share of zeros.

    Returns:
        Name of the weight -> new value, as stored.
    """
    found = {}
    for name, size in magnitudes(target).items():
        linear = target.layers[name].linear
        new = np.ascontiguousarray(linear.weight).copy()
        view = linear.view(new)
        choice = MaskChoice(kept(size.size, shares.get(name, 0.0)), view.shape[3], target.pattern)
        view *= choice.mask(torch.from_numpy(size)).numpy().reshape(view.shape)
        found[name] = new
    return found
