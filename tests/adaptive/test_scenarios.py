"""Scenarios ask for what they say, and count what comes back."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from adaptive import scenarios
from adaptive.percentiles import Latencies
from adaptive.scenarios import Asked, Samples, Served, highest_rate, serve, stream


@pytest.fixture
def samples():
    """Ten images that hold their number, of which the last is labelled wrongly."""
    images = np.zeros((10, 3, 2, 2), np.float32)
    images[:, 0, 0, 0] = np.arange(10)
    return Samples(images, np.array([*range(9), 0]))


def number(images):
    return images[:, 0, 0, 0].astype(int)


def answered(image):
    future = Future()
    future.set_result(SimpleNamespace(label=int(image[0, 0, 0])))
    return future


def test_every_image_is_asked_for_equally_often(samples):
    rows = samples.rows(25, 0)
    assert [sorted(part) for part in (rows[:10], rows[10:20])] == [list(range(10))] * 2
    assert len(set(rows[20:])) == 5 and not np.array_equal(rows[:10], rows[10:20])


def test_systems_take_turns_with_the_same_requests(samples):
    calls = []

    def system(name):
        return lambda images: calls.append((name, tuple(number(images)))) or number(images)

    found = stream({"a": system("a"), "b": system("b")}, samples, 10, 2, rounds=2, warm=1)
    assert [name for name, _ in calls] == [*"aaaaaabbbbbb"] * 2  # one of six is not counted
    asked = {name: [images for who, images in calls if who == name] for name in "ab"}
    assert asked["a"] == asked["b"] and asked["a"][0] == asked["a"][1]
    for one in found.values():
        assert one.latencies_ms.shape == (10,) and one.correct.shape == (10, 2) and one.accuracy == 0.9


def test_images_per_second_are_of_the_median_request():
    asked = Asked(np.array([10.0, 20, 1000]), np.ones((3, 4), bool))
    assert asked.images_per_s == 200


def test_a_server_is_asked_whatever_it_does(samples, monkeypatch):
    """Everything is answered at once, but a sender that sleeps too long does not hide it."""
    monkeypatch.setattr(scenarios.time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds + 0.01))
    found = serve(answered, samples, 1000, 100, bound_ms=5, seed=0)
    assert found.lost == 0 and found.accuracy == 0.9 and not found.held
    assert found.latencies.requests == 100 and found.latencies.p99_ms > 9


def test_late_lost_and_refused(samples):
    waiting = []

    def submit(image):
        which = int(image[0, 0, 0])
        if which == 0:
            raise ValueError("no room")
        future = Future() if which < 3 else answered(image)
        if which == 1:
            future.set_exception(ValueError("too late"))
        if which == 2:
            waiting.append(threading.Timer(0.05, future.set_result, [SimpleNamespace(label=2)]))
            waiting[-1].start()
        return future

    found = serve(submit, samples, 1e4, 40, bound_ms=20, seed=0)
    assert found.lost == 8 and not found.held
    assert found.accuracy == pytest.approx(0.7)
    assert found.goodput < 28 / 0.05 and found.latencies.p99_ms == np.inf


def test_a_bug_in_the_system_is_no_lost_request(samples):
    def submit(image):
        future = Future()
        future.set_exception(KeyError("x"))
        return future

    with pytest.raises(KeyError):
        serve(submit, samples, 1e4, 3, bound_ms=1, seed=0)


def test_few_requests_do_not_confirm_p99(samples):
    assert not serve(answered, samples, 1e5, 458, bound_ms=1e3, seed=0).held
    assert serve(answered, samples, 1e5, 459, bound_ms=1e3, seed=0).held


def served(rate, held):
    return Served(rate, Latencies.of(np.zeros(1)), 0, 0, 0, held)


@pytest.mark.parametrize("limit", [0.5, 37, 99, 1000])
def test_the_highest_rate_is_found_by_halves(limit):
    tried = []

    def trial(rate, seed):
        tried.append((rate, seed))
        return served(rate, rate <= limit - 2 * seed)  # other arrivals are harder

    found = highest_rate(trial, 128, steps=6)
    if limit < 1:
        assert found is None
    else:
        assert found.rate == min(2 * ((limit - 2) // 2), 126)
        assert len({rate for rate, seed in tried if seed == 0}) == 6 and tried[-1] == (found.rate, 1)


def test_one_pause_of_the_machine_fails_no_rate():
    pauses = iter([False, True] * 6)
    assert highest_rate(lambda rate, seed: served(rate, seed or next(pauses)), 128).rate == 126
