"""False alarms are as rare as stated, changes are found and named, and a server may restart."""

import json

import numpy as np
import pytest
import torch

from adaptive import mix
from adaptive.mix import CHANGES
from adaptive.monitor import Monitor, upper_limit
from adaptive.reference import Reference, hardness
from utils import UserError


def draw(rng, count, power=1.0, error=0.1):
    """Exits, confidence and correct [N] of samples whose hardness is uniform for power 1, higher below."""
    hard = rng.random(count) ** power
    exits = (3 * hard).astype(int)
    return exits, np.round(1 - hard, 3), rng.random(count) >= error  # rounded: there are ties


def monitor_of(seed=0, count=200, **options):
    rng = np.random.default_rng([seed, 7])
    reference = Reference.of(*draw(rng, count), num_exits=3, seed=seed)
    return Monitor(reference, seed=seed, **options), rng


def alarms_of(status):
    return {verdict.test: verdict.alarm_at for verdict in status.alarms}


def rate_of_alarms(streams, length, **options):
    found = []
    for seed in range(streams):
        monitor, rng = monitor_of(seed, count=40, **options)
        found.append(bool(monitor.update(*draw(rng, length)).alarms))
    return np.mean(found)


def test_false_alarms_on_streams_ten_times_the_reference():
    assert 0 < rate_of_alarms(80, 400, alarm_rate=0.3, per_exit=True) <= 0.3


def test_the_reference_alone_would_give_false_alarms(monkeypatch):
    def frozen(urn, bins):
        upper = urn.cumsum() / urn.sum()
        return (upper - urn / urn.sum())[bins], upper[bins]

    monkeypatch.setattr(mix, "intervals", frozen)
    monkeypatch.setattr(mix, "CHUNK", 10**6)  # so that what is drawn does not come into the urn
    assert rate_of_alarms(16, 1000, alarm_rate=0.3) > 0.5


def test_a_place_is_as_wide_as_it_is_likely():
    rng = np.random.default_rng(0)
    urn, bins = rng.integers(1, 5, 6), rng.integers(6, size=50)
    lower, upper = mix.intervals(urn, bins)
    weights = urn.astype(float)
    for t, k in enumerate(bins):
        assert lower[t] == pytest.approx(weights[:k].sum() / weights.sum())
        assert upper[t] == pytest.approx(weights[: k + 1].sum() / weights.sum())
        weights[k] += 1


def test_every_bet_is_fair_whatever_the_places():
    ends = np.concatenate([[0], np.sort(np.random.default_rng(0).random(30)), [1]])
    factors = np.exp(mix.mix_factors(ends[:-1], ends[1:]))
    assert factors.shape == (31, len(CHANGES))
    np.testing.assert_allclose(np.diff(ends) @ factors, 1, rtol=1e-12)
    middle = factors[15]
    assert factors.max(0).min() > 1 > factors.min(0).max() and middle.max() < factors.max()


def test_the_places_are_those_of_conformal_p_values():
    """With every sample of the reference as an edge, the smoothed p-value lies in its sample's place."""
    rng = np.random.default_rng(1)
    exits, confidence, _ = draw(rng, 330)
    monitor = Monitor(Reference.of(exits[:30], confidence[:30], num_exits=3, bins=31))
    hard = 10 * exits - confidence
    bins = monitor.reference.bins(hardness(exits[30:], confidence[30:], 3), rng.random(300))
    lower, upper = mix.intervals(monitor.urn, bins)
    for t in range(300):
        before, one = hard[: 30 + t], hard[30 + t]
        low, high = (before < one).sum() / (31 + t), ((before <= one).sum() + 1) / (31 + t)
        assert lower[t] < high and low < upper[t]  # ties are broken by chance
        if high - low < 1.5 / (31 + t):
            assert lower[t] <= low + 1e-12 and high <= upper[t] + 1e-12


@pytest.mark.parametrize("before", [0, 2000])
@pytest.mark.parametrize("power, words", [(0.4, "harder images"), (2.5, "easier images")])
def test_a_shift_is_found_and_named(power, words, before):
    monitor, rng = monitor_of()
    assert not monitor.update(*draw(rng, before)).alarms
    status = monitor.update(*draw(rng, 300, power))
    (found,) = [verdict for verdict in status.alarms if verdict.test == "mix"]
    assert before < found.alarm_at <= before + 150 and found.change.startswith(words)
    assert (
        found.text().startswith(f"mix: alarm at sample {found.alarm_at}: {words}") and found.p_value <= 0.025
    )


@pytest.mark.parametrize("shape, words", [(0.3, "more easy"), (5, "fewer easy")])
def test_a_change_of_spread_is_found_and_named(shape, words):
    monitor, rng = monitor_of()
    hard = rng.beta(shape, shape, 500) * 0.999
    status = monitor.update((3 * hard).astype(int), 1 - hard)
    assert status.alarms and status.alarms[0].change.startswith(words)


@pytest.mark.parametrize("kept, words", [(0.3, "fewer images of medium"), (1, "more images of medium")])
def test_a_change_at_an_exit_in_the_middle_is_found_and_named(kept, words):
    monitor, rng = monitor_of(count=600)
    exits, confidence, correct = draw(rng, 3000)
    chance = np.where(exits == 1, kept, 1 if kept < 1 else 0.3)
    rest = rng.random(3000) < chance
    (found,) = monitor.update(exits[rest], confidence[rest], correct[rest]).alarms
    assert found.change.startswith(words)
    start, stop = map(float, found.change.partition("calibration's ")[2].split(" %")[0].split(" to "))
    assert abs(start - 33) < 13 and abs(stop - 67) < 13


def test_more_errors_are_found_and_fewer_are_not():
    for error, expected in ((0.4, True), (0.0, False)):
        monitor, rng = monitor_of()
        status = monitor.update(*draw(rng, 1000, error=error))
        assert ("risk" in alarms_of(status)) == expected and "mix" not in alarms_of(status)
        assert status.error == pytest.approx(error, abs=0.05) and sum(status.shares) == pytest.approx(1)


def test_errors_at_one_exit_are_found_there():
    monitor, rng = monitor_of(count=600, per_exit=True)
    exits, confidence, correct = draw(rng, 3000)
    correct[(exits == 1) & (rng.random(3000) < 0.3)] = False
    found = alarms_of(monitor.update(exits, confidence, correct))
    assert "risk at exit 1" in found and not {"mix", "risk at exit 0", "risk at exit 2"} & found.keys()


def test_labels_of_a_few_samples_and_late_ones_count_the_same():
    first, rng = monitor_of()
    second, _ = monitor_of()
    exits, confidence, correct = draw(rng, 500, error=0.5)
    known = rng.random(500) < 0.2
    some = [bool(right) if seen else None for right, seen in zip(correct, known, strict=True)]
    status = first.update(exits, confidence, some)
    assert not second.update(exits, confidence).labelled
    assert second.update_risk(exits[known], correct[known]) == status
    assert status.labelled == known.sum() and status.samples == 500 and "risk" in alarms_of(status)


def test_the_limit_is_that_of_the_binomial_distribution():
    assert upper_limit(0, 50, 0.02) == pytest.approx(1 - 0.02 ** (1 / 50))
    assert upper_limit(50, 50, 0.02) == 1
    chances = np.random.default_rng(0).binomial(80, upper_limit(7, 80, 0.05), 200_000) <= 7
    assert chances.mean() == pytest.approx(0.05, abs=0.003)


def test_which_tests_there_are_and_their_share_of_the_rate():
    rng = np.random.default_rng(0)
    exits, confidence, correct = draw(rng, 100)
    bare = Reference.of(exits, confidence, num_exits=3)
    full = Reference.of(exits, confidence, correct, num_exits=3)
    level = {
        "bare": [Monitor(bare).mix.limit],
        "limit": [one.evidence.limit for one in Monitor(bare, risk_limit=0.2).risks],
        "estimated": [one.evidence.limit for one in Monitor(full).risks],
        "per exit": [one.evidence.limit for one in Monitor(full, per_exit=True).risks],
    }
    for name, expected in {"bare": 20, "limit": 40, "estimated": 80, "per exit": 320}.items():
        assert np.exp(level[name]) == pytest.approx(expected)
    assert len(level["per exit"]) == 4 and np.exp(Monitor(full).mix.limit) == pytest.approx(40)
    assert Monitor(full, risk_limit=0.2).status.verdicts[1].limit == 0.2
    assert Monitor(full).risks[0].limit == upper_limit(sum(full.wrong), 100, 0.0125)


def test_batches_of_any_size_and_kind_and_a_restart_between_them_give_the_same():
    whole, rng = monitor_of(per_exit=True)
    exits, confidence, correct = draw(rng, 5000, 0.5, error=0.3)  # more than fit into one table
    expected = whole.update(exits, confidence, correct)
    assert alarms_of(expected).keys() >= {"mix", "risk"}
    parts, _ = monitor_of(per_exit=True)
    parts.update(torch.tensor(exits[:1]), torch.tensor(confidence[:1]), torch.tensor(correct[:1]))
    parts.update(exits[1:1], confidence[1:1], correct[1:1])
    parts.update(exits[1:90].tolist(), confidence[1:90].tolist(), correct[1:90].tolist())
    again, _ = monitor_of(per_exit=True)
    again.load_state_dict(json.loads(json.dumps(parts.state_dict())))
    found = again.update(exits[90:], confidence[90:], correct[90:])
    assert alarms_of(found) == alarms_of(expected)
    assert (found.samples, found.shares, found.error) == (expected.samples, expected.shares, expected.error)
    p_values = [[one.p_value for one in status.verdicts] for status in (found, expected)]
    np.testing.assert_allclose(*p_values, rtol=1e-8)


def test_refused_samples_are_not_counted():
    monitor, _ = monitor_of()
    state = json.dumps(monitor.state_dict())
    for columns in (([0, 9], [1, 1]), ([0, 1], [1, np.nan]), ([0, 1], [1, 1], [1, 3]), ([0], [1], [1, 1])):
        with pytest.raises(UserError):
            monitor.update(*columns)
    assert json.dumps(monitor.state_dict()) == state


@pytest.mark.parametrize("options", [{"alarm_rate": 0}, {"alarm_rate": 1.5}, {"risk_limit": 0.0}])
def test_rates_and_limits_are_between_0_and_1(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} .*: give a number between 0 and 1"):
        monitor_of(**options)


@pytest.mark.parametrize(
    "change", [{"urn": [1, 2]}, {"urn": [0] * 100}, {"counts": 3}, {"risks": {}}, {"mix": {}}, {"rng": 3}]
)
def test_a_state_of_another_monitor_is_refused(change):
    monitor, _ = monitor_of()
    with pytest.raises(UserError, match="no state of this monitor"):
        monitor.load_state_dict(monitor.state_dict() | change)
