import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset

import datasets
from loading import streams
from loading.loaders import TrainLoader, ordered_loader
from loading.sources import Data, open_source
from loading.split import Split, make_split
from utils import Compute, Runtime

CPU = Compute(torch.device("cpu"))


def open_data(*paths, **given):
    return open_source(Data(*paths, **given))


def write_shards(root, splits, encoded):
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
def stream(tmp_path, encoded):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, {"train": 5, "validation": 3, "calib": 2}, encoded)
    return open_data("wds/toy", str(tmp_path), calib_split="calib", nb_classes=2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_is_read_once_in_evaluation(stream, as_tensor, num_workers):
    for data, count in ((stream.test, 6), (stream.calib, 4)):
        split = make_split(data, None, as_tensor)
        loader = ordered_loader(split, Runtime(batch_size=3, num_workers=num_workers), CPU)
        images = torch.cat([images for images, _ in loader])
        assert sorted(images[:, 0, 0, 0].tolist()) == list(range(count))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_training_stream_gives_full_groups_shuffled_and_repeatable(stream, as_tensor, num_workers):
    def values(epoch):
        split = make_split(stream.train, None, as_tensor)
        runtime = Runtime(batch_size=3, num_workers=num_workers)
        loader = TrainLoader(split, runtime, CPU, update_freq=2)
        loader.start(epoch)
        batches = [images[:, 0, 0, 0].tolist() for images, _ in loader]
        assert len(batches) == len(loader)
        assert loader.names(0) == loader.order == []
        return batches

    first = values(0)
    assert [len(batch) for batch in first] == [3, 3, 3, 3]  # 10 images, rounded up to two groups of 3 x 2
    assert {value for batch in first for value in batch} == set(range(10))
    assert first == values(0) != values(1)


def test_a_stream_has_no_partial_batches(stream, as_tensor):
    split = make_split(stream.train, None, as_tensor)
    with pytest.raises(ValueError, match="^--drop_last false: the batches of a stream are always filled up$"):
        TrainLoader(split, Runtime(batch_size=3, num_workers=1), CPU, least=2)
    with pytest.raises(ValueError, match="^--epoch_images 5: a stream's epoch is all of it; accepted: 0$"):
        TrainLoader(split, Runtime(batch_size=3, num_workers=1), CPU, epoch_images=5)


def test_a_stream_without_calib_split_or_class_count_is_refused(tmp_path, encoded):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, {"train": 1, "validation": 1}, encoded)
    with pytest.raises(ValueError, match="--calib_split"):
        open_data("wds/toy", str(tmp_path), nb_classes=2)
    with pytest.raises(ValueError, match="how many classes"):
        open_data("wds/toy", str(tmp_path), calib_split="validation")
    with pytest.raises(ValueError, match="cannot open wds/toy.*split dev not found"):
        open_data("wds/toy", str(tmp_path), train_split="dev", nb_classes=2)


def test_timm_reads_torchvision_folders(tmp_path, write_tree, as_tensor):
    write_tree(tmp_path / "train"), write_tree(tmp_path / "validation", count=1)
    source = open_data("torch/image_folder", str(tmp_path))
    assert (len(source.train), len(source.test), source.num_classes) == (4, 2, 2)
    assert Split(source.train, None, as_tensor)[0][0].shape == (3, 36, 40)


def test_timm_does_not_cut_greys_of_16_bits_off(tmp_path, monkeypatch, as_tensor):
    for split in ("train", "validation"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(np.full((4, 4), 257 * 40, np.uint16)).save(tmp_path / split / "cat" / "0.png")
    folders = open_data("torch/image_folder", str(tmp_path))
    monkeypatch.setattr(
        streams, "create_dataset", lambda name, path, split, **_: ImageDataset(f"{path}/{split}", split=split)
    )
    files = open_data("hfds/toy", str(tmp_path), nb_classes=1)
    for source in (folders, files):
        assert (Split(source.train, None, as_tensor)[0][0] == 40).all()


def test_a_missing_package_is_named_for_pip(monkeypatch, tmp_path):
    def absent(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorflow_datasets'", name="tensorflow_datasets")

    monkeypatch.setattr(streams, "create_dataset", absent)
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

    monkeypatch.setattr(streams, "create_dataset", opened)
    with pytest.raises(ValueError, match="seen theirs"):
        open_data("hfds/toy")
    import datasets as found

    assert found is datasets
