"""Real images: a folder of files or an .npz, kept as uint8 and normalized batch by batch.

A folder is read recursively in sorted order; labels are the names of its first level of folders: class
indices where all are numbers, else their sorted order. An .npz has `x` or `images` (N,H,W,C or N,H,W) and
may have `y` or `labels` (N). EXIF orientation is ignored, as in ImageNet's evaluation; an alpha channel is
dropped. The few files that cannot be read are left out (`folder_reading`).
Does not handle: 16-bit and floating-point image files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onnxcompress.data.decode import UnreadableImage, decode, fit
from onnxcompress.data.image_files import (
    NO_LABELS,
    as_pixels,
    folder_labels,
    image_files,
    image_source,
    is_folder,
    npz_length,
    read_npz,
    warn_of_unread,
)
from onnxcompress.data.input_shapes import check_layout
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import CompressError, InputError, OptionError
from onnxcompress.progress import Progress, silent

FLOAT: np.dtype[Any] = np.dtype(np.float32)


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and how to normalize them."""

    x: np.ndarray
    """Pixels, uint8, (N, H, W, C) with C = 1 or 3, already resized and cropped."""
    y: np.ndarray | None
    """int64 class indices, or None where there are no labels."""
    names: tuple[str, ...]
    preprocess: Preprocess
    dtype: np.dtype[Any] = FLOAT
    """Element type of the network's input."""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image as the network takes it: (C, H, W) or (H, W, C)."""
        height, width, channels = self.x.shape[1:]
        return self.preprocess.shape(height, width, channels)

    def array(self) -> np.ndarray:
        """Normalize all images.

        Returns:
            The images as the network takes them, (N, C, H, W) or (N, H, W, C).
        """
        return self.normalized(slice(None))

    def normalized(self, part: slice) -> np.ndarray:
        """Normalize some of the images.

        Args:
            part: Their indices.

        Returns:
            The images as the network takes them, (N, C, H, W) or (N, H, W, C).
        """
        return as_type(self.preprocess.normalize(self.x[part]), self.dtype)

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """Normalize the images batch by batch, in order.

        Args:
            batch: Images per batch; the last batch may be smaller.

        Yields:
            The batches as the network takes them.
        """
        for start in range(0, len(self), batch):
            yield self.normalized(slice(start, start + batch))

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """Select images by their indices.

        Args:
            indices: The indices.

        Returns:
            A set of these images.
        """
        y = None if self.y is None else self.y[indices]
        return replace(self, x=self.x[indices], y=y, names=tuple(self.names[i] for i in indices))

    def spread(self, count: int) -> ImageSet:
        """Select evenly spaced images.

        Args:
            count: Number of images.

        Returns:
            A set of `count` images, or all where there are fewer.
        """
        if count >= len(self):
            return self
        return self.take(np.linspace(0, len(self) - 1, count).astype(int))


def as_type(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Convert floats to the type of an input; integers are rounded and clipped to the type's range.

    Args:
        values: The floats.
        dtype: Element type of the input.

    Returns:
        The converted array.
    """
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        values = np.clip(np.rint(values), ends.min, ends.max)
    return values.astype(dtype, copy=False)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Read the size of the first image that can be read, where that is cheap.

    Args:
        path: A folder of images or an .npz.

    Returns:
        Height and width in pixels; None where they cannot be read, which `load_images` then reports.
    """
    source = Path(path)
    try:
        if not is_folder(source):
            x, _ = read_npz(source)
            return int(x.shape[1]), int(x.shape[2])
        for file in image_files(source):
            try:
                height, width, _ = decode(file, Preprocess()).shape
            except UnreadableImage:
                continue
            return int(height), int(width)
    except CompressError:
        pass
    return None


def load_images(
    path: str | os.PathLike[str],
    *,
    preprocess: Preprocess,
    count: int | None = None,
    seed: int = 0,
    labels: bool = False,
    left_out: int | None = None,
    progress: Progress = silent,
) -> ImageSet:
    """Load images from a folder or an .npz.

    Args:
        path: The folder or .npz. The few files of a folder that cannot be read are left out, with a
            CompressWarning.
        preprocess: Resizing and normalization.
        count: Number of images to draw at random, balanced over the classes; None: all.
        seed: Random seed of the draw.
        labels: Require labels.
        left_out: Load instead so many of the images that `count` leaves out, as far as there are any.
        progress: Called with the stage, the images read and the images in all.

    Returns:
        The images, with labels where there are any.

    Raises:
        OptionError: `count` is below 1.
        InputError: Something cannot be used; the message names the file.
    """
    if count is not None and not (isinstance(count, Integral) and count >= 1):
        raise OptionError(f"count: {count}; expected a whole number, 1 or more")
    source, draw = image_source(path), _Draw(count, seed, left_out)
    if is_folder(source):
        images = _load_folder(source, preprocess, draw, labels, progress)
    else:
        images = _load_npz(source, preprocess, draw, labels)
    wanted = max(len(preprocess.mean), len(preprocess.std))
    if wanted not in (1, images.x.shape[3]):
        raise InputError(
            f"{source}: the images have {images.x.shape[3]} channel, mean and std {wanted} values; "
            "add channels=3 to repeat the gray channel, or give one value each"
        )
    return images


def check_fits(images: ImageSet, shape: Sequence[int | str | None] | None, name: str) -> None:
    """Check that images have the shape of a network's input.

    Args:
        images: The images.
        shape: Shape of the input with its batch; None: unknown, nothing is checked.
        name: Name of the input.

    Raises:
        InputError: They do not; the message says what to change in --preprocess.
    """
    if shape is None:
        return
    got = images.shape
    text = "x".join(str(d) for d in got)
    expected = "x".join("?" if not isinstance(d, int) else str(d) for d in shape[1:])
    if len(shape) != 4:
        raise InputError(f"input {name!r} has {len(shape)} dimensions; expected images, N,C,H,W or N,H,W,C")
    check_layout(shape, images.preprocess.layout, f"input {name!r}")
    if all(not isinstance(d, int) or d == g for d, g in zip(shape[1:], got, strict=True)):
        return
    raise InputError(
        f"input {name!r} takes {expected}, the images are {text} ({images.preprocess.layout}); "
        + _advice(shape, images)
    )


def _advice(shape: Sequence[int | str | None], images: ImageSet) -> str:
    layout = images.preprocess.layout
    channel_at = 1 if layout == "nchw" else 3
    channels = images.x.shape[3]
    expected = shape[channel_at]
    if isinstance(expected, int) and expected != channels:
        other = "nhwc" if layout == "nchw" else "nchw"
        if shape[4 - channel_at] == channels:
            return f"add layout={other} to --preprocess"
        if expected in (1, 3):
            return f"add channels={expected} to --preprocess to convert them"
        return "the network does not take gray or RGB images"
    sides = [d for i, d in enumerate(shape[1:], 1) if i != channel_at]
    return f"set size={'x'.join('?' if d is None else str(d) for d in sides)} in --preprocess"


def image_count(path: str | os.PathLike[str], *, labels: bool = False) -> int:
    """Count the images of a folder or an .npz, without reading their pixels.

    Args:
        path: The folder or .npz.
        labels: Whether they must have labels.

    Returns:
        Their number, that of files that cannot be read included.

    Raises:
        InputError: It is neither a folder with images nor an .npz that has some, or labels are missing.
    """
    source = image_source(path)
    if not is_folder(source):
        return npz_length(source, labels)
    files = image_files(source)
    folder_labels(source, files, labels)
    return len(files)


def _load_folder(
    folder: Path, preprocess: Preprocess, draw: _Draw, labels: bool, progress: Progress
) -> ImageSet:
    from onnxcompress.data.folder_reading import read_files

    files = image_files(folder)
    warn_of_unread(folder)
    y = folder_labels(folder, files, labels)
    drawn = draw.indices(len(files), y, folder)
    x, read = read_files(folder, [files[i] for i in drawn], len(files), preprocess, progress)
    kept = drawn[read]
    names = tuple(files[i].relative_to(folder).as_posix() for i in kept)
    return ImageSet(x, None if y is None else y[kept], names, preprocess)


@dataclass(frozen=True)
class _Draw:
    """Draws the images to load."""

    count: int | None
    """None: all."""
    seed: int
    left_out: int | None
    """If given, load so many of the images that `count` leaves out, and none of the others."""

    def indices(self, total: int, y: np.ndarray | None, source: Path) -> np.ndarray:
        """Draw indices, balanced over the classes of `y`; they are returned in order."""
        if self.count is None:
            if self.left_out is not None:
                raise InputError(f"{source}: all images were drawn: none is left")
            return np.arange(total)
        if self.count > total:
            raise InputError(f"{source}: {self.count} images were asked for, it has {total}")
        order = np.random.default_rng(self.seed).permutation(total)
        if y is not None:
            shuffled = y[order]
            turn = np.empty(total, np.int64)  # number of images of the same class before it
            for label in np.unique(shuffled):
                of_class = np.flatnonzero(shuffled == label)
                turn[of_class] = np.arange(len(of_class))
            order = order[np.argsort(turn, kind="stable")]
        if self.left_out is None:
            return np.sort(order[: self.count])
        if self.count == total:
            raise InputError(f"{source}: {self.count} images were drawn of {total}: none is left")
        return np.sort(order[self.count : self.count + self.left_out])


def _load_npz(file: Path, preprocess: Preprocess, draw: _Draw, labels: bool) -> ImageSet:
    x, y = read_npz(file)
    if labels and y is None:
        raise InputError(f"{file}: {NO_LABELS}")
    chosen = draw.indices(len(x), y, file)
    x, y = x[chosen], None if y is None else y[chosen]
    names = tuple(f"{file.name}[{i}]" for i in chosen)
    x = as_pixels(x, file)
    size, channels = preprocess.size, preprocess.channels
    if (size is None or x.shape[1:3] == size) and channels in (None, x.shape[3]):
        return ImageSet(x, y, names, preprocess)
    mode = "L" if (channels or x.shape[3]) == 1 else "RGB"
    fitted = [
        fit(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert(mode), preprocess, n)
        for image, n in zip(x, names, strict=True)
    ]
    return ImageSet(np.stack(fitted), y, names, preprocess)
