from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.data import IterableImageDataset

from loading.bad_images import with_readable
from loading.loaders import TrainLoader
from loading.sources import Data, open_source
from loading.split import Split
from utils import Compute, Runtime

CPU = Compute(torch.device("cpu"))
SKIP = Data(on_bad_image="skip", max_bad_images=0.25)


@pytest.fixture
def tree(tmp_path, write_tree):
    """16 images, of which three cannot be read: no. 2 is cut short, 7 is no image, 15 a link to nothing."""
    root = write_tree(tmp_path / "a", count=8)
    paths = [root / name / f"{i}.png" for name in ("cat", "dog") for i in range(8)]
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    paths[7].write_text("no image")
    paths[15].unlink()
    paths[15].symlink_to(root / "absent.png")
    return SimpleNamespace(
        paths=list(map(str, paths)), source=open_source(Data("image_folder", str(root), str(root)))
    )


def as_array(image):
    return np.array(image)


def whole(tree):
    return Split(tree.source.train, None, as_array)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_listed_and_replaced_by_the_next_that_can_be_read(tmp_path, tree, num_workers, capsys):
    runtime = Runtime(str(tmp_path), batch_size=4, num_workers=num_workers)
    before = torch.get_rng_state()
    split = with_readable(whole(tree), SKIP, runtime, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert [split.name(i) for i in range(16)] == [
        tree.paths[{2: 3, 7: 8, 15: 0}.get(i, i)] for i in range(16)
    ]
    assert split.transform is as_array and split[15][0].shape == (36, 40, 3) and split[15][1] == 0
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [tree.paths[i] for i in (2, 7, 15)]
    assert lines[2].endswith(f"No such file or directory: '{tree.paths[15]}'")
    said = f"3 of 16 training images cannot be read, listed in {tmp_path / 'bad_images.txt'}"
    assert f"{said}; each is replaced by the next one" in capsys.readouterr().out.splitlines()


def test_the_order_of_an_epoch_does_not_depend_on_which_images_are_bad(tree):
    runtime = Runtime(batch_size=4, num_workers=0)
    loaders = [
        TrainLoader(part, runtime, CPU, seed=3)
        for part in (whole(tree), with_readable(whole(tree), SKIP, runtime, CPU))
    ]
    for loader in loaders:
        loader.start(5)
    assert loaders[0].order == loaders[1].order
    assert sum(len(labels) for _, labels in loaders[1]) == 16


def test_too_many_bad_images_stop(tmp_path, tree):
    for share, allowed in ((0.001, 0), (0.187, 2)):
        with pytest.raises(ValueError) as error:
            with_readable(
                whole(tree),
                replace(SKIP, max_bad_images=share),
                Runtime(str(tmp_path), num_workers=0),
                CPU,
            )
        said = f"3 of 16 training images cannot be read, listed in {tmp_path / 'bad_images.txt'}"
        assert str(error.value).startswith(
            f"{said}; --max_bad_images {share} allows {allowed}; the first: {tree.paths[2]}: "
        )
    with_readable(whole(tree), replace(SKIP, max_bad_images=0.1875), Runtime(num_workers=0), CPU)
    none = Split(tree.source.train, [2, 7], as_array)
    with pytest.raises(
        ValueError, match="2 of 2 training images cannot be read; --max_bad_images 1.0 allows 1"
    ):
        with_readable(none, replace(SKIP, max_bad_images=1.0), Runtime(num_workers=0), CPU)


def test_nothing_is_read_without_the_flag(tree):
    split = whole(tree)
    assert with_readable(split, Data(), Runtime(), CPU) is split


def test_a_stream_cannot_be_read_beforehand():
    stream = IterableImageDataset("", reader=object())
    with pytest.raises(
        ValueError, match="--on_bad_image skip needs training images by index; a stream has none"
    ):
        with_readable(stream, SKIP, Runtime(), CPU)


def worker(folder, root):
    """One of two processes."""
    dist.init_process_group("gloo")
    compute = Compute(torch.device("cpu"), rank=dist.get_rank(), world_size=2)
    split = Split(open_source(Data("image_folder", root, root)).train, None, as_array)
    runtime = Runtime(folder, num_workers=0)
    rows = with_readable(split, SKIP, runtime, compute).indices
    with pytest.raises(ValueError) as error:
        with_readable(split, replace(SKIP, max_bad_images=0.1), runtime, compute)
    torch.save({"rows": rows, "error": str(error.value)}, f"{folder}/{compute.rank}.pt")


def test_two_processes_agree(tmp_path, tree, in_processes):
    in_processes(2, worker, str(tmp_path), str(tmp_path / "a"))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second and first["rows"] == [0, 1, 3, 3, 4, 5, 6, 8, *range(8, 15), 0]
    assert first["error"].startswith("3 of 16 training images cannot be read")
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 3


def test_a_clean_training_set_is_said_to_be_one(tree, capsys):
    with_readable(Split(tree.source.train, [0, 1], as_array), SKIP, Runtime(num_workers=0), CPU)
    assert capsys.readouterr().out == "all training images can be read\n"
