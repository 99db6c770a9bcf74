"""Layer by layer: what quantizing and pruning lose on small networks, and what must be made up for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.activation_range import least_squares
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of
from onnxcompress.optimize.reconstruction.prune import Settings as PruneSettings
from onnxcompress.optimize.reconstruction.prune import Sparsifier, Trials, output_costs
from onnxcompress.optimize.reconstruction.quantize import Quantizer, Settings
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.quantization.affine_grid import Grid
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from tests.helpers.folding import graph, weight

pytestmark = pytest.mark.usefixtures("whole_learning")

FLOATS = Bits(8, None, None)
CHAIN = """c = Conv<pads=[1,1,1,1]>(x, wc, bc) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, wd, bd) s = Relu(d)
    e = Conv(s, we, be) y = Relu(e)"""
SUM = "d = Conv(x, wd, bd) c = Conv<pads=[1,1,1,1]>(x, wc, bc) y = Add(d, c)"
UPWARDS = "c = ConvTranspose<strides=[2,2]>(x, wt, bc) y = Relu(c)"


def chain() -> Model:
    arrays = {"wc": weight(8, 3, 3, 3), "bc": weight(8, seed=5), "wd": weight(8, 8, 3, 3, seed=1)}
    arrays |= {"bd": weight(8, seed=6), "we": weight(6, 8, 1, 1, seed=2), "be": weight(6, seed=7)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,6,8,8] y)", CHAIN, arrays))


def two_branches() -> Model:
    """A sum of a 1x1 convolution and of a 3x3 one that can compute the same."""
    arrays = {"wc": weight(8, 4, 3, 3), "bc": weight(8, seed=5), "wd": weight(8, 4, 1, 1, seed=1)}
    arrays |= {"bd": weight(8, seed=6)}
    return Model.from_proto(graph("(float[N,4,8,8] x) => (float[N,8,8,8] y)", SUM, arrays))


def images(channels: int) -> Tensor:
    return torch.randn(96, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def quantizer(bits: Bits, **settings: Any) -> Quantizer:
    model = chain()
    return Quantizer(model, make_plan(model, bits), Settings(**settings))


def noise(worker: Quantizer, seen: float = 1.0) -> list[float]:
    x = images(3)
    return list(worker.run(x, seen=seen * x).noise.values())


@pytest.mark.parametrize(
    ("bits", "today"),
    [
        (Bits(4, 4, 4), [0.0175, 0.0236, 0.0491]),
        (Bits(4, None, None), [0.00569, 0.00904, 0.0191]),
    ],
)
def test_the_noise_of_quantized_layers_is_what_it_was(bits: Bits, today: list[float]) -> None:
    assert noise(quantizer(bits)) == pytest.approx(today, rel=0.05)


@pytest.mark.parametrize(
    ("bits", "today"),
    [
        (Bits(4, 4, 4), [0.0396, 0.0267, 0.0520]),
        (Bits(8, 8, 8), [0.0781, 0.0486, 0.0636]),
        (Bits(4, None, None), [0.0276, 0.0125, 0.0237]),
    ],
)
def test_what_the_student_reads_too_small_is_made_up_for(bits: Bits, today: list[float]) -> None:
    """By the least-squares target; without it the noise is 1.1 to 6 times as large."""
    assert noise(quantizer(bits), seen=0.7) == pytest.approx(today, rel=0.1)


def grid_of_outliers(minmax: bool) -> tuple[Grid, Tensor]:
    worker = quantizer(Bits(8, 4, None), minmax=minmax)
    x = images(3)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = 40.0, -20.0
    worker.run(x)
    return worker.results.grids["x", 4], x


def test_ranges_are_the_ends_seen_or_those_of_the_least_error() -> None:
    ends, x = grid_of_outliers(minmax=True)
    assert ends.bounds == pytest.approx((-20, 40), rel=0.02)
    best, _ = grid_of_outliers(minmax=False)
    assert best.bounds == least_squares(x.reshape(-1), 4, "uint8", False).bounds
    assert best.bounds[1] < 15


def test_rounding_to_nearest_and_rounding_for_the_outputs_are_told_apart() -> None:
    plain = noise(quantizer(Bits(4, 4, 4), reconstruct=False))
    assert plain[2] == pytest.approx(1.3 * 0.0491, rel=0.05)


def sparsifier(model: Model, alignment: StatisticsAlignment | None = None, **sparsity: float) -> Sparsifier:
    worker = Sparsifier(
        model,
        make_plan(model, FLOATS),
        PruneSettings(sparsity=sparsity),
        alignment=alignment or StatisticsAlignment(),
    )
    worker.pass_through(images(int(model.graph.inputs[0].shape[1])), "pruning")
    return worker


def error(model: Model, x: Tensor, learned: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Student less teacher at the output, over the teacher's deviation."""
    executor = Executor.from_model(model)
    with torch.no_grad():
        ours, theirs = (executor.run({"x": x}, ["y"], values)["y"] for values in (learned, teacher))
    return (ours - theirs) / theirs.std()


def test_a_branch_makes_up_for_what_the_other_one_lost() -> None:
    """The 1x1 convolution keeps a quarter of its weights; the 3x3 one can take over all of the rest."""
    model = two_branches()
    worker = sparsifier(model, wd=0.75)
    assert worker.noise["wd"] == pytest.approx(0.1176, rel=0.05)
    left = float(error(model, images(4), worker.results, {}).square().mean())
    assert left == pytest.approx(1.1e-6, rel=0.3)  # 0.0156 where nothing is made up for


def test_a_quantized_branch_makes_up_for_the_other_one_as_the_sum_reads_it() -> None:
    """Behind its quantizer of 8 bits, whose range must be known by then."""
    model = two_branches()
    worker = Quantizer(model, make_plan(model, Bits(4, 4, None)), Settings())
    assert list(worker.run(images(4)).noise.values()) == pytest.approx([0.00969, 0.0191], rel=0.05)
    left = float(error(model, images(4), worker.own, {}).square().mean())
    assert left == pytest.approx(0.00606, rel=0.05)


def test_layers_learned_by_a_twin_come_back_as_the_networks_own() -> None:
    """With maps of channels, y' = a y + b: nothing pruned, nothing changes; and branches still make up."""
    model = two_branches()
    own = Executor.from_model(model).parameters
    scale, shift = torch.linspace(0.5, 2, 8), torch.linspace(-3, 3, 8)
    alignment = StatisticsAlignment(
        {"wd": scale.reshape(-1, 1, 1, 1), "wc": scale.flip(0).reshape(-1, 1, 1, 1)},
        {"bd": (scale, shift), "bc": (scale.flip(0), shift)},
    )
    dense = sparsifier(model, alignment)
    for name, value in dense.results.items():
        torch.testing.assert_close(value, own[name], rtol=1e-3, atol=1e-3)
    pruned = sparsifier(model, alignment, wd=0.75).results
    left = error(
        model,
        images(4),
        {name: alignment.align(name, value) for name, value in pruned.items()},
        {name: alignment.align(name, own[name]) for name in pruned},
    )
    assert float(left.square().mean()) < 1e-5


def test_the_noise_of_pruned_layers_is_what_it_was() -> None:
    worker = sparsifier(chain(), wc=0.5, wd=0.5, we=0.5)
    assert list(worker.noise.values()) == pytest.approx([0.0762, 0.0690, 0.143], rel=0.1)


@pytest.mark.parametrize("body", [CHAIN, UPWARDS])
def test_pruned_and_quantized_layers_keep_the_means_of_their_outputs(body: str) -> None:
    """In closed form, and of a ConvTranspose, which has none, by the mean error."""
    if body == CHAIN:
        model, last = chain(), "c"
    else:
        arrays = {"wt": weight(3, 8, 3, 3), "bc": weight(8, seed=5)}
        model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,8,17,17] y)", body, arrays))
        last = "c"
    first = "wc" if body == CHAIN else "wt"
    x = images(3) + torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)  # else a mean says little
    plan = make_plan(model, Bits(3, None, None))
    pruned = Sparsifier(model, plan, PruneSettings(sparsity={first: 0.6}))
    pruned.pass_through(x, "pruning")
    quantized = Quantizer(model, plan, Settings())
    quantized.run(x)
    executor = Executor.from_model(model)
    theirs = executor.run({"x": x}, [last])[last]
    for own in (pruned.own, quantized.own):
        off = (executor.run({"x": x}, [last], own)[last] - theirs).detach()
        assert off.std() > 0.05 * theirs.std()
        assert off.mean((0, 2, 3)).abs().max() < 0.02 * theirs.std()


def two_steps(factors: list[float]) -> Model:
    arrays = {"wc": weight(8, 3, 3, 3), "bc": weight(8, seed=5)}
    arrays |= {"we": weight(6, 8, 1, 1, seed=2) * torch.tensor(factors).reshape(8, 1, 1).numpy()}
    body = "c = Conv<pads=[1,1,1,1]>(x, wc, bc) r = Relu(c) y = Conv(r, we)"
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,6,8,8] y)", body, arrays))


def test_rows_are_worth_what_the_network_makes_of_them() -> None:
    """Channel 0 reaches the output ten times as strong as others, channel 7 not at all."""
    model = two_steps([10.0, *[1.0] * 6, 0.0])
    trials = Trials(model, make_plan(model, FLOATS), PruneSettings(), names=frozenset({"wc", "we"}))
    trials.pass_through(images(3), "trying")
    costs = output_costs(trials, images(3))
    rows = costs.rows["wc"][0]
    assert float(rows[0] / rows[1:7].median()) == pytest.approx(7.5, rel=0.3)
    assert rows[7] == rows.min()
    assert float(rows.square().max()) <= 20
    assert float(rows.square().min()) == pytest.approx(1 / 20)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_costs_of_sparsities_are_what_the_output_loses(aligned: bool) -> None:
    """Per image, in deviations of the output: measured by pruning each layer alone, of a linear network."""
    model = two_steps([3.0, *[1.0] * 7])
    model.graph.nodes.remove(next(n for n in model.graph.nodes if n.op == "Relu"))
    model.graph.nodes[-1].inputs[0] = model.graph.nodes[0].outputs[0]
    model.touch()
    alignment = StatisticsAlignment()
    if aligned:
        scale = torch.linspace(0.3, 3, 8)
        alignment = StatisticsAlignment({"wc": scale.reshape(-1, 1, 1, 1)}, {"bc": (scale, 1 - scale)})
    x = images(3) + torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    names = frozenset({"wc", "we"})
    trials = Trials(model, make_plan(model, FLOATS), PruneSettings(), alignment, names=names)
    trials.pass_through(x, "trying")
    each = []
    for seed in range(6):  # a probe is one sample, with an error as large as itself
        trials.settings = PruneSettings(seed=seed)
        each.append(output_costs(trials, x).levels)
    assert each[0] != each[1]
    own = trials.executor.parameters
    whole = {name: alignment.align(name, own[name]) for name in alignment.names}
    for name, bias in (("wc", "bc"), ("we", None)):
        trial = trials.found[name]
        for level in (1, 3, 5):
            changed = {name: own[name] + trial.weight[level].reshape(own[name].shape)}
            if bias is not None:
                changed[bias] = own[bias] + trial.bias[level].reshape(-1)
            maps = {n: alignment.align(n, v) if n in alignment.names else v for n, v in changed.items()}
            lost = float(error(model, x, whole | maps, whole).square().sum((1, 2, 3)).mean())
            assert sum(levels[name][level] for levels in each) / 6 == pytest.approx(lost, rel=0.2)


def test_costs_are_weighed_as_the_deep_layers_own_inputs_weigh_them() -> None:
    """Ten times as large inputs behind the split: an error is a hundredth of the output's variance."""
    model, x = two_steps([1.0] * 8), images(3)
    settings, names = PruneSettings(), frozenset({"wc"})
    trials = Trials(model, make_plan(model, FLOATS), settings, stop="c", names=names)
    trials.pass_through(x, "trying")
    c = trials.executor.run({"x": x}, ["c"])["c"].detach().abs()
    near, far = (output_costs(trials, x, factor * c).levels["wc"] for factor in (1, 10))
    assert far == pytest.approx([cost / 100 for cost in near], rel=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_patches_times_the_matrix_are_what_the_layer_gives(groups: int) -> None:
    """Of a convolution with strides, dilations and pads that differ by side, more places than are taken."""
    body = f"y = Conv<group={groups}, strides=[2,1], dilations=[2,1], pads=[2,1,0,3]>(x, w)"
    model = Model.from_proto(
        graph("(float[N,4,41,19] x) => (float[N,6,H,W] y)", body, {"w": weight(6, 4 // groups, 3, 2)})
    )
    (layer,) = make_plan(model, FLOATS).layers.values()
    x = torch.randn(2, 4, 41, 19, generator=torch.Generator().manual_seed(0))
    executor = Executor.from_model(model)
    y = executor.run({"x": x}, ["y"])["y"].detach()
    rows, _ = matrix(layer, executor.parameters["w"])
    cut = patches_of(model, layer)
    assert cut is not None
    a, wanted = cut.take(x, y, cut.places(y, torch.Generator().manual_seed(0)))
    assert a.shape == (groups, 4 // groups * 6, 2 * 256)
    torch.testing.assert_close(rows @ a, wanted, rtol=1e-4, atol=1e-4)


def classifier(images: Tensor, worker: Sparsifier | Quantizer) -> float:
    """Error on other images of a classifier that was learned on few, over the outputs' variance."""
    x = torch.randn(500, 32, 1, 1, generator=torch.Generator().manual_seed(9)) + 1
    worker.pass_through(images, "learning")
    return float(error(worker.model, x, worker.own, {}).square().mean())


def few(count: int) -> tuple[Model, Tensor]:
    body = "f = Flatten(x) y = Gemm<transB=1>(f, w, b)"
    arrays = {"w": weight(10, 32), "b": weight(10, seed=1)}
    model = Model.from_proto(graph("(float[N,32,1,1] x) => (float[N,10] y)", body, arrays))
    return model, torch.randn(count, 32, 1, 1, generator=torch.Generator().manual_seed(0)) + 1


def test_few_images_do_not_mislead_a_classifier() -> None:
    model, x = few(24)
    plan = make_plan(model, FLOATS)
    pruned = classifier(x, Sparsifier(model, plan, PruneSettings(sparsity={"w": 0.5})))
    quantized = classifier(x, Quantizer(model, make_plan(model, Bits(3, None, None)), Settings()))
    assert (pruned, quantized) == pytest.approx((0.0494, 0.0266), rel=0.05)


@pytest.mark.parametrize(("count", "fitted"), [(100, False), (140, True)])
def test_the_target_needs_four_patches_for_each_weight_of_an_output(count: int, fitted: bool) -> None:
    """With fewer a layer that stays dense keeps its weights, whatever the student reads."""
    model, x = few(count)
    worker = Sparsifier(model, make_plan(model, FLOATS), PruneSettings())
    worker.pass_through(x, "pruning", seen=0.7 * x)
    change = worker.results["w"] - worker.executor.parameters["w"]
    assert (float(change.abs().max()) > 0.1) == fitted
    worked = Quantizer(model, make_plan(model, Bits(8, None, None)), Settings())
    worked.run(x, seen=0.7 * x)
    moved = float((worked.own["w"] - worker.executor.parameters["w"]).abs().max())
    assert (moved > 0.05) == fitted


@pytest.mark.parametrize("repair", [True, False])
def test_without_repair_a_bias_makes_up_for_its_own_rounding_alone(repair: bool) -> None:
    """The student reads 0.7 of what the teacher does; with repair its bias keeps the teacher's mean."""
    model, x = few(200)
    worker = Quantizer(model, make_plan(model, Bits(4, None, None)), Settings(repair=repair))
    worker.run(x, seen=0.7 * x)
    own, rounded = worker.executor.parameters["w"], worker.own["w"]
    reads, bias = 0.7 * x.flatten(1).mean(0), worker.executor.parameters["b"]
    wanted = bias + (own - rounded) @ reads
    if repair:
        wanted = bias + own @ x.flatten(1).mean(0) - rounded @ reads
    torch.testing.assert_close(worker.own["b"], wanted, rtol=1e-3, atol=1e-3)


def test_rows_of_more_worth_lose_less() -> None:
    model, x = few(400)
    plan = make_plan(model, FLOATS)
    rows = torch.ones(1, 10)
    rows[0, :2] = 20.0
    worker = Sparsifier(model, plan, PruneSettings(sparsity={"w": 0.5}, rows={"w": rows}))
    worker.pass_through(x, "pruning")
    left = (worker.results["w"] != 0).sum(1)
    assert left[:2].min() > 1.3 * left[2:].max()


def test_sparsities_are_tried_as_they_are_meant() -> None:
    model = chain()
    trials = Trials(model, make_plan(model, FLOATS), PruneSettings(), names=frozenset({"wd"}))
    trials.pass_through(images(3), "trying")
    layer = next(layer for layer in trials.plan.layers.values() if layer.linear.weight_name == "wd")
    own, _ = matrix(layer, trials.executor.parameters["wd"])
    trial = trials.found["wd"]
    zeros = [float(((own + change).abs() < 1e-6).float().mean()) for change in trial.weight]
    assert zeros == pytest.approx([0.3, 0.5, 0.65, 0.8, 0.9, 0.95], abs=0.01)
    assert trial.error.sum((1, 2)).tolist() == pytest.approx(
        [25.03, 137.7, 343.4, 782.0, 1421, 2121], rel=0.05
    )
