"""What the benchmarks compare is the same computation."""

import importlib.util
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


@pytest.mark.parametrize(("heads", "queries", "keys", "width"), [(4, 32, 32, 26), (1, 128, 49, 32), (1, 60, 16, 5)])
def test_the_plain_attention_is_the_fused_one(heads, queries, keys, width):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, width, dtype=torch.float64) for n in (queries, keys, keys))
    assert_close(script("bench_train").plain_attend(q, k, v, 0.0), attend(q, k, v, 0.0), rtol=1e-12, atol=1e-12)


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
