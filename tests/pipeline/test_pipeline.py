"""Chains in Python, passes of other packages, and what a cache may and may not give back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest

from onnxcompress.account import Change, Figures
from onnxcompress.cli.main import main
from onnxcompress.errors import InputError, OptionError, RuntimeUnavailable
from onnxcompress.evaluation.equivalence import difference
from onnxcompress.model import Model, load, save
from onnxcompress.option_fields import option
from onnxcompress.passes import load_pass, plugins
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.base import run as run_passes
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.equalize.equalize import EqualizeFigures
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.proto import apply_to_proto
from onnxcompress.pipeline import Pipeline
from onnxcompress.pipeline.cache import Cache
from onnxcompress.pipeline.cache_keys import step_key
from onnxcompress.pipeline.pipeline import PipelineFigures
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.inference import random_feeds
from tests.helpers.brief import COMMAND
from tests.helpers.results import figures_of

NET = "resnet20-fashion.onnx"


@dataclass(frozen=True)
class MarkFigures(Figures):
    """What `mark` wrote."""

    length: int
    """Characters."""


@dataclass(frozen=True)
class Mark(Pass):
    """Write a text into the metadata, and count how often that was done."""

    name: ClassVar[str] = "mark"
    figures: ClassVar[type[Figures]] = MarkFigures
    calls: ClassVar[list[str]] = []

    text: str = option("", "What to write.")
    file: str | None = option(None, "Whose content to write.", file="read")
    memory: str | None = option(None, "Written if it is new.", file="kept")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[MarkFigures | None]:
        self.calls.append(self.text)
        text = self.text + (Path(self.file).read_text() if self.file else "")
        if self.memory is not None and not Path(self.memory).exists():
            Path(self.memory).write_text(text)
        if model.metadata.get("mark") == text:
            return PassResult()
        model.set_metadata("mark", text)
        return PassResult([Change("model", "marked")], measured=MarkFigures(len(text)))


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    Mark.calls.clear()


@pytest.fixture
def net(models: Path) -> Model:
    return load(models / NET)


@pytest.mark.slow
def test_a_pipeline_is_what_its_passes_are_one_by_one(net: Model, tmp_path: Path) -> None:
    chain = Pipeline([Pipeline([FoldBatchNorm()]), Equalize()])
    assert chain == Pipeline([FoldBatchNorm(), Equalize()])
    before = net.digest()
    run = chain.run(net)
    assert net.digest() == before
    assert [step.pass_.name for step in run.steps] == ["fold-bn", "equalize"]
    one_by_one = net.copy()
    for one in (FoldBatchNorm(), Equalize()):
        run_passes([one], one_by_one)
    as_a_pass = net.copy()
    (result,) = run_passes([chain], as_a_pass)
    assert run.model.digest() == one_by_one.digest() == as_a_pass.digest()
    assert [entry["pass"] for entry in as_a_pass.provenance()] == ["fold-bn", "equalize"]
    assert len(result.changes) == sum(len(step.result.changes) for step in run.steps)
    figures = figures_of(result, PipelineFigures)
    assert figures.passes == ("fold-bn", "equalize")
    assert figures.measured == tuple(step.result.measured for step in run.steps)
    assert figures_of(run.steps[1].result, EqualizeFigures).converged


def test_a_pipeline_goes_through_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chain = Pipeline([FoldBatchNorm(), DropBlocks(images="x.npz", drop=("a", "b"))])
    Path("r.yaml").write_text(chain.to_recipe())
    assert Pipeline.from_recipe("r.yaml") == chain


def test_what_cannot_work_is_said_before_the_first_pass(net: Model) -> None:
    with pytest.raises(InputError, match="pass 2 of 2, mark: --file nowhere: no such file"):
        Pipeline([Mark("a"), Mark(file="nowhere")]).run(net)
    with pytest.raises(OptionError, match="give one target"):
        Pipeline([Mark("a"), DropBlocks()]).run(net)
    assert Mark.calls == []


def test_a_pass_that_fails_is_named_and_those_before_it_are_kept(net: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    chain = Pipeline([Mark("a"), DropBlocks(blocks=99)])
    with pytest.raises(OptionError, match=r"^pass 2 of 2, drop-blocks: --blocks 99: the network has 9"):
        chain.run(net, cache=cache)
    assert chain.cached(net, cache) == 1


def test_a_pass_on_a_proto_leaves_the_proto(models: Path) -> None:
    proto = onnx.load(models / NET)
    before = proto.SerializeToString(deterministic=True)
    folded, result = apply_to_proto(FoldBatchNorm(), proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert result.modified
    assert not [n for n in folded.graph.node if n.op_type == "BatchNormalization"]
    onnx.checker.check_model(folded, full_check=True)
    again, result = apply_to_proto(FoldBatchNorm(), folded)
    assert not result.modified
    assert again.SerializeToString(deterministic=True) == folded.SerializeToString(deterministic=True)


def test_a_pass_among_those_of_onnx_ir(models: Path, tmp_path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    from onnxcompress.integrations.onnx_ir import IrPass

    proto = onnx.load(models / NET)
    onnx.save(proto, tmp_path / "out.onnx", save_as_external_data=True, location="out.data")
    expected, _ = apply_to_proto(FoldBatchNorm(), onnx.load(models / NET))
    for source in (models / NET, tmp_path / "out.onnx"):
        model = ir.load(source)
        kinds = [type(v.const_value) for v in model.graph.initializers.values()]
        found = ir.passes.Sequential(IrPass(FoldBatchNorm()), IrPass(FoldBatchNorm()))(model)
        assert found.modified
        assert [type(v.const_value) for v in model.graph.initializers.values()] == kinds
        got = {t.name: onnx.numpy_helper.to_array(t) for t in ir.to_proto(found.model).graph.initializer}
        for tensor in expected.graph.initializer:
            np.testing.assert_array_equal(got[tensor.name], onnx.numpy_helper.to_array(tensor))


@pytest.mark.parametrize("name", ["resnet20-fashion.onnx", "mobilenetv2-fashion.onnx"])
def test_a_chain_between_passes_of_onnx_irs_own(name: str, models: Path) -> None:
    """The network computes what the chain alone makes of it, and keeps its record."""
    ir = pytest.importorskip("onnx_ir")
    from onnx_ir.passes import common

    from onnxcompress.integrations.onnx_ir import IrPass

    chain = Pipeline([FoldBatchNorm(), Equalize()])
    around = ir.passes.Sequential(
        common.IdentityEliminationPass(),
        IrPass(chain),
        common.RemoveUnusedNodesPass(),
        common.CheckerPass(),
    )
    found = ir.to_proto(around(ir.load(models / name)).model)
    alone = chain.run(load(models / name)).model
    gap = difference(alone, found, random_feeds(alone))
    assert gap.max_rel < 1e-6
    theirs, ours = ({p.key: p.value for p in m.metadata_props} for m in (found, alone.to_proto()))
    assert theirs["onnxcompress.statistics"] == ours["onnxcompress.statistics"]
    with pytest.raises(ir.passes.PassError, match=r"IrPass\(mark\)"):
        ir.passes.Sequential(IrPass(Mark(file="nowhere")))(ir.load(models / name))


def test_only_what_changed_is_done_again(net: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = Pipeline([Mark("a"), Mark("b"), Mark("c")]).run(net, cache=cache)
    again = Pipeline([Mark("a"), Mark("b"), Mark("c")]).run(net, cache=cache)
    assert Mark.calls == ["a", "b", "c"]
    assert [step.cached for step in again.steps] == [True] * 3
    assert again.model.digest() == first.model.digest()
    assert [dataclasses.asdict(s.result) for s in again.steps] == [
        dataclasses.asdict(s.result) for s in first.steps
    ]
    edited = Pipeline([Mark("a"), Mark("x"), Mark("c")])
    assert edited.cached(net, cache) == 1
    mixed = edited.run(net, cache=cache)
    assert Mark.calls == ["a", "b", "c", "x", "c"]
    fresh = edited.run(net)
    save(mixed.model, tmp_path / "mixed.onnx")
    save(fresh.model, tmp_path / "fresh.onnx")
    assert (tmp_path / "mixed.onnx").read_bytes() == (tmp_path / "fresh.onnx").read_bytes()
    net.set_metadata("other", "model")
    assert edited.cached(net, cache) == 0


def test_content_of_files_counts_and_not_their_names(net: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    (tmp_path / "a").write_text("one")
    Pipeline([Mark(file=str(tmp_path / "a"))]).run(net, cache=cache)
    shutil.copy(tmp_path / "a", tmp_path / "b")
    assert Pipeline([Mark(file=str(tmp_path / "b"))]).run(net, cache=cache).steps[0].cached
    (tmp_path / "a").write_text("two")
    assert not Pipeline([Mark(file=str(tmp_path / "a"))]).run(net, cache=cache).steps[0].cached
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    keys = set()
    for name, text in (("x", "1"), ("x", "2"), ("in/x", "1")):
        (folder / name).write_text(text)
        keys.add(step_key("", Mark(file=str(folder))))
    assert len(keys) == 3


def test_a_file_that_a_pass_writes_does_not_make_it_run_again(net: Model, tmp_path: Path) -> None:
    cache, memory = Cache(tmp_path / "cache"), tmp_path / "memory"
    chain = Pipeline([Mark("a", memory=str(memory))])
    assert [chain.run(net, cache=cache).steps[0].cached for _ in range(2)] == [False, True]
    memory.unlink()
    assert not chain.run(net, cache=cache).steps[0].cached
    assert memory.exists()


def test_external_weights_are_part_of_the_key(models: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    proto = onnx.load(models / NET)
    onnx.save(proto, tmp_path / "n.onnx", save_as_external_data=True, location="n.data", size_threshold=0)
    chain = Pipeline([FoldBatchNorm(), Mark("a")])
    first = chain.run(load(tmp_path / "n.onnx"), cache=cache)
    save(first.model, tmp_path / "first.onnx")
    again = chain.run(load(tmp_path / "n.onnx"), cache=cache)
    assert [step.cached for step in again.steps] == [True, True]
    save(again.model, tmp_path / "again.onnx")
    assert (tmp_path / "first.onnx.data").read_bytes() == (tmp_path / "again.onnx.data").read_bytes()
    data = bytearray((tmp_path / "n.data").read_bytes())
    data[4] ^= 1
    (tmp_path / "n.data").write_bytes(data)
    assert chain.cached(load(tmp_path / "n.onnx"), cache) == 0


def test_an_entry_that_is_not_whole_is_not_used(net: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    chain = Pipeline([Mark("a")])
    chain.run(net, cache=cache)
    (entry,) = cache.folder.iterdir()
    for file in sorted(entry.iterdir()):
        whole = file.read_bytes()
        for broken in (whole[: len(whole) // 2], whole[:-3] + b"zzz"):
            file.write_bytes(broken)
            assert not chain.run(net, cache=cache).steps[0].cached
            assert chain.run(net, cache=cache).steps[0].cached
    shutil.rmtree(entry)
    assert not chain.run(net, cache=cache).steps[0].cached


def test_a_cache_keeps_to_its_limit_and_cleans_up(net: Model, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=2_500_000)  # two copies of the network
    stale = cache.folder / ".unfinished-x"
    stale.mkdir()
    os.utime(stale, (0, 0))
    for number, text in enumerate("abc"):
        Pipeline([Mark(text)]).run(net, cache=cache)
        for age, folder in enumerate(sorted(cache.folder.iterdir(), key=lambda f: f.stat().st_mtime)):
            os.utime(folder, (1000 * number + age, 1000 * number + age))
    assert not stale.exists()
    assert [Pipeline([Mark(text)]).cached(net, cache) for text in "abc"] == [0, 1, 1]


def test_a_cache_that_cannot_be_written_costs_no_result(
    net: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "rename", full)
    run = Pipeline([Mark("a"), Mark("b")]).run(net, cache=cache)
    assert run.model.metadata["mark"] == "b"
    assert list(cache.folder.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="--cache"):
        Cache(tmp_path / "file")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
def test_killed_in_the_middle_it_resumes(models: Path, tmp_path: Path) -> None:
    archive = np.load(models / "fashion-tiny.npz")
    np.savez(tmp_path / "few.npz", x=archive["x"][:8])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "variables: {steps: 2}\npasses:\n- fold-bn\n- equalize\n"
        "- drop-blocks: {images: few.npz, drop: [blocks.1], steps: '${steps}', batch: 8}\n"
    )
    out, kept = tmp_path / "o.onnx", ["--cache", str(tmp_path / "cache")]
    command = ["run", str(recipe), str(models / NET), str(out), *kept]
    killed = subprocess.Popen(
        [*COMMAND, *command, "-D", "steps=1000000"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert killed.stderr is not None
    for line in killed.stderr:  # the plain progress: behind refitting comes fine-tuning
        if "drop-blocks: refitting" in line:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    chain = Pipeline.from_recipe(recipe)
    cache = Cache(tmp_path / "cache")
    assert chain.cached(load(models / NET), cache) == 2
    assert main([*command, "--quiet"]) == 0
    assert chain.cached(load(models / NET), cache) == 3
    assert main(["run", str(recipe), str(models / NET), str(tmp_path / "p.onnx"), "--no-cache", "-q"]) == 0
    assert out.read_bytes() == (tmp_path / "p.onnx").read_bytes()


THEIRS = '''
from dataclasses import dataclass, field
from typing import ClassVar
from onnxcompress.passes import Change, Figures, Pass, PassResult, option, silent

@dataclass(frozen=True)
class SignFigures(Figures):
    """The figures of `sign`."""
    letters: int
    shares: tuple[float, float] | None
    before: str | None = None

@dataclass(frozen=True)
class Sign(Pass):
    """Sign a model.

    Example: onnxcompress sign in.onnx out.onnx
    """
    name: ClassVar[str] = "sign"
    figures: ClassVar[type[Figures]] = SignFigures
    by: str = option("me", "Whose sign.")

    def apply(self, model, progress=silent):
        if model.metadata.get("sign") == self.by:
            return PassResult()
        before = model.metadata.get("sign")
        model.set_metadata("sign", self.by)
        figures = SignFigures(len(self.by), (0.5, 1.0), before)
        return PassResult([Change("model", "signed")], measured=figures)

@dataclass(frozen=True)
class Stamp(Pass):
    """Stamp a model.

    Example: onnxcompress stamp in.onnx out.onnx --text x
    """
    name: ClassVar[str] = "stamp"
    text: str
    dates: tuple[str, ...] = field(default_factory=lambda: ("a", "b"))

    def apply(self, model, progress=silent):
        model.set_metadata("stamp", " ".join([self.text, *self.dates]))
        return PassResult([Change("model", "stamped")])
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on the path that has a pass, one of another name, one that fails, and one of ours."""
    site = tmp_path / "site"
    about = site / "signing-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "signing.py").write_text(THEIRS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: signing\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[onnxcompress.passes]\nsign = signing:Sign\nstamp = signing:Stamp\nsing = signing:Sign\n"
        "broken = nowhere:Pass\nfold-bn = signing:Sign\n"
    )
    monkeypatch.syspath_prepend(str(site))
    plugins.plugins.cache_clear()
    plugins._entries.cache_clear()
    yield site
    sys.modules.pop("signing", None)
    plugins.plugins.cache_clear()
    plugins._entries.cache_clear()


def test_a_pass_of_another_package(
    plugin: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    assert "From the package signing." in capsys.readouterr().out
    assert "signing" not in sys.modules
    assert load_pass("fold-bn") is FoldBatchNorm
    for name, message in (("sing", "not a Pass of that name"), ("broken", "cannot be imported")):
        with pytest.raises(RuntimeUnavailable, match=message):
            load_pass(name)
    with pytest.raises(KeyError):
        load_pass("nothing")
    assert main(["sign", str(models / NET), str(tmp_path / "a.onnx"), "--by", "you", "-q"]) == 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [{sign: {by: you}}]")
    assert main(["run", str(recipe), str(models / NET), str(tmp_path / "b.onnx"), "-q", "--no-cache"]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert load(tmp_path / "a.onnx").metadata["sign"] == "you"
    command = ["run", str(recipe), str(models / NET), str(tmp_path / "b.onnx")]
    for cached in (False, True):
        capsys.readouterr()
        assert main([*command, "--json", "--cache", str(tmp_path / "cache")]) == 0
        (step,) = json.loads(capsys.readouterr().out)["steps"]
        assert step["cached"] == cached
        assert step["measured"] == {"letters": 3, "shares": [0.5, 1.0]}


@pytest.mark.usefixtures("plugin")
def test_an_option_without_a_default_must_be_given(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, files = tmp_path / "r.yaml", [str(models / NET), str(tmp_path / "o.onnx")]
    assert main(["stamp", *files]) == 2
    assert "Missing option '--text'" in capsys.readouterr().err
    for text in ("passes: [stamp]", "passes: [stamp: {dates: [c]}]"):
        recipe.write_text(text)
        assert main(["run", str(recipe), *files]) == 2
        said = capsys.readouterr().err
        assert said == f"error: {recipe}:1: stamp: give option 'text', which has no default\n"
    assert main(["stamp", *files, "--text", "x", "-q"]) == 0
    assert load(tmp_path / "o.onnx").metadata["stamp"] == "x a b"
    recipe.write_text("passes: [stamp: {text: x, dates: [c]}]")
    assert main(["run", str(recipe), *files, "-q", "--no-cache"]) == 0
    assert load(tmp_path / "o.onnx").metadata["stamp"] == "x c"


def test_the_command_line_starts_without_what_recipes_need() -> None:
    code = (
        "import sys; from onnxcompress.cli.main import main; main(['--help'])\n"
        "sys.exit(' '.join({'pydantic', 'ruamel', 'numpy', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert "Chain passes" in done.stdout
