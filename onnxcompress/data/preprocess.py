"""Turn uint8 pixels into a network's input, as a text describes: `imagenet`, or `mean=0.5 std=0.5`.

x = (pixels / scale - mean) / std, after resizing and cropping; `scale` is 255 unless given.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from onnxcompress.errors import OptionError

PREPROCESSING = "preprocessing"
"""Key of metadata_props whose value is a text that `Preprocess.parse` reads."""
CROP_SHARE = 0.875
"""Side of the crop relative to the image's short side, without `resize` (ImageNet: 224 of 256)."""


@dataclass(frozen=True)
class Preprocess:
    """Resizing and normalization that turn images into the network's input.

    Without `size` images keep their size. With it, a larger image is scaled so that the crop is 0.875 of
    its short side, then cropped at the centre; a smaller image is an error. `resize` overrides this: it is
    the short side in pixels (which may also scale up), "stretch" (scale straight to `size`) or "none"
    (only crop).
    """

    mean: tuple[float, ...] = (0.0,)
    """A value for each channel, or one for all, in units of pixels / scale."""
    std: tuple[float, ...] = (1.0,)
    """As `mean`."""
    size: tuple[int, int] | None = None
    """Height and width of the network's input."""
    resize: int | str | None = None
    layout: str = "nchw"
    """Order of dimensions, "nchw" or "nhwc"."""
    channels: int | None = None
    """1 or 3: convert to gray or RGB. None: keep the images' channels."""
    order: str = "rgb"
    """Order of channels, "rgb" or "bgr"."""
    scale: float = 255.0
    filter: str = "bilinear"
    """Filter of the resizing, "bilinear" or "bicubic"."""

    @staticmethod
    def parse(text: str, base: Preprocess | None = None) -> Preprocess:
        """Read a preset, `key=value` pairs, or a preset and pairs that change it.

        Args:
            text: The text of --preprocess or of the metadata.
            base: What pairs without a preset change; None: `unit`.

        Returns:
            The preprocessing.

        Raises:
            OptionError: Something in the text is unknown; the message suggests the nearest known name.
        """
        values = base or PRESETS["unit"]
        if "size=" in text and "resize=" not in text:  # a short side holds only for its own crop
            values = replace(values, resize=None)
        for index, word in enumerate(text.split()):
            key, equals, value = word.partition("=")
            if equals:
                values = replace(values, **{key: _value(key, value)})
            elif index == 0:
                values = _preset(word)
            else:
                raise OptionError(f"preprocess: {word!r} is no key=value; a preset comes first")
        short = values.resize if isinstance(values.resize, int) and "resize=" not in text else None
        if short is not None and values.size is not None and short < max(values.size):
            values = replace(values, resize=None)  # the preset's short side is that of its own crop
        _check(values)
        return values

    def __str__(self) -> str:
        """Return a text that `parse` reads back to the same value."""
        parts = [f"mean={_commas(self.mean)}", f"std={_commas(self.std)}"]
        if self.size is not None:
            parts.append(f"size={self.size[0]}x{self.size[1]}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("mean", "std", "size") and value != f.default:
                parts.append(f"{f.name}={value:.15g}" if f.name == "scale" else f"{f.name}={value}")
        return " ".join(parts)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Normalize pixels.

        Args:
            pixels: Pixels, (N, H, W, C) uint8.

        Returns:
            The network's input, float32, (N, C, H, W) or (N, H, W, C).
        """
        std = np.asarray(self.std, np.float64)
        factor = (1 / (self.scale * std)).astype(np.float32)
        offset = (np.asarray(self.mean, np.float64) / std).astype(np.float32)
        x = pixels[..., ::-1] if self.order == "bgr" else pixels
        x = x.astype(np.float32) * factor - offset
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if self.layout == "nchw" else x)

    def shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        """Return the shape of one normalized image.

        Args:
            height: Height in pixels.
            width: Width in pixels.
            channels: 1 or 3.

        Returns:
            (C, H, W) or (H, W, C).
        """
        return (channels, height, width) if self.layout == "nchw" else (height, width, channels)


PRESETS = {
    "unit": Preprocess(),
    "raw": Preprocess(scale=1.0),
    "imagenet": Preprocess(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(224, 224), resize=256
    ),
    "imagenet-inception": Preprocess(mean=(0.5,), std=(0.5,), size=(224, 224), resize=256),
    "cifar10": Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=(32, 32)),
    "fashion-mnist": Preprocess(mean=(0.2860,), std=(0.3530,), size=(28, 28)),
}
"""`unit`: pixels / 255; `raw`: pixels from 0 to 255; the others by the name of their data set."""


_CHOICES = {"layout": ("nchw", "nhwc"), "order": ("rgb", "bgr"), "filter": ("bilinear", "bicubic")}


def _preset(name: str) -> Preprocess:
    if name not in PRESETS:
        raise OptionError(f"preprocess: no preset {name!r}; {_nearest(name, list(PRESETS))}")
    return PRESETS[name]


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _value(key: str, text: str) -> Any:
    known = [f.name for f in fields(Preprocess)]
    if key not in known:
        raise OptionError(f"preprocess: unknown key {key!r}; {_nearest(key, known)}")
    try:
        return _convert(key, text.strip().lower())
    except ValueError:
        expected = {
            "mean": "numbers such as 0.485,0.456,0.406",
            "std": "numbers such as 0.229,0.224,0.225",
            "size": "pixels, such as 224 or 224x192, or none",
            "resize": "pixels of the short side, stretch or none",
            "channels": "1 or 3",
            "scale": "a number such as 255",
        }.get(key, " or ".join(_CHOICES.get(key, ())))
        raise OptionError(f"preprocess: {key}={text!r}; expected {expected}") from None


def _convert(key: str, text: str) -> Any:
    if key in ("mean", "std"):
        return tuple(float(v) for v in text.split(","))
    if key == "size":
        if text == "none":
            return None
        sides = [int(v) for v in text.split("x")]
        if len(sides) > 2:
            raise ValueError
        return (sides[0], sides[-1])
    if key == "resize":
        return text if text in ("stretch", "none") else int(text)
    if key == "channels":
        return int(text)
    if key == "scale":
        return float(text)
    if text not in _CHOICES[key]:
        raise ValueError
    return text


def _check(values: Preprocess) -> None:
    wrong = None
    if not all(math.isfinite(v) for v in (*values.mean, *values.std, values.scale)):
        wrong = "mean, std and scale must be finite"
    elif min(values.std) <= 0 or values.scale <= 0:
        wrong = f"std {_commas(values.std)} and scale {values.scale:g} must be more than 0"
    elif max(values.mean) > 255 / values.scale:
        wrong = (
            f"mean={_commas(values.mean)} is above the lightest pixel, 255 / scale = {255 / values.scale:g}"
        )
        wrong += "; add scale=1 if mean and std are of pixels from 0 to 255"
    elif values.channels not in (None, 1, 3):
        wrong = f"channels={values.channels}; expected 1 or 3"
    elif values.size is not None and min(values.size) < 1:
        wrong = f"size={values.size[0]}x{values.size[1]}; expected 1 or more"
    elif values.resize is not None and values.size is None:
        wrong = f"resize={values.resize} needs a size to crop to; add size="
    elif isinstance(values.resize, int) and values.size and values.resize < max(values.size):
        wrong = f"resize={values.resize} is below size {max(values.size)}; the crop must fit"
    lengths = {len(v) for v in (values.mean, values.std)} - {1}
    if len(lengths) > 1 or not lengths <= {3}:
        wrong = f"mean has {len(values.mean)} values, std {len(values.std)}; expected 1 or 3 each"
    elif lengths and values.channels == 1:
        wrong = "mean and std have 3 values, but channels=1; give one value each"
    if wrong is not None:
        raise OptionError(f"preprocess: {wrong}")


def _commas(values: tuple[float, ...]) -> str:
    return ",".join(f"{v:.15g}" for v in values)
