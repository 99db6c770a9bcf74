"""Fine-tune a student to a teacher's features on a few unlabelled images (PRACTISE, arXiv 2202.07861 §3.3).

    loss = ‖s − t‖² / ‖t‖²        s, t: the feature tensor of student and teacher

from refitted layers on, with rates relative to each weight's size. Each step sees newly augmented images
(flips, shifts, and patches pasted from another image: no label to keep right); the teacher's answer to
them is the target. All before the feature is trained, the classifier behind it has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.graph import is_op
from onnxcompress.optimize.executor import Executor
from onnxcompress.passing import Progress, silent


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch: int
    learning_rate: float
    """Of Adam at its peak, relative to each parameter tensor's root mean square."""
    seed: int
    warm_up: float = 0.05
    """Share of the steps in which the rate rises."""


def finetune(
    student: Executor,
    teacher: Executor,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    source: str,
    feature: tuple[str, str],
    schedule: Schedule,
    *,
    shares: Tensor | None = None,
    nhwc: bool = False,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Train all that the feature depends on; returns {initializer: value} in float32.

    images: (N, C, H, W), or (N, H, W, C) with `nhwc`, normalized; source: the input's name; feature: the
    name in the student's graph, and in the teacher's; parameters: where to start; shares: (N,), how often
    each image is taken, relative to the others.
    """
    ours, theirs = feature
    if nhwc:
        images = images.permute(0, 3, 1, 2)
    values, rates = _leaves(student, parameters, source, ours)
    if not values:  # of a network without a layer there: all its blocks went
        return {}
    groups = [
        {"params": [v], "lr": schedule.learning_rate * r}
        for v, r in zip(values.values(), rates, strict=True)
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _rate(step, schedule))
    generator = torch.Generator().manual_seed(schedule.seed)
    for step in range(schedule.steps):
        x = augment(images, schedule.batch, generator, shares).to(student.device)
        if nhwc:
            x = x.permute(0, 2, 3, 1)
        with autocast(student.device):
            with torch.no_grad():
                wanted = teacher.run({source: x}, [theirs])[theirs]
            got = student.run({source: x}, [ours], values)[ours]
        loss = _relative(got, wanted)
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        scheduler.step()
        progress("fine-tuning", step + 1, schedule.steps)
    return {name: value.detach() for name, value in values.items()}


def _leaves(
    student: Executor, start: Mapping[str, Tensor], source: str, feature: str
) -> tuple[dict[str, Tensor], list[float]]:
    """Trainable copies of the parameters that the feature depends on, and their scales."""
    used = {t.name for node in student.needed([source], [feature]) for t in _trainable(node)}
    values, scales = {}, []
    for name, value in student.parameters.items():
        if name in used:
            leaf = start.get(name, value).detach().clone().float().requires_grad_()
            values[name] = leaf
            scales.append(max(float(leaf.detach().square().mean().sqrt()), 1e-3))
    return values, scales


def _trainable(node: gs.Node) -> list[gs.Tensor]:
    """Inputs that may be trained: not a BatchNorm's statistics (a variance would turn negative), no scales
    of a quantizer."""
    if is_op(node, "BatchNormalization"):
        return list(node.inputs[:3])
    return [] if is_op(node, "QuantizeLinear", "DequantizeLinear") else list(node.inputs)


def _rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warm = max(1, round(schedule.warm_up * schedule.steps))
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, schedule.steps - warm)
    return 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))


def _relative(got: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.float()
    return (got.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision in bfloat16 where it pays: on a GPU, and on a CPU with the instructions for it."""
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported()
    else:
        pays = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return torch.autocast(device.type, torch.bfloat16, enabled=pays)


def augment(images: Tensor, batch: int, generator: torch.Generator, shares: Tensor | None = None) -> Tensor:
    """A batch of random views: mirrored, shifted by up to an eighth, half with a pasted patch."""
    if shares is None:
        index = torch.randint(len(images), (batch,), generator=generator)
    else:
        index = torch.multinomial(shares, batch, replacement=True, generator=generator)
    x = images[index].clone()
    flip = torch.rand(batch, generator=generator) < 0.5
    x[flip] = x[flip].flip(-1)
    height, width = x.shape[-2:]
    reach = min(max(1, height // 8), height - 1), min(max(1, width // 8), width - 1)
    padded = torch.nn.functional.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    top = torch.randint(2 * reach[0] + 1, (batch,), generator=generator)
    left = torch.randint(2 * reach[1] + 1, (batch,), generator=generator)
    x = torch.stack(
        [
            p[:, t : t + height, s : s + width]
            for p, t, s in zip(padded, top.tolist(), left.tolist(), strict=True)
        ]
    )
    return _paste(x, generator).contiguous(memory_format=torch.channels_last)


def _paste(x: Tensor, generator: torch.Generator) -> Tensor:
    """CutMix without labels: half the images get a rectangle of their neighbour (Yun et al., ICCV 2019)."""
    batch, _, height, width = x.shape
    mixed, other = x.clone(), x.roll(1, 0)
    for i in range(0, batch, 2):
        share = float(torch.rand(1, generator=generator)) ** 0.5
        h, w = max(1, int(height * share)), max(1, int(width * share))
        top = int(torch.randint(height - h + 1, (1,), generator=generator))
        left = int(torch.randint(width - w + 1, (1,), generator=generator))
        mixed[i, :, top : top + h, left : left + w] = other[i, :, top : top + h, left : left + w]
    return mixed
