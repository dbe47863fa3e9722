"""Specialised students: data relabelled to a few popular classes and "other", and drawn so that both are
seen.

After EBJR's published notebook (https://arxiv.org/abs/2110.10343): most traffic belongs to few classes, so a
student that knows these, and knows when it does not, answers most of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset


class Popular(Dataset):
    """A data set whose label i stands for class `classes[i]`, and len(classes) for every other one."""

    def __init__(self, base: Dataset, classes: Sequence[int]) -> None:
        self.base, self.number = base, {label: i for i, label in enumerate(classes)}
        self.title = getattr(base, "title", "image")

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.base[index]
        return image, self.number.get(int(label), len(self.number))

    @property
    def labels(self) -> list[int]:
        """All labels."""
        return [self.number.get(int(label), len(self.number)) for label in labels_of(self.base)]


def labels_of(data: Dataset) -> Sequence[int]:
    """The labels of all samples, without reading images where the data set has a list of them."""
    if isinstance(data, Subset):
        labels = labels_of(data.dataset)
        return [labels[i] for i in data.indices]
    for name in ("labels", "targets"):
        if hasattr(data, name):
            return getattr(data, name)
    return [label for _, label in data]


def only_popular(source: Any, classes: Sequence[int]) -> Any:
    """The opened data set (`datasets.Source`) with len(classes) + 1 classes; ValueError for unknown ones."""
    if isinstance(source.train, IterableDataset):
        raise ValueError("--popular_classes needs images by index; a stream has none")
    if (
        len(set(classes)) < len(classes)
        or max(classes) >= source.num_classes
        or len(classes) >= source.num_classes
    ):
        raise ValueError(
            f"--popular_classes {list(classes)}: accepted: different numbers below {source.num_classes}"
        )
    parts = {name: Popular(getattr(source, name), classes) for name in ("train", "test")}
    return dataclasses.replace(source, num_classes=len(classes) + 1, **parts)


def balanced(split: Any, num_popular: int) -> np.ndarray:
    """Chance of each sample of `split` (`datasets.Split` of a `Popular`) to be drawn, [N], summing to 1.

    Every popular class comes as often as the others, and "other" as often as all popular classes together: it
    has the most to tell apart.
    """
    labels = np.asarray(split.base.labels)[list(split.indices)]
    counts = np.bincount(labels, minlength=num_popular + 1)
    if counts.min() == 0:
        raise ValueError(
            f"class {int(counts.argmin())} of the popular classes and other has no training image"
        )
    weights = np.array([0.5 / num_popular] * num_popular + [0.5]) / counts
    return weights[labels] / weights[labels].sum()
