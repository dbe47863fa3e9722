"""The benchmark of the server: a row for every load, malformed requests, and what signals do."""

import numpy as np
import pytest

from utils import UserError

WORDS = [
    "--backend",
    "onnxruntime",
    "--threads",
    "1",
    "--micro_batch",
    "1",
    "--seconds",
    "0.4",
    "--malformed",
    "64",
]


def test_loads_attacks_and_signals(exported_colors, npz, script, printed, monkeypatch):
    monkeypatch.setattr(script("bench_server"), "CLIENTS", 32)  # some of the malformed wait 2 s for an answer
    text = printed("bench_server", exported_colors, npz, *WORDS)
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["capacity", "0.8 of it", "twice it"]
    assert " 500" not in lines[5] and "; 0 replies tell what is inside; memory" in lines[5]
    assert lines[6].startswith("SIGKILL under load: ") and lines[6].endswith("exit code -9; nothing said")
    assert lines[7].startswith("started again")
    assert "exit code 0; stopped: " in lines[8] and lines[8].endswith(" 0 without an answer")


def test_quantiles_and_shares_of_a_row(script):
    bench = script("bench_server")
    good = [bench.Reply(0.001 * (i + 1), 200, i % 2, i == 0, i < 50) for i in range(100)]
    replies = [*good, *[bench.Reply(9, 503)] * 60, *[bench.Reply(9, 504)] * 38, *[bench.Reply(9, 0)] * 2]
    row = bench.row_of("load", 100.0, 2.0, replies, "")
    assert row[1:6] == pytest.approx((100, 50, 51, 91, 100))
    assert row[6:11] == (30.0, 19.0, 1.0, 2, 50.0) and row[11] == "50 50"


def test_images_are_needed(exported_colors, tmp_path, printed):
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="x.npz has no images and labels"):
        printed("bench_server", exported_colors, tmp_path / "x.npz")
