"""Fine-tuning and the views that it sees: the schedule as it is stepped, figures of a fixed problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.augment import augment
from onnxcompress.optimize.reconstruction.descent import Descent
from onnxcompress.optimize.reconstruction.feature_loss import Matched, Objective
from onnxcompress.optimize.reconstruction.finetune import (
    AVERAGED,
    CHECKS,
    PATIENCE,
    POOLED,
    YOUNG,
    Finetuned,
    Schedule,
    _scales,
    finetune,
)
from onnxcompress.optimize.reconstruction.held_out import HeldOut
from onnxcompress.optimize.reconstruction.taught_views import REPEATS, TaughtViews
from onnxcompress.optimize.synthesis.distillation import _drawn_view
from tests.helpers.folding import graph, weight

BODY = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v, c)"


def executor(noise: float) -> Executor:
    arrays = {"w": weight(6, 3, 3, 3), "b": weight(6, seed=1), "v": weight(4, 6, 1, 1, seed=2)}
    arrays["c"] = weight(4, seed=3)
    arrays = {n: v + noise * weight(*v.shape, seed=9) for n, v in arrays.items()}
    return Executor.from_model(
        Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", BODY, arrays))
    )


MATCHED = Matched("x", ("y", "y"))


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tuned(judged_by: Tensor | None = None, levels: tuple[str, ...] = (), **changed: Any) -> Finetuned:
    matched = Matched("x", ("y", "y"), tuple((name, name) for name in levels))
    schedule = Schedule(**({"steps": 40, "batch": 8, "learning_rate": 0.02, "seed": 0} | changed))
    student, teacher, x = executor(0.1), executor(0.0), images()
    aside = HeldOut(teacher, x if judged_by is None else judged_by, "x", "y")
    return finetune(student, teacher, matched, x, schedule, aside)


def trained(**changed: Any) -> tuple[dict[str, Tensor], float]:
    """Values after training, and their relative error."""
    values, x = tuned(**changed).values, images()
    student, teacher = executor(0.1), executor(0.0)
    with torch.no_grad():
        ours, wanted = student.run({"x": x}, ["y"], values)["y"], teacher.run({"x": x}, ["y"])["y"]
    return values, float((ours - wanted).square().mean() / wanted.square().mean())


def test_the_rates_rise_then_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = Descent.step

    def step(self: Descent, share: float) -> None:
        rates.append(share)
        original(self, share)

    monkeypatch.setattr(Descent, "step", step)
    trained(steps=40)
    assert rates == pytest.approx([0.5] + [1 - done / 40 for done in range(1, 40)])


def test_what_fine_tuning_leaves_is_what_it_was() -> None:
    _, before = trained(steps=0)
    _, after = trained(learning_rate=0.05)
    assert before == pytest.approx(0.0492, rel=0.05)
    assert after == pytest.approx(0.00043, rel=0.15)


def test_what_is_kept_is_never_worse_than_the_start_and_has_the_error_that_the_outcome_says() -> None:
    """At the higher rate the error goes up and down."""
    for rate in (0.02, 0.3):
        result = tuned(learning_rate=rate, steps=20)
        error = HeldOut(executor(0.0), images(), "x", "y").error(executor(0.1), "y", result.values)
        assert error == pytest.approx(result.outcome.error, rel=1e-5)
        assert error <= result.outcome.error_before
        assert result.outcome.held_out == 32


def test_tuning_that_only_harms_is_discarded_and_ends_early() -> None:
    """The rate is so high that even after it was divided no step leaves anything of the network."""
    result = tuned(learning_rate=1e6, steps=40)
    outcome, start = result.outcome, executor(0.1).parameters
    assert outcome.discarded
    assert outcome.error == outcome.error_before == pytest.approx(0.0492, rel=0.05)
    assert outcome.steps == 40 * PATIENCE // CHECKS
    assert all(torch.equal(result.values[name], start[name]) for name in start)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_too_high_a_rate_is_divided_from_the_start_on(orthogonal: bool) -> None:
    """Where all steps are to be taken it is left as it is."""
    high: dict[str, Any] = {"learning_rate": 20.0, "orthogonal": orthogonal}
    saved, left = tuned(**high).outcome, tuned(**high, whole=True).outcome
    assert not saved.discarded
    assert saved.error < 0.5 * saved.error_before
    assert saved.error < 0.5 * left.error
    assert tuned(**high).values.keys() == executor(0.1).parameters.keys()


def test_a_rate_that_helps_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Descent, "slow_down", lambda *given: pytest.fail("it was divided"))
    assert tuned().outcome.kept_step == 40


def test_a_time_gives_the_steps_that_fit_and_they_give_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run of a network takes 1 s: the 10 looks 10 s, 6 steps 6 s, their views 3 s."""
    seconds = [0.0]
    original = Executor.run

    def run(self: Executor, *args: Any) -> Any:
        seconds[0] += 1.0
        return original(self, *args)

    module = "onnxcompress.optimize.reconstruction.finetune"
    monkeypatch.setattr(f"{module}.time.perf_counter", lambda: seconds[0])
    monkeypatch.setattr(Executor, "run", run)
    result = tuned(seconds=50.0, steps=1)
    planned = result.outcome.planned_steps
    assert planned == int((50 - 10) / (9 / 6)) == result.outcome.steps
    again = tuned(steps=planned)
    assert all(torch.equal(value, again.values[name]) for name, value in result.values.items())


def test_levels_are_brought_together_too() -> None:
    def level_error(values: Mapping[str, Tensor]) -> float:
        return HeldOut(executor(0.0), images(), "x", "r").error(executor(0.1), "r", values)

    before = level_error({})
    alone, both = (level_error(tuned(levels=names).values) for names in ((), ("r",)))
    assert both < 0.8 * alone
    assert both < 0.5 * before


@pytest.mark.parametrize("pooled", [False, True])
def test_the_loss_has_the_features_and_what_the_pool_makes_of_them(pooled: bool) -> None:
    """Where a weight is 1.1 times as large, all that follows lacks 0.1² of its energy."""
    arrays = {"w": weight(6, 3, 3, 3)}
    body = "y = Conv<pads=[1,1,1,1]>(x, w) p = GlobalAveragePool(y)"
    network = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,6,1,1] p)", body, arrays))
    teacher = Executor.from_model(network)
    student = Executor.from_model(network)
    student.parameters["w"] = 1.1 * student.parameters["w"]
    matched = Matched("x", ("y", "y"), pooled=(("p", "p"),) if pooled else ())
    x = images()
    scales = _scales(teacher, matched, HeldOut(teacher, x, "x", "y"))
    wanted = [teacher.run({"x": x}, [name])[name] for _, name in matched.pairs]
    loss = Objective(student, matched, [], scales).loss(x, *wanted)
    assert float(loss) == pytest.approx(0.01 * (1 + POOLED * pooled), rel=1e-3)


def test_the_average_of_the_weights_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Tensor] = []
    original = Descent.step

    def step(self: Descent, share: float) -> None:
        original(self, share)
        steps.append(watched[0].detach().clone())

    watched: list[Tensor] = []
    made = Descent.__init__

    def init(self: Descent, values: Sequence[Tensor], *rest: Any) -> None:
        watched[:] = values[:1]
        made(self, values, *rest)

    monkeypatch.setattr(Descent, "step", step)
    monkeypatch.setattr(Descent, "__init__", init)
    result = tuned(steps=40, learning_rate=0.05)
    kept, name = steps[: result.outcome.kept_step], next(iter(executor(0.1).parameters))
    average = executor(0.1).parameters[name]
    for at, value in enumerate(kept, 1):
        average = average.lerp(value, 1 - min(AVERAGED, at / (at + YOUNG)))
    assert torch.allclose(result.values[name], average, atol=1e-5)


def test_training_follows_its_seed() -> None:
    first, again, other = (trained(steps=3, seed=seed)[0]["w"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_begins_with_the_values_that_are_given() -> None:
    """A layer that was refitted, and the student's own where none was."""
    given = {"w": torch.full((6, 3, 3, 3), 0.5)}
    schedule = Schedule(steps=0, batch=8, learning_rate=0.02, seed=0)
    student = executor(0.1)
    teacher = executor(0.0)
    aside = HeldOut(teacher, images(), "x", "y")
    values = finetune(student, teacher, MATCHED, images(), schedule, aside, start=given).values
    assert values.keys() == {"w", "b", "v", "c"}
    assert torch.equal(values["w"], given["w"])
    assert torch.equal(values["v"], student.parameters["v"])


def test_the_pieces_of_a_batch_count_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last piece is smaller; what stands in one piece alone would lead elsewhere."""
    whole = trained(steps=4, batch=22)[0]
    monkeypatch.setattr("onnxcompress.optimize.reconstruction.feature_loss.PIECE", 8)
    pieces = trained(steps=4, batch=22)[0]
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-3, atol=1e-4)


def test_images_are_drawn_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of one number each, which views do not change: 0, and half as often 1."""
    x = torch.tensor([0.0, 1.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8).contiguous()
    shares = torch.tensor([4.0, 1.0, 1.0])
    views = TaughtViews(executor(0.0), "x", ["y"], x, shares, 16)
    seen = [batch for batch, _ in views.batches(25, 0)]
    assert sum(map(len, seen)) == 400
    assert float(torch.cat(seen).mean()) == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (7, 7), (100, 9)])
def test_views_come_again_with_the_teachers_tensors_of_them(
    count: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 9 batches of 4: 100 batches are of 5 stores, of which the last is smaller."""
    module = "onnxcompress.optimize.reconstruction.taught_views"
    each = 4 * (4 * 3 * 8 * 8 + 2 * 4 * 8 * 8)  # views in 32 bits, tensors in 16
    monkeypatch.setattr(f"{module}.STORE_BYTES", kept * each)
    teacher = executor(0.0)
    views = TaughtViews(teacher, "x", ["y"], images(), None, 4)
    batches = list(views.batches(count, 0))
    assert [len(x) for x, _ in batches] == [4] * count
    for x, (wanted,) in batches:
        exact = teacher.run({"x": x}, ["y"])["y"]
        assert float((wanted.float() - exact).square().mean() / exact.square().mean()) < 1e-4
    drawn = {view.numpy().tobytes() for x, _ in batches for view in x}
    assert len(drawn) == pytest.approx(4 * -(-count // REPEATS), abs=4)


def test_views_of_which_memory_holds_few_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.optimize.reconstruction.taught_views.STORE_BYTES", 1)
    batches = list(TaughtViews(executor(0.0), "x", ["y"], images(), None, 4).batches(6, 0))
    assert len({view.numpy().tobytes() for x, _ in batches for view in x}) == 24


def ramp() -> Tensor:
    """Bright to the right and more so to the bottom; nothing alike anywhere."""
    rows, columns = torch.arange(16.0)[:, None], torch.arange(16.0)
    return (100 * rows + columns)[None, None]


def views(count: int, which: Tensor | None = None) -> Tensor:
    return augment(ramp() if which is None else which, count, torch.Generator().manual_seed(0))


def test_views_are_mirrored_left_to_right_never_upside_down() -> None:
    """Inside, where no edge was reflected; one image, so that what is pasted is of it, too."""
    inner = views(64)[:, 0, 4:12, 4:12]
    down, across = inner.diff(dim=1), inner.diff(dim=2)
    assert (down.median(1).values.median(1).values == 100).all()
    signs = across.flatten(1).median(1).values
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert 16 < int((signs == 1).sum()) < 48


def test_views_are_shifted_by_up_to_an_eighth_both_ways() -> None:
    unpasted = views(200)[1::2, 0, 8, 8]
    rows = (unpasted / 100).floor()
    assert set(rows.tolist()) == {6.0, 7.0, 8.0, 9.0, 10.0}
    columns = unpasted - 100 * rows
    assert {int(c) for c in columns} == {5, 6, 7, 8, 9, 10}  # mirrored, 8 is 7
    assert len(set(unpasted.tolist())) > 20  # not along a diagonal


def test_every_second_view_has_a_patch_of_its_neighbour() -> None:
    """Images of one number each: patches show, the others do not."""
    which = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 16, 16).contiguous()
    made = views(100, which)
    parts = [len(one.unique()) for one in made]
    assert set(parts[1::2]) == {1}
    assert set(parts[::2]) == {1, 2}
    changed = [float((one != one.flatten().mode().values).float().mean()) for one in made[::2]]
    assert max(changed) > 0.3


def test_images_of_more_share_come_more_often() -> None:
    which = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    shares = torch.tensor([1.0, 9.0])
    made = augment(which, 1000, torch.Generator().manual_seed(0), shares)
    assert float(made[1::2].mean()) == pytest.approx(0.9, abs=0.04)


@pytest.mark.parametrize("places", [(2, 3), (1, 2)])
def test_distilling_views_are_the_image_moved_around_its_edges(places: tuple[int, int]) -> None:
    x = ramp().repeat(1, 1, 2, 1) if places == (2, 3) else ramp().repeat(1, 1, 2, 1).permute(0, 2, 3, 1)
    generator = torch.Generator().manual_seed(0)
    seen = [_drawn_view(x, places, generator)(x).squeeze() for _ in range(60)]
    plain = x.squeeze()
    moves = set()
    for view in seen:
        found = [
            (mirrored, down, across)
            for mirrored in (False, True)
            for down in range(-2, 3)
            for across in range(-1, 2)
            if torch.equal(view, (plain.flip(1) if mirrored else plain).roll((down, across), (0, 1)))
        ]
        assert found
        moves.update(found)
    assert {mirrored for mirrored, _, _ in moves} == {False, True}
    assert {down for _, down, _ in moves} == {-2, -1, 0, 1, 2}
    assert {across for _, _, across in moves} == {-1, 0, 1}


def test_all_steps_are_taken_where_that_is_asked_for() -> None:
    assert tuned(learning_rate=1e3, whole=True).outcome.steps == 40
    assert tuned(learning_rate=1e3).outcome.steps < 40


def test_what_is_frozen_keeps_its_values() -> None:
    schedule, aside = Schedule(2, 4, 0.02, 0), HeldOut(executor(0.0), images(), "x", "y")
    found = finetune(executor(0.1), executor(0.0), MATCHED, images(), schedule, aside, frozen={"w", "c"})
    assert set(found.values) == {"b", "v"}
