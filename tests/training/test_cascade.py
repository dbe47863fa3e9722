import os
import re
from pathlib import Path

import pytest
import torch

from adaptive.flops import count
from adaptive.inference import fold_batch_norm, run_adaptive
from datasets import load_npz
from models import create_model
from training.augment import Augment
from training.cascade import assemble, read_parts, stored_run
from training.checkpoint import save

DATA = (
    Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden")).parent
    / "data"
)
PLAIN = Augment(32, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two checkpoints of ours, the second of a network for two popular classes, and bare published
    weights."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    for name, num_classes, popular in (("student", 5, ()), ("special", 3, (4, 1))):
        network = create_model("cifar_resnet", num_classes, depth=8)
        arch = {"name": "cifar_resnet", "options": {"depth": 8}, "num_classes": num_classes}
        args = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": 16, "popular_classes": popular, "seed": 3}
        content = {"model": network.state_dict(), "arch": arch, "args": args, "calib_indices": [1, 2]}
        save(folder / f"{name}.pth", content)
    weights = create_model("cifar_densenet", 5, depth=10, growthRate=4).state_dict()
    save(folder / "bare.pth", {"state_dict": {f"module.{key}": value for key, value in weights.items()}})
    return folder


def test_a_checkpoint_tells_what_its_text_leaves_open(files):
    ours, special, bare = read_parts(
        [
            f"weights={files / 'student.pth'}",
            f"cifar_resnet:depth=8,size=24,weights={files / 'special.pth'}",
            f"cifar_densenet:depth=10,growthRate=4,weights={files / 'bare.pth'}",
        ]
    )
    assert (
        ours.member[:5] == ("cifar_resnet", {}, (0.5,) * 3, (0.25,) * 3, 16) and ours.member.classes is None
    )
    assert (special.member.size, special.member.classes) == (24, (4, 1, -1))
    assert bare.member.std == (0.2023, 0.1994, 0.2010)  # as the zoo of EBJR was trained
    assert stored_run([ours, special])["calib_indices"] == [1, 2]
    run = stored_run([ours, bare])
    assert run["calib_indices"] is None and run["args"]["seed"] == 3 and "popular_classes" not in run["args"]


def test_a_cascade_is_a_checkpoint(files):
    parts = read_parts([f"weights={files / 'special.pth'}", f"weights={files / 'student.pth'}"])
    content = assemble(parts, 5, PLAIN)
    net = create_model("ebjr", 5, **content["arch"]["options"]).eval()
    net.load_state_dict(content["model"])
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        special, general = net(images)
    assert special.shape == general.shape == (2, 5) and special[:, [0, 2, 3]].max() == -1e4


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["weights={0}/student.pth"], "a cascade has two or more"),
        (
            ["cifar_resnet:depth=8", "weights={0}/student.pth"],
            "name its file of weights, as in NAME:weights=FILE",
        ),
        (["weights={0}/bare.pth"] * 2, "does not name a network known here: write NAME:weights="),
        (["weights={0}/nowhere.pth"] * 2, "cannot read checkpoint .*nowhere.pth: No such file"),
    ],
)
def test_mistakes_in_the_networks(files, texts, message):
    with pytest.raises(ValueError, match=message):
        read_parts([text.format(files) for text in texts])


def test_weights_of_another_network_are_refused(files):
    parts = read_parts(
        [f"cifar_resnet:depth=14,weights={files / 'student.pth'}", f"weights={files / 'student.pth'}"]
    )
    with pytest.raises(ValueError, match=re.escape("holds another network than --model and its options say")):
        assemble(parts, 5, PLAIN)


@pytest.mark.skipif(not (DATA / "ebjr").is_dir(), reason=f"no published weights in {DATA}")
def test_the_published_pair_gives_the_published_figures():
    """Acceptance on the first 1,000 images of CIFAR-10's test set, within two images."""
    names = {"52_6": "52-6", "64_12": "64-12"}
    texts = [f"cifar_densenet_{n}:weights={DATA}/ebjr/cifar10_densenet-bc-{f}.pt" for n, f in names.items()]
    content = assemble(read_parts(texts), 10, PLAIN)
    net = create_model("ebjr", 10, **content["arch"]["options"]).eval()
    net.load_state_dict(content["model"])
    tuned = fold_batch_norm(net).to(memory_format=torch.channels_last)
    data = load_npz(DATA / "cifar10_test.npz", 10)
    images = (torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.from_numpy(data.labels)
    with torch.inference_mode():
        student, teacher = (
            torch.cat(y).argmax(1) for y in zip(*(tuned(x) for x in images.split(50)), strict=True)
        )
    logits, exits = run_adaptive(
        tuned, images, torch.tensor([2.46, -1e8], dtype=torch.float64), "energy_softmax", order="throughput"
    )
    counts = [(student == labels).sum(), (teacher == labels).sum(), (logits.argmax(1) == labels).sum()]
    for ours, published in zip(
        [*map(int, counts), int((exits == 0).sum())], (919, 949, 950, 728), strict=True
    ):
        assert abs(ours - published) <= 2
    papers = count(net, (3, 32, 32)).papers
    cost = 2 * torch.tensor(papers, dtype=torch.float64)[exits].mean().item() / 1e8
    assert cost == pytest.approx(1.3428, abs=0.006)


@pytest.mark.parametrize(
    ("name", "routed", "published"), [("ebjr", 0.2797, 1.36533583), ("ebjr_cifar100", 0.4327, 1.56880506)]
)
def test_the_published_mean_costs_follow_from_the_routed_shares(name, routed, published):
    with torch.device("meta"):
        student, both = count(create_model(name, 100 if "100" in name else 10), (3, 32, 32)).papers
    assert 2 * (student + routed * (both - student)) / 1e8 == pytest.approx(published, abs=5e-9)
