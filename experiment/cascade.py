"""The files that a cascade's networks come from: `--networks "NAME:option=value,weights=FILE" ...`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Data
from experiment.members import parse_member, split_weights
from experiment.published import Stored, read, understood
from models.ebjr import Member
from utils import UserError


@dataclass(frozen=True)
class Part:
    """A network of the cascade and the file of its weights."""

    member: Member
    stored: Stored


@dataclass(frozen=True)
class CascadeFiles:
    """All networks of a cascade and, as in a checkpoint, what they were trained on as far as they agree."""

    parts: tuple[Part, ...]
    stored: Stored


def read_cascade(texts: Sequence[str]) -> CascadeFiles:
    """Reads the file that each text names and fills in what the text leaves open.

    A checkpoint of ours stores its network, normalisation, input size and popular classes; published weights
    are normalised as their family was, unless the text says otherwise. Raises ValueError in one line.
    """
    if len(texts) < 2:
        raise UserError(f"--networks {' '.join(texts)}: a cascade has two or more")
    parts = tuple(_read(text) for text in texts)
    return CascadeFiles(parts, _common(parts))


def _read(text: str) -> Part:
    name, words, file = split_weights(text)
    stored = read(file)
    if not name and stored.arch is None:
        raise UserError(f"checkpoint {file} does not name a network known here: write NAME:weights={file}")
    member = parse_member(f"{name or stored.arch['name']}:{words}")
    said = _said_by(stored, member.name).items()
    return Part(
        member._replace(**{key: value for key, value in said if getattr(member, key) is None}), stored
    )


def _said_by(stored: Stored, name: str) -> dict[str, Any]:
    """What a file stores about how its network sees images, under the names of `Member`'s fields."""
    said = stored.values(Data) | stored.sight(name)
    popular = said.get("popular_classes")
    classes = [*popular, -1] if popular else None
    found = {"mean": said.get("mean"), "std": said.get("std"), "classes": classes}
    found = {key: tuple(value) for key, value in found.items() if value}
    return found | ({"size": said["input_size"]} if said.get("input_size") else {})


def _common(parts: Sequence[Part]) -> Stored:
    """The flags of the first of our checkpoints among the files, and the images that all held out."""
    flags = next((part.stored.flags for part in parts if part.stored.flags), {})
    flags = {name: value for name, value in flags.items() if name != "popular_classes"}
    held_out = [part.stored.held_out for part in parts]
    same = all(indices == held_out[0] for indices in held_out)
    return understood({"args": flags, "calib_indices": held_out[0] if same else None}, "of the cascade")
