"""A contact sheet: the first images of a set side by side in one PNG, to be looked at.

Nearest-neighbour enlargement by a whole factor, so that what is seen is the pixels themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from onnxcompress.model.tensor_storage import write_files

LIMIT = 100
"""Images on a sheet, at most."""
GAP = 2
"""White pixels between images and around them."""
LEGIBLE = 96
"""Images are enlarged as long as their longer side stays within this."""
WIDEST = 4096
"""Of a sheet, in pixels; larger images are reduced, for a sheet is looked at on a screen."""


def write_contact_sheet(path: str | os.PathLike[str], images: np.ndarray, limit: int = LIMIT) -> None:
    """Write the first `limit` images (uint8 N,H,W,C, C = 1 or 3) as a PNG, whole or not at all.

    Raises ModelError where the file cannot be written.
    """
    sheet = contact_sheet(images, limit)
    write_files([(Path(path), lambda file: sheet.save(file, "PNG"))])


def contact_sheet(images: np.ndarray, limit: int = LIMIT) -> Image.Image:
    """The grid, about as wide as it is high."""
    shown = _legible(images[:limit])
    count, height, width, channels = shown.shape
    columns = min(count, round(float(np.ceil(np.sqrt(count * height / width)))))
    rows = -(-count // columns)
    sheet = np.full((GAP + rows * (height + GAP), GAP + columns * (width + GAP), channels), 255, np.uint8)
    for index, image in enumerate(shown):
        row, column = divmod(index, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    made = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    made.thumbnail((WIDEST, WIDEST), Image.Resampling.BOX)
    return made


def _legible(images: np.ndarray) -> np.ndarray:
    factor = max(1, LEGIBLE // max(images.shape[1:3]))
    return np.repeat(np.repeat(images, factor, 1), factor, 2)
