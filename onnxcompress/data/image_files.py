"""Find and read images in a folder or an .npz: files, stored pixels and labels.

A folder is read recursively in sorted order; labels are the names of its first level of folders: class
indices where all are numbers, else their sorted order. An .npz has `x` or `images` (N,H,W,C or N,H,W) and
may have `y` or `labels` (N).
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np

from onnxcompress.errors import CompressWarning, InputError, one_line, printable
from onnxcompress.formatting import counted

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif",
)  # fmt: skip
KINDS = ", ".join(SUFFIXES)
UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".exr", ".svg")
"""Kinds of pictures that are not read, of which the user is told."""
LABELS = ("y", "labels")
"""Arrays of an .npz that hold labels."""
NO_LABELS = "no labels; expected an array y or labels beside the images"
UNREADABLE = (
    OSError, ValueError, EOFError, BadZipFile, NotImplementedError, SyntaxError, zlib.error,
    TokenError, MemoryError,
)  # fmt: skip
"""Exceptions that zipfile and numpy raise for an archive that is broken or too large for the memory."""
BOMB, BOMB_RATIO = 1 << 29, 200
"""Arrays of more bytes are refused where they are more than so many times their compressed size."""


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder, recursively; hidden files and folders are skipped, links are followed.

    Args:
        folder: The folder.

    Returns:
        Paths in sorted order.

    Raises:
        InputError: There are none.
    """
    images = [file for file in files_of(folder) if file.name.lower().endswith(SUFFIXES)]
    if not images:
        raise InputError(f"{folder}: no images; {_unread(folder) or f'expected files of {KINDS}'}")
    return sorted(images)


def warn_of_unread(folder: Path) -> None:
    """Warn of pictures of kinds that are not read.

    Args:
        folder: A folder that has images, too.
    """
    if told := _unread(folder):
        warnings.warn(printable(f"{folder}: {told}"), CompressWarning, stacklevel=2)


def _unread(folder: Path) -> str | None:
    """Say which pictures are of kinds that are not read; None where there are none."""
    suffixes = [s for file in files_of(folder) if (s := file.suffix.lower()) in UNREAD]
    if not suffixes:
        return None
    kinds = ", ".join(sorted(set(suffixes)))
    return f"{counted(len(suffixes), 'picture')} of {kinds} left out; convert them to .jpg or .png"


def files_of(folder: Path) -> Iterator[Path]:
    """Find the files of a folder, recursively, but hidden ones and those in hidden folders.

    Args:
        folder: The folder; links are followed, each folder is read once.

    Yields:
        Paths.
    """
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def image_source(path: str | os.PathLike[str]) -> Path:
    """Check a path that is to hold images: an empty one would be the current folder.

    Args:
        path: A folder or an .npz.

    Returns:
        The path.

    Raises:
        InputError: It is empty.
    """
    if not os.fspath(path):
        raise InputError("the path of the images is empty; name a folder or an .npz")
    return Path(path)


def is_folder(source: Path) -> bool:
    """Tell a folder of images from an .npz.

    Args:
        source: What is to hold images.

    Returns:
        True for a folder, False for an .npz.

    Raises:
        InputError: It is neither.
    """
    if source.is_dir():
        return True
    if source.suffix.lower() == ".npz" and source.is_file():
        return False
    what = "no .npz file or folder" if source.exists() else "no such file or folder"
    raise InputError(
        f"{source}: {what}; images come from a folder or an .npz; labels are its sub-folders, or y in the "
        ".npz"
    )


def folder_labels(folder: Path, files: Sequence[Path], needed: bool) -> np.ndarray | None:
    """Read labels from the first level of folders.

    Args:
        folder: The folder of all images.
        files: Images in it.
        needed: Raise where an image lies in no class folder.

    Returns:
        Class indices, (N,) int64; None where an image lies in no class folder.

    Raises:
        InputError: Labels are needed, and there are none.
    """
    parts = [file.relative_to(folder).parts for file in files]
    loose = next((p[0] for p in parts if len(p) == 1), None)
    if loose is not None:
        if needed:
            raise InputError(
                f"{folder}: {loose} lies in no class folder; labels need one sub-folder for each class, "
                "or y in an .npz"
            )
        return None
    classes = sorted({p[0] for p in parts})
    if all(c.isdecimal() for c in classes):
        index = {c: int(c) for c in classes}
    else:
        index = {c: i for i, c in enumerate(classes)}
        if needed:
            _warn_of_empty(folder, classes)
    return np.array([index[p[0]] for p in parts], np.int64)


def _warn_of_empty(folder: Path, classes: Sequence[str]) -> None:
    """Warn of folders without images: classes that come after one may be counted too low."""
    folders = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    empty = [name for name in folders if name not in {*classes, "__MACOSX"}]
    if empty:
        others = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        told = (
            f"no images in {empty[0]}{others}, no class of its own; name folders by class index (0, 1, …)"
        )
        warnings.warn(printable(f"{folder}: {told}"), CompressWarning, stacklevel=2)


def npz_length(file: Path, labels: bool = False) -> int:
    """Count the images of an .npz from its header, without reading their pixels.

    Args:
        file: The .npz.
        labels: Whether they must have labels.

    Returns:
        Their number.

    Raises:
        InputError: The file cannot be read, its images do not have the expected shape, or there are no
            labels.
    """
    try:
        _check_members(file)
        with ZipFile(file) as archive:
            keys = [n.removesuffix(".npy") for n in archive.namelist()]
            name = _images_key(keys, file) + ".npy"
            if labels and not {*LABELS} & {*keys}:
                raise InputError(f"{file}: {NO_LABELS}")
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                header = np.lib.format.read_array_header_2_0
                shape = (np.lib.format.read_array_header_1_0 if version == (1, 0) else header)(member)[0]
    except UNREADABLE as error:
        raise InputError(f"{file}: not a readable .npz ({one_line(error)})") from error
    _check_shape(shape, file)
    return int(shape[0])


def read_npz(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the images and labels of an .npz.

    Args:
        file: The .npz.

    Returns:
        Images as they are stored, (N, H, W, C) with C = 1 or 3, and class indices (N,) or None.

    Raises:
        InputError: The file cannot be read, or its arrays do not have the expected shapes.
    """
    try:
        _check_members(file)
        with np.load(file, allow_pickle=False) as archive:
            y_key = next((k for k in LABELS if k in archive.files), None)
            x, y = archive[_images_key(archive.files, file)], archive[y_key] if y_key else None
    except UNREADABLE as error:
        raise InputError(f"{file}: not a readable .npz ({one_line(error)})") from error
    _check_shape(x.shape, file)
    if x.ndim == 3:
        x = x[..., None]
    return x, None if y is None else _as_labels(y, len(x), file)


def _images_key(keys: Sequence[str], file: Path) -> str:
    """Return the key of the images. Raises InputError where there are none."""
    key = next((k for k in ("x", "images") if k in keys), None)
    if key is None:
        raise InputError(f"{file}: no array x or images; it has {', '.join(keys) or 'nothing'}")
    return key


def _check_shape(shape: Sequence[int], file: Path) -> None:
    """Raises InputError for a shape that images do not have."""
    channels = shape[3] if len(shape) == 4 else 1
    if len(shape) not in (3, 4) or channels not in (1, 3) or 0 in shape:
        turned = len(shape) == 4 and shape[1] in (1, 3)
        hint = "; transpose it to N,H,W,C" if turned else ""
        raise InputError(
            f"{file}: images of shape {list(shape)}; expected N,H,W or N,H,W,C, C = 1 or 3{hint}"
        )


def _check_members(file: Path) -> None:
    """Refuse what is no archive, and a small file that would unpack to a huge array. Raises InputError."""
    if not is_zipfile(file):  # numpy would read a .npy or a pickle whatever its name
        raise InputError(f"{file}: not a readable .npz (no zip archive)")
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


def as_pixels(x: np.ndarray, file: Path) -> np.ndarray:
    """Convert uint8, other integers in [0, 255] or floats in [0, 1] to uint8.

    Args:
        x: Images, (N, H, W, C).
        file: The file that messages name.

    Returns:
        Pixels, uint8; floats are rounded.

    Raises:
        InputError: The type or the range is another one.
    """
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
