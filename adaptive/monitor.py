"""Drift: whether a stream of samples still leaves at the exits, and is answered as well, as in calibration.

    reference = Reference.of_policy(policy, tables)  # of calibration or, better, test images
    monitor = Monitor(reference, alarm_rate=0.05)
    status = monitor.update(exits, confidence, correct)  # per request; `correct` where it is known

mapie's `OnlineMartingaleTest` and `RiskMonitoring` want features and labels of every sample, keep the whole
history, go through it again for every sample or batch, and have no state that outlives a process; crepes'
martingales are functions of a complete stream. So the tests are written here.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from adaptive.evidence import Evidence
from adaptive.mix import CHANGES, bet
from adaptive.reference import (
    TIES,
    Floats,
    Ints,
    Reference,
    Values,
    counts_by_exit,
    exit_numbers,
    hardness,
    labels,
)
from utils import UserError

ODDS = 1.25, 1.5, 2, 3, 5  # bets on errors: how many times the odds of the limit


@dataclass(frozen=True)
class Verdict:
    """What one test says: of the "mix" of exits and confidence, or the "risk" of all or of one exit.

    `alarm_at` is the number of samples that the test had seen at its first alarm, and an alarm stays.
    `p_value` holds whenever one looks. `change` says what the evidence is for, `limit` which error is
    accepted.
    """

    test: str
    seen: int
    alarm_at: int | None
    p_value: float
    change: str
    limit: float | None = None

    def text(self) -> str:
        """A line for a log."""
        outcome = "no alarm" if self.alarm_at is None else f"alarm at sample {self.alarm_at}: {self.change}"
        return f"{self.test}: {outcome} (p = {self.p_value:.2g} after {self.seen} samples)"


@dataclass(frozen=True)
class Status:
    """What is known of a stream: the share that left at each exit, [K], and its error if labels are known."""

    samples: int
    labelled: int
    shares: list[float]
    error: float | None
    verdicts: list[Verdict]

    @property
    def alarms(self) -> list[Verdict]:
        """Of the tests that have found a change."""
        return [verdict for verdict in self.verdicts if verdict.alarm_at is not None]


@dataclass
class Risk:
    """The test of the error of the samples that leave at one exit, or of all where `exit` is None."""

    exit: int | None
    limit: float
    evidence: Evidence

    @property
    def name(self) -> str:
        """Of the test."""
        return "risk" if self.exit is None else f"risk at exit {self.exit}"

    @cached_property
    def factors(self) -> Floats:
        """Logarithms of all bets' factors for a wrong answer and for a right one, [2, E]."""
        odds = np.array(ODDS) * self.limit / (1 - self.limit)
        error = odds / (1 + odds)
        return np.log([error / self.limit, (1 - error) / (1 - self.limit)])

    def update(self, exits: Ints, answers: Floats) -> None:
        """Takes exits and labels [T] of samples, of which those without labels are left out."""
        chosen = ~np.isnan(answers)
        if self.exit is not None:
            chosen &= exits == self.exit
        self.evidence.update(self.factors[answers[chosen].astype(np.int64)])


class Monitor:
    """Says whether a stream has left what was calibrated; `alarm_rate` bounds P(ever a false alarm).

    **Mix.** If nothing has changed, samples of reference and stream are exchangeable (independent ones of
    one distribution are). Then a sample falls between two edges with a probability in proportion to the
    samples of the reference *and the stream before it* there, whatever came before: Polya's urn, or smoothed
    conformal p-values of the online mode. Bets on where the next one falls then have mean 1 exactly. (To
    compare a long stream with the reference alone would be wrong, since the reference has noise of its own.)

    **Risk.** Bets against an error of at most `risk_limit`; by default this is the upper confidence limit
    (Clopper and Pearson) of the reference's error. With `per_exit` every exit is tested as well. Samples with
    labels must be like those without.

    Half of `alarm_rate` is for the mix. The other half is shared by the tests of risk, and there again half
    is for the limit where it is estimated. All is for the mix where there is no limit.

    The state does not grow with the stream. An alarm stays: once it has been dealt with, start a new monitor.
    Small changes need a large reference, since they must show before the stream outweighs it. Raises
    ValueError for rates and limits that are not between 0 and 1.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        alarm_rate: float = 0.05,
        risk_limit: float | None = None,
        per_exit: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("alarm_rate", alarm_rate), ("risk_limit", risk_limit)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"{name} {value}: give a number between 0 and 1")
        self.reference = reference
        self.rng = np.random.default_rng([seed, TIES + 1])
        self.urn = np.array(reference.weights, dtype=np.int64)
        self.counts = np.zeros((3, len(reference.left)), dtype=np.int64)  # left, labelled, wrong
        self.risks = _risks(reference, alarm_rate / 2, risk_limit, per_exit)
        self.mix = Evidence(alarm_rate / 2 if self.risks else alarm_rate, len(CHANGES))

    def update(self, exits: Values, confidence: Values, correct: Values | None = None) -> Status:
        """Takes the next samples: where they left, with which confidence, and whether the answer was right.

        [T] each, as lists, arrays or tensors. `correct` is NaN or None where it is not known; labels that
        come later go to `update_risk`. Raises ValueError, before anything is counted, for other lengths, for
        what is no exit, and for a confidence that is not finite.
        """
        num_exits = len(self.reference.left)
        samples = hardness(exits, confidence, num_exits)
        answers = labels(correct, len(samples))
        bins = self.reference.bins(samples, self.rng.random(len(samples)))
        bet(self.mix, self.urn, bins)
        self.counts[0] += np.bincount(samples.real.astype(np.int64), minlength=num_exits)
        return self.update_risk(exits, answers)

    def update_risk(self, exits: Values, correct: Values) -> Status:
        """Takes labels [T] that became known later, of samples that left at `exits` [T]."""
        num_exits = len(self.reference.left)
        places = exit_numbers(exits, num_exits)
        answers = labels(correct, len(places))
        self.counts[1:] += counts_by_exit(places, answers, num_exits)[1:]
        for risk in self.risks:
            risk.update(places, answers)
        return self.status

    @property
    def status(self) -> Status:
        """What has been found so far."""
        samples, labelled, wrong = self.counts.sum(1).tolist()
        shares = (self.counts[0] / max(samples, 1)).tolist()
        mix = self.mix
        found = [Verdict("mix", mix.seen, mix.alarm_at, mix.p_value, CHANGES[mix.best_bet])]
        for risk in self.risks:
            one = risk.evidence
            change = f"more errors than {100 * risk.limit:.2f} %"
            found.append(Verdict(risk.name, one.seen, one.alarm_at, one.p_value, change, risk.limit))
        return Status(samples, labelled, shares, wrong / labelled if labelled else None, found)

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen, in plain types (JSON keeps them)."""
        return {
            "urn": self.urn.tolist(),
            "counts": self.counts.tolist(),
            "mix": self.mix.state_dict(),
            "risks": {risk.name: risk.evidence.state_dict() for risk in self.risks},
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of a monitor with the same reference and options; ValueError for another."""
        try:
            urn, counts = (np.array(state[name], dtype=np.int64) for name in ("urn", "counts"))
            if urn.shape != self.urn.shape or (urn < self.reference.weights).any():
                raise UserError("it is of another reference")
            if counts.shape != self.counts.shape or {risk.name for risk in self.risks} != set(state["risks"]):
                raise UserError("it has other exits or tests")
            for risk in self.risks:
                risk.evidence.load_state_dict(state["risks"][risk.name])
            self.mix.load_state_dict(state["mix"])
            self.rng.bit_generator.state = state["rng"]
            self.urn = urn
            self.counts = counts
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"this is no state of this monitor: {error}") from error


def upper_limit(wrong: int, labelled: int, level: float) -> float:
    """The error that is exceeded with probability `level` at most, from `wrong` of `labelled` samples."""
    from scipy.stats import beta  # takes a while

    return 1.0 if wrong == labelled else float(beta.ppf(1 - level, wrong + 1, labelled - wrong))


def _risks(reference: Reference, rate: float, risk_limit: float | None, per_exit: bool) -> list[Risk]:
    """Tests of risk that share a rate of false alarms, as far as there are labels for their limits."""
    counts = {None: (sum(reference.wrong), sum(reference.labelled))}
    if per_exit:
        counts |= dict(enumerate(zip(reference.wrong, reference.labelled, strict=True)))
    known = {k: pair for k, pair in counts.items() if pair[1] or (k is None and risk_limit)}
    risks = []
    for k, (wrong, labelled) in known.items():
        limit = risk_limit
        level = rate / len(known)
        if k is not None or limit is None:
            level /= 2
            limit = upper_limit(wrong, labelled, level)
        if limit < 1:
            risks.append(Risk(k, limit, Evidence(level, len(ODDS))))
    return risks
