"""Lay out the first images of a set side by side in one PNG, to be looked at.

Small images are enlarged by a whole factor with nearest neighbours, so that their pixels are visible.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from onnxcompress.model.tensor_storage import write_files

LIMIT = 100
"""Largest number of images on a sheet."""
GAP = 2
"""White pixels between images and around them."""
LEGIBLE = 96
"""Images are enlarged up to this length of their longer side, in pixels."""
WIDEST = 4096
"""Largest side of a sheet in pixels; larger sheets are reduced, so that they can be viewed on a screen."""


def write_contact_sheet(path: str | os.PathLike[str], images: np.ndarray, limit: int = LIMIT) -> None:
    """Write a contact sheet as a PNG, completely or not at all.

    Args:
        path: The PNG.
        images: Pixels, (N, H, W, C) uint8 with C = 1 or 3.
        limit: Largest number of images on the sheet.

    Raises:
        ModelError: The file cannot be written.
    """
    sheet = contact_sheet(images, limit)
    write_files([(Path(path), lambda file: sheet.save(file, "PNG"))])


def contact_sheet(images: np.ndarray, limit: int = LIMIT) -> Image.Image:
    """Lay out images in a grid that is about as wide as it is high.

    Args:
        images: Pixels, (N, H, W, C) uint8 with C = 1 or 3.
        limit: Largest number of images on the sheet.

    Returns:
        The sheet.
    """
    shown = _legible(images[:limit])
    count, height, width, channels = shown.shape
    columns = min(count, round(float(np.ceil(np.sqrt(count * height / width)))))
    rows = -(-count // columns)
    sheet = np.full((GAP + rows * (height + GAP), GAP + columns * (width + GAP), channels), 255, np.uint8)
    for index, pixels in enumerate(shown):
        row, column = divmod(index, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        sheet[top : top + height, left : left + width] = pixels
    image = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    image.thumbnail((WIDEST, WIDEST), Image.Resampling.BOX)
    return image


def _legible(images: np.ndarray) -> np.ndarray:
    factor = max(1, LEGIBLE // max(images.shape[1:3]))
    return np.repeat(np.repeat(images, factor, 1), factor, 2)
