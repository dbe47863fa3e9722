import json
import os
import pickle
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from loading.loaders import ordered_loader
from loading.sources import CIFAR10_STATS, CIFAR100_STATS, IMAGENET_STATS, Data, load_npz, open_source
from loading.split import Split, make_split
from utils import Compute, Runtime

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))
PIXELS = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def open_data(*paths, **given):
    return open_source(Data(*paths, **given))


def test_digits_are_complete_and_stratified(as_tensor):
    source = open_data("DIGITS")
    assert (len(source.train), len(source.test), source.num_classes, source.input_size) == (1437, 360, 10, 32)
    assert np.bincount(source.test.labels).tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert np.bincount(source.train.labels).min() >= 139
    image, label = source.train[0]
    assert image.mode == "RGB" and image.size == (32, 32) and label == 0
    assert source.train.images.mean() / 255 == pytest.approx(source.mean[0], abs=1e-4)
    assert source.train.images.std() / 255 == pytest.approx(source.std[0], abs=1e-4)
    assert Split(source.test, [5], as_tensor).name(0) == "DIGITS test[5]"


def test_digits_split_is_a_constant():
    seeds = [open_data("DIGITS", seed=seed).test for seed in (0, 1)]
    assert np.array_equal(seeds[0].images, seeds[1].images)
    assert seeds[0].labels[:20].tolist() == [
        9,
        2,
        5,
        7,
        6,
        9,
        7,
        3,
        3,
        3,
        4,
        6,
        9,
        2,
        0,
        0,
        7,
        2,
        4,
        3,
    ]  # as first drawn


def test_npz_of_encoded_files_equals_npz_of_pixels(tmp_path, pixels, encoded):
    images = pixels(5)
    files = [encoded(image) for image in images]
    offsets = np.cumsum([0] + [len(file) for file in files])
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    np.savez(tmp_path / "a.npz", jpeg=jpeg, offsets=offsets, labels=np.arange(5))
    data = load_npz(tmp_path / "a.npz", 10)
    assert np.array_equal(data.images, images) and data.labels.tolist() == list(range(5))
    np.savez(tmp_path / "bad.npz", jpeg=jpeg[:-200], offsets=offsets, labels=np.arange(5))
    with pytest.raises(ValueError, match="cannot read .*bad.npz"):
        load_npz(tmp_path / "bad.npz", 10)


@pytest.mark.parametrize(
    "arrays, complaint",
    [
        ({"x": np.zeros(1)}, r"holds \['x'\]; expected images and labels"),
        ({"images": PIXELS}, r"holds \['images'\]"),
        ({"images": PIXELS[:, :16], "labels": np.zeros(3, int)}, r"uint8 \(3, 16, 32, 3\), expected"),
        ({"images": PIXELS / 255, "labels": np.zeros(3, int)}, "float64"),
        ({"images": PIXELS[:0], "labels": np.zeros(0, int)}, r"\(0, 32, 32, 3\), expected"),
        ({"images": PIXELS, "labels": np.zeros(4, int)}, r"int64 \(4,\), expected integers \(3,\)"),
        ({"images": PIXELS, "labels": np.zeros(3)}, "float64"),
        ({"images": PIXELS, "labels": np.array([0, 1, 10])}, "from 0 to 10, expected 0 to 9"),
        ({"images": PIXELS, "labels": np.array([0, 1, -1])}, "from -1 to 1, expected 0 to 9"),
        ({"images": PIXELS, "labels": np.array([None, 1, 2])}, "Object arrays cannot be loaded"),
    ],
)
def test_malformed_npz_is_one_line_that_names_the_file(tmp_path, arrays, complaint):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz.*{complaint}") as caught:
        load_npz(tmp_path / "a.npz", 10)
    assert "\n" not in str(caught.value)


def test_truncated_or_missing_npz_is_refused(tmp_path, write_npz):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:-300])
    for name in ("a.npz", "missing.npz"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            load_npz(tmp_path / name, 10)


def test_the_npz_file_that_is_missing_is_named(tmp_path, write_npz):
    there, missing = str(write_npz(tmp_path / "a.npz")), str(tmp_path / "b.npz")
    for paths in ((missing, None), (missing, there), (there, missing)):
        with pytest.raises(ValueError, match=f"^no such file: {re.escape(missing)}$"):
            open_source(Data("CIFAR10", *paths))


def test_cifar_needs_both_npz_files_and_knows_its_class_count(tmp_path, write_npz):
    path = str(write_npz(tmp_path / "a.npz", count=200, num_classes=100))
    with pytest.raises(ValueError, match="--eval_data_path"):
        open_data("CIFAR100", path)
    source = open_data("CIFAR100", path, path)
    assert source.num_classes == 100 and (source.mean, source.std, source.input_size) == CIFAR100_STATS
    as_there = open_data("CIFAR", path, path)  # 224 pixels, as in Dyn-Perceiver's script
    assert (
        as_there.num_classes == 100 and (as_there.mean, as_there.std, as_there.input_size) == IMAGENET_STATS
    )
    assert np.array_equal(as_there.train[7][0], source.train[7][0])
    with pytest.raises(ValueError, match="from 0 to 99, expected 0 to 9"):
        open_data("CIFAR10", path, path)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST"])
def test_absent_torchvision_data_says_where_it_looked_and_how_to_get_it(tmp_path, name):
    with pytest.raises(ValueError, match=rf"no {name} in {tmp_path}.*--download true"):
        open_data(name, str(tmp_path))


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_jpegs(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (40 * i, 0, 0)).save(folder / name)


def fake_food101(root):
    for split, name in (("train", "a"), ("test", "b")):
        write_text(
            root / f"food-101/meta/{split}.json",
            json.dumps({"pie": [f"pie/{name}"], "soup": [f"soup/{name}"]}),
        )
    write_jpegs(
        root / "food-101/images", *(f"{kind}/{name}.jpg" for kind in ("pie", "soup") for name in "ab")
    )


def fake_stanford_cars(root):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["A", "B"], object)})
    rows = np.array([("1.jpg", 1), ("2.jpg", 2)], dtype=[("fname", object), ("class", int)])
    for name, folder in (
        ("devkit/cars_train_annos.mat", "train"),
        ("cars_test_annos_withlabels.mat", "test"),
    ):
        savemat(base / name, {"annotations": rows})
        write_jpegs(base / f"cars_{folder}", "1.jpg", "2.jpg")


def fake_fgvc_aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    write_text(data / "variants.txt", "707\n727\n")
    for split, name in (("trainval", "1"), ("test", "2")):
        write_text(data / f"images_variant_{split}.txt", f"{name}0 707\n{name}1 727\n")
    write_jpegs(data / "images", "10.jpg", "11.jpg", "20.jpg", "21.jpg")


def fake_flowers102(root):
    base = root / "flowers-102"
    write_jpegs(base / "jpg", *(f"image_{i:05d}.jpg" for i in range(1, 7)))
    savemat(base / "imagelabels.mat", {"labels": [1, 2, 1, 2, 1, 2]})
    savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})


def fake_oxford_iiit_pet(root):
    base = root / "oxford-iiit-pet"
    for split, name in (("trainval", "1"), ("test", "2")):
        write_text(base / f"annotations/{split}.txt", f"Beagle_{name} 1 1 1\nPug_{name} 2 1 2\n")
    write_jpegs(base / "images", *(f"{kind}_{name}.jpg" for kind in ("Beagle", "Pug") for name in "12"))


def fake_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    for part, count in (("train", 2), ("test", 1)):
        rows = {"data": np.zeros((count, 3072), np.uint8), "fine_labels": [3, 7][:count]}
        (folder / part).write_bytes(pickle.dumps(rows))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine {i}" for i in range(100)]}))


@pytest.mark.parametrize(
    ("name", "fake", "classes", "title"),
    [
        ("Food101", fake_food101, 101, "Food101 train"),
        ("StanfordCars", fake_stanford_cars, 196, "StanfordCars train"),
        ("FGVCAircraft", fake_fgvc_aircraft, 100, "FGVCAircraft trainval"),
        ("Flowers102", fake_flowers102, 102, "Flowers102 train+val"),
        ("OxfordIIITPet", fake_oxford_iiit_pet, 37, "OxfordIIITPet trainval"),
    ],
)
def test_transfer_sets_are_read_from_torchvisions_folders(tmp_path, monkeypatch, name, fake, classes, title):
    with pytest.raises(ValueError, match=rf"no {name} in {tmp_path}.*--download true"):
        open_data(name, str(tmp_path))
    fake(tmp_path)
    monkeypatch.setattr(
        "torchvision.datasets.flowers102.check_integrity", lambda *_: True
    )  # compares with real files
    source = open_data(name, str(tmp_path))
    assert (source.num_classes, source.input_size) == (classes, 224)
    assert [sorted(source.train[i][1] for i in range(2)), [source.test[i][1] for i in range(2)]] == [
        [0, 1],
        [0, 1],
    ]
    split = make_split(source.train, None, np.asarray)
    assert split[1][0].shape == (7, 9, 3) and split.name(1) == f"{title}[1]"


def test_fashion_mnist_becomes_rgb_of_32_pixels(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            header + np.full(count * 784, 99, np.uint8).tobytes()
        )
        labels = np.array([2049, count], ">i4").tobytes() + bytes(range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    source = open_data("FashionMNIST", str(tmp_path))
    image, label = source.train[2]
    assert (len(source.train), len(source.test), label) == (3, 2, 2)
    assert np.array_equal(np.array(image), np.full((32, 32, 3), 99))


@pytest.mark.parametrize("name, path", [("MNIST", "x"), ("cifar10", "x"), ("foo/bar", "x"), ("", None)])
def test_unknown_name_lists_the_known(name, path):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'.*DIGITS, CIFAR10.*image_folder"):
        open_data(name, path)


@pytest.mark.parametrize("name", ["CIFAR10", "IMNET", "image_folder"])
def test_missing_path_is_asked_for(name):
    with pytest.raises(ValueError, match=f"{name} needs --data_path"):
        open_data(name)


def test_image_folder_reads_classes_and_names_files(tmp_path, write_tree, as_tensor):
    train, test = write_tree(tmp_path / "a"), write_tree(tmp_path / "b", count=1)
    source = open_data("image_folder", str(train), str(test))
    assert (len(source.train), len(source.test), source.num_classes, source.input_size) == (4, 2, 2, 224)
    assert Split(source.train, [3], as_tensor).name(0) == str(train / "dog" / "1.png")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_image_folder_finds_its_own_train_and_held_out_trees(tmp_path, held_out, write_tree):
    write_tree(tmp_path / "train", count=3), write_tree(tmp_path / held_out, count=1)
    source = open_data("image_folder", str(tmp_path))
    assert (len(source.train), len(source.test), source.num_classes) == (6, 2, 2)


def test_image_folder_without_evaluation_tree_holds_out_a_tenth(tmp_path, write_tree, as_tensor):
    write_tree(tmp_path, count=15)
    source = open_data("image_folder", str(tmp_path), seed=1)
    names = [
        {Split(data, [i], as_tensor).name(0) for i in range(len(data))}
        for data in (source.train, source.test)
    ]
    assert [len(part) for part in names] == [27, 3] and len(names[0] | names[1]) == 30
    assert open_data("image_folder", str(tmp_path), seed=1).test.indices == source.test.indices


def test_imagenet_layout(tmp_path, write_tree):
    write_tree(tmp_path / "train"), write_tree(tmp_path / "val", count=1)
    source = open_data("IMNET", str(tmp_path))
    assert (len(source.train), len(source.test), source.num_classes) == (4, 2, 2)
    assert source.mean == (0.485, 0.456, 0.406)


def test_trees_with_other_classes_are_refused(tmp_path, write_tree):
    write_tree(tmp_path / "train", ("a", "b", "c")), write_tree(tmp_path / "val", ("a", "c", "d", "e", "f"))
    with pytest.raises(ValueError, match="same class folders.*: b, d, e$"):
        open_data("IMNET", str(tmp_path))


def test_folder_errors_name_the_folder(tmp_path, write_tree):
    (tmp_path / "bare").mkdir()
    (write_tree(tmp_path / "holes") / "bird").mkdir()
    complaints = {"absent": "there is no such folder", "bare": "any class folder", "holes": "classes bird"}
    for name, complaint in complaints.items():
        with pytest.raises(ValueError, match=f"image folder {tmp_path / name}: .*{complaint}"):
            open_data("image_folder", str(tmp_path / name))


@pytest.mark.parametrize("damage, num_workers", [("cut", 0), ("cut", 1), ("text", 0), ("gone", 0)])
def test_a_corrupt_image_is_named_also_from_a_worker(tmp_path, damage, num_workers, write_tree, as_tensor):
    source = open_data("image_folder", str(write_tree(tmp_path / "a")), str(write_tree(tmp_path / "b")))
    bad = tmp_path / "a" / "dog" / "0.png"
    contents = bad.read_bytes()
    bad.unlink() if damage == "gone" else bad.write_bytes(contents[:50] if damage == "cut" else b"no image")
    split = Split(source.train, None, as_tensor)
    last_line = rf"cannot read image {re.escape(str(bad))}: [^\n]+\s*$"
    with pytest.raises(ValueError, match=last_line):
        list(
            ordered_loader(
                split, Runtime(batch_size=1, num_workers=num_workers), Compute(torch.device("cpu"))
            )
        )


@pytest.mark.parametrize(
    "name, counts",
    [("cifar10_test", 1000), ("cifar10_train", 4000), ("cifar100_test", 20), ("cifar10_jpeg_test", 10_000)],
)
def test_real_cifar_files(name, counts):
    path = DATA / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    data = load_npz(path, 100 if "100" in name else 10)
    assert len(data) == counts
    if counts == 10_000:
        assert np.bincount(data.labels).tolist() == [1000] * 10
    if counts >= 1000:  # enough images to be near the statistics of all
        assert np.allclose(data.images.mean((0, 1, 2)) / 255, CIFAR10_STATS[0], atol=0.02)


# Names of classes


def test_names_of_classes_are_those_the_data_set_knows(tmp_path, write_npz, write_tree):
    names = open_data("CIFAR10", *[str(write_npz(tmp_path / "a.npz"))] * 2).class_names
    assert names[:3] == ("airplane", "automobile", "bird") and len(names) == 10 and names[9] == "truck"
    hundred = str(write_npz(tmp_path / "b.npz", count=100, num_classes=100))
    assert open_data("CIFAR100", hundred, hundred).class_names == tuple(map(str, range(100)))
    assert open_data("FashionMNIST", *[str(tmp_path / "a.npz")] * 2).class_names[9] == "Ankle boot"
    assert open_data("DIGITS").class_names == tuple("0123456789")
    tree = str(write_tree(tmp_path / "tree", count=5))
    assert open_data("image_folder", tree).class_names == open_data("image_folder", tree, tree).class_names
    assert open_data("image_folder", tree).class_names == ("cat", "dog")


def test_torchvision_tells_the_names_in_its_folder(tmp_path, monkeypatch):
    fake_cifar100(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # of the real files
    source = open_data("CIFAR100", str(tmp_path))
    assert (len(source.train), len(source.test), source.num_classes) == (2, 1, 100)
    assert source.class_names == tuple(f"fine {i}" for i in range(100)) and source.train[1][1] == 7
    assert source.train.name(1) == "CIFAR100 train[1]"


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="--nb_classes 7, but DIGITS has 10 classes"):
        open_data("DIGITS", nb_classes=7)


def test_fields_are_the_published_flags():
    """Names and defaults of Dyn-Perceiver's script, but for what names its cluster and its data."""
    ours = {field.name: field.default for field in fields(Data)}
    assert ours.items() >= {"eval_data_path": None, "seed": 0}.items()
    assert ours.keys() >= {"data_set", "data_path", "nb_classes"} and ours["data_set"] == "DIGITS"
    assert all(field.metadata["about"] for field in fields(Data))
