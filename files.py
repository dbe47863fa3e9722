"""Files that are written whole or not at all, and what is said where the system cannot write them."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says in the block, such as that the disk is full, into a UserError of `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own upon that of the file
        said = error if isinstance(error, OSError) else error.__context__
        if not isinstance(said, OSError) or said.errno is None:
            raise
        line = f"cannot write {path}: {said.strerror}"
        if said.errno in FULL:
            place = next(folder for folder in path.absolute().parents if folder.exists())
            line += f"; {shutil.disk_usage(place).free / 1e6:,.1f} MB are free there"
        raise UserError(line) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it replaces `path` on success and is deleted on failure.

    Raises UserError where the system cannot write, such as on a full disk; `path` is then as it was.
    """
    temp = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            yield temp
            _sync(temp)
            os.replace(temp, path)
            _sync(path.parent)  # a rename is safe from a power cut only once its folder is written
        finally:
            temp.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes the file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece: a reader sees the old one or the new one."""
    with replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON text. A number that is NaN or infinite, for which JSON has no word, becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
