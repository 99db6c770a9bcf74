"""onnxruntime sessions, on the provider that was asked for.

Where a provider cannot start, onnxruntime falls back to the CPU with a line on stderr. Here that is an
error with its remedy: a latency measured on the wrong device is worse than none.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx

from onnxcompress.errors import CompressError, ModelError, OptionError, RuntimeUnavailable, one_line
from onnxcompress.model.model_like import ModelLike, label, runnable
from onnxcompress.runtime.cores import thread_count
from onnxcompress.runtime.providers import NAMED, Provider, ProviderLike, as_provider, full_name, remedy

if TYPE_CHECKING:
    import onnxruntime

MOST_THREADS = 8
"""Threads for each core, at most: more only take memory."""


def session(
    model: ModelLike,
    *,
    provider: ProviderLike = "auto",
    threads: int = 0,
    optimize: bool = True,
    profile: str | None = None,
    interleaved: bool = False,
    timed: bool = False,
) -> onnxruntime.InferenceSession:
    """Open a session whose first provider is the one asked for.

    Args:
        model: The model.
        provider: The execution provider.
        threads: Threads of one operator; 0: all cores if `timed`, else the available cores.
        optimize: Let onnxruntime optimize the graph; False turns all optimizations off.
        profile: Path prefix of a profile, which records each node until `end_profiling`.
        interleaved: Stop spinning when a run ends, so that it does not slow the next model's run.
        timed: Let threads spin while they wait, as they do by default in deployment; else they sleep, and
            leave the cores to other processes.

    Returns:
        onnxruntime's session.

    Raises:
        ModelError: onnxruntime refuses the model.
        RuntimeUnavailable: The provider cannot start.
        OptionError: The provider is unknown, or `threads` is negative.
    """
    import onnxruntime as ort

    if threads < 0:
        raise OptionError(f"threads: {threads}; expected 0 (all cores) or more")
    if threads > (most := MOST_THREADS * max(os.cpu_count() or 1, 8)):
        raise OptionError(f"threads: {threads}; expected {most} at most on this machine, 0 for all cores")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or (0 if timed else thread_count())
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised, and told as ours
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not timed:
        options.enable_cpu_mem_arena = False  # memory of one run goes back before the next model's
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if interleaved:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.log_severity_level = 4  # where it cannot load a model it also reports a missing profile
        options.profile_file_prefix = profile
    chosen = pick_provider(provider)
    with runnable(model) as source:
        return _open(source, options, chosen, label(model))


def pick_provider(provider: ProviderLike) -> Provider:
    """Resolve "auto" to "cuda" where a CUDA session starts on this machine, else to "cpu".

    Args:
        provider: The provider asked for.

    Returns:
        The provider; any other than "auto" is returned unchanged.

    Raises:
        OptionError: onnxruntime does not know the provider.
    """
    given = as_provider(provider)
    if given.name != "auto":
        return given
    import onnxruntime as ort

    if NAMED["cuda"] not in ort.get_available_providers() or not cuda_devices():
        return Provider("cpu")
    cuda = Provider("cuda", given.options)
    try:
        _open(_identity(), ort.SessionOptions(), cuda, "probe")
    except CompressError:
        return Provider("cpu")
    return cuda


def check_provider(provider: ProviderLike) -> None:
    """Check that a session can start on a provider.

    Args:
        provider: The provider.

    Raises:
        RuntimeUnavailable: No session can start on this machine.
        OptionError: onnxruntime does not know the provider.
    """
    import onnxruntime as ort

    _open(_identity(), ort.SessionOptions(), pick_provider(provider), "probe")


def cuda_devices() -> int:
    """Count the NVIDIA GPUs that the driver shows.

    Returns:
        The number of GPUs; 0 without a driver.
    """
    driver = _cuda_driver()
    count = ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_bus_id(device: int) -> bytes:
    """Look up the PCI address of a GPU, by which NVML identifies it: NVML numbers GPUs differently.

    Args:
        device: CUDA's number of the GPU.

    Returns:
        The address.

    Raises:
        RuntimeUnavailable: The driver shows no such GPU.
    """
    driver = _cuda_driver()
    text = ctypes.create_string_buffer(32)
    if driver is None or driver.cuDeviceGetPCIBusId(text, len(text), device) != 0:
        raise RuntimeUnavailable(f"provider option device={device}: the driver shows no such GPU")
    return text.value


def _cuda_driver() -> Any:
    """Load and start the driver's library; None where there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _open(source: str | bytes, options: Any, provider: Provider, name: str) -> Any:
    import onnxruntime as ort

    if provider.library is not None:
        return _open_plugin(source, options, provider, name)
    wanted = full_name(provider.name)
    if wanted not in ort.get_available_providers():
        raise RuntimeUnavailable(
            f"provider {provider.name}: this onnxruntime has no {wanted}; {remedy(provider.name)}, "
            "or use provider cpu"
        )
    if provider.on_gpu:
        _load_gpu_libraries(provider.name)
    if provider.options.cache:
        _make_folder(provider.options.cache)
    try:
        with _quiet(provider.name != "cpu"):
            # onnxruntime's own fall-back would print to stdout and go on with the CPU
            opened = ort.InferenceSession(
                source, options, providers=provider.for_onnxruntime(), enable_fallback=0
            )
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise _explained(error, provider, name) from error
    if opened.get_providers()[0] != wanted:
        raise _not_started(provider.name, _why_not(provider))
    return opened


def _open_plugin(source: str | bytes, options: Any, provider: Provider, name: str) -> Any:
    """Open a session on a provider that is a library of its own."""
    import onnxruntime as ort

    from onnxcompress.runtime.plugin_providers import plugin_device

    device = plugin_device(provider.library or "", provider.name, provider.device)
    options.add_provider_for_devices([device], dict(provider.extra))
    try:
        with _quiet(True):
            return ort.InferenceSession(source, options)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise _explained(error, provider, name) from error


def _explained(error: Exception, provider: Provider, name: str) -> CompressError:
    """Turn onnxruntime's exception into an error that tells the user what to do."""
    text = one_line(error)
    if provider.on_gpu and not cuda_devices():
        return _not_started(provider.name, "no NVIDIA GPU or driver found")
    if provider.name == "tensorrt" and "install TensorRT" in text:
        return _not_started(provider.name, "TensorRT's libraries were not found")
    if provider.options.cuda_graph and "graph capture" in text:
        return ModelError(f"{name}: no CUDA graph can be made of it ({text}); leave cuda_graph off")
    return ModelError(f"{name}: onnxruntime cannot load it ({text})")


def _why_not(provider: Provider) -> str:
    if not provider.on_gpu:
        return "onnxruntime fell back to the CPU"
    return "its CUDA libraries were not found" if cuda_devices() else "no NVIDIA GPU or driver"


def _not_started(name: str, why: str) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        f"provider {name}: {full_name(name)} did not start ({why}); {remedy(name)}, or use provider cpu"
    )


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OptionError(f"provider option cache={path}: no folder can be made there ({error})") from error


def _load_gpu_libraries(provider: str) -> None:
    """Load the CUDA, cuDNN and TensorRT libraries that pip installed: no search path has them."""
    import onnxruntime as ort

    if cuda_devices() and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()  # what is missing shows when the session opens
    if provider == "tensorrt":
        with contextlib.suppress(Exception):
            importlib.import_module("tensorrt_libs")


@contextlib.contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Keep onnxruntime's process-wide log from stderr: what it says becomes our error."""
    import onnxruntime as ort

    if active:
        ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        if active:
            ort.set_default_logger_severity(3)


def _identity() -> bytes:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", [value], [out])
    opset = onnx.helper.make_opsetid("", 13)
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return bytes(proto.SerializeToString())
