"""What the exits, and a policy, do to the images of each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.exit_tables import ExitTables


@dataclass(frozen=True)
class ClassRow:
    """What a policy does to the images of one class: fractions of its `images`.

    `exits` [K] is the accuracy of each exit for all of them, `shares` [K] how many leave at each exit,
    `accuracy` that of the answers they leave with.
    """

    name: str
    images: int
    exits: list[float]
    shares: list[float]
    accuracy: float


def class_rows(tables: ExitTables, exit_of: Tensor, class_names: Sequence[str] = ()) -> list[ClassRow]:
    """The row of every class that has images, in the order of classes; `exit_of` [N] says where images leave.

    A class without a name is called by its number.
    """
    targets = tables.targets.cpu()
    left_at = exit_of.cpu()
    correct = tables.correct.cpu()
    num_exits = len(correct)
    images = torch.bincount(targets)

    def share(chosen: Tensor) -> Tensor:
        """The fraction of the images of each class that are among those chosen, bool [N]."""
        return torch.bincount(targets[chosen], minlength=len(images)).double() / images

    exits = torch.stack([share(right) for right in correct], 1).tolist()
    shares = torch.stack([share(left_at == k) for k in range(num_exits)], 1).tolist()
    accuracy = share(correct.gather(0, left_at[None])[0]).tolist()
    names = [*class_names, *map("class {}".format, range(len(class_names), len(images)))]
    return [
        ClassRow(names[c], int(images[c]), exits[c], shares[c], accuracy[c])
        for c in images.nonzero()[:, 0].tolist()
    ]


def worst_and_best(rows: Sequence[ClassRow], each: int = 10) -> list[ClassRow]:
    """All rows, the least accurate first; of more than 2 * `each`, as many from either end."""
    ranked = sorted(rows, key=lambda row: row.accuracy)
    return ranked if len(ranked) <= 2 * each else ranked[:each] + ranked[-each:]
