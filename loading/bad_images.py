"""Training images that cannot be read: found before the first epoch, and replaced.

Every training image is read once, by all workers and processes, which see the whole file: a header is often
intact where the pixels are cut short. Images met during an epoch could be neither counted over workers and
processes nor left out without changing its order. A readable image of the same split takes the place of a bad
one, so that the order of an epoch, its length and the learning rates do not depend on which images are bad.
"""

from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from loading.loaders import ordered_loader
from loading.sources import Data
from loading.split import Split
from loading.streams import Stream
from utils import Compute, Progress, Runtime, UserError, gather, write_text


class _Faults(Split):
    """[i] -> (why image i of a split cannot be read, else nothing; i)."""

    def __getitem__(self, index: int) -> tuple[str, int]:
        try:
            self.read(index)
        except UserError as error:
            return " ".join(str(error).removeprefix("cannot read image ").split()), index
        return "", index


def find_faults(split: Split, runtime: Runtime, compute: Compute) -> dict[int, str]:
    """The images of a split that cannot be read, by index: name and reason; the same on all processes."""
    loader = ordered_loader(_Faults(split.base, split.indices, split.transform), runtime, compute)
    faults = {}
    for reasons, indices in Progress(loader, "read images", len(loader), shown=compute.rank == 0):
        faults |= {index: reason for reason, index in zip(reasons, indices.tolist(), strict=True) if reason}
    return dict(sorted(pair for part in gather(faults, compute) for pair in part.items()))


def with_readable(split: Split | Stream, data: Data, runtime: Runtime, compute: Compute) -> Split | Stream:
    """The training images as `--on_bad_image` wants them: as they are, or those that can be read.

    Each bad one is replaced by the next one that can be read. They are listed in bad_images.txt, and their
    number is printed. Raises ValueError on every process for more of them than `--max_bad_images` allows.
    """
    if data.on_bad_image == "error":
        return split
    if isinstance(split, Stream):
        raise UserError("--on_bad_image skip needs training images by index; a stream has none")
    faults = find_faults(split, runtime, compute)
    said = f"{len(faults)} of {len(split)} training images cannot be read"
    if runtime.output_dir:
        path = Path(runtime.output_dir, "bad_images.txt")
        if compute.rank == 0:
            write_text(path, "".join(f"{reason}\n" for reason in faults.values()))
        said += f", listed in {path}"
    allowed = min(int(data.max_bad_images * len(split) + 1e-9), len(split) - 1)
    if len(faults) > allowed:
        first = next(iter(faults.values()))
        raise UserError(
            f"{said}; --max_bad_images {data.max_bad_images} allows {allowed}; the first: {first}"
        )
    if compute.rank == 0:
        print(f"{said}; each is replaced by the next one" if faults else "all training images can be read")
    return Split(split.base, _stand_ins(split.indices, faults), split.transform)


def _stand_ins(rows: Sequence[int], faults: Container[int]) -> list[int]:
    """The rows, those at the indices `faults` replaced by the next other one, after the last by the first."""
    good = [index for index in range(len(rows)) if index not in faults]
    nearest = np.searchsorted(good, range(len(rows))) % len(good)
    return [rows[good[place]] for place in nearest]
