"""onnxruntime sessions, on the provider that was asked for.

A provider that cannot start makes onnxruntime go on with the CPU and a line on stderr. Here that is an
error with its remedy: a latency measured on the wrong device is worse than none.
Does not handle: several GPUs (always device 0).
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx

from onnxcompress.errors import CompressError, ModelError, OptionError, RuntimeUnavailable, one_line
from onnxcompress.sources import ModelLike, label, runnable

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_REMEDY = {
    "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]' on a machine with an NVIDIA driver",
    "tensorrt": "pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt, with an NVIDIA driver",
}


def session(
    model: ModelLike,
    *,
    provider: str = "auto",
    threads: int = 0,
    optimize: bool = True,
    profile: str | None = None,
    interleaved: bool = False,
) -> onnxruntime.InferenceSession:
    """Open a session whose first provider is the one asked for.

    `threads`: of one operator, 0 for all cores. `optimize` False turns all graph optimizations off.
    `profile`: a path prefix; onnxruntime records each node until `end_profiling`.
    `interleaved`: threads stop spinning when a run ends, so that they do not slow the next model's run.
    Raises ModelError where onnxruntime refuses the model, RuntimeUnavailable where the provider
    cannot start, OptionError for an unknown provider or negative threads.
    """
    import onnxruntime as ort

    if threads < 0:
        raise OptionError(f"threads: {threads}; expected 0 (all cores) or more")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if interleaved:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.log_severity_level = 4  # of a model it cannot load it also says that there is no profile
        options.profile_file_prefix = profile
    chosen = pick_provider(provider)
    with runnable(model) as source:
        return _open(source, options, chosen, label(model))


def pick_provider(provider: str) -> str:
    """Resolve "auto" to "cuda" where a CUDA session starts on this machine, else to "cpu"."""
    if provider in PROVIDERS:
        return provider
    if provider != "auto":
        near = difflib.get_close_matches(provider, [*PROVIDERS, "auto"], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"provider: {provider!r} is not one of {', '.join([*PROVIDERS, 'auto'])}{hint}")
    import onnxruntime as ort

    if PROVIDERS["cuda"] not in ort.get_available_providers() or not cuda_devices():
        return "cpu"
    try:
        _open(_identity(), ort.SessionOptions(), "cuda", "probe")
    except CompressError:
        return "cpu"
    return "cuda"


def check_provider(provider: str) -> None:
    """Raise RuntimeUnavailable, or OptionError, where no session on `provider` can start here."""
    import onnxruntime as ort

    _open(_identity(), ort.SessionOptions(), pick_provider(provider), "probe")


def cuda_devices() -> int:
    """NVIDIA GPUs that the driver shows; 0 without a driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _open(source: str | bytes, options: Any, provider: str, name: str) -> Any:
    import onnxruntime as ort

    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise RuntimeUnavailable(
            f"provider {provider}: this onnxruntime has no {wanted}; {_REMEDY[provider]}, "
            "or use provider cpu"
        )
    if provider != "cpu":
        _load_gpu_libraries(provider)
    try:
        with _quiet(provider != "cpu"):
            # onnxruntime's own fall-back would print to stdout and go on with the CPU
            opened = ort.InferenceSession(
                source, options, providers=_fallbacks(provider), enable_fallback=0
            )
    except Exception as error:  # onnxruntime's exceptions have no common base
        if provider != "cpu" and not cuda_devices():
            raise _not_started(provider, "no NVIDIA GPU or driver found") from error
        if provider == "tensorrt" and "install TensorRT" in str(error):
            raise _not_started(provider, "TensorRT's libraries were not found") from error
        raise ModelError(f"{name}: onnxruntime cannot load it ({one_line(error)})") from error
    if opened.get_providers()[0] != wanted:
        why = "its CUDA libraries were not found" if cuda_devices() else "no NVIDIA GPU or driver"
        raise _not_started(provider, why)
    return opened


def _not_started(provider: str, why: str) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        f"provider {provider}: {PROVIDERS[provider]} did not start ({why}); "
        f"{_REMEDY[provider]}, or use provider cpu"
    )


def _fallbacks(provider: str) -> list[str]:
    """The provider, then those that take the nodes it has no kernel for."""
    order = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}
    return [PROVIDERS[p] for p in order[provider]]


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
