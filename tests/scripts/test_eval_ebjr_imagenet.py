"""The pair of EfficientNets is evaluated on a folder of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive.policy import Policy
from models import create_model


@pytest.fixture
def evaluate(script, printed, monkeypatch):
    """Runs the script on a folder with untrained networks, which read images of 32 pixels."""
    module = script("eval_ebjr_imagenet")
    monkeypatch.setattr(module, "SIDES", {0: 32, 2: 32})

    def untrained(number):
        return create_model(f"timm/tf_efficientnet_lite{number}", 1000).state_dict()

    monkeypatch.setattr(module, "lite", untrained)
    return lambda *words: printed("eval_ebjr_imagenet", *words)


@pytest.fixture
def folder(tmp_path):
    """Four images of any kind."""
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 40), (48, 40), (40, 40), (40, 48)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_row_for_every_confidence_and_a_line_for_a_policy(evaluate, folder):
    path = folder / "policy.json"
    Policy((1e8, -1e8), "margin", "mine", off=(0,)).save(path)
    lines = evaluate(folder, "--images", 4, "--policy", path).splitlines()
    networks = [line for line in lines if line.startswith("network ")]
    assert "4,652,008 parameters" in networks[0] and "6,092,072 parameters" in networks[1]
    kinds = [line.split()[0] for line in lines[-5:]]
    assert kinds == ["max_prob", "margin", "entropy", "energy_logits", "energy_softmax"]
    shares = [word for share in (0, 5, 10, 20, 30, 40, 50, 100) for word in (str(share), "%")]
    assert lines[-6].split() == ["confidence", *shares, "AUROC"]
    second = next(line for line in lines if line.startswith("network 1: ")).split()
    (line,) = (line for line in lines if line.startswith("policy "))
    right, cost = second[6], float(second[4])  # of the second network alone
    assert line == f"policy 'mine': {right} % at {cost:.3f} G, 100.0 % deferred"


def test_another_number_of_images_is_said(evaluate, tmp_path):
    with pytest.raises(ValueError, match="holds 0 images, expected 1000, one a class"):
        evaluate(tmp_path)


def test_each_half_defers_by_the_threshold_of_the_other(script):
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [1.0] * 8])
    folds = (torch.tensor([0, 2, 4, 6]), torch.tensor([1, 3, 5, 7]))
    crossed = script("eval_ebjr_imagenet").crossed
    assert crossed(scores, 0.5, folds).tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert crossed(scores, 1.0, folds).tolist() == [1] * 8
