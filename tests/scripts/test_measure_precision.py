"""What precisions change, in a table."""

from adaptive.backend import Eager, tuned

WORDS = ("--device", "cpu", "--num_workers", 0, "--images", 4, "--batch", 4, "--rounds", 1, "--budget", 1e9)


def test_every_precision_has_its_rows(checkpoints, npz, script, printed, monkeypatch):
    """A row with the thresholds of fp32, and one with its own; rounded logits stand for int8."""

    def opened(name, precision, exports):
        assert name == "openvino"
        network = tuned(exports.opened.network, "fp32" if precision == "fp32" else "bf16")
        return Eager(network, precision)

    monkeypatch.setattr(script("measure_precision"), "open_backend", opened)
    data = ("--data_set", "CIFAR10", "--data_path", npz, "--eval_data_path", npz, "--calib", "half_test")
    text = printed("measure_precision", "--checkpoint", checkpoints["msdnet"], *data, *WORDS)
    rows = [line.split() for line in text.splitlines()[-5:]]
    pairs = [(kind, one) for kind in ("bf16", "int8") for one in ("of fp32", "its own")]
    assert [(row[0], " ".join(row[1:3])) for row in rows] == [("fp32", "its own"), *pairs]
    assert rows[0][-3:-1] == ["0.00", "0.00"] and rows[1][3:-1] == rows[3][3:-1]
    assert all(float(row[-1]) > 0 for row in rows)
