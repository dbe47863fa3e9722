"""The benchmark of cascades answers the images in every way it compares."""

from dataclasses import replace

import pytest
import torch

from adaptive.inference import run_adaptive
from adaptive.policy import Policy, model_hash
from experiment import open_network
from experiment.cascade import read_cascade
from models import create_model


def test_a_row_for_every_way(checkpoints, npz, printed):
    student = f"weights={checkpoints['cifar_resnet']}"
    text = printed("bench_ebjr", npz, student, checkpoints["cifar_resnet"], "--rounds", 1, "--product", 64)
    lines = text.splitlines()
    assert "8 images" in lines[0] and "GFLOP/s in fp32" in lines[1]
    titles = [line.split(", batches")[0].split("   ")[0] for line in lines[3:13]]
    kinds = ("student alone", "(b) teacher alone", "(c) cascade")
    forms = ("plain", "tuned", "tuned bf16")
    assert titles == ["(a) the published way", *(f"{kind}, {form}" for form in forms for kind in kinds)]
    assert [line.partition(": (c) / (b)")[0] for line in lines[13:]] == list(forms)


def test_the_published_way_gives_the_same_answers(script):
    torch.manual_seed(0)
    networks = [{"name": "cifar_resnet", "options": {"depth": 8}}] * 2
    model, images = create_model("ebjr", 10, networks=networks).eval(), torch.randn(8, 3, 32, 32)
    with torch.inference_mode():
        confidence = model(images)[0].softmax(1).amax(1).sort().values
    policy = Policy.of([confidence[3:5].mean().item(), -1e8])  # between two images
    logits, exits = run_adaptive(model, images, policy)
    assert exits.sum() == 4
    found = script("bench_ebjr").published(model, policy, images, 1)
    assert torch.equal(found[1], exits)
    torch.testing.assert_close(found[0], logits)


def test_the_published_way_remembers_what_the_policy_does(script):
    torch.manual_seed(0)
    networks = [{"name": "cifar_resnet", "options": {"depth": 8}}] * 2
    model, images = create_model("ebjr", 10, networks=networks).eval(), torch.randn(8, 3, 32, 32)
    policy = Policy((2.0, -1e8), "agreement", answer="mean")
    logits, exits = run_adaptive(model, images, policy)
    found = script("bench_ebjr").published(model, policy, images, 1)
    assert torch.equal(found[1], exits)
    torch.testing.assert_close(found[0], logits)


def test_a_saved_policy_decides(checkpoints, npz, printed, script, monkeypatch, tmp_path):
    student, path = f"weights={checkpoints['cifar_resnet']}", tmp_path / "p.json"
    cascade = open_network(read_cascade([student, student])).network
    policy = Policy((0.25, -1e8), "margin", "mine", model_hash=model_hash(cascade))
    policy.save(path)
    used = []

    def note(deployed, policy):
        used.append(policy)
        raise InterruptedError

    monkeypatch.setattr(script("bench_ebjr"), "contestants_of", note)
    words = ["bench_ebjr", npz, student, student]
    for more in (["--policy", path], ["--threshold", "0.5", "--confidence", "margin"], []):
        with pytest.raises(InterruptedError):
            printed(*words, *more)
    assert used == [policy, Policy((0.5, -1e8), "margin"), Policy((2.46, -1e8), "energy_softmax")]
    with pytest.raises(ValueError, match=r"p\.json and --threshold 0\.5: give one of them$"):
        printed(*words, "--policy", path, "--threshold", 0.5)
    replace(policy, model_hash="0" * 64).save(path)
    with pytest.raises(ValueError, match="^policy 'mine' is for weights 000000000000, the network has"):
        printed(*words, "--policy", path)
