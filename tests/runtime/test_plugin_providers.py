"""Providers that are libraries of their own: what is registered, picked and refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import OptionError, RuntimeUnavailable
from onnxcompress.runtime import plugin_providers
from onnxcompress.runtime.latency import benchmark
from onnxcompress.runtime.providers import Provider
from onnxcompress.runtime.session import check_provider

pytestmark = pytest.mark.skipif(
    not hasattr(onnxruntime, "register_execution_provider_library"), reason="an older onnxruntime"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_providers, "_registered", {})


@pytest.fixture
def library(tmp_path: Path) -> str:
    (tmp_path / "libplugin.so").write_bytes(b"no library")
    return str(tmp_path / "libplugin.so")


def registers(monkeypatch: pytest.MonkeyPatch, *devices: Any) -> list[str]:
    """Let onnxruntime register any library, which then lists these devices."""
    registered: list[str] = []
    own = onnxruntime.get_ep_devices
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda name, path: registered.append(path)
    )
    monkeypatch.setattr(
        onnxruntime,
        "get_ep_devices",
        lambda: [*(own() if not devices else []), *(devices if registered else [])],
    )
    return registered


def device(ep: str, kind: str = "GPU") -> Any:
    return SimpleNamespace(
        ep_name=ep, device=SimpleNamespace(vendor="Maker", type=SimpleNamespace(name=kind))
    )


def plugin(name: str, library: str, *more: str) -> Provider:
    return Provider.of(name, [f"library={library}", *more])


def test_a_file_that_is_no_library_is_said(library: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"libplugin.so: onnxruntime cannot load it \("):
        check_provider(plugin("openvino", library))
    with pytest.raises(OptionError, match="no such file"):
        check_provider(plugin("openvino", f"{library}.gone"))
    with pytest.raises(OptionError, match="device=x: expected a whole number"):
        plugin("openvino", library, "device=x")
    with pytest.raises(OptionError, match="no option 'library'"):
        plugin("cuda", library)


def test_a_library_that_lists_no_device_is_said_with_what_there_is(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers(monkeypatch)
    with pytest.raises(RuntimeUnavailable, match="it is registered, and lists no device") as caught:
        check_provider(plugin("openvino", library))
    assert "CPUExecutionProvider on " in str(caught.value)


def test_a_device_is_picked_by_name_and_number(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, other = (
        device("AcmeExecutionProvider"),
        device("AcmeExecutionProvider", "NPU"),
        device("b"),
    )
    registered = registers(monkeypatch, first, second, other)
    assert plugin_providers.plugin_device(library, "acme", 0) is first
    assert plugin_providers.plugin_device(library, "acme", 1) is second
    assert registered == [library]  # once in a process
    with pytest.raises(
        OptionError, match=r"device=2: .* has acme \(AcmeExecutionProvider on Maker GPU\), acme"
    ):
        plugin_providers.plugin_device(library, "acme", 2)
    with pytest.raises(OptionError, match=r"provider acm: the library .* has acme"):
        plugin_providers.plugin_device(library, "acm", 0)


def test_a_session_runs_on_the_device(library: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's own CPU stands for a plugin's device."""
    (cpu, *_) = onnxruntime.get_ep_devices()
    registers(monkeypatch, cpu)
    provider = Provider("cpu", library=library)
    timed = benchmark({"net": models / "resnet20-fashion.onnx"}, provider=provider, runs=3, warm_up=0)[
        "net"
    ]
    assert timed.placement.nodes.keys() == {"CPUExecutionProvider"}
    assert timed.settings["library"] == "libplugin.so"


def test_the_command_says_it_before_the_work(
    library: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = str(models / "resnet20-fashion.onnx"), str(tmp_path / "o.onnx")
    how = ["--provider", "openvino", "--provider-options", f"library={library}"]
    assert main(["quantize", net, out, "--latency", *how]) == 1
    assert "onnxruntime cannot load it" in capsys.readouterr().err
    assert not Path(out).exists()


def test_the_plugin_of_openvino_runs_or_lists_no_device(models: Path) -> None:
    """The real one, where `onnxruntime-ep-openvino` is installed: it wants a processor of Intel."""
    package = Path(str(pytest.importorskip("onnxruntime_ep_openvino").__file__)).parent
    (library, *_) = sorted(package.glob("*onnxruntime_providers_openvino_plugin.so"))
    provider, net = plugin("openvino", str(library)), models / "resnet20-fashion.onnx"
    if any(device.ep_name.startswith("OpenVINO") for device in plugin_providers._devices(str(library))):
        timed = benchmark({"net": net}, provider=provider, runs=3, warm_up=0)["net"]
        assert "OpenVINOExecutionProvider" in timed.placement.nodes
    else:
        with pytest.raises(RuntimeUnavailable, match="it is registered, and lists no device"):
            check_provider(provider)
