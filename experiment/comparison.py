"""Settings compared with each other: area below the curve and accuracy within budgets, with significance."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy.stats import ttest_ind

from experiment.results import Result, Spread

LEVEL = 0.05  # of significance
Measure = Callable[[Result], float]


class Group(NamedTuple):
    """The results of one setting, one per seed, under a title."""

    title: str
    results: Sequence[Result]


def shared_range(groups: Sequence[Group]) -> tuple[float, float] | None:
    """The costs that the curves of all networks with several exits have in common, if there are any."""
    curves = [one for group in groups for one in group.results if len(one.exits) > 1]
    if not curves:
        return None
    low = max(one.exits[0].macs for one in curves)
    high = min(one.exits[-1].macs for one in curves)
    return (low, high) if low < high else None


def last_exit(result: Result) -> float:
    """Its accuracy."""
    return result.exits[-1].accuracy


def measures_of(groups: Sequence[Group]) -> dict[str, Measure]:
    """What is shown, by head: with a shared range the area and the accuracy within three costs, too.

    The last of these is the largest cost that is shared. A network that costs more than the least has no
    area.
    """
    found: dict[str, Measure] = {"last exit, %": last_exit}
    shared = shared_range(groups)
    if shared:
        low, high = shared
        found[f"area, {low / 1e6:.2f} to {high / 1e6:.2f} M, %"] = lambda one: one.area(low, high)
        for third in (1, 2, 3):
            cost = low * (high / low) ** (third / 3)
            found[f"within {cost / 1e6:.2f} M, %"] = lambda one, cost=cost: one.at(cost)
    return found


def holm(chances: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979); those that are nan stay so and do not count."""
    known = sorted((p, i) for i, p in enumerate(chances) if not math.isnan(p))
    corrected, largest = [*chances], 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = largest
    return corrected


def welch(values: Sequence[float], others: Sequence[float]) -> float:
    """p of Welch's t-test that two means are equal.

    It is nan for less than two values of either, without any spread, or where a value is nan.
    """
    few = min(len(values), len(others)) < 2
    all_same = len({*values}) == len({*others}) == 1
    if few or all_same or any(map(math.isnan, [*values, *others])):
        return math.nan
    return float(ttest_ind(values, others, equal_var=False).pvalue)


def significance(chance: float) -> str:
    """A p value in words."""
    if math.isnan(chance):
        return "–"
    return f"{chance:.2g}{'' if chance < LEVEL else ', not significant'}"


def comparison(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Heads and a row of cells per group, whose title is first; every group is tested against the first.

    That is by the area, or if the first has none by the accuracy within the largest cost at which it has one.
    """
    measures = measures_of(groups)
    values = [
        {name: [*map(measure, group.results)] for name, measure in measures.items()} for group in groups
    ]
    first, *others = values
    names = list(measures)
    preferred = names[1:2] + names[::-1]
    judged = next(name for name in preferred if not any(map(math.isnan, first[name])))
    chances = [math.nan, *holm([welch(one[judged], first[judged]) for one in others])]
    heads = ["", *measures, f"p against {groups[0].title}: {judged.partition(',')[0]}"]
    rows = [
        [group.title, *map(shown, found.values()), significance(chance)]
        for group, found, chance in zip(groups, values, chances, strict=True)
    ]
    return heads, rows


def shown(values: Sequence[float]) -> str:
    """Mean and deviation of fractions, in percent."""
    return "–" if any(map(math.isnan, values)) else Spread.of(values).text(100)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
