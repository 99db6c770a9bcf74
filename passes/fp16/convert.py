"""From float32 to float16 by onnxruntime's converter, and what it leaves behind put right.

The converter (`onnxruntime.transformers.float16`, MIT) rounds the weights, and puts a Cast on every edge
between float16 and float32. What is put right here, on the ModelProto:

 1. a tensor with several float32 readers gets several Casts of one output name: one stays
 2. between two float32 nodes it rounds to float16 and back: they are joined again
 3. a float32 node's output keeps its name where nothing reads it as float16
 4. Casts stand at the end of the list: nodes are put into topological order
 5. value infos that shape inference added go; those that were there get their new type
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx

from onnxcompress.passes.fp16.candidates import FLOAT, HALF, converter, element_types

_NODE = "onnxcompress.node"


def convert(proto: onnx.ModelProto, half: Collection[int], *, keep_io: bool) -> onnx.ModelProto:
    """A new model in which the nodes at these places of the list compute in float16."""
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for at, node in enumerate(named.graph.node):  # names may be missing or shared
        node.name = f"{_NODE}{at}"
    made: onnx.ModelProto = converter().convert_float_to_float16(
        named,
        keep_io_types=keep_io,
        op_block_list=[],
        node_block_list=[n.name for at, n in enumerate(named.graph.node) if at not in half],
    )
    nodes = _ordered(_joined(made.graph))
    for node in nodes:
        if node.name.startswith(_NODE):
            original = proto.graph.node[int(node.name.removeprefix(_NODE))]
            node.name = original.name
            if not original.HasField("name"):
                node.ClearField("name")
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    _restore_value_infos(made, proto.graph)
    return made


def _joined(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes without Casts that double or undo each other."""
    outputs = {o.name for o in graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if not (_is_cast(node) and any(_is_cast(n) and n.output[0] == node.output[0] for n in nodes)):
            nodes.append(node)
    to_half = {n.output[0]: n for n in nodes if _is_cast(n, HALF)}
    instead: dict[str, str] = {}
    for node in list(nodes):
        origin = to_half.get(node.input[0]) if _is_cast(node, FLOAT) else None
        if origin is None:
            continue
        exact = instead.get(origin.input[0], origin.input[0])
        if node.output[0] not in outputs:
            instead[node.output[0]] = exact
            nodes.remove(node)
        elif exact not in outputs and any(exact in n.output for n in nodes):
            instead |= {old: node.output[0] for old, new in instead.items() if new == exact}
            instead[exact] = node.output[0]
            nodes.remove(node)
    _rename(nodes, instead)
    read = {name for n in nodes for name in n.input} | outputs
    for node in [n for n in nodes if _is_cast(n, HALF) and n.output[0] not in read]:
        nodes.remove(node)
        if any(node.input[0] in n.output for n in nodes) and node.input[0] not in outputs:
            _rename(nodes, {node.input[0]: node.output[0]})
    return nodes


def _is_cast(node: onnx.NodeProto, to: int | None = None) -> bool:
    """Whether the converter put the node there, a Cast to that type."""
    if node.op_type != "Cast" or node.name.startswith(_NODE):
        return False
    return to is None or node.attribute[0].i == to


def _rename(nodes: Iterable[onnx.NodeProto], names: dict[str, str]) -> None:
    for node in nodes:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = names.get(name, name)


def _ordered(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Each as early as its inputs allow, otherwise in the order given; Casts right before their readers."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    placed: dict[int, None] = {}
    for root in [i for i, n in enumerate(nodes) if not _is_cast(n)] + list(range(len(nodes))):
        stack = [root]
        while stack:
            at = stack[-1]
            waiting = [maker[n] for n in nodes[at].input if n in maker and maker[n] not in placed]
            if waiting:
                stack.append(waiting[0])
            else:
                placed[stack.pop()] = None
    return [nodes[i] for i in placed]


def _restore_value_infos(model: onnx.ModelProto, before: onnx.GraphProto) -> None:
    """Those that were there, with the types that tensors have now; new ones of inference go."""
    del model.graph.value_info[:]
    types = element_types(model)
    for value in before.value_info:
        new = model.graph.value_info.add()
        new.CopyFrom(value)
        if value.type.tensor_type.elem_type == FLOAT:
            new.type.tensor_type.elem_type = types.get(value.name, FLOAT)
