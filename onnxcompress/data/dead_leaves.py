"""Draw procedural images from a seed: dead leaves, which have the statistics of natural images.

Opaque shapes of power-law sizes that hide one another have the edges, the spectrum and the scale invariance
of photographs (Lee, Mumford, Huang, Occlusion models for natural images, IJCV 2001), and features that
networks learn from them transfer to photographs (Baradad et al., Learning to see by looking at noise,
NeurIPS 2021). An image has one of these compositions:

    leaves      many leaves, all over the image
    object      large leaves with details on them near the middle, in front of few, often blurred leaves
    surface     hardly anything but texture

    shapes -> map of the visible leaf -> per pixel: colour + shading + strength * texture -> focus

Each leaf has a colour, a linear gradient (light falling on it) and a strength of the image's texture, 1/f
noise or stripes. The map is drawn on a finer grid and averaged, so edges are soft at any size.
Image i depends on the seed, i and the size only: a smaller set is the start of a larger one.

Measured on ResNet-56 without 8 of its blocks, refitted on 500 images of 32x32, as agreement with the
original on 3000 of CIFAR-10's training images: flat leaves of uncorrelated colours 94.1 %, of correlated
colours 95.8 %, images as drawn here 96.1 to 96.5 % for all variations of the shares and contrasts below
that were tried (a difference of 0.2 is chance), CIFAR-10 itself 96.8 %.

Does not handle: perspective, shadows, anything that a network was trained to name.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from onnxcompress.errors import OptionError
from onnxcompress.progress import Progress, silent

OBJECTS = 0.8
"""Share of images with an object: most photographs show something, and it is in the middle."""
SURFACES = 0.05
"""Share of images that are a surface: sky, grass, cloth. They have few edges to learn from."""
LEAVES = (30, 200)
"""Least and largest number of leaves in a square image; few leave large uniform areas, many cover it."""
BEHIND = (3, 40)
"""Number of leaves behind an object, which stands out against a calmer background."""
RADII = (0.03, 0.5)
"""Radii of leaves in sides of the image, with a density of r^-3, which makes images scale invariant."""
SORTED = 0.5
"""Share of images with the smaller leaves in front, like details on objects; else the order is random."""
LIGHT = (120.0, 36.0)
"""Mean and standard deviation (clipped at two) of a scene's light, 0 to 255; the background adds to it, so
that the means of images have a deviation of about 40. CIFAR-10 has 123 and 32."""
CONTRAST = (25.0, 80.0)
"""Least and largest standard deviation of the light of an image's leaves: from fog to hard sun. Over pixels
it is 33 on average, as a few leaves fill most of an image; CIFAR-10 has 50, but (35, 95) was no better."""
HUES = (0.15, 0.6)
"""Deviation of colour relative to that of light, which varies four times as much in photographs."""
TINT = 10.0
"""Standard deviation of the colour of the light that falls on a scene."""
AXES = np.array([[1.0, 1.0, 1.0], [0.63, 0.07, -0.7], [0.25, -0.4, 0.2]], np.float32)
"""Light, yellow to blue, red to green: the principal axes of natural colours, in falling order of spread
(Ruderman, Cronin, Chiao, Statistics of cone responses to natural images, JOSA A 1998)."""
SHADING = 40.0
"""Standard deviation of the gradient on a leaf, in levels per side of the image."""
TEXTURED = 0.5
"""Share of leaves with texture; the others are smooth."""
GRAIN = 18.0
"""Mean strength of the texture of a textured leaf, in levels; exponential up to three times that."""
STRIPES = 0.3
"""Share of images whose texture is stripes: the rest is noise with an amplitude of f^-0.6 to f^-1.3."""
UNFOCUSED = 0.3
"""Share of images that are slightly out of focus; backgrounds have FOCUSED_ON besides."""
FOCUSED_ON = 0.6
"""Share of objects whose background is out of focus."""
DRAWN = 128
"""Least number of pixels per side when drawing, and at least twice the image's: edges become soft."""
CORNERS = 40
"""Number of corners of a leaf's outline."""


def procedural_images(
    count: int,
    height: int,
    width: int,
    channels: int,
    seed: int,
    progress: Progress = silent,
    workers: int = 1,
) -> np.ndarray:
    """Draw dead-leaves images; they depend on the seed, not on the number of workers.

    Args:
        count: Number of images.
        height: Height in pixels.
        width: Width in pixels.
        channels: 1 or 3.
        seed: Random seed.
        progress: Called with the stage, the images drawn and the images in all.
        workers: Number of threads.

    Returns:
        Pixels, (count, height, width, channels) uint8.

    Raises:
        OptionError: A count or size is below 1, or `channels` is neither 1 nor 3.
    """
    if min(count, height, width) < 1 or channels not in (1, 3):
        raise OptionError(
            f"procedural images: {count} of {height}x{width}x{channels}; expected 1 or more of 1x1 or "
            "more pixels with 1 or 3 channels"
        )
    images = np.empty((count, height, width, channels), np.uint8)

    def fill(index: int) -> None:
        images[index] = _image(seed, index, height, width, channels)

    pool = ThreadPoolExecutor(workers)
    try:
        for done, _ in enumerate(pool.map(fill, range(count)), 1):
            progress("making procedural images", done, count)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def _image(seed: int, index: int, height: int, width: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng([seed, index])
    scene = _Scene(rng, height, width)
    kind = rng.random()
    if kind < OBJECTS:
        pixels = _object(scene)
    elif kind < OBJECTS + SURFACES:
        pixels = _surface(scene)
    else:
        pixels = scene.layer(_scattered(scene, LEAVES, RADII[0]))
    image = Image.fromarray(_levels(pixels))
    if rng.random() < UNFOCUSED:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7 + scene.side / 250)))
    return np.asarray(image.convert("L") if channels == 1 else image).reshape(height, width, channels)


def _object(scene: _Scene) -> np.ndarray:
    """Draw a few large leaves near the middle and smaller ones on them, in front of a calm background."""
    rng = scene.rng
    behind = scene.layer(_scattered(scene, BEHIND, 2 * RADII[0]), contrast=0.7)
    if rng.random() < FOCUSED_ON:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.005, 0.03) * scene.side)
        behind = np.asarray(Image.fromarray(_levels(behind)).filter(blur), np.float32)
    parts, details = int(rng.integers(1, 5)), int(rng.integers(0, 25))
    size = np.array([scene.width, scene.height])
    radii = np.sort(rng.uniform(0.12, 0.38, parts) * scene.side)[::-1]
    centres = size * (rng.uniform(0.35, 0.65, 2) + rng.normal(0, 0.12, (parts, 2)))
    on = rng.integers(0, parts, details)
    spots = centres[on] + rng.normal(0, 0.45, (details, 2)) * radii[on, None]
    radii = np.concatenate([radii, radii[on] * rng.uniform(0.1, 0.5, details)])
    return scene.layer(_Leaves(np.concatenate([centres, spots]), radii), behind=behind)


def _surface(scene: _Scene) -> np.ndarray:
    few = _scattered(scene, (1, 4), RADII[0])
    return scene.layer(few, textured=1.0)


@dataclass(frozen=True)
class _Leaves:
    """Shapes from the back to the front, in pixels."""

    centres: np.ndarray
    """(leaves, 2), x and y."""
    radii: np.ndarray


def _scattered(scene: _Scene, number: tuple[int, int], least: float) -> _Leaves:
    """Scatter leaves over the whole image, with radii of at least `least` sides."""
    rng, side = scene.rng, scene.side
    area = min(16.0, scene.height * scene.width / side**2)
    count = int(rng.integers(*number) * area)
    low, high = least * side, RADII[1] * side
    radii = (high**-2 + rng.random(count) * (low**-2 - high**-2)) ** -0.5  # the density falls as r^-3
    if rng.random() < SORTED:
        radii = np.sort(radii)[::-1]
    return _Leaves(rng.random((count, 2)) * [scene.width, scene.height], radii)


class _Scene:
    """What the leaves of one image share: size, light, colours, texture."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width, self.side = rng, height, width, min(height, width)
        self.light = LIGHT[0] + LIGHT[1] * float(np.clip(rng.normal(), -2, 2))
        self.contrast = rng.uniform(*CONTRAST)
        self.tint, self.hues = rng.normal(0, TINT, 2), rng.uniform(*HUES)
        self.y = np.arange(height, dtype=np.float32)[:, None]
        self.x = np.arange(width, dtype=np.float32)[None]
        self.texture = self._stripes() if rng.random() < STRIPES else self._noise(rng.uniform(0.6, 1.3))

    def layer(
        self,
        leaves: _Leaves,
        *,
        contrast: float = 1.0,
        textured: float = TEXTURED,
        behind: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw leaves, (height, width, 3) float32, in front of `behind`, by default of one more leaf."""
        table = self._looks(leaves, contrast, textured)
        if behind is not None:
            table[0] = 0
        seen = self._averaged(_outlines(self.rng, leaves), table)
        right, down, strength, cover = np.moveaxis(seen[..., 3:], -1, 0)
        light = right * self.x + down * self.y + strength * self.texture
        pixels = seen[..., :3] + light[..., None]
        return np.asarray(pixels if behind is None else behind * (1 - cover[..., None]) + pixels)

    def _looks(self, leaves: _Leaves, contrast: float, textured: float) -> np.ndarray:
        """Draw the looks of leaves, (1 + leaves, 7); row 0 is for the background.

        Columns: the colour at (0, 0) in 3; the slopes right and down; the strength of the texture; 1.
        """
        rng, count = self.rng, len(leaves.radii) + 1
        spread = contrast * self.contrast * np.array([1.0, self.hues, self.hues])
        colours = np.array([self.light, *self.tint]) + spread * rng.normal(size=(count, 3))
        slopes = rng.normal(0, SHADING / self.side, (count, 2)) * rng.random((count, 1))
        centres = np.concatenate([[[self.width / 2, self.height / 2]], leaves.centres])
        table = np.ones((count, 7), np.float32)
        table[:, :3] = colours @ AXES - (slopes * centres).sum(1, keepdims=True)
        table[:, 3:5] = slopes
        strength = np.minimum(rng.exponential(1, count), 3) * GRAIN
        table[:, 5] = np.where(rng.random(count) < textured, strength, 0)
        return table

    def _averaged(self, outlines: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Look up the row of the visible leaf, averaged over each pixel, (height, width, columns)."""
        fine = min(8, max(2, -(-DRAWN // self.side)))
        image = Image.new("I", (self.width * fine, self.height * fine), 0)
        draw = ImageDraw.Draw(image)
        for index, outline in enumerate((outlines * fine).reshape(len(outlines), -1).tolist(), 1):
            draw.polygon(outline, fill=index)
        seen = np.asarray(image)
        total = np.zeros((self.height, self.width, table.shape[1]), np.float32)
        for row in range(fine):
            for column in range(fine):
                total += table[seen[row::fine, column::fine]]
        return total / fine**2

    def _noise(self, power: float) -> np.ndarray:
        """Draw noise with amplitudes f^-power and deviation 1, (height, width)."""
        height, width = self.height, self.width
        down, right = np.fft.fftfreq(height, 1 / height)[:, None], np.fft.rfftfreq(width, 1 / width)
        frequency = np.hypot(down * self.side / height, right * self.side / width).astype(np.float32)
        frequency[0, 0] = np.inf
        spectrum = np.fft.rfft2(self.rng.standard_normal((height, width), np.float32))
        noise = np.fft.irfft2(spectrum * frequency ** np.float32(-power), (height, width))
        return np.asarray(noise / max(float(noise.std()), 1e-6), np.float32)

    def _stripes(self) -> np.ndarray:
        """Draw wavy stripes, soft or hard, (height, width): from 3 to 14 per side, as pixels allow."""
        rng = self.rng
        waves = np.exp(rng.uniform(np.log(3), np.log(max(4, min(14, self.side / 4)))))
        turn, step = rng.uniform(0, np.pi), 2 * np.pi * waves / self.side
        along = step * (self.x * np.cos(turn) + self.y * np.sin(turn))
        stripes = np.sin(along + rng.uniform(0, 2 * np.pi) + 0.8 * self._noise(1.5))
        return np.asarray(np.clip(3 * stripes, -0.8, 0.8) if rng.random() < 0.4 else stripes, np.float32)


def _outlines(rng: np.random.Generator, leaves: _Leaves) -> np.ndarray:
    """Draw outlines, (leaves, CORNERS, 2): ellipses, rectangles, polygons and smooth blobs."""
    count = len(leaves.radii)
    kind = rng.integers(0, 4, (count, 1))
    even = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)  # a multiple of 8: rectangles have corners
    few = rng.integers(3, 7, (count, 1)) * np.arange(CORNERS) // CORNERS
    drawn = np.take_along_axis(np.sort(rng.uniform(0, 2 * np.pi, (count, 6)), 1), few, 1)
    box = 0.85 / np.maximum(np.abs(np.cos(even)), np.abs(np.sin(even)))
    wave = np.arange(2, 5)[:, None, None]
    size, phase = rng.normal(0, 0.35, (3, count, 1)) / wave, rng.uniform(0, 2 * np.pi, (3, count, 1))
    blob = np.clip(1 + (size * np.cos(wave * even + phase)).sum(0), 0.3, 2)
    angle = np.where(kind == 2, drawn, even)
    reach = np.where(kind == 1, box, np.where(kind == 3, blob, 1)) * leaves.radii[:, None]
    flat, turn = rng.uniform(0.3, 1, (count, 1)), rng.uniform(0, 2 * np.pi, (count, 1))
    x, y = reach * np.cos(angle), reach * flat * np.sin(angle)
    turned = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], -1)
    return np.asarray(turned + leaves.centres[:, None])


def _levels(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(pixels), 0, 255), np.uint8)
