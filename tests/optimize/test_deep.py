"""Inputs made for the deep layers: where those begin, what the inputs must match; layers tuned together."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor

from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.evaluation.accuracy import logits
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.walk_plan import nodes_between
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.optimize.reconstruction.feature_inputs import (
    EACH,
    WEIGHTS,
    WORK,
    Stage,
    aligned_features,
    make_feature_inputs,
    split_tensor,
)
from onnxcompress.optimize.reconstruction.global_tuning import finetune_sparse, subnetwork_from
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.optimize.synthesis.statistics_mismatch import mismatch, targets_of
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.prune.targets import FLOATS
from onnxcompress.quantization.qdq_plan import make_plan
from onnxcompress.statistics.record import known_statistics, write_record
from tests.helpers.brief import little_learning

pytestmark = pytest.mark.usefixtures("whole_learning")

Threads = Callable[[], AbstractContextManager[None]]

NETWORKS = ("resnet20-fashion.onnx", "mobilenetv2-fashion.onnx")


@pytest.fixture(scope="module")
def contexts(models: Path) -> dict[str, CalibrationContext]:
    found = {}
    for name in NETWORKS:
        model = _prepared(models / name)
        inputs = gather_inputs(
            model, InputRequest(preprocess="fashion-mnist", inputs="layerwise", synthetic=32)
        )
        found[name] = CalibrationContext.of(model, inputs, stretched=False)
    return found


def _prepared(file: Path) -> Model:
    model = load(file)
    fold_and_canonicalize(model)
    return model


def _start(context: CalibrationContext) -> str:
    start = split_tensor(context.model, context.plan)
    assert start is not None
    return start


def _unlike(context: CalibrationContext, start: str, x: Tensor) -> float:
    """How far the recorded tensors from `start` on are from their statistics."""
    executor = Executor.from_model(context.model)
    behind = [t.name for n in nodes_between(Topology(context.model), start, None) for t in n.outputs]
    targets = targets_of(behind, known_statistics(context.model), torch.device("cpu"))
    with torch.no_grad():
        found = executor.run({start: x}, list(targets))
        return float(torch.stack([mismatch(found[n], *targets[n]) for n in targets]).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_behind_the_split_tensor_are_most_weights_and_little_work(
    contexts: dict[str, CalibrationContext], name: str
) -> None:
    context = contexts[name]
    model = context.model
    behind = nodes_between(Topology(model), _start(context), None)
    sizes = {key: layer.linear.weight.size for key, layer in context.plan.layers.items()}
    assert sum(sizes.get(id(n), 0) for n in behind) >= WEIGHTS * sum(sizes.values())
    shapes = tensor_shapes(model)

    def work(nodes: list[gs.Node]) -> int:
        made = [shapes[t.name][1:] for n in nodes for t in n.outputs]
        return sum(math.prod(d for d in shape if isinstance(d, int)) for shape in made)

    assert work(behind) <= WORK * work(nodes_between(Topology(model), None, None))


def test_a_network_without_statistics_or_with_a_fixed_batch_has_no_split_tensor(models: Path) -> None:
    model = _prepared(models / NETWORKS[0])
    write_record(model, {})
    assert split_tensor(model, make_plan(model, FLOATS)) is None
    proto = _prepared(models / NETWORKS[0]).to_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    fixed = Model.from_proto(proto)
    assert split_tensor(fixed, make_plan(fixed, FLOATS)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_deep_inputs_bring_the_recorded_statistics_and_classes(
    contexts: dict[str, CalibrationContext], name: str
) -> None:
    context = contexts[name]
    start = _start(context)
    executor = Executor.from_model(context.model)
    source, output = context.model.graph.inputs[0].name, context.model.graph.outputs[0].name
    with torch.no_grad():
        plain = executor.run({source: context.images}, [start])[start]
    x = make_feature_inputs(context, start)
    assert x.shape == (EACH * len(plain), *plain.shape[1:])
    assert _unlike(context, start, x) < 0.25 * _unlike(context, start, plain)
    with torch.no_grad():
        found = executor.run({start: x}, [output])[output].argmax(1)
    assert (found.bincount(minlength=10) > 0.03 * len(x)).all()  # all classes come


@pytest.mark.slow
def test_real_images_come_first_and_what_they_lack_in_number_is_made(
    contexts: dict[str, CalibrationContext],
) -> None:
    context = contexts[NETWORKS[1]]
    start = _start(context)
    executor = Executor.from_model(context.model)
    real = replace(context, images=context.images[:8], alignment=StatisticsAlignment(), real=8)
    plain = aligned_features(executor, real, start, real.images)
    x = make_feature_inputs(real, start)
    assert len(x) == EACH * 8
    assert torch.equal(x[:8], plain)
    assert _unlike(context, start, x[8:]) < 0.25 * _unlike(context, start, plain)


@pytest.mark.slow
def test_few_real_images_prune_better_with_deep_inputs(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_learning(monkeypatch)

    def error(network: Model) -> float:
        pruned = network.copy()
        Prune(
            images=str(models / "fashion-tiny.npz"), count=16, preprocess="fashion-mnist", sparsity=0.6
        ).apply(pruned)
        held = load_images(
            models / "fashion-test2k.npz", preprocess=Preprocess.parse("fashion-mnist"), count=256
        )
        exact, found = (logits(one, held, provider="cpu") for one in (network, pruned))
        return float(np.square(exact - found).mean())

    known = _prepared(models / NETWORKS[1])
    unknown = known.copy()
    write_record(unknown, {})
    assert error(known) < 0.8 * error(unknown)


@pytest.mark.slow
def test_deep_inputs_follow_their_seed_and_not_the_threads(
    contexts: dict[str, CalibrationContext], more_threads: Threads
) -> None:
    context = contexts[NETWORKS[1]]
    start = _start(context)
    first, other = (make_feature_inputs(context, start, seed=seed) for seed in (0, 1))
    with more_threads():
        again = make_feature_inputs(context, start)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_layers_tuned_together_err_less_and_keep_their_zeros(
    contexts: dict[str, CalibrationContext], more_threads: Threads
) -> None:
    context = contexts[NETWORKS[0]]
    start = _start(context)
    where = subnetwork_from(context.model, start)
    assert where.levels
    made = make_feature_inputs(context, start)
    x, held = made[:192], made[192:]
    executor = Executor.from_model(context.model)
    behind = {id(n) for n in nodes_between(Topology(context.model), start, None)}
    pruned = {}
    for layer in context.plan.layers.values():
        if id(layer.linear.node) in behind:
            weight = executor.parameters[layer.linear.weight_name]
            pruned[layer.linear.weight_name] = torch.where(
                weight.abs() < weight.abs().median(), 0.0, weight
            )
            if layer.linear.bias_name is not None:
                pruned[layer.linear.bias_name] = executor.parameters[layer.linear.bias_name]

    def error(values: dict[str, Tensor]) -> float:
        with torch.no_grad():
            a, b = (executor.run({start: held}, where.outputs, v) for v in ({}, values))
        return float((a[where.outputs[0]] - b[where.outputs[0]]).square().mean())

    tuned = finetune_sparse(context.model, context.plan, where, x, x, pruned, steps=20)
    with more_threads():
        again = finetune_sparse(context.model, context.plan, where, x, x, pruned, steps=20)
    assert tuned.keys() == pruned.keys()
    assert all(torch.equal(tuned[name], again[name]) for name in tuned)
    for layer in context.plan.layers.values():
        if layer.linear.weight_name in pruned:
            assert torch.equal(tuned[layer.linear.weight_name] == 0, pruned[layer.linear.weight_name] == 0)
    assert error(tuned) < 0.7 * error(pruned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "today", "sure"), [(NETWORKS[0], 0.0050, 0.778), (NETWORKS[1], 0.00387, 0.805)]
)
def test_deep_inputs_come_as_near_to_the_statistics_and_classes_as_they_did(
    models: Path, name: str, today: float, sure: float
) -> None:
    """With 4 steps in place of 16 it is 4.5 times as far, with a tenth of the rate 10 times."""
    model = _prepared(models / name)
    request = InputRequest(preprocess="fashion-mnist", inputs="layerwise", synthetic=16)
    subject = CalibrationContext.of(model, gather_inputs(model, request), stretched=False)
    start = _start(subject)
    x = make_feature_inputs(subject, start)
    assert _unlike(subject, start, x) == pytest.approx(today, rel=0.15)
    with torch.no_grad():
        scores = Executor.from_model(model).run({start: x}, [model.graph.outputs[0].name])
    (found,) = scores.values()
    assert float(found.softmax(1).amax(1).mean()) == pytest.approx(sure, rel=0.05)


def test_what_earlier_layers_lost_is_added_to_what_the_student_reads() -> None:
    """Of other inputs: the first again behind the last."""
    part = Stage(torch.arange(5.0)[:, None], StatisticsAlignment())
    lost = torch.tensor([[10.0], [-20.0]])
    assert part.seen(lost).flatten().tolist() == [10, -19, 12, -17, 14]
    assert part.seen(None) is part.inputs
