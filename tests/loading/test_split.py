import pytest
import torch

from loading.split import default_num_calib, make_split, split_train
from loading.transforms import View, eval_transform


def test_split_train_is_disjoint_complete_sorted_and_fixed_by_the_seed():
    train, calib = split_train(100, 10, seed=3)
    assert sorted(train + calib) == list(range(100)) and len(calib) == 10
    assert train == sorted(train) and calib == sorted(calib)
    assert (train, calib) == split_train(100, 10, seed=3) != split_train(100, 10, seed=4)


@pytest.mark.parametrize("num_calib", [-1, 10, 11])
def test_split_train_refuses_to_hold_out_everything(num_calib):
    with pytest.raises(ValueError, match=f"--num_calib {num_calib}: accepted: 0 to 9"):
        split_train(10, num_calib, seed=0)


def test_default_num_calib():
    given = [
        ("DIGITS", 1437),
        ("CIFAR10", 50_000),
        ("image_folder", 90_000),
        ("IMNET", 1_281_167),
        ("IMNET", 1000),
    ]
    assert [default_num_calib(*pair) for pair in given] == [143, 5000, 5000, 50_000, 100]


def test_calib_reads_its_rows_with_the_transform_it_was_given(tmp_path, cifar, pixels):
    source = cifar
    rows = split_train(len(source.train), 5, seed=0)[1]
    calib = make_split(source.train, rows, eval_transform(View().resolved(source)))
    plain = (pixels(20)[rows[2]] / 255 - source.mean) / source.std
    image, label = calib[2]
    torch.testing.assert_close(image, torch.from_numpy(plain).permute(2, 0, 1).float())
    assert len(calib) == 5 and label == rows[2] % 10
    assert calib.name(2) == f"{tmp_path / 'a.npz'}[{rows[2]}]"
