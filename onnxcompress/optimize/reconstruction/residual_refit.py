"""Refit the convolutions behind a dropped block, one after the other, in closed form.

The student differs from the teacher from the first dropped block on. For each convolution behind it, in
order, given what the student's already refitted layers feed it (x, not the teacher's input) and what the
teacher computes there (t):

    W', b' = argmin Σ ‖W ∗ x + b − t‖² + λ ‖W − W₀‖²

a ridge regression on patches of x, solved by its normal equations. Where only a residual addition reads
the convolution, t is the teacher's sum less the student's shortcut: the branch also makes up for what the
stream lost (the error does not pile up). A refitted W contains any before- and after-adapter.
Sources: layer-wise reconstruction, Horton et al. (arXiv 2011.09058) §3.3; the asymmetric target, Luo et
al., ThiNet (ICCV 2017) and Dong et al. (NeurIPS 2017).

Does not handle: convolutions with automatic padding, with shared weights, or wider than MAX_FAN_IN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.graph.conv_layers import conv_geometry, conv_layers, only_add_after
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import in_turn, one_thread
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import split_images
from onnxcompress.progress import Progress, silent

MAX_FAN_IN = 2304
"""Inputs per group × kernel size from which on a layer is left to fine-tuning: the solve is cubic in it."""
RIDGE = 1e-2
"""λ as a share of the mean of the patches' second moments."""
RIDGE_SYNTHETIC = 0.3
"""λ on inputs that are not real: where they say little, the weights stay what they were."""
ROWS = 40_000
"""Patches from which on a regression takes no further images."""
PLACES = 128
"""Places at which an image gives a patch, at most."""


@dataclass
class Segment:
    """A piece of the student between neighbouring tensors of its trunk."""

    start: str
    end: str
    layers: list[tuple[Linear, str]]
    """Each with the tensor at which the two networks are compared."""


@dataclass
class Reconstruction:
    """Refits a student to its teacher on the same images; both graphs use the same tensor names."""

    student: Executor
    teacher: Executor
    segments: list[Segment]
    batch: int = 125
    seed: int = 0
    ridge: float = RIDGE
    new: dict[str, Tensor] = field(default_factory=dict)
    """Initializer -> refitted value."""
    _count: int = 0
    """Images that are run."""

    def run(self, images: Tensor, progress: Progress = silent) -> dict[str, Tensor]:
        """Refit the layers of all segments behind the first dropped block, in order.

        Args:
            images: Inputs of the first segment, (N, …).
            progress: Called with the stage, the segments done and the segments in all.

        Returns:
            Initializer -> refitted value.
        """
        ours, theirs = images, images
        self._count = len(images)
        first = self.first_changed()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for done, segment in enumerate(self.segments):
                if done >= first:
                    for layer, check in segment.layers:
                        self._refit(segment, layer, check, ours, theirs, generator)
                theirs = self._forward(self.teacher, segment, theirs)
                ours = self._forward(self.student, segment, ours) if done >= first else theirs
                progress("refitting layers", done + 1, len(self.segments))
        return self.new

    def first_changed(self) -> int:
        """Find the first segment in front of which a block was dropped.

        Returns:
            Its place; the number of segments where there is none.
        """
        changed = (i for i, segment in enumerate(self.segments) if self._shortened(segment))
        return next(changed, len(self.segments))

    def _shortened(self, segment: Segment) -> bool:
        """Return whether a block was dropped at the segment's start."""
        ends = [segment.start], [segment.end]
        return len(self.student.needed(*ends)) != len(self.teacher.needed(*ends))

    def _forward(self, executor: Executor, segment: Segment, values: Tensor) -> Tensor:
        new = self.new if executor is self.student else {}
        parts = split_images(values, self._count, self.batch)

        def run(index: int) -> Tensor:
            with torch.no_grad():  # of each thread
                return executor.run({segment.start: parts[index]}, [segment.end], new)[segment.end]

        return torch.cat(list(in_turn(run, len(parts), executor.device)))

    def _refit(
        self,
        segment: Segment,
        layer: Linear,
        check: str,
        ours: Tensor,
        theirs: Tensor,
        generator: torch.Generator,
    ) -> None:
        gram = cross = None
        total = 0
        parts = list(zip(*(split_images(v, self._count, self.batch) for v in (ours, theirs)), strict=True))
        seeds = [int(torch.randint(1 << 62, (), generator=generator)) for _ in parts]

        def sums(index: int) -> tuple[Tensor, Tensor, int]:
            with torch.no_grad():  # of each thread
                x, t = parts[index]
                mine = self.student.run({segment.start: x}, [layer.input_name, check], self.new)
                wanted = self.teacher.run({segment.start: t}, [check])[check]
                places = torch.Generator().manual_seed(seeds[index])
                a, r = _regression(layer, mine[layer.input_name], wanted - mine[check], places)
                return a @ a.transpose(1, 2), r @ a.transpose(1, 2), a.shape[2]

        batches = in_turn(sums, len(parts), self.student.device)
        for a, r, rows in batches:
            gram, cross, total = _add(gram, a), _add(cross, r), total + rows
            if total >= ROWS:
                break
        batches.close()
        assert gram is not None
        assert cross is not None
        delta = _solve(gram, cross, self.ridge, layer.bias_name is not None)
        weight = self.new.get(layer.weight_name, self.student.parameters[layer.weight_name])
        step = delta[..., :-1].reshape(layer.outputs, -1).reshape(weight.shape)
        self.new[layer.weight_name] = weight + step.to(weight.dtype)
        if layer.bias_name is not None:
            bias = self.new.get(layer.bias_name, self.student.parameters[layer.bias_name])
            self.new[layer.bias_name] = bias + delta[..., -1].reshape(-1).to(bias.dtype)


def segments(student: Model, feature: str) -> list[Segment]:
    """Split the student's trunk, up to the feature tensor, into segments.

    Args:
        student: The network without its dropped blocks.
        feature: Name of the feature tensor.

    Returns:
        The segments in order, each with the layers that can be refitted.
    """
    topology = Topology(student)
    trunk = topology.trunk()
    found = []
    for start, end in pairwise(trunk):
        layers = [
            (layer, (only_add_after(student, layer) or (layer.output_name,))[0])
            for layer in conv_layers(student, topology.between(start, end)).values()
            if math.prod(layer.weight.shape[1:]) <= MAX_FAN_IN
        ]
        found.append(Segment(start.name, end.name, layers))
        if end.name == feature:
            break
    return found


def _regression(
    layer: Linear, x: Tensor, residual: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return patches with a 1 for the bias (G, F + 1, R) and residuals (G, O/G, R) at random places."""
    conv = conv_geometry(layer.node)
    assert conv is not None  # see `segments`
    top, left, bottom, right = conv.pads
    padded = F.pad(x.float(), (left, right, top, bottom))
    patches = F.unfold(padded, conv.kernel, conv.dilations, 0, conv.strides)  # N, I·k, L
    length = patches.shape[2]
    take = torch.randperm(length, generator=generator)[:PLACES]
    grouped = _grouped(patches[:, :, take], layer.groups)
    ones = torch.ones_like(grouped[:, :1])
    return torch.cat([grouped, ones], 1), _grouped(residual.float().flatten(2)[:, :, take], layer.groups)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Reshape (N, G·C, L) to (G, C, N·L)."""
    count, channels, length = x.shape
    return x.reshape(count, groups, channels // groups, length).permute(1, 2, 0, 3).flatten(2)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.double() if total is None else total.add_(part)


def _solve(gram: Tensor, cross: Tensor, ridge: float, bias: bool) -> Tensor:
    """Solve (gram + λ I) Δᵀ = crossᵀ for Δ (G, O/G, F + 1); the bias is not damped, or held at 0."""
    damping = ridge * gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1).clamp_min(1e-12)
    system = gram + torch.diag_embed(damping[:, None].expand(-1, gram.shape[1]))
    system[:, -1, -1] = gram[:, -1, -1] if bias else torch.finfo(gram.dtype).max ** 0.25
    with one_thread():
        solved: Tensor = torch.linalg.solve(system, cross.transpose(1, 2))
    return solved.transpose(1, 2)
