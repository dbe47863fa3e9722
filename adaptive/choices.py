"""All policies of an evaluation: the quota sweep, the front of a search, and those that its goals choose."""

from dataclasses import dataclass, replace

from torch import Tensor

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.exits import Exits
from adaptive.goals import Choice, Goal, Menu
from adaptive.guarantees import Demand, guaranteed, split_calibration
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.rules import Rule, expected, policies_of
from adaptive.search import search_front
from adaptive.stage_timing import StageTimes, latency_of
from utils import UserError

DEFAULT_LEVEL = 0.95  # of crc, which does not use it
RISKS = {"budget": "cost", "exit_error": "error"}  # by goals, where they are called otherwise


@dataclass(frozen=True)
class Found:
    """Policies found on calibration images: the rows of a sweep and those given by hand, the points of the
    front if there was a search, and the choices, of which the first is to be deployed."""

    sweep: list[Policy]
    front: list[Policy]
    choices: list[Choice]


@dataclass(frozen=True)
class Calibration:
    """What policies are found with: tables of images as a reading has them, and what stages cost.

    `times` are needed for goals in milliseconds; `seed` draws the halves of a guarantee.
    """

    tables: ExitTables
    reading: Reading
    costs: StageCosts
    times: StageTimes | None = None
    seed: int = 0

    def part(self, samples: Tensor) -> "Calibration":
        """With the images of these indices alone."""
        return replace(self, tables=self.tables.part(samples))


def check_guarantees(exits: Exits, costs: StageCosts) -> None:
    """Raises ValueError for a budget that needs no guarantee: the whole network keeps it."""
    whole = costs.alone()[-1]
    for budget in exits.budget if exits.assures else ():
        if budget >= whole:
            raise UserError(
                f"--budget {budget:.4g} needs no guarantee: "
                f"the last exit alone takes {whole:.4g} multiply-adds"
            )


def find_policies(exits: Exits, rules: list[Rule], calib: Calibration) -> Found:
    """Finds all policies, and chooses by hand and by goals."""
    check_guarantees(exits, calib.costs)
    sweep = policies_of(rules, calib.tables, calib.costs, calib.reading)
    by_hand = exits.row or range(len(exits.ratios), len(sweep))
    choices = [Choice(f"row {i}", sweep[i], "given by hand") for i in by_hand]
    if not exits.goals:
        return Found(sweep, [], choices)
    menu = menu_of(exits, rules, calib)
    timed = timed_menu(exits, rules, calib) if exits.latency else menu
    for goal in exits.goals:
        if exits.assures:
            choices.append(assured(goal, exits, rules, calib))
        else:
            choices.append((timed if goal.kind == "latency" else menu).choose(goal))
    front = list(menu.policies) if exits.policies == "search" else []
    if calib.times:
        front = [timed_policy(policy, exits, calib, calib.times) for policy in front]
    return Found(sweep, front, choices)


def menu_of(exits: Exits, rules: list[Rule], calib: Calibration) -> Menu:
    """What goals choose among: the front of a search, or the rows of the quota sweep."""
    full = calib.tables.full_correct.double().mean().item()
    if exits.policies == "search":
        front = search_front(calib.tables, calib.costs, calib.reading, seed=calib.seed)
        return Menu(front, full, images=len(calib.tables))
    sweep = rules[: len(exits.ratios)]
    return Menu(policies_of(sweep, calib.tables, calib.costs, calib.reading), full, "row", len(calib.tables))


def timed_menu(exits: Exits, rules: list[Rule], calib: Calibration) -> Menu:
    """As `menu_of`, with the latency of every policy; a search is over milliseconds."""
    assert calib.times is not None
    menu = menu_of(exits, rules, replace(calib, costs=calib.times.costs))
    policies = [timed_policy(policy, exits, calib, calib.times) for policy in menu.policies]
    return replace(menu, policies=policies)


def timed_policy(policy: Policy, exits: Exits, calib: Calibration, times: StageTimes) -> Policy:
    """The policy with its latency and its multiply-adds on the calibration images."""
    found = latency_of(policy, calib.tables, times)
    macs = policy.simulate(calib.tables, calib.costs).macs
    return replace(policy, macs=macs, latency_ms=getattr(found, f"{exits.latency_of}_ms"))


def assured(goal: Goal, exits: Exits, rules: list[Rule], calib: Calibration) -> Choice:
    """The cheapest policy that is guaranteed to meet a goal.

    One part of the images finds a path of policies, the other part tests them. The policy's expected accuracy
    is that on the second part.
    """
    full = calib.costs.alone()[-1]
    first, second = split_calibration(len(calib.tables), calib.seed)
    finding = calib.part(first)
    testing = calib.part(second)
    bound = goal.value / full if goal.kind == "budget" else goal.value
    level = exits.confidence_level or DEFAULT_LEVEL
    demand = Demand(RISKS.get(goal.kind, goal.kind), bound, 1 - level, exits.guarantee)
    if exits.policies == "search":
        front = risk_front(
            demand.risk, finding.tables, costs=calib.costs, reading=calib.reading, seed=calib.seed
        )
    else:
        front = list(menu_of(exits, rules, finding).policies)
    policy, guarantee = guaranteed(front, finding.tables, testing.tables, calib.costs, demand)
    policy = replace(expected(policy, testing.tables, calib.costs), guarantee=guarantee)
    if not guarantee.feasible:  # the answers are the last exit's own, whatever the reading is
        policy = replace(policy, accuracy=testing.tables.full_correct.double().mean().item())
    return Choice(f"guaranteed {goal.name}", policy, guarantee.statement)


def risk_front(
    risk: str, finding: ExitTables, *, costs: StageCosts, reading: Reading, seed: int = 0
) -> list[Policy]:
    """The front of a search for a guarantee of this risk, by the images that find it.

    An answer counts as right unless it is wrong where the whole network's is right, so that the front ends
    with policies that do no harm. That of accuracy has none of these where leaving early corrects as many
    answers as it spoils. For a bound on the cost, it is accuracy that is wanted.
    """
    if risk == "cost":
        return search_front(finding, costs, reading, seed=seed)
    harmless = replace(finding, correct=finding.correct | ~finding.full_correct)
    return [replace(policy, accuracy=None) for policy in search_front(harmless, costs, reading, seed=seed)]
