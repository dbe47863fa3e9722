import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from loading.folders import Folders


def names_of(tree, root):
    return [str(Path(tree.name(i)).relative_to(root)) for i in range(len(tree))]


def test_images_are_those_of_torchvision_in_its_order(tmp_path, write_tree):
    root = write_tree(tmp_path / "a", ("b", "a", "a b"), count=11)
    write_tree(root / "a", ("deep", "10"))
    theirs, ours = ImageFolder(root), Folders(root)
    assert ours.classes == theirs.classes == ["a", "a b", "b"]
    assert [(ours.name(i), ours.labels[i]) for i in range(len(ours))] == theirs.samples
    assert np.array_equal(np.asarray(ours[13][0]), np.asarray(theirs[13][0])) and ours[13][1] == theirs[13][1]
    assert ours.notes == []


def test_gifs_are_read_behind_all_others(tmp_path, write_tree):
    root = write_tree(tmp_path / "a")
    Image.new("RGB", (4, 4), "red").save(root / "cat" / "0.GIF")
    tree = Folders(root)
    assert names_of(tree, root) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "cat/0.GIF"]
    assert tree[4][0].getpixel((1, 1)) == (255, 0, 0) and tree[4][1] == tree.labels[4] == 0


def test_files_that_are_left_out_are_counted_in_one_line(tmp_path, write_tree):
    root = write_tree(tmp_path / "a")
    for name in ("cat/.DS_Store", "dog/notes.txt", "dog/clip.mp4", "beside.txt"):
        (root / name).write_text("")
    tree = Folders(root)
    assert len(tree) == 4
    assert tree.notes == [f"{root}: left out 3 not named as images, such as {root / 'cat/.DS_Store'}"]


def test_loops_of_links_end_and_double_nothing(tmp_path, write_tree):
    root = write_tree(tmp_path / "a")
    write_tree(root / "dog", ("deep",))
    loops = {
        "cat/up": "..",
        "cat/here": ".",
        "cat/top": tmp_path,
        "dog/deep/up": "../..",
        "cat/x": "x",
        "self": ".",
    }
    loops["dog/alias"] = "deep"
    for name, target in loops.items():
        (root / name).symlink_to(target)
    tree = Folders(root)
    assert tree.classes == ["cat", "dog"]
    assert names_of(tree, root) == [
        "cat/0.png",
        "cat/1.png",
        *(f"dog/{n}.png" for n in ("0", "1", "deep/0", "deep/1")),
    ]


def test_other_links_are_followed(tmp_path, write_tree):
    store, root = write_tree(tmp_path / "store", ("cat", "dog", "more")), tmp_path / "subset"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(store / "cat")
    (root / "dog" / "b.png").symlink_to(store / "dog" / "0.png")
    (root / "dog" / "a").symlink_to(store / "more")
    (root / "dog" / "gone.png").symlink_to(store / "absent.png")
    names = ["cat/0.png", "cat/1.png", "dog/b.png", "dog/gone.png", "dog/a/0.png", "dog/a/1.png"]
    assert names_of(Folders(root), root) == names


@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, write_tree, link):
    root = write_tree(tmp_path / "a")
    pipe = root / "dog" / "x.png"
    os.mkfifo(tmp_path / "pipe" if link else pipe)
    if link:
        pipe.symlink_to(tmp_path / "pipe")
    with pytest.raises(
        ValueError, match=f"^image folder {root}: {pipe} is a pipe or a device, accepted: regular"
    ):
        Folders(root)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, write_tree, monkeypatch):
    root, scandir = write_tree(tmp_path / "a"), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=f"image folder {root}: .*Permission denied: .*dog"):
        Folders(root)


def test_a_folder_that_is_missing_or_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(ValueError, match=f"^image folder {tmp_path / name}: there is no such folder$"):
            Folders(tmp_path / name)
