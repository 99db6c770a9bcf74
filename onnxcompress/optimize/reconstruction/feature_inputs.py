"""Synthesize inputs for a network's deep layers, at the tensor where these begin.

The last stage of a CNN has most of its weights and little of its work. A few synthetic images give it too
little input to choose its weights by, without the statistics of real images. So many inputs are synthesized
for it alone, as `distill` makes images:

    min over z:   Σ_t mean_c ( (μ_c − β_c)² / γ_c² + (σ_c / |γ_c| − 1)² )  +  CLASSES_WEIGHT · CE(f(z), k)

z: values of the tensor `split_tensor`, starting from those of procedural images with aligned statistics, or
of real images; t: the recorded tensors from there on; k: a random class for each z, where the network's
output has scores of classes. Real images are of a class; without that term hardly one of 1,000 stands out.
Real images come first, unchanged; only what they lack in number is synthesized.

EfficientNet-Lite0 from its block 12 on, 55 % of it pruned, on 100 real images (`python
tests/benchmarks/deep_inputs.py`): 4.5 dB and a KL divergence of 0.33 on 128 procedural images with aligned
statistics, 7.3 dB and 0.20 on these inputs, 0.14 after `finetune_sparse`.

Source of the idea, of images: Yin et al., DeepInversion (CVPR 2020).
Does not handle: networks without such a tensor, or whose file fixes a batch of more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.account import InputSource
from onnxcompress.formatting import counted
from onnxcompress.graph.query import before_softmax, data_input, is_op, producer
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.device import autocast, laid_out, release_memory
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.executor import Rows
from onnxcompress.optimize.executor.walk_plan import floats, needs, nodes_between
from onnxcompress.optimize.gradient_steps import Adam
from onnxcompress.optimize.reconstruction.context import CalibrationContext, fixed_batch
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.optimize.synthesis.statistics_mismatch import Targets, mismatch, targets_of
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import Plan
from onnxcompress.statistics.record import known_statistics

COUNT = 2048
"""Inputs that are synthesized, at most."""
EACH = 16
"""Inputs that start from the same image, at most."""
CHUNK = 256
"""Inputs that are optimized together, at most: their statistics are matched as a whole."""
BYTES, CHUNK_BYTES = 1 << 30, 1 << 28
"""Memory of all inputs, and of the tensors that a chunk computes, without gradients; fewer are made where
they would take more."""
STEPS = 16
RATE = 0.15
"""Initial learning rate of Adam, in deviations of the channel; it falls to zero by half a cosine."""
CLASSES_WEIGHT = 0.05
FEWEST_CLASSES = 10
"""Least number of values of an output that are taken for scores of classes."""
WORK, WEIGHTS = 1 / 5, 1 / 2
"""Behind the split tensor are at most this share of the numbers that the network computes for an image, and
at least this share of its weights."""
KEPT = 0.85
"""Share of the weights behind the first such tensor that must be behind the split tensor, the last one."""
FEWEST_RECORDED = 3
"""Least number of tensors with known statistics behind the split tensor."""


@dataclass(frozen=True)
class Stage:
    """A part of the trunk whose layers are fitted in one pass, and its inputs."""

    inputs: Tensor
    alignment: StatisticsAlignment
    start: str | None = None
    stop: str | None = None
    used: InputSource | None = None
    """The account of inputs that were synthesized for it."""

    def seen(self, lost: Tensor | None) -> Tensor:
        """Compute the inputs of the student.

        Args:
            lost: Errors of the student at the start of this stage, on other inputs, (n, …); None: none.

        Returns:
            The inputs with these errors added, (N, …).
        """
        if lost is None:
            return self.inputs
        return self.inputs + lost[torch.arange(len(self.inputs)) % len(lost)]


def stages_of(
    context: CalibrationContext,
    starts: Callable[[], Rows] | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Stage]:
    """Split the network in two where its deep layers can have inputs of their own.

    Args:
        context: The network and its inputs.
        starts: Gives images to start from, where there are better ones for it than the context's.
        most: Inputs of the deep layers, at most; None: COUNT, which none exceeds.
        seed: Random seed.
        device: Where torch computes.
        progress: Called with the stage, the chunks done and the chunks in all.

    Returns:
        One stage or two, in order.
    """
    start = split_tensor(context.model, context.plan)
    if start is None:
        return [Stage(context.images, context.alignment)]
    images = context.images if starts is None else starts()
    values = make_feature_inputs(
        context, start, images, most=most, seed=seed, device=device, progress=progress
    )
    made = len(values) - context.real
    where = f"at {start!r}, where the deep layers begin; from {counted(len(images), 'image')}"
    used = InputSource("deep inputs", made, seed, where, "", "") if made else None
    return [
        Stage(context.images, context.alignment, stop=start),
        Stage(values, StatisticsAlignment(), start=start, used=used),
    ]


def split_tensor(model: Model, plan: Plan) -> str | None:
    """Find the tensor of the trunk where the deep layers begin.

    It is not the output of an activation, so that it may take any value.

    Args:
        model: The network.
        plan: Its linear layers.

    Returns:
        Name of the tensor; None where there is none, or the layers behind need other tensors, too.
    """
    topology, known = model.analysis(Topology), known_statistics(model)
    if fixed_batch(model) > 1:
        return None
    shapes = tensor_shapes(model)
    nodes = nodes_between(topology, None, None)
    work = np.array([sum(floats(shapes.get(t.name)) for t in node.outputs) for node in nodes])
    weights = np.array(
        [plan.layers[id(n)].linear.weight.size if id(n) in plan.layers else 0 for n in nodes]
    )
    places = {id(node): place for place, node in enumerate(nodes)}
    least, found = WEIGHTS * weights.sum(), None
    for tensor in topology.trunk():
        maker = producer(tensor)
        if not is_op(maker, "Conv", "Add") or len(shapes.get(tensor.name, ())) != 4:
            continue
        place = places[id(maker)] + 1
        behind = weights[place:].sum()
        if work[place:].sum() > WORK * work.sum() or behind < least:
            continue
        after = {t.name for node in nodes[place:] for t in node.outputs}
        alone = all(after.issuperset({*needs(n, topology)} - {tensor.name}) for n in nodes[place:])
        if alone and len(after & known.keys()) >= FEWEST_RECORDED:
            least, found = max(least, KEPT * behind), str(tensor.name)
    return found


def make_feature_inputs(
    context: CalibrationContext,
    start: str,
    images: Rows | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Tensor:
    """Synthesize inputs at a tensor inside the network that have the recorded statistics behind it.

    Args:
        context: The network and its inputs; real images come first, and stay as they are.
        start: Name of the tensor.
        images: Images to start from, (N, …); None: the context's.
        most: Inputs that are synthesized, at most; None: COUNT, which none exceeds.
        seed: Random seed.
        device: Where torch computes.
        progress: Called with the stage, the chunks done and the chunks in all.

    Returns:
        Values of the tensor, (N, …), N up to `most`.
    """
    executor = Executor.from_model(context.model, device=device)
    topology = context.model.analysis(Topology)
    shapes = tensor_shapes(context.model)
    behind = [t.name for n in nodes_between(topology, start, None) for t in n.outputs]
    targets = targets_of([start, *behind], known_statistics(context.model), executor.device)
    begin = aligned_features(executor, context, start, context.images if images is None else images)
    real = begin[: context.real].cpu()
    logits = _logits(context.model)
    size = min(CHUNK, max(1, CHUNK_BYTES // (4 * sum(floats(shapes.get(name)) for name in behind))))
    fit = max(size, BYTES // (4 * floats(shapes[start])))
    count = min(COUNT, most or COUNT, EACH * len(begin), fit) - len(real)
    if count <= 0:
        return real
    chunks = -(-count // size)

    def work(chunk: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * chunks + chunk)
        first, end = chunk * size, min(count, (chunk + 1) * size)
        index = torch.arange(first, end, device=executor.device)
        z = begin[index % len(begin)]
        mirrored = (index // len(begin) % 2 == 1).view(-1, 1, 1, 1)
        return _optimized(executor, torch.where(mirrored, z.flip(3), z), start, targets, logits, generator)

    made = []
    for part in in_turn(work, chunks, executor.device):
        made.append(part)
        progress("making deep inputs", len(made), chunks)
    release_memory()
    return torch.cat([real, *made])


def aligned_features(executor: Executor, context: CalibrationContext, start: str, images: Rows) -> Tensor:
    """Compute the values of a tensor on images, with aligned statistics.

    Args:
        executor: The executor of the network.
        context: The network and its alignment.
        start: Name of the tensor.
        images: The images, (N, …).

    Returns:
        The values, (N, …).
    """
    alignment, name = context.alignment, str(data_input(context.model).name)
    return executor.run_batched(
        {name: images},
        [start],
        count=len(images),
        batch=context.batch,
        parameters={n: alignment.align(n, executor.parameters[n]) for n in alignment.names},
    )[start]


def _optimized(
    executor: Executor,
    begin: Tensor,
    start: str,
    targets: Targets,
    logits: str | None,
    generator: torch.Generator,
) -> Tensor:
    """Optimize one chunk."""
    unit = begin.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    if start in targets:
        unit = targets[start][1].view(1, -1, 1, 1).clamp_min(1e-6)
    z = laid_out(begin / unit).requires_grad_()
    adam = Adam([z], [RATE], betas=(0.5, 0.9), eps=1e-12)
    classes: Tensor | None = None
    for step in range(STEPS):
        with autocast(executor.device):
            fed = z * unit
            found = executor.run({start: fed}, [*targets, *([logits] if logits else [])]) | {start: fed}
            loss = torch.stack([mismatch(found[name], *targets[name]) for name in targets]).sum()
        if logits:
            scores = found[logits].float()
            if classes is None:
                classes = torch.randint(scores.shape[1], scores.shape[:1], generator=generator)
            loss = loss + CLASSES_WEIGHT * F.cross_entropy(scores, classes.to(scores.device))
        adam.step(torch.autograd.grad(loss, z), 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    return (z * unit).detach().cpu()


def _logits(model: Model) -> str | None:
    """Return the output that has scores of classes, before a softmax; None: there is none."""
    if len(model.graph.outputs) != 1:
        return None
    tensor = before_softmax(model.graph.outputs[0])
    shape = tensor_shapes(model).get(tensor.name, ())
    many = len(shape) == 2 and isinstance(shape[1], int) and shape[1] >= FEWEST_CLASSES
    return str(tensor.name) if many else None
