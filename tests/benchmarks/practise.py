"""The published procedure of PRACTISE (arXiv 2202.07861, and its public reference), to compare with.

Scoring: for each block, identity 1×1 adapters after the convolutions that write to its stream and before
those that read it, trained by SGD (lr 0.02, momentum 0.9, weight decay 1e-4, batch 64, ×0.1 after 40 % of
the steps) on the squared error of the features, both whole networks run in each step; R is the error that
is left on all images. The reference takes 1,000 steps and more a block; fewer keep a comparison short.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import Block
from onnxcompress.graph.conv_layers import readers, writers
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.model import Model
from onnxcompress.optimize.device import autocast, sent
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.augment import windows


def published_recoverability(
    teacher: Model,
    block: Block,
    images: Tensor,
    source: str,
    feature: str,
    *,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
) -> float:
    """R of one block after `steps` of adapter training; images (N, C, H, W), normalized, on the device."""
    whole = Executor.from_model(teacher, device=device)
    pruned = teacher.copy()
    ours = drop_blocks(pruned, [block.exit]).get(feature, feature)
    without = Executor.from_model(pruned, device=device)
    stream = pruned.graph.tensors()[block.entry]
    before, after = readers(pruned, stream), writers(pruned, stream)
    adapters = {
        f"r{i}": torch.eye(x.inputs, requires_grad=True, device=device) for i, x in enumerate(before)
    }
    adapters |= {
        f"w{i}": torch.eye(x.outputs, requires_grad=True, device=device) for i, x in enumerate(after)
    }
    generator = torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(adapters.values(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [int(0.4 * steps)], gamma=0.1)
    for _ in range(steps):
        x = augmented(images, 64, generator)
        with autocast(whole.device):
            with torch.no_grad():
                wanted = whole.run({source: x}, [feature])[feature]
            folded = _folded(without, before, after, adapters)
            got = without.run({source: x}, [ours], folded)[ours]
        loss = (got.float() - wanted.float()).square().mean()
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        schedule.step()
    with torch.no_grad():
        folded = _folded(without, before, after, adapters)
        return _error(whole, without, images, source, (ours, feature), folded)


def _folded(
    executor: Executor, before: Sequence[Linear], after: Sequence[Linear], adapters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Effective weights with the adapters in them, differentiable."""
    values: dict[str, Tensor] = {}
    for i, layer in enumerate(before):
        weight = executor.parameters[layer.weight_name]
        values[layer.weight_name] = torch.einsum("oihw,ij->ojhw", weight, adapters[f"r{i}"])
    for i, layer in enumerate(after):
        weight = values.get(layer.weight_name, executor.parameters[layer.weight_name])
        values[layer.weight_name] = torch.einsum("po,oihw->pihw", adapters[f"w{i}"], weight)
        if layer.bias_name is not None:
            values[layer.bias_name] = adapters[f"w{i}"] @ executor.parameters[layer.bias_name]
    return values


def _error(
    whole: Executor,
    without: Executor,
    images: Tensor,
    source: str,
    feature: tuple[str, str],
    folded: dict[str, Tensor],
) -> float:
    lost = energy = 0.0
    with autocast(whole.device):
        for part in torch.split(images, 125):
            wanted = whole.run({source: part}, [feature[1]])[feature[1]].float()
            got = without.run({source: part}, [feature[0]], folded)[feature[0]].float()
            lost += float((got - wanted).square().sum())
            energy += float(wanted.square().sum())
    return lost / energy


def augmented(images: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random crops with a padding of 4 and flips, as the reference does."""
    index = torch.randint(len(images), (batch,), generator=generator)
    x = images[sent(index, images.device)]
    flip = sent(torch.rand(batch, generator=generator) < 0.5, x.device)
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, batch), generator=generator)
    height, width = x.shape[-2:]
    return windows(padded, top, left, height, width).contiguous(memory_format=torch.channels_last)
