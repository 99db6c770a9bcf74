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
They come in the type of the network's input. Where that takes no pictures (sequences, volumes, other
channels than 1 or 3), inputs are drawn instead of procedural images (`inputs.drawn`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxcompress.account import InputSource
from onnxcompress.data.image_set import ImageSet, check_fits, image_count, image_size, load_images
from onnxcompress.data.input_shapes import USUAL, named, parse_input_shapes, sized
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.preprocessing_choice import choose
from onnxcompress.errors import OptionError
from onnxcompress.model import Model
from onnxcompress.model.model_like import InputSpec, input_specs
from onnxcompress.optimize.synthesis.drawn_inputs import DrawnSet, Samples
from onnxcompress.optimize.synthesis.synthetic_inputs import (
    MADE_UP,
    best_kind,
    image_input,
    need_statistics,
    picture_geometry,
    synthetic_images,
)
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.inference import usual_size

if TYPE_CHECKING:
    from torch import Tensor

SOURCES = ("auto", "images", "distilled", "procedural", "layerwise")
SYNTHETIC = 500
"""Images that are made unless a number is given."""
SMALL_PIXELS = 64 * 64
"""Height times width up to which an image is a small one."""
SHOWN = 128
"""Images that a pass's result carries, at most."""


@dataclass(frozen=True)
class InputRequest:
    """What a user asks for. Fields are options of the same names."""

    images: str | None = None
    preprocess: str | None = None
    count: int | None = None
    """Of the real images; None: all."""
    inputs: str = "auto"
    synthetic: int = SYNTHETIC
    """Images to make."""
    seed: int = 0
    why: str = "asked for"
    """Why `inputs` is what it is: the account says it. No option."""
    input_shape: str | None = None

    @property
    def expected(self) -> int:
        """Number of inputs that this will give, as far as it is known before any is read.

        Raises:
            InputError: There are no images where `images` says.
        """
        real = 0 if self.images is None else image_count(self.images)
        if self.count is not None:
            real = min(real, self.count)
        return real + (0 if real and self.inputs in ("auto", "images") else self.synthetic)

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
        parse_input_shapes(self.input_shape)
        for name in ("count", "synthetic"):  # a request may come from elsewhere than checked options
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name} {value}: expected 1 or more")


@dataclass(frozen=True)
class Inputs:
    """What a pass learns from."""

    images: Samples
    """Of all sources, in their order."""
    sources: tuple[InputSource, ...]
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
        return all(used.source not in MADE_UP for used in self.sources)

    def shares(self) -> Tensor | None:
        """Compute how often to draw each image so that all sources come alike.

        Returns:
            Shares relative to each other, (N,); None where there is but one source.
        """
        import torch

        counts = [used.count for used in self.sources]
        return None if len(counts) == 1 else torch.cat([torch.full((n,), 1 / n) for n in counts])

    @property
    def shown(self) -> ImageSet | None:
        """Some of all sources, for a report; None where they are no pictures."""
        return self.images.spread(SHOWN) if isinstance(self.images, ImageSet) else None


def gather_inputs(
    model: Model,
    request: InputRequest,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    announce: Callable[[int], None] | None = None,
) -> Inputs:
    """Load and make the inputs that are asked for.

    Args:
        model: The network, with one input; sizes that it leaves open get a value (`assume_sizes`).
        request: What the user asks for.
        device: Where images are distilled.
        progress: Called with the stage, the steps done and the steps in all.
        announce: Called with the number of all inputs as soon as real ones are read and fit the network,
            before others are made.

    Returns:
        The inputs, with their sources.

    Raises:
        OptionError: The request contradicts itself.
        InputError: Images cannot be used.
        ModelError: The network takes no images, or the source needs statistics that the file has not.
    """
    request.check()
    if not model.assumed:
        assume_sizes(model, request)
    spec = image_input(model)
    choice = choose(request.preprocess, model.metadata, model.name, spec.dtype)
    kind, why = request.inputs, request.why
    sources: list[InputSource] = []
    found: list[Samples] = []
    if request.images is not None:
        real = load_images(
            request.images,
            preprocess=_brought_to(choice.preprocess, request, spec),
            count=request.count,
            seed=request.seed,
            progress=progress,
        )
        check_fits(real, spec.shape, spec.name)
        found.append(replace(real, dtype=spec.dtype))
        sources.append(InputSource("images", len(real), request.seed, request.images))
        kind = "images" if kind == "auto" else kind
    if kind == "auto":
        kind, why = best_kind(model)
        why = f"no --images; {why}"
    if kind == "layerwise":
        need_statistics(model, kind)
    automatic = kind == "distilled" and request.inputs == "auto"
    if automatic and picture_geometry(model, spec, choice.explicit) is None:
        kind, why = "procedural", "no --images, and the input takes no pictures to be distilled"
    if announce is not None:
        announce(sum(used.count for used in sources) + (request.synthetic if kind != "images" else 0))
    if kind != "images":
        how = found[0].preprocess if found and isinstance(found[0], ImageSet) else choice.explicit
        found.append(
            synthetic_images(
                model, kind, request.synthetic, how, request.seed, device=device, progress=progress
            )
        )
        drawn = kind == "procedural" and isinstance(found[-1], DrawnSet)
        sources.append(InputSource("drawn" if drawn else kind, request.synthetic, request.seed, why))
    told = [
        replace(used, preprocess=str(images.preprocess), preprocess_from=choice.source)
        if isinstance(images, ImageSet)
        else replace(used, preprocess_from="")
        for used, images in zip(sources, found, strict=True)
    ]
    return Inputs(joined(found), tuple(told), kind == "layerwise")


def assume_sizes(model: Model, request: InputRequest) -> None:
    """Give the sizes that the file leaves open their value for all that looks at the model from now on.

    The rule is that of `input_shapes`. The graph, and what is written of it, keep open sizes.

    Args:
        model: The network.
        request: What the user asks for.

    Raises:
        OptionError: The request contradicts the file.
    """
    model.assume({})
    specs = input_specs(model)
    given = named(parse_input_shapes(request.input_shape), specs, model.name)
    said = choose(request.preprocess, model.metadata, model.name).explicit
    size = said.size if said is not None else None
    if size is None and request.images is not None:
        size = image_size(request.images)
    sizes = {}
    for spec in specs:
        if spec.read and (spec.shape is not None or spec.name in given):
            own = given.get(spec.name)
            guess = USUAL[0] if own or size else usual_size(model, spec)
            sizes[spec.name] = sized(spec, own, model.name, size=size, metadata=model.metadata, guess=guess)
    files = {spec.name: spec.shape for spec in specs}
    model.assume({name: shape for name, shape in sizes.items() if shape != files[name]})


def joined(sets: Sequence[Samples]) -> Samples:
    """Join sets of images to one, without labels.

    Args:
        sets: The sets.

    Returns:
        All images; the first set where there is one set, or they are no pictures.

    Raises:
        ModelError: Sizes differ.
    """
    first, pictures = sets[0], [s for s in sets if isinstance(s, ImageSet)]
    if len(sets) == 1 or not isinstance(first, ImageSet):
        return first
    x = np.concatenate([s.x for s in pictures])
    return replace(first, x=x, y=None, names=tuple(n for s in pictures for n in s.names))


def _brought_to(how: Preprocess, request: InputRequest, spec: InputSpec) -> Preprocess:
    """With the size that --input-shape says, where nothing else says one for real images."""
    shape = spec.shape or ()
    sides = [d for d in (shape[2:] if how.layout == "nchw" else shape[1:3]) if isinstance(d, int)]
    if request.input_shape is None or how.size is not None or len(shape) != 4 or len(sides) != 2:
        return how
    return replace(how, size=(sides[0], sides[1]))


def quick(request: InputRequest, model: Model) -> InputRequest:
    """Take layer-wise inputs for `auto` where distilled images would take longer than all the rest.

    Args:
        request: What the user asks for.
        model: The network.

    Returns:
        The request, changed or as it is.
    """
    if request.inputs == "auto" and request.images is None and best_kind(model)[0] == "distilled":
        why = "no --images; the file has statistics of its BatchNorms, and these inputs are made at once"
        return replace(request, inputs="layerwise", why=why)
    return request
