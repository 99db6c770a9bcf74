"""Export a torch network to ONNX for inference with its BatchNorm nodes kept.

torch.onnx.export folds BatchNorm into the convolutions by default, and with it removes all that a data-free
method knows of the training set. Both of its modes can keep it:

    TorchScript   training=PRESERVE on a network in evaluation mode, do_constant_folding=False dynamo
    optimize=False, because its optimizer folds. The optimizer's other work (removing a zero bias
                  computed for each convolution, or sequences where torch has `chunk`) is left to
                  onnxscript's constant folding, which does not touch BatchNorm

TorchScript is tried first: it needs no onnxscript, is faster, and names nodes after modules, from which
blocks take their names. Where it fails, or no longer exists, dynamo is tried.

The file is checked before it is written: it passes onnx.checker; each BatchNorm that ran is a node in
inference mode; onnxruntime computes from it what torch computes, for two batch sizes where the batch is
open. Does not handle: several inputs, keyword inputs, control flow on values, files of 2 GB and more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxcompress.data.preprocess import PREPROCESSING, Preprocess
from onnxcompress.errors import CompressError, InputError, ModelError, one_line
from onnxcompress.evaluation.equivalence import difference_of
from onnxcompress.model import Model, save
from onnxcompress.runtime.inference import run

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = dict[str, np.ndarray]

INPUT, OUTPUT, BATCH = "input", "output", "batch"
"""Tensor and axis names in the file; further outputs are output_1, …"""
OPSET = 17
"""Operator set of the TorchScript mode; dynamo's own default is newer."""
TOLERANCE = 1e-3
"""Largest difference from torch that other kernels explain, relative to the output's magnitude."""
HALF_TOLERANCE = 3e-2
"""`TOLERANCE` for networks in half precision."""


def export(
    torch_model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    preprocess: str | None = None,
    dynamic_batch: bool = True,
) -> None:
    """Write a torch network to an ONNX file for inference that keeps all of its BatchNorms.

    The network is exported as it computes in evaluation mode; its parameters and training flags are not
    changed.

    Args:
        torch_model: The network.
        example: An input (N, …) of the type and size that the network takes.
        path: The file to write.
        opset: Operator set version; None: 17, or the default of the dynamo mode.
        preprocess: How images are normalized, such as "imagenet". It is kept in the file's metadata, so
            that commands need no --preprocess.
        dynamic_batch: Whether the batch size is left open.

    Raises:
        OptionError: `preprocess` is not known.
        InputError: The network does not take the example.
        ModelError: Neither mode can export the network, the file would compute something else, or it cannot
            be written.
    """
    import torch

    fits = isinstance(example, torch.Tensor) and example.ndim > 1 and len(example) > 0
    if not fits or example.dtype in (torch.float64, torch.bfloat16):
        raise InputError("export: the example must be a float32 batch, such as torch.zeros(1, 3, 224, 224)")
    metadata = None if preprocess is None else str(Preprocess.parse(preprocess))
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ModelError(f"{target}: cannot be written; name a file in an existing folder")
    with _evaluation(torch_model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proto = _export(_observe(torch_model, example.detach(), dynamic_batch), opset, target.name)
    model = Model.from_proto(proto, target.name)
    model.set_metadata(PREPROCESSING, metadata)
    save(model, target)


@dataclass(frozen=True)
class _Observed:
    """The network, with what it computes from the example."""

    net: nn.Module
    inputs: list[Tensor]
    """The example; where the batch is open, also the example at twice the batch."""
    outputs: list[Arrays]
    """The outputs for each of the inputs, by name."""
    norms: int
    """Calls of BatchNorms in one run."""

    @property
    def traced(self) -> Tensor:
        """The larger input: exporters treat a batch of 1 as fixed."""
        return self.inputs[-1]

    @property
    def open_outputs(self) -> list[str]:
        """Outputs whose first axis is the batch."""
        first, last = self.outputs[0], self.outputs[-1]
        return [name for name in last if first[name].shape[:1] != last[name].shape[:1]]


@contextlib.contextmanager
def _evaluation(net: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode; on exit every module has its own flag again."""
    flags = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _observe(net: nn.Module, example: Tensor, dynamic_batch: bool) -> _Observed:
    """Run the network. Raises InputError where it fails, ModelError where a BatchNorm has no statistics."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    inputs = [example, torch.cat([example, example])] if dynamic_batch else [example]
    norms = {name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm)}
    calls: list[str] = []

    def called(name: str, module: nn.Module, *_: Any) -> None:
        calls.append(name)
        if module.running_mean is None:
            raise ModelError(
                f"module {name!r}: this BatchNorm keeps no running statistics, so it depends on the "
                "batch; train it with track_running_stats=True"
            )

    hooks = [module.register_forward_hook(partial(called, name)) for name, module in norms.items()]
    try:
        outputs = [_named(net(x)) for x in inputs]
    except CompressError:
        raise
    except Exception as error:  # whatever the network raises
        shape = "x".join(str(d) for d in example.shape)
        raise InputError(
            f"export: the network fails on the example of shape {shape}: {one_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return _Observed(net, inputs, outputs, len(calls) // len(inputs))


def _named(value: Any) -> Arrays:
    """Name the tensors in the value that a network returns output, output_1 and so on."""
    names = (OUTPUT if i == 0 else f"{OUTPUT}_{i}" for i in itertools.count())
    return {
        name: tensor.detach().cpu().numpy() for name, tensor in zip(names, _tensors(value), strict=False)
    }


def _tensors(value: Any) -> list[Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    if value is None:
        return []
    raise InputError(f"export: the network returns {type(value).__name__}; expected tensors")


def _export(observed: _Observed, opset: int | None, name: str) -> onnx.ModelProto:
    """Export by the first mode whose file is right."""
    problems = []
    for mode, convert in (("TorchScript", _torchscript), ("dynamo", _dynamo)):
        try:
            proto = convert(observed, opset)
            _check(observed, proto)
        except Exception as error:  # exporters raise anything; it is reported below
            problems.append(f"{mode}: {_reason(error)}")
        else:
            return proto
    raise ModelError(f"{name}: cannot be exported with BatchNorm kept; {'; '.join(problems)}")


def _reason(error: BaseException) -> str:
    """Describe the root cause in one line: the dynamo mode wraps errors in pages of advice."""
    while error.__cause__ is not None and not isinstance(error, CompressError):
        error = error.__cause__
    return one_line(error) or type(error).__name__


def _torchscript(observed: _Observed, opset: int | None) -> onnx.ModelProto:
    import torch

    opened = [INPUT, *observed.open_outputs] if len(observed.inputs) > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        torch.onnx.export(
            observed.net,
            (observed.traced,),
            str(file),
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=opset or OPSET,
            input_names=[INPUT],
            output_names=list(observed.outputs[0]),
            dynamic_axes={name: {0: BATCH} for name in opened},
        )
        return onnx.load(str(file))


def _dynamo(observed: _Observed, opset: int | None) -> onnx.ModelProto:
    import torch
    from onnxscript import optimizer

    program = torch.onnx.export(
        observed.net,
        (observed.traced,),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=list(observed.outputs[0]),
        dynamic_shapes=({0: torch.export.Dim(BATCH)},) if len(observed.inputs) > 1 else None,
    )
    assert program is not None
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    proto: onnx.ModelProto = program.model_proto
    for node in proto.graph.node:  # stack traces, with the paths of this machine
        del node.metadata_props[:]
    return proto


def _check(observed: _Observed, proto: onnx.ModelProto) -> None:
    """Raise ModelError unless the file is valid, has all BatchNorms, and computes what the network does."""
    onnx.checker.check_model(proto, full_check=True)
    norms = [n for n in proto.graph.node if n.op_type == "BatchNormalization"]
    training = [n.name for n in norms if any(a.name == "training_mode" and a.i for a in n.attribute)]
    if training:
        raise ModelError(f"BatchNorm {training[0]!r} came out in training mode")
    if len(norms) < observed.norms:
        raise ModelError(f"{len(norms)} of {observed.norms} BatchNorms were kept")
    limit = HALF_TOLERANCE if observed.inputs[0].element_size() == 2 else TOLERANCE
    for x, expected in zip(observed.inputs, observed.outputs, strict=True):
        difference = difference_of(expected, run(proto, {INPUT: x.cpu().numpy()}))
        if difference.max_rel > limit:
            raise ModelError(
                f"in onnxruntime {difference.output!r} is off by {difference.max_rel:.1e} of its magnitude "
                f"at batch {len(x)}; does the network draw random numbers, or branch on values or on the "
                "batch?"
            )
