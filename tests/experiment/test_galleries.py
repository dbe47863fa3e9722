"""Galleries of test images by exit, and the part of the page that shows them."""

import base64
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from timm.data import IterableImageDataset

import adaptive
from adaptive.confidence import NOBODY
from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from datasets import Data, Split, open_splits
from experiment.galleries import Gallery, Picture, data_uri, galleries, pick

NAMES = [f"c{i}" for i in range(10)]


def drawn(count, num_exits, num_classes=10, spread=2.0):
    """Logits and targets at random, so that every kind of image occurs."""
    draws = torch.Generator().manual_seed(count)
    exits = [spread * torch.randn(count, num_classes, generator=draws) for _ in range(num_exits)]
    return exits, torch.randint(num_classes, (count,), generator=draws)


def pixels_of(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def brute(tables, policy, first):
    """What `pick` does, one image after another."""
    found = {}
    for i in range(len(tables)):
        k = next(j for j, limit in enumerate(policy.thresholds) if tables.confidence[j, i] >= limit or j == 3)
        was, right = bool(tables.correct[first, i]), bool(tables.correct[k, i])
        sure = tables.confidence[k, i].item()
        found.setdefault((k, f"sure and {'right' if right else 'wrong'}"), []).append((-sure, i))
        if k > first and was != right:
            kind = "corrected" if right else "broken"
            rise = (tables.confidence[k, i] - tables.confidence[first, i]).item()
            found.setdefault((k, f"deferred and {kind}"), []).append((-rise, i))
    return {key: (len(rows), [i for _, i in sorted(rows)[:8]]) for key, rows in found.items()}


@pytest.mark.parametrize(
    ("policy", "first"),
    [
        (Policy((0.8, 0.7, 0.6, 0.0)), 0),
        (Policy((NOBODY, 0.7, 0.6, 0.0), off=(0,)), 1),
        (Policy((0.8, 0.7, 0.6, 0.0), answer="mean"), 0),
    ],
)
def test_images_are_picked_by_exit_and_kind(policy, first):
    exits, targets = drawn(900, 4, num_classes=3)
    tables = ExitTables.of(exits, targets, policy.reading)
    picks = pick(tables, policy)
    expected = brute(tables, policy, first)
    assert {(one.exit, one.kind): (one.total, one.columns) for one in picks} == expected
    assert [one.exit for one in picks] == sorted(one.exit for one in picks)
    assert len(picks) >= 10 and {one.kind for one in picks if one.exit == first} == {
        "sure and right",
        "sure and wrong",
    }


def test_there_are_fewer_of_each_where_there_are_many_exits():
    exits, targets = drawn(6000, 16, num_classes=2)
    picks = pick(ExitTables.of(exits, targets), Policy((0.9,) * 15 + (0.0,)))
    assert all(len(one.columns) == min(4, one.total) for one in picks) and len(picks) > 50


def test_equals_are_shown_in_order_and_one_exit_defers_nothing():
    logits, targets = torch.tensor([[5.0, 0]] * 20), torch.tensor([0, 1] * 10)
    (right, wrong) = pick(ExitTables.of([logits], targets), Policy((0.0,)))
    assert (right.columns, right.total) == (list(range(0, 16, 2)), 10)
    assert (wrong.kind, wrong.columns) == ("sure and wrong", list(range(1, 16, 2)))


FIRST = torch.tensor([[8.0, 0, 0], [8, 0, 0], [1, 0, 0], [0, 1, 0]])
SECOND = torch.tensor([[0, 8.0, 0], [0, 8, 0], [0, 0, 8], [0, 0, 9]])
TABLES = ExitTables.of([FIRST, SECOND], torch.tensor([0, 1, 2, 1]))  # sure: right, wrong; corrected; broken
POLICY = Policy((0.9, 0.0))


@pytest.fixture
def small(tmp_path):
    """Four small images in an array, as pixels, and as files within the array."""
    images = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 1])
    np.savez(tmp_path / "plain.npz", images=images, labels=labels)
    files = []
    for image in images:
        files.append(io.BytesIO())
        Image.fromarray(image).save(files[-1], "JPEG")
    joined = [np.frombuffer(file.getvalue(), np.uint8) for file in files]
    offsets = np.cumsum([0, *map(len, joined)])
    np.savez(tmp_path / "jpeg.npz", jpeg=np.concatenate(joined), offsets=offsets, labels=labels)
    return tmp_path, images, [np.asarray(Image.open(file)) for file in files]


def test_a_gallery_says_what_each_exit_answers(small):
    folder, images, _ = small
    path = str(folder / "plain.npz")
    test, places = open_splits(Data("CIFAR10", path, path)).test, torch.tensor([3, 1, 2, 0])
    shown = galleries(test, places, TABLES, POLICY, ["cat", "dog", "eel"])
    assert [gallery.title for gallery in shown] == [
        "Exit 0: sure and right",
        "Exit 0: sure and wrong",
        "Exit 1: sure and right",
        "Exit 1: sure and wrong",
        "Exit 1: deferred and corrected",
        "Exit 1: deferred and broken",
    ]
    (right,), _, _, _, (mended,), (broken,) = [gallery.images for gallery in shown]
    sure, unsure = (f"{row.softmax(-1).max():.5g}" for row in (FIRST[0], FIRST[2]))
    assert right.caption == f"class cat\nexit 0: cat, {sure}\nimage 3" and right.alt == "class cat"
    assert mended.caption == f"class eel\nexit 0: cat, {unsure}\nexit 1: eel, {sure}\nimage 2"
    assert broken.caption.startswith(f"class dog\nexit 0: dog, {unsure}\nexit 1: eel, ")
    assert shown[0].note == "1 of 4 images leave here with a right answer."
    assert shown[5].note == "1 of 4 images: exit 0 is right, this one wrong."
    for picture, place in ((right, 3), (mended, 2), (broken, 0)):
        assert (np.asarray(pixels_of(picture.uri)) == images[place]).all()


def test_pixels_of_any_data_set_are_shown(small, images):
    folder, plain, decoded = small
    digits = open_splits(Data())
    path, tree = str(folder / "jpeg.npz"), open_splits(Data("image_folder", str(images)))
    arrays = [np.asarray(digits.test.read(i)[0]) for i in range(4)]
    files = [np.asarray(Image.open(images / "val" / "dim" / f"{i}.png")) for i in range(4)]
    for splits, expected in (
        (digits, arrays),
        (open_splits(Data("CIFAR10", path, path)), decoded),
        (tree, files),
    ):
        shown = galleries(splits.test, torch.arange(4), TABLES, POLICY, NAMES)
        (picture,) = shown[1].images
        assert (np.asarray(pixels_of(picture.uri)) == expected[1]).all()


class Counted(Split):
    """A split that remembers which images are read."""

    def read(self, index):
        self.seen = [*getattr(self, "seen", []), index]
        return super().read(index)


def test_only_images_that_are_shown_are_read():
    test = open_splits(Data()).test
    counted, (exits, targets) = Counted(test.base, None, test.transform), drawn(len(test), 2, spread=0.5)
    tables = ExitTables.of(exits, targets)
    policy = Policy((tables.confidence[0].median().item(), 0.0))
    shown = galleries(counted, torch.arange(len(test)), tables, policy, NAMES)
    columns = [column for one in pick(tables, policy) for column in one.columns]
    most = "images leave here with a right answer; the most confident are shown."
    assert shown[0].note.endswith(f" of 360 {most}")
    assert counted.seen == columns and len(columns) == sum(len(gallery.images) for gallery in shown) == 48


def test_a_stream_is_not_read_again():
    stream = IterableImageDataset("", reader=object())
    (gallery,) = galleries(stream, torch.arange(4), TABLES, POLICY, NAMES)
    assert "a stream" in gallery.note and not gallery.images


@pytest.mark.parametrize(
    ("size", "shown"), [((500, 250), (96, 48)), ((3, 600), (1, 96)), ((60, 40), (60, 40))]
)
def test_large_images_are_shown_small(size, shown):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), dtype=np.uint8))
    small = pixels_of(data_uri(image))
    assert (small.size, small.format, image.size) == (shown, "JPEG", size)
    assert len(data_uri(image)) < 10_000


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(adaptive.__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page_of(found):
    template = TEMPLATES.get_template("report_galleries.html")
    return template.render(record=SimpleNamespace(galleries=found))


def test_the_page_shows_every_picture_with_its_words():
    uri = data_uri(Image.new("RGB", (8, 8)))
    pictures = [Picture(uri, f"class {i}", f"class {i}\nexit 0: {i}") for i in range(3)]
    page = page_of([Gallery("One", "first", pictures[:2]), Gallery("Two", "second", pictures[2:])])
    assert re.findall(r'<img src="(.*?)" alt="(.*?)"', page) == [(one.uri, one.alt) for one in pictures]
    assert [page.index(word) for word in ("One", "first", pictures[1].caption, "Two", "second")] == sorted(
        page.index(word) for word in ("One", "first", pictures[1].caption, "Two", "second")
    )


def test_names_of_classes_are_escaped():
    picture = Picture("data:image/png;base64,", '"><script>alert(1)</script>', "<b>cat</b>")
    page = page_of([Gallery("<i>", "<u>", [picture])])
    assert not re.search("<script|<b>|<i>|<u>", page) and "&lt;b&gt;cat&lt;/b&gt;" in page


def test_a_page_without_galleries_has_no_trace_of_them():
    assert page_of(()).strip() == ""
    page = page_of([Gallery("No images", "The test images are a stream.", [])])
    assert "a stream." in page and "<ul" not in page
