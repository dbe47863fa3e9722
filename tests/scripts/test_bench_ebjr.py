"""The benchmark of cascades answers the images in every way it compares."""

import torch

from adaptive.inference import run_adaptive
from adaptive.policy import Policy
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
