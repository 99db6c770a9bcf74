"""Random views of images, without labels: mirrored, shifted, half with a patch pasted.

What is drawn is drawn on the CPU, by one generator in a fixed order, so that a seed means the same views on
every device; the pixels never leave the device that they are on.
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
    """A batch of random views: mirrored, shifted by up to an eighth, half with a pasted patch.

    Inputs that are no images of two sides are taken as they are.

    images: (N, C, H, W). shares: (N,), how often each is taken. device: of the result; None: the images'.
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
    """Of each image its own window, (N, C, height, width), from (top, left) on."""
    which = torch.arange(len(x), device=x.device)
    all_windows = x.unfold(2, height, 1).unfold(3, width, 1)  # N, C, top, left, height, width: a view
    return all_windows[which, :, sent(top, x.device), sent(left, x.device)]


def _paste(x: Tensor, generator: torch.Generator) -> Tensor:
    """CutMix without labels: half the images get a rectangle of their neighbour (Yun et al., ICCV 2019)."""
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
    )  # of one channel, too: the seed's bits hang on it
    mixed[::2] = torch.where(inside, x.roll(1, 0)[::2], x[::2])
    return mixed


def _between(places: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (places >= low[:, None]) & (places < high[:, None])
