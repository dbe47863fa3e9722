"""What the benchmarks compare is the same computation."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from adaptive.inference import fold_batch_norm
from models import create_model
from models.attention import attend

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "width"), [(4, 32, 32, 26), (1, 128, 49, 32), (1, 60, 16, 5)]
)
def test_the_plain_attention_is_the_fused_one(heads, queries, keys, width):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, width, dtype=torch.float64) for n in (queries, keys, keys))
    assert_close(
        script("bench_train").plain_attend(q, k, v, 0.0), attend(q, k, v, 0.0), rtol=1e-12, atol=1e-12
    )


@torch.inference_mode()
def test_the_timed_early_exit_gives_the_answers_of_its_exit():
    torch.manual_seed(0)
    network, image = create_model("reg400m_perceiver_t32", num_classes=5).eval(), torch.randn(1, 3, 48, 48)
    for k, logits in enumerate(network(image)):
        assert torch.equal(script("bench_runtime").answer(network, image, k), logits)


@torch.inference_mode()
def test_torchvisions_baseline_is_tuned_like_ours():
    baseline = script("bench_runtime").OneExit(torchvision.models.regnet_y_400mf()).eval()
    image, folded = torch.randn(1, 3, 64, 64), fold_batch_norm(baseline)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_close(folded(image)[0], baseline(image)[0], rtol=1e-4, atol=1e-5)


def test_curves_of_runs_are_drawn_and_tabled(tmp_path, capsys):
    exits = [{"exit": k, "macs": macs, "acc1": acc} for k, (macs, acc) in enumerate([(1e6, 0.5), (2e6, 0.6)])]
    rows = [
        {"macs": 1.5e6, "accuracy": 0.625},
        {"macs": 2.5e6, "accuracy": 0.9},
    ]  # the second costs more than exit 1
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "anytime.json").write_text(json.dumps(exits))
        (tmp_path / name / "dynamic.json").write_text(json.dumps(rows))
    draw = script("plot_curves").main
    draw([str(tmp_path / "x.svg"), f"plain={tmp_path / 'a'}", f"l2w={tmp_path / 'b'}"])
    *_, plain, l2w = capsys.readouterr().out.splitlines()
    assert plain == "| plain | 50.00 | 60.00 | 62.50 |" and l2w.startswith("| l2w |")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    with pytest.raises(ValueError, match="no anytime.json in"):
        draw([str(tmp_path / "y.svg"), f"c={tmp_path}"])
    (tmp_path / "b" / "anytime.json").write_text(json.dumps(exits[:1]))
    with pytest.raises(ValueError, match="b is another network than a"):
        draw([str(tmp_path / "y.svg"), f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"])
    assert not (tmp_path / "y.svg").exists()
