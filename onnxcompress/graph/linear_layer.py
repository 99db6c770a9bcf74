"""Conv, ConvTranspose, Gemm and MatMul in one form: a linear map of channels, and a bias.

    y[o] = sum over inputs i of o's group, and taps k, of  W[o, i, k] * x[i, at k]   +   b[o]

`Linear.view` shows the weight of any of them as W of shape (groups, outputs / groups, inputs / groups,
taps), without copying. Where the channels are (ONNX operator specification; axis 1 of x and of y):

| operator                        | weight as stored             | group g's output o | input i         |
|---------------------------------|------------------------------|--------------------|-----------------|
| Conv                            | (outputs, inputs/groups, k)  | axis 0, g*O + o    | axis 1          |
| ConvTranspose                   | (inputs, outputs/groups, k)  | axis 1             | axis 0, g*I + i |
| Gemm, transB 1                  | (outputs, inputs)            | axis 0             | axis 1          |
| Gemm, transB 0; MatMul x @ W    | (inputs, outputs)            | axis 1             | axis 0          |
| MatMul W @ x, x of rank 3       | (outputs, inputs)            | axis 0             | axis 1          |

Legality, numbered on from `graph.batch_norm`:
 6. the weight is a float tensor of at least two axes, an initializer or Constant, directly or through
    Identity, Cast or Transpose (a DequantizeLinear is not: folding would undo the quantization);
 7. one operand of a MatMul is such a weight with two axes, and the channels of the other are axis 1: x has
    rank 2 on the left of W, rank 3 on its right (in `x @ W` with x of rank 3, axis 1 is not multiplied).
Does not handle: linear layers of other domains (FusedConv), Einsum, quantized operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcompress.account import Refusal
from onnxcompress.graph.constant_folding import constant_attribute
from onnxcompress.graph.query import attribute, input_at, is_op, node_label, producer, read
from onnxcompress.model import Model

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BIAS_AT = 2
"""Input of Conv, ConvTranspose and Gemm that is the bias; MatMul has none."""

COPIES = ("Identity", "Cast", "Transpose")
"""Operators that may lie between an initializer and the layer that reads it as its weight."""

Rank = Callable[[gs.Tensor], "int | None"]


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer with a constant weight. Names are those of tensors as they are in the graph now."""

    node: gs.Node
    weight: np.ndarray
    """The stored values; never written to."""
    weight_at: int
    """Position of the weight among the node's inputs."""
    rank: int
    """Rank of the output."""

    @property
    def label(self) -> str:
        """Name of the node in messages."""
        return node_label(self.node)

    @property
    def input_name(self) -> str:
        """Name of the data input."""
        return str(self.node.inputs[self.data_at].name)

    @property
    def output_name(self) -> str:
        """Name of the output: unique, unlike node names."""
        return str(self.node.outputs[0].name)

    @property
    def weight_name(self) -> str:
        """Name of the weight."""
        return str(self.node.inputs[self.weight_at].name)

    @property
    def bias_name(self) -> str | None:
        """Name of the bias; None where there is none."""
        tensor = input_at(self.node, BIAS_AT) if self.takes_bias else None
        return None if tensor is None else str(tensor.name)

    @property
    def depthwise(self) -> bool:
        """Whether it is a convolution each group of which has one input channel."""
        return self.node.op == "Conv" and self.weight.shape[:2] == (self.groups, 1)

    @property
    def data_at(self) -> int:
        """Position of the node's data input."""
        return 1 - self.weight_at if self.node.op == "MatMul" else 0

    @property
    def takes_bias(self) -> bool:
        """Whether the operator has a bias input."""
        return bool(self.node.op != "MatMul")

    @property
    def groups(self) -> int:
        """Number of groups of channels; 1 for Gemm and MatMul."""
        return int(attribute(self.node, "group", 1))

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.view(self.weight).shape[1]) * self.groups

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.view(self.weight).shape[2]) * self.groups

    def view(self, weight: np.ndarray) -> np.ndarray:
        """View a weight in the common layout, without copying.

        Args:
            weight: A contiguous array of the stored weight's shape.

        Returns:
            Shape (groups, outputs / groups, inputs / groups, taps).
        """
        first, second, *kernel = weight.shape
        grouped = weight.reshape(self.groups, first // self.groups, second, math.prod(kernel))
        return grouped.swapaxes(1, 2) if self._inputs_first else grouped

    @property
    def _inputs_first(self) -> bool:
        op, node = self.node.op, self.node
        return (
            op == "ConvTranspose"
            or (op == "Gemm" and not attribute(node, "transB", 0))
            or (op == "MatMul" and self.weight_at == 1)
        )

    def cut(self, inputs: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, int]:
        """Take channels out of the weight.

        Args:
            inputs: Which input channels stay, bool, shape (input channels,).
            outputs: Which output channels stay, bool, shape (output channels,).

        Returns:
            The weight as stored, and the number of groups that are left. Groups without any channel are
            gone; all others must keep the same number of inputs, and of outputs.

        Raises:
            ValueError: They do not.
        """
        rows, columns = outputs.reshape(self.groups, -1), inputs.reshape(self.groups, -1)
        left = np.flatnonzero(rows.any(1) | columns.any(1))
        view = self.view(self.weight)
        new = np.stack([view[g][rows[g]][:, columns[g]] for g in left])
        if 0 in new.shape:
            raise ValueError(f"{self.label!r} would be left without channels")
        stored = new.swapaxes(1, 2) if self._inputs_first else new
        shape = (stored.shape[0] * stored.shape[1], stored.shape[2], *self.weight.shape[2:])
        return np.ascontiguousarray(stored.reshape(shape)), len(left)

    def scaled(self, *, outputs: np.ndarray | None = None, inputs: np.ndarray | None = None) -> np.ndarray:
        """Multiply the output or the input channels of the weight, in float64.

        Args:
            outputs: Factors of shape (output channels,), float64.
            inputs: Factors of shape (input channels,), float64; ignored where `outputs` is given.

        Returns:
            A new weight in the type of the old; it may overflow to infinity.
        """
        factor: np.ndarray = np.ones(())
        if outputs is not None:
            factor = outputs.reshape(self.groups, -1, 1, 1)
        elif inputs is not None:
            factor = inputs.reshape(self.groups, 1, -1, 1)
        new = np.empty(self.weight.shape, self.weight.dtype)
        with np.errstate(all="ignore"):
            np.multiply(
                self.view(self.weight), factor, out=self.view(new), dtype=np.float64, casting="unsafe"
            )
        return new

    def response(self, constant: np.ndarray) -> np.ndarray:
        """Compute the output, without bias and padding, for an input that is constant in each channel.

        Args:
            constant: Value of each input channel, shape (input channels,).

        Returns:
            Value of each output channel, shape (output channels,), float64.
        """
        taps = self.view(self.weight).sum(axis=3, dtype=np.float64)
        out = np.einsum("goi,gi->go", taps, constant.reshape(self.groups, -1)).reshape(-1)
        return np.asarray(out * attribute(self.node, "alpha", 1.0) if self.node.op == "Gemm" else out)

    def spread(self, vector: np.ndarray) -> np.ndarray:
        """Reshape a vector so that it broadcasts along the channels of the output.

        Args:
            vector: Shape (output channels,).

        Returns:
            Shape (output channels, 1, …), with a 1 for each spatial axis.
        """
        return vector.reshape(-1, *[1] * (self.rank - 2))

    def is_per_channel(self, offset: np.ndarray) -> bool:
        """Return whether an array that is added to the output has one number per channel, or one for all.

        Args:
            offset: An array that broadcasts onto the output.

        Returns:
            False where it varies over the batch or the image.
        """
        padded = (1,) * (self.rank - offset.ndim) + offset.shape
        return len(padded) == self.rank and padded[0] == 1 and set(padded[2:]) <= {1} and self.fits(offset)

    def fits(self, offset: np.ndarray) -> bool:
        """Return whether adding an array to the output preserves its rank and its number of channels.

        Args:
            offset: Any array.

        Returns:
            False where it would broadcast the output.
        """
        padded = (1,) * (self.rank - offset.ndim) + offset.shape
        return len(padded) == self.rank and padded[1] in (1, self.outputs)


def as_linear(model: Model, node: gs.Node, rank: Rank) -> Linear | Refusal:
    """Read a node as a linear layer.

    Args:
        model: The model.
        node: A Conv, ConvTranspose, Gemm or MatMul.
        rank: Function that returns the rank of a tensor, None where unknown.

    Returns:
        The layer, or the refusal that names the rule it breaks.
    """
    name = f"{node.op} {node_label(node)!r}"
    weight_at = 1
    if node.op == "MatMul" and stored_value(node.inputs[1]) is None:
        weight_at = 0
    tensor = input_at(node, weight_at)
    weight = None if tensor is None else stored_value(tensor)
    if weight is None:  # rule 6
        remedy = "make it an initializer of a float type"
        if tensor is not None and is_op(producer(tensor), "Reshape", "ScatterElements"):
            remedy += "; where `prune --storage sparse` wrote it, do that last"
        return Refusal(node_label(node), f"the weight of {name} is not a constant", remedy)
    if node.op == "MatMul":
        refusal = _check_matmul(node, weight, weight_at, rank, name)
        if refusal:
            return refusal
    groups = attribute(node, "group", 1)
    expected = 2 if node.op in ("Gemm", "MatMul") else 3
    shape = weight.shape
    wrong = len(shape) < expected or (expected == 2 and len(shape) > 2) or 0 in shape
    if wrong or groups < 1 or shape[0] % groups:
        return Refusal(node_label(node), f"the weight of {name} has shape {list(shape)}, group {groups}")
    output_rank = 3 if node.op == "MatMul" and weight_at == 0 else len(shape)
    return Linear(node, np.ascontiguousarray(weight), weight_at, output_rank)


def _check_matmul(
    node: gs.Node, weight: np.ndarray, weight_at: int, rank: Rank, name: str
) -> Refusal | None:
    """Check rule 7."""
    data = node.inputs[1 - weight_at]
    found, expected = rank(data), 2 if weight_at == 1 else 3
    if weight.ndim == 2 and found == expected:
        return None
    if found is None:
        remedy = "store its shape with onnx.shape_inference"
        return Refusal(node_label(node), f"the rank of {name}'s input {data.name!r} is unknown", remedy)
    ranks = f"its input has rank {found}, its weight {weight.ndim}"
    return Refusal(node_label(node), f"the channels (axis 1) are not what {name} multiplies: {ranks}")


def chain(tensor: gs.Tensor) -> list[gs.Tensor]:
    """Follow a tensor back through COPIES.

    Args:
        tensor: The tensor.

    Returns:
        The tensor, and those that it is a copy of, nearest first.
    """
    tensors, node = [tensor], producer(tensor)
    while is_op(node, *COPIES):
        tensors.append(node.inputs[0])
        node = producer(tensors[-1])
    return tensors


def stored_value(tensor: gs.Tensor) -> np.ndarray | None:
    """Read a float weight or bias (rule 6), without keeping it in memory.

    Args:
        tensor: The tensor.

    Returns:
        Its value; None where it is not a dense constant of a float type.
    """
    *copies, root = chain(tensor)
    value = _root_value(root)
    for copy in reversed(copies):
        node = producer(copy)
        try:
            if value is not None and is_op(node, "Cast"):
                value = value.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
            elif value is not None and is_op(node, "Transpose"):
                value = value.transpose(attribute(node, "perm"))
        except (KeyError, ValueError):  # an invalid type or permutation
            return None
    return value if value is not None and is_float(value) else None


def _root_value(root: gs.Tensor) -> np.ndarray | None:
    node = producer(root)
    if not isinstance(root, gs.Constant):
        return constant_attribute(node) if is_op(node, "Constant") else None
    value = read(root)
    if isinstance(root._values, SparseValues):
        return value
    if isinstance(root._values, LazyValues):  # old onnx reads bfloat16 as float32
        stored = root._values.tensor.data_type
        return value if onnx.helper.np_dtype_to_tensor_dtype(value.dtype) == stored else None
    return value


def is_float(value: np.ndarray) -> bool:
    """Return whether an array has a float type, bfloat16 included.

    Args:
        value: Any array.

    Returns:
        True for floats of any width.
    """
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"
