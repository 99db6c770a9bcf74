"""A step of training as one CUDA graph, recorded once and replayed for each batch.

A small network's step launches a thousand kernels of some microseconds each, and the host needs longer to
launch them than the GPU to run them: MobileNetV2 on 32 images of 224 x 224 takes 40 ms a step on an H100,
of which the GPU works for 7. A replay is one launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from onnxcompress.errors import CompressError, CompressWarning, one_line

WARM_UP = 2
"""Steps before the recording, in which libraries load and choose their algorithms."""
Step = Callable[..., None]
"""Takes tensors, and changes others in place."""


def captured(step: Step, sample: Sequence[Tensor], state: Sequence[Tensor]) -> Step:
    """Record a step for inputs of the sample's shapes.

    Where the recording fails (an operator that waits for the device), return the step as it is, and warn.

    Args:
        step: Computes on the GPU alone. Numbers that change from step to step are among its inputs, as
            tensors; others are recorded as they are now.
        sample: Its inputs, of the shapes and on the device that all have.
        state: All tensors that it changes; they have their values again when this returns.

    Returns:
        What does the same.
    """
    inputs = [tensor.clone() for tensor in sample]
    before = [tensor.detach().clone() for tensor in state]
    try:
        graph = _recorded(partial(step, *inputs))
    except torch.OutOfMemoryError:
        raise
    except (CompressError, RuntimeError, AssertionError) as error:
        text = f"no CUDA graph of a step ({one_line(error)}): fine-tuning goes on without"
        warnings.warn(text, CompressWarning, stacklevel=2)
        return step
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

    def replay(*given: Tensor) -> None:
        for own, value in zip(inputs, given, strict=True):
            own.copy_(value)
        graph.replay()

    return replay


def _recorded(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record a step that was warmed up on a stream of its own, as torch asks for."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
