"""Small training images that stay on the device and are augmented there, a whole batch at once.

What a sample draws is in tables that are made when an epoch starts, one row per place in its order. So a
batch follows from (seed, epoch, place) alone, as one that `loading.loaders.Batches` reads does.
"""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from loading.loaders import Batches, TrainLoader
from loading.split import Split
from loading.streams import Stream
from loading.transforms import Transform, View
from utils import Compute, Runtime, UserError, seed_draws

LARGEST = 64  # pixels
ROOM = 2**32  # bytes
PADDING = 4  # pixels on every side, black


def read_all(split: Split, side: int) -> tuple[Tensor, Tensor]:
    """All images, uint8 [N, 3, side, side], and labels [N].

    Raises ValueError for images of other sizes, and for more of them than a device should hold.
    """
    if side > LARGEST:
        raise UserError(f"--device_data true: images of {side} pixels; accepted: at most {LARGEST}")
    size = len(split) * 3 * side**2
    if size > ROOM:
        held = f"{len(split)} images are {size / 2**30:.1f} GiB on the device"
        raise UserError(f"--device_data true: {held}; accepted: at most {ROOM / 2**30:.1f}")
    images, labels = np.empty((len(split), side, side, 3), np.uint8), []
    for i in range(len(split)):
        image, label = split.read(i)
        if image.size != (side, side):
            found = f"image {split.name(i)} has {image.width} x {image.height} pixels"
            raise UserError(f"--device_data true: {found}; accepted: {side} x {side}, as --input_size")
        images[i] = image
        labels.append(label)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


class DeviceBatches(Batches):
    """The micro-batches of an epoch on one process: [b] -> (images [B, 3, H, W], targets) on the device.

    Images are padded by 4 black pixels, cropped at random and flipped, normalised, erased and mixed. With
    `transform.flip` "alternating" an image's flip is drawn once, by (seed, its index), and then changes every
    epoch. What erases an image is seeded by its place, and what mixes a batch by that of its first sample.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        compute: Compute,
        seed: int,
        *,
        view: View,
        transform: Transform,
        mix: Mixup | None,
    ) -> None:
        super().__init__(split, batch_size, compute, seed, mix or _unmixed)
        self.device, self.side = compute.device, view.size
        images, labels = read_all(split, self.side)
        padded = torch.nn.functional.pad(images, (PADDING,) * 4)
        self.images, self.labels = padded.to(self.device), labels.to(self.device)
        self.mean, self.std = (self._put(stat)[:, None, None] for stat in (view.mean, view.std))
        self.alternating, t = transform.flip == "alternating", transform
        # timm's goes over the images one by one, as their boxes differ.
        self.erase = RandomErasing(t.reprob, mode=t.remode, max_count=t.recount, device=str(self.device))

    def _put(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.device)

    def start(self, order: np.ndarray, epoch: int) -> None:
        """An epoch in this order, that of all processes."""
        super().start(order, epoch)
        rng = np.random.default_rng((self.seed, epoch, 2))
        draws = rng.integers((2 * PADDING + 1, 2 * PADDING + 1, 2), size=(len(order), 3))
        if self.alternating:
            first = np.random.default_rng((self.seed, 0, 3)).integers(2, size=len(self.split))
            draws[:, 2] = (first[order] + epoch) % 2
        self.rows, self.draws = self._put(order), self._put(draws)

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor]:
        places = self.places(batch)
        mine = slice(places.start, places.stop, places.step)
        rows = self.rows[mine]
        images = (self._cropped(rows, self.draws[mine]).float() / 255 - self.mean) / self.std
        for place, image in zip(places, images, strict=True) if self.erase.probability else ():
            seed_draws(int(self.seeds[0, place]))
            self.erase(image)
        seed_draws(int(self.seeds[1, places[0]]))
        return self.collate(images, self.labels[rows])

    def _cropped(self, rows: Tensor, draws: Tensor) -> Tensor:
        """The images of these rows, uint8 [B, 3, H, W], by what is drawn: top, left and flip, [B, 3]."""
        top, left, flip = draws[:, :, None].unbind(1)  # (B, 1)
        along = torch.arange(self.side, device=self.device)
        down = top + along  # (B, H)
        across = left + torch.where(flip > 0, along.flip(0), along)  # (B, W)
        channels = torch.arange(3, device=self.device)[:, None, None]
        rows = rows[:, None, None, None]
        return self.images[rows, channels, down[:, None, :, None], across[:, None, None, :]]


def _unmixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels


class DeviceLoader(TrainLoader):
    """A TrainLoader of images that are on the device; it has no processes of its own."""

    def __init__(
        self,
        split: Split | Stream,
        runtime: Runtime,
        compute: Compute,
        *,
        view: View,
        transform: Transform,
        mix: Mixup | None,
        **options: Any,
    ) -> None:
        if isinstance(split, Stream):
            raise UserError("--device_data true needs training images by index; a stream has none")
        super().__init__(split, runtime, compute, collate=mix, **options)
        how = {"view": view, "transform": transform, "mix": mix}
        self.batches = DeviceBatches(split, runtime.batch_size, compute, self.seed, **how)
        self.start(0)

    def _read(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        for batch in range(self.first, len(self)):
            yield self.batches[batch]
