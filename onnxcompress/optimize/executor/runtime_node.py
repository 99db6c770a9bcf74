"""Nodes for which there is no kernel of ours, run one by one in onnxruntime.

    node, and the tensors that its bodies capture --> a model of this node alone --> a session

So a recurrent layer, an If with its bodies, or an operator of onnxruntime's own does not keep a network
from being walked through: the layers around it are handled. No gradient goes through such a node.

Does not handle: sequences and optional values, operators that onnxruntime does not know or that draw random
numbers (the same seed gives the same file), and functions of the file.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from torch import Tensor

from onnxcompress.errors import one_line
from onnxcompress.graph.order import node_reads
from onnxcompress.graph.query import DEFAULT_DOMAINS, read
from onnxcompress.optimize.executor.ops.dtypes import tensor_from
from onnxcompress.optimize.executor.ops.registry import Kernel, Site, UnsupportedOp
from onnxcompress.runtime.session import session

KNOWN_DOMAINS = ("com.microsoft", "ai.onnx.ml")
"""Further domains whose operators onnxruntime has."""
RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators whose values differ from one process to the next."""
IR_VERSION = 10
"""The lowest that all operator sets up to 23 may be used with."""


def captured(node: gs.Node) -> tuple[str, ...]:
    """List the tensors that only the bodies of a node read.

    Args:
        node: The node.

    Returns:
        Names, each once; initializers, which become part of a body's own, are left out.
    """
    own = {tensor.name for tensor in node.inputs}
    outer = (t.name for t in node_reads(node) if not isinstance(t, gs.Constant) and t.name not in own)
    return tuple(dict.fromkeys(outer))


def runtime_kernel(node: gs.Node, site: Site, inputs: Sequence[str], domains: Mapping[str, int]) -> Kernel:
    """Prepare a node to be run in onnxruntime.

    Args:
        node: The node in the graph.
        site: The node as builders see it.
        inputs: Names of the kernel's arguments: the node's inputs, "" where one is left out, and what its
            bodies capture.
        domains: Versions of the operator sets, by domain.

    Returns:
        The kernel.

    Raises:
        UnsupportedOp: onnxruntime does not know the operator, or it draws random numbers.
    """
    domains = {name: version for name, version in domains.items() if name not in DEFAULT_DOMAINS}
    default = site.domain in DEFAULT_DOMAINS
    if not (onnx.defs.has(site.op, site.opset, "") if default else site.domain in KNOWN_DOMAINS):
        raise site.unsupported("no kernel for it")
    inside = (inner for body in node.subgraphs(recursive=True) for inner in body.nodes)
    if any(one.op in RANDOM_OPS for one in (node, *inside)):
        raise site.unsupported("it draws random numbers, and a seed has to give the same file")
    return _RuntimeNode(node, site, inputs, domains | {"": site.opset})


class _RuntimeNode:
    """The kernel: a session is opened for each combination of the arguments' types, once."""

    def __init__(
        self, node: gs.Node, site: Site, inputs: Sequence[str], domains: Mapping[str, int]
    ) -> None:
        self._site, self._inputs = site, tuple(inputs)
        try:
            self._node = OnnxExporter.export_node(node)
            _fill_bodies(node, self._node)
        except Exception as error:  # graphsurgeon's, of attributes with optional types
            raise site.unsupported(f"it cannot be run alone ({one_line(error)})") from error
        self._outputs = [name for name in self._node.output if name]
        self._opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()]
        self._sessions: dict[tuple[np.dtype[Any], ...], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: Tensor | None) -> Any:
        if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments):
            raise self._site.unsupported("onnxruntime runs it, and no gradient goes through that")
        given = zip(self._inputs, arguments, strict=True)
        fed = {name: _array(value) for name, value in given if value is not None}
        kinds = tuple(array.dtype for array in fed.values())
        try:
            with self._lock:
                if kinds not in self._sessions:
                    self._sessions[kinds] = session(self._model(fed), provider="cpu", threads=1)
            results = [tensor_from(value) for value in self._sessions[kinds].run(self._outputs, fed)]
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise self._site.unsupported(f"not in onnxruntime either ({one_line(error)})") from error
        found = dict(zip(self._outputs, map(self._placed, results), strict=True))
        every = [found.get(name) for name in self._node.output]
        return every[0] if self._site.outputs == 1 else tuple(every[: self._site.outputs])

    def _model(self, fed: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        types = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in fed.items()}
        inputs = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._outputs]
        graph = onnx.helper.make_graph([self._node], "node", inputs, outputs)
        return onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=IR_VERSION)

    def _placed(self, value: Tensor | None) -> Tensor:
        """Return a result on the device, in the executor's floating type."""
        if value is None:
            raise UnsupportedOp("it gives a type that torch does not have")
        kind = self._site.dtype if value.is_floating_point() else None
        return value.to(self._site.device, kind)


def _fill_bodies(node: gs.Node, proto: onnx.NodeProto) -> None:
    """Write the values of initializers into the bodies of a node, in place: those in a file are lazy."""
    for attribute in proto.attribute:
        body = node.attrs[attribute.name]
        if isinstance(body, gs.Graph):
            constants = body.tensors()
            for tensor in attribute.g.initializer:
                tensor.CopyFrom(onnx.numpy_helper.from_array(read(constants[tensor.name]), tensor.name))
            for inner, own in zip(body.nodes, attribute.g.node, strict=True):
                _fill_bodies(inner, own)


def _array(value: Tensor) -> np.ndarray:
    """Return an argument as onnxruntime takes it: bfloat16, which few of its kernels have, as float32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
