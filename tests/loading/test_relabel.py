from dataclasses import replace

import numpy as np
import pytest
from timm.data import IterableImageDataset

from loading.relabel import Popular, balanced, only_popular
from loading.sources import ArrayImages, Source
from loading.split import Split

LABELS = [4, 0, 2, 2, 1, 3, 3, 3]


def source():
    images = ArrayImages(np.zeros((8, 32, 32, 3), np.uint8), LABELS, "toy")
    return Source(images, images, tuple("abcde"), (0.0,) * 3, (1.0,) * 3, 32)


def test_other_classes_become_one():
    opened = only_popular(source(), [2, 0])
    assert opened.num_classes == 3
    assert [opened.train[i][1] for i in range(8)] == opened.train.labels == [2, 1, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("classes", [[2, 2], [5], [0, 1, 2, 3, 4]])
def test_bad_popular_classes_are_named(classes):
    with pytest.raises(ValueError, match="accepted: different numbers below 5"):
        only_popular(source(), classes)


def test_popular_classes_are_drawn_evenly_and_the_others_as_often_as_all_of_them():
    images = Popular(source().train, [2, 0])
    labels = Split(images, [1, 2, 3, 5, 6], None).labels
    np.testing.assert_allclose(balanced(labels, 2), [0.25, 0.125, 0.125, 0.25, 0.25])
    with pytest.raises(ValueError, match="class 1 of the popular classes and other has no training image"):
        balanced(Split(images, [2, 5], None).labels, 2)


def test_chosen_classes_keep_their_names():
    assert only_popular(source(), [2, 0]).class_names == ("c", "a", "other")
    assert only_popular(source(), [2, 0]).train.name(4) == "toy[4]"


def test_a_stream_has_no_popular_classes():
    stream = IterableImageDataset("", reader=object())
    with pytest.raises(ValueError, match="--popular_classes needs images by index; a stream has none"):
        only_popular(replace(source(), train=stream), [2, 0])
