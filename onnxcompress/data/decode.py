"""Decode an image file, convert its channels, resize and crop it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from onnxcompress.data.preprocess import CROP_SHARE, Preprocess
from onnxcompress.errors import InputError, one_line


class UnreadableImage(InputError):
    """A file that is no image, is broken, or holds pixels that are not handled."""

    def __init__(self, file: Path, reason: object) -> None:
        super().__init__(f"{file}: {reason}; remove or replace it")
        self.reason = str(reason)


_GRAY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")


def decode(file: Path, preprocess: Preprocess) -> np.ndarray:
    """Decode an image file, and fit it to the network's input.

    Args:
        file: The image.
        preprocess: Size, resizing and channels to convert to.

    Returns:
        Pixels, (H, W, C) uint8.

    Raises:
        UnreadableImage: The file is no 8-bit image, or is broken.
        InputError: The image cannot be brought to the size.
    """
    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                raise Image.DecompressionBombError(f"{opened.width}x{opened.height} pixels")
            return fit(_converted(opened, file, preprocess.channels), preprocess, str(file))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(file, f"too large to be an honest image ({error})") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(file, "not an image") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's decoders raise all three
        why = getattr(error, "strerror", None) or one_line(error)
        raise UnreadableImage(file, f"broken image: {why}") from error


def _converted(image: Image.Image, file: Path, channels: int | None) -> Image.Image:
    if image.mode not in (*_GRAY, *_COLOUR):
        raise UnreadableImage(file, f"pixels of mode {image.mode}; expected 8-bit gray or colour")
    gray = image.mode in _GRAY if channels is None else channels == 1
    return image.convert("L" if gray else "RGB")


def fit(image: Image.Image, preprocess: Preprocess, name: str) -> np.ndarray:
    """Resize and crop an image to the network's input.

    Args:
        image: The image, gray or RGB.
        preprocess: Size and resizing.
        name: Name of the image in messages.

    Returns:
        Pixels, (H, W, C) uint8.

    Raises:
        InputError: The image is smaller than the size, and scaling up is not asked for.
    """
    size = preprocess.size
    if size is not None and (image.height, image.width) != size:
        image = _cropped(image, size, preprocess, name)
    pixels = np.asarray(image, np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _cropped(image: Image.Image, size: tuple[int, int], preprocess: Preprocess, name: str) -> Image.Image:
    height, width = size
    resize = preprocess.resize
    kind = Image.Resampling.BICUBIC if preprocess.filter == "bicubic" else Image.Resampling.BILINEAR
    if resize == "stretch":
        return image.resize((width, height), kind)
    if not isinstance(resize, int) and (image.height < height or image.width < width):
        raise InputError(
            f"{name}: {image.height}x{image.width} (height x width), smaller than size "
            f"{height}x{width}; correct size=, or add resize={round(max(size) / CROP_SHARE)} to scale up"
        )
    if resize != "none":
        short = resize if isinstance(resize, int) else round(max(size) / CROP_SHARE)
        share = short / min(image.height, image.width)
        if isinstance(resize, int) or share < 1:
            scaled = (max(width, int(image.width * share)), max(height, int(image.height * share)))
            image = image.resize(scaled, kind)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
