"""What every registered network keeps to, and states."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from adaptive.operators import Operators
from models import create_model, join, list_models, registry, take


@pytest.mark.parametrize("name", list_models())
@torch.no_grad()
def test_every_name_builds_and_answers_on_the_meta_device(name, is_cifar, on_meta):
    net, again = on_meta(name).eval(), on_meta(name)
    again.load_state_dict(net.state_dict(), strict=True)
    assert list(again.state_dict()) == list(net.state_dict())
    side = 32 if is_cifar(name) else 224
    costs = []
    with Operators() as counter:
        for k, logits in net.requires_grad_(False).each_exit(torch.empty(2, 3, side, side, device="meta")):
            assert k == len(costs) and logits.shape == (2, 1000)
            costs.append(counter.total)
    assert len(costs) == net.num_exits
    assert all(a < b for a, b in zip([0, *costs], costs, strict=False))


def test_every_registered_class_has_a_small_variant(small_options):
    classes = {type(create_model(name, **options)) for name, options in small_options.items()}
    registered = {entry.model_class for entry in registry._ENTRIES.values()}
    # Programs of README.md, which tests run, may have registered others.
    assert classes == {found for found in registered if found.__module__.startswith("models.")}


@torch.no_grad()
def test_steps_in_order_are_the_forward_pass(family, small, rest):
    net, images = small(family)
    whole = net(images)
    for a, b in zip(rest(net, 0, net.begin(images)), whole, strict=True):
        assert torch.equal(a, b)
    for k, logits in net.each_exit(images):
        assert torch.equal(logits, whole[k])


@torch.no_grad()
def test_rows_are_independent(family, small):
    net, images = small(family)
    whole = net(images)
    assert [logits.shape for logits in whole] == [(5, 7)] * net.num_exits
    for i in range(5):
        for alone, logits in zip(net(images[i : i + 1]), whole, strict=True):
            assert_close(alone[0], logits[i], rtol=1e-12, atol=1e-12)


def test_every_trainable_parameter_gets_a_gradient(family, small):
    net, images = small(family)
    sum(F.cross_entropy(logits, torch.arange(5)) for logits in net.train()(images)).backward()
    assert [key for key, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_state_dict_round_trips(family, small, small_options):
    net, images = small(family)
    torch.manual_seed(1)
    other = create_model(family, num_classes=7, **small_options[family]).double().eval()
    assert not torch.equal(other(images)[0], net(images)[0])
    other.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other(images), net(images), strict=True))


def test_unknown_option_is_a_type_error(family, small_options):
    with pytest.raises(TypeError, match=f"{family} has no option 'no_such_option'"):
        create_model(family, **small_options[family], no_such_option=1)


@torch.no_grad()
def test_stages_of_some_samples_are_those_samples_of_the_stages(family, small):
    net, images = small(family)
    rows = torch.tensor([3, 0])
    whole = net.begin(images)
    part = take(whole, rows)
    for k in range(net.num_exits):
        logits, whole = net.step(k, whole)
        some, part = net.step(k, part)
        assert_close(some, logits[rows], rtol=1e-12, atol=1e-12)
        assert_close(part, take(whole, rows), rtol=1e-12, atol=1e-12)


def test_states_hold_only_what_later_stages_read(family, small, states_hold_only_what_is_read):
    states_hold_only_what_is_read(*small(family))


def test_take_and_join_keep_the_nest():
    a, b = torch.arange(6).view(3, 2), torch.arange(3)
    state = {"maps": [a, (b, None)], "said": None, "none": [], "latent": a + 10}
    part = take(state, torch.tensor([2, 0]))
    assert_close(part["maps"][0], torch.tensor([[4, 5], [0, 1]]))
    assert_close(part["maps"][1][0], torch.tensor([2, 0]))
    assert_close(part["latent"], torch.tensor([[14, 15], [10, 11]]))
    assert isinstance(part["maps"][1], tuple) and part["maps"][1][1] is None
    assert part["said"] is None and part["none"] == []
    whole = join([part, take(state, torch.tensor([1]))])
    assert_close(whole["maps"][0], torch.tensor([[4, 5], [0, 1], [2, 3]]))
    assert_close(whole["maps"][1][0], torch.tensor([2, 0, 1]))
    assert isinstance(whole["maps"][1], tuple) and whole["maps"][1][1] is None
    assert list(whole) == list(state) and whole["said"] is None and whole["none"] == []


def test_join_of_one_state_is_that_state():
    state = [torch.zeros(2)]
    assert join([state]) is state


def test_take_and_join_keep_channels_last():
    maps = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    part = take([maps], torch.tensor([0, 2]))
    assert part[0].is_contiguous(memory_format=torch.channels_last)
    assert join([part, part])[0].is_contiguous(memory_format=torch.channels_last)


def test_a_state_of_anything_else_is_our_mistake():
    with pytest.raises(AssertionError, match="not str"):
        take("maps", torch.tensor([0]))
