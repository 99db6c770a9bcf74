"""Bind a model's inputs and outputs to its device's memory, and record which provider runs each node."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.errors import ModelError, RuntimeUnavailable, one_line
from onnxcompress.model.model_like import ModelLike, label
from onnxcompress.runtime.inference import Arrays
from onnxcompress.runtime.providers import NAMED, Provider, full_name
from onnxcompress.runtime.session import session


@dataclass(frozen=True)
class Placement:
    """Where onnxruntime ran the nodes that remain after its own optimizations."""

    nodes: dict[str, int]
    """Provider -> number of nodes."""
    computed_on_cpu: tuple[str, ...] = ()
    """On a GPU: nodes that ran on the CPU although they compute more than shapes, as "name (Op)"."""
    shapes_on_cpu: tuple[str, ...] = ()
    """On a GPU: nodes on scalars and vectors, which onnxruntime normally leaves to the CPU."""


@dataclass(frozen=True)
class Runner:
    """A model that is ready to be timed."""

    name: str
    run: Callable[[], float]
    """Runs the model once and returns the milliseconds that it took."""
    batch: int
    placement: Placement


def bind(
    name: str,
    model: ModelLike,
    provider: Provider,
    threads: int,
    feeds: Arrays,
    *,
    interleaved: bool = True,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Runner:
    """Open a session, run it once to record which provider runs which node, and bind inputs and outputs.

    Addresses never change afterwards, so that a CUDA graph, which is captured by the second run, may be
    replayed. A run waits for the device once, at its end: onnxruntime does so itself.

    Args:
        name: Name of the model in results and messages.
        model: The model.
        provider: The execution provider.
        threads: Threads of one operator; 0: all cores.
        feeds: An array for each input, by name.
        interleaved: Stop spinning threads when a run ends, for other models that run in between.
        clock: Returns the time in nanoseconds.

    Returns:
        The model, ready to be timed.

    Raises:
        ModelError: onnxruntime refuses the model or its inputs.
        RuntimeUnavailable: The provider cannot start, or runs none of the model's nodes.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened = session(
            model,
            provider=provider,
            threads=threads,
            profile=str(Path(folder) / "run"),
            interleaved=interleaved,
            timed=True,
        )
        try:
            binding = bound(opened, feeds, provider)
            pinned = _as_declared(opened, binding)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(f"{label(model)}: the run failed ({one_line(error)})") from error
        events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
    placement = placement_of(events, provider.name)
    if provider.library is None:
        _check_provider(name, provider.name, placement)

    def run() -> float:
        if not pinned:
            _bind_outputs(opened, binding, provider)
        start = clock()
        try:
            opened.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(f"{label(model)}: the run failed ({one_line(error)})") from error
        return (clock() - start) / 1e6

    first = next(iter(feeds.values()), np.zeros(()))
    return Runner(name, run, first.shape[0] if first.ndim else 1, placement)


def bound(opened: Any, feeds: Arrays, provider: Provider) -> Any:
    """Bind inputs to the device, run once, and bind the outputs to the memory that this run allocated.

    Args:
        opened: An onnxruntime session.
        feeds: An array for each input, by name.
        provider: The provider of the session; it decides the device.

    Returns:
        onnxruntime's IOBinding, for `run_with_iobinding`.
    """
    import onnxruntime as ort

    binding = opened.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, *_place(provider)))
    _bind_outputs(opened, binding, provider)
    binding.synchronize_inputs()
    first = ort.RunOptions()
    first.add_run_config_entry("gpu_graph_id", "-1")  # the outputs have no addresses yet: capture nothing
    opened.run_with_iobinding(binding, first)
    binding.synchronize_outputs()
    if _as_declared(opened, binding):  # the values refer to the binding's own: do not clear it before
        for output, value in zip(opened.get_outputs(), binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(output.name, value)
    return binding


def _place(provider: Provider) -> tuple[str, int]:
    """Return the kind of memory and the number of the device that a provider computes on."""
    return ("cuda", provider.options.device) if provider.on_gpu else ("cpu", 0)


def _bind_outputs(opened: Any, binding: Any, provider: Provider) -> None:
    """Let the next run allocate the outputs, on the device."""
    binding.clear_binding_outputs()
    for output in opened.get_outputs():
        binding.bind_output(output.name, *_place(provider))


def _as_declared(opened: Any, binding: Any) -> bool:
    """Return whether all outputs are tensors of the rank that the file declares.

    onnxruntime computes others, too, but refuses memory that is there for them, also that of the last run.
    """
    pairs = zip(opened.get_outputs(), binding.get_outputs(), strict=True)
    return all(value.is_tensor() and len(value.shape()) == len(output.shape) for output, value in pairs)


def placement_of(events: Sequence[Mapping[str, Any]], provider: str) -> Placement:
    """Count the nodes by provider from onnxruntime's profile of one run.

    Args:
        events: Events of the profile; those of category Node name their provider.
        provider: Short name of the provider that was asked for.

    Returns:
        The counts, and the nodes that ran on the CPU although another provider was asked for.
    """
    nodes: dict[str, int] = {}
    computed: list[str] = []
    shapes: list[str] = []
    for event in events:
        detail = event.get("args", {})
        if event.get("cat") != "Node" or "provider" not in detail:
            continue
        ran = detail["provider"]
        nodes[ran] = nodes.get(ran, 0) + 1
        if provider != "cpu" and ran == NAMED["cpu"]:
            text = f"{event['name'].removesuffix('_kernel_time')} ({detail.get('op_name', '?')})"
            (shapes if _only_shapes(detail) else computed).append(text)
    return Placement(nodes, tuple(computed), tuple(shapes))


def _only_shapes(detail: Mapping[str, Any]) -> bool:
    """Return whether all outputs of the node are scalars or vectors: {"int64": [4]} in the profile."""
    outputs = detail.get("output_type_shape", [])
    return all(len(shape) <= 1 for output in outputs for shape in output.values())


def _check_provider(name: str, provider: str, placement: Placement) -> None:
    wanted = full_name(provider)
    if placement.nodes and wanted not in placement.nodes:
        ran = ", ".join(f"{p}: {n}" for p, n in placement.nodes.items())
        raise RuntimeUnavailable(
            f"{name}: no node ran on {wanted} ({ran}); this provider cannot run the model's "
            "operators or types, use another"
        )
