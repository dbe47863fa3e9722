"""What the benchmark of real early exit times is the network's answer."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from adaptive.inference import fold_batch_norm
from adaptive.policy import Policy, model_hash
from experiment import open_network
from models import create_model


@torch.inference_mode()
def test_the_timed_early_exit_gives_the_answers_of_its_exit(script):
    torch.manual_seed(0)
    network, image = create_model("reg400m_perceiver_t32", num_classes=5).eval(), torch.randn(1, 3, 48, 48)
    for k, logits in enumerate(network(image)):
        assert torch.equal(script("bench_runtime").answer(network, image, k), logits)


@torch.inference_mode()
def test_torchvisions_baseline_is_tuned_like_ours(script):
    baseline = script("bench_runtime").OneExit(torchvision.models.regnet_y_400mf()).eval()
    image, folded = torch.randn(1, 3, 64, 64), fold_batch_norm(baseline)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_close(folded(image)[0], baseline(image)[0], rtol=1e-4, atol=1e-5)


def test_speed_of_a_checkpoint_by_batch_size(checkpoints, printed):
    text = printed("bench_runtime", "--checkpoint", checkpoints["msdnet"], "--images", 16, "--rounds", 1)
    assert "simulated accuracy" in text and "the same in bf16, images/s" in text
    assert text.count("exits unlike simulated") == 3 and text.count("0 and 0 of 16") >= 8


def test_throughput_of_a_random_network(printed):
    words = "--model msdnet --nBlocks 2 --nChannels 4 --growthRate 4 --images 4 --rounds 1 --shares 50 50"
    text = printed("bench_runtime", *words.split())
    assert text.count("batch   all exits") == 3 and text.count(" 0 and 0 of 4\n") >= 8


def test_latency_beside_another_network(printed):
    words = "--latency --model msdnet_cifar_lin5 --input_size 32 --rounds 1 --baselines resnet18"
    lines = printed("bench_runtime", *words.split(), "torchvision/squeezenet1_1").splitlines()
    networks = [line.split()[:2] for line in lines[-7:]]
    assert networks == [
        *(["msdnet_cifar_lin5", str(k)] for k in range(5)),
        ["resnet18", "0"],
        ["torchvision/squeezenet1_1", "0"],
    ]


def test_top_1_is_the_published_one_of_the_published_network(script):
    subject = script("bench_runtime").latency_subject
    name = "mobilenetV3_0x75_perceiver_t128"
    network, reported = subject(name, {})
    assert reported[-1] == "74.59 (published)" and network.num_exits == len(reported) == 4
    assert subject(name, {"depth_factor": [1, 1, 1, 3]})[1] == reported
    assert subject(name, {"depth_factor": [1, 1, 1, 1]})[1] == ["-"] * 4


def test_a_saved_policy_is_timed(checkpoints, script, capsys, tmp_path):
    module, path, file = script("bench_runtime"), tmp_path / "p.json", checkpoints["msdnet"]
    network = open_network(file).network
    policy = Policy((1e8, -1e8), "entropy", "mine", answer="mean", model_hash=model_hash(network))
    policy.save(path)
    flags = module.Flags(checkpoint=file, policy=str(path), images=4)
    _, images, found = module.trained_subject(flags)
    assert found == policy and len(images) == 4
    assert f"{file}: mine, simulated accuracy" in capsys.readouterr().out
    replace(policy, model_hash="0" * 64).save(path)
    with pytest.raises(ValueError, match="^policy 'mine' is for weights 000000000000, the network has"):
        module.trained_subject(flags)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--checkpoint c --policy p --shares 50 50", "--policy p and --shares 50.0 50.0: give one of them"),
        ("--checkpoint c --policy p --latency", "--policy p and --latency True: give one of them"),
        ("--policy p", "--policy p: name the network it was made for: --checkpoint FILE"),
    ],
)
def test_policies_beside_other_flags_are_refused(printed, words, line):
    with pytest.raises(ValueError) as error:
        printed("bench_runtime", *words.split())
    assert str(error.value) == line
