import numpy as np
import pytest
import torch

from datasets import ArrayImages, Source, Split
from training.losses import joint_objective, with_energy_hinge
from training.popular import Popular, balanced, only_popular

LABELS = [4, 0, 2, 2, 1, 3, 3, 3]


def source():
    images = ArrayImages(np.zeros((8, 32, 32, 3), np.uint8), LABELS, "toy")
    return Source(images, images, 5, (0.0,) * 3, (1.0,) * 3, 32)


def test_other_classes_become_one():
    opened = only_popular(source(), [2, 0])
    assert opened.num_classes == 3
    assert [opened.train[i][1] for i in range(8)] == opened.train.labels == [2, 1, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("classes", [[2, 2], [5], [0, 1, 2, 3, 4]])
def test_bad_popular_classes_are_named(classes):
    with pytest.raises(ValueError, match="accepted: different numbers below 5"):
        only_popular(source(), classes)


def test_popular_classes_are_drawn_evenly_and_the_others_as_often_as_all_of_them():
    split = Split(Popular(source().train, [2, 0]), [1, 2, 3, 5, 6], None)
    np.testing.assert_allclose(balanced(split, 2), [0.25, 0.125, 0.125, 0.25, 0.25])
    with pytest.raises(ValueError, match="class 1 of the popular classes and other has no training image"):
        balanced(Split(Popular(source().train, [2, 0]), [2, 5], None), 2)


def test_the_hinge_wants_high_energy_of_known_classes_and_low_energy_of_others():
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    model, targets = lambda images: [logits], torch.tensor([0, 2])
    plain = joint_objective(exit_weights=[1.0], smoothing=0.0)
    ((loss, _),) = plain(model, None, targets)
    ((hinged, exits),) = with_energy_hinge(plain, 2, 0.1, 1.0, 5.0)(model, None, targets)
    known, other = logits.logsumexp(1).tolist()
    assert (hinged - loss).item() == pytest.approx(0.1 * ((5 - known) ** 2 + (other - 1) ** 2), rel=1e-5)
    assert exits[0] is logits
