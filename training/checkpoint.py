"""Checkpoints: written in one step, read without running what they hold, and matched to a model in one clear
line."""

import argparse
import hashlib
import os
import pickle
import re
import shutil
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from utils import replacing

LAST, BEST = "checkpoint-last.pth", "checkpoint-best.pth"
# Not OSError as a whole: torch's reader raises one of its own on some truncated files.
UNREADABLE = (FileNotFoundError, IsADirectoryError, PermissionError, URLError)


def save(path: str | Path, state: dict) -> None:
    """Write `state` (plain types and tensors) to `path`, which at any time holds the old or the new file,
    whole."""
    with replacing(Path(path)) as temp:
        torch.save(state, temp)


def _link(source: Path, path: Path) -> None:
    """Make `path` a second name of the file `source`, or a copy where the file system has no hard links."""
    with replacing(path) as temp:
        temp.unlink(missing_ok=True)  # left by a process that was killed
        try:
            os.link(source, temp)
        except OSError:
            shutil.copyfile(source, temp)


def load(source: str | Path) -> dict:
    """Read a checkpoint file, or an https URL, onto the CPU; tensors and plain types only, nothing in it is
    run.

    `argparse.Namespace`, which the published Dynamic Perceiver files hold, is let in as well. Raises
    ValueError in one line when the file cannot be read, is damaged, is no checkpoint, or holds anything else.
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
        raise ValueError(f"{source} is not a checkpoint: it holds a {type(state).__name__} instead of a dict")
    return state


def _read(source: str) -> object:
    if not source.startswith("https://"):
        return torch.load(source, map_location="cpu", weights_only=True)
    # Many URLs end in the same file name, which alone would name the downloaded copy.
    name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.pth"
    return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True, file_name=name)


def save_epoch(output_dir: str | Path, state: dict, *, epoch: int, best: bool, freq: int, keep: int) -> None:
    """Save the state after epoch `epoch` (from 0) as checkpoint-last.pth, if `best` as checkpoint-best.pth
    too.

    After every `freq` epochs it also stays as checkpoint-{epoch}.pth, of which the newest `keep` are kept.
    The last
    one, which a run goes on from, is written last: whoever is killed before repeats the epoch and misses
    nothing.
    """
    folder, due = Path(output_dir), keep and (epoch + 1) % freq == 0
    first, *others = [*([f"checkpoint-{epoch}.pth"] if due else []), *([BEST] if best else []), LAST]
    save(folder / first, state)
    for name in others:
        _link(folder / first, folder / name)
    for old in numbered(folder)[:-keep] if due else ():
        old.unlink()


def numbered(folder: Path) -> list[Path]:
    """The files checkpoint-<digits>.pth of `folder`, lowest epoch first."""
    epochs = {
        path: re.fullmatch(r"checkpoint-(\d+)\.pth", path.name) for path in folder.glob("checkpoint-*.pth")
    }
    return sorted((path for path, match in epochs.items() if match), key=lambda path: int(epochs[path][1]))


def latest(output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from: the last one, else the highest-numbered one, else None."""
    last = Path(output_dir) / LAST
    candidates = [last] if last.exists() else numbered(Path(output_dir))
    return candidates[-1] if candidates else None


def check_arch(stored: dict, wanted: dict, path: str | Path) -> None:
    """Raise ValueError when the architecture `stored` in `path` is not the `wanted` one, naming what differs.

    Both are dicts of `name`, `options` (a dict) and `num_classes`.
    """
    differences = _differences(
        {key: stored[key] for key in ("name", "num_classes")},
        {key: wanted[key] for key in ("name", "num_classes")},
    )
    if stored["name"] == wanted["name"]:  # another network's options say nothing
        differences += _differences(stored["options"], wanted["options"])
    if differences:
        raise ValueError(f"checkpoint {path} holds another architecture: {'; '.join(differences)}")


def _differences(stored: dict, wanted: dict) -> list[str]:
    keys = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    return [f"{key} is {stored.get(key)!r}, wanted {wanted.get(key)!r}" for key in keys]


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], where: str) -> None:
    """Load `state_dict` into `model`, every key and shape as in the model; `where` says what is being loaded.

    Raises ValueError in one line with the counts and the first of the keys that do not fit.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(_misfit(model.state_dict(), state_dict, where)) from error


def _misfit(own: dict[str, Tensor], given: dict[str, Tensor], where: str) -> str:
    """One line on how the weights `given` differ from those that are the model's `own`."""
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own]
    shapes = {key: (list(given[key].shape), list(own[key].shape)) for key in own if key in given}
    reshaped = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    classes = _class_counts(list(reshaped.values()))
    if classes and not missing and not unexpected:
        return f"{where} has {classes[0]} classes, the model {classes[1]}"
    other = [f"{key} {there} instead of {here}" for key, (there, here) in reshaped.items()]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    return f"{where} does not fit the model: " + "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    )


def _class_counts(pairs: list[tuple[list[int], list[int]]]) -> tuple[int, int] | None:
    """The two numbers of classes, if that is all by which these pairs of shapes differ.

    Then only linear layers differ, all by the same two sizes: the outputs of the heads, and inputs that read
    logits.
    """
    if any(len(there) != len(here) or len(here) > 2 for there, here in pairs):
        return None
    sizes = {(a, b) for there, here in pairs for a, b in zip(there, here, strict=True) if a != b}
    return sizes.pop() if len(sizes) == 1 else None
