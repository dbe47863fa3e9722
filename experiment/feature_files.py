"""Files of features, each written once, in one piece, and found again by what it is of."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from datasets import Data, Split
from utils import Compute, gather, replacing, writing

LOCK = ".features.lock"
SAMPLE = 256  # images whose pixels are compared


def key_of(**facts: Any) -> str:
    """A name that differs where any of these facts does, in 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_hash(data: Data, split: Split) -> str:
    """SHA-256 of the split's rows, of the sizes and times of its files, and of 256 images spread over it."""
    digest = hashlib.sha256(np.asarray(split.indices).tobytes())
    named = [data.data_path, data.eval_data_path, *(split.file(i) for i in range(len(split)))]
    for path in filter(None, named):
        if os.path.isfile(path):
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for i in range(0, len(split), max(1, len(split) // SAMPLE)):
        image, label = split.read(i)
        digest.update(f"{image.size} {label}\n".encode() + image.tobytes())
    return digest.hexdigest()


def mapped(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The table in a file, float32 in this shape, read where it is used; None if there is no such table."""
    with suppress(OSError, ValueError):
        table = np.load(path, mmap_mode="r")
        if table.shape == shape and table.dtype == np.float32:
            return table
    return None


@contextmanager
def alone_in(folder: Path, compute: Compute) -> Iterator[None]:
    """Makes the folder, and waits until no other run writes features into it."""
    if compute.rank > 0:
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def share_of(count: int, compute: Compute) -> range:
    """The rows of a table of `count` that this process computes, one after another."""
    start, stop = (count * rank // compute.world_size for rank in (compute.rank, compute.rank + 1))
    return range(start, stop)


def write_table(path: Path, shape: tuple[int, int], batches: Iterable[np.ndarray], compute: Compute) -> None:
    """Writes a table, of which each process has its share's rows in `batches`, float32 [B, shape[1]].

    It has its name only when all have written. Raises UserError where the disk is full.
    """
    with replacing(path) if compute.rank == 0 else nullcontext() as temp:
        if temp:
            np.lib.format.open_memmap(temp, mode="w+", dtype=np.float32, shape=shape)
        temp = gather(temp, compute)[0]
        start = np.lib.format.open_memmap(temp, mode="r").offset
        with writing(temp), open(temp, "r+b") as file:
            file.seek(start + 4 * shape[1] * share_of(shape[0], compute).start)
            for batch in batches:
                file.write(batch.tobytes())
        gather(None, compute)
    gather(None, compute)
