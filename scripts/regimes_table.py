"""What `compare_regimes.py` shows of the records of its runs: a table per family, with significance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regimes_rows import Row
from scipy.stats import ttest_ind

from experiment.results import Result, Spread

LEVEL = 0.05  # of significance
Measure = Callable[[Result], float]


@dataclass(frozen=True)
class Outcome:
    """A row's results, one per seed, and the seconds of its training, with what it needs.

    `planned` are processor seconds by the timing of steps, `wall` those that passed, a mean over seeds.
    """

    row: Row
    results: Sequence[Result]
    planned: float
    wall: float


def shared_range(outcomes: Sequence[Outcome]) -> tuple[float, float] | None:
    """The costs that the curves of all networks with several exits have in common, if there are any."""
    curves = [one for outcome in outcomes for one in outcome.results if len(one.exits) > 1]
    if not curves:
        return None
    low = max(one.exits[0].macs for one in curves)
    high = min(one.exits[-1].macs for one in curves)
    return (low, high) if low < high else None


def last_exit(result: Result) -> float:
    """Its accuracy."""
    return result.exits[-1].accuracy


def measures_of(outcomes: Sequence[Outcome]) -> dict[str, Measure]:
    """What is shown, by head: with a shared range the area and the accuracy within three costs, too.

    The last of these is the largest cost that is shared. A network that costs more than the least has no
    area.
    """
    found: dict[str, Measure] = {"last exit, %": last_exit}
    shared = shared_range(outcomes)
    if shared:
        low, high = shared
        found[f"area, {low / 1e6:.2f} to {high / 1e6:.2f} M, %"] = lambda one: one.area(low, high)
        for third in (1, 2, 3):
            cost = low * (high / low) ** (third / 3)
            found[f"within {cost / 1e6:.2f} M, %"] = lambda one, cost=cost: one.at(cost)
    return found


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number (Holm, 1979); those that are nan stay so and do not count."""
    known = sorted((p, name) for name, p in chances.items() if not math.isnan(p))
    corrected, largest = dict(chances), 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[name] = largest
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


def family_table(outcomes: Sequence[Outcome]) -> list[str]:
    """A table in Markdown; every row is tested against the first.

    That is by the area, or if the first has none by the accuracy within the largest cost at which it has one.
    """
    measures = measures_of(outcomes)
    values = {
        outcome.row.title: {name: [*map(measure, outcome.results)] for name, measure in measures.items()}
        for outcome in outcomes
    }
    first, *others = (outcome.row.title for outcome in outcomes)
    names = list(measures)
    preferred = names[1:2] + names[::-1]
    judged = next(name for name in preferred if not any(map(math.isnan, values[first][name])))
    chances = holm({title: welch(values[title][judged], values[first][judged]) for title in others})
    heads = [
        outcomes[0].row.family,
        "planned, s",
        "wall, s",
        *measures,
        f"p against {first}: {judged.partition(',')[0]}",
    ]
    lines = [heads, ["---"] * len(heads)]
    for outcome in outcomes:
        title = outcome.row.title
        cells = [f"{outcome.planned:.0f}", f"{outcome.wall:.0f}", *map(shown, values[title].values())]
        lines.append([title, *cells, significance(chances.get(title, math.nan))])
    return [f"| {' | '.join(line)} |" for line in lines]


def shown(values: Sequence[float]) -> str:
    """Mean and deviation of fractions, in percent."""
    return "–" if any(map(math.isnan, values)) else Spread.of(values).text(100)
