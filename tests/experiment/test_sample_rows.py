"""samples.csv: a row for every test image."""

import csv
import os

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset

from adaptive.confidence import NOBODY
from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from datasets import Data, Split, open_splits
from experiment.sample_rows import COLUMNS, write_samples

# Two exits, four images of class 0, 1, 2, 0; at exit 0 they are sure, unsure, sure and unsure.
FIRST = torch.tensor([[8.0, 0, 0], [1, 0, 0], [8, 0, 0], [0, 1, 0]])
SECOND = torch.tensor([[0, 8.0, 0], [0, 8, 0], [0, 0, 8], [0, 0, 8]])
TARGETS = torch.tensor([0, 1, 2, 0])
POLICY = Policy((0.9, 0.0))
TABLES = ExitTables.of([FIRST, SECOND], TARGETS)


def rows_of(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "file", "label", "exit", "answer", "confidence"] == list(COLUMNS)
    return rows


READINGS = [
    Policy((0.8, 0.7, 0.6, 0.0)),
    Policy((0.8, 0.7, 0.6, 0.0), answer="best", temperatures=(2.0, 1.0, 1.5, 0.5)),
    Policy((0.8, 0.7, 0.6, 0.0), answer="mean"),
    Policy((1.88, NOBODY, 1.87, 0.0), "energy_softmax", off=(1,)),
    Policy((2.0, 2.0, 2.0, 1.0), "agreement", answer="mean"),
]


@pytest.mark.parametrize("policy", READINGS, ids=lambda policy: f"{policy.confidence}-{policy.answer}")
def test_outcomes_are_those_of_one_image_after_another(policy):
    draws = torch.Generator().manual_seed(0)
    exits = [3 * torch.randn(40, 5, generator=draws) for _ in range(4)]
    targets = torch.randint(5, (40,), generator=draws)
    met = policy.outcome(ExitTables.of(exits, targets, policy.reading))
    for i in range(40):
        memory = None
        for k, logits in enumerate(exits):
            said = policy.reading.read(k, logits[i : i + 1], memory)
            answers, leaves, memory = policy.decide(k, logits[i : i + 1], memory)
            if leaves:
                break
        answer = int(answers.argmax())
        found = [int(met.exits[i]), int(met.answers[i]), bool(met.correct[i])]
        assert found == [k, answer, answer == targets[i].item()]
        assert met.confidence[i].item() == pytest.approx(said.confidence.item(), rel=1e-6)
    assert len(met.exits.unique()) >= 3


@pytest.fixture
def pictures(tmp_path):
    """Images in folders whose names are hard to write."""
    names = [b'cat/a,b "c"\n\r.png', b"cat/d/\xff\xfe.png", b"dog/+1.png", b"dog/2.png"]
    root = tmp_path / "pictures"
    for part in ("train", "val"):
        for name in names:
            path = os.fsencode(root / part) + b"/" + name
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                Image.new("RGB", (40, 36)).save(file, "PNG")
    return root, [os.fsdecode(name) for name in names]


def test_rows_tell_index_file_label_exit_answer_and_confidence(tmp_path, pictures):
    root, names = pictures
    data = Data("image_folder", str(root))
    test = open_splits(data).test
    for path in (str(root), f"{root}/", os.path.relpath(root)):  # as the user writes it
        data = Data("image_folder", path)
        test = open_splits(data).test
        write_samples(tmp_path / "samples.csv", test, torch.arange(4), TABLES, POLICY, path)
        rows = rows_of(tmp_path / "samples.csv")
        assert [row[1] for row in rows] == [f"val/{name}" for name in names]
        assert all((root / row[1]).is_file() for row in rows)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [tuple(map(int, row[2:5])) for row in rows] == [(0, 0, 0), (1, 1, 1), (2, 0, 0), (0, 1, 2)]
    sure = FIRST[0].softmax(-1)[0].item()
    assert [float(row[5]) for row in rows] == [sure, SECOND[1].softmax(-1)[1].item(), sure, sure]


def test_files_are_below_the_folder_of_the_test_images(tmp_path, pictures):
    root, names = pictures
    path = str(root / "val")
    splits = open_splits(Data("image_folder", str(root / "train"), path))
    write_samples(tmp_path / "samples.csv", splits.test, torch.arange(4), TABLES, POLICY, path)
    assert [row[1] for row in rows_of(tmp_path / "samples.csv")] == names


def test_a_part_of_the_test_images_keeps_its_indices(tmp_path, pictures):
    root, names = pictures
    splits, part = open_splits(Data("image_folder", str(root))), torch.tensor([3, 1])
    write_samples(tmp_path / "samples.csv", splits.test, part, TABLES.part(part), POLICY, root)
    assert [row[:5] for row in rows_of(tmp_path / "samples.csv")] == [
        ["3", f"val/{names[3]}", "0", "1", "2"],
        ["1", f"val/{names[1]}", "1", "1", "1"],
    ]


def test_an_image_in_the_place_of_another_keeps_its_own_index(tmp_path, pictures):
    root, names = pictures
    test = open_splits(Data("image_folder", str(root))).test
    replaced = Split(test.base, [0, 2, 2, 3], test.transform)
    write_samples(tmp_path / "samples.csv", replaced, torch.arange(4), TABLES, POLICY, root)
    rows = rows_of(tmp_path / "samples.csv")
    assert [(row[0], row[1]) for row in rows] == [(str(i), f"val/{names[i]}") for i in (0, 2, 2, 3)]


def test_images_in_arrays_have_no_files_and_those_of_streams_no_index(tmp_path, npz):
    for test in (
        open_splits(Data()).test,
        open_splits(Data("CIFAR10", npz, npz)).test,
        IterableImageDataset("", reader=object()),
    ):
        write_samples(tmp_path / "samples.csv", test, torch.arange(1, 5), TABLES, POLICY)
        assert [row[:2] for row in rows_of(tmp_path / "samples.csv")] == [[str(i), ""] for i in range(1, 5)]


@pytest.fixture
def npz(tmp_path):
    """Ten small images, one of each class."""
    images = np.random.RandomState(0).randint(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", images=images, labels=np.arange(10))
    return str(tmp_path / "small.npz")


def test_confidence_is_written_to_the_last_digit(tmp_path, npz):
    logits = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    tables = ExitTables.of([logits], torch.arange(10), "energy_softmax")
    policy, test = Policy((-NOBODY,), "energy_softmax"), open_splits(Data("CIFAR10", npz, npz)).test
    write_samples(tmp_path / "samples.csv", test, torch.arange(10), tables, policy)
    written = [float(row[5]) for row in rows_of(tmp_path / "samples.csv")]
    assert written == tables.confidence[0].tolist()


def test_a_fault_leaves_the_file_as_it_was(tmp_path, npz):
    path = tmp_path / "samples.csv"
    path.write_text("old")
    with pytest.raises(ValueError):
        write_samples(path, open_splits(Data("CIFAR10", npz, npz)).test, torch.arange(3), TABLES, POLICY)
    assert path.read_text() == "old" and sorted(file.name for file in tmp_path.glob("*.csv*")) == [
        "samples.csv"
    ]
