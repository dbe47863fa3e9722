import numpy as np
import pytest
import torch

from datasets import Data, Transform, View, open_splits


@pytest.fixture
def data(tmp_path):
    """40 images of CIFAR-10 in a file, to train on and to test."""
    path = tmp_path / "a.npz"
    images = np.random.RandomState(0).randint(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 10)
    return {"data_set": "CIFAR10", "data_path": str(path), "eval_data_path": str(path)}


def test_data_is_cut_into_train_calib_and_test(data):
    splits = open_splits(Data(**data, num_calib=6, seed=3))
    assert [len(part) for part in (splits.train, splits.calib, splits.test)] == [34, 6, 40]
    assert sorted([*splits.train.indices, *splits.calib_indices]) == list(range(40))
    assert splits.calib.indices == splits.calib_indices == sorted(splits.calib_indices)
    assert splits.view == View(32, splits.source.mean, splits.source.std)
    assert len(open_splits(Data(**data)).calib) == 4  # a tenth


def test_rows_held_out_by_a_checkpoint_are_held_out_again(data):
    splits = open_splits(Data(**data), calib_indices=[7, 30])
    assert splits.calib_indices == splits.calib.indices == [7, 30] and len(splits.train) == 38
    assert len(open_splits(Data(**data), calib_indices=[]).train) == 40
    with pytest.raises(
        ValueError, match="the checkpoint held out image 40 of its training set, but .*a.npz has 40"
    ):
        open_splits(Data(**data), calib_indices=[1, 40])


def test_only_training_images_are_augmented(data):
    view, transform = View(16, (0.5,) * 3, (0.25,) * 3), Transform(reprob=1.0)
    splits = open_splits(Data(**data, num_calib=6), view, transform)
    assert splits.view == view and splits.test[0][0].shape == (3, 16, 16)
    assert torch.equal(splits.calib[0][0], splits.test[splits.calib_indices[0]][0])
    assert not torch.equal(splits.train[0][0], splits.train[0][0])


def test_popular_classes_are_a_data_set_of_their_own(data):
    splits = open_splits(Data(**data, popular_classes=(8, 1)))
    assert splits.source.class_names == ("ship", "automobile", "other")
    assert [splits.test[i][1] for i in range(10)] == [2, 1, 2, 2, 2, 2, 2, 2, 0, 2]
