"""Models that others wrote, as cases: onnx's backend tests and light models, files from anywhere.

    node, simple, pytorch-converted, pytorch-operator     a model, inputs and the outputs that are right
    light           nine ImageNet networks of 2016 to 2018, weights made by ConstantOfShape
    light, filled   the same with seeded random initializers, as after training: layers have weights
    files           .onnx files, and those inside wheels (which are zip files)

Does not handle: onnx's `real` suite, which downloads its weights.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnxcompress.model.model_like import input_specs
from onnxcompress.runtime.inference import random_feeds

Arrays = dict[str, Any]
BACKEND = ("node", "simple", "pytorch-converted", "pytorch-operator")
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
SIZES = (64, 48, 512, 576, 256, 2048)
"""Of dimensions that a file leaves open, tried in this order; the batch is 1."""
SPREAD = 1.0
"""Of the logarithm of a filled weight's channels."""


@dataclass(frozen=True)
class Case:
    """A model and something to run it on."""

    suite: str
    name: str
    model: onnx.ModelProto
    feeds: Arrays
    """Inputs by name; numpy arrays, and what onnx makes of sequences and optionals."""


@cache
def backend_tests(suite: str) -> list[Any]:
    """One of BACKEND as onnx has it; `node` takes seconds to make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model_tests(kind=suite)


def backend_cases(suite: str) -> Iterator[Case]:
    """The cases of one of BACKEND."""
    for case in backend_tests(suite):
        folder = Path(case.model_dir or "")
        model = case.model if case.model is not None else onnx.load(folder / "model.onnx")
        inputs = case.data_sets[0][0] if case.data_sets else _stored_inputs(folder, model)
        names = [info.name for info in model.graph.input]
        feeds = {name: as_value(value) for name, value in zip(names, inputs, strict=False)}
        yield Case(suite, case.name, model, {n: v for n, v in feeds.items() if v is not None})


def converted_cases(suite: str, opset: int = 21) -> Iterator[Case]:
    """Those of an old operator set that onnx's converter brings to a newer one."""
    for case in backend_cases(suite):
        try:
            model = onnx.version_converter.convert_version(case.model, opset)
            onnx.checker.check_model(model, full_check=True)
        except Exception:  # of C++, or of the checker: not every operator has an adapter
            continue
        yield Case(f"{suite}, opset {opset}", case.name, model, case.feeds)


def light_cases(*, filled: bool, only: Iterable[str] = ()) -> Iterator[Case]:
    """onnx's light models, as they are or with weights; `only` those of these names."""
    wanted = set(only)
    for path in sorted(LIGHT.glob("light_*.onnx")):
        if not wanted or path.stem.removeprefix("light_") in wanted:
            model = onnx.load(path)
            if filled:
                fill(model)
            suite = "light, filled" if filled else "light"
            yield Case(suite, path.stem, model, dict(random_feeds(model, batch=1)))


def file_cases(paths: Iterable[Path]) -> Iterator[Case]:
    """Models in files: .onnx, and each .onnx of a wheel."""
    for path in paths:
        if path.suffix == ".onnx":
            yield file_case(path.name, path.read_bytes())
        else:
            with zipfile.ZipFile(path) as archive:
                for name in sorted(n for n in archive.namelist() if n.endswith(".onnx")):
                    yield file_case(f"{path.stem.split('-')[0]}/{Path(name).name}", archive.read(name))


def file_case(name: str, data: bytes) -> Case:
    """A model with random inputs; what the first input leaves open is the first of SIZES that runs."""
    model = onnx.ModelProto.FromString(data)
    specs, feeds = input_specs(model), {}
    for size in SIZES:
        shapes = {}
        for spec in specs:
            openings = [1, *[size if spec is specs[0] else 1] * 9]
            pairs = zip(spec.shape or (), openings, strict=False)
            shapes[spec.name] = [d if isinstance(d, int) else opening for d, opening in pairs]
        feeds = dict(random_feeds(model, shapes=shapes))
        if in_runtime(model, feeds) is not None:
            break
    return Case("files", name, model, feeds)


def in_runtime(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any] | None:
    """The outputs in onnxruntime with graph optimizations off; None where it refuses model or inputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        providers = ["CPUExecutionProvider"]
        session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        return list(session.run(None, dict(feeds)))
    except Exception:  # onnxruntime's exceptions have no common base
        return None


def fill(model: onnx.ModelProto, seed: int = 0) -> None:
    """Put seeded initializers in the place of ConstantOfShape weights; IR 3 lists them as inputs, too.

    Weights keep the signal's size (He), their channels have ranges of their own; variances are positive.
    """
    rng = np.random.default_rng(seed)
    shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = [n for n in model.graph.node if n.op_type == "ConstantOfShape" and n.input[0] in shapes]
    roles = {name: at for n in model.graph.node if n.op_type == "BatchNormalization"
             for at, name in enumerate(n.input)}  # fmt: skip
    for node in made:
        name, shape = node.output[0], [int(d) for d in shapes[node.input[0]]]
        values = _filled(rng, shape, roles.get(name, 0)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
        if model.ir_version < 4:
            kind = onnx.TensorProto.FLOAT
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        model.graph.node.remove(node)
    gone = {n.input[0] for n in made} - {name for n in model.graph.node for name in n.input}
    kept = [t for t in model.graph.initializer if t.name not in gone]
    listed = [i for i in model.graph.input if i.name not in gone]
    del model.graph.initializer[:], model.graph.input[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(listed)


def as_value(value: Any) -> Any:
    """A feed as onnxruntime takes it; None for an optional that is empty."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return numpy_helper.to_list(value)
    if isinstance(value, onnx.OptionalProto):
        return numpy_helper.to_optional(value)
    return value


def _filled(rng: np.random.Generator, shape: list[int], role: int) -> np.ndarray:
    """`role`: which input of a BatchNormalization it is, 4 the variance; 0 for all else."""
    if role == 4:
        return rng.uniform(0.5, 2.0, shape)
    if len(shape) < 2:
        return rng.normal(0.5 if role == 1 else 0.0, 0.3, shape)
    fan_in = int(np.prod(shape[1:]))
    values = np.asarray(rng.standard_normal(shape, np.float32)) * np.sqrt(2 / fan_in)
    ranges = np.exp(SPREAD * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    return np.asarray(values * ranges)


def _stored_inputs(folder: Path, model: onnx.ModelProto) -> list[Any]:
    """The first data set of a case that lies in files."""
    found = []
    for at, info in enumerate(model.graph.input):
        file = folder / "test_data_set_0" / f"input_{at}.pb"
        if file.is_file():
            kind = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
            proto = kind.get(info.type.WhichOneof("value"), onnx.TensorProto)()
            proto.ParseFromString(file.read_bytes())
            found.append(proto)
    return found
