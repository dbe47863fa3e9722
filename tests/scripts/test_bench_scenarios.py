"""A row for every system in every scenario, by runners that are asked for what the tables say."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from adaptive.flops import count
from adaptive.percentiles import Latencies
from adaptive.scenarios import Served
from deploy.backends import Exported
from experiment import open_network

QUICK = "--images 30 --requests 64 --offline 40 --rounds 1 --micro_batch 2 --threads 1 --device cpu --num_workers 0"


class Fast:
    """A runner that says 1 of every image at once."""

    def __init__(self, folder, backend, precision, *, micro_batch, threads):
        self.folder, self.micro_batch = folder, micro_batch
        assert (backend, precision, threads) == ("openvino", "bf16", 1)
        self.stages = [lambda state: (None, {})]

    def answer(self, images, order):
        return SimpleNamespace(classes=np.ones(len(images), int))

    def step(self, k, state, count):
        ids = state["ids"][:count]
        exits = np.zeros(count, int)
        return SimpleNamespace(ids=ids, classes=exits + 1, exits=exits), {}, exits[:0]


class Backend(Exported):
    """Tables are those of PyTorch."""

    def network(self):
        return self.exports.opened.network


@pytest.fixture
def fast(script, monkeypatch):
    """Nothing is exported; the folders asked for, and the rates tried."""
    module, folders, tried = script("bench_scenarios"), [], []

    def with_backend(subject):
        assert subject.recipe.exits.backend == "openvino"
        exports = SimpleNamespace(
            opened=subject.opened,
            without=lambda off, precision: folders.append(f"without {list(off)}") or folders[-1],
            alone=lambda k, precision: folders.append(f"alone {k}") or folders[-1],
            policy=lambda policy: policy,
        )
        return replace(subject, backend=Backend(exports, "openvino", "bf16")), ""

    def trial(submit, samples, rate, requests, *, bound_ms, seed):
        tried.append((rate, requests, seed))
        label = submit(samples.images[0]).result(timeout=5).label
        return Served(rate, Latencies.of(np.ones(1)), rate, 0, label, True)

    monkeypatch.setattr(module, "with_backend", with_backend)
    monkeypatch.setattr(module, "Runner", Fast)
    monkeypatch.setattr(module, "serve", trial)
    return folders, tried


def table(text, title):
    """The rows under a title, by system."""
    lines = text.partition(f"\n{title}")[2].splitlines()[2:]
    return {
        line[:12].rstrip(): line[12:].split() for line in lines[: lines.index("") if "" in lines else None]
    }


def test_a_row_for_every_system(checkpoints, printed, fast):
    text = printed("bench_scenarios", "--checkpoint", checkpoints["msdnet"], *QUICK.split())
    folders, tried = fast
    assert folders[:2] == ["without []", "alone 1"]
    names = ["early exit", *(f"exit {name[-1]} alone" for name in folders[1:])]
    tables = {title: table(text, title) for title in ("single stream", "multi-stream", "offline", "server")}
    assert [list(rows) for rows in tables.values()] == [names] * 4 and "; 30 images\n" in text
    assert tables["single stream"]["early exit"][0] == "64"
    assert tables["single stream"]["early exit"][4] == "-"  # too few to confirm p99
    assert 0 < float(tables["offline"]["early exit"][-1]) < 30  # of those who say 1 of every digit
    assert tables["offline"]["exit 1 alone"][1:3] == ["1.00", "1.00"]
    macs = count(open_network(checkpoints["msdnet"]).network, (3, 32, 32)).stages
    assert 1 <= float(tables["offline"]["early exit"][2]) <= macs.alone()[1] / macs.alone()[0] + 0.005
    assert {seed for *_, seed in tried} == {0, 1} and min(requests for _, requests, _ in tried) >= 662
    assert tables["server"]["early exit"][-1] == "100.00"


def test_the_load_generator_beside_it(checkpoints, printed, fast):
    pytest.importorskip("mlperf_loadgen")
    words = [*QUICK.split(), "--loadgen", "--seconds", 0]
    text = printed("bench_scenarios", "--checkpoint", checkpoints["cifar_resnet"], *words)
    rows = table(text, "the same by MLCommons' load generator")
    assert len(rows) == 2
    assert text.count(" p50 ms") == 4 and text.count("offline, images/s") == 2


def test_other_backends_are_refused(checkpoints, printed):
    words = ["--checkpoint", checkpoints["cifar_resnet"], *QUICK.split(), "--backend", "eager"]
    with pytest.raises(ValueError, match="^--backend eager; accepted here: openvino, onnxruntime$"):
        printed("bench_scenarios", *words)
