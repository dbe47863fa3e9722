"""Stages of named tensors answer as the network does, hand over what is read, and hold their own weights."""

import pytest
import torch

from deploy.folder import IMAGES
from deploy.stages import named_stages
from models import MultiExitModel


class Lengthless(torch.Tensor):
    """A tensor that does not say how many rows it has: a number would freeze the batch of an exported program."""

    def __len__(self):
        raise AssertionError("len() of a tensor; shape[0] may vary")


@torch.inference_mode()
def answers(stages, state):
    """Logits of these stages; what they make is added to the state."""
    exits = []
    for stage in stages:
        logits, *made = stage(*(state[one.name] for one in stage.inputs))
        exits.append(logits)
        for one, tensor in zip(stage.outputs, made, strict=True):
            assert one.shape == tensor.shape[1:] and len(tensor) == len(logits)
            state[one.name] = tensor
    return exits


@torch.no_grad()
def test_stages_answer_as_the_network_and_hand_over_what_is_read(family, small):
    network, images = small(family)
    stages = named_stages(network, images[:2])
    assert [stage.exit for stage in stages] == list(range(network.num_exits))
    for count in (1, 3):
        state = {IMAGES: images[:count]}
        expected = network(images[:count].as_subclass(Lengthless))
        for one, other in zip(answers(stages, state), expected, strict=True):
            torch.testing.assert_close(one, other.as_subclass(torch.Tensor), rtol=1e-9, atol=1e-12)
    state = {name: tensor[:1] for name, tensor in state.items()}
    for k, stage in enumerate(stages):
        for one in stage.outputs:
            spoilt = answers(stages[k + 1 :], state | {one.name: torch.full_like(state[one.name], torch.nan)})
            assert any(logits.isnan().any() for logits in spoilt), one.name


def test_a_weight_lies_in_one_stage(small):
    network, images = small("msdnet")
    stages = named_stages(network, images[:2])
    sizes = [sum(one.numel() for one in stage.parameters()) for stage in stages]
    assert sum(sizes) == sum(one.numel() for one in network.parameters()) and min(sizes) > 0
    shared = {one.data_ptr() for one in network.parameters()}
    assert all(one.data_ptr() in shared for stage in stages for one in stage.parameters())


@torch.no_grad()
def test_exits_that_are_off_are_merged(small):
    network, images = small("msdnet")
    stages = named_stages(network, images[:2], off=(1,))
    assert [stage.exit for stage in stages] == [0, 2]
    found, whole = answers(stages, {IMAGES: images}), network(images)
    torch.testing.assert_close(found, [whole[0], whole[2]])


def test_maps_are_channels_last_between_stages(tiny):
    first, second = named_stages(tiny.network, torch.randn(2, 3, 8, 8))
    assert [(one.name, one.shape) for one in first.inputs] == [("images", (3, 8, 8))]
    assert [one.shape for one in first.outputs] == [(4, 4, 4), (3,)]
    assert second.inputs == first.outputs and second.outputs == []
    assert {one.dtype for one in second.inputs} == {"float32"}


class Shapely(MultiExitModel):
    """Its second stage reads how large the images were, and nothing else of them."""

    num_exits = 2

    def begin(self, images):
        return images, images.mean((2, 3))

    def trunk(self, k, state):
        images, mean = state
        return mean * images.shape[2] + k * images.shape[0], state

    def head(self, k, features):
        return features


def test_a_stage_may_read_the_shape_of_a_tensor_that_is_not_handed_to_it():
    stages = named_stages(Shapely().eval(), torch.randn(2, 3, 4, 4))
    assert [one.name for one in stages[1].inputs] == ["stage0_1"]
    images = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(answers(stages, {IMAGES: images}), Shapely().eval()(images))


def test_a_network_in_training_is_refused(tiny):
    with pytest.raises(ValueError, match=r"network\.eval"):
        named_stages(Shapely(), torch.randn(2, 3, 4, 4))
