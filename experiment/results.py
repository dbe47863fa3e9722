"""Results as data: the records of evaluations in a folder, each a file that `eval_dynamic.py` wrote."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from experiment.record import SCHEMA
from utils import UserError


class Point(NamedTuple):
    """A way to answer: multiply-adds per image, and top-1 accuracy as a fraction."""

    macs: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What one record says, for tables and plots.

    `name` is its file below the folder, without .json. `setting` is what all seeds of one training share: the
    network, how it was trained, data and flags. `exits` are the exits, `front` the policies found, by cost.
    """

    name: str
    network: str
    regime: str
    data_set: str
    num_test: int
    seed: int
    setting: str
    exits: tuple[Point, ...]
    front: tuple[Point, ...]
    content: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, content: Mapping[str, Any]) -> "Result":
        """From a record's content. Raises KeyError, TypeError or ValueError for what is none."""
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}, accepted: {SCHEMA}")
        about, origin = content["provenance"], content["origin"]
        training = dict(origin["training"])
        seed = int(training.pop("seed", 0))
        training.pop("output_dir", None)
        shared = {"network": about["network"], "options": about["options"], **training}
        evaluated = {key: about[key] for key in ("data_set", "num_test", "input_size", "confidence")}
        exits = [Point(float(row["macs"]), float(row["acc1"])) for row in content["anytime"]]
        front = [
            Point(float(row["macs"]), float(row["accuracy"]["value"])) for row in content.get("front", ())
        ]
        return cls(
            name=name,
            network=about["network"],
            regime=regime_of(about["network"], training),
            data_set=about["data_set"],
            num_test=about["num_test"],
            seed=seed,
            setting=json.dumps(shared | evaluated, sort_keys=True),
            exits=tuple(exits),
            front=tuple(sorted(front)),
            content=content,
        )

    def at(self, budget: float) -> float:
        """The accuracy of the best way that costs at most `budget`; nan where none does."""
        return max(
            (one.accuracy for one in (*self.front, *self.exits) if one.macs <= budget), default=math.nan
        )

    def area(self, low: float, high: float) -> float:
        """The mean over log cost, from `low` to `high`, of the best accuracy within a cost."""
        costs = sorted(
            {low, high, *(one.macs for one in (*self.front, *self.exits) if low < one.macs < high)}
        )
        steps = zip(costs, costs[1:], strict=False)
        return sum(self.at(a) * math.log(b / a) for a, b in steps) / math.log(high / low)


def regime_of(network: str, training: Mapping[str, Any]) -> str:
    """How exits were trained, by the flags that differ from their defaults."""
    parts = {
        "boosted": network.startswith("boosted/"),
        "L2W": training.get("l2w"),
        "self-KD": training.get("with_kd"),
        "teacher": training.get("kd_teacher"),
        str(training.get("regime")): training.get("regime"),
        "frozen backbone": training.get("freeze_backbone"),
    }
    return " + ".join(name for name, holds in parts.items() if holds) or "joint"


def read_results(folder: Path) -> list[Result]:
    """All records below a folder, by name. Raises ValueError, in one line, for a file that is none."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            found.append(Result.of(name, json.loads(path.read_text(encoding="utf-8"))))
        except KeyError as error:
            raise UserError(f"{path} is no record of an evaluation: it has no {error.args[0]}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no record of an evaluation: {error}") from error
    return found


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
    """The results of every setting, one per seed, in the order of their names."""
    groups: dict[str, list[Result]] = {}
    for one in results:
        groups.setdefault(one.setting, []).append(one)
    return groups
