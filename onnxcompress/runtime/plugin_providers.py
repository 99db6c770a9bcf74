"""Execution providers that are libraries of their own, which onnxruntime loads when it runs.

    --provider openvino --provider-options library=libonnxruntime_providers_openvino_plugin.so,device=0

The library is registered once in a process; it then lists the devices that it can use on this machine.
Needs onnxruntime 1.22 or later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxcompress.errors import OptionError, RuntimeUnavailable, one_line
from onnxcompress.runtime.providers import short_name

_registered: dict[str, list[Any]] = {}
"""Library -> the devices that it lists."""


def plugin_device(library: str, name: str, index: int) -> Any:
    """Register a provider's library, and pick one of its devices.

    Args:
        library: Path of the library.
        name: Short name of the provider.
        index: Which of the provider's devices, from 0.

    Returns:
        onnxruntime's device, for `SessionOptions.add_provider_for_devices`.

    Raises:
        OptionError: There is no such file, or the library has no provider or device of that name or number.
        RuntimeUnavailable: onnxruntime cannot load the library, or it lists no device on this machine.
    """
    devices = _devices(library)
    if not devices:
        import onnxruntime as ort

        others = "; ".join(described(device) for device in ort.get_ep_devices()) or "none"
        raise RuntimeUnavailable(
            f"provider library {library}: it is registered, and lists no device that it can use "
            f"on this machine (onnxruntime's own: {others})"
        )
    own = [device for device in devices if short_name(device.ep_name) == name]
    listed = ", ".join(f"{short_name(device.ep_name)} ({described(device)})" for device in devices)
    if not own:
        raise OptionError(f"provider {name}: the library {library} has {listed}")
    if index >= len(own):
        raise OptionError(f"provider option device={index}: the library {library} has {listed}")
    return own[index]


def described(device: Any) -> str:
    """Describe a device for people.

    Args:
        device: onnxruntime's device.

    Returns:
        Such as `CPUExecutionProvider on AMD CPU`.
    """
    hardware = device.device
    return f"{device.ep_name} on {hardware.vendor} {hardware.type.name}"


def _devices(library: str) -> list[Any]:
    """Register a library the first time, and return the devices that it lists."""
    import onnxruntime as ort

    if not hasattr(ort, "register_execution_provider_library"):
        raise RuntimeUnavailable(f"provider library {library}: needs onnxruntime 1.22 or later")
    path = str(Path(library).resolve())
    if not Path(path).is_file():
        raise OptionError(f"provider option library={library}: no such file")
    if path not in _registered:
        before = {device.ep_name for device in ort.get_ep_devices()}
        try:
            ort.register_execution_provider_library(Path(path).stem, path)
        except Exception as error:  # onnxruntime's exceptions have no common base
            text = f"provider library {library}: onnxruntime cannot load it ({one_line(error)})"
            raise RuntimeUnavailable(text) from error
        _registered[path] = [device for device in ort.get_ep_devices() if device.ep_name not in before]
    return _registered[path]
