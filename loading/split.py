"""Rows of a data set for training, calibration and testing, with a transform."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from loading.pixels import UNREADABLE, to_rgb
from loading.streams import Stream
from utils import UserError


class Images(Dataset):
    """The rows `indices` (None: all) of a data set: [i] -> (PIL image, int label).

    `base` is ours or another library's; `title` names it in messages if its images have no names.
    """

    def __init__(self, base: Any, indices: Sequence[int] | None = None, title: str = "") -> None:
        self.base = base
        self.indices = range(len(base)) if indices is None else indices
        self.title = title

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.base[self.indices[index]]

    def name(self, index: int) -> str:
        """The name of an image in messages: its file, or the title of its data set and its index there."""
        row = self.indices[index]
        if isinstance(self.base, Images):
            return self.base.name(row)
        return self.file(index) or f"{self.title}[{row}]"

    def file(self, index: int) -> str:
        """The path of an image; "" for one that is in no file of its own."""
        row = self.indices[index]
        if isinstance(self.base, Images):
            return self.base.file(row)
        return self.base.samples[row][0] if isinstance(self.base, ImageFolder) else ""

    @cached_property
    def labels(self) -> Sequence[int]:
        """All labels, without reading images where the data set has a list of them."""
        of_base = self.base.labels if isinstance(self.base, Images) else getattr(self.base, "targets", None)
        return [self[i][1] if of_base is None else of_base[row] for i, row in enumerate(self.indices)]


class Split(Images):
    """The rows `indices` (None: all) of a data set, transformed: [i] -> (tensor [3, H, W], int label)."""

    def __init__(self, base: Images, indices: Sequence[int] | None, transform: Callable) -> None:
        super().__init__(base, indices)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.read(index)
        return self.transform(image), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image that is transformed, and its label; ValueError that names an unreadable one."""
        try:
            image, label = super().__getitem__(index)
            return to_rgb(image), int(label)
        except UNREADABLE as error:
            raise UserError(f"cannot read image {self.name(index)}: {error}") from None


def make_split(base: Images | Stream, indices: Sequence[int] | None, transform: Callable) -> Split | Stream:
    """A `Split`, or the stream, which has no rows to select, with the transform."""
    if isinstance(base, Stream):
        base = copy.copy(base)
        base.transform = transform
        return base
    return Split(base, indices, transform)


def split_train(num_train: int, num_calib: int, seed: int) -> tuple[list[int], list[int]]:
    """Draw which of `num_train` images to train on and which `num_calib` (fewer) to hold out, sorted."""
    if not 0 <= num_calib < num_train:
        accepted = f"0 to {num_train - 1}, fewer than the training images"
        raise UserError(f"--num_calib {num_calib}: accepted: {accepted}")
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[num_calib:]), sorted(order[:num_calib])


def default_num_calib(data_set: str, num_train: int) -> int:
    """How many training images to hold out: a tenth, at most 5,000, or 50,000 of ImageNet."""
    return min(num_train // 10, 50_000 if data_set == "IMNET" else 5_000)
