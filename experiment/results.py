"""Results as data: the records of evaluations in a folder, each a file that `eval_dynamic.py` wrote."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, TypeVar

from experiment.layout import About, Origin, RecordFile, read_record
from utils import UserError

Read = TypeVar("Read")
NAME = re.compile(r"[\w./+@-]+")  # of a file, without its end
PUBLISHED = "published"  # the folder of points that were not measured here
MOST_BYTES = 100_000  # of a file
# Flags of a training that are no part of its setting; which data it had is told by their hashes.
OWN = ("seed", "output_dir", "num_workers", "device", "data_path", "eval_data_path")
EVALUATED = ("data_set", "num_test", "input_size", "confidence", "weights", "procedure", "backend")


class Point(NamedTuple):
    """A way to answer: multiply-adds per image, and top-1 accuracy as a fraction.

    Within a budget the one with the largest `expected` is chosen, which knows nothing of the test images: a
    policy's accuracy on the images that it was found on, or the number of an exit.
    """

    macs: float
    accuracy: float
    expected: float


@dataclass(frozen=True)
class Result:
    """What one record says, for tables and plots.

    `name` is its file below the folder, without .json. `setting` is what all seeds of one training share: the
    network, how it was trained, data and flags. `exits` are the exits, `front` the policies found, by cost.
    """

    name: str
    regime: str
    setting: str
    exits: tuple[Point, ...]
    front: tuple[Point, ...]
    record: RecordFile

    @classmethod
    def of(cls, name: str, content: Any) -> "Result":
        """From a record's content. Raises ValueError, which names the field, for what is none.

        So it does for a name that could break a table.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"it is called {name!r}, accepted: letters, digits and . _ + @ - alone")
        record = read_record(content)
        about, origin = content["provenance"], content["origin"]
        training = shared_by_seeds(origin["training"])
        shared = {"network": about["network"], "options": about["options"], **training}
        evaluated = {key: about.get(key) for key in EVALUATED}
        data = {"test": record.origin.test, "files": sorted(record.origin.files.values())}
        return cls(
            name=name,
            regime=regime_of(about, len(record.anytime), training),
            setting=json.dumps(shared | evaluated | data, sort_keys=True),
            exits=tuple(Point(row.macs, row.acc1, k) for k, row in enumerate(record.anytime)),
            front=tuple(
                sorted(Point(row.macs, row.accuracy.value, row.policy.accuracy) for row in record.front)
            ),
            record=record,
        )

    @property
    def stem(self) -> str:
        """The name of its file without the seed: "msdnet" for cifar10/msdnet-0 and cifar10/msdnet-seed0."""
        return re.sub(r"-(seed)?\d+$", "", self.name.rpartition("/")[2])

    @property
    def folder(self) -> str:
        """Where its file is, below the folder of all: "cifar10", or "." at the top."""
        return self.name.rpartition("/")[0] or "."

    @property
    def about(self) -> About:
        """What was evaluated."""
        return self.record.provenance

    @property
    def origin(self) -> Origin:
        """Where the figures come from."""
        return self.record.origin

    @property
    def seed(self) -> int:
        """That of the training."""
        return self.origin.training.seed

    @property
    def costs(self) -> list[float]:
        """Multiply-adds of the exits."""
        return [point.macs for point in self.exits]

    def at(self, budget: float) -> float:
        """The accuracy of the best policy that costs at most `budget`, or without one of the best exit.

        The best is what is expected to be; nan where nothing costs so little.
        """
        cheap = [[one for one in ways if one.macs <= budget] for ways in (self.front, self.exits)]
        within = cheap[0] or cheap[1]
        return max(within, key=lambda one: one.expected).accuracy if within else math.nan

    def area(self, low: float, high: float) -> float:
        """The mean over log cost, from `low` to `high`, of the accuracy within a cost."""
        between = [one.macs for one in (*self.front, *self.exits) if low < one.macs < high]
        costs = sorted({low, high, *between})
        steps = zip(costs, costs[1:], strict=False)
        return sum(self.at(a) * math.log(b / a) for a, b in steps) / math.log(high / low)


def shared_by_seeds(training: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a training, and of those of a cascade's members, that all of its seeds have."""
    shared = {key: value for key, value in training.items() if key not in OWN}
    return shared | (
        {"members": [*map(shared_by_seeds, training["members"])]} if "members" in training else {}
    )


def regime_of(about: Mapping[str, Any], exits: int, training: Mapping[str, Any]) -> str:
    """How so many exits of a network were trained, by the flags that differ from their defaults."""
    if "networks" in about["options"]:
        return "cascade"
    interval = training.get("meta_interval", 1)
    parts = {
        "boosted": about["network"].startswith("boosted/"),
        "L2W" if interval == 1 else f"L2W, 1 step in {interval}": training.get("l2w"),
        "self-KD": training.get("with_kd"),
        "teacher": training.get("kd_teacher"),
        str(training.get("regime")): training.get("regime"),
        "frozen backbone": training.get("freeze_backbone"),
    }
    found = " + ".join(name for name, holds in parts.items() if holds)
    return found or ("single exit" if exits == 1 else "joint")


def read_results(folder: Path) -> list[Result]:
    """All records below a folder, by name, but for published points.

    Raises ValueError, in one line that names file and field, for a file that is none, for weights that were
    evaluated in one setting on one machine twice, and for exits that cost more or less than in another
    record of their setting.
    """
    found: dict[tuple[str, ...], Result] = {}
    first: dict[str, Result] = {}  # of every setting
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name.startswith(f"{PUBLISHED}/"):
            continue
        one = read_as(path, "record of an evaluation", lambda content, name=name: Result.of(name, content))
        key = (one.setting, one.origin.model, one.origin.made.machine)
        if key in found:
            same = "setting, weights and machine are the same"
            raise UserError(f"{path} is {found[key].name}.json again: {same} (seed {one.seed})")
        found[key] = one
        other = first.setdefault(one.setting, one)
        if one.costs != other.costs:
            raise UserError(
                f"{path}: exits cost {one.costs}, in {other.name}.json of its setting {other.costs}"
            )
    return list(found.values())


def read_as(path: Path, what: str, reader: Callable[[Any], Read]) -> Read:
    """A file of JSON by its reader. Raises ValueError, in one line that names file and field, otherwise."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, accepted: up to {MOST_BYTES:,}")
        return reader(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is no {what}: {error}") from error


class Spread(NamedTuple):
    """The mean and the standard deviation (of samples) of n values; without one for a single value."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value or more."""
        return cls(mean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """As in "83.66 ± 0.12 (n = 3)", times `scale`."""
        spread = "" if math.isnan(self.std) else f" ± {scale * self.std:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{spread} (n = {self.n})"


def by_setting(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of every setting in the order of their names, one of each training."""
    groups: dict[str, dict[str, Result]] = {}
    for one in results:
        groups.setdefault(one.setting, {}).setdefault(one.origin.model, one)
    return {setting: list(group.values()) for setting, group in groups.items()}
