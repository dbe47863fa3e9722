"""Whether a served stream still leaves at the exits as in calibration, without PyTorch or labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive.evidence import Evidence
from adaptive.mix import CHANGES, bet, bins_of, keys_of, ordered
from deploy.decide import RunnerError

SEED = 2  # of ties; not that of a reference
ALARM_RATE = 0.05


def reference_file(policy: str) -> str:
    """Where a folder holds the reference of the policy in a file, if it has one."""
    return policy.removesuffix(".json") + ".reference.json"


@dataclass(frozen=True)
class Drift:
    """What is known after `samples`: an alarm stays, and `p_value` holds whenever one looks."""

    samples: int
    p_value: float
    alarm: bool
    change: str


class Watch:
    """The test of the mix in `adaptive/monitor.py`, against the content of a reference's file.

    P(ever a false alarm) is at most `ALARM_RATE`, however long it runs. Raises RunnerError for other content.
    """

    def __init__(self, content: Any) -> None:
        try:
            self.keys = keys_of(
                [(int(exit), float(score), float(tie)) for exit, score, tie in content["edges"]]
            )
            self.urn = np.array(content["weights"], np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise RunnerError(f"this is no reference of a stream: {error!r}") from None
        self.evidence = Evidence(ALARM_RATE, len(CHANGES))
        self.rng = np.random.default_rng(SEED)

    def update(self, exits: Sequence[int], confidence: Sequence[float]) -> None:
        """Takes the next samples: where they left, with which confidence, [T]."""
        samples = ordered(np.array(exits), np.array(confidence, np.float64))
        bet(self.evidence, self.urn, bins_of(self.keys, samples, self.rng.random(len(samples))))

    @property
    def drift(self) -> Drift:
        """What has been found so far."""
        found = self.evidence
        return Drift(found.seen, found.p_value, found.alarm_at is not None, CHANGES[found.best_bet])
