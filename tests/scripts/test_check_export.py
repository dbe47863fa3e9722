"""The table of an exported network has a row for each runtime, and counts what it should."""

import shutil

import pytest
import torch

from adaptive.policy import Policy
from deploy.manifest import Manifest


@pytest.fixture
def check(script, tiny, exported, monkeypatch):
    """The script, for which the tiny network is exported already."""
    module = script("check_export")

    def export(opened, policy, folder):
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        return Manifest.load(folder)

    monkeypatch.setattr(module, "export", export)
    monkeypatch.setattr(module, "subjects", lambda flags: [("tiny", tiny)])
    return module


def test_a_row_for_every_runtime(check, printed):
    lines = printed("check_export", "--num_images", 20).splitlines()
    rows = [line.split() for line in lines[2:]]
    assert [row[:3] for row in rows] == [["tiny", name, "2"] for name in (".pt2", "onnxruntime", "openvino")]
    for _, _, _, difference, moved, ties, images, size, _ in rows:
        assert float(difference) < 1e-5 and moved == ties and images == "20" and float(size) >= 0


def test_a_difference_and_a_moved_image_are_seen(check, printed, monkeypatch):
    runtimes = check.runtimes

    def wrong(folder, found):
        name, calls, size = next(runtimes(folder, found))
        return [(name, [lambda state: (-calls[0](state)[0], calls[0](state)[1]), calls[1]], size)]

    monkeypatch.setattr(check, "runtimes", wrong)
    row = printed("check_export", "--num_images", 20).splitlines()[-1].split()
    assert float(row[3]) > 0.5 and int(row[4]) > 0 and row[5] == "0"


def test_ties_are_images_at_a_threshold(check):
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    confidence = logits[0].softmax(-1).amax(-1)
    places, margins = check.exits_of(Policy((confidence[1].item(), -1e8)), logits)
    assert places.tolist() == [0, 0] and margins[1] < 1e-6 < margins[0]
    assert check.exits_of(check.halves(logits), logits)[0].tolist() == [0, 1]


def test_small_networks_of_families_are_made(script):
    module = script("check_export")
    ((name, opened),) = module.subjects(module.Flags(families=("single",)))
    assert name == "single" and opened.network.num_exits == 1 and not opened.network.training
    with pytest.raises(ValueError, match=r"unknown family 'singl'; did you mean single\?"):
        next(module.subjects(module.Flags(families=("singl",))))
    with pytest.raises(ValueError, match="--policy p.json: is for one --checkpoint, 0 are given"):
        module.main(["--policy", "p.json"])
