"""Replace a block by the identity, and remove what becomes redundant."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from onnxcompress.errors import OptionError
from onnxcompress.graph.blocks import Block, find_blocks
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import remove_nodes, replace_uses
from onnxcompress.graph.query import consumers, input_at, is_op, is_output, producer
from onnxcompress.model import Model

KEEPS_SIGN = ("MaxPool", "Identity", "Dropout")
"""Operators whose output contains only values of their input."""


def drop_blocks(model: Model, exits: Iterable[str]) -> dict[str, str]:
    """Drop blocks from a model, in place.

    Args:
        model: The model.
        exits: Names or exit tensors of the blocks, in the order in which they are dropped.

    Returns:
        {removed tensor: tensor that is read in its place}.

    Raises:
        OptionError: A name is not a block, or it was inside a block that was dropped before.
    """
    instead: dict[str, str] = {}
    for exit in exits:
        blocks = find_blocks(model)
        try:
            new = drop_block(model, blocks[exit])
        except KeyError:
            raise OptionError(
                f"{exit!r} is not a block that can be dropped; `onnxcompress inspect` lists them"
            ) from None
        instead = {old: new.get(name, name) for old, name in instead.items()} | new
    return instead


def drop_block(model: Model, block: Block) -> dict[str, str]:
    """Drop one block: readers of its exit read its entry, and an activation made idempotent goes, too.

    Args:
        model: The model, changed in place.
        block: A block of it.

    Returns:
        {removed tensor: tensor that is read in its place}, without tensors inside the block.
    """
    tensors = model.graph.tensors()
    entry, exit = tensors[block.entry], tensors[block.exit]
    nodes = [tensors[name].inputs[0] for name in block.inner]
    readers = consumers(exit)
    replace_uses(model, exit, entry)
    remove_nodes(model, nodes)
    instead = {exit.name: entry.name}
    for reader in readers:
        if _repeats(model, reader, entry) and _can_go(model, reader):
            instead[reader.outputs[0].name] = entry.name
            replace_uses(model, reader.outputs[0], entry)
            remove_nodes(model, [reader])
    model.touch()
    return instead


def _can_go(model: Model, node: gs.Node) -> bool:
    """Return whether only nodes of the main graph read the node's output: bodies are never changed."""
    bodies = {id(n) for body in model.graph.subgraphs(recursive=True) for n in body.nodes}
    output = node.outputs[0]
    return not is_output(model, output) and not any(id(n) in bodies for n in consumers(output))


def _repeats(model: Model, node: gs.Node, entry: gs.Tensor) -> bool:
    """Return whether an activation changes nothing, because an equal or tighter one produced its input."""
    if not is_op(node, "Relu", "Clip"):
        return False
    source = producer(entry)
    while source is not None and is_op(source, *KEEPS_SIGN):
        source = producer(source.inputs[0])
    if source is None or not is_op(source, "Relu", "Clip"):
        return False
    low, high = _bounds(model, node)
    inner_low, inner_high = _bounds(model, source)
    return inner_low >= low and inner_high <= high


def _bounds(model: Model, node: gs.Node) -> tuple[float, float]:
    if node.op == "Relu":
        return 0.0, float("inf")
    low, high = node.attrs.get("min"), node.attrs.get("max")
    if model.opset >= 11:
        given = [input_at(node, i) for i in (1, 2)]
        low, high = (None if t is None else constant_value(model, t) for t in given)
        if any(t is not None and value is None for t, value in zip(given, (low, high), strict=True)):
            return float("nan"), float("nan")  # computed from data: comparisons with it are false
    return (
        float("-inf") if low is None else float(low),
        float("inf") if high is None else float(high),
    )
