"""Real images: a folder of files or an .npz, kept as uint8 and normalized batch by batch.

A folder is read recursively in sorted order; labels are the names of its first level of folders: class
indices where all are numbers, else their sorted order. An .npz has `x` or `images` (N,H,W,C or N,H,W) and
may have `y` or `labels` (N). EXIF orientation is ignored, as in ImageNet's evaluation; an alpha channel is
dropped.
Does not handle: 16-bit and floating-point image files.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
from PIL import Image

from onnxcompress.data.decode import decode, fit
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import CompressError, InputError, OptionError, one_line
from onnxcompress.progress import Progress, silent

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm")
FLOAT: np.dtype[Any] = np.dtype(np.float32)
DECODERS = 2
"""Threads that decode."""
_UNREADABLE = (
    OSError, ValueError, EOFError, BadZipFile, NotImplementedError, SyntaxError, zlib.error,
    TokenError, MemoryError,
)  # fmt: skip
"""What zipfile and numpy raise on an archive that is broken, or claims more than there is memory."""
BOMB, BOMB_RATIO = 1 << 29, 200
"""Bytes of an array from which on it must not be this many times its compressed size."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and how to normalize them."""

    x: np.ndarray
    """uint8 N,H,W,C, C = 1 or 3, resized and cropped already."""
    y: np.ndarray | None
    """int64 class indices, or None where there are no labels."""
    names: tuple[str, ...]
    preprocess: Preprocess
    dtype: np.dtype[Any] = FLOAT
    """Of the network's input."""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the network gets it: C,H,W or H,W,C."""
        height, width, channels = self.x.shape[1:]
        return self.preprocess.shape(height, width, channels)

    def array(self) -> np.ndarray:
        """All images as the network takes them, N,C,H,W or N,H,W,C."""
        return self.normalized(slice(None))

    def normalized(self, part: slice) -> np.ndarray:
        """Some of the images as the network takes them."""
        return as_type(self.preprocess.normalize(self.x[part]), self.dtype)

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """Normalized batches in order; the last may be smaller."""
        for start in range(0, len(self), batch):
            yield self.normalized(slice(start, start + batch))

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The images at these indices."""
        y = None if self.y is None else self.y[indices]
        return replace(self, x=self.x[indices], y=y, names=tuple(self.names[i] for i in indices))

    def spread(self, count: int) -> ImageSet:
        """`count` images evenly from all, or all where there are fewer."""
        if count >= len(self):
            return self
        return self.take(np.linspace(0, len(self) - 1, count).astype(int))


def as_type(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Floats in the type of an input; integers are rounded, and cut off at the ends of their range."""
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        values = np.clip(np.rint(values), ends.min, ends.max)
    return values.astype(dtype, copy=False)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Height and width of the first image of a folder or .npz; None where it cannot be told cheaply.

    Nothing is refused here: `load_images` says what is wrong with a file.
    """
    source = Path(path)
    try:
        if source.is_dir():
            first = next(iter(_image_files(source)), None)
            if first is None:
                return None
            with Image.open(first) as image:
                return image.height, image.width
        x, _ = _read_npz(source)
    except (OSError, ValueError, CompressError):
        return None
    return int(x.shape[1]), int(x.shape[2])


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
    """Load all images, or `count` of them drawn with `seed` (as many of each class as can be).

    `labels`: they are needed; without them it is an error. `left_out`: load so many of those that `count`
    leaves out, and none that it takes; fewer where there are no more.
    Raises InputError with the file's name for whatever cannot be used.
    """
    if count is not None and count < 1:
        raise OptionError(f"count: {count}; expected 1 or more")
    source = Path(path)
    if source.is_dir():
        images = _load_folder(source, preprocess, _Draw(count, seed, left_out), labels, progress)
    elif source.suffix.lower() == ".npz" and source.is_file():
        images = _load_npz(source, preprocess, _Draw(count, seed, left_out), labels)
    else:
        what = "no .npz file or folder" if source.exists() else "no such file or folder"
        raise InputError(f"{source}: {what}; images come from a folder or an .npz")
    wanted = max(len(preprocess.mean), len(preprocess.std))
    if wanted not in (1, images.x.shape[3]):
        raise InputError(
            f"{source}: the images have {images.x.shape[3]} channel, mean and std {wanted} values; "
            "add channels=3 to repeat the gray channel, or give one value each"
        )
    return images


def check_fits(images: ImageSet, shape: Sequence[int | str | None] | None, name: str) -> None:
    """Raise InputError unless the images are what the input `name` of that shape (with N) takes."""
    if shape is None:
        return
    got = images.shape
    text = "x".join(str(d) for d in got)
    expected = "x".join("?" if not isinstance(d, int) else str(d) for d in shape[1:])
    if len(shape) != 4:
        raise InputError(
            f"input {name!r}: expected images N,C,H,W or N,H,W,C, it takes {len(shape)} dimensions"
        )
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


def image_count(path: str | os.PathLike[str]) -> int:
    """How many images a folder or an .npz has, without reading their pixels.

    Args:
        path: The folder or .npz.

    Returns:
        Their number; 0 where it cannot be told, as `load_images` will then say.
    """
    source = Path(path)
    if source.is_dir():
        return len(_image_files(source))
    try:
        with ZipFile(source) as archive:
            name = next(n for n in ("x.npy", "images.npy") if n in archive.namelist())
            with archive.open(name) as member:
                np.lib.format.read_magic(member)
                return int(np.lib.format.read_array_header_1_0(member)[0][0])
    except (*_UNREADABLE, StopIteration, IndexError):
        return 0


def _load_folder(
    folder: Path, preprocess: Preprocess, draw: _Draw, labels: bool, progress: Progress
) -> ImageSet:
    files = _image_files(folder)
    if not files:
        raise InputError(f"{folder}: no images; expected files of {', '.join(SUFFIXES)}")
    y = _folder_labels(folder, files, labels)
    chosen = draw.indices(len(files), y, folder)
    files = [files[i] for i in chosen]
    with warnings.catch_warnings(), ThreadPoolExecutor(DECODERS) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        decoded = []
        for image in pool.map(lambda file: decode(file, preprocess), files):
            decoded.append(image)
            progress(f"reading {folder}", len(decoded), len(files))
    channels = preprocess.channels or max(image.shape[2] for image in decoded)
    first = decoded[0].shape[:2]
    for file, image in zip(files, decoded, strict=True):
        if image.shape[:2] != first:
            raise InputError(
                f"{file}: {image.shape[0]}x{image.shape[1]} (height x width), {files[0].name} is "
                f"{first[0]}x{first[1]}; give size= in --preprocess to make them alike"
            )
    x = np.empty((len(decoded), *first, channels), np.uint8)
    for index, image in enumerate(decoded):  # a gray photograph among colour ones is repeated
        x[index] = image
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    return ImageSet(x, None if y is None else y[chosen], names, preprocess)


def _image_files(folder: Path) -> list[Path]:
    found = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [
            Path(root, name)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _folder_labels(folder: Path, files: Sequence[Path], needed: bool) -> np.ndarray | None:
    parts = [file.relative_to(folder).parts for file in files]
    loose = next((p[0] for p in parts if len(p) == 1), None)
    if loose is not None:
        if needed:
            raise InputError(
                f"{folder}: {loose} lies in no class folder; labels need one folder for each class"
            )
        return None
    classes = sorted({p[0] for p in parts})
    if all(c.isdecimal() for c in classes):
        index = {c: int(c) for c in classes}
    else:
        index = {c: i for i, c in enumerate(classes)}
    return np.array([index[p[0]] for p in parts], np.int64)


@dataclass(frozen=True)
class _Draw:
    """Which of the images are taken."""

    count: int | None
    """None: all."""
    seed: int
    left_out: int | None
    """Instead so many of those that `count` leaves out."""

    def indices(self, total: int, y: np.ndarray | None, source: Path) -> np.ndarray:
        """Indices in order: all, or some drawn at random, balanced over the classes of `y`."""
        if self.count is None:
            return np.arange(total if self.left_out is None else 0)
        if self.count > total:
            raise InputError(f"{source}: {self.count} images were asked for, it has {total}")
        order = np.random.default_rng(self.seed).permutation(total)
        if y is not None:
            shuffled = y[order]
            turn = np.empty(total, np.int64)  # how many of its class come before it
            for label in np.unique(shuffled):
                of_class = np.flatnonzero(shuffled == label)
                turn[of_class] = np.arange(len(of_class))
            order = order[np.argsort(turn, kind="stable")]
        start, stop = (0, self.count) if self.left_out is None else (self.count, self.count + self.left_out)
        return np.sort(order[start:stop])


def _load_npz(file: Path, preprocess: Preprocess, draw: _Draw, labels: bool) -> ImageSet:
    x, y = _read_npz(file)
    if labels and y is None:
        raise InputError(f"{file}: no labels; expected an array y or labels beside the images")
    chosen = draw.indices(len(x), y, file)
    x, y = x[chosen], None if y is None else y[chosen]
    names = tuple(f"{file.name}[{i}]" for i in chosen)
    x = _as_pixels(x, file)
    size, channels = preprocess.size, preprocess.channels
    if (size is None or x.shape[1:3] == size) and channels in (None, x.shape[3]):
        return ImageSet(x, y, names, preprocess)
    mode = "L" if (channels or x.shape[3]) == 1 else "RGB"
    fitted = [
        fit(Image.fromarray(one[..., 0] if one.shape[2] == 1 else one).convert(mode), preprocess, n)
        for one, n in zip(x, names, strict=True)
    ]
    return ImageSet(np.stack(fitted), y, names, preprocess)


def _read_npz(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if not is_zipfile(file):  # numpy would take a .npy or a pickle of that name for what it is
        raise InputError(f"{file}: not a readable .npz (no zip archive)")
    try:
        _check_members(file)
        with np.load(file, allow_pickle=False) as archive:
            x_key = next((k for k in ("x", "images") if k in archive.files), None)
            y_key = next((k for k in ("y", "labels") if k in archive.files), None)
            if x_key is None:
                raise InputError(
                    f"{file}: no array x or images; it has {', '.join(archive.files) or 'nothing'}"
                )
            x, y = archive[x_key], archive[y_key] if y_key else None
    except _UNREADABLE as error:
        raise InputError(f"{file}: not a readable .npz ({one_line(error)})") from error
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
        turned = x.ndim == 4 and x.shape[1] in (1, 3)
        hint = "; transpose it to N,H,W,C" if turned else ""
        raise InputError(
            f"{file}: images of shape {list(x.shape)}; expected N,H,W or N,H,W,C, C = 1 or 3{hint}"
        )
    return x, None if y is None else _as_labels(y, len(x), file)


def _check_members(file: Path) -> None:
    """Raise InputError for a small file that would be a huge array."""
    with ZipFile(file) as archive:
        for member in archive.infolist():
            if member.file_size > BOMB and member.file_size > BOMB_RATIO * member.compress_size:
                raise InputError(
                    f"{file}: {member.filename} would be {member.file_size} bytes, {member.compress_size} "
                    "compressed: too large to be honest images"
                )


def _as_labels(y: np.ndarray, total: int, file: Path) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (total,) or y.dtype.kind not in "iu" or (total and int(y.min()) < 0):
        raise InputError(
            f"{file}: labels of shape {list(y.shape)}, {y.dtype}; expected [{total}] class indices"
        )
    return y.astype(np.int64)


def _as_pixels(x: np.ndarray, file: Path) -> np.ndarray:
    """uint8 pixels from uint8, other integers in [0, 255], or floats in [0, 1] (rounded)."""
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    top = {"f": 1, "i": 255, "u": 255}.get(x.dtype.kind)
    if top is None:
        raise InputError(f"{file}: images of type {x.dtype}; expected uint8, or floats in [0, 1]")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(f"{file}: the images hold NaN or infinity; expected uint8 or [0, 1]")
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > top:
        raise InputError(
            f"{file}: {x.dtype} images from {low:g} to {high:g}; expected [0, {top}], or uint8: "
            "normalizing them is --preprocess's part"
        )
    return np.round(x * (255 / top)).astype(np.uint8)
