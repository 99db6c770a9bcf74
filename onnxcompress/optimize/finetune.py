"""Fine-tune a student to a teacher's features on a few unlabelled images (PRACTISE, arXiv 2202.07861 §3.3).

    loss = Σ_p w_p · ‖s_p − t_p‖² / ‖t_p‖²        p: the feature tensor (w = 1) and tensors of the trunk

The published procedure matches the features before the pool only; tensors of the trunk that both networks
have give the early layers a target of their own. Each step sees newly augmented images (flips, shifts, and
patches pasted from another image: no label to keep right), the teacher's answer to which is the target.
Everything before the feature is trained, the classifier behind it has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.optimize.executor import Executor
from onnxcompress.passing import Progress, silent


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int = 500
    batch: int = 64
    learning_rate: float = 1e-3
    """Of Adam at its peak, relative to each parameter tensor's root mean square."""
    warm_up: float = 0.05
    """Share of the steps in which the rate rises."""
    trunk_weight: float = 1.0
    """Sum of the weights of the trunk tensors; the feature's is 1."""
    seed: int = 0


def finetune(
    student: Executor,
    teacher: Executor,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    source: str,
    feature: str,
    trunk: Sequence[str],
    schedule: Schedule,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Train all that the feature depends on; returns {initializer: value} in float32.

    images: (N, C, H, W) or (N, H, W, C), normalized; source: the input's name; parameters: where to
    start; trunk: names of tensors that both graphs have.
    """
    names = [feature, *trunk]
    values, rates = _leaves(student, parameters, source, feature)
    groups = [
        {"params": [v], "lr": schedule.learning_rate * r}
        for v, r in zip(values.values(), rates, strict=True)
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _rate(step, schedule))
    generator = torch.Generator().manual_seed(schedule.seed)
    weights = [1.0] + [schedule.trunk_weight / max(1, len(trunk))] * len(trunk)
    device = student.device.type
    for step in range(schedule.steps):
        x = augment(images, schedule.batch, generator).to(student.device)
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            with torch.no_grad():
                wanted = teacher.run({source: x}, names)
            got = student.run({source: x}, names, values)
        loss = torch.stack(
            [w * _relative(got[n], wanted[n]) for n, w in zip(names, weights, strict=True)]
        ).sum()
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
    used = {t.name for node in student.needed([source], [feature]) for t in node.inputs}
    values, scales = {}, []
    for name, value in student.parameters.items():
        if name in used:
            leaf = start.get(name, value).detach().clone().float().requires_grad_()
            values[name] = leaf
            scales.append(max(float(leaf.detach().square().mean().sqrt()), 1e-3))
    return values, scales


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


def fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 pays: on a GPU, and on a CPU with the instructions for it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def augment(images: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """A batch of random views: mirrored, shifted by up to an eighth, half with a pasted patch."""
    index = torch.randint(len(images), (batch,), generator=generator)
    x = images[index].clone()
    flip = torch.rand(batch, generator=generator) < 0.5
    x[flip] = x[flip].flip(-1)
    height, width = x.shape[-2:]
    reach = max(1, height // 8), max(1, width // 8)
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
