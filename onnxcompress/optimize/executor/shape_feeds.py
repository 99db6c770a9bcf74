"""Shapes that cross a cut of the graph.

A run may start at a tensor inside the graph and still need the shape of one that lies before: the target of
a Reshape is often computed from it (ShuffleNet, YOLO). Of such a tensor nothing but the shape is needed, so
zeros of that shape stand in for it; they take no memory. The shape is that of a run of the whole graph on
zeros, with as many images as are fed.

Does not handle: shapes that depend on values of the inputs, and inputs with open sizes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from onnxcompress.graph.query import read_inputs
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.executor.program import Program

Run = Callable[[Mapping[str, Tensor], Sequence[str]], dict[str, Tensor]]


class ShapeFeeds:
    """Finds the tensors of which a run lacks the shape alone, and what stands in for them."""

    def __init__(self, program: Program, model: Model, run: Run) -> None:
        """Prepare for a program.

        Args:
            program: The program that runs from tensors inside the graph.
            model: The model that it was made from.
            run: Runs the whole graph, from its inputs to any tensors.
        """
        self._program, self._run = program, run
        shapes = tensor_shapes(model)
        self._inputs = {str(t.name): (t.dtype, shapes.get(t.name)) for t in read_inputs(model)}
        self._missing: dict[tuple[frozenset[str], tuple[str, ...]], tuple[str, ...]] = {}
        self._known: dict[tuple[str, int], torch.Size] = {}
        self._lock = threading.Lock()

    def missing(self, feeds: Iterable[str], outputs: Sequence[str]) -> tuple[str, ...]:
        """Find the tensors in front of `feeds` of which a run needs the shape, and only that.

        Args:
            feeds: Names of the tensors that are fed.
            outputs: Names of the tensors to compute.

        Returns:
            Names of the tensors.
        """
        key = (frozenset(feeds), tuple(outputs))
        if key not in self._missing:
            self._missing[key] = () if self._inputs.keys() <= key[0] else self._search(*key)
        return self._missing[key]

    def stand_ins(self, feeds: Mapping[str, Tensor], missing: Sequence[str]) -> dict[str, Tensor]:
        """Create zeros with the shapes that the missing tensors have for these feeds.

        Args:
            feeds: Name -> value of the tensors that are fed.
            missing: Names of the missing tensors, as from `missing`.

        Returns:
            Name -> zeros, which take no memory; empty where the shapes cannot be computed.
        """
        fed = next((n for n, v in feeds.items() if v.ndim and n in self._program.names), None)
        if not missing or fed is None or not all(_is_known(s) for _, s in self._inputs.values()):
            return {}  # what is missing is reported by the run
        with self._lock:
            base = next((s[0] for _, s in self._inputs.values() if s and isinstance(s[0], int)), 1)
            count = len(feeds[fed]) * int(base) // self._shape(fed, int(base))[0]
            shapes = {name: self._shape(name, count) for name in missing}
        return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}

    def _search(self, feeds: frozenset[str], outputs: tuple[str, ...]) -> tuple[str, ...]:
        missing: dict[str, None] = {}
        pending, seen = list(outputs), set[str]()
        while pending:
            reached, measured, complete = self._behind(pending.pop(), feeds)
            if not complete and reached[0] not in outputs:
                missing[reached[0]] = None
                continue
            pending += [name for name in measured if name not in seen]
            seen.update(measured)
        return tuple(missing)

    def _behind(self, name: str, feeds: frozenset[str]) -> tuple[list[str], list[str], bool]:
        """Return the tensors whose values and whose shapes `name` needs, and whether feeds suffice."""
        reached, measured, complete = [name], list[str](), True
        seen, place = {name}, 0
        while place < len(reached):
            current = reached[place]
            place += 1
            if current in feeds:
                continue
            complete &= current not in self._inputs
            at = self._program.producer.get(current)
            node = None if at is None else self._program.nodes[at]
            sizes_only = node is not None and node.definition is not None and node.definition.host
            sources = [] if node is None else [s for s in node.inputs if s and s not in seen]
            if sizes_only:
                measured += sources
            else:
                reached += dict.fromkeys(sources)
                seen.update(sources)
        return reached, measured, complete

    def _shape(self, name: str, count: int) -> torch.Size:
        """Return the shape of a tensor for that many images."""
        if (name, count) not in self._known:
            zeros = {n: _zeros(kind, shape or (), count) for n, (kind, shape) in self._inputs.items()}
            with torch.no_grad():
                self._known[name, count] = self._run(zeros, [name])[name].shape
        return self._known[name, count]


def _is_known(shape: Sequence[int | str | None] | None) -> bool:
    return shape is not None and all(isinstance(d, int) for d in shape[1:])


def _zeros(kind: object, shape: Sequence[int | str | None], count: int) -> Tensor:
    sizes = (count, *(int(d) for d in shape[1:] if isinstance(d, int))) if shape else ()
    return torch.from_numpy(np.zeros(sizes, kind if isinstance(kind, np.dtype | type) else np.float32))
