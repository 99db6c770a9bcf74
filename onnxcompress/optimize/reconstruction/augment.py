"""Random views of images, without labels: mirrored, shifted, half with a patch pasted.

Random numbers come from one generator on the CPU in a fixed order, so that a seed gives the same views on
every device; pixels stay on their device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onnxcompress.optimize.device import sent


def augment(
    images: Tensor,
    batch: int,
    generator: torch.Generator,
    shares: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draw a batch of random views: mirrored, shifted by up to an eighth, half with a pasted patch.

    Args:
        images: The images, (N, C, H, W); inputs of another rank are drawn, but not changed.
        batch: Number of views.
        generator: Random generator, on the CPU.
        shares: How often each image is drawn, relative to the others, (N,); None: equally often.
        device: Where the views lie; None: where the images are.

    Returns:
        The views, (batch, C, H, W).
    """
    if shares is None:
        index = torch.randint(len(images), (batch,), generator=generator)
    else:
        index = torch.multinomial(shares, batch, replacement=True, generator=generator)
    x = images[sent(index, images.device)]
    x = sent(x, x.device if device is None else device)
    if x.ndim != 4:
        return x
    flip = sent(torch.rand(batch, generator=generator) < 0.5, x.device)
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    height, width = x.shape[-2:]
    reach = min(max(1, height // 8), height - 1), min(max(1, width // 8), width - 1)
    padded = torch.nn.functional.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    top = torch.randint(2 * reach[0] + 1, (batch,), generator=generator)
    left = torch.randint(2 * reach[1] + 1, (batch,), generator=generator)
    shifted = windows(padded, top, left, height, width)
    return _paste(shifted, generator).contiguous(memory_format=torch.channels_last)


def windows(x: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Cut one window out of each image.

    Args:
        x: The images, (N, C, H, W).
        top: First row of each window, (N,).
        left: First column of each window, (N,).
        height: Rows of a window.
        width: Columns of a window.

    Returns:
        The windows, (N, C, height, width).
    """
    which = torch.arange(len(x), device=x.device)
    all_windows = x.unfold(2, height, 1).unfold(3, width, 1)  # N, C, top, left, height, width: a view
    return all_windows[which, :, sent(top, x.device), sent(left, x.device)]


def _paste(x: Tensor, generator: torch.Generator) -> Tensor:
    """Give half the images a part of their neighbour: CutMix without labels (Yun et al., ICCV 2019)."""
    batch, _, height, width = x.shape
    corners = []
    for _ in range(0, batch, 2):
        share = float(torch.rand(1, generator=generator)) ** 0.5
        h, w = max(1, int(height * share)), max(1, int(width * share))
        top = int(torch.randint(height - h + 1, (1,), generator=generator))
        left = int(torch.randint(width - w + 1, (1,), generator=generator))
        corners.append((top, top + h, left, left + w))
    top_, bottom, left_, right = sent(torch.tensor(corners), x.device).unbind(1)
    inside_rows = _between(torch.arange(height, device=x.device), top_, bottom)
    inside_columns = _between(torch.arange(width, device=x.device), left_, right)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    mixed = x.clone(
        memory_format=torch.contiguous_format
    )  # for one channel, too: the same seed gives the same bits
    mixed[::2] = torch.where(inside, x.roll(1, 0)[::2], x[::2])
    return mixed


def _between(places: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (places >= low[:, None]) & (places < high[:, None])
