"""Where results come from: the command, the commit of this repository, the versions of packages."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from adaptive.policy import Made
from experiment.record import describe_machine

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch", "torchvision", "timm", "numpy"


def made(
    device: torch.device,
    *,
    data_set: str = "",
    images: str = "",
    num_images: int = 0,
    precision: str = "fp32",
    argv: Sequence[str] | None = None,
) -> Made:
    """How a policy of this process is made, from `num_images` `images` of a data set on a device.

    `argv` is the command, by default that of this process.
    """
    return Made(
        command=command_line(argv),
        data_set=data_set,
        images=images,
        num_images=num_images,
        machine=describe_machine(device),
        commit=commit_of(ROOT),
        versions=versions(),
        precision=precision,
    )


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command of this process as a line for a shell, with paths as they were given."""
    return shlex.join(["python", *(sys.argv if argv is None else argv)])


def versions() -> tuple[str, ...]:
    """Python and the packages that results depend on, as in "torch 2.6.0"; those not installed are absent."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def commit_of(root: Path) -> str:
    """The commit of the repository at `root`, with " with changes" for files that differ from it.

    Empty without git, and where `root` is only a folder in the repository of something else.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or not top or Path(top).resolve() != root.resolve():
        return ""
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit + " with changes" * bool(changes) if commit else ""


def _git(root: Path, *words: str) -> str | None:
    """What git says, without waiting for it for long; None where it fails or there is none."""
    command = ["git", "-C", str(root), "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
