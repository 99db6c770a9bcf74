"""Providers and their options: what is refused, what onnxruntime is given, and how commands spell them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import OptionError, RuntimeUnavailable
from onnxcompress.evaluation.gates import Gates
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.pipeline import Pipeline
from onnxcompress.pipeline.recipe import read_recipe
from onnxcompress.runtime.providers import Provider, ProviderOptions, full_name
from onnxcompress.runtime.session import check_provider, cuda_devices, pick_provider, session

NO_GPU = pytest.mark.skipif(cuda_devices() > 0, reason="there is a GPU")


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("cud", [], "did you mean 'cuda'"),
        ("openvin", [], "did you mean 'openvino'"),
        ("cuda", ["tf3=on"], "has no option 'tf3'; did you mean 'tf32'"),
        ("cuda", ["tf32"], "expected NAME=VALUE"),
        ("cuda", ["tf32=maybe"], "expected on or off"),
        ("cuda", ["cudnn_search=slow"], "expected exhaustive, heuristic, default"),
        ("cuda", ["device=-1"], "expected a whole number"),
        ("cuda", ["memory=0"], "expected a whole number"),
        ("cuda", ["fp16=on"], "has no option 'fp16'; it takes device, tf32"),
        ("tensorrt", ["tf32=off"], "has no option 'tf32'; it takes device, cuda_graph, fp16"),
        ("cpu", ["tf32=off"], "it takes none"),
    ],
)
def test_what_is_refused(name: str, texts: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Provider.of(name, texts)


def test_onnxruntime_gets_its_own_names() -> None:
    texts = ["device=1", "tf32=off", "cudnn-search=heuristic", "cuda_graph=on", "memory=4096"]
    assert Provider.of("cuda", texts).for_onnxruntime() == [
        (
            "CUDAExecutionProvider",
            {
                "device_id": "1",
                "use_tf32": "0",
                "cudnn_conv_algo_search": "HEURISTIC",
                "prefer_nhwc": "0",
                "enable_cuda_graph": "1",
                "gpu_mem_limit": str(4 << 30),
            },
        ),
        ("CPUExecutionProvider", {}),
    ]


def test_tensorrt_keeps_engines_and_timings_in_a_folder_and_leaves_the_rest_to_cuda(tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    found = Provider.of("tensorrt", [f"cache={folder}", "fp16=on", "workspace=256", "device=2"])
    names = [name for name, _ in found.for_onnxruntime()]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    raw = found.for_onnxruntime()[0][1]
    assert raw["trt_engine_cache_path"] == raw["trt_timing_cache_path"] == str(folder)
    assert raw["trt_engine_cache_enable"] == raw["trt_timing_cache_enable"] == raw["trt_fp16_enable"] == "1"
    assert raw["trt_max_workspace_size"] == str(256 << 20)
    assert found.for_onnxruntime()[1][1]["device_id"] == raw["device_id"] == "2"


def test_every_option_name_is_one_that_the_shipped_libraries_know() -> None:
    """No GPU is needed to see whether onnxruntime's own libraries hold these names."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    texts = {"cuda": ["memory=1"], "tensorrt": ["cache=x", "workspace=1"]}
    for name, own in texts.items():
        files = list(folder.glob(f"*onnxruntime_providers_{name}.*"))
        if not files:
            pytest.skip("this onnxruntime was built without CUDA and TensorRT")
        held = files[0].read_bytes()
        for key in Provider.of(name, own).for_onnxruntime()[0][1]:
            assert key.encode() in held, key


def test_a_provider_without_options_of_its_own_gets_what_is_said() -> None:
    found = Provider.of("openvino", ["device_type=GPU"]).for_onnxruntime()
    assert found[0] == ("OpenVINOExecutionProvider", {"device_type": "GPU"})


def test_every_provider_of_onnxruntime_has_a_short_name() -> None:
    for name in onnxruntime.get_available_providers():
        assert full_name(name.removesuffix("ExecutionProvider").lower()) == name


def test_settings_say_tf32_and_what_is_not_the_default() -> None:
    assert Provider("cuda").text == "cuda (tf32 on)"
    found = Provider("cuda", ProviderOptions(tf32=False, device=1))
    assert found.settings == {"tf32": False, "device": 1}
    assert found.text == "cuda (tf32 off, device 1)"
    assert Provider("cpu").text == "cpu"


@NO_GPU
@pytest.mark.parametrize(
    ("name", "remedy"), [("cuda", "onnxruntime-gpu"), ("tensorrt", "tensorrt"), ("openvino", "-openvino")]
)
def test_what_is_missing_is_one_line_with_its_remedy(name: str, remedy: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=f"pip install .*{remedy}") as caught:
        check_provider(name)
    assert "\n" not in str(caught.value)


def test_a_cache_where_no_folder_can_be_is_said(tmp_path: Path) -> None:
    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without TensorRT")
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="no folder can be made there"):
        check_provider(Provider.of("tensorrt", [f"cache={tmp_path / 'file' / 'engines'}"]))


@NO_GPU
def test_auto_takes_cudas_options_and_leaves_them_where_there_is_no_gpu() -> None:
    assert pick_provider(Provider.of("auto", ["tf32=off"])) == Provider("cpu")


@pytest.mark.parametrize("command", ["benchmark", "evaluate", "compare", "drop-blocks", "run", "fold-bn"])
def test_one_spelling_for_every_command(
    command: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, images = str(models / "resnet20-fashion.onnx"), str(models / "fashion-tiny.npz")
    recipe, out = tmp_path / "r.yaml", str(tmp_path / "o.onnx")
    recipe.write_text("passes: [fold-bn]")
    arguments = {
        "benchmark": [net, "--provider", "cuda", "--provider-options", "tf31=off"],
        "evaluate": [net, "--images", images, "--provider", "cuda", "--provider-options", "tf31=off"],
        "compare": [net, net, "--provider", "cuda", "--provider-options", "tf31=off"],
        "drop-blocks": [net, out, "--blocks", "1", "--provider", "cuda", "--provider-options", "tf31=off"],
        "run": [str(recipe), net, out, "--provider", "cuda", "--provider-options", "tf31=off"],
        "fold-bn": [net, out, "--provider", "cuda", "--provider-options", "tf31=off"],
    }
    assert main([command, *arguments[command]]) == 2
    assert "did you mean 'tf32'" in capsys.readouterr().err


def test_a_recipe_has_them_too(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    step = "drop-blocks: {blocks: 1, provider: cuda, provider_options: [tf32=off, device=1]}"
    file.write_text(
        f"passes: [{step}]\ngates: {{max_latency: 1, provider: cuda, provider_options: [nhwc=on]}}"
    )
    read = read_recipe(file)
    (one,) = read.passes
    assert isinstance(one, DropBlocks)
    assert one.runs_on == Provider("cuda", ProviderOptions(tf32=False, device=1))
    assert read.gates.runs_on.options.nhwc
    (tmp_path / "again.yaml").write_text(Pipeline(read.passes).to_recipe())
    assert read_recipe(tmp_path / "again.yaml").passes == read.passes


def test_gates_refuse_options_before_anything_runs() -> None:
    with pytest.raises(OptionError, match="no option 'fp16'"):
        Gates(max_latency=1, provider="cuda", provider_options=("fp16=on",)).check()


def test_providers_load_without_onnxruntime() -> None:
    code = "import sys; import onnxcompress.evaluation.gates; assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_says_how_it_ran(models: Path, quick_clock: None, capsys: pytest.CaptureFixture[str]) -> None:
    net = str(models / "mobilenetv2-fashion.onnx")
    assert main(["benchmark", net, "--provider", "cpu", "--runs", "3", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["models"][0]
    assert (found["provider"], found["settings"], found["clocks"]) == ("cpu", {}, None)


@pytest.mark.gpu
@pytest.mark.skipif(cuda_devices() == 0, reason="there is no GPU")
@pytest.mark.parametrize("text", ["tf32=off", "cudnn_search=heuristic", "nhwc=on", "memory=2048"])
def test_each_option_of_cuda_starts(text: str, models: Path) -> None:
    opened = session(models / "resnet20-fashion.onnx", provider=Provider.of("cuda", [text]))
    assert opened.get_providers()[0] == "CUDAExecutionProvider"
