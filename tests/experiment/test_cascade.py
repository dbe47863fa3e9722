import os
import re
from pathlib import Path

import pytest
import torch

from adaptive.exit_tables import ExitTables
from adaptive.flops import count
from adaptive.inference import fold_batch_norm, run_adaptive
from adaptive.policy import Policy
from adaptive.reading import Reading
from experiment import open_network
from experiment.cascade import read_cascade
from experiment.checkpoint import save
from loading.sources import load_npz
from loading.transforms import View
from models import create_model

DATA = (
    Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden")).parent
    / "data"
)
PLAIN = View(32, (0.0,) * 3, (1.0,) * 3)
BARE = "cifar_densenet:depth=10,growthRate=4,weights={}/bare.pth"


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
    ours, special, bare = read_cascade(
        [
            f"weights={files / 'student.pth'}",
            f"cifar_resnet:depth=8,size=24,weights={files / 'special.pth'}",
            BARE.format(files),
        ]
    ).parts
    assert (
        ours.member[:5] == ("cifar_resnet", {}, (0.5,) * 3, (0.25,) * 3, 16) and ours.member.classes is None
    )
    assert (special.member.size, special.member.classes) == (24, (4, 1, -1))
    assert bare.member.std == (0.2023, 0.1994, 0.2010)  # as the zoo of EBJR was trained
    student, special, bare = (f"weights={files / 'student.pth'}", f"weights={files / 'special.pth'}", BARE)
    assert read_cascade([student, special]).stored.held_out == [1, 2]
    stored = read_cascade([student, bare.format(files)]).stored
    assert stored.held_out is None and stored.flags["seed"] == 3 and "popular_classes" not in stored.flags


def test_a_cascade_is_a_checkpoint(files):
    texts = [f"weights={files / 'special.pth'}", f"weights={files / 'student.pth'}"]
    opened = open_network(read_cascade(texts), num_classes=5, view=PLAIN)
    trained = [one.flags() for one in opened.members]
    assert [(one["seed"], tuple(one["popular_classes"])) for one in trained] == [(3, (4, 1)), (3, ())]
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        special, general = opened.network(images)
    save(files / "cascade.pth", {"model": opened.network.state_dict(), "arch": opened.arch})
    with torch.inference_mode():
        again = open_network(files / "cascade.pth").network(images)
    assert torch.equal(again[0], special) and torch.equal(again[1], general)
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
        read_cascade([text.format(files) for text in texts])


def test_weights_of_another_network_are_refused(files):
    cascade = read_cascade(
        [f"cifar_resnet:depth=14,weights={files / 'student.pth'}", f"weights={files / 'student.pth'}"]
    )
    with pytest.raises(ValueError, match=re.escape("holds another network than --model and its options say")):
        open_network(cascade, num_classes=5, view=PLAIN)


@pytest.mark.skipif(not (DATA / "ebjr").is_dir(), reason=f"no published weights in {DATA}")
def test_the_published_pair_gives_the_published_figures():
    """Acceptance on the first 1,000 images of CIFAR-10's test set, within two images."""
    names = {"52_6": "52-6", "64_12": "64-12"}
    texts = [f"cifar_densenet_{n}:weights={DATA}/ebjr/cifar10_densenet-bc-{f}.pt" for n, f in names.items()]
    net = open_network(read_cascade(texts), num_classes=10, view=PLAIN).network
    tuned = fold_batch_norm(net).to(memory_format=torch.channels_last)
    data = load_npz(DATA / "cifar10_test.npz", 10)
    images = (torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.from_numpy(data.labels)
    with torch.inference_mode():
        logits = [torch.cat(y) for y in zip(*(tuned(x) for x in images.split(50)), strict=True)]
    student, teacher = (one.argmax(1) for one in logits)
    tables = ExitTables.of(logits, labels, Reading("energy_softmax"))
    policy = Policy.of([2.46, -1e8], "energy_softmax")
    exits = policy.exit_of(tables)
    answers = torch.where(exits == 0, student, teacher)
    found, left = run_adaptive(tuned, images[:200], policy, order="throughput")
    # Other sizes of batches change the last digits.
    assert (left != exits[:200]).sum() <= 1 and (found.argmax(1) != answers[:200]).sum() <= 1
    counts = [(student == labels).sum(), (teacher == labels).sum(), (answers == labels).sum()]
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


def test_the_weights_that_are_asked_for_are_those_of_every_network(files, tmp_path):
    content = torch.load(files / "student.pth", weights_only=True)
    average = {
        key: value / 2 if value.is_floating_point() else value for key, value in content["model"].items()
    }
    save(tmp_path / "ema.pth", content | {"model_ema": average})
    cascade = read_cascade([f"weights={files / 'student.pth'}", f"weights={tmp_path / 'ema.pth'}"])
    opened = open_network(cascade, num_classes=5, view=PLAIN)
    assert opened.weights == "weights and moving average of the weights"
    plain = open_network(cascade, weights="model", num_classes=5, view=PLAIN)
    assert plain.weights == "weights"
    for opened_one, weights in ((opened, average), (plain, content["model"])):
        found = opened_one.network.networks[1].state_dict()
        assert all(torch.equal(found[key], value) for key, value in weights.items())
    with pytest.raises(ValueError, match="student.pth has no EMA weights"):
        open_network(cascade, weights="ema", num_classes=5, view=PLAIN)
    with pytest.raises(
        ValueError, match="--networks makes a cascade, ebjr, without other options, not msdnet"
    ):
        open_network(cascade, name="msdnet", num_classes=5, view=PLAIN)
