"""Specialised students: labels reduced to a few popular classes and "other", sampled so that both occur.

After EBJR's published notebook (https://arxiv.org/abs/2110.10343): most traffic belongs to few classes, so a
student that knows these, and recognises everything else as other, answers most of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from loading.sources import Source
from loading.split import Images
from loading.streams import Stream
from utils import UserError


class Popular(Images):
    """A data set in which label i stands for class `classes[i]`, and len(classes) for all others."""

    def __init__(self, base: Images, classes: Sequence[int]) -> None:
        super().__init__(base)
        self.numbers = {label: i for i, label in enumerate(classes)}

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.base[index]
        return image, self._number(label)

    @cached_property
    def labels(self) -> Sequence[int]:
        """All labels."""
        return list(map(self._number, self.base.labels))

    def _number(self, label: int) -> int:
        return self.numbers.get(int(label), len(self.numbers))


def only_popular(source: Source, classes: Sequence[int]) -> Source:
    """The data set with len(classes) + 1 classes; ValueError for unknown ones."""
    if isinstance(source.train, Stream) or isinstance(source.test, Stream):
        raise UserError("--popular_classes needs images by index; a stream has none")
    total = source.num_classes
    if len({*classes}) < len(classes) or max(classes) >= total or len(classes) >= total:
        raise UserError(f"--popular_classes {list(classes)}: accepted: different numbers below {total}")
    names = [source.class_names[label] for label in classes]
    train, test = Popular(source.train, classes), Popular(source.test, classes)
    return replace(source, train=train, test=test, class_names=(*names, "other"))


def balanced(labels: Sequence[int], num_popular: int) -> np.ndarray:
    """Sampling weight of each sample with one of these labels, [N], summing to 1.

    Every popular class is drawn as often as the others, and "other" as often as all popular classes together,
    since it has the most to distinguish. Raises ValueError where one of them has no image.
    """
    counts = np.bincount(labels, minlength=num_popular + 1)
    if counts.min() == 0:
        raise UserError(f"class {counts.argmin()} of the popular classes and other has no training image")
    weights = np.array([0.5 / num_popular] * num_popular + [0.5]) / counts
    chances = weights[labels]
    return chances / chances.sum()
