"""Checkpoint files: written in one step, read without running what they hold."""

import argparse
import hashlib
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from utils import replacing

LAST, BEST = "checkpoint-last.pth", "checkpoint-best.pth"
# Not OSError as a whole: torch's reader raises one of its own on some truncated files.
UNREADABLE = (FileNotFoundError, IsADirectoryError, PermissionError, URLError)


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` (plain types and tensors); `path` always holds the old or the new file, whole."""
    with replacing(Path(path)) as temp:
        torch.save(state, temp)


def load(source: str | Path) -> dict[str, Any]:
    """Reads a checkpoint file, safetensors or an https URL onto the CPU; nothing in it is run.

    Besides tensors and plain types, `argparse.Namespace` is allowed: the published Dynamic Perceiver files
    hold it. Raises ValueError in one line when the file cannot be read, is damaged, is not a checkpoint, or
    holds anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = _read(str(source))
    except UNREADABLE as error:
        raise ValueError(f"cannot read checkpoint {source}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes can fail anywhere in the reader, with any exception
        refused = (
            re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        )
        if refused:
            held = f"it holds {refused[1]}; only tensors and plain types are loaded"
            raise ValueError(f"checkpoint {source} is refused: {held}") from error
        raise ValueError(f"{source} is truncated or not a checkpoint") from error
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise ValueError(f"{source} is not a checkpoint: it holds a {kind} instead of a dict")
    return state


def _read(source: str) -> object:
    if source.startswith("https://"):
        # Many URLs end in the same file name, so the downloaded copy is named by the whole URL.
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.pth"
        return torch.hub.load_state_dict_from_url(
            source, map_location="cpu", weights_only=True, file_name=name
        )
    if source.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(source)
    return torch.load(source, map_location="cpu", weights_only=True)


def save_epoch(folder: Path, state: dict[str, Any], *, epoch: int, best: bool, freq: int, keep: int) -> None:
    """Saves the state after `epoch` (from 0) as checkpoint-last.pth, if `best` as checkpoint-best.pth too.

    After every `freq` epochs it is also kept as checkpoint-{epoch}.pth, of which the newest `keep` stay. The
    last checkpoint, from which a run resumes, is written last: a run that is killed before repeats the epoch
    and loses nothing.
    """
    due = keep and (epoch + 1) % freq == 0
    names = [LAST]
    if best:
        names.insert(0, BEST)
    if due:
        names.insert(0, f"checkpoint-{epoch}.pth")
    save(folder / names[0], state)
    for name in names[1:]:
        _link(folder / names[0], folder / name)
    for old in numbered(folder)[:-keep] if due else ():
        old.unlink()


def _link(source: Path, path: Path) -> None:
    """Makes `path` a second name of the file `source`, or a copy where the file system has no hard links."""
    with replacing(path) as temp:
        temp.unlink(missing_ok=True)  # left by a process that was killed
        try:
            os.link(source, temp)
        except OSError:
            shutil.copyfile(source, temp)


def numbered(folder: Path) -> list[Path]:
    """The files checkpoint-<digits>.pth of `folder`, lowest epoch first."""
    epochs = {}
    for path in folder.glob("checkpoint-*.pth"):
        match = re.fullmatch(r"checkpoint-(\d+)\.pth", path.name)
        if match:
            epochs[path] = int(match[1])
    return sorted(epochs, key=lambda path: epochs[path])


def latest(folder: str | Path) -> Path | None:
    """The checkpoint to resume from: the last one, else the highest-numbered one, else None."""
    last = Path(folder) / LAST
    candidates = [last] if last.exists() else numbered(Path(folder))
    return candidates[-1] if candidates else None
