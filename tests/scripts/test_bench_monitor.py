"""The benchmark of the drift monitor: streams of an evaluation's images, and a row for every test and change."""

import numpy as np
import pytest

from utils import UserError

SHORT = "--streams 4 --length 50 --changes 0 20 --after 30 --reference 20 --shifted_images 8"


def evaluated(checkpoints, npz):
    words = "--calib none --router_threshold 0.11 --data_set CIFAR10 --num_workers 0"
    paths = ["--checkpoint", checkpoints["msdnet"], "--data_path", npz, "--eval_data_path", npz]
    return [*paths, *words.split()]


def test_a_row_for_every_test_and_change(checkpoints, npz, printed):
    words = [*SHORT.split(), "--per_exit", "--shifted_path", npz, *evaluated(checkpoints, npz)]
    text = printed("bench_monitor", *words)
    assert text.count("8 images, ") == 2 and "references of 20 images, alarm rate 5 %" in text
    rows = [line.split("   ")[0] for line in text.splitlines() if "change:" not in line]
    for test in ("mix", "risk", "any"):
        assert rows.count(test) == 3


def test_a_shifted_set_is_needed(checkpoints, npz, printed):
    with pytest.raises(UserError, match="--shifted_path PATH"):
        printed("bench_monitor", *SHORT.split(), *evaluated(checkpoints, npz))


def test_alarms_count_images_of_the_stream(script):
    bench = script("bench_monitor")
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    before = bench.Pool((2 * hard).astype(int), 1 - hard, np.ones(400))
    after = bench.Pool(np.ones(50, dtype=int), np.zeros(50), np.zeros(50))
    flags = bench.Flags(streams=5, reference=100, labels=0.5)
    alarms = bench.first_alarms(flags, 2, before, after, (60, 100))
    assert alarms.keys() == {"mix", "risk", "any"}
    assert (alarms["mix"] > 60).all() and (alarms["mix"] < 80).all() and (alarms["risk"] < 120).all()
    assert (alarms["any"] == np.minimum(alarms["mix"], alarms["risk"])).all()
    rows = list(bench.rows_of(60, alarms | {"some": np.array([10, 70, 80, np.inf])}))
    assert rows[-1] == ("some", "60", 4, 25.0, pytest.approx(200 / 3), 20, np.inf, np.inf)
