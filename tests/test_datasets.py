import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import datasets
from datasets import (
    Split,
    batch_names,
    eval_loader,
    load_npz,
    make_split,
    open_data,
    set_epoch,
    split_train,
    train_loader,
)
from training.augment import Augment, eval_transform, mixup_collate, train_transform
from utils import ShardSampler

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pixels(count, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write_npz(path, count=20, num_classes=10, seed=0):
    np.savez(path, images=pixels(count, seed), labels=np.arange(count) % num_classes)
    return path


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def write_tree(root, classes=("cat", "dog"), count=2):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 36), (i, 0, 0)).save(root / name / f"{i}.png")
    return root


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cifar(tmp_path):
    return open_data(
        "CIFAR10", str(write_npz(tmp_path / "a.npz")), str(write_npz(tmp_path / "b.npz", 10, seed=1))
    )


def augmented_loader(source, num_workers, *, rank=0, world_size=1):
    augment = Augment(input_size=32, mean=source.mean, std=source.std, reprob=0.9)
    mix = mixup_collate(
        mixup=0.8,
        cutmix=1.0,
        cutmix_minmax=None,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        smoothing=0.1,
        num_classes=10,
    )
    split = Split(source.train, None, train_transform(augment))
    shard = {"rank": rank, "world_size": world_size}
    return train_loader(
        split,
        batch_size=4,
        update_freq=1,
        num_workers=num_workers,
        pin_memory=False,
        collate=mix,
        seed=7,
        **shard,
    )


def one_epoch(loader, epoch):
    set_epoch(loader, epoch)
    return [torch.cat([images.flatten(1), targets], 1) for images, targets in loader]


# Splits


def test_split_train_is_disjoint_complete_sorted_and_fixed_by_the_seed():
    train, calib = split_train(100, 10, seed=3)
    assert sorted(train + calib) == list(range(100)) and len(calib) == 10
    assert train == sorted(train) and calib == sorted(calib)
    assert (train, calib) == split_train(100, 10, seed=3) != split_train(100, 10, seed=4)


@pytest.mark.parametrize("num_calib", [-1, 10, 11])
def test_split_train_refuses_to_hold_out_everything(num_calib):
    with pytest.raises(ValueError, match=f"{num_calib} images out of 10"):
        split_train(10, num_calib, seed=0)


def test_default_num_calib():
    given = [
        ("DIGITS", 1437),
        ("CIFAR10", 50_000),
        ("image_folder", 90_000),
        ("IMNET", 1_281_167),
        ("IMNET", 1000),
    ]
    assert [datasets.default_num_calib(*pair) for pair in given] == [143, 5000, 5000, 50_000, 100]


def test_calib_reads_its_rows_with_the_transform_it_was_given(tmp_path):
    source = cifar(tmp_path)
    rows = split_train(len(source.train), 5, seed=0)[1]
    augment = Augment(input_size=32, mean=source.mean, std=source.std)
    calib = make_split(source.train, rows, eval_transform(augment))
    plain = (pixels(20)[rows[2]] / 255 - source.mean) / source.std
    image, label = calib[2]
    torch.testing.assert_close(image, torch.from_numpy(plain).permute(2, 0, 1).float())
    assert len(calib) == 5 and label == rows[2] % 10
    assert calib.name(2) == f"{tmp_path / 'a.npz'}[{rows[2]}]"


# Samplers and loaders


@pytest.mark.parametrize("size, world_size", [(7, 2), (10, 3), (2, 4), (8, 1)])
def test_evaluation_shards_cover_everything_once(size, world_size):
    shards = [ShardSampler(size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(size))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert list(shards[0]) == list(range(0, size, world_size))


def test_training_shards_are_equally_long_disjoint_and_cut_to_full_groups():
    shards = [ShardSampler(23, rank=rank, world_size=2, shuffle=True, seed=1, group=4) for rank in range(2)]
    first = [list(shard) for shard in shards]
    assert [len(rows) for rows in first] == [len(shard) for shard in shards] == [8, 8]
    assert len(set(first[0] + first[1])) == 16
    shards[0].set_epoch(1)
    assert list(shards[0]) != first[0]
    shards[0].set_epoch(0)
    assert list(shards[0]) == first[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_is_the_same_whether_or_not_others_ran_before(tmp_path, num_workers):
    source = cifar(tmp_path)
    loader = augmented_loader(source, num_workers)
    epochs = [one_epoch(loader, epoch) for epoch in range(4)]
    torch.rand(5), np.random.rand(5)
    resumed = one_epoch(augmented_loader(source, num_workers), 3)
    assert len(resumed) == len(loader) == 5
    assert all(torch.equal(a, b) for a, b in zip(epochs[3], resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(epochs[2], epochs[3], strict=True))


def test_workers_augment_and_mix_differently_in_every_epoch_and_process(tmp_path):
    """With one picture throughout, whatever differs comes from the generators of the workers."""
    np.savez(tmp_path / "a.npz", images=pixels(1).repeat(8, 0), labels=np.arange(8))
    source = open_data("CIFAR10", str(tmp_path / "a.npz"), str(tmp_path / "a.npz"))
    loader, other = augmented_loader(source, 1), augmented_loader(source, 1, rank=1, world_size=2)
    passes = [one_epoch(loader, 0), one_epoch(loader, 1), one_epoch(other, 0)]
    shares = [{round(float(row.max()), 4) for row in rows[0][:, -10:]} for rows in passes]  # mixed targets
    assert shares[0] != shares[1] and shares[0] != shares[2]
    pictures = [rows[0][:, :-10] for rows in passes]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_reading_data_leaves_the_global_generator_alone(tmp_path):
    source = cifar(tmp_path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one_epoch(augmented_loader(source, 1), 0)
    list(eval_loader(Split(source.test, None, as_tensor), batch_size=4, num_workers=0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_eval_loader_keeps_order_and_the_last_batch(tmp_path):
    split = Split(cifar(tmp_path).test, None, as_tensor)
    shards = [
        eval_loader(split, batch_size=4, num_workers=0, pin_memory=False, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    batches = [[labels.tolist() for _, labels in shard] for shard in shards]
    assert batches == [[[0, 2, 4, 6], [8]], [[1, 3, 5, 7], [9]]]


def test_batch_names_are_those_of_the_current_epoch(tmp_path):
    split = Split(cifar(tmp_path).train, range(10, 20), as_tensor)
    loader = train_loader(split, batch_size=3, update_freq=1, num_workers=0, pin_memory=False, seed=1)
    set_epoch(loader, 2)
    names = [batch_names(loader, step) for step in range(len(loader))]
    labels = [labels.tolist() for _, labels in loader]
    assert names == [[f"{tmp_path / 'a.npz'}[{10 + label}]" for label in batch] for batch in labels]


def test_too_few_images_for_one_step_is_refused(tmp_path):
    split = Split(cifar(tmp_path).train, None, as_tensor)
    with pytest.raises(ValueError, match="20 training images.*batch size 4 x update_freq 3 x 2 processes"):
        train_loader(split, batch_size=4, update_freq=3, num_workers=0, pin_memory=False, world_size=2)


# Data in memory


def test_digits_are_complete_and_stratified():
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


def test_npz_of_encoded_files_equals_npz_of_pixels(tmp_path):
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
        ({"images": pixels(3)}, r"holds \['images'\]"),
        ({"images": pixels(3)[:, :16], "labels": np.zeros(3, int)}, r"uint8 \(3, 16, 32, 3\), expected"),
        ({"images": pixels(3) / 255, "labels": np.zeros(3, int)}, "float64"),
        ({"images": pixels(0), "labels": np.zeros(0, int)}, r"\(0, 32, 32, 3\), expected"),
        ({"images": pixels(3), "labels": np.zeros(4, int)}, r"int64 \(4,\), expected integers \(3,\)"),
        ({"images": pixels(3), "labels": np.zeros(3)}, "float64"),
        ({"images": pixels(3), "labels": np.array([0, 1, 10])}, "from 0 to 10, expected 0 to 9"),
        ({"images": pixels(3), "labels": np.array([0, 1, -1])}, "from -1 to 1, expected 0 to 9"),
        ({"images": pixels(3), "labels": np.array([None, 1, 2])}, "Object arrays cannot be loaded"),
    ],
)
def test_malformed_npz_is_one_line_that_names_the_file(tmp_path, arrays, complaint):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz.*{complaint}") as caught:
        load_npz(tmp_path / "a.npz", 10)
    assert "\n" not in str(caught.value)


def test_truncated_or_missing_npz_is_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:-300])
    for name in ("a.npz", "missing.npz"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            load_npz(tmp_path / name, 10)


def test_cifar_needs_both_npz_files_and_knows_its_class_count(tmp_path):
    path = str(write_npz(tmp_path / "a.npz", count=200, num_classes=100))
    with pytest.raises(ValueError, match="--eval_data_path"):
        open_data("CIFAR100", path)
    source = open_data("CIFAR", path, path)
    assert source.num_classes == 100 and source.mean == (0.5071, 0.4867, 0.4408)
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


# Folders


def test_image_folder_reads_classes_and_names_files(tmp_path):
    train, test = write_tree(tmp_path / "a"), write_tree(tmp_path / "b", count=1)
    source = open_data("image_folder", str(train), str(test))
    assert (len(source.train), len(source.test), source.num_classes, source.input_size) == (4, 2, 2, 224)
    assert Split(source.train, [3], as_tensor).name(0) == str(train / "dog" / "1.png")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_image_folder_finds_its_own_train_and_held_out_trees(tmp_path, held_out):
    write_tree(tmp_path / "train", count=3), write_tree(tmp_path / held_out, count=1)
    source = open_data("image_folder", str(tmp_path))
    assert (len(source.train), len(source.test), source.num_classes) == (6, 2, 2)


def test_image_folder_without_evaluation_tree_holds_out_a_tenth(tmp_path):
    write_tree(tmp_path, count=15)
    source = open_data("image_folder", str(tmp_path), seed=1)
    names = [
        {Split(data, [i], as_tensor).name(0) for i in range(len(data))}
        for data in (source.train, source.test)
    ]
    assert [len(part) for part in names] == [27, 3] and len(names[0] | names[1]) == 30
    assert open_data("image_folder", str(tmp_path), seed=1).test.indices == source.test.indices


def test_imagenet_layout(tmp_path):
    write_tree(tmp_path / "train"), write_tree(tmp_path / "val", count=1)
    source = open_data("IMNET", str(tmp_path))
    assert (len(source.train), len(source.test), source.num_classes) == (4, 2, 2)
    assert source.mean == (0.485, 0.456, 0.406)


def test_trees_with_other_classes_are_refused(tmp_path):
    write_tree(tmp_path / "train", ("a", "b", "c")), write_tree(tmp_path / "val", ("a", "c", "d", "e", "f"))
    with pytest.raises(ValueError, match="same class folders.*: b, d, e$"):
        open_data("IMNET", str(tmp_path))


def test_folder_errors_name_the_folder(tmp_path):
    (tmp_path / "bare").mkdir()
    (write_tree(tmp_path / "holes") / "bird").mkdir()
    complaints = {"absent": "No such file", "bare": "any class folder", "holes": "classes bird"}
    for name, complaint in complaints.items():
        with pytest.raises(ValueError, match=f"image folder {tmp_path / name}: .*{complaint}"):
            open_data("image_folder", str(tmp_path / name))


@pytest.mark.parametrize("damage, num_workers", [("cut", 0), ("cut", 1), ("text", 0), ("gone", 0)])
def test_a_corrupt_image_is_named_also_from_a_worker(tmp_path, damage, num_workers):
    source = open_data("image_folder", str(write_tree(tmp_path / "a")), str(write_tree(tmp_path / "b")))
    bad = tmp_path / "a" / "dog" / "0.png"
    contents = bad.read_bytes()
    bad.unlink() if damage == "gone" else bad.write_bytes(contents[:50] if damage == "cut" else b"no image")
    split = Split(source.train, None, as_tensor)
    last_line = rf"cannot read image {re.escape(str(bad))}: [^\n]+\s*$"
    with pytest.raises(ValueError, match=last_line):
        list(eval_loader(split, batch_size=2, num_workers=num_workers, pin_memory=False))


# Real data


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
        assert np.allclose(data.images.mean((0, 1, 2)) / 255, datasets.CIFAR10_STATS[0], atol=0.02)


# Data sets that timm opens


def write_shards(root, splits):
    info = {}
    for split, count in splits.items():
        names = [f"{split}-{shard}.tar" for shard in range(2)]
        for shard, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for i in range(count):
                    image = np.full((8, 8, 3), 2 * i + shard, np.uint8)
                    for suffix, contents in (("png", encoded(image)), ("cls", str(i % 2).encode())):
                        member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                        member.size = len(contents)
                        tar.addfile(member, io.BytesIO(contents))
        info[split] = {
            "name": split, "num_samples": 2 * count, "filenames": names, "shard_lengths": [count, count]
        }  # fmt: skip
    (root / "_info.json").write_text(json.dumps({"splits": info}))


@pytest.fixture
def stream(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, {"train": 5, "validation": 3, "calib": 2})
    return open_data("wds/toy", str(tmp_path), calib_split="calib", num_classes=2)


def test_a_stream_is_read_once_in_evaluation(stream):
    for data, count in ((stream.test, 6), (stream.calib, 4)):
        split = make_split(data, None, as_tensor)
        loader = eval_loader(split, batch_size=4, num_workers=1, pin_memory=False)
        images = torch.cat([images for images, _ in loader])
        assert sorted(images[:, 0, 0, 0].tolist()) == list(range(count))
        assert batch_names(loader, 0) == []


def test_a_training_stream_gives_full_groups_shuffled_and_repeatable(stream):
    def values(epoch):
        split = make_split(stream.train, None, as_tensor)
        loader = train_loader(split, batch_size=3, update_freq=2, num_workers=1, pin_memory=False)
        set_epoch(loader, epoch)
        batches = [images[:, 0, 0, 0].tolist() for images, _ in loader]
        assert len(batches) == len(loader)
        return batches

    first = values(0)
    assert [len(batch) for batch in first] == [3, 3, 3, 3]  # 10 images, rounded up to two groups of 3 x 2
    assert {value for batch in first for value in batch} == set(range(10))
    assert first == values(0) != values(1)


def test_a_stream_without_calib_split_or_class_count_is_refused(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, {"train": 1, "validation": 1})
    with pytest.raises(ValueError, match="--calib_split"):
        open_data("wds/toy", str(tmp_path), num_classes=2)
    with pytest.raises(ValueError, match="how many classes"):
        open_data("wds/toy", str(tmp_path), calib_split="validation")
    with pytest.raises(ValueError, match="cannot open wds/toy.*split dev not found"):
        open_data("wds/toy", str(tmp_path), splits=("dev", "validation"), num_classes=2)


def test_timm_reads_torchvision_folders(tmp_path):
    write_tree(tmp_path / "train"), write_tree(tmp_path / "validation", count=1)
    source = open_data("torch/image_folder", str(tmp_path))
    assert (len(source.train), len(source.test), source.num_classes) == (4, 2, 2)
    assert Split(source.train, None, as_tensor)[0][0].shape == (3, 36, 40)


def test_a_missing_package_is_named_for_pip(monkeypatch, tmp_path):
    def absent(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorflow_datasets'", name="tensorflow_datasets")

    monkeypatch.setattr(datasets, "create_dataset", absent)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
        open_data("tfds/toy", str(tmp_path))


def test_hugging_face_package_is_found_behind_this_module(monkeypatch, tmp_path):
    """The reader's `import datasets` must not get our file, and ours must be back afterwards."""
    package = tmp_path / "site" / "datasets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("theirs = True\n")
    monkeypatch.syspath_prepend(tmp_path / "site")

    def opened(*_, **__):
        import datasets as found

        assert found.theirs
        raise RuntimeError("seen theirs")

    monkeypatch.setattr(datasets, "create_dataset", opened)
    with pytest.raises(ValueError, match="seen theirs"):
        open_data("hfds/toy")
    import datasets as found

    assert found is datasets
