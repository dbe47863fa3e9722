import pytest
import torch

from models import create_model
from training.losses import Losses, joint_objective
from training.resolution import LowStart, at_side


def sides(low_start, epochs):
    """The side of the images that the network gets in every epoch, of images of 32 pixels."""

    def objective(model, images, targets):
        yield images.shape[-1]

    images = torch.zeros(2, 3, 32, 32)
    return [
        next(low_start.objective(objective, epoch, epochs)(None, images, None)) for epoch in range(epochs)
    ]


def test_the_first_share_of_the_epochs_is_small():
    assert sides(LowStart(low_size=24, low_share=0.4), 5) == [24, 24, 32, 32, 32]
    assert sides(LowStart(low_size=24, low_share=0.0), 2) == [32, 32]
    assert sides(LowStart(low_size=24, low_share=1.0), 2) == [24, 24]
    assert sides(LowStart(), 2) == [32, 32]


def test_images_are_reduced_without_aliasing():
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2  # black and white in turn
    plain = joint_objective(Losses([1.0, 1.0]))

    def network(images):
        assert images.shape == (2, 3, 8, 8) and images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(images[..., 1:-1, 1:-1], torch.full((2, 3, 6, 6), 0.5), atol=0.02, rtol=0)
        return [images.mean((2, 3))] * 2

    images = board.float().expand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    ((loss, exits),) = at_side(plain, 8)(network, images, torch.tensor([0, 1]))
    assert len(exits) == 2 and loss.isfinite()


def test_sides_that_cannot_be_are_refused():
    network = create_model("cifar_densenet", 5, depth=10, growthRate=4)
    LowStart(low_size=24).check(network, 32)
    LowStart().check(network, 32)
    with pytest.raises(ValueError, match=r"^--low_size 32: accepted: below 32, as --input_size$"):
        LowStart(low_size=32).check(network, 32)
    with pytest.raises(
        ValueError, match=r"^--low_size 3: the network cannot read such images \(.*\); the le"
    ):
        LowStart(low_size=3).check(network, 32)
