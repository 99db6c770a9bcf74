"""Tune pruned layers together by gradient: zeros stay zeros.

    loss = mean over levels of ‖s − t‖² / var t  +  Σ over outputs ‖s − t‖² / var t

s, t: tensors of student and teacher; levels: the trunk where it is narrow. The closed form (`admm_mask`)
knows the input and the target of one layer at a time. Only this step sees errors of several layers that
could cancel, and what activations clip. `tests/benchmarks/deep_inputs.py` measures what it gains.

Source: the global AdaPrune of Frantar and Alistarh, SPDY (arXiv 2201.13096). Gradients are added in halves
of a batch, each on one thread: the same whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.graph.query import is_op, producer
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import in_turn, one_thread
from onnxcompress.optimize.device import autocast, laid_out
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.walk_plan import floats
from onnxcompress.optimize.gradient_steps import Adam
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import Plan

STEPS, BATCH, LEARNING_RATE = 100, 64, 0.003
WARM_UP = 0.05
"""Share of the steps in which the rate rises."""
HALVES = 2
NARROW = 2
"""Largest size of a level, relative to the size of the first tensor."""


@dataclass(frozen=True)
class Subnetwork:
    """The part of a network from one tensor of the trunk to the outputs."""

    start: str
    levels: tuple[str, ...]
    outputs: tuple[str, ...]


def subnetwork_from(model: Model, start: str) -> Subnetwork:
    """Describe the part of the network behind a tensor.

    Args:
        model: The network.
        start: Name of a tensor of the trunk.

    Returns:
        The narrow tensors of the trunk behind it, and the network's outputs.
    """
    topology, shapes = model.analysis(Topology), tensor_shapes(model)
    tensors = model.graph.tensors()

    first = topology.position(tensors[start])
    outputs = tuple(t.name for t in model.graph.outputs if id(t) in topology.data)
    levels = tuple(
        t.name
        for t in topology.trunk()
        if topology.position(t) > first
        and is_op(producer(t), "Conv", "Add", "GlobalAveragePool", "ReduceMean")
        and floats(shapes.get(t.name)) <= NARROW * floats(shapes[start])
        and t.name not in outputs
    )
    return Subnetwork(start, levels, outputs)


def finetune_sparse(
    model: Model,
    plan: Plan,
    where: Subnetwork,
    values: Tensor,
    seen: Tensor,
    pruned: Mapping[str, Tensor],
    *,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Fine-tune pruned parameters of a subnetwork to the teacher's tensors; zeros of weights stay zeros.

    Source: the global AdaPrune of SPDY (Frantar and Alistarh, arXiv 2201.13096).

    Args:
        model: The teacher.
        plan: Its linear layers.
        where: The subnetwork.
        values: Inputs of the teacher at `where.start`, (N, …).
        seen: Inputs of the student there, (N, …).
        pruned: Initializer -> pruned value; those the subnetwork does not use are left out.
        steps: Steps of Adam.
        seed: Random seed of the batches.
        device: Where torch computes.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        Initializer -> tuned value, on the CPU.
    """
    executor = Executor.from_model(model, device=device)
    wanted = _wanted(executor, where.start, values, [*where.levels, *where.outputs])
    names = list(wanted)
    with one_thread():
        spread = {n: w.float().var().clamp_min(1e-12) for n, w in wanted.items()}
        sizes = {n: max(float(v.square().mean().sqrt()), 1e-3) for n, v in pruned.items()}
    used = {t.name for node in executor.needed([where.start], names) for t in node.inputs}
    leaves = {
        n: laid_out(v.detach().clone().float().to(executor.device)).requires_grad_()
        for n, v in pruned.items()
        if n in used
    }
    if not leaves:
        return {}
    weights = {layer.linear.weight_name for layer in plan.layers.values()}
    masks = {n: v.detach() != 0 for n, v in leaves.items() if n in weights}
    adam = Adam(list(leaves.values()), [LEARNING_RATE * sizes[n] for n in leaves], betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        index = torch.randint(len(values), (BATCH,), generator=generator)

        def slopes(half: int, index: Tensor = index) -> tuple[Tensor, ...]:
            own = index[half::HALVES]
            with autocast(executor.device):
                made = executor.run({where.start: laid_out(seen[own])}, names, leaves)
            errors = {
                n: (made[n].float() - wanted[n][own].float()).square().mean() / spread[n] for n in names
            }
            share = 1 / max(len(where.levels), 1)
            shares = {n: share if n in where.levels else 1.0 for n in names if made[n].requires_grad}
            if not shares:  # behind an ArgMax, say
                return tuple(torch.zeros_like(leaf) for leaf in leaves.values())
            loss = torch.stack([weight * errors[n] for n, weight in shares.items()]).sum()
            return torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )

        halves = zip(*in_turn(slopes, HALVES, executor.device), strict=True)
        adam.step([torch.stack(parts).mean(0) for parts in halves], rate(step, steps))
        with torch.no_grad():
            for name, mask in masks.items():
                leaves[name].mul_(mask)
        progress("tuning layers together", step + 1, steps)
    return {name: value.detach().cpu() for name, value in leaves.items()}


def _wanted(executor: Executor, start: str, values: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Compute the teacher's tensors, in float16 where that holds them: they take most of the memory."""

    def computed(names: list[str], kept_as: torch.dtype) -> dict[str, Tensor]:
        made = executor.run_batched({start: values}, names, count=len(values), batch=BATCH, kept_as=kept_as)
        return {n: v for n, v in made.items() if v.is_floating_point()}

    found = computed(names, torch.float16)
    if large := [n for n, v in found.items() if not v.isfinite().all()]:
        found |= computed(large, torch.float32)
    return found


def rate(step: int, steps: int) -> float:
    """Compute the relative learning rate: linear warm-up, then half a cosine to zero.

    Args:
        step: The step, from 0.
        steps: Steps in all.

    Returns:
        The factor of the peak rate, from 0 to 1.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))
