"""A pass on a network that reads several inputs: they become parts of one, and are inputs again afterwards.

    packed (1, L) ─┬─ Gather ─ Reshape ──────────────────────────> image (1, 3, 32, 32)
                   ├─ Gather ─ Reshape ──────────────────────────> state (2, 1, 128)
                   └─ Gather ─ Reshape ─ Sigmoid ─ Mul ─ Cast ───> codes (1, 8), int64
    held value ──────────────────────────────────────────────────> rate, int64, one number

What learns from inputs, or measures on them, works with one. The packed input takes no picture, so it is
drawn (`synthesis.drawn_inputs`), and with it each of the file's: floats as they are drawn, integers from 0
to 7, 8-bit integers over their range, bools. Shapes and settings are those of `runtime.several_inputs`.

Does not handle: real images, and strings.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcompress.account import Refusal
from onnxcompress.data.input_shapes import parse_input_shapes
from onnxcompress.errors import CompressWarning, ModelError, OptionError
from onnxcompress.graph.query import SeveralInputs, read_inputs
from onnxcompress.model import Model
from onnxcompress.model.model_like import InputSpec, dims
from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.inference import INTEGER_RANGE
from onnxcompress.runtime.several_inputs import read_specs, settings, shapes_that_run
from onnxcompress.statistics.record import read_record, write_present

PREFIX = "onnxcompress.packed"
"""Begins the names of nodes and tensors that take the packed input apart."""
Edit = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Packed:
    """A network whose inputs are parts of one."""

    model: Model
    inputs: Mapping[str, onnx.ValueInfoProto]
    """The inputs as the file has them, by name, in its order."""

    def unpacked(self) -> Model:
        """Give the network, as a pass left it, its own inputs.

        Returns:
            A copy of the model.

        Raises:
            ModelError: The pass changed what takes the packed input apart.
        """
        found = self.model.copy(self._restore)
        if any(name.startswith(PREFIX) for name in read_record(found)):
            write_present(found, read_record(found))
        return found

    def _restore(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        kept = [node for node in graph.node if not node.name.startswith(PREFIX)]
        if any(name.startswith(PREFIX) for node in kept for name in (*node.input, *node.output)):
            raise ModelError(
                f"{self.model.name}: the pass changed more than what lies between inputs and outputs; "
                "turn all inputs but one into initializers with the values that they have in use"
            )
        others = {value.name: value for value in graph.input if value.name != PREFIX}
        del graph.node[:], graph.input[:]
        graph.node.extend(kept)
        graph.input.extend({**self.inputs, **others}.values())
        infos = [v for v in graph.value_info if not v.name.startswith(PREFIX) and v.name not in self.inputs]
        weights = [t for t in graph.initializer if not t.name.startswith(PREFIX)]
        del graph.value_info[:], graph.initializer[:]
        graph.value_info.extend(infos)
        graph.initializer.extend(weights)


def applied(pass_: Any, model: Model, progress: Progress) -> Any:
    """Apply a pass; where it needs one input and the network reads several, to a form that reads one.

    Args:
        pass_: The pass.
        model: The model, changed in place.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The pass's result, without what it refused of nodes that are not in the file.

    Raises:
        CompressError: The inputs cannot be packed; what the pass raises.
    """
    if len(read_inputs(model)) < 2:
        return pass_.apply(model, progress)
    own = model.copy()
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            result = pass_.apply(own, progress)
        for note in noted:
            warnings.warn_explicit(note.message, note.category, note.filename, note.lineno)
    except SeveralInputs:
        packed, packing = _prepared(pass_, model)
        result = packing.apply(packed.model, progress)
        result = dataclasses.replace(result, refusals=_of_file(result.refusals))
        own = packed.unpacked() if result.modified else own
    if result.modified:
        model.become(own)
    return result


def previewed(pass_: Any, model: Model, progress: Progress = silent) -> list[Refusal]:
    """List what a pass would leave unchanged, where it is applied by `applied`.

    Args:
        pass_: The pass.
        model: The model; it stays as it is.
        progress: Called with the expected work, with no steps.

    Returns:
        The refusals.

    Raises:
        CompressError: The pass cannot be applied at all.
    """
    try:
        refusals: list[Refusal] = pass_.preview(model, progress)
        return refusals
    except SeveralInputs:
        packed, packing = _prepared(pass_, model)
        return _of_file(packing.preview(packed.model, progress))


def learns_from(pass_: Any) -> InputRequest | None:
    """Read what a pass learns from, by the names of its options.

    Args:
        pass_: The pass.

    Returns:
        The request; None where it learns from nothing.
    """
    known = {"images", "preprocess", "count", "seed", "input_shape"}
    names = {f.name for f in dataclasses.fields(pass_)} & known
    return InputRequest(**{name: getattr(pass_, name) for name in names}) if names else None


def _prepared(pass_: Any, model: Model) -> tuple[Packed, Any]:
    """Return the model with its inputs packed, and the pass without their shapes."""
    packed = pack(model, learns_from(pass_) or InputRequest())
    known = {f.name for f in dataclasses.fields(pass_)} & {"input_shape"}
    return packed, dataclasses.replace(pass_, **dict.fromkeys(known))


def _of_file(refusals: Iterable[Refusal]) -> list[Refusal]:
    """Leave out what was refused of nodes that are not in the file."""
    return [refusal for refusal in refusals if not refusal.node.startswith(PREFIX)]


def pack(model: Model, request: InputRequest) -> Packed:
    """Copy a network, with one input in place of those that it reads, and warn how they are drawn.

    Args:
        model: A network that reads several inputs; it stays as it is.
        request: The inputs that the user asks for.

    Returns:
        The copy.

    Raises:
        ModelError: onnxruntime cannot run the copy: sizes that the file leaves open do not fit each other.
        OptionError: The request has images, or its shapes contradict the file.
    """
    read = read_specs(model)
    names = ", ".join(spec.name for spec in read)
    if request.images is not None:
        raise OptionError(
            f"--images: {model.name} reads several inputs ({names}), and images tell nothing of the "
            "others; leave it out, and all are drawn"
        )
    shapes = shapes_that_run(model, parse_input_shapes(request.input_shape))
    held = settings(model)
    drawn = {spec: shapes[spec.name] for spec in read if spec.name not in held}
    if not drawn:
        raise ModelError(f"{model.name}: its inputs ({names}) are single integers, of which none is drawn")
    infos = {value.name: value for value in model.skeleton().graph.input if value.name in shapes}
    several = ", ".join(f"{spec.name} ({dims(shape)})" for spec, shape in drawn.items())
    more = "".join(f", {name} held at {value}" for name, value in held.items())
    text = f"{model.name}: it reads several inputs: {several} drawn at random{more}"
    warnings.warn(text, CompressWarning, stacklevel=2)
    return Packed(model.copy(_packing(infos, drawn, held)), infos)


def packed_like(model: Model, packed: Model) -> Model:
    """Pack the inputs of a network as those of another are packed.

    Args:
        model: A network with the inputs that the other had; it stays as it is.
        packed: The other, in any form.

    Returns:
        A copy; the model itself where the other's inputs are not packed.

    Raises:
        ModelError: The network reads other inputs.
    """
    nodes = [node for node in packed.skeleton().graph.node if node.name.startswith(PREFIX)]
    made = [name for node in nodes for name in node.output if not name.startswith(PREFIX)]
    if not nodes:
        return model
    if {str(tensor.name) for tensor in read_inputs(model)} != set(made):
        raise ModelError(f"{model.name}: expected the inputs of {packed.name} ({', '.join(made)})")
    whole = next(value for value in packed.skeleton().graph.input if value.name == PREFIX)
    return model.copy(_replacing(made, whole, nodes))


def _packing(
    infos: Mapping[str, onnx.ValueInfoProto],
    drawn: Mapping[InputSpec, tuple[int, ...]],
    settings: Mapping[str, int],
) -> Edit:
    """Return the edit that puts the packed input, and the nodes that take it apart, into a graph."""
    nodes, start = list[onnx.NodeProto](), 0
    for spec, shape in drawn.items():
        nodes += _part(spec, infos[spec.name].type.tensor_type.elem_type, shape, start)
        start += prod(shape)
    for name, value in settings.items():
        nodes += _held(name, infos[name].type.tensor_type, value)
    whole = helper.make_tensor_value_info(PREFIX, onnx.TensorProto.FLOAT, [1, start])
    return _replacing([*(spec.name for spec in drawn), *settings], whole, nodes)


def _held(name: str, kind: onnx.TypeProto.Tensor, value: int) -> Iterator[onnx.NodeProto]:
    """Make the nodes that give a setting its value.

    No constant: onnxruntime would know which branch of an If is taken, and put its nodes into the graph. Of
    float16 networks that fails or ends the process (onnxruntime 1.31, Silero's).
    """

    def node(op: str, *sources: str, **attributes: Any) -> onnx.NodeProto:
        target = name if op == "Cast" else f"{PREFIX}.{name}.{op}"
        return helper.make_node(op, sources, [target], name=f"{PREFIX}.{name}.{op}", **attributes)

    parts = {
        "first": numpy_helper.from_array(np.zeros([1] * len(kind.shape.dim), np.int64)),
        "zero": numpy_helper.from_array(np.float32(0)),
        "value": numpy_helper.from_array(np.int64(value)),
    }
    for key, tensor in parts.items():
        label = f"{PREFIX}.{name}.{key}"
        yield helper.make_node("Constant", [], [label], name=label, value=tensor)
    yield node("Squeeze", PREFIX)
    yield node("Gather", f"{PREFIX}.{name}.Squeeze", f"{PREFIX}.{name}.first")
    yield node("Mul", f"{PREFIX}.{name}.Gather", f"{PREFIX}.{name}.zero")
    yield helper.make_node(
        "Cast", [f"{PREFIX}.{name}.Mul"], [whole := f"{PREFIX}.{name}.whole"], name=whole,
        to=onnx.TensorProto.INT64,
    )  # fmt: skip
    yield node("Add", whole, f"{PREFIX}.{name}.value")
    yield node("Cast", f"{PREFIX}.{name}.Add", to=kind.elem_type)  # a bool cannot be added to


def _replacing(names: Collection[str], whole: onnx.ValueInfoProto, nodes: Iterable[onnx.NodeProto]) -> Edit:
    """Return the edit that replaces inputs by another one, and nodes that compute them from it."""

    def edit(proto: onnx.ModelProto) -> None:
        inputs = [whole, *(value for value in proto.graph.input if value.name not in names)]
        all_nodes = [*nodes, *proto.graph.node]
        del proto.graph.node[:], proto.graph.input[:]
        proto.graph.node.extend(all_nodes)
        proto.graph.input.extend(inputs)

    return edit


def _part(spec: InputSpec, kind: int, shape: tuple[int, ...], start: int) -> Iterator[onnx.NodeProto]:
    """Make the nodes that read one input from the packed one, from the place `start` on."""
    name = f"{PREFIX}.{spec.name}"

    def constant(key: str, values: np.ndarray) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(values, key)
        return helper.make_node("Constant", [], [f"{name}.{key}"], name=f"{name}.{key}", value=tensor)

    def node(op: str, *sources: str, target: str, **attributes: Any) -> onnx.NodeProto:
        reads = [source if source == PREFIX else f"{name}.{source}" for source in sources]
        return helper.make_node(op, reads, [target], name=f"{name}.{op}", **attributes)

    yield constant("places", np.arange(start, start + prod(shape)))
    yield constant("shape", np.array(shape, np.int64))
    yield node("Gather", PREFIX, "places", target=f"{name}.flat", axis=1)
    whole = spec.dtype == np.float32
    yield node("Reshape", "flat", "shape", target=spec.name if whole else f"{name}.drawn")
    if whole:
        return
    if spec.dtype.kind == "f":
        yield node("Cast", "drawn", target=spec.name, to=kind)
        return
    count, lowest = _range(spec.dtype)
    yield constant("count", np.array(count, np.float32))
    yield constant("lowest", np.array(lowest, np.float32))
    yield node("Sigmoid", "drawn", target=f"{name}.share")
    yield node("Mul", "share", "count", target=f"{name}.scaled")
    yield node("Add", "scaled", "lowest", target=f"{name}.shifted")
    yield node("Floor", "shifted", target=f"{name}.whole")
    yield node("Cast", "whole", target=spec.name, to=kind)


def _range(dtype: np.dtype[np.generic]) -> tuple[int, int]:
    """Return how many integers are drawn of a type, and the lowest of them, as `random_values` does."""
    if dtype.kind == "b":
        return 2, 0
    if dtype.itemsize > 1:
        return INTEGER_RANGE, 0
    return 255, -128 if dtype.kind == "i" else 0
