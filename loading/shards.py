"""Images in tar shards, read by row: exact counts, any order, and a run resumes at any sample.

The layout is WebDataset's: KEY.jpg beside KEY.cls, which holds the label, or KEY.json with the entry "label",
as img2dataset writes it. Like there, a key ends at the first dot of a file's name. The `webdataset` package
reads shards as streams alone since its `wids` module left it, so that the index here is our own: the headers
of all tars are read once, by `tarfile`, and kept in an .npz file beside them. An image is then one `pread`.
"""

import io
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch.distributed as dist
from PIL import Image

from loading.folders import EXTENSIONS
from loading.pixels import UNREADABLE, decode
from loading.split import Images
from utils import Progress, UserError, replacing

NAMED = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # KEY.EXTENSION; hidden files are none
LABELS = ".cls", ".json"
MOST_LABEL_BYTES = 1 << 20  # of a file that holds a label
MOST_KEY_BYTES = 255  # as of a file's name
MOST_LABEL = 2**31 - 1
MOST_OPEN = 256  # tars that a process keeps open, far below the usual limit of 1,024 files
READERS = 8  # of headers at once: on a network disk each waits for its own
DAMAGED = (*UNREADABLE, tarfile.TarError, OverflowError, MemoryError, RecursionError)


@dataclass
class Tar:
    """The samples of one tar in its order."""

    keys: list[bytes] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # where an image begins, its size in bytes
    labels: list[int] = field(default_factory=list)
    alone: int = 0  # labels without an image


class Shards(Images):
    """The images of all tars of a folder that `pattern` fits: [i] -> (PIL RGB image, int label).

    They are in the order of the tars' names, and in a tar as they stand there: those of tar s are the rows
    from `starts[s]` to `starts[s + 1]`. The headers are read once and kept in the file `index` of the folder,
    if it can be written, until a tar has another size or time. Processes, forked or not, may read one object.
    Raises ValueError in one line for a folder without tars, a damaged tar, keys that come twice, and an image
    without a label.
    """

    def __init__(self, folder: Path, pattern: str = "*.tar", index: str = "index.npz") -> None:
        self._open: dict[int, io.FileIO] = {}
        self.tars = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not self.tars:
            raise UserError(f"no shards in {folder}: accepted: files named {pattern}, not compressed")
        stats = [path.stat() for path in self.tars]
        self.state = {
            "names": np.array([path.name for path in self.tars]),
            "stats": np.array([(one.st_size, one.st_mtime_ns) for one in stats]),
        }
        found = self._kept(folder / index)
        if found is None:
            found = self._read_headers(folder)
            _keep(folder / index, {**self.state, **found})
        self.starts, self.spans, self.keys = found["starts"], found["spans"], found["keys"]
        super().__init__(range(len(self.keys)))
        self.labels = found["labels"]
        alone = int(found["alone"])
        self.notes = [f"{folder}: left out {alone} labels without an image"] if alone else []

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        offset, size = self.spans[index].tolist()
        content = os.pread(self._file(self.shard(index)).fileno(), size, offset)
        if len(content) < size:
            raise UserError("its shard ends before it does")
        return decode(io.BytesIO(content)), int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # each process opens its own files

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def shard(self, index: int) -> int:
        """The number of the tar that holds a row."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def name(self, index: int) -> str:
        """The name of an image in messages: SHARD.tar:KEY."""
        return f"{self.tars[self.shard(index)].name}:{self.keys[index].decode(errors='replace')}"

    def check_labels(self, num_classes: int) -> None:
        """Raises ValueError for an image of no such class."""
        largest = int(self.labels.argmax())
        label = self.labels[largest]
        if label >= num_classes:
            raise UserError(f"{self.name(largest)} has the label {label}, accepted: 0 to {num_classes - 1}")

    def _file(self, shard: int) -> io.FileIO:
        if shard not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = io.FileIO(self.tars[shard])
        return self._open[shard]

    def _kept(self, path: Path) -> dict[str, np.ndarray] | None:
        """The index in a file, if it is whole and of these tars."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = dict(file)
            same = all(np.array_equal(found[name], one) for name, one in self.state.items())
            return found if same and self._fits(found) else None
        except Exception:  # whatever is wrong with it, it is made anew
            return None

    def _fits(self, found: dict[str, np.ndarray]) -> bool:
        """Whether the rows are as many everywhere, and within their tars."""
        starts, spans = found["starts"], found["spans"]
        total = len(spans)
        shapes = {"starts": (len(self.tars) + 1,), "spans": (total, 2), "labels": (total,), "alone": ()}
        numbers = all(found[name].dtype.kind == "i" and found[name].shape == shapes[name] for name in shapes)
        if not numbers or found["keys"].dtype.kind != "S" or found["keys"].shape != (total,):
            return False
        ends = np.repeat(self.state["stats"][:, 0], np.diff(starts))  # of the tar of each row
        inside = (spans >= 0).all() and (spans[:, 0] <= ends - spans[:, 1]).all()
        return bool(inside and starts[0] == 0 and (found["labels"] >= 0).all())

    def _read_headers(self, folder: Path) -> dict[str, np.ndarray]:
        shown = not dist.is_initialized() or dist.get_rank() == 0
        with ThreadPoolExecutor(READERS) as pool:
            parts = pool.map(read_tar, self.tars)
            tars = list(Progress(parts, "read headers of shards", len(self.tars), shown=shown))
        keys = [key for tar in tars for key in tar.keys]
        if not keys:
            raise UserError(f"no image in the shards of {folder}: accepted: KEY{' KEY'.join(EXTENSIONS)}")
        return {
            "starts": np.cumsum([0, *(len(tar.keys) for tar in tars)]),
            "spans": np.array([span for tar in tars for span in tar.spans], np.int64),
            "labels": np.array([label for tar in tars for label in tar.labels], np.int64),
            "keys": np.array(keys),
            "alone": np.array(sum(tar.alone for tar in tars)),
        }


def read_tar(path: Path) -> Tar:
    """The samples of a tar, by its headers; ValueError in one line that names the tar."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, int | None]] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            # Python 3.10 cannot ask an empty tar for more.
            for member in iter(tar.next, None) if tar.firstmember else ():
                tar.members.clear()  # they would take a kilobyte each
                if member.size < 0:
                    raise UserError(f"{member.name} has a negative size")
                named = NAMED.fullmatch(member.name)
                if member.isdir() or named is None:
                    continue
                key, kind = named[1], f".{named[2].lower()}"
                if kind in EXTENSIONS:
                    _check_member(member, key in images)
                    images[key] = member.offset_data, member.size
                elif kind in LABELS:
                    of_key = labels.setdefault(key, {})
                    _check_member(member, kind in of_key)
                    of_key[kind] = _read_label(file, member, kind)
            _check_end(file, tar.offset)
        return _joined(images, labels)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read shard {path}: {reason}") from None


def _check_member(member: tarfile.TarInfo, seen: bool) -> None:
    if seen:
        raise UserError(f"{member.name} comes twice, or beside another image of its key")
    if not member.isreg() or member.issparse():
        raise UserError(f"{member.name} is a link or sparse, accepted: regular files")
    if len(member.name.encode(errors="surrogateescape")) > MOST_KEY_BYTES:
        raise UserError(f"{member.name[:40]}... is longer than {MOST_KEY_BYTES} bytes")


def _read_label(file: BinaryIO, member: tarfile.TarInfo, kind: str) -> int | None:
    """The label in a file; None for one that holds no whole number."""
    if member.size > MOST_LABEL_BYTES:
        return None
    content = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        label = int(content) if kind == ".cls" else json.loads(content)["label"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    if type(label) is not int:
        return None
    if not 0 <= label <= MOST_LABEL:
        raise UserError(f"{member.name} holds the label {label}, accepted: 0 to {MOST_LABEL}")
    return label


def _check_end(file: BinaryIO, offset: int) -> None:
    """Refuses a tar that is cut short, or that goes on behind its end: `tarfile` just stops there."""
    if os.fstat(file.fileno()).st_size < offset + tarfile.BLOCKSIZE:
        raise UserError(f"it is cut short at byte {offset}, without the mark of its end")
    file.seek(offset)
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise UserError(f"it is damaged at byte {offset}, or another tar is behind it")


def _joined(images: dict[str, tuple[int, int]], labels: dict[str, dict[str, int | None]]) -> Tar:
    without = labels.keys() - images.keys()
    found = Tar(alone=sum({*labels[key].values()} != {None} for key in without))
    for key, span in images.items():
        of_key = labels.get(key, {})
        label = of_key.get(".cls", of_key.get(".json"))
        if label is None:
            raise UserError(f"{key} has no label: accepted: a number in {key}.cls, or as label in {key}.json")
        found.keys.append(key.encode(errors="surrogateescape"))
        found.spans.append(span)
        found.labels.append(label)
    return found


def _keep(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the index, if the folder can be written; several processes may do so at once."""
    own = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")
    with suppress(OSError, UserError):
        with replacing(own) as temp, open(temp, "wb") as file:
            np.savez(file, **arrays)
        os.replace(own, path)


def read_classes(*folders: Path) -> tuple[str, ...]:
    """The names of the classes by number, from the classes.txt of these folders; none without one.

    Raises ValueError in one line where they differ, or cannot be read.
    """
    found = {}
    for path in (folder / "classes.txt" for folder in folders):
        try:
            found[path] = tuple(path.read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
    if len({*found.values()}) > 1:
        raise UserError(f"{' and '.join(map(str, found))} must have the same classes in the same order")
    return next(iter(found.values()), ())
