"""What an exported folder says of itself, of which nothing is believed before it is checked."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from deploy.decide import EVERYBODY, MEMORY, Entries, Policy, RunnerError, shortened

MANIFEST, SCHEMA = "manifest.json", 1
IMAGES = "images"
TYPES = "float32", "float64", "int32", "int64", "uint8", "bool"
INTERPOLATIONS = "bicubic", "bilinear"
LARGEST = 2**31  # numbers in a row of a tensor


@dataclass(frozen=True)
class Port:
    """A named tensor at an end of a stage: its shape without the batch, and its type, as in "float32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class StageFiles(NamedTuple):
    """A stage: the number of its exit, the tensors that it reads and makes, its file in a precision."""

    exit: int
    inputs: list[Port]
    outputs: list[Port]
    path: Path


def read_later(stages: Sequence[Any]) -> list[set[str]]:
    """The names of the tensors that stages after each one read, by their `inputs`."""
    later: set[str] = set()
    found = []
    for stage in reversed(stages):
        found.insert(0, later)
        later = later | {one.name for one in stage.inputs}
    return found


def port_of(row: Entries) -> Port:
    """The tensor that a manifest describes; RunnerError for what is none."""
    name: str = row.one("name", str)
    dtype: str = row.one("dtype", str)
    shape = row.several("shape", int)
    fits = min(shape, default=1) > 0 and prod(shape) <= LARGEST
    if dtype not in TYPES or name in MEMORY or not fits:
        raise RunnerError(f"{row.where} is {shortened(row.content)}, which is no tensor between stages")
    return Port(name, tuple(shape), dtype)


class Folder:
    """An exported folder in one precision; every file that is used is as it was exported.

    `view` says how images are prepared: size, resize (of the short side, 0: no crop), interpolation, mean and
    std. A policy in another file may take the place of the folder's. Raises RunnerError for all else.
    """

    def __init__(self, path: Path, precision: str, policy: str | Path | None = None) -> None:
        self.path = path
        self.said = Entries.of(path / MANIFEST, [SCHEMA])
        self.manifest = self.said.content
        policies = Entries(self.said.one("policies", dict), self.said.start + "policies")
        if precision not in policies.content:
            raise RunnerError(f"precision {precision!r}; accepted: {', '.join(policies.content)}")
        self.class_names: list[str] = self.said.several("class_names", str)
        self.view = self._view()
        weights = "int8" if precision == "int8" else "fp32"
        self.stages = [self._stage(row, weights) for row in self.said.objects("stages")]
        self._check_ports()
        own = self.checked(policies.one(precision, str))
        self.policy = self.fitting(Policy(Path(policy) if policy else own))

    def fitting(self, policy: Policy) -> Policy:
        """The policy itself, if it is one for these stages; RunnerError for others.

        There need not be stages behind an exit where all leave: of the thresholds, those are cut off.
        """
        exits = [stage.exit for stage in self.stages]
        count = exits[-1] + 1
        reached = policy.thresholds[:count]
        ends = reached == policy.thresholds or min(reached) <= EVERYBODY
        missing = set(range(count)) - {*exits, *policy.off}
        if len(reached) < count or not ends or missing:
            asked = [k for k in range(len(policy.thresholds)) if k not in policy.off]
            raise RunnerError(
                f"{policy.path} is for exits {asked}; accepted: {exits} or fewer of them, with the last one"
            )
        ours = self.said.one("model_hash", str)
        if policy.model_hash and policy.model_hash != ours:
            raise RunnerError(
                f"{policy.path} is for weights {policy.model_hash[:12]}, the folder has {ours[:12]}"
            )
        if policy.kind == "margin" and len(self.class_names) < 2:
            raise RunnerError(f"{policy.path}: margin compares two classes, and there is one")
        policy.thresholds = reached
        return policy

    def checked(self, name: str) -> Path:
        """The path of a file in the folder, if it is as it was exported."""
        parts = PurePosixPath(name).parts
        path = self.path.joinpath(*parts)
        digest = self.said.one("files", dict).get(name)
        outside = parts[:1] in [(), ("/",)] or ".." in parts
        if outside or "\\" in name or ":" in name or not name.isprintable():
            raise RunnerError(f"{self.path / MANIFEST} names {shortened(name)}, which is not in the folder")
        try:
            linked = path.resolve() != self.path.resolve().joinpath(*parts)
            changed = linked or self.sha256(path) != digest
        except (OSError, RuntimeError) as error:  # the second of links in a circle
            raise RunnerError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
        if changed:
            raise RunnerError(f"{path} is not the file that was exported")
        return path

    @staticmethod
    def sha256(path: Path) -> str:
        """The hash of a file."""
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _view(self) -> dict[str, Any]:
        given = Entries(self.said.one("view", dict), self.said.start + "view")
        size: int = given.one("size", int)
        resize: int = given.one("resize", int)
        interpolation: str = given.one("interpolation", str)
        mean: list[float] = given.several("mean", float)
        std: list[float] = given.several("std", float)
        fits = 0 < size <= (resize or size) < 65_536
        scales = len(mean) == len(std) == 3 and min(std) > 0
        if not (fits and scales) or interpolation not in INTERPOLATIONS:
            raise RunnerError(f"{given.where} is {shortened(given.content)}, which prepares no image")
        return {"size": size, "resize": resize, "interpolation": interpolation, "mean": mean, "std": std}

    def _stage(self, row: Entries, weights: str) -> StageFiles:
        inputs = [port_of(one) for one in row.objects("inputs")]
        outputs = [port_of(one) for one in row.objects("outputs")]
        path = self.checked(row.one(weights, str))
        return StageFiles(row.one("exit", int), inputs, outputs, path)

    def _check_ports(self) -> None:
        """Refuses stages in another order than that of their exits, or that read what none before makes."""
        size = self.view["size"]
        known = {IMAGES: Port(IMAGES, (3, size, size), "float32")}
        before = -1
        for k, stage in enumerate(self.stages):
            made = {one.name: one for one in stage.outputs}
            unknown = [one for one in stage.inputs if known.get(one.name) != one]
            again = made.keys() & {*known, "ids"}
            if unknown or again or not stage.inputs or stage.exit <= before:
                raise RunnerError(f"{self.said.start}stages[{k}] does not follow from those before it")
            known |= made
            before = stage.exit
        if not self.stages or len(self.stages[0].inputs) > 1:  # there is nothing else to read
            raise RunnerError(f"{self.said.start}stages do not begin with one that reads {IMAGES}")
