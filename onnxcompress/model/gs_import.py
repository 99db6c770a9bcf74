"""Import a ModelProto as a graphsurgeon graph, around what graphsurgeon cannot read.

Local functions are left out, since graphsurgeon knows neither overloads nor all of their attributes: the
model keeps them as they are. Strings that are not UTF-8 (engines of other runtimes) are hidden during the
import: the nodes keep their protos.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from onnxcompress.errors import CompressError, ModelError
from onnxcompress.model.envelope import attributes
from onnxcompress.model.sparse_tensors import adopt


def import_graph(proto: onnx.ModelProto, name: str) -> gs.Graph:
    """Import the main graph of a model.

    Args:
        proto: The model; the same afterwards as before.
        name: The model's name in messages.

    Returns:
        The graph.

    Raises:
        ModelError: graphsurgeon cannot read the graph.
    """
    log = gs.logger.G_LOGGER
    log.severity = log.CRITICAL  # its warnings concern what the model keeps
    try:
        with _hidden_bytes(proto.graph):
            graph = OnnxImporter.import_graph(
                proto.graph,
                opset=OnnxImporter.get_opset(proto),
                import_domains=proto.opset_import,
                producer_name=proto.producer_name,
                producer_version=proto.producer_version,
                ir_version=proto.ir_version,
            )
        adopt(graph, proto.graph)
        return graph
    except CompressError:
        raise
    except Exception as error:  # it raises bare exceptions of many types on a bad graph
        reason = " ".join(str(error).split())
        raise ModelError(f"{name}: graphsurgeon cannot read the graph ({reason})") from error


@contextmanager
def _hidden_bytes(graph: onnx.GraphProto) -> Iterator[None]:
    """Empty attribute strings that are not UTF-8 for the duration of the context."""
    hidden = []
    for attribute in attributes(graph):
        if not all(map(_is_text, (attribute.s, *attribute.strings))):
            hidden.append((attribute, attribute.s, list(attribute.strings)))
            attribute.s = b""
            del attribute.strings[:]
    try:
        yield
    finally:
        for attribute, single, several in hidden:
            attribute.s = single
            attribute.strings.extend(several)
            if attribute.type != onnx.AttributeProto.STRING:
                attribute.ClearField("s")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
