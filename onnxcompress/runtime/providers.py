"""onnxruntime's execution providers by their short names, with their options.

    --provider cuda --provider-options tf32=off,device=1      on every command line
    --provider openvino --provider-options library=PATH       a plugin (`plugin_providers`)
    provider: cuda, provider_options: [tf32=off, device=1]    in recipes and in Python

The short name is onnxruntime's own without `ExecutionProvider`, in lower case: openvino, coreml, dml. The
options of CUDA and TensorRT are those of `ProviderOptions`; those of others go to onnxruntime as they are
(`--provider openvino --provider-options device_type=GPU`). Importing this does not import onnxruntime.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from onnxcompress.errors import OptionError

NAMED = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Full names of the providers that are handled here; the others are looked up in onnxruntime."""
NVIDIA = ("cuda", "tensorrt")
"""Providers whose tensors lie in CUDA memory."""
_SUFFIX = "ExecutionProvider"
_SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
_REMEDIES = {
    "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]' on a machine with an NVIDIA driver",
    "tensorrt": "pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt, with an NVIDIA driver",
    "openvino": "pip install onnxruntime-openvino",
    "dml": "pip install onnxruntime-directml, on Windows",
    "migraphx": "pip install onnxruntime-migraphx, with AMD's driver",
    "rocm": "pip install onnxruntime-rocm, with AMD's driver",
    "qnn": "pip install onnxruntime-qnn",
    "cann": "pip install onnxruntime-cann",
    "webgpu": "pip install onnxruntime-webgpu",
    "coreml": "pip install onnxruntime, on macOS",
}


def _of(default: Any, providers: Sequence[str], help: str) -> Any:
    return field(default=default, metadata={"of": providers, "help": help})


@dataclass(frozen=True)
class ProviderOptions:
    """Options of CUDA and TensorRT. An option that a provider does not have is refused, never ignored."""

    device: int = _of(0, NVIDIA, "which GPU, from 0")
    tf32: bool = _of(True, ("cuda",), "multiply float32 with TF32's 10-bit mantissa, onnxruntime's default")
    cudnn_search: Literal["exhaustive", "heuristic", "default"] = _of(
        "exhaustive", ("cuda",), "how cuDNN chooses a convolution's algorithm"
    )
    nhwc: bool = _of(False, ("cuda",), "run convolutions in NHWC layout")
    memory: int | None = _of(None, ("cuda",), "limit of the GPU memory to use, MB (2²⁰ bytes)")
    cuda_graph: bool = _of(False, NVIDIA, "record a run once as a CUDA graph and replay it")
    fp16: bool = _of(
        False, ("tensorrt",), "let TensorRT 10 compute in half precision; 11 takes types from the file"
    )
    cache: str | None = _of(None, ("tensorrt",), "folder that keeps engines and timings")
    workspace: int | None = _of(None, ("tensorrt",), "limit of the memory for a layer's algorithm, MB")

    def changed(self) -> dict[str, bool | int | str]:
        """Return the options that differ from their defaults.

        Returns:
            Values by name.
        """
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}


@dataclass(frozen=True)
class Provider:
    """A provider with its options. Create it by `Provider.of`, which checks them."""

    name: str = "auto"
    options: ProviderOptions = field(default_factory=ProviderOptions)
    extra: tuple[tuple[str, str], ...] = ()
    """Options in onnxruntime's own names."""
    library: str | None = None
    """Library of a provider that onnxruntime does not have built in (`plugin_providers`)."""
    device: int = 0
    """Which of the devices that this library lists."""

    @classmethod
    def of(cls, name: str, texts: Iterable[str] = ()) -> Provider:
        """Create a provider from texts such as `cuda` and `["tf32=off"]`.

        Args:
            name: Short name of the provider.
            texts: Options, as NAME=VALUE.

        Returns:
            The provider.

        Raises:
            OptionError: The name or an option does not exist, or a value is out of range.
        """
        pairs = dict(_pair(text) for text in texts)
        if "library" in pairs and name not in (*NVIDIA, "auto", "cpu"):
            device = pairs.pop("device", "0")
            if not device.isdecimal():
                raise OptionError(f"provider option device={device}: expected a whole number")
            library = pairs.pop("library")
            return cls(name, extra=tuple(pairs.items()), library=library, device=int(device))
        full_name(name)
        if name not in (*NVIDIA, "auto", "cpu"):
            return cls(name, extra=tuple(pairs.items()))
        taken = _taken("cuda" if name == "auto" else name)
        values = {key: _value(key, text, name, taken) for key, text in pairs.items()}
        return cls(name, ProviderOptions(**values))

    @property
    def on_gpu(self) -> bool:
        """Whether inputs and outputs can lie in CUDA's memory."""
        return self.name in NVIDIA

    @property
    def settings(self) -> dict[str, bool | int | str]:
        """Settings that distinguish two measurements: whether TF32 is on, and all that is not default."""
        tf32: dict[str, bool | int | str] = {}
        if self.on_gpu:
            tf32 = {"tf32": self.options.tf32}  # TensorRT's own default, which onnxruntime cannot change
        library: dict[str, bool | int | str] = {}
        if self.library is not None:
            library = {"library": os.path.basename(self.library), "device": self.device}
        return tf32 | self.options.changed() | library | dict(self.extra)

    @property
    def text(self) -> str:
        """Text for people, such as `cuda (tf32 on, device 1)`."""
        return described(self.name, self.settings)

    def for_onnxruntime(self) -> list[tuple[str, dict[str, str]]]:
        """List the provider, and those that run the nodes it has no kernel for, as onnxruntime expects.

        Returns:
            Full names with options, in order of preference; the CPU is last.
        """
        order = [self.name] * (self.name != "cpu") + ["cuda"] * (self.name == "tensorrt")
        accelerated = [(full_name(name), self._raw(name)) for name in order]
        return [*accelerated, (NAMED["cpu"], {})]

    def _raw(self, name: str) -> dict[str, str]:
        convert = {"cuda": _cuda, "tensorrt": _tensorrt}
        own = convert[name](self.options) if name in convert else {}
        return own | (dict(self.extra) if name == self.name else {})


ProviderLike = str | Provider


def as_provider(given: ProviderLike) -> Provider:
    """Turn a provider's name into a provider with default options.

    Args:
        given: A short name, or a provider, which is returned unchanged.

    Returns:
        The provider.

    Raises:
        OptionError: No provider has this name.
    """
    return given if isinstance(given, Provider) else Provider.of(given)


def full_name(name: str) -> str:
    """Return onnxruntime's name of a provider.

    Args:
        name: The short name.

    Returns:
        The full name; empty for `auto`.

    Raises:
        OptionError: onnxruntime knows no such provider; the message suggests the nearest name.
    """
    if name == "auto":
        return ""
    if name in NAMED:
        return NAMED[name]
    known = _known()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "auto"], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"provider: {name!r} is not one of auto, {', '.join(known)}{hint}")
    return known[name]


def short_name(full: str) -> str:
    """Return the short name of a provider.

    Args:
        full: onnxruntime's name.

    Returns:
        The name without its suffix, in lower case.
    """
    return full.removesuffix(_SUFFIX).lower()


def remedy(name: str) -> str:
    """Return how to install a provider.

    Args:
        name: The short name.

    Returns:
        A command where there is one, else a hint.
    """
    return _REMEDIES.get(name, "build onnxruntime with it")


def described(name: str, settings: Mapping[str, Any]) -> str:
    """Describe a provider and its settings for people.

    Args:
        name: The short name.
        settings: Settings by name.

    Returns:
        Text such as `cuda (tf32 on, device 1)`.
    """
    words = [f"{key} {('on' if v else 'off') if isinstance(v, bool) else v}" for key, v in settings.items()]
    return f"{name} ({', '.join(words)})" if words else name


@cache
def _known() -> dict[str, str]:
    """Map short names to onnxruntime's, for all providers that it knows, built in or not."""
    import onnxruntime as ort

    names = [*NAMED.values(), *ort.get_all_providers(), *ort.get_available_providers()]
    return {short_name(name): name for name in names}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise OptionError(f"provider option {text!r}: expected NAME=VALUE, such as tf32=off")
    return key.strip().replace("-", "_"), value.strip()


def _taken(name: str) -> list[str]:
    return [f.name for f in dataclasses.fields(ProviderOptions) if name in f.metadata["of"]]


def _value(key: str, text: str, provider: str, taken: Sequence[str]) -> Any:
    """The option's value from its text. Raises OptionError."""
    if key not in taken:
        near = difflib.get_close_matches(key, taken, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(taken) or 'none'}"
        raise OptionError(f"provider {provider} has no option {key!r}{hint}")
    hint = typing.get_type_hints(ProviderOptions)[key]
    choices = [str(c) for c in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
    if hint is bool and text.lower() in _SWITCH:
        return _SWITCH[text.lower()]
    if int in (hint, *typing.get_args(hint)) and text.isdecimal() and (key == "device" or int(text) > 0):
        return int(text)
    if text in choices or (key == "cache" and text):
        return os.path.abspath(text) if key == "cache" else text
    expected = "on or off" if hint is bool else ", ".join(choices) or "a whole number"
    raise OptionError(f"provider option {key}={text}: expected {expected}")


def _cuda(options: ProviderOptions) -> dict[str, str]:
    raw = {
        "device_id": str(options.device),
        "use_tf32": str(int(options.tf32)),
        "cudnn_conv_algo_search": options.cudnn_search.upper(),
        "prefer_nhwc": str(int(options.nhwc)),
        "enable_cuda_graph": str(int(options.cuda_graph)),
    }
    return raw | ({"gpu_mem_limit": str(options.memory << 20)} if options.memory else {})


def _tensorrt(options: ProviderOptions) -> dict[str, str]:
    raw = {
        "device_id": str(options.device),
        "trt_fp16_enable": str(int(options.fp16)),
        "trt_cuda_graph_enable": str(int(options.cuda_graph)),
    }
    if options.workspace:
        raw["trt_max_workspace_size"] = str(options.workspace << 20)
    if options.cache:
        raw |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": options.cache}
        raw |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": options.cache}
    return raw
