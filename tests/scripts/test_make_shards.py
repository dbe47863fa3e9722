"""Class folders become shards with the same images and labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loading.folders import Folders
from loading.shards import Shards, read_classes


@pytest.fixture
def folders(tmp_path):
    """Nine noisy images in three classes, two with names of several dots."""
    rng = np.random.default_rng(0)
    for i in range(9):
        folder = tmp_path / "in" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        name = "x.y.PNG" if i < 2 else f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name)
    return tmp_path / "in"


def test_images_and_labels_are_those_of_the_folders(printed, folders, tmp_path):
    target = tmp_path / "out" / "train"
    said = printed("make_shards", folders, target, "--megabytes", 0.015)
    tree, found = Folders(folders), Shards(target)
    assert said == f"wrote 9 images of 3 classes in 3 shards to {target}\n"
    assert read_classes(target) == ("a", "b", "c") and len(found) == 9 and len(found.tars) == 3
    rows = [int(found.name(i).rpartition(":")[2][:8]) for i in range(9)]
    assert sorted(rows) == list(range(9)) != rows
    for i, row in enumerate(rows):
        (ours, label), (theirs, expected) = found[i], tree[row]
        assert label == expected and np.array_equal(np.asarray(ours), np.asarray(theirs))
    again = tmp_path / "again" / "train"
    printed("make_shards", folders, again, "--megabytes", 0.015)
    assert [path.read_bytes() for path in found.tars] == [path.read_bytes() for path in Shards(again).tars]
    with pytest.raises(ValueError, match=f"^{target} is there already; name another folder, or delete it$"):
        printed("make_shards", folders, target)


def test_what_is_interrupted_leaves_no_shards(script, printed, folders, tmp_path, monkeypatch):
    module, target = script("make_shards"), tmp_path / "out"
    write_tar = module.write_tar

    def interrupted(path: Path, *words):
        write_tar(path, *words)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tar", interrupted)
        with pytest.raises(KeyboardInterrupt):
            printed("make_shards", folders, target)
    assert not target.exists()
    printed("make_shards", folders, target)
    assert len(Shards(target)) == 9 and not (tmp_path / ".out.partial").exists()
