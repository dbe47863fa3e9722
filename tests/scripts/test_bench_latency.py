"""The benchmark of latencies prints a row per exit of every network; what it times is the network's answer."""

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from adaptive.backend import tuned
from models import create_model


def test_a_row_for_every_exit(printed):
    words = "--models cifar_resnet msdnet:nBlocks=2,nChannels=8 torchvision/squeezenet1_1 --input_size 32"
    lines = printed("bench_latency", *words.split(), "--rounds", 1).splitlines()
    rows = [line.split() for line in lines[-4:]]
    assert [row[:2] for row in rows] == [
        ["cifar_resnet", "0"],
        *(["msdnet:nBlocks=2,nChannels=8", str(k)] for k in range(2)),
        ["torchvision/squeezenet1_1", "0"],
    ]
    assert rows[0][9:] == ["1.00", "-", "-"] and all(len(row) == 12 for row in rows)


def test_ratios_are_over_the_network_of_timm_above(script):
    names = ["timm/efficientnet_b0", "rexnetv1_090", "timm/other", "rexnetv1_100"]
    times = {
        (name, 0, form): [10.0 * i + 10] * 3
        for i, name in enumerate(names)
        for form in ("as built", "channels-last", "tuned")
    }
    rows = list(script("bench_latency").rows_of(times, {(name, 0): (1.0, "-") for name in names}))
    assert [row[9:11] for row in rows] == [(1, "1.00"), (2, "0.96"), (1, "-"), (40 / 30, "-")]


@torch.inference_mode()
def test_the_timed_early_exit_gives_the_answers_of_its_exit(script):
    torch.manual_seed(0)
    network, image = create_model("reg400m_perceiver_t32", num_classes=5).eval(), torch.randn(1, 3, 48, 48)
    for k, logits in enumerate(network(image)):
        assert torch.equal(script("bench_latency").answer(network, image, k), logits)


@torch.inference_mode()
def test_torchvisions_baseline_is_tuned_like_ours(script):
    baseline = script("bench_latency").OneExit(torchvision.models.regnet_y_400mf()).eval()
    image, folded = torch.randn(1, 3, 64, 64), tuned(baseline)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_close(folded(image)[0], baseline(image)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "last"), [("1/1/1/3", "74.59"), ("1/1/1/1", "-")])
def test_top_1_is_the_published_one_of_the_published_network(script, depth, last):
    network, top_1 = script("bench_latency").network_of(
        f"mobilenetV3_0x75_perceiver_t128:depth_factor={depth}"
    )
    assert top_1[-1] == last and network.num_exits == len(top_1) == 4


def test_top_1_of_torchvision_is_by_weights(script):
    network_of = script("bench_latency").network_of
    assert network_of("torchvision/regnet_y_800mf")[1] == ["76.42 or 78.83"]
    with pytest.raises(ValueError, match=r"^--models torchvision/regnet_y_800m: .*regnet_y_800mf"):
        network_of("torchvision/regnet_y_800m")
