"""Decode the images of a folder; the few that cannot be read are left out, with a warning that names them.

Few: at most a tenth of those that are to be read, or ten where fewer than a hundred are drawn from a larger
folder. Images are drawn before they are read, so a broken one changes nothing in which others are drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from onnxcompress.data.decode import UnreadableImage, decode
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import CompressWarning, InputError, printable
from onnxcompress.formatting import counted
from onnxcompress.progress import Progress

DECODERS = 2
"""Number of threads that decode."""
FEW, SMALL_DRAW = 10, 100
"""One image in so many may be unreadable, and the number of images up to which a draw may have more."""
NAMED = 3
"""Number of unreadable files that a warning names."""


def read_files(
    folder: Path, files: Sequence[Path], total: int, preprocess: Preprocess, progress: Progress
) -> tuple[np.ndarray, list[int]]:
    """Decode images.

    Args:
        folder: The folder, for messages.
        files: The images to read.
        total: Number of images that the folder has.
        preprocess: Size, resizing and channels to convert to.
        progress: Called with the stage, the images read and the images in all.

    Returns:
        Pixels, (N, H, W, C) uint8, and for each image its index in `files`.

    Raises:
        InputError: Too many cannot be read, or their sizes differ.
    """
    decoded: list[np.ndarray | UnreadableImage] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(DECODERS) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for image in pool.map(lambda file: _attempt(file, preprocess), files):
            decoded.append(image)
            progress(f"reading {folder}", len(decoded), len(files))
    faults = {i: image for i, image in enumerate(decoded) if isinstance(image, UnreadableImage)}
    if faults:
        _leave_out(folder, files, faults, total)
    images = {i: image for i, image in enumerate(decoded) if isinstance(image, np.ndarray)}
    return _stacked(files, images, preprocess.channels), list(images)


def _attempt(file: Path, preprocess: Preprocess) -> np.ndarray | UnreadableImage:
    try:
        return decode(file, preprocess)
    except UnreadableImage as error:
        return error


def _leave_out(folder: Path, files: Sequence[Path], faults: dict[int, UnreadableImage], total: int) -> None:
    """Warn of the files that are left out. Raises InputError where they are too many."""
    if len(faults) > max(len(files), min(total, SMALL_DRAW)) // FEW or len(faults) == len(files):
        share = f" ({len(faults)} of {len(files)} cannot be read; up to a tenth would be left out)"
        raise InputError(f"{next(iter(faults.values()))}{share if len(files) > 1 else ''}")
    names = [f"{files[i].relative_to(folder).as_posix()} ({error.reason})" for i, error in faults.items()]
    named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    left = f"{counted(len(faults), 'unreadable image')} left out of {len(files)} that were to be read"
    warnings.warn(printable(f"{folder}: {left}: {named}"), CompressWarning, stacklevel=2)


def _stacked(files: Sequence[Path], images: dict[int, np.ndarray], channels: int | None) -> np.ndarray:
    """Put images of one size into one array. Raises InputError where their sizes differ."""
    start = next(iter(images))
    first = images[start].shape[:2]
    for i, image in images.items():
        if image.shape[:2] != first:
            raise InputError(
                f"{files[i]}: {image.shape[0]}x{image.shape[1]} (height x width), {files[start].name} is "
                f"{first[0]}x{first[1]}; give size= in --preprocess to make them alike"
            )
    x = np.empty((len(images), *first, channels or max(i.shape[2] for i in images.values())), np.uint8)
    for index, image in enumerate(images.values()):  # a gray image among colour ones: its channel repeated
        x[index] = image
    return x
