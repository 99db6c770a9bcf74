"""Recipes: what is wrong is said with its line before anything runs; what is shipped runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from ruamel.yaml import YAML

from onnxcompress.cli.main import main
from onnxcompress.errors import CompressError, OptionError
from onnxcompress.evaluation.gates import Gates
from onnxcompress.model import load
from onnxcompress.passes import load_pass
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.pipeline.recipe import Recipe, pass_names, read_recipe, write_recipe
from onnxcompress.pipeline.recipe_schema import recipe_schema
from onnxcompress.runtime.session import cuda_devices

DROP = "passes:\n- fold-bn\n- drop-blocks:\n    "


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"r.yaml:1: passes: expected a list of passes"),
        ("- fold-bn", r"r.yaml:1: expected a mapping"),
        ("passes: fold-bn", r"r.yaml:1: passes: expected a list"),
        ("passes: []", r"expected a list"),
        ("pases: [fold-bn]", r"r.yaml:1: no such section: 'pases'; did you mean 'passes'"),
        ("passes:\n- fold-bn\n- fold-nb", r"r.yaml:3: no such pass: 'fold-nb'; did you mean 'fold-bn'"),
        ("passes:\n- 3", r"r.yaml:2: expected one pass, with its options or without, got 3"),
        ("passes:\n- {fold-bn: {}, equalize: {}}", r"r.yaml:2: expected one pass"),
        (DROP + "blokcs: 2", r"r.yaml:4: no such option of drop-blocks: 'blokcs'; did you mean 'blocks'"),
        (DROP + "latency-reduction: 2", r"did you mean 'latency_reduction'"),
        (DROP + "steps: 3\n    blocks: two", r"r.yaml:5: blocks: expected a valid integer, got \"two\""),
        (DROP + "blocks: '2'", r"blocks: expected a valid integer, got \"2\""),
        (DROP + "blocks: true", r"blocks: expected a valid integer, got true"),
        (DROP + "blocks: 2.5", r"blocks: expected a valid integer"),
        (DROP + "inputs: pictures", r"inputs: expected 'auto', 'images', .* got \"pictures\""),
        (DROP + "drop: [a, 1]", r"drop: expected a valid string"),
        (DROP + "images: [a]", r"images: expected a valid string, got \[\"a\"\]"),
        (DROP + "images: ${pictures}", r"r.yaml:4: \$\{pictures\} has no value; give it with -D pictures="),
        ("passes: [fold-bn]\ngates: {max_drp: 1}", r"r.yaml:2: no such gate: .* did you mean 'max_drop'"),
        ("passes: [fold-bn]\npasses: [fold-bn]", r"r.yaml:2: not valid YAML \(found duplicate key"),
        ("passes: [fold-bn", r"not valid YAML"),
        ("passes: [fold-bn]\nvariables: 3", r"r.yaml:2: expected a mapping"),
        ("passes: !!python/object/apply:os.abort []", r"r.yaml:1: .* type 'python/object/apply:os.abort'"),
        ("a: !include b", r"type '!include' is not read"),
        ("passes:\n- &x fold-bn\n- *x", r"r.yaml:2: anchors"),
        ("passes: [2024-01-01]", r"'timestamp' is not read; quote it"),
        ("[" * 1000, r"nested too deep"),
        ("\0", r"not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        read_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ("{}", "give one target", 2),
        ("{blocks: 1, drop: [a], images: .}", "give one target", 2),
        (
            "{blocks: 1, images: nowhere.npz}",
            "pass 2 of 2, drop-blocks: --images .*nowhere.npz: no such",
            1,
        ),
        ("{blocks: 1, images: ., preprocess: imagenett}", "imagenet", 2),
        ("{blocks: 1, images: .}", "pass 2 of 2, drop-blocks: .*: no images; expected files of", 1),
        ("{blocks: 1, provider: tensorrt}", "provider tensorrt", 1),
    ],
)
def test_nothing_runs_before_all_is_checked(
    options: str, message: str, code: int, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "tensorrt" in options and cuda_devices():
        pytest.skip("a GPU is there")
    recipe = write(tmp_path, f"passes:\n- fold-bn\n- drop-blocks: {options}")
    out, kept = tmp_path / "o.onnx", tmp_path / "cache"
    command = ["run", str(recipe), str(models / "resnet20-fashion.onnx"), str(out), "--cache", str(kept)]
    assert main(command) == code
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()
    assert list(kept.iterdir()) == []


def test_variables_have_defaults_types_and_folders(tmp_path: Path) -> None:
    text = """
variables: {images: a.npz, blocks: 3, rate: 5e-3, no: no}
passes:
- drop-blocks:
    images: ${images}
    blocks: ${blocks}
    learning_rate: ${rate}
    scores: ${dir}/s-${blocks}.json
    feature: $${images} ${no}
    drop: ${drop}
"""
    recipe = write(tmp_path, text)
    (one,) = read_recipe(recipe, {"dir": "here", "drop": "b.1, b.2"}).passes
    assert isinstance(one, DropBlocks)
    assert (one.images, one.blocks, one.learning_rate) == (str(tmp_path / "a.npz"), 3, 0.005)
    assert (one.scores, one.drop, one.feature) == ("here/s-3.json", ("b.1", "b.2"), "${images} no")
    given = {"dir": "/", "drop": "", "images": "b.npz", "blocks": "12"}
    (other,) = read_recipe(recipe, given).passes
    assert isinstance(other, DropBlocks)
    assert (other.images, other.blocks, other.drop) == ("b.npz", 12, ())
    with pytest.raises(OptionError, match=r'blocks: expected a valid integer, got "many"'):
        read_recipe(recipe, given | {"blocks": "many"})
    with pytest.raises(OptionError, match="no such variable: 'block'; did you mean 'blocks'"):
        read_recipe(recipe, given | {"block": "1"})
    text = text.replace("no: no", "no: '${blocks}'")
    with pytest.raises(OptionError, match=r"r.yaml:2: no: a default cannot use a variable"):
        read_recipe(write(tmp_path, text), given)


def test_what_is_written_reads_back_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drop = DropBlocks(images="data/x.npz", blocks=2, drop=("a", "1"), learning_rate=1e-7, feature="${f}: #")
    recipe = Recipe(
        (FoldBatchNorm(), drop, Equalize(clip="per-channel")), Gates(max_size=5, images="/v.npz")
    )
    (tmp_path / "recipes").mkdir()
    file = tmp_path / "recipes" / "r.yaml"
    file.write_text(write_recipe(recipe, "recipes"), encoding="utf-8")
    assert "images: ../data/x.npz" in file.read_text()
    assert "steps" not in file.read_text()
    assert read_recipe("recipes/r.yaml") == recipe


def test_a_variable_without_quotes_in_a_flow_mapping_is_told(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("passes:\n- drop-blocks: {blocks: ${n}}\n")
    with pytest.raises(
        OptionError, match=r"r.yaml:2: not valid YAML .*; within { } a variable wants quotes"
    ):
        read_recipe(file, {"n": "1"})


def test_an_option_goes_by_its_other_name_too(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    read = []
    for name in ("for", "for_runtime"):
        file.write_text(f"passes:\n- quantize: {{{name}: tensorrt}}\n")
        jsonschema.validate(
            YAML(typ="safe").load(file.read_text()), json.loads(json.dumps(recipe_schema()))
        )
        read.append(read_recipe(file).passes)
    assert read[0] == read[1] != (load_pass("quantize")(),)


def test_the_published_schema_is_that_of_the_passes(models: Path) -> None:
    """If not: onnxcompress run --schema > models/recipe.schema.json"""
    assert json.loads((models / "recipe.schema.json").read_text()) == json.loads(
        json.dumps(recipe_schema())
    )
    for recipe in models.glob("*.yaml"):
        assert recipe.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_the_schema_accepts_and_refuses_what_the_reader_does(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(recipe_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    for file in models.glob("*.yaml"):
        assert check(YAML(typ="safe").load(file))
    step = schema["properties"]["passes"]["items"]["anyOf"][1]["properties"]["drop-blocks"]["anyOf"][0]
    assert "percent" in step["properties"]["latency_reduction"]["description"]
    assert check(
        {"passes": ["fold-bn", {"drop-blocks": {"blocks": "${n}", "drop": ["a"]}}, {"equalize": None}]}
    )
    for wrong in ("fold-nb", {"drop-blocks": {"blokcs": 1}}, {"drop-blocks": {"blocks": "2"}}, {}):
        assert not check({"passes": [wrong]})
    assert not check({"passes": ["fold-bn"], "gates": {"max_drop": "much"}})


def test_options_that_name_files_say_so() -> None:
    """Else their paths would be taken from the wrong folder, and their contents not looked at."""
    for name in pass_names():
        for field in dataclasses.fields(load_pass(name)):
            named = field.metadata["metavar"] in ("DIR|NPZ", "ONNX", "JSON", "FILE", "NPZ", "DIR")
            assert named == (field.metadata["file"] is not None), f"{name}: {field.name}"


SMALL = {
    "fast-resnet20.yaml": {"steps": "2", "blocks": "1"},
    "fast-resnet20-data-free.yaml": {"steps": "2", "synthetic": "8"},
    "compress-resnet20.yaml": {"steps": "2", "blocks": "1"},
}


def test_each_shipped_recipe_is_run_below(models: Path) -> None:
    assert {file.name for file in models.glob("*.yaml")} == SMALL.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("quick_clock")
def test_a_shipped_recipe_runs(
    name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = np.load(models / "fashion-tiny.npz")
    np.savez(tmp_path / "few.npz", x=archive["x"][:8])
    variables = SMALL[name] | ({} if "data-free" in name else {"images": str(tmp_path / "few.npz")})
    given = [word for item in variables.items() for word in ("-D", "=".join(item))]
    out = tmp_path / "fast.onnx"
    command = [
        "run",
        str(models / name),
        str(models / "resnet20-fashion.onnx"),
        str(out),
        *given,
        "--no-cache",
    ]
    assert main([*command, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    passes = [one.name for one in read_recipe(models / name).passes]
    assert [step["pass"] for step in account["steps"]] == passes
    assert all(step["changes"] and not step["cached"] for step in account["steps"])
    assert [entry["pass"] for entry in load(out).provenance()] == passes
    assert account["bytes"] == {
        "before": os.path.getsize(models / "resnet20-fashion.onnx"),
        "after": out.stat().st_size,
    }
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_dry_run_says_what_would_be_done_and_does_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--cache", str(tmp_path / "cache")]
    source, out = str(models / "resnet20-fashion.onnx"), tmp_path / "o.onnx"
    recipe = write(tmp_path, "passes: [fold-bn]\ngates: {max_size: 2}")
    assert main(["run", str(recipe), source, str(tmp_path / "first.onnx"), *kept, "--quiet"]) == 0
    command = ["run", str(models / "fast-resnet20.yaml"), source, str(out), *kept, "--dry-run"]
    assert main([*command, "-D", "blocks=3", "--max-size", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1. fold-bn  (kept from an earlier run)" in shown
    assert "2. drop-blocks --images" in shown
    assert "--blocks 3" in shown
    assert "gate --max-size 1" in shown
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [step["cached"] for step in plan["steps"]] == [True, False]
    assert not out.exists()


def test_a_recipe_that_is_no_text(tmp_path: Path, models: Path) -> None:
    for path, message in (
        (tmp_path / "none.yaml", "No such file"),
        (models / "fashion-tiny.npz", "no UTF-8"),
    ):
        with pytest.raises(CompressError, match=message):
            read_recipe(path)
