"""Judging a pass by what the model gives before and after it (`evaluation.guard`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcompress.errors import CompressError, ModelError
from onnxcompress.evaluation.guard import EXACT_HALF_REL, EXACT_REL, GuardMeasurements
from onnxcompress.graph.query import sigmoid_outputs
from onnxcompress.model import Model, load

if TYPE_CHECKING:
    import numpy as np

    from onnxcompress.evaluation.fidelity import Fidelity
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.runtime.random_inputs import UnseenInputs


class Watch:
    """What models give for inputs that no pass of a chain learned from; inputs are chosen at first need."""

    def __init__(
        self,
        model: Model,
        learned: Sequence[InputRequest],
        *,
        exact: bool = False,
        judged_by: InputRequest | None = None,
    ) -> None:
        """Watch passes that are applied to `model` one after the other.

        Args:
            model: The model before the first pass; it is not changed by the watch.
            learned: What the passes learn from.
            exact: Whether all of them keep the function what it is: random inputs do.
            judged_by: Images that are kept to judge by.
        """
        self._model = model
        self._learned = learned
        self._exact = exact
        self._judged_by = judged_by
        self._inputs: UnseenInputs | None = None
        self._state: tuple[Model, _State] | None = None

    def before(self, model: Model) -> _State:
        """Remember a model as it is now, to be run only if that is needed.

        Args:
            model: The model that a pass is about to change.

        Returns:
            The state to hand to `measure`.
        """
        if self._state is None or self._state[0] is not model:
            self._state = (model, _State(self._model if self._is_given(model) else model.copy()))
        return self._state[1]

    def _is_given(self, model: Model) -> bool:
        """Return whether a model is an unchanged copy of the one that the chain was given."""
        return model is not self._model and model.same_state(self._model)

    def measure(
        self, before: _State, model: Model, *, exact: bool, reference: str | None = None
    ) -> GuardMeasurements:
        """Run the model as it is now, and compare with what it was.

        Args:
            before: What `before` returned.
            model: The model that the pass made.
            exact: Whether the pass keeps the function what it is.
            reference: Path of the model that the pass repairs the model towards.

        Returns:
            The figures, or why there are none. Nothing is raised: a result that onnxruntime does not run
            while it ran the model before is a problem, not an error.
        """
        start = time.perf_counter()
        limit = exact_limit(model) if exact else None
        try:
            basis = before if reference is None else _State(load(Path(reference)))
            inputs, was = self._first_runs(basis)
        except CompressError as error:
            return GuardMeasurements("", 0, time.perf_counter() - start, skipped=str(error))
        now, old, problem = _State(model), None, ""
        found: Fidelity | None = None
        from onnxcompress.evaluation.fidelity import fidelity

        try:
            answers = sigmoid_outputs(self._model)
            found = fidelity(was, now.runs(inputs), answers)
            old = fidelity(was, before.runs(inputs), answers) if reference is not None else None
        except CompressError as error:
            problem = str(error)
        self._state = None if problem else (model, now)
        seconds = time.perf_counter() - start
        return GuardMeasurements(inputs.description, inputs.count, seconds, found, old, limit, problem)

    def _first_runs(self, basis: _State) -> tuple[UnseenInputs, Mapping[str, Sequence[np.ndarray]]]:
        """Run the basis of a comparison; one image at a time where it runs no more at once."""
        inputs = self._chosen()
        try:
            return inputs, basis.runs(inputs)
        except ModelError:
            alone = inputs.one_by_one()
            runs = basis.runs(alone)
            self._inputs = alone
            return alone, runs

    def whole(self, model: Model) -> GuardMeasurements:
        """Compare what a chain made with the model that it was given.

        Args:
            model: The result of the last pass.

        Returns:
            As `measure`.
        """
        return self.measure(_State(self._model), model, exact=self._exact)

    def _chosen(self) -> UnseenInputs:
        from onnxcompress.runtime.random_inputs import EXACT_ROWS, has_open_sizes, random_inputs

        if self._inputs is None:
            if self._exact and not has_open_sizes(self._model):
                self._inputs = random_inputs(self._model, EXACT_ROWS)
                return self._inputs
            from onnxcompress.optimize.unseen_inputs import sized, unseen_inputs

            if self._exact:
                own = sized(self._model, self._learned, self._judged_by)
                self._inputs = random_inputs(own, EXACT_ROWS)
            else:
                self._inputs = unseen_inputs(self._model, self._learned, self._judged_by)
        return self._inputs


class _State:
    """A model at one point of a chain, and its outputs once they are asked for."""

    def __init__(self, model: Model) -> None:
        self._model: Model | None = model
        self._runs: Mapping[str, Sequence[np.ndarray]] = {}

    def runs(self, inputs: UnseenInputs) -> Mapping[str, Sequence[np.ndarray]]:
        """Outputs by name; the model is run once, and not kept."""
        if self._model is not None:
            self._runs = outputs_of(self._model, inputs)
            self._model = None
        return self._runs


def outputs_of(model: Model, inputs: UnseenInputs) -> dict[str, list[np.ndarray]]:
    """Run a model on all inputs, on the CPU, without graph optimizations.

    Args:
        model: The model.
        inputs: What to feed, by the names of the model that they were made for.

    Returns:
        Output name -> its value in each run.

    Raises:
        ModelError: onnxruntime refuses the model or the inputs.
    """
    from onnxcompress.runtime.inference import feeds_for, run_each

    return run_each(model, [feeds_for(model, feeds) for feeds in inputs.feeds], optimize=False)


def exact_limit(model: Model) -> float:
    """Largest relative difference of a pass that keeps the function, by the precision of the model.

    Args:
        model: The model that the pass made.

    Returns:
        The limit of float16 where some weight or output is float16, else that of float32.
    """
    tensors = [*model.graph.outputs, *model.graph.tensors().values()]
    half = any(str(tensor.dtype) in ("float16", "bfloat16") for tensor in tensors if tensor.dtype)
    return EXACT_HALF_REL if half else EXACT_REL
