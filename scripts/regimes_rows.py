"""The rows that `compare_regimes.py` compares: read from a YAML file, as flags, and within a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiment.recipe import words_of
from utils import Runtime, UserError

PARTS = {"share", "teacher", "members"}  # of a row, beside flags
PLANNED = {"seed", "epochs", "epoch_images", "warmup_epochs", "output_dir", "disable_eval", "kd_teacher"}
ROUNDED = 1e-3  # of shares, three of which are 0.3333


@dataclass(frozen=True)
class Row:
    """A way to spend the budget on a network, or a cascade of other rows' networks.

    Rows of a family are compared. `flags` are those of main_earlyExit.py. `share` is the part of the budget
    that its own training gets; `teacher` and `members` are the full names of other rows.
    """

    family: str
    title: str
    flags: Mapping[str, Any]
    share: float = 1.0
    teacher: str = ""
    members: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The full name, also of its files."""
        return f"{self.family}-{self.title}"

    @property
    def needs(self) -> list[str]:
        """The rows that are trained before it."""
        return [*self.members, *([self.teacher] if self.teacher else [])]

    @property
    def words(self) -> list[str]:
        """The flags as words of a command line."""
        return sum((words_of(name, value) for name, value in self.flags.items()), [])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, each after those that it needs. Raises ValueError for what is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        common, families = content["common"], content["families"]
        listed = [
            _row(family, title, common, given)
            for family, rows in families.items()
            for title, given in rows.items()
        ]
    except OSError as error:
        raise UserError(f"cannot read rows {path}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"rows {path}: expected common: and families: of rows; {said}") from error
    above: dict[str, Row] = {}
    for row in listed:
        mistake = _mistake(row, above)
        if mistake:
            raise UserError(f"rows {path}: {row.name} {mistake}")
        above[row.name] = row
    return listed


def _mistake(row: Row, above: Mapping[str, Row]) -> str:
    """Why a row below these cannot be trained within the budget; nothing if it can."""
    for name in map(str, row.needs):
        if name not in above:
            return f"needs {name}, which no row above is named"
        if above[name].needs:
            return f"needs {name}, which needs other rows itself"
    fixed = sorted(PLANNED & set(row.flags))
    if fixed:
        return f"has {fixed[0]}, which comparing sets"
    shares = [*([] if row.members else [row.share]), *(above[name].share for name in row.needs)]
    if not all(isinstance(share, int | float) and 0 < share <= 1 for share in shares):
        return f"has share {row.share}, accepted: a number above 0, up to 1"
    if row.needs and abs(sum(shares) - 1) > ROUNDED:
        return f"gets {sum(shares):g} of the budget with what it needs, accepted: 1"
    return ""


def _row(family: str, title: str, common: Mapping[str, Any], given: Mapping[str, Any]) -> Row:
    flags = {**common, **{name: value for name, value in given.items() if name not in PARTS}}
    parts = {name: value for name, value in given.items() if name in PARTS}
    return Row(family, title, flags, **parts)


class Plan(NamedTuple):
    """How long a row trains; `seconds` are what that takes a processor."""

    epochs: int
    epoch_images: int
    seconds: float

    @property
    def words(self) -> list[str]:
        """As flags; a fifth of the epochs is warm-up."""
        lengths = {"epochs": self.epochs, "epoch_images": self.epoch_images}
        return sum((words_of(*one) for one in lengths.items()), ["--warmup_epochs", f"{0.2 * self.epochs:g}"])


def plan_of(row: Row, seconds: float, image_seconds: float, num_train: int) -> Plan:
    """What a budget in `seconds` allows: epochs of whole batches, and of them an even number.

    So each of two phases gets a half.
    """
    batch_size = row.flags.get("batch_size", Runtime.batch_size)
    images = row.share * seconds / image_seconds
    epochs = 2 * max(1, math.ceil(images / num_train / 2))
    steps = min(max(1, round(images / epochs / batch_size)), num_train // batch_size)
    return Plan(epochs, steps * batch_size, epochs * steps * batch_size * image_seconds)


def chosen(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these full names or families, with those that they need; all where there are no names."""
    known = {row.name: row for row in rows}
    wrong = sorted(set(names) - {*known, *(row.family for row in rows)})
    if wrong:
        raise UserError(f"--only {wrong[0]}: accepted: families and rows, {', '.join(known)}")
    wanted = {row.name for row in rows if not names or {row.name, row.family} & set(names)}
    wanted |= {need for name in wanted for need in known[name].needs}
    return [row for row in rows if row.name in wanted]
