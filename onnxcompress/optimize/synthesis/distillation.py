"""Distilled images: optimize pixels until the network's statistics are those of its training data.

    min over x in [0, 255]:   Σ_t mean_c ( (μ_c(x) − β_c)² / γ_c² + (σ_c(x) / |γ_c| − 1)² )

t runs over tensors with known statistics (β, |γ|: of a BatchNorm's output, from the node or the record); μ
and σ are those of a chunk of images, over images and places. Adam starts from procedural images, and each
step sees mirrored and shifted views, so that the result does not depend on single pixels. Sources: Cai et
al., ZeroQ (CVPR 2020) and Yin et al., DeepInversion (CVPR 2020), eq. 4; the relative form weighs all layers
alike.

A step takes its chunk in pieces, each on one thread: the moments of all together give the gradient at the
pieces' own moments, and each goes back from there. So images are the same whatever the number of threads.

What makes it fast: the backward pass of a chunk's moments is one multiply-add; neighbouring tensors carry
nearly the same information, so about twenty of them are enough; starting from dead leaves, twenty steps are
enough where the network was trained on photographs; bfloat16 is used where it pays. Where images are still
FAR from the statistics after these, as dead leaves are from clothes on a black ground, more and larger
steps follow. Does not handle: statistics of tensors whose channels are not axis
1; several inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxcompress.data.image_set import ImageSet
from onnxcompress.errors import ModelError
from onnxcompress.graph.query import data_input
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import in_turn, one_thread_each
from onnxcompress.optimize.device import autocast, fitting
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.gradient_steps import Adam
from onnxcompress.optimize.intermediate_results import Values, kept
from onnxcompress.optimize.synthesis.statistics_mismatch import (
    Targets,
    moments_mismatch,
    moments_of,
    targets_of,
)
from onnxcompress.progress import Progress, silent
from onnxcompress.statistics.record import ChannelStatistics, known_statistics

STEPS, RATE = 20, 0.023
"""Steps of Adam, and its first rate as a share of the range of pixels; it falls to 0 by half a cosine."""
FAR = 0.08
"""Mismatch of a chunk after these steps, mean over tensors, from which on more follow. ResNet-56 has 0.004
(real images: 0.002), EfficientNet-Lite0 0.04 (0.03), and MobileNetV2 of Fashion-MNIST 0.12 (0.002)."""
MORE_STEPS, MORE_RATE = 100, 0.1
"""The same of those that follow. Relative error of the features of Fashion-MNIST's MobileNetV2 without
three blocks, on images that it was trained on: 0.204 by the first steps alone, 0.095 by these alone."""
CHUNK = 128
"""Images that are optimized together, at most: the chunk as a whole matches the statistics."""
PIECE = 32
"""Images of a chunk that go through the network at once on a CPU, on one thread."""
CHUNK_BYTES = 3 << 30
"""Memory that the activations of a chunk may take; it is made smaller where they need more."""
SHIFT = 16
"""A view is shifted by up to 1 / SHIFT of its side, around the edges."""


@one_thread_each()
def distill(
    model: Model,
    start: ImageSet,
    *,
    statistics: Mapping[str, ChannelStatistics] | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> ImageSet:
    """Distil images of the number, size and normalization of `start`, without labels.

    Sources: ZeroQ (Cai et al., CVPR 2020); DeepInversion (Yin et al., CVPR 2020), eq. 4.

    Args:
        model: The network, with one input.
        start: The images to start from.
        statistics: Tensor -> statistics to match; None: what the file knows.
        steps: Steps of Adam; None: STEPS, and MORE_STEPS of chunks that are FAR from the statistics then.
        seed: Random seed of the views.
        device: Where torch computes.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The images.

    Raises:
        ModelError: No tensor has known statistics, or no gradient reaches the input.
        RuntimeUnavailable: The GPU's memory does not hold even a few images.
    """
    executor = Executor.from_model(model, device=device)
    source = str(data_input(model).name)
    targets = _targets(model, executor, known_statistics(model) if statistics is None else statistics)
    pixels = _Pixels.of(start, device)
    rounds = ((STEPS, RATE), (MORE_STEPS, MORE_RATE)) if steps is None else ((steps, RATE),)

    def work(chunk: int) -> list[np.ndarray]:
        return _optimized(executor, source, targets, pixels, start.x, rounds, (chunk, seed), progress)

    def parts() -> dict[str, Any]:
        wanted = () if statistics is None else sorted(statistics.items())
        values = [part.tobytes() for _, known in wanted for part in (known.mean, known.std)]
        return {
            "model": model.digest(),
            "start": hashlib.sha256(start.x.tobytes()).hexdigest(),
            "statistics": hashlib.sha256(b"".join(values)).hexdigest(),
            "options": [str(start.preprocess), rounds, seed, device],
        }

    def distilled() -> Values:
        return {"x": np.concatenate(fitting("distilling images", _chunk(model, len(start)), work))}

    names = tuple(f"distilled[{i}]" for i in range(len(start)))
    return replace(start, x=kept("distilled images", parts, distilled)["x"], y=None, names=names)


def _optimized(
    executor: Executor,
    source: str,
    targets: Targets,
    pixels: _Pixels,
    start: np.ndarray,
    rounds: Sequence[tuple[int, float]],
    how: tuple[int, int],
    progress: Progress,
) -> list[np.ndarray]:
    """Optimize the images in chunks. rounds: steps and rate of each; how: images in a chunk, seed."""
    chunk, seed = how
    generator = torch.Generator().manual_seed(seed)
    made: list[np.ndarray] = []
    chunks = torch.split(torch.from_numpy(start), chunk)
    done, total = 0, len(chunks) * rounds[0][0]
    for part in chunks:
        share = pixels.shares(part.numpy()).contiguous(memory_format=pixels.memory).requires_grad_()
        mismatch: Tensor | float = float("inf")
        for at, (steps, rate) in enumerate(rounds):
            if float(mismatch) < FAR:
                break
            total += steps * (at > 0)
            adam = Adam([share], [rate], betas=(0.5, 0.9), eps=1e-12)  # gradients are tiny
            for step in range(steps):
                view = _drawn_view(share, pixels.places, generator)
                slope, mismatch = _slope(executor, source, targets, pixels, share, view)
                adam.step([slope], 0.5 * float(1 + np.cos(np.pi * step / steps)))
                with torch.no_grad():
                    share.clamp_(0, 1)
                done += 1
                progress("distilling images", done, total)
        made.append(pixels.rounded(share.detach()))
    return made


@dataclass(frozen=True)
class _Pixels:
    """Conversions between uint8 pixels, shares of their range in the network's layout, and inputs."""

    low: Tensor
    high: Tensor
    images: ImageSet

    @staticmethod
    def of(images: ImageSet, device: str) -> _Pixels:
        """Read the range of pixels from the normalization of images.

        Args:
            images: The images.
            device: Where tensors lie.

        Returns:
            The conversions.
        """
        black = np.zeros((1, 1, 1, images.x.shape[3]), np.uint8)
        ends = (images.preprocess.normalize(black), images.preprocess.normalize(black + np.uint8(255)))
        low, high = (torch.from_numpy(end).to(device) for end in ends)
        return _Pixels(low, high, images)

    @property
    def nchw(self) -> bool:
        return self.images.preprocess.layout == "nchw"

    @property
    def places(self) -> tuple[int, int]:
        """Axes of height and width."""
        return (2, 3) if self.nchw else (1, 2)

    @property
    def memory(self) -> torch.memory_format:
        return torch.channels_last if self.nchw else torch.contiguous_format

    def shares(self, x: np.ndarray) -> Tensor:
        """Convert pixels to shares of their range.

        Args:
            x: Pixels, uint8, (N, H, W, C).

        Returns:
            Shares from 0 to 1, in the network's layout.
        """
        normalized = torch.from_numpy(self.images.preprocess.normalize(x)).to(self.low.device)
        return (normalized - self.low) / (self.high - self.low)

    def normalized(self, shares: Tensor) -> Tensor:
        """Convert shares of the range to inputs of the network.

        Args:
            shares: Shares from 0 to 1, in the network's layout.

        Returns:
            Normalized values in the same layout.
        """
        return self.low + shares * (self.high - self.low)

    def rounded(self, shares: Tensor) -> np.ndarray:
        """Convert shares of the range to pixels.

        Args:
            shares: Shares from 0 to 1, in the network's layout.

        Returns:
            Pixels, uint8, (N, H, W, C).
        """
        x = (shares * 255).round().to("cpu", torch.uint8)
        x = (x.permute(0, 2, 3, 1) if self.nchw else x).contiguous()
        return np.ascontiguousarray(x.flip(-1) if self.images.preprocess.order == "bgr" else x)


def _drawn_view(
    x: Tensor, places: tuple[int, int], generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Mirror images or not, and shift them around the edges; alike for all images of a step."""
    mirrored = bool(torch.rand(1, generator=generator) < 0.5)
    reach = [max(1, x.shape[axis] // SHIFT) for axis in places]
    moved = [int(torch.randint(-r, r + 1, (1,), generator=generator)) for r in reach]

    def view(part: Tensor) -> Tensor:
        return (part.flip(places[1]) if mirrored else part).roll((moved[0], moved[1]), places)

    return view


def _slope(
    executor: Executor,
    source: str,
    targets: Targets,
    pixels: _Pixels,
    share: Tensor,
    view: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradient of a chunk's mismatch at its pixels, piece by piece, and its mean over tensors.

    Raises ModelError where no gradient reaches the pixels.
    """
    size = PIECE if executor.device.type == "cpu" else len(share)
    pieces = [part.detach().requires_grad_() for part in torch.split(share.detach(), size)]

    def forward(index: int) -> list[Tensor]:
        with autocast(executor.device):
            values = executor.run({source: pixels.normalized(view(pieces[index]))}, list(targets))
        return [moment for name in targets for moment in moments_of(values[name])]

    moments = list(in_turn(forward, len(pieces), executor.device))
    weights = [len(piece) / len(share) for piece in pieces]
    whole = [
        torch.stack([w * m.detach() for w, m in zip(weights, column, strict=True)]).sum(0).requires_grad_()
        for column in zip(*moments, strict=True)
    ]
    rows = zip(whole[::2], whole[1::2], targets.values(), strict=True)
    loss = torch.stack([moments_mismatch(first, second, *target) for first, second, target in rows]).sum()
    slopes = torch.autograd.grad(loss, whole)

    def backward(index: int) -> Tensor:
        reached = [
            (m, weights[index] * s) for m, s in zip(moments[index], slopes, strict=True) if m.requires_grad
        ]
        if not reached:
            raise ModelError(
                f"no gradient reaches the input {source!r}, so no image can be distilled (is it "
                "quantized?); take procedural ones"
            )
        outputs, at = zip(*reached, strict=True)
        (found,) = torch.autograd.grad(outputs, pieces[index], at)
        return found

    slope = torch.cat(list(in_turn(backward, len(pieces), executor.device)))
    return slope, loss.detach() / len(targets)


def _targets(
    model: Model, executor: Executor, statistics: Mapping[str, ChannelStatistics]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Select the (mean, deviation) of the tensors to match, in the order of the graph."""
    made = targets_of([t.name for n in model.graph.nodes for t in n.outputs], statistics, executor.device)
    if not made:
        raise ModelError(
            f"{model.name}: no tensor of the graph has known statistics to distil images from; take "
            "procedural images"
        )
    return made


def _chunk(model: Model, count: int) -> int:
    """Choose how many images are optimized together."""
    each = sum(_floats(shape) for shape in tensor_shapes(model).values()) * 2
    largest = max(8, min(CHUNK, CHUNK_BYTES // max(each, 1)))
    return -(-count // -(-count // largest))  # chunks of equal size


def _floats(shape: tuple[int | str | None, ...]) -> int:
    if len(shape) < 3:
        return 0
    return int(np.prod([d if isinstance(d, int) else 1 for d in shape[1:]]))
