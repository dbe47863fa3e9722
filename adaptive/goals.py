"""What users want of a policy, in their units, and which of many policies meets it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptive.policy import Policy
from adaptive.thresholds import cheapest, within_budget
from utils import UserError

# Goals that only a guarantee can meet: nothing else says what they need.
ASSURED = "harm", "disagreement", "exit_error"
UNITS = {"ms": 1.0, "s": 1e3, "us": 1e-3}


def milliseconds(text: str) -> float:
    """A time such as 5ms, 0.005s or 5 (milliseconds); ValueError for anything else."""
    found = re.fullmatch(r"([0-9.e+-]+) *(ms|us|s)?", text.strip().lower())
    try:
        value = float(found[1]) * UNITS[found[2] or "ms"] if found else -1.0
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise UserError(f"--latency {text}: accepted: times above 0 such as 5ms, 0.005s or 5 (milliseconds)")
    return value


@dataclass(frozen=True)
class Goal:
    """A limit for a policy.

    `kind` is "budget" (multiply-adds per image), "latency" (milliseconds), "accuracy" (the least, a
    fraction), "drop" (accuracy lost against the whole network, a fraction), or one of `ASSURED`: the share of
    images answered wrongly where the whole network is right, the share of answers unlike its own, and the
    share of errors among the images that leave at each exit. `of` says which latency is limited: "mean" or a
    percentile such as "p95".
    """

    kind: str
    value: float
    of: str = "mean"

    @property
    def name(self) -> str:
        """A short name for the policy that meets it."""
        if self.kind == "budget":
            return f"budget {self.value / 1e6:.4g} M"
        if self.kind == "latency":
            return f"latency {self.value:.4g} ms{self._percentile}"
        return f"{self.kind.replace('_', ' ')} {100 * self.value:.4g} %"

    @property
    def _percentile(self) -> str:
        return "" if self.of == "mean" else f" ({self.of})"

    @property
    def words(self) -> str:
        """The limit as a user says it."""
        return {
            "budget": f"within {self.value / 1e6:.4g} M multiply-adds",
            "latency": f"within {self.value:.4g} ms{self._percentile}",
            "accuracy": f"with {100 * self.value:.2f} % or more",
            "drop": f"at most {100 * self.value:.4g} points below the whole network",
            "harm": f"with at most {100 * self.value:.4g} % wrong where the whole network is right",
            "disagreement": f"with at most {100 * self.value:.4g} % of answers unlike the whole network's",
            "exit_error": f"with at most {100 * self.value:.4g} % errors among those that leave at each exit",
        }[self.kind]


@dataclass(frozen=True)
class Choice:
    """A policy to use, the name it goes by, and why it was chosen."""

    name: str
    policy: Policy
    reason: str


@dataclass(frozen=True)
class Menu:
    """What goals choose among: policies whose accuracy and cost on calibration images are known.

    Each is called `label` and its number, or without a label by the goal that it meets. `full` is the
    accuracy of the whole network on these images, of which there are `images`.
    """

    policies: Sequence[Policy]
    full: float
    label: str = ""
    images: int = 0

    def choose(self, goal: Goal) -> Choice:
        """The most accurate policy within a budget or a latency, else the cheapest that is accurate enough.

        Where no policy loses as little as a drop allows, it is the cheapest that is as accurate as the most
        accurate one, up to half an image. Raises ValueError for a
        budget, a latency or an accuracy that none has.
        """
        if goal.kind == "latency":
            return self._within(goal, _latency, "ms")
        if goal.kind == "budget":
            return self._within(goal, _macs, "multiply-adds")
        least = goal.value if goal.kind == "accuracy" else self.full - goal.value
        accuracies = list(map(_accuracy, self.policies))
        good = sum(accuracy >= least for accuracy in accuracies)
        wanted = f"{100 * max(least, 0):.2f} %" + (
            "" if goal.kind == "accuracy" else self._against(goal.value)
        )
        if good or goal.kind == "accuracy":
            best = cheapest(accuracies, list(map(_macs, self.policies)), least)
            return self._choice(goal, best, f"the cheapest of {good} settings that reach {wanted}")
        # Half an image is less than the images can tell.
        alike = max(accuracies) - (0.5 / self.images if self.images else 0)
        best = cheapest(accuracies, list(map(_macs, self.policies)), alike)
        return self._choice(goal, best, f"the most accurate setting, since none reaches {wanted}")

    def _against(self, drop: float) -> str:
        below = f"{100 * drop:.4g} point{'s' * (drop != 0.01)} below " if drop else ""
        return f", {below}the last exit's accuracy"

    def _within(self, goal: Goal, cost: Callable[[Policy], float], unit: str) -> Choice:
        costs = list(map(cost, self.policies))
        good = sum(one <= goal.value for one in costs)
        limit = f"a {goal.kind} of {goal.value:.4g} {unit}"
        best = within_budget(list(map(_accuracy, self.policies)), costs, goal.value, limit)
        return self._choice(goal, best, f"the most accurate of {good} settings {goal.words}")

    def _choice(self, goal: Goal, i: int, reason: str) -> Choice:
        judged = f"all {len(self.policies)} were judged on the calibration images"
        name = f"{self.label} {i}" if self.label else goal.name
        return Choice(name, self.policies[i], f"{reason}; {judged}")


def _accuracy(policy: Policy) -> float:
    assert policy.accuracy is not None  # known of all that are found on calibration images
    return policy.accuracy


def _macs(policy: Policy) -> float:
    assert policy.macs is not None
    return policy.macs


def _latency(policy: Policy) -> float:
    assert policy.latency_ms is not None
    return policy.latency_ms
