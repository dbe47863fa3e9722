"""An independent load generator asks for the same images, and measures the same."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from adaptive import loadgen
from adaptive.percentiles import Latencies
from adaptive.scenarios import Samples, stream


@pytest.fixture(scope="module")
def samples():
    images = np.random.default_rng(0).random((20, 3, 2, 2), np.float32)
    return Samples(images, (images[:, 0, 0, 0] > 0.5).astype(int))


def slow(images):
    """A class a millisecond."""
    end = time.perf_counter() + 1e-3 * len(images)
    while time.perf_counter() < end:
        pass
    return (images[:, 0, 0, 0] > 0.5).astype(int)


def test_its_figures_are_ours(samples, capfd):
    pytest.importorskip("mlperf_loadgen")
    found = loadgen.single_stream(slow, samples, 100)
    ours = Latencies.of(stream({"": slow}, samples, 100, 1, rounds=1)[""].latencies_ms)
    assert found.accuracy == 1 and found.images_per_s is None
    assert found.p50_ms == pytest.approx(ours.p50_ms, rel=0.2) and found.p50_ms > 1
    assert found.p90_below_ms >= found.p90_ms
    whole = loadgen.offline(slow, samples, 50)
    assert 50 < whole.images_per_s < 1000 and whole.accuracy == 1
    assert capfd.readouterr().out == ""


def test_a_server_is_asked_through_its_queue(samples):
    pytest.importorskip("mlperf_loadgen")
    with ThreadPoolExecutor(1) as pool:

        def submit(image):
            return pool.submit(lambda: SimpleNamespace(label=1 - slow(image[None]).item()))

        found = loadgen.server(submit, samples, 400, 60, bound_ms=50)
    assert found.p50_ms > 1 and found.accuracy == 0


def test_a_missing_generator_is_said(samples, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(ValueError, match="^the load generator is not installed: pip install mlcommons-loadg"):
        loadgen.offline(slow, samples, 1)
