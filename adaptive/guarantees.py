"""Guarantees for policies: the cheapest policy of a path whose risk is proven to be below a bound.

One part of the calibration images finds a path of policies, from safe to greedy. The other part, which
nothing else has seen, says how far along it the bound holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.guarantee import Guarantee
from adaptive.policy import Policy
from adaptive.risks import RISKS, Outcomes, Tested, difference, evidence, exit_p_values
from utils import UserError

METHODS = {
    "ltt": "Learn-then-Test with fixed-sequence testing, https://arxiv.org/abs/2110.01052",
    "crc": "conformal risk control, https://arxiv.org/abs/2208.02814",
}
STEP = 0.01  # of the full network's cost: policies of a path are at least so far apart


@dataclass(frozen=True)
class Demand:
    """What is to be guaranteed: that `risk`, one of `RISKS`, is at most `bound` (a fraction).

    With `method` "ltt" this holds in all but the share `delta` of draws of the calibration images, with "crc"
    on average over them, and `delta` means nothing. Raises ValueError for what cannot be demanded.
    """

    risk: str
    bound: float
    delta: float = 0.05
    method: str = "ltt"

    def __post_init__(self) -> None:
        if self.risk not in RISKS:
            raise UserError(f"unknown risk {self.risk!r}; accepted: {', '.join(RISKS)}")
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}; accepted: {', '.join(METHODS)}")
        for name, value in {"bound": self.bound, "delta": self.delta}.items():
            if not 0 < value < 1:
                raise UserError(f"{name} {value} of a guarantee; accepted: numbers above 0 and below 1")
        if self.method == "crc" and self.risk == "error":
            raise UserError("crc cannot bound the error at an exit, whose images change with the policy: ltt")


def split_calibration(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Which of n calibration images find the path, and which test it: two halves, int64 indices in order.

    Raises ValueError for fewer than two.
    """
    if n < 2:
        raise UserError(f"{n} calibration images: a guarantee needs some to find policies and others to test")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2].sort().values, order[n // 2 :].sort().values


def never_early(like: Policy) -> Policy:
    """The policy by which no image leaves early, for the same network; its answers are the full network's."""
    early = len(like.thresholds) - 1
    plain = "max_prob" if like.reading.remembers else like.confidence
    return replace(
        like,
        thresholds=(NOBODY,) * early + (EVERYBODY,),
        confidence=plain,
        answer="exit",
        off=tuple(range(early)),
        name="never early",
        accuracy=None,
        macs=None,
        shares=(),
    )


def without_unsure_exits(outcomes: Outcomes, demand: Demand) -> list[Policy]:
    """The policies without those early exits whose own error the images do not show to be below the bound.

    Too few may leave there, or too many of them be wrong. Where the reading allows it, such exits are
    switched off. Policies that are left without early exits are dropped, and so are repetitions.
    """
    unsure = exit_p_values(outcomes, demand.bound) > demand.delta
    kept = []
    for policy, out in zip(outcomes.policies, unsure, strict=True):
        limits = tuple(np.where(out, NOBODY, policy.thresholds[:-1]).tolist())
        if min(limits, default=NOBODY) == NOBODY:
            continue
        if out.any():
            off = policy.off if policy.reading.remembers else tuple(np.flatnonzero(np.equal(limits, NOBODY)))
            policy = replace(policy, thresholds=(*limits, EVERYBODY), off=tuple(map(int, off)))
            policy = replace(policy, accuracy=None, macs=None, shares=())
        kept.append(policy)
    return list(dict.fromkeys(kept))


def path_rows(outcomes: Outcomes, demand: Demand) -> list[int]:
    """The rows of a path from safe to greedy, by the outcomes on the images that find it.

    Greed is to be cheap, or for a bound on the cost to be dear. Policies are `STEP` apart, since chance ends
    a sequence of many close tests early. With ltt, the path begins where these images are surest that the
    bound holds: before that, too few may leave at an exit to tell.
    """
    cost = outcomes.cost.mean(1).numpy()
    sign = 1 if demand.risk == "cost" else -1
    rows: list[int] = []
    for row in np.argsort(sign * cost, kind="stable").tolist():
        if cost[row] < 1 and (not rows or sign * (cost[row] - cost[rows[-1]]) >= STEP):
            rows.append(row)
    if demand.method == "crc" or not rows:
        return rows
    p_values = evidence(outcomes.rows(rows), demand.risk, demand.bound, demand.delta).p_values
    return rows[int(p_values.argmin()) :]


def path_from(
    front: Sequence[Policy], finding: ExitTables, costs: StageCosts | Sequence[float], demand: Demand
) -> list[Policy]:
    """The policies of a front as a path from safe to greedy, by the images that find it; maybe none."""
    policies = list(front)
    if demand.risk == "error" and policies:
        policies = without_unsure_exits(Outcomes.of(policies, finding, costs), demand)
    if not policies:
        return []
    outcomes = Outcomes.of(policies, finding, costs)
    return [policies[row] for row in path_rows(outcomes, demand)]


def certified(outcomes: Outcomes, demand: Demand) -> tuple[int, Tested]:
    """How many policies of a path are certified, by the outcomes on the images that test it; the evidence.

    ltt: the p-value is at most delta, for the policy and for all before it. crc: (sum of losses + 1) /
    (n + 1) is at most the bound, where an image's loss is its largest so far on the path: it never falls.
    """
    if demand.method == "ltt":
        found = evidence(outcomes, demand.risk, demand.bound, demand.delta)
        passed = found.p_values <= demand.delta
    else:
        n = len(outcomes)
        total = outcomes.losses(demand.risk).cummax(0).values.sum(1).numpy()
        passed = (total + max(1.0, outcomes.highest)) / (n + 1) <= demand.bound
        found = Tested(outcomes.risk(demand.risk), np.ones(len(passed)))
    return int(np.append(passed, False).argmin()), found


def smallest_bound(n: int, demand: Demand, lowest: float = 0.0, highest: float = 1.0) -> float:
    """The least bound that n images could certify, if none of them showed a loss.

    `lowest` and `highest` are the costs of an image that are possible, which only a bound on the cost needs.
    """
    if demand.method == "crc":
        floor = lowest if demand.risk == "cost" else 0.0
        return (n * floor + max(1.0, highest)) / (n + 1)
    least = 1 - demand.delta ** (1 / n)
    if demand.risk == "cost":
        return lowest + (highest - lowest) * least
    if demand.risk != "drop":
        return least
    low = least
    high = 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if difference(0, 0, n, middle, demand.delta) <= demand.delta:
            high = middle
        else:
            low = middle
    return high


def images_for(demand: Demand) -> int:
    """The least number of images that could certify a bound, on another risk than the cost."""
    enough = 1
    while smallest_bound(enough, demand) > demand.bound:
        enough *= 2
    few = enough // 2  # too few
    while enough - few > 1:
        middle = (few + enough) // 2
        if smallest_bound(middle, demand) > demand.bound:
            few = middle
        else:
            enough = middle
    return enough


def certify(
    path: Sequence[Policy], testing: ExitTables, costs: StageCosts | Sequence[float], demand: Demand
) -> tuple[Policy, Guarantee]:
    """The last certified policy of a path, and what is guaranteed of it; else never to exit early.

    `testing` are images that nothing else has seen: neither thresholds nor the path nor temperatures may come
    from them. Raises ValueError for an empty path.
    """
    if not path:
        raise UserError("a guarantee needs policies to test")
    early = [policy for policy in path if min(policy.thresholds[:-1], default=NOBODY) < NOBODY]
    outcomes = Outcomes.of(early or path, testing, costs)
    n = len(testing)
    passed, found = certified(outcomes, demand)
    row = max(passed - 1, 0)
    feasible = bool(early) and passed > 0
    ltt = demand.method == "ltt"
    least = smallest_bound(n, demand, outcomes.lowest, outcomes.highest)
    guarantee = Guarantee(
        demand.risk,
        demand.bound,
        demand.delta if ltt else None,
        demand.method,
        feasible,
        n,
        float(found.observed[row]) if early else 0.0,
        float(found.p_values[row]) if early and ltt else None,
        least,
        promise(demand) if feasible else refusal(demand, n, least, len(early)),
        limit(demand, n, least),
        assumption(demand, n),
    )
    return (early[row] if feasible else never_early(path[0])), guarantee


def guaranteed(
    front: Sequence[Policy],
    finding: ExitTables,
    testing: ExitTables,
    costs: StageCosts | Sequence[float],
    demand: Demand,
) -> tuple[Policy, Guarantee]:
    """The greediest policy of a front with this guarantee; else never to exit early.

    The front comes from the images `finding`, of which `testing` has none. Raises ValueError without a front.
    """
    path = path_from(front, finding, costs, demand)
    if front and not path:
        path = [never_early(front[0])]
    return certify(path, testing, costs, demand)


# In words


def percent(fraction: float) -> str:
    """As in "0.25 %"."""
    return f"{100 * fraction:.3g} %"


def promise(demand: Demand) -> str:
    """What a demand promises of new images, in a sentence."""
    bound = percent(demand.bound)
    points = f"{100 * demand.bound:.3g} percentage point{'s' * (demand.bound != 0.01)}"
    what = {
        "drop": f"accuracy on new images is at most {points} below the full network's",
        "harm": f"at most {bound} of new images are answered wrongly where the full network is right",
        "disagreement": f"at most {bound} of new images get another answer than the full network's",
        "error": f"of the new images that leave at any one early exit, at most {bound} are answered wrongly",
        "cost": f"a new image costs on average at most {bound} of what the full network costs",
    }[demand.risk]
    if demand.method == "ltt":
        return f"With {percent(1 - demand.delta)} confidence, {what}."
    return f"On average over draws of the calibration images, {what}."


def refusal(demand: Demand, n: int, least: float, found: int) -> str:
    """Why nothing is guaranteed but what never exiting early gives, in two sentences."""
    text = f"No guarantee of {demand.risk} at most {percent(demand.bound)}, so no image exits early."
    if demand.bound >= least and not found:
        return f"{text} The images that find policies show it of none."
    if demand.bound >= least:
        return f"{text} The {n} images that test it do not show it of even the safest policy that was found."
    if demand.risk == "cost":
        return f"{text} {limit(demand, n, least)}"
    return f"{text} {limit(demand, n, least)} {percent(demand.bound)} takes {images_for(demand)} or more."


def limit(demand: Demand, n: int, least: float) -> str:
    """The least bound that n images could certify, in a sentence."""
    if demand.risk == "cost":
        return f"{n} images certify no cost below {percent(least)}, even if all leave where that is cheapest."
    what = "are answered as by the full network"
    if demand.risk == "error":
        what = "leave at one exit and are answered rightly"
    return f"{n} images certify no {demand.risk} below {percent(least)}, even if all of them {what}."


def assumption(demand: Demand, n: int) -> str:
    """Under what a promise holds, in two sentences."""
    draws = "drawn independently from the same source as" if demand.method == "ltt" else "exchangeable with"
    return (
        f"New images are {draws} the {n} calibration images that tested the policy and did nothing else. "
        "This is a promise for all images together, not for every class, and none once images change."
    )
