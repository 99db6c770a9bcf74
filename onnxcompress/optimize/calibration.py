"""Where a learning pass gets its inputs from: one request, several sources, an account of what was used.

    InputRequest --gather_inputs(model, .)--> Inputs(images, sources)

| source     | needs                             | gives                                                |
|------------|-----------------------------------|------------------------------------------------------|
| images     | a folder or an .npz               | real images                                          |
| distilled  | BatchNorms or recorded statistics | images that match them (`synthesis.distillation`)    |
| procedural | nothing                           | dead leaves (`data.dead_leaves`)                     |
| layerwise  | BatchNorms or recorded statistics | procedural images, and each layer behind brought     |
|            |                                   | to its statistics (`synthesis.statistics_alignment`) |

Images of any source are uint8 pixels and a Preprocess, so whatever takes one takes all; real ones may stand
beside synthetic ones. `auto` takes real images if there are any, else distilled, else procedural ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcompress.data.image_set import ImageSet, check_fits, load_images
from onnxcompress.data.preprocess import Preprocess, choose
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.model import Model
from onnxcompress.option_fields import option
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.cores import thread_count
from onnxcompress.statistics.record import known_statistics

if TYPE_CHECKING:
    from torch import Tensor

SOURCES = ("auto", "images", "distilled", "procedural", "layerwise")
SYNTHETIC = 500
"""Images that are made unless a number is given."""
MOST_WORKERS = 8
"""Threads that draw procedural images."""
FEW_MADE, MANY_MADE = 128, 512
"""Images that a pass makes whose work grows with their size: of large ones, and of small ones."""
SMALL_PIXELS = 64 * 64
"""Height times width up to which an image is a small one."""
MOST_PIXELS = 1 << 26
"""Of an image that is made."""
SHOWN = 128
"""Images that a pass's result carries, at most."""
STANDARDIZED = Preprocess(mean=(0.45,), std=(0.25,))
"""Where nobody says how images are normalized: procedural images get mean 0 and deviation 1, roughly."""


@dataclass(frozen=True)
class InputRequest:
    """What a user asks for. Fields are options of the same names."""

    images: str | None = None
    preprocess: str | None = None
    count: int | None = None
    """Of the real images; None: all."""
    inputs: str = "auto"
    synthetic: int = SYNTHETIC
    """Images, or samples of a layer, to make."""
    seed: int = 0
    why: str = "asked for"
    """Why `inputs` is what it is: the account says it. No option."""

    def check(self) -> None:
        """Raises OptionError for what contradicts itself."""
        if self.inputs not in SOURCES:
            raise OptionError(f"--inputs {self.inputs!r}: expected one of {', '.join(SOURCES)}")
        if self.inputs == "images" and self.images is None:
            raise OptionError("--inputs images: name them with --images, a folder or an .npz")
        if self.inputs == "layerwise" and self.images is not None:
            raise OptionError("--inputs layerwise uses no images; leave --images out, or --inputs")
        if self.count is not None and self.images is None:
            raise OptionError(
                "--count: how many of --images to use; --synthetic counts those that are made"
            )
        if self.preprocess is not None:
            Preprocess.parse(self.preprocess)
        for name in ("count", "synthetic"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name} {value}: expected 1 or more")


@dataclass(frozen=True)
class Used:
    """One source that inputs came from."""

    source: str
    count: int
    seed: int
    why: str
    preprocess: str = ""
    """As `Preprocess` writes it."""
    preprocess_from: str = "option"
    """option, model (its metadata), or default; empty where they are no images."""


@dataclass(frozen=True)
class Inputs:
    """What a pass learns from."""

    images: ImageSet
    """Of all sources, in their order."""
    sources: tuple[Used, ...]
    layerwise: bool = False
    """Whether each layer is to be brought to its recorded statistics."""

    @property
    def real(self) -> bool:
        """Whether all are real images."""
        return all(used.source == "images" for used in self.sources)

    @property
    def real_count(self) -> int:
        """Real images; they come first."""
        return sum(used.count for used in self.sources if used.source == "images")

    @property
    def may_use_record(self) -> bool:
        """Whether recorded statistics may shape more inputs: not where procedural images were asked for."""
        return all(used.source != "procedural" for used in self.sources)

    def shares(self) -> Tensor | None:
        """(N,), how often to draw each image so that all sources come alike; None: there is but one."""
        import torch

        counts = [used.count for used in self.sources]
        return None if len(counts) == 1 else torch.cat([torch.full((n,), 1 / n) for n in counts])

    @property
    def shown(self) -> ImageSet:
        """Some of all sources, for a report."""
        return self.images.spread(SHOWN)


def images_option() -> Any:
    return option(None, "Folder of images or an .npz; labels are not used.", metavar="DIR|NPZ", file="read")


def preprocess_option() -> Any:
    return option(
        None,
        "imagenet, cifar10, …, or 'mean=… std=… size=… layout=…', on pixels/255; default: what the model's "
        "metadata has under `preprocessing`, else unit for --images, standardized for made ones.",
        metavar="TEXT",
    )


def count_option() -> Any:
    return option(None, "Use this many of --images, drawn with the seed.")


def inputs_option() -> Any:
    return option(
        "auto",
        "What to learn from; auto: --images if given, else distilled if the file has BatchNorm or a record "
        "of it, else procedural. With --images and distilled or procedural: both.",
    )


def synthetic_option() -> Any:
    return option(SYNTHETIC, "Images (or samples of a layer) to make.")


def gather_inputs(
    model: Model, request: InputRequest, *, device: str = "cpu", progress: Progress = silent
) -> Inputs:
    """Load and make the inputs that are asked for.

    Raises OptionError for a contradictory request, InputError for unusable images, ModelError where the
    network takes no images, or the source needs statistics that the file has not.
    """
    request.check()
    name, shape = image_input(model)
    choice = choose(request.preprocess, model.metadata, model.name)
    kind, why = request.inputs, request.why
    sources: list[Used] = []
    found: list[ImageSet] = []
    if request.images is not None:
        real = load_images(
            request.images,
            preprocess=choice.preprocess,
            count=request.count,
            seed=request.seed,
            progress=progress,
        )
        check_fits(real, shape, name)
        found.append(real)
        sources.append(Used("images", len(real), request.seed, request.images))
        kind = "images" if kind == "auto" else kind
    if kind == "auto":
        kind, why = best_kind(model)
        why = f"no --images; {why}"
    if kind == "layerwise":
        _need_statistics(model, kind)
    if kind != "images":
        how = found[0].preprocess if found else choice.said
        found.append(
            synthetic_images(
                model, kind, request.synthetic, how, request.seed, device=device, progress=progress
            )
        )
        sources.append(Used(kind, request.synthetic, request.seed, why))
    told = [
        replace(used, preprocess=str(images.preprocess), preprocess_from=choice.source)
        for used, images in zip(sources, found, strict=True)
    ]
    return Inputs(joined(found), tuple(told), kind == "layerwise")


def best_kind(model: Model) -> tuple[str, str]:
    """The best source of images that this file allows, and why."""
    known = known_statistics(model)
    real = [s for s in known.values() if "procedural" not in s.source]
    if real:
        return "distilled", f"the file knows the statistics of {len(real)} tensors"
    if known:
        return "procedural", "the file's statistics were themselves taken of procedural images"
    return "procedural", "the file has neither BatchNorm nor recorded statistics"


def synthetic_images(
    model: Model,
    kind: str,
    count: int,
    preprocess: Preprocess | None,
    seed: int,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> ImageSet:
    """Make `count` images of a kind, `distilled` or `procedural`, in the size that the network takes.

    preprocess: None: images come out with mean 0 and deviation 1, roughly. Raises ModelError where the
    network takes no images of a fixed size, or has no statistics to distil from.
    """
    from onnxcompress.data.dead_leaves import procedural_images

    if kind == "distilled":
        _need_statistics(model, kind)
    name, shape = image_input(model)
    height, width, channels, layout = _geometry(model, name, shape, preprocess)
    chosen = replace(preprocess or STANDARDIZED, layout=layout)
    workers = min(MOST_WORKERS, thread_count())
    x = procedural_images(count, height, width, channels, seed, progress, workers)
    made = ImageSet(x, None, tuple(f"{kind}[{i}]" for i in range(count)), chosen)
    check_fits(made, shape, name)
    if kind != "distilled":
        return made
    from onnxcompress.optimize.synthesis.distillation import distill

    return distill(model, made, seed=seed, device=device, progress=progress)


def image_input(model: Model) -> tuple[str, tuple[int | str | None, ...]]:
    """Name and shape of the network's one input. Raises ModelError where it takes no images."""
    inputs = list(model.graph.inputs)
    if len(inputs) != 1:
        names = ", ".join(t.name for t in inputs)
        raise ModelError(f"{model.name}: one image input expected, it has {len(inputs)} ({names})")
    return str(inputs[0].name), tuple(inputs[0].shape or ())


def joined(sets: list[ImageSet]) -> ImageSet:
    """All images in one set, without labels. Raises ModelError where sizes differ."""
    first = sets[0]
    if len(sets) == 1:
        return first
    x = np.concatenate([s.x for s in sets])
    return ImageSet(x, None, tuple(n for s in sets for n in s.names), first.preprocess)


def _geometry(
    model: Model, name: str, shape: tuple[int | str | None, ...], preprocess: Preprocess | None
) -> tuple[int, int, int, str]:
    """Height, width, channels and layout of the images that the input takes."""
    dims = [d if isinstance(d, int) else None for d in shape[1:]]
    if len(dims) == 3:
        layout = preprocess.layout if preprocess else "nchw" if dims[0] in (1, 3) else "nhwc"
        channels, height, width = dims if layout == "nchw" else (dims[2], *dims[:2])
        if preprocess is not None and preprocess.size is not None:
            height, width = height or preprocess.size[0], width or preprocess.size[1]
        if height and width and height * width <= MOST_PIXELS and channels in (1, 3):
            return height, width, channels, layout
    text = "x".join("?" if d is None else str(d) for d in dims)
    raise ModelError(
        f"{model.name}: no images can be made for input {name!r} ({text}): it needs 1 or 3 channels and a "
        "fixed size, not absurdly large; fix the size in the file, or give size= in --preprocess"
    )


def _need_statistics(model: Model, kind: str) -> None:
    if not known_statistics(model):
        raise ModelError(
            f"{model.name}: making {kind} inputs needs BatchNorm or recorded statistics, the file has "
            "neither; export with BatchNorm kept (onnxcompress.export), estimate them (onnxcompress "
            "calibrate), or take procedural ones"
        )


def quick(request: InputRequest, model: Model) -> InputRequest:
    """What `auto` means where distilled images would take longer than all the rest: layer-wise ones."""
    if request.inputs == "auto" and request.images is None and best_kind(model)[0] == "distilled":
        why = "no --images; the file has statistics of its BatchNorms, and these inputs are made at once"
        return replace(request, inputs="layerwise", why=why)
    return request
