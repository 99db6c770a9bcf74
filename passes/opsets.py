"""A pass on a model with an operator set too old for it, or with functions: converted first, and noted.

    model --skeleton--> onnx.version_converter --changed nodes--> copy of the model --comparison--> pass

onnx's version converter rewrites nodes for the next operator set, and the next, up to the one that is
asked for. It also loses things: metadata, doc strings, names of nodes, value infos, functions. So it gets
the graph without its weights, and only what it changed in the nodes is taken over; everything else stays as
the file has it. The converted model counts only where onnxruntime computes the same from both.

Functions of the file (torch's exporter leaves some) are replaced by their nodes: passes look at nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner

from onnxcompress.account import Change
from onnxcompress.errors import CompressError, ModelError, one_line
from onnxcompress.evaluation.equivalence import difference_of
from onnxcompress.formatting import counted
from onnxcompress.model import Model
from onnxcompress.model.model_like import InputSpec, input_specs
from onnxcompress.passes.base import CONVERTED, F_co, PassResult
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.inference import run as run_model

TOLERANCE = 1e-4
"""Largest difference of an output, relative to its largest magnitude, that is rounding."""
OPEN_SIZES = (64, 32, 224, 320, 640)
"""Sizes that open dimensions are tried with, until the model runs."""
BATCH = 2
SMALL_TYPES = 21
"""Operator set that came with IR version 10, which has int4."""


def at_opset(model: Model, lowest: int, apply: Callable[[Model], PassResult[F_co]]) -> PassResult[F_co]:
    """Apply a pass to the model, converted to a newer operator set first where it needs that.

    Args:
        model: Changed in place, or not at all where the pass changes nothing.
        lowest: The lowest version of the default operator set that the pass can work with.
        apply: The pass on a model of at least that version.

    Returns:
        What the pass did, with the conversion as its first change.

    Raises:
        ModelError: The model cannot be converted, or would compute something else; what the pass raises.
    """
    own, noted = model, list[Change]()
    if functions := len(model.skeleton().functions):
        own = _inlined(own)
        noted.append(Change(model.name, f"{CONVERTED} {counted(functions, 'function')} to their nodes"))
    if own.opset < lowest:
        noted.append(Change(model.name, f"{CONVERTED} opset {own.opset} to {lowest}"))
        own = converted(own, lowest)
    result = apply(own)
    if own is model or not result.modified:
        return result
    model.become(own)
    return replace(result, changes=(*noted, *result.changes))


def without_functions(model: Model) -> Model:
    """Replace the functions of a model by their nodes.

    Args:
        model: The model; it stays as it is.

    Returns:
        A copy; the model itself where it has no functions.

    Raises:
        ModelError: onnx cannot do that, or onnxruntime would compute something else.
    """
    return _inlined(model) if model.skeleton().functions else model


def _inlined(model: Model) -> Model:
    """Copy the model with the nodes of its functions in place of calls."""

    def edit(proto: onnx.ModelProto) -> None:
        graph = onnx.inliner.inline_local_functions(proto, convert_version=True).graph
        domains = {function.domain for function in proto.functions}
        del proto.graph.node[:], proto.functions[:]
        proto.graph.node.extend(graph.node)
        imports = [entry for entry in proto.opset_import if entry.domain not in domains]
        del proto.opset_import[:]
        proto.opset_import.extend(imports)

    try:
        new = model.copy(edit)
        _compare(model, new)
    except CompressError as error:
        why = f"its functions cannot be replaced by their nodes ({error})"
        raise ModelError(f"{model.name}: {why}") from error
    return new


def converted(model: Model, opset: int) -> Model:
    """Copy the model into a newer operator set, such that onnxruntime computes the same.

    Args:
        model: The model; it stays as it is.
        opset: The version of the default operator set.

    Returns:
        The copy.

    Raises:
        ModelError: There is none; the message says why and what to do.
    """
    try:
        new = _convert(model, opset)
        _compare(model, new)
    except CompressError as error:
        raise _failed(model, opset, str(error)) from error
    except Exception as error:  # the converter raises bare exceptions of many types
        raise _failed(model, opset, one_line(error)) from error
    return new


def _failed(model: Model, opset: int, why: str) -> ModelError:
    return ModelError(
        f"{model.name}: it has opset {model.opset}, {opset} is needed, and it cannot be converted ({why}); "
        f"export it again with opset {opset} or later"
    )


def _convert(model: Model, opset: int) -> Model:
    skeleton = model.skeleton()
    for sparse in skeleton.graph.sparse_initializer:  # the converter does not know them
        name, kind = sparse.values.name, sparse.values.data_type
        skeleton.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, sparse.dims))
    del skeleton.graph.sparse_initializer[:], skeleton.functions[:]
    known = {t.name for t in skeleton.graph.initializer}
    shaped = onnx.shape_inference.infer_shapes(skeleton)  # some rewrites are simpler where ranks are known
    graph = onnx.version_converter.convert_version(shaped, opset).graph

    def edit(proto: onnx.ModelProto) -> None:
        nodes = list(_merged(proto.graph.node, graph.node))
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(t for t in graph.initializer if t.name not in known)
        _import(proto, opset)

    return model.copy(edit)


def _merged(old: Iterable[onnx.NodeProto], new: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The converted nodes; what is as it was is the file's own, what changed keeps its name and notes."""
    before = {tuple(node.output): node for node in old}
    for node in new:
        original = before.get(tuple(node.output))
        if original is not None and original.op_type != node.op_type:
            original = None  # the last of several nodes that stand for it now
        if original is not None and _same(original, node):
            yield original
            continue
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        if original is not None:
            changed.name = original.name
            changed.doc_string = original.doc_string
            del changed.metadata_props[:]
            changed.metadata_props.extend(original.metadata_props)
        yield changed


def _same(old: onnx.NodeProto, new: onnx.NodeProto) -> bool:
    """Whether two nodes of one operator say the same; the converter may reorder attributes."""
    parts = [
        (list(node.input), {a.name: a.SerializeToString(deterministic=True) for a in node.attribute})
        for node in (old, new)
    ]
    return parts[0] == parts[1]


def _import(proto: onnx.ModelProto, opset: int) -> None:
    """Let the model import this version of the default operator set."""
    own = [o for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    for one in own:
        one.version = opset
    if not own:
        proto.opset_import.append(onnx.helper.make_opsetid("", opset))
    if opset < SMALL_TYPES:
        return
    if proto.ir_version < 4:  # there, initializers listed as inputs are constants; later on they are not
        given = {t.name for t in proto.graph.initializer}
        inputs = [i for i in proto.graph.input if i.name not in given]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
    proto.ir_version = max(proto.ir_version, 10)


def _compare(before: Model, after: Model) -> None:
    """Raises ModelError where an output differs, or the model does not run on made inputs."""
    feeds = None
    for feeds in _feeds(before):
        try:
            wanted = run_model(before, feeds)
            break
        except ModelError as error:
            reason = error
    else:
        raise ModelError(f"nothing to compare by: {reason}" if feeds else "no inputs can be made")
    gap = difference_of(wanted, run_model(after, feeds))
    if not gap.max_rel <= TOLERANCE:
        raise ModelError(f"its output {gap.output!r} would differ by {gap.max_rel:.1e} of itself")


def _feeds(model: Model) -> Iterator[dict[str, np.ndarray]]:
    """Draw random inputs, with open dimensions in several sizes if there are any."""
    specs = input_specs(model)
    batch = {s.shape[0] for s in specs if s.shape and isinstance(s.shape[0], str)}
    for size in OPEN_SIZES:
        shapes = {s.name: _filled(s, size, batch) for s in specs if s.shape is not None}
        yield random_feeds(model, shapes=shapes)
        if all(isinstance(d, int) for s in specs for d in (s.shape or ())[1:]):
            return


def _filled(spec: InputSpec, size: int, batch: Collection[object]) -> tuple[int, ...]:
    """Return the input's shape with sizes for open dimensions; those named as the batch get BATCH."""
    return tuple(
        d if isinstance(d, int) else BATCH if not axis or d in batch else size
        for axis, d in enumerate(spec.shape or ())
    )
