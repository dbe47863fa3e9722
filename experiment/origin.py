"""Where the figures of an evaluation come from: enough to repeat it, and to tell if two are comparable."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive.policy import Made, content_hash, model_hash
from datasets import Data
from experiment.provenance import made
from experiment.recipe import DEFAULTS
from experiment.samples import Seen
from experiment.subject import Subject

CHUNK = 2**20  # bytes read at once


@dataclass(frozen=True)
class Origin:
    """The command, what it ran on, and how the network was trained.

    `model` is the SHA-256 of the weights; `test` and `calib` those of the labels of the images reported on
    and of those that thresholds were chosen on, in order ("" for none); `files` those of the data's files, by
    name. `training` and `evaluation` are the flags that differ from their defaults, and the seed; of a
    checkpoint that does not say how it was trained, `training` has the default seed alone. Of a cascade it is
    what its networks have in common, and `members` those flags of each.
    """

    made: Made
    model: str
    test: str
    calib: str
    files: dict[str, str]
    training: dict[str, Any]
    evaluation: dict[str, Any]


def origin_of(subject: Subject, seen: Seen) -> Origin:
    """Where the figures of this evaluation come from; reads data that are single files, to hash them."""
    data, calib = subject.recipe.data, seen.calib
    opened = subject.opened
    training = changed(opened.recipe.flags())
    if opened.members:
        members = [changed(one.flags()) for one in opened.members]
        training = in_common(training, members) | {"members": members}
    origin = made(
        subject.compute.device,
        data_set=data.data_set,
        images=seen.origin,
        num_images=0 if calib is None else len(calib),
        precision=subject.recipe.exits.precision,
    )
    return Origin(
        made=origin,
        model=model_hash(subject.network),
        test=content_hash({"test": seen.test.targets}),
        calib="" if calib is None else content_hash({f"{data.data_set}: {seen.origin}": calib.targets}),
        files=hashes_of(data),
        training=training,
        evaluation=changed(subject.recipe.flags()) | dict(subject.recipe.options),
    )


def in_common(training: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all networks of a cascade were trained by."""
    return {k: value for k, value in training.items() if all(one.get(k) == value for one in members)}


def hashes_of(data: Data) -> dict[str, str]:
    """The SHA-256 of the data's files by name; folders have none."""
    named = (Path(path) for path in (data.data_path, data.eval_data_path) if path)
    return {path.name: file_hash(path) for path in named if path.is_file()}


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def changed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that differ from their defaults, and the seed."""
    return {name: value for name, value in flags.items() if name == "seed" or value != DEFAULTS[name]}
