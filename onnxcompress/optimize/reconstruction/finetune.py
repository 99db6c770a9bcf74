"""Fine-tune a student to a teacher's features on a few unlabelled images (PRACTISE, arXiv 2202.07861 §3.3).

    loss = ‖s − t‖² / ‖t‖²  +  POOLED · the same of their global pool  +  LEVELS · mean over levels of it

s, t: the feature tensor of student and teacher. The classifier reads what the global pool makes of it, in
which errors that are alike at all places count most. Levels: narrower places on the way there, where a
target leaves less to learn by heart than the features alone do. The publication has only the features.

From refitted layers on, with rates relative to each weight's size that fall to zero (`descent`). Steps see
augmented images, and the teacher's answers to them (`taught_views`). All before the feature is trained.

What is kept is the running average of the weights with the least error on inputs kept aside, which is
looked at CHECKS times. The values at the start are the first candidate, so on these inputs the result is
never worse than they are. As long as no look found anything better, the next steps begin at the start
again, at a SLOWER rate: depthwise networks and few images want a small one, where ResNets gain by a large
one from the first look on. Tuning ends early where PATIENCE looks in a row found nothing better.

On a CPU a step takes its batch in pieces, each on one thread, and adds their gradients in order: the same
whatever the number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.graph.query import is_op
from onnxcompress.optimize.captured_step import Step, captured
from onnxcompress.optimize.device import laid_out, resident
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.descent import Descent
from onnxcompress.optimize.reconstruction.feature_loss import Matched, Objective, add_slopes
from onnxcompress.optimize.reconstruction.held_out import HeldOut
from onnxcompress.optimize.reconstruction.taught_views import REPEATS, TaughtViews
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.progress import Progress, silent

CHECKS = 10
"""How often the error on the inputs kept aside is looked at."""
PATIENCE = 4
"""Looks without a gain after which tuning ends."""
SLOWER = 4.0
"""What rates are divided by where a look found the values worse than those at the start. EfficientNet-Lite0
without two blocks, 88 images, error on 12 others (0.180 before): 0.160 at a quarter of the rate at which no
step was better; ResNet-56 on 50 images 0.259 to 0.183 at the full one."""
LEVELS = 24.0
"""Weight of the levels' relative errors, their mean, against that of the features."""
POOLED = 2.0
"""The same of the pooled features. Agreement with the whole network at 0, 2 and 6, one seed: MobileNetV2 of
Fashion-MNIST without three blocks 95.9, 96.4, 96.7 %; ResNet-20 (CIFAR-10) without four 74.0, 75.6, 75.7 %;
ResNet-56 without eight 94.6, 94.6, 94.2 %. The scores of classes in their place leave ResNet-56 93.1 %."""
AVERAGED, YOUNG = 0.95, 10
"""What the running average keeps of itself in a step; in step t no more than t / (t + YOUNG)."""
TRIED_STEPS = 2 * REPEATS
"""Steps that are timed where a time is given: each view comes as often as later on."""


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
    """Number of steps; where `seconds` are given, as many as fit these take its place."""
    batch: int
    learning_rate: float
    """Peak learning rate, relative to each parameter tensor's root mean square."""
    seed: int
    warm_up: float = 0.05
    """Share of the steps in which the rate rises; from then on it falls to zero."""
    whole: bool = False
    """Whether all steps are taken, also where looks in a row found nothing better."""
    orthogonal: bool = True
    """Whether steps of matrices are orthogonalized; otherwise all are steps of Adam."""
    captured: bool = True
    """On a GPU, record a step as a CUDA graph and replay it."""
    seconds: float | None = None
    """Time to train for."""

    def share(self, step: int) -> float:
        """Compute the rate of a step.

        Args:
            step: Steps before it.

        Returns:
            The rate as a part of the peak rate.
        """
        warm = max(1, round(self.warm_up * self.steps))
        return min(1.0, (step + 1) / warm) * (1 - step / self.steps)


def finetune(
    student: Executor,
    teacher: Executor,
    matched: Matched,
    images: Tensor,
    schedule: Schedule,
    held_out: HeldOut,
    *,
    start: Mapping[str, Tensor] | None = None,
    frozen: Collection[str] = (),
    shares: Tensor | None = None,
    nhwc: bool = False,
    progress: Progress = silent,
) -> Finetuned:
    """Train all parameters that the feature depends on, to the teacher's features.

    Source: PRACTISE (arXiv 2202.07861), §3.3.

    Args:
        student: The network to train.
        teacher: The network that gives the target.
        matched: The tensors that are brought together.
        images: Normalized images, (N, C, H, W), or (N, H, W, C) with `nhwc`.
        schedule: How long and how fast to train.
        held_out: Inputs kept aside, which decide what is kept.
        start: Initializer -> value to start from, where it is not the student's own.
        frozen: Names of initializers that keep their values.
        shares: How often each image is drawn, relative to the others, (N,); None: equally often.
        nhwc: Whether the network takes channels last.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The values of the trained initializers with the least error on the inputs kept aside.
    """
    device, start = student.device, start or {}
    images = resident(images, device)
    if nhwc:
        images = images.permute(0, 3, 1, 2)
    values, rates = _leaves(student, start, matched, frozen)
    begin = time.perf_counter()
    best = _Best(student, matched.feature[0], held_out, {**start, **values})
    if not values:  # no layer is left in front of the feature: all blocks were dropped
        return Finetuned({}, best.outcome(0, 0))
    looking = CHECKS * (time.perf_counter() - begin)
    theirs = [name for _, name in matched.pairs]
    objective = Objective(student, matched, list(values), _scales(teacher, matched, held_out))
    views = TaughtViews(teacher, matched.source, theirs, images, shares, schedule.batch, nhwc)
    training = _Training(objective, views, rates, schedule)
    if schedule.seconds is not None:
        training = training.within(schedule.seconds - looking, values)
        schedule = training.schedule
    average = {name: value.detach().clone() for name, value in values.items()}
    descent = training.descent(values)
    looks = {round((look + 1) * schedule.steps / CHECKS) for look in range(CHECKS)}
    step = 0
    for step in training.steps(values, descent):
        _follow(average, values, step)
        if step in looks:
            best.look(step, average)
            if best.step == 0 and not schedule.whole:
                _set_back((values, average), best.values)
                descent.slow_down(SLOWER)
        progress("fine-tuning", step, schedule.steps)
        if best.missed == PATIENCE and not schedule.whole:
            break
    return Finetuned(best.values, best.outcome(step, schedule.steps))


def _follow(average: Mapping[str, Tensor], values: Mapping[str, Tensor], step: int) -> None:
    """Move the running average towards the values."""
    new = 1 - min(AVERAGED, step / (step + YOUNG))
    with torch.no_grad():
        torch._foreach_lerp_([average[name] for name in values], list(values.values()), new)


@torch.no_grad()
def _set_back(values: Iterable[Mapping[str, Tensor]], start: Mapping[str, Tensor]) -> None:
    """Give the values and their average those at the start again."""
    for kept in values:
        for name, value in kept.items():
            value.copy_(start[name])


def _scales(teacher: Executor, matched: Matched, held_out: HeldOut) -> list[float]:
    """Weigh squared errors of each pair of tensors: weight over mean square of the teacher's."""
    names = [theirs for _, theirs in matched.pairs]
    sizes = held_out.mean_squares(teacher, names)
    weights = [
        1.0,
        *[LEVELS / max(len(matched.levels), 1)] * len(matched.levels),
        *[POOLED] * len(matched.pooled),
    ]
    return [w / max(size, 1e-12) for w, size in zip(weights, sizes, strict=True)]


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

    def outcome(self, steps: int, planned: int) -> TuningOutcome:
        """Describe what was kept after so many steps of those that were planned."""
        count = len(self.held_out.images)
        return TuningOutcome(count, steps, self.step, self.before, self.error, planned)


@dataclass(frozen=True)
class _Training:
    """Steps along the gradient of an objective on views."""

    objective: Objective
    views: TaughtViews
    rates: Sequence[float]
    schedule: Schedule

    def descent(self, values: Mapping[str, Tensor]) -> Descent:
        """Prepare to change the values along their gradients."""
        schedule = self.schedule
        return Descent(list(values.values()), self.rates, schedule.learning_rate, schedule.orthogonal)

    def steps(self, values: Mapping[str, Tensor], descent: Descent) -> Iterator[int]:
        """Change the values step by step, and yield how many were taken."""
        leaves, schedule = list(values.values()), self.schedule
        device, slower = leaves[0].device, None

        def step(share: float | Tensor, x: Tensor, *wanted: Tensor) -> None:
            add_slopes(self.objective, x, wanted, leaves)
            descent.step(share)

        take: Step = step
        for done, (x, wanted) in enumerate(self.views.batches(schedule.steps, schedule.seed)):
            rate = schedule.share(done)
            if not schedule.captured or device.type == "cpu":
                step(rate, x, *wanted)
            else:
                given = (torch.full((), rate, device=device), x, *wanted)
                if slower != descent.slower:  # rates are recorded as they are
                    take, slower = step, descent.slower
                    take = captured(step, given, [*leaves, *descent.state])
                take(*given)
            yield done + 1

    def within(self, seconds: float, values: Mapping[str, Tensor]) -> _Training:
        """Plan as many steps as fit into a time, by steps of copies of the values."""
        copies = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        for count in (1, TRIED_STEPS):  # the first step makes plans, which stay
            begin = time.perf_counter()
            tried = replace(self, schedule=replace(self.schedule, steps=count))
            for _ in tried.steps(copies, tried.descent(copies)):
                pass
            if next(iter(copies.values())).device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - begin
        steps = max(CHECKS, int(seconds * TRIED_STEPS / took))
        return replace(self, schedule=replace(self.schedule, steps=steps))


def _leaves(
    student: Executor, start: Mapping[str, Tensor], matched: Matched, frozen: Collection[str]
) -> tuple[dict[str, Tensor], list[float]]:
    """Trainable copies of the parameters that the feature depends on, and their scales."""
    needed = student.needed([matched.source], [matched.feature[0]])
    used = {t.name for node in needed for t in _trainable(node)}.difference(frozen)
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
