"""Fine-tune a student to a teacher's features on a few unlabelled images (PRACTISE, arXiv 2202.07861 §3.3).

    loss = ‖s − t‖² / ‖t‖²        s, t: the feature tensor of student and teacher

from refitted layers on, with rates relative to each weight's size. Each step sees newly augmented images
(flips, shifts, and patches pasted from another image: no label to keep right); the teacher's answer to
them is the target. All before the feature is trained, the classifier behind it has no gradient.

What is kept is the state with the least error on inputs kept aside, which is looked at CHECKS times. The
values at the start are the first candidate, so on these inputs the result is never worse than they are.
Tuning ends early where PATIENCE looks in a row found nothing better.

On a CPU a step takes its batch in pieces, each on one thread, and adds their gradients in order: the same
whatever the number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.errors import CompressError, CompressWarning, one_line
from onnxcompress.graph.query import is_op
from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.device import autocast, laid_out, resident
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.augment import augment
from onnxcompress.optimize.reconstruction.held_out import HeldOut
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.progress import Progress, silent

PIECE = 16
"""Images of a batch that go through at once on a CPU."""
CHECKS = 10
"""How often the error on the inputs kept aside is looked at."""
PATIENCE = 4
"""Looks without a gain after which tuning ends."""
Loss = Callable[..., Tensor]
"""(batch, *values) -> scalar."""


@dataclass(frozen=True)
class Finetuned:
    """The result of fine-tuning."""

    values: dict[str, Tensor]
    """Initializer -> value at the step that was kept, float32."""
    outcome: TuningOutcome


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch: int
    learning_rate: float
    """Peak learning rate of Adam, relative to each parameter tensor's root mean square."""
    seed: int
    warm_up: float = 0.05
    """Share of the steps in which the rate rises."""
    captured: bool = False
    """On a GPU, record a step as a CUDA graph and replay it."""


def finetune(
    student: Executor,
    teacher: Executor,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    source: str,
    feature: tuple[str, str],
    schedule: Schedule,
    held_out: HeldOut,
    *,
    shares: Tensor | None = None,
    nhwc: bool = False,
    progress: Progress = silent,
) -> Finetuned:
    """Train all parameters that the feature depends on, to the teacher's features.

    Source: PRACTISE (arXiv 2202.07861), §3.3.

    Args:
        student: The network to train.
        teacher: The network that gives the target.
        parameters: Initializer -> value to start from, where it is not the student's own.
        images: Normalized images, (N, C, H, W), or (N, H, W, C) with `nhwc`.
        source: Name of the input.
        feature: Name of the feature tensor in the student's graph, and in the teacher's.
        schedule: How long and how fast to train.
        held_out: Inputs kept aside, which decide what is kept.
        shares: How often each image is drawn, relative to the others, (N,); None: equally often.
        nhwc: Whether the network takes channels last.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The values of the trained initializers with the least error on the inputs kept aside.
    """
    device = student.device
    images = resident(images, device)
    if nhwc:
        images = images.permute(0, 3, 1, 2)
    values, rates = _leaves(student, parameters, source, feature[0])
    best = _Best(student, feature[0], held_out, {**parameters, **values})
    if not values:  # no layer is left in front of the feature: all blocks were dropped
        return Finetuned({}, best.outcome(0))
    groups = [
        {"params": [v], "lr": schedule.learning_rate * r}
        for v, r in zip(values.values(), rates, strict=True)
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.98), fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step, schedule))
    generator = torch.Generator().manual_seed(schedule.seed)
    loss_of = _loss(student, teacher, list(values), source, feature)
    looks = {round((look + 1) * schedule.steps / CHECKS) for look in range(CHECKS)}
    step = 0
    while step < schedule.steps and best.missed < PATIENCE:
        x = augment(images, schedule.batch, generator, shares, device)
        if nhwc:
            x = x.permute(0, 2, 3, 1)
        if step == 0 and schedule.captured and device.type == "cuda":
            loss_of = _captured(student, teacher, values, source, feature, x)
        adam.zero_grad(set_to_none=True)
        if device.type == "cpu":
            _add_slopes(student, teacher, values, source, feature, x)
        else:
            loss_of(x, *values.values()).backward()  # type: ignore[no-untyped-call]
        adam.step()
        scheduler.step()
        step += 1
        if step in looks:
            best.look(step, values)
        progress("fine-tuning", step, schedule.steps)
    return Finetuned(best.values, best.outcome(step))


class _Best:
    """The values with the least error on the inputs kept aside, so far."""

    def __init__(
        self, student: Executor, feature: str, held_out: HeldOut, start: Mapping[str, Tensor]
    ) -> None:
        self.student, self.feature, self.held_out = student, feature, held_out
        self.error = float("inf")
        self.look(0, start)
        self.before = self.error

    def look(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep a copy of the values if they are better than all before."""
        error = self.held_out.error(self.student, self.feature, values)
        if step == 0 or error < self.error:
            self.values = {name: value.detach().clone() for name, value in values.items()}
            self.error, self.step, self.missed = error, step, 0
        else:
            self.missed += 1

    def outcome(self, steps: int) -> TuningOutcome:
        """Describe what was kept after so many steps."""
        count = len(self.held_out.images)
        return TuningOutcome(count, steps, self.step, self.before, self.error)


def _loss(
    student: Executor,
    teacher: Executor,
    names: Sequence[str],
    source: str,
    feature: tuple[str, str],
    *,
    cached: bool = True,
) -> Loss:
    """Return the loss as a pure function of a batch and the values of `names`."""
    ours, theirs = feature

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        with autocast(student.device, cached=cached):
            with torch.no_grad():
                wanted = teacher.run({source: x}, [theirs])[theirs]
            got = student.run({source: x}, [ours], dict(zip(names, values, strict=True)))[ours]
        return _relative(got, wanted)

    return loss


def _add_slopes(
    student: Executor,
    teacher: Executor,
    values: Mapping[str, Tensor],
    source: str,
    feature: tuple[str, str],
    x: Tensor,
) -> None:
    """Give the values the gradients of the loss on a batch, taken piece by piece."""
    pieces = torch.split(x, PIECE)
    ours, theirs = feature

    def slopes(index: int) -> tuple[Tensor, ...]:
        """Return the gradients of the squared error, then the sum of squares that it is relative to."""
        feeds = {source: pieces[index]}
        with autocast(student.device):
            with torch.no_grad():
                wanted = teacher.run(feeds, [theirs])[theirs].float()
            got = student.run(feeds, [ours], values)[ours]
        error = (got.float() - wanted).square().sum()
        found = torch.autograd.grad(error, list(values.values()), allow_unused=True, materialize_grads=True)
        return *found, wanted.square().sum().clamp_min(1e-12 * wanted.numel())

    *columns, energy = zip(*in_turn(slopes, len(pieces)), strict=True)
    for value, parts in zip(values.values(), columns, strict=True):
        value.grad = torch.stack(parts).sum(0) / torch.stack(energy).sum()


def _captured(
    student: Executor,
    teacher: Executor,
    values: Mapping[str, Tensor],
    source: str,
    feature: tuple[str, str],
    x: Tensor,
) -> Loss:
    """Record the loss and its backward pass as CUDA graphs, once each, for batches of this shape.

    Where the recording fails (an operator that waits for the device), return the loss as it is, and warn.
    """
    plain = _loss(student, teacher, list(values), source, feature, cached=False)
    sample = (x.clone(), *values.values())
    try:
        made = torch.cuda.make_graphed_callables(plain, sample)
    except torch.OutOfMemoryError:
        raise
    except (CompressError, RuntimeError, AssertionError) as error:
        text = f"no CUDA graph of a step ({one_line(error)}): fine-tuning goes on without"
        warnings.warn(text, CompressWarning, stacklevel=3)
        return plain
    return cast("Loss", made)


def _leaves(
    student: Executor, start: Mapping[str, Tensor], source: str, feature: str
) -> tuple[dict[str, Tensor], list[float]]:
    """Trainable copies of the parameters that the feature depends on, and their scales."""
    used = {t.name for node in student.needed([source], [feature]) for t in _trainable(node)}
    values = {
        name: laid_out(start.get(name, value).detach().clone().float()).requires_grad_()
        for name, value in student.parameters.items()
        if name in used
    }
    if not values:
        return {}, []
    sizes = torch.stack([leaf.detach().square().mean().sqrt() for leaf in values.values()])
    return values, [max(size, 1e-3) for size in sizes.tolist()]


def _trainable(node: gs.Node) -> list[gs.Tensor]:
    """Return the inputs of a node that may be trained.

    Not those of a BatchNorm's statistics (a variance would turn negative), nor scales of a quantizer.
    """
    if is_op(node, "BatchNormalization"):
        return list(node.inputs[:3])
    return [] if is_op(node, "QuantizeLinear", "DequantizeLinear") else list(node.inputs)


def rate(step: int, schedule: Schedule) -> float:
    """Compute the relative learning rate: linear warm-up, then half a cosine to zero.

    Args:
        step: The step, from 0.
        schedule: The schedule.

    Returns:
        The factor of the peak rate, from 0 to 1.
    """
    warm = max(1, round(schedule.warm_up * schedule.steps))
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, schedule.steps - warm)
    return 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))


def _relative(got: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.float()
    return (got.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
