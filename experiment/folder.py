"""The folder of a training run: made or found, and held against a second run."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiment.recipe import Recipe
from utils import Compute, UserError, gather, writing

LOCK = ".lock"


@contextmanager
def run_folder(recipe: Recipe, compute: Compute) -> Iterator[Recipe]:
    """The recipe with the folder of its run, which the first process holds for all of them inside the block.

    Without `--output_dir` it is a new one, runs/<model>-<data set>-<time>. Raises UserError, on every
    process, where the folder cannot be made, or is held by another run.
    """
    found = None
    if compute.rank == 0:
        try:
            found = _open_folder(recipe)
        except UserError as error:
            found = error
    found = gather(found, compute)[0]
    if isinstance(found, UserError):
        raise found
    folder, new = found
    try:
        yield replace(recipe, runtime=replace(recipe.runtime, output_dir=str(folder)))
    finally:
        if compute.rank == 0:
            release(folder)
            if new and not any(folder.iterdir()):  # nothing came of it
                folder.rmdir()


def _open_folder(recipe: Recipe) -> tuple[Path, bool]:
    """The folder of the run, held, and whether it was made here under a name of ours."""
    given = recipe.runtime.output_dir
    if given:
        return hold(Path(given)), False
    name = f"{recipe.network.model}-{recipe.data.data_set}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs", name.replace("/", "-"))
    while folder.exists():
        folder = folder.with_name(folder.name + "+")
    hold(folder)
    print(f"no --output_dir is given: log and checkpoints go to {folder}", flush=True)
    return folder, True


def hold(folder: Path) -> Path:
    """Makes the folder and keeps other runs out of it until `release`, or until this process ends, however.

    Raises UserError where another process holds it. The lock is the process's own: its loaders' processes,
    which may outlive it for seconds, do not have it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"--output_dir {folder}: {file.read() or 'another process'} trains into it; "
            "wait for its end, or name another folder"
        ) from None
    except OSError:  # a file system without locks
        return folder
    if not os.fstat(file.fileno()).st_nlink:  # a run that has just ended removed the file
        return hold(folder)
    with writing(folder / LOCK):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _HELD[folder] = file
    return folder


_HELD: dict[Path, Any] = {}


def release(folder: Path) -> None:
    """Lets other runs into the folder."""
    if folder in _HELD:
        (folder / LOCK).unlink(missing_ok=True)
        _HELD.pop(folder).close()
