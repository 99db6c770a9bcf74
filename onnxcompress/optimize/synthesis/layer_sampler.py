"""Inputs of any layer from statistics alone: draw at recorded tensors, run the real graph in between.

The input of a layer is x = f(y₁, y₂, …), where f is the part of the graph between it and the nearest
tensors y_k with known statistics, wherever they lie: the last layers of all earlier branches of a residual
stage, the parts of a Concat. Horton et al. (arXiv 2011.09058, §3.1) draw each y_k from N(mean, std²) of its
channels and sum up; here f is run, with its activations, pools and sums.

    depth 0        y_k drawn                                  -> f -> x depth d > 0    y_k =
    standardize(g_k(…)), where g_k is the graph from the next recorded tensors before y_k,
                   which have depth d − 1, and so on, or from the graph's input. Standardizing is a
                   BatchNorm in training mode with the recorded mean and deviation: it gives each y_k its
                   recorded statistics, and keeps the correlations between places and channels, and between
                   branch and shortcut, that g_k makes. A tensor needed at two depths is computed once, at
                   the larger one.

Each call plans which tensors are drawn and which nodes run, each once, in pieces between recorded tensors;
a tensor is freed after its last reader. The cost is linear in the nodes before the wanted tensor.

Does not handle: open image sizes, inputs that are not floating-point (they cannot be drawn), batches whose
size the graph fixes, control flow. The samples of a call are standardized together: where memory is short,
make more calls with other seeds, not calls with more samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from onnxcompress.errors import InputError, ModelError
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import one_thread_each, run_jobs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.synthesis.colored_noise import Noise, draw, draw_input, generator, standardized
from onnxcompress.optimize.synthesis.sampling_plan import Cut, Piece, cut, snapshot
from onnxcompress.statistics.record import ChannelStatistics, known_statistics

Result = TypeVar("Result")


class LayerSampler:
    """Draws values of any tensor of a graph as it is now; later edits do not reach it.

    The values of a call depend only on the seed, the count and the tensors that are asked for.
    """

    def __init__(
        self,
        model: Model,
        statistics: Mapping[str, ChannelStatistics] | None = None,
        *,
        executor: Executor | None = None,
        noise: Noise = Noise(),  # noqa: B008 (frozen)
        images: Tensor | None = None,
        device: str = "cpu",
    ) -> None:
        """Take a snapshot of the graph.

        Args:
            model: The network.
            statistics: Statistics by tensor; None: `known_statistics(model)`.
            executor: The executor of the same graph; None: make one.
            noise: The noise to draw.
            images: Normalized images, (N, …), used as they are instead of noise at the graph's only input.
                Procedural images are the best inputs without data (see `Noise`).
            device: Where the executor runs, if one is made.

        Raises:
            InputError: The images do not fit the input.
        """
        self.noise = noise
        self.statistics = dict(known_statistics(model) if statistics is None else statistics)
        self.executor = Executor.from_model(model, device=device) if executor is None else executor
        self._name = model.name
        self._inputs = {t.name: t.dtype for t in model.graph.inputs}
        self._shapes = dict(tensor_shapes(model))
        self._nodes = snapshot(model)
        made = (name for node in self._nodes for name in node.makes)
        self._place = {name: at for at, name in enumerate((*self._inputs, *made))}
        self._images = self._checked(images)

    def sources(self, tensor: str | Sequence[str]) -> tuple[str, ...]:
        """List the tensors that are drawn to compute others.

        Args:
            tensor: The wanted tensor, or several that are computed together.

        Returns:
            The drawn tensors, in the order of the graph.

        Raises:
            ModelError: A wanted tensor does not exist, or no input reaches it.
        """
        return tuple(self._cut([tensor] if isinstance(tensor, str) else tensor).drawn)

    def ordered(self, tensors: Iterable[str]) -> list[str]:
        """Sort tensors in the order of the graph.

        Args:
            tensors: Names of tensors.

        Returns:
            The names, each once.
        """
        return sorted(set(tensors), key=self._place.__getitem__)

    def sample(self, tensor: str, count: int, seed: int) -> Tensor:
        """Draw values of one tensor.

        Args:
            tensor: Name of the tensor.
            count: Number of samples.
            seed: Random seed.

        Returns:
            The values, (count, …), on the executor's device.

        Raises:
            ModelError: The tensor cannot be drawn.
            InputError: There are fewer images than samples.
        """
        return next(self.stream([tensor], count, seed))[1]

    def sample_all(self, tensors: Sequence[str], count: int, seed: int) -> dict[str, Tensor]:
        """Draw values of several tensors in one run, consistent with each other.

        Args:
            tensors: Names of the tensors.
            count: Number of samples.
            seed: Random seed.

        Returns:
            Name -> values, (count, …), on the executor's device.

        Raises:
            ModelError: A tensor cannot be drawn.
            InputError: There are fewer images than samples.
        """
        found = dict(self.stream(tensors, count, seed))
        return {name: found[name] for name in tensors}

    def stream(self, tensors: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Draw values of several tensors as `sample_all` does, but yield each as soon as it is computed.

        Holds no more tensors than the run itself needs, so one pass gives the inputs of all layers.

        Args:
            tensors: Names of the tensors.
            count: Number of samples.
            seed: Random seed.

        Yields:
            Name and values, (count, …); drawn tensors that nothing reads come last.

        Raises:
            ModelError: A tensor cannot be drawn.
            InputError: There are fewer images than samples.
        """
        plan = self._cut(tensors)
        wanted = set(tensors)
        live: dict[str, Tensor] = {}
        for piece in plan.pieces:
            for name in piece.fresh:
                live[name] = self._fresh(name, plan, count, seed)
            live.update(self._run(piece, live))
            for name in plan.standardized.intersection(piece.outputs):
                self._check_record(name, live[name].shape)
                live[name] = standardized(live[name], self.statistics[name])
            for name in self.ordered(wanted.intersection((*piece.fresh, *piece.outputs))):
                self._check_count(name, live[name], count)
                yield name, live[name]
            for name in piece.done:
                live.pop(name, None)

    def _run(self, piece: Piece, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not piece.outputs:
            return {}
        feeds = {name: live[name] for name in piece.feeds}
        with torch.no_grad():
            return self.executor.run(feeds, piece.outputs)

    def _fresh(self, name: str, plan: Cut, count: int, seed: int) -> Tensor:
        device = self.executor.device
        if name in plan.shapes_only:
            return torch.zeros((), device=device).expand(self._shape(name, count))
        stream = generator(seed, name, count)
        if name in self._inputs and self._images is not None:
            if count > len(self._images):
                raise InputError(f"{count} samples from {len(self._images)} images; give more images")
            chosen = torch.randperm(len(self._images), generator=stream)[:count]
            return self._images[chosen].to(device, self.executor.dtype)
        shape = self._shape(name, count)
        statistics = self.statistics.get(name)
        if statistics is not None:
            self._check_record(name, shape)
        if name in self._inputs:
            self._check_floating(name)
            value = draw_input(shape, statistics, self.noise, stream)
        else:
            value = draw(shape, self.statistics[name], self.noise, stream)
        return value.to(device, self.executor.dtype)

    def _shape(self, name: str, count: int) -> tuple[int, ...]:
        shape = self._shapes.get(name)
        sides = () if shape is None else shape[1:]
        if shape is None or len(shape) < 1 or not all(isinstance(d, int) for d in sides):
            text = "unknown" if shape is None else "x".join("?" if d is None else str(d) for d in shape)
            raise ModelError(
                f"{self._name}: tensor {name!r} cannot be drawn, its shape is {text}; "
                "fix the input's image size in the file"
            )
        return (count, *(int(d) for d in sides if isinstance(d, int)))

    def _checked(self, images: Tensor | None) -> Tensor | None:
        if images is None:
            return None
        if len(self._inputs) != 1:
            raise InputError(f"{self._name}: images for {len(self._inputs)} inputs; one is expected")
        (name,) = self._inputs
        expected, got = self._shapes.get(name, ()), tuple(images.shape)
        fits = [not isinstance(d, int) or d == g for d, g in zip(expected[1:], got[1:], strict=False)]
        if len(expected) != len(got) or not all(fits):
            raise InputError(f"input {name!r} takes {list(expected)}, the images are {list(got)}")
        return images

    def _check_record(self, name: str, shape: Sequence[int]) -> None:
        channels = len(self.statistics[name].mean)
        if len(shape) < 2 or shape[1] != channels:
            raise ModelError(
                f"{self._name}: tensor {name!r} has shape {list(shape)}, its statistics are of {channels} "
                "channels; remove the record, or estimate it again"
            )

    def _check_floating(self, name: str) -> None:
        kind = self._inputs[name]
        if kind is not None and not isinstance(kind, int) and np.dtype(kind).kind in "iub":
            raise ModelError(
                f"{self._name}: input {name!r} cannot be drawn: it is {np.dtype(kind)}, not floating"
            )

    def _check_count(self, name: str, value: Tensor, count: int) -> None:
        if value.ndim == 0 or value.shape[0] != count:
            raise ModelError(
                f"{self._name}: tensor {name!r} has shape {list(value.shape)} for {count} samples: "
                "the graph fixes the batch size; make it open"
            )

    def _cut(self, tensors: Sequence[str]) -> Cut:
        for name in tensors:
            if name not in self._place:
                known = "no input of the graph reaches it" if name in self._shapes else "there is none"
                raise ModelError(f"{self._name}: tensor {name!r} cannot be drawn: {known}")
        return cut(self._nodes, self._inputs, self.statistics, tensors, self.noise.depth)


def map_layers(
    sampler: LayerSampler,
    tensors: Sequence[str],
    count: int,
    seed: int,
    work: Callable[[str, Tensor], Result],
    workers: int = 1,
) -> Iterator[tuple[str, Result]]:
    """Call a function on the values of each tensor, for up to `workers` tensors at a time.

    Holds the values of no more than `workers` tensors at a time. With a noise depth of 0 or None the values
    of each tensor alone equal those of all together, and come from one pass; otherwise each worker draws
    its own. Until the last result is taken torch computes with one thread per worker, so that neither
    results nor their order depend on the number of workers.

    Args:
        sampler: Draws the values.
        tensors: Names of the tensors.
        count: Number of samples.
        seed: Random seed.
        work: Called with the name and the values, (count, …).
        workers: Number of threads.

    Yields:
        The name and the result of `work`, in the order of the graph.
    """
    with one_thread_each(workers):
        yield from run_jobs(_jobs(sampler, tensors, count, seed, work))


def _jobs(
    sampler: LayerSampler,
    tensors: Sequence[str],
    count: int,
    seed: int,
    work: Callable[[str, Tensor], Result],
) -> Iterator[Callable[[], tuple[str, Result]]]:
    def given(name: str, value: Tensor) -> tuple[str, Result]:
        return name, work(name, value)

    def alone(name: str) -> tuple[str, Result]:
        return name, work(name, sampler.sample(name, count, seed))

    if sampler.noise.depth:
        yield from (partial(alone, name) for name in sampler.ordered(tensors))
    else:
        yield from (partial(given, *drawn) for drawn in sampler.stream(tensors, count, seed))


def sample_layers(
    sampler: LayerSampler, tensors: Sequence[str], count: int, seed: int, workers: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Draw values of each tensor on its own, as `map_layers` does.

    Args:
        sampler: Draws the values.
        tensors: Names of the tensors.
        count: Number of samples.
        seed: Random seed.
        workers: Number of threads.

    Returns:
        An iterator over names and values, (count, …), in the order of the graph.
    """
    return map_layers(sampler, tensors, count, seed, lambda _, value: value, workers)
