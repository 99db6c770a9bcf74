"""The published fine-tuning of PRACTISE (arXiv 2202.07861 and its public reference), on any ONNX network.

A dropped block becomes a 1×1 convolution on its stream, the identity at first; the convolutions behind it
read the stream through another one. BatchNorm stays in the graph, in training mode, with running statistics
as PyTorch keeps them. All in front of the features is trained by SGD (rate 0.02, momentum 0.9, weight decay
1e-4, batch 64, ×0.1 at 40 % and at 80 % of the steps) on the mean squared error of the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor
from torch.optim.sgd import sgd

from onnxcompress.graph.blocks import Block, find_blocks
from onnxcompress.graph.edit import set_values, unique_name
from onnxcompress.graph.query import attribute, consumers, is_op, read
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.captured_step import Step, captured
from onnxcompress.optimize.device import autocast
from onnxcompress.optimize.executor import Executor
from tests.benchmarks.practise import augmented

BATCH = 64
MOMENTUM = 0.9
"""Of running statistics, as ONNX counts it: what is kept in each step."""


def published_finetuning(
    model: Model, names: Sequence[str], images: Tensor, *, steps: int, seed: int = 0, device: str = "cpu"
) -> Model:
    """The network without the blocks, fine-tuned; images (N, C, H, W), normalized, on the device."""
    source, found = model.graph.inputs[0].name, model.analysis(Topology).feature()
    assert found is not None
    feature = str(found.name)
    teacher = Executor.from_model(model, device=device)
    student = with_adapters(model, names)
    norms = to_training(student, source, feature)
    executor = Executor.from_model(student, device=device, training=True)
    used = {t.name for node in executor.needed([source], [feature]) for t in node.inputs}
    running = [str(t.name) for node in norms for t in node.inputs[3:5]]
    new = [str(t.name) for node in norms for t in node.outputs[1:3]]
    fixed = {name: executor.parameters[name].detach().clone() for name in running}
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in executor.parameters.items()
        if name in used and name not in fixed
    }
    generator = torch.Generator().manual_seed(seed)
    sums: list[Tensor | None] = [torch.zeros_like(leaf) for leaf in leaves.values()]
    rate = 0.02

    def step(x: Tensor) -> None:
        with autocast(executor.device, cached=False):
            with torch.no_grad():
                wanted = teacher.run({source: x}, [feature])[feature]
            made = executor.run({source: x}, [feature, *new], leaves | fixed)
        loss = (made[feature].float() - wanted.float()).square().mean()
        slopes = list(torch.autograd.grad(loss, list(leaves.values())))
        with torch.no_grad():
            sgd(
                list(leaves.values()), slopes, sums, momentum=0.9, lr=rate, weight_decay=1e-4,
                dampening=0.0, nesterov=False, maximize=False,
            )  # fmt: skip
            for name, value in zip(running, new, strict=True):
                fixed[name].copy_(made[value])

    take: Step = step
    for done in range(steps):
        x = augmented(images, BATCH, generator)
        if done in (int(0.4 * steps), int(0.8 * steps)):
            rate *= 0.1
        if executor.device.type == "cuda" and done in (0, int(0.4 * steps), int(0.8 * steps)):
            take = captured(
                step, [x], [*leaves.values(), *(one for one in sums if one is not None), *fixed.values()]
            )
        take(x)
    _store(student, leaves | fixed)
    for node in norms:
        node.attrs["training_mode"] = 0
        del node.outputs[2], node.outputs[1]
    student.touch()
    return student


def with_adapters(model: Model, names: Sequence[str]) -> Model:
    """A copy in which each block is a 1×1 convolution, and its readers read through another one."""
    blocks = find_blocks(model)
    dropped = [blocks[name] for name in names]
    student = model.copy()
    tensors = student.graph.tensors()
    for block in dropped:
        exit = tensors[block.exit]
        node, channels = exit.inputs[0], _channels(block)
        node.op, node.attrs = "Conv", {}
        node.inputs = [tensors[block.entry], _identity(student, channels)]
    for block in dropped:
        _read_through_adapter(student, tensors[block.exit], _channels(block))
    student.graph.cleanup().toposort()
    student.touch()
    return student


def _read_through_adapter(student: Model, exit: gs.Tensor, channels: int) -> None:
    """Put an adapter in front of the convolutions that read the stream next."""
    stream = exit
    while len(after := consumers(stream)) == 1 and is_op(after[0], "Relu", "Clip", "Identity"):
        stream = after[0].outputs[0]
    behind = [n for n in consumers(stream) if is_op(n, "Conv") and attribute(n, "group", 1) == 1]
    if not behind or _is_adapter(behind[0]):
        return
    made = gs.Variable(unique_name(student, f"{stream.name}.adapted"), np.float32)
    for node in behind:
        node.inputs[0] = made
    student.graph.nodes.append(
        gs.Node("Conv", made.name, inputs=[stream, _identity(student, channels)], outputs=[made])
    )


def _is_adapter(node: gs.Node) -> bool:
    return str(node.inputs[1].name).startswith("adapter")


def _channels(block: Block) -> int:
    count = block.shape[1]
    assert isinstance(count, int)
    return count


def _identity(student: Model, channels: int) -> gs.Constant:
    values = np.eye(channels, dtype=np.float32).reshape(channels, channels, 1, 1)
    return gs.Constant(unique_name(student, "adapter"), values)


def to_training(student: Model, source: str, feature: str) -> list[gs.Node]:
    """Put the BatchNorms in front of the features into training mode; they are returned."""
    needed = Executor.from_model(student).needed([source], [feature])
    norms = [node for node in needed if is_op(node, "BatchNormalization")]
    for node in norms:
        node.attrs |= {"training_mode": 1, "momentum": MOMENTUM}
        for kind in ("mean", "variance"):
            name = unique_name(student, f"{node.outputs[0].name}.{kind}")
            node.outputs.append(gs.Variable(name, np.float32))
    student.touch()
    return norms


def _store(student: Model, values: dict[str, Tensor]) -> None:
    tensors = student.graph.tensors()
    for name, value in values.items():
        dtype = read(tensors[name]).dtype
        set_values(tensors[name], np.ascontiguousarray(value.detach().cpu().numpy().astype(dtype)))
