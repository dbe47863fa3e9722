"""The table of stages has a row for each, and says what a saved policy takes."""

import re
from dataclasses import replace

import pytest

from adaptive.policy import Policy, model_hash
from experiment import open_network

TINY = "--model msdnet --nBlocks 2 --nChannels 4 --growthRate 4 --input_size 32 --rounds 2 --device cpu"


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory):
    """The file of a policy of the checkpoint of two exits, by which 75 % leave at the first."""
    network = open_network(checkpoints["msdnet"]).network
    policy = Policy((0.5, -1e8), "margin", "p=1", shares=(0.75, 0.25), model_hash=model_hash(network))
    path = tmp_path_factory.mktemp("policies") / "policy.json"
    policy.save(path)
    return path


def number(text, pattern):
    return float(re.search(pattern, text)[1])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_row_for_every_stage(printed, batch):
    text = printed("bench_stages", *TINY.split(), "--batch", batch)
    lines = text.splitlines()
    assert ("4 images a call" in lines[0]) == (batch == 4) and "eager, 32 pixels" in lines[0]
    rows = [line.split() for line in lines[2:4]]
    assert [row[0] for row in rows] == ["0", "1"] and len(lines) == 5
    trunks, heads, shares, _, leaving, *_ = (
        list(map(float, one)) for one in list(zip(*rows, strict=True))[1:]
    )
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert leaving == pytest.approx([trunks[0] + heads[0], sum(trunks + heads)], abs=0.003)
    total, whole = number(lines[4], r"sum (\S+) ms"), number(lines[4], r"network (\S+) ms")
    assert total == pytest.approx(leaving[1], abs=0.003)
    assert number(lines[4], r": (\S+) %") == pytest.approx(100 * (total / whole - 1), abs=0.6)


def test_the_latency_of_a_policy(checkpoints, printed, saved):
    words = ["--checkpoint", checkpoints["msdnet"], "--rounds", 2, "--policy", saved, "--device", "cpu"]
    lines = printed("bench_stages", *words).splitlines()
    first, second = (float(line.split()[5]) for line in lines[2:4])
    assert lines[-1].startswith("expected of policy 'p=1', by which 75.0 25.0 % leave: mean ")
    assert number(lines[-1], r"mean (\S+) ms") == pytest.approx(0.75 * first + 0.25 * second, abs=0.002)


def test_what_does_not_fit_is_said(checkpoints, printed, saved, tmp_path):
    one = ["bench_stages", "--checkpoint", checkpoints["msdnet"], "--device", "cpu", "--policy"]
    with pytest.raises(ValueError, match=r"policy\.json and --confidence margin: give one of them$"):
        printed(*one, saved, "--confidence", "margin")
    with pytest.raises(ValueError, match="--batch 8: latencies of a policy are for --batch 1"):
        printed(*one, saved, "--batch", 8)
    with pytest.raises(ValueError, match="unknown flag --nBlocks: a checkpoint has its own options"):
        printed(*one, saved, "--nBlocks", 2)
    with pytest.raises(ValueError, match=r"^policy 'p=1' is for weights \w{12}, the network has \w{12}$"):
        printed("bench_stages", *TINY.split(), "--policy", saved)
    replace(Policy.load(saved), shares=()).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match="policy 'p=1' does not say which shares"):
        printed(*one, tmp_path / "p.json", "--rounds", 1)
