"""Writes class folders as tar shards in WebDataset's layout, which `--data_set shards` reads.

    python scripts/make_shards.py $DATA/imagenet/train shards/train
    python scripts/make_shards.py $DATA/imagenet/val shards/val --megabytes 250
    python main_earlyExit.py --model msdnet --data_set shards --data_path shards

Image files are copied byte for byte, in an order shuffled once, as NUMBER-NAME.EXTENSION and NUMBER-NAME.cls,
and the names of the classes to classes.txt. The same folders give the same shards. The target folder gets its
name when all is written: what an interrupted call leaves is a hidden folder, which the next call replaces.
"""

import io
import os
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common import read_flags, word

import numpy as np

from loading.folders import Folders
from utils import Progress, UserError, option, run_main, writing


@dataclass(frozen=True)
class Flags:
    """What is written."""

    source: Path = word("folder of class folders")
    target: Path = word("folder to write, which is not there yet")
    megabytes: float = option(500, "largest size of a shard with more than one image", low=0)


def plan(tree: Folders, megabytes: float) -> list[list[int]]:
    """The rows of each shard, shuffled."""
    shards: list[list[int]] = []
    room = 0.0
    for row in np.random.default_rng(0).permutation(len(tree)).tolist():
        size = os.path.getsize(tree.file(row)) + 4 * tarfile.BLOCKSIZE  # with headers and the label
        if size > room:
            shards.append([])
            room = megabytes * 1e6
        shards[-1].append(row)
        room -= size
    return shards


def write_tar(path: Path, tree: Folders, rows: Iterable[int]) -> None:
    """Writes one shard; the number in a key is the image's row in the folders."""
    with tarfile.open(path, "w") as tar:
        for row in rows:
            file = Path(tree.file(row))
            key = f"{row:08d}-{file.stem.replace('.', '_')}"  # a key ends at the first dot
            contents = {file.suffix.lower(): file.read_bytes(), ".cls": str(tree.labels[row]).encode()}
            for suffix, content in contents.items():
                info = tarfile.TarInfo(key + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def main(argv: list[str]) -> None:
    """The command line."""
    flags = read_flags(Flags, argv, __doc__)
    if flags.target.exists():
        raise UserError(f"{flags.target} is there already; name another folder, or delete it")
    tree = Folders(flags.source)
    shards = plan(tree, flags.megabytes)
    partial = flags.target.with_name(f".{flags.target.name}.partial")
    with writing(flags.target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, rows in enumerate(Progress(shards, "write shards", len(shards), shown=True)):
            write_tar(partial / f"{flags.target.name}-{number:06d}.tar", tree, rows)
        classes = "".join(f"{name}\n" for name in tree.classes)
        (partial / "classes.txt").write_text(classes, encoding="utf-8")
        os.rename(partial, flags.target)
    for note in tree.notes:
        print(note)
    print(
        f"wrote {len(tree)} images of {len(tree.classes)} classes in {len(shards)} shards to {flags.target}"
    )


if __name__ == "__main__":
    run_main(main)
