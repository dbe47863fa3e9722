"""Wealth is what many separate bets would have, its mean stays 1, and late changes are found as well."""

import itertools
import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from adaptive.evidence import SCALE, Evidence


def separate_bets(factors):
    """Wealth after each sample [T] from factors [T, E]: bets of every kind start before every sample."""
    count, num_bets = factors.shape
    kept = [(1 + stakes / SCALE) ** -0.5 for stakes in range(count + 2)]
    wealth = []
    for end in range(1, count + 1):
        total = kept[end + 1]  # the stake after sample `end` is made, but has not worked yet
        for start in range(end + 1):
            total += (kept[start] - kept[start + 1]) * factors[start:end].prod(0).sum() / num_bets
        wealth.append(total)
    return np.array(wealth)


def test_wealth_is_that_of_separate_bets():
    factors = np.random.default_rng(0).uniform(0.2, 2, (40, 3))
    evidence = Evidence(0.05, 3)
    wealth = np.exp(evidence.update(np.log(factors)))
    assert_allclose(wealth, separate_bets(factors), rtol=1e-10)
    assert evidence.p_value == pytest.approx(min(1, 1 / wealth.max()))


def test_the_mean_is_one_over_all_streams():
    streams = [np.array(signs)[:, None] * [0.9, -0.4] for signs in itertools.product((1, -1), repeat=8)]
    wealth = [np.exp(Evidence(0.05, 2).update(np.log1p(stream)))[-1] for stream in streams]
    assert np.mean(wealth) == pytest.approx(1, rel=1e-12) and max(wealth) > 1.5


def test_parts_of_any_size_give_the_same_and_a_state_goes_on():
    factors = np.log(np.random.default_rng(1).uniform(0.3, 2.2, (300, 4)))
    whole, parts = Evidence(0.05, 4), Evidence(0.05, 4)
    wealth = whole.update(factors)
    found = [parts.update(part) for part in np.split(factors, [1, 2, 2, 50])]
    again = Evidence(0.05, 4)
    again.load_state_dict(json.loads(json.dumps(parts.state_dict())))
    assert_allclose(np.concatenate(found), wealth, atol=1e-9)
    assert again.state_dict() == parts.state_dict()
    assert (again.alarm_at, again.seen) == (whole.alarm_at, 300) and again.alarm_at
    assert wealth[again.alarm_at - 1] >= np.log(20) > wealth[: again.alarm_at - 1].max()


def test_an_alarm_stays():
    evidence = Evidence(0.05, 1)
    evidence.update(np.log(np.full((100, 1), 1.5)))
    first = evidence.alarm_at
    evidence.update(np.log(np.full((5000, 1), 0.5)))
    assert evidence.alarm_at == first < 30 and evidence.p_value <= 0.05


@pytest.mark.parametrize("before", [0, 1000, 100_000])
def test_a_late_change_is_found_about_as_soon_as_an_early_one(before):
    evidence = Evidence(0.05, 1)
    even = np.log([1.5, 0.5] * (before // 2))[:, None]  # a bet that runs from the start has lost everything
    evidence.update(even)
    assert evidence.alarm_at is None
    evidence.update(np.log(np.full((100, 1), 1.5)))
    assert before < evidence.alarm_at <= before + 45


def test_false_alarms_are_as_rare_as_stated():
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        evidence = Evidence(0.2, 2)
        evidence.update(np.log1p(rng.choice([-1, 1], (1000, 1)) * [0.3, -0.3]))
        alarms += evidence.alarm_at is not None
    assert 0 < alarms <= 0.2 * 200


@pytest.mark.parametrize("capital", [[0.0], [0.0, float("nan")], "no"])
def test_a_state_of_other_bets_is_refused(capital):
    state = Evidence(0.05, 2).state_dict() | {"capital": capital}
    with pytest.raises(ValueError):
        Evidence(0.05, 2).load_state_dict(state)
