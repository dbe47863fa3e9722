"""Checkpoint files: written in one step, read without running what they hold."""

import argparse
import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiment.verify import Damaged, check_file, check_unpacked
from utils import UserError, replacing

LAST, BEST = "checkpoint-last.pth", "checkpoint-best.pth"


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` (plain types and tensors); `path` always holds the old or the new file, whole."""
    # By a file of ours, since torch's own does not say why it cannot write.
    with replacing(Path(path)) as temp, open(temp, "wb") as file:
        torch.save(state, file)


def load(source: str | Path, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """Reads a checkpoint file, safetensors or an https URL onto the CPU; nothing in it is run.

    Besides tensors and plain types, `argparse.Namespace` is allowed: the published Dynamic Perceiver files
    hold it; so are the classes and functions in `allowed`. Raises ValueError in one line when the file cannot
    be read, is damaged (`Damaged`), is not a checkpoint, unpacks to far more than its size, or holds anything
    else.
    """
    try:
        path = _local(str(source))
        check_file(path)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {source}: {error.strerror or error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            state = _read(path)
    except Exception as error:  # damaged bytes can fail anywhere in the reader, with any exception
        refused = (
            re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        )
        if refused:
            held = f"it holds {refused[1]}; only tensors and plain types are loaded"
            way_out = "scripts/convert_checkpoint.py rewrites a file that holds no worse than NumPy's numbers"
            raise UserError(f"checkpoint {source} is refused: {held}; {way_out}") from error
        raise Damaged(f"{source} is truncated or not a checkpoint") from error
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise UserError(f"{source} is not a checkpoint: it holds a {kind} instead of a dict")
    check_unpacked(state, path.stat().st_size, source)
    return state


def _local(source: str) -> Path:
    """The file, or a downloaded copy, which is named by the whole URL: many end in the same file name."""
    if not source.startswith("https://"):
        return Path(source)
    name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.pth"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source, str(path))
    return path


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def save_epoch(folder: Path, state: dict[str, Any], *, epoch: int, best: bool, freq: int, keep: int) -> None:
    """Saves the state after `epoch` (from 1) as checkpoint-last.pth, if `best` as checkpoint-best.pth too.

    After every `freq` epochs it is also kept as checkpoint-{epoch}.pth, of which the newest `keep` stay. The
    last checkpoint, from which a run resumes, is written last: a run that is killed before repeats the epoch
    and loses nothing.
    """
    due = keep and epoch % freq == 0
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


def latest(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to resume from: the last one, else the highest-numbered one, else None.

    In place of a damaged one it is the newest intact one of all in the folder, which `say` is told. Raises
    ValueError if there is none.
    """
    last, best = Path(folder) / LAST, Path(folder) / BEST
    files = [path for path in (last, *numbered(Path(folder))[::-1]) if path.exists()]
    if not files:
        return None
    try:
        if not check_file(files[0]):
            load(files[0])
        return files[0]
    except Damaged as error:
        damage = str(error)
    places = {path: place for path in (*files[1:], best) if (place := _place(path)) is not None}
    if not places:
        raise UserError(f"{damage}; no intact checkpoint is beside it")
    newest = max(places, key=lambda path: places[path])
    say(f"{damage}; going on from the newest intact one beside it, {newest.name}")
    return newest


def _place(path: Path) -> tuple[int, int] | None:
    """The last whole epoch of a run's checkpoint and the batches after it; None if it cannot be read."""
    try:
        state = load(path)
    except UserError:
        return None
    epoch, partial = state.get("epoch"), state.get("partial")
    batch = partial.get("batch", 0) if isinstance(partial, dict) else 0
    return (epoch, batch) if isinstance(epoch, int) and isinstance(batch, int) else None
