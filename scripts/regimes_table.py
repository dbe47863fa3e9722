"""What `compare_regimes.py` shows of the records of its runs: a table per family."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regimes_rows import Row

from experiment.comparison import Group, comparison, markdown
from experiment.results import Result


@dataclass(frozen=True)
class Outcome:
    """A row's results, one per seed, and the seconds of its training, with what it needs.

    `planned` are processor seconds by the timing of steps, `wall` those that passed, a mean over seeds.
    """

    row: Row
    results: Sequence[Result]
    planned: float
    wall: float


def family_table(outcomes: Sequence[Outcome]) -> str:
    """A table in Markdown: every row is tested against the first."""
    heads, rows = comparison([Group(one.row.title, one.results) for one in outcomes])
    for one, cells in zip(outcomes, rows, strict=True):
        cells[1:1] = [f"{one.planned:.0f}", "–" if math.isnan(one.wall) else f"{one.wall:.0f}"]
    return markdown([outcomes[0].row.family, "planned, s", "wall, s", *heads[1:]], rows)
