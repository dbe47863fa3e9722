import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import open_splits
from loading import shards
from loading.bad_images import with_readable
from loading.shards import Shards
from loading.sources import Data, open_source
from loading.split import Split
from utils import Compute, Runtime

CPU = Compute(torch.device("cpu"))


@pytest.fixture
def picture(encoded):
    """The bytes of a PNG file whose pixels are all one value."""
    return lambda value: encoded(np.full((4, 5, 3), value, np.uint8))


def write_tar(path, members):
    """Writes (name, bytes) one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def write(picture):
    """Writes shards of a folder with so many images each; image i is of value i and class i % 3."""

    def run(folder, *counts, name="part"):
        i = 0
        for shard, count in enumerate(counts):
            members = []
            for _ in range(count):
                members += [(f"{i:03d}.png", picture(i)), (f"{i:03d}.cls", str(i % 3).encode())]
                i += 1
            write_tar(folder / f"{name}-{shard}.tar", members)
        return folder

    return run


def headers(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()


def values(images):
    return [(image.getpixel((4, 3))[0], label) for image, label in images]


def test_every_image_is_read_by_row(tmp_path, write):
    images = Shards(write(tmp_path, 4, 0, 3))
    assert len(images) == 7 and images.starts.tolist() == [0, 4, 4, 7]
    assert values(images[i] for i in (6, 0, 4)) == [(6, 0), (0, 0), (4, 1)]
    assert values(map(images.__getitem__, range(7))) == [(i, i % 3) for i in range(7)]
    assert [images.name(i) for i in (3, 4)] == ["part-0.tar:003", "part-2.tar:004"]
    assert images.file(0) == "" and images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and images.notes == []


def test_layouts_that_others_write(tmp_path, picture):
    hidden = [
        ("__meta__", b"1"),
        (".hidden.png", b""),
        ("._a.png", b""),
        ("a.txt", b"caption"),
        ("x.cls", b"1"),
    ]
    more = [("a.json", b'{"label": 4, "url": ""}'), ("a.JPG", picture(1)), ("a.seg.png", picture(9))]
    more += [("dir.x/b.webp", picture(2)), ("dir.x/b.json", b'{"label": "cat"}'), ("dir.x/b.cls", b" 5\n")]
    write_tar(tmp_path / "a.tar", [*hidden, *more, ("stats.json", b"[]")])
    images = Shards(tmp_path)
    assert values(map(images.__getitem__, range(2))) == [(1, 4), (2, 5)]
    assert images.name(1) == "a.tar:dir.x/b"
    assert images.notes == [f"{tmp_path}: left out 1 labels without an image"]


def test_shards_of_webdataset_are_read(tmp_path, picture):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(3):
            writer.write({"__key__": f"k{i}", "png": picture(i), "cls": i})
    images = Shards(tmp_path)
    assert values(map(images.__getitem__, range(3))) == [(0, 0), (1, 1), (2, 2)]


def test_headers_are_read_once(tmp_path, write, monkeypatch):
    write(tmp_path, 2, 2)
    first, read = Shards(tmp_path), []
    inner = shards.read_tar
    monkeypatch.setattr(shards, "read_tar", lambda path: read.append(path.name) or inner(path))
    again = Shards(tmp_path)
    assert not read and values(again[i] for i in range(4)) == values(first[i] for i in range(4))
    assert sorted(os.listdir(tmp_path)) == ["index.npz", "part-0.tar", "part-1.tar"]
    write(tmp_path, 3, 1)
    assert len(Shards(tmp_path)) == 4 and sorted(read) == ["part-0.tar", "part-1.tar"]
    (tmp_path / "part-1.tar").unlink()
    assert len(Shards(tmp_path)) == 3
    os.utime(tmp_path / "part-0.tar", (1, 1))
    read.clear()
    assert len(Shards(tmp_path)) == 3 and read == ["part-0.tar"]


@pytest.mark.parametrize("damage", ["cut", "empty", "of others", "beyond"])
def test_a_damaged_index_is_made_anew(tmp_path, write, damage):
    path = write(tmp_path, 2) / "index.npz"
    whole = Shards(tmp_path)
    arrays = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "of others":
        np.savez(path, **(arrays | {"spans": arrays["spans"][:1]}))
    else:
        np.savez(path, **(arrays | {"spans": arrays["spans"] + 10**9}))
    assert values(map(Shards(tmp_path).__getitem__, range(2))) == values(map(whole.__getitem__, range(2)))
    assert np.array_equal(np.load(path)["spans"], whole.spans)


def test_a_folder_that_cannot_be_written_is_read(tmp_path, write, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    write(tmp_path, 2)
    monkeypatch.setattr(np, "savez", refuse)
    assert len(Shards(tmp_path)) == 2 and os.listdir(tmp_path) == ["part-0.tar"]


def test_processes_may_read_one_object(tmp_path, write, monkeypatch, as_tensor):
    monkeypatch.setattr(shards, "MOST_OPEN", 1)
    images = Shards(write(tmp_path, 2, 2))
    values(images[i] for i in (0, 3, 1))
    assert len(images._open) == 1
    copied = pickle.loads(pickle.dumps(images))
    assert not copied._open and values([copied[3]]) == [(3, 0)]
    loader = DataLoader(Split(images, None, as_tensor), 2, num_workers=2)
    assert [batch[:, 0, 0, 0].tolist() for batch, _ in loader] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.png", b"x")], r"a has no label: accepted: a number in a.cls, or as label in a.json"),
        ([("a.png", b"x"), ("a.cls", b"cat")], r"a has no label"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], r"a has no label"),
        ([("a.png", b"x"), ("a.json", b'{"label')], r"a has no label"),
        ([("a.png", b"x"), ("a.cls", b"-1")], r"a.cls holds the label -1, accepted: 0 to 2147483647"),
        ([("a.png", b"x"), ("b.png", b"x"), ("a.png", b"x")], r"a.png comes twice"),
        ([("a.png", b"x"), ("a.jpg", b"x")], r"a.jpg comes twice, or beside another image of its key"),
        ([("a.cls", b"1"), ("a.cls", b"1")], r"a.cls comes twice"),
        ([("a" * 300 + ".png", b"x")], r"a{40}\.\.\. is longer than 255 bytes"),
    ],
)
def test_mistakes_in_a_shard_are_said_in_one_line(tmp_path, members, complaint):
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=f"^cannot read shard {path}: {complaint}"):
        Shards(tmp_path)


def test_links_and_no_images_are_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match=f"^no image in the shards of {tmp_path}: accepted: KEY.jpg"):
        Shards(tmp_path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="a.png is a link or sparse, accepted: regular files$"):
        Shards(tmp_path)


@pytest.mark.parametrize("at", ["data", "header", "end", "mark"])
def test_a_shard_cut_short_is_refused(tmp_path, write, at):
    path = write(tmp_path, 3) / "part-0.tar"
    whole = path.read_bytes()
    *_, label = headers(path)
    cut = {"data": 700, "header": label.offset + 100, "end": label.offset, "mark": label.offset_data + 512}
    path.write_bytes(whole[: cut[at]])
    with pytest.raises(ValueError, match=f"^cannot read shard {path}: (it is cut short|unexpected end)"):
        Shards(tmp_path)


def test_a_header_zeroed_or_flipped_is_refused(tmp_path, write):
    path = write(tmp_path, 3) / "part-0.tar"
    whole, third = path.read_bytes(), headers(path)[2].offset
    for damaged in (bytes(512), b"\xff" + whole[third + 1 : third + 512]):
        path.write_bytes(whole[:third] + damaged + whole[third + 512 :])
        with pytest.raises(ValueError, match=f"it is damaged at byte {third}, or another tar is behind it$"):
            Shards(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="or another tar is behind it$"):
        Shards(tmp_path)


@pytest.mark.parametrize("layout", ["two folders", "val", "test", "names"])
def test_where_training_and_test_shards_are(tmp_path, write, layout):
    if layout == "names":
        write(tmp_path, 5, name="set-train"), write(tmp_path, 3, name="set-validation")
        given = [str(tmp_path)]
    else:
        held_out = layout if layout != "two folders" else "b"
        write(tmp_path / "train", 5), write(tmp_path / held_out, 3)
        given = [str(tmp_path)] if held_out != "b" else [str(tmp_path / "train"), str(tmp_path / "b")]
    with pytest.raises(ValueError, match="do not say how many classes there are: give --nb_classes$"):
        open_source(Data("shards", *given))
    source = open_source(Data("shards", *given, nb_classes=3))
    assert (len(source.train), len(source.test), source.class_names) == (5, 3, ("0", "1", "2"))
    folder = tmp_path if layout in ("val", "names") else tmp_path / "train"
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_source(Data("shards", *given)).class_names == ("ant", "bee", "cat")
    with pytest.raises(ValueError, match="--nb_classes 4, but shards has 3 classes"):
        open_source(Data("shards", *given, nb_classes=4))


def test_data_that_does_not_fit_is_refused(tmp_path, write):
    write(tmp_path / "train", 5), write(tmp_path / "val", 3)
    with pytest.raises(ValueError, match="^part-0.tar:002 has the label 2, accepted: 0 to 1$"):
        open_source(Data("shards", str(tmp_path), nb_classes=2))
    for name, words in (("train", "ant\nbee\ncat\n"), ("val", "bee\nant\ncat\n")):
        (tmp_path / name / "classes.txt").write_text(words)
    with pytest.raises(ValueError, match="must have the same classes in the same order$"):
        open_source(Data("shards", str(tmp_path)))
    for given in ([str(tmp_path / "none")], [str(tmp_path / "train")]):
        with pytest.raises(
            ValueError, match=r"^no shards in \S+: accepted: files named \*train\*.tar, not compr"
        ):
            open_source(Data("shards", *given, nb_classes=3))


def test_rows_are_held_out_and_bad_images_replaced_as_in_folders(tmp_path, write, picture, as_tensor):
    write(tmp_path / "train", 5, 5), write(tmp_path / "val", 3)
    members = [("x.png", picture(7)[:-30]), ("x.cls", b"1"), ("y.png", b"text"), ("y.cls", b"1")]
    write_tar(tmp_path / "train" / "z.tar", members)
    data = Data("shards", str(tmp_path), nb_classes=3, num_calib=3, on_bad_image="skip", max_bad_images=0.5)
    splits = open_splits(data)
    assert (len(splits.train), len(splits.calib), len(splits.test)) == (9, 3, 3)
    train = Split(splits.source.train, range(8, 12), as_tensor)
    with pytest.raises(ValueError, match="^cannot read image z.tar:y: what it holds"):
        train[3]
    found = with_readable(train, data, Runtime(num_workers=0, output_dir=str(tmp_path)), CPU)
    assert list(found.indices) == [8, 9, 8, 8]
    assert (tmp_path / "bad_images.txt").read_text().splitlines()[0].startswith("z.tar:x: ")


def test_a_shard_that_is_cut_after_it_was_opened_is_named(tmp_path, write, as_tensor):
    path = write(tmp_path, 2) / "part-0.tar"
    split = Split(Shards(tmp_path), None, as_tensor)
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="^cannot read image part-0.tar:001: its shard ends before it does$"):
        split[1]
