import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close

from models import MultiExitModel, create_model
from models.dyn_perceiver import EXITS
from training.regimes import (
    Equilibrium,
    HeadsOnly,
    modules_of_heads,
    phase_of,
    scale_gradient,
    trained_through,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")

TARGETS = torch.arange(6) % 5


class Chain(MultiExitModel):
    """Stage k adds `shifts[k]` to a vector, head k multiplies it by `factors[k]`."""

    def __init__(self, num_exits, apart=False):
        """`apart`: what a head reads is not the tensor that the next stage reads."""
        super().__init__()
        self.num_exits, self.apart = num_exits, apart
        self.shifts = nn.ParameterList(torch.randn(2) for _ in range(num_exits))
        self.factors = nn.ParameterList(torch.randn(2) for _ in range(num_exits))

    def begin(self, images):
        return images

    def trunk(self, k, state):
        state = state + self.shifts[k]
        return state.clone() if self.apart else state, state

    def head(self, k, features):
        return self.factors[k] * features


def small_msdnet(**options):
    torch.manual_seed(0)
    options = {"nBlocks": 3, "nChannels": 4, "growthRate": 4, **options}
    return create_model("msdnet", num_classes=5, **options), torch.randn(6, 3, 32, 32)


def loss_of(exits):
    return sum((k + 1) * F.cross_entropy(y, TARGETS) for k, y in enumerate(exits))


def gradients(exits, network):
    found = torch.autograd.grad(loss_of(exits), list(network.parameters()), allow_unused=True)
    return dict(zip([name for name, _ in network.named_parameters()], found, strict=True))


# Gradient equilibrium


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_scaled_gradient_leaves_the_value_as_it_is(dtype):
    x = torch.randn(50, 2, dtype=dtype, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    assert torch.autograd.grad((3 * y).sum(), x)[0].eq(0.75).all()
    with forward_ad.dual_level():
        y = scale_gradient(forward_ad.make_dual(x.detach(), torch.ones_like(x)), 0.25)
        assert forward_ad.unpack_dual(y).tangent.eq(0.25).all()
    rows = torch.arange(3)
    assert scale_gradient(rows, 0.25) is rows


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("num_exits", [1, 2, 4])
def test_a_trunk_receives_the_mean_of_the_gradients_of_the_exits_behind_it(num_exits, apart):
    torch.manual_seed(0)
    chain, images = Chain(num_exits, apart), torch.randn(3, 2)
    exits = Equilibrium(chain)(images)
    assert all(map(torch.equal, exits, chain(images)))
    pulls = torch.tensor([3.0, 1.0, 4.0, 1.5])
    sum(pull * y.sum() for pull, y in zip(pulls, exits, strict=False)).backward()
    for k in range(num_exits):
        behind = [3 * pulls[j] * chain.factors[j].detach() for j in range(k, num_exits)]  # of three samples
        assert_close(chain.shifts[k].grad, sum(behind) / len(behind))
        features = images + sum(chain.shifts[: k + 1])
        assert_close(chain.factors[k].grad, pulls[k] * features.detach().sum(0))  # in full


def test_equal_gradients_arrive_once():
    chain = Chain(5)
    for factor in chain.factors:
        nn.init.ones_(factor)
    sum(y.sum() for y in Equilibrium(chain)(torch.randn(1, 2))).backward()
    assert_close(chain.shifts[0].grad, torch.ones(2))
    chain.zero_grad()
    sum(y.sum() for y in chain(torch.randn(1, 2))).backward()
    assert_close(chain.shifts[0].grad, torch.full((2,), 5.0))


def with_hooks(network, images):
    """The rule for MSDNet, written with hooks on its coarsest map."""
    state, exits, num_exits = network.begin(images), [], network.num_exits
    for k in range(num_exits):
        features, state = network.trunk(k, state)
        read, later = features.view_as(features), features.view_as(features)
        read.register_hook(lambda g, left=num_exits - k: g / left)
        if k < num_exits - 1:
            later.register_hook(lambda g, left=num_exits - k: g * (left - 1) / left)
            state = [*state[:-1], later]
        exits.append(network.head(k, read))
    return exits


def test_in_msdnet_only_the_coarsest_map_is_scaled():
    network, images = small_msdnet()
    network, images = network.double(), images.double()
    plain, exits, by_hand = (
        net(images) for net in (network, Equilibrium(network), lambda x: with_hooks(network, x))
    )
    assert all(map(torch.equal, exits, plain))
    ours, theirs, joint = (gradients(y, network) for y in (exits, by_hand, plain))
    assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    other = {name for name in ours if not torch.allclose(ours[name], joint[name], rtol=1e-6, atol=0)}
    assert other and all(name.startswith("blocks") for name in other)  # heads have their full gradients


@pytest.mark.parametrize("name", ["reg400m_perceiver_t32", "boosted/msdnet"])
def test_equilibrium_has_the_answers_of_any_network(name):
    torch.manual_seed(0)
    network, images = create_model(name, num_classes=5), torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        assert all(map(torch.equal, Equilibrium(network.eval())(images), network(images)))


# Heads only


def test_the_trunk_stays_as_it_is_while_heads_train():
    network, images = small_msdnet(nBlocks=2)
    fixed = "classifier.0.linear.bias"
    network.get_parameter(fixed).requires_grad_(False)
    before, answers = copy.deepcopy(network.state_dict()), network.eval()(images)
    model = HeadsOnly(network, (3, 32, 32)).train()

    def learns(name):
        return name.startswith("classifier") and name != fixed

    assert all(p.requires_grad == learns(name) for name, p in network.named_parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(images)).backward()
        optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) != learns(name), name  # batch-norm statistics too
    assert not any(map(torch.equal, network.eval()(images), answers))


def test_only_heads_are_in_training_mode_and_evaluation_is_the_networks():
    network, images = small_msdnet(nBlocks=2)
    model, heads = HeadsOnly(network, (3, 32, 32)), set(network.classifier.modules()) - {network.classifier}
    for _ in range(2):  # after an evaluation, too
        model.train()
        assert {module for module in network.modules() if module.training} == heads
        network.eval()
        assert not any(module.training for module in network.modules())
        assert all(map(torch.equal, model(images), network(images)))
    network.train()
    assert all(module.training for module in network.modules())


def test_what_an_exit_said_is_carried_on_without_gradient(relay_class):
    torch.manual_seed(0)
    network, images = relay_class(), torch.randn(4, 3, 2, 2)
    expected = network(images)
    exits = HeadsOnly(network, (3, 2, 2))(images)
    assert all(map(torch.equal, exits, expected))
    exits[1].sum().backward()
    assert [head.weight.grad is None for head in network.heads] == [True, False, True]
    assert all(layer.weight.grad is None for layer in network.layers)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("msdnet", [f"classifier.{k}" for k in range(5)]),
        ("reg400m_perceiver_t32", [*EXITS, "cnn_dropout"]),
        ("boosted/msdnet", [f"network.classifier.{k}" for k in range(5)]),
        ("resnet18", ["fc"]),
    ],
)
def test_modules_of_heads_are_those_that_run_in_them(name, paths):
    with torch.device("meta"):
        network = create_model(name, num_classes=5)
    found = modules_of_heads(network, (3, 32, 32))
    assert Counter(found) == Counter(m for path in paths for m in network.get_submodule(path).modules())
    assert all(module.training for module in network.modules())


def test_modules_of_heads_are_found_in_every_type_of_weights_and_without_a_trace():
    network, _ = small_msdnet()
    network.double().eval()
    before = copy.deepcopy(network.state_dict())
    assert set(modules_of_heads(network, (3, 32, 32))) == set(network.classifier.modules()) - {
        network.classifier
    }
    assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in network.modules())
    assert not nn.modules.module._global_forward_pre_hooks


# Phases


def test_phases_by_epoch():
    phases = {regime: [phase_of(regime, epoch, 2) for epoch in range(4)] for regime in ("disjoint", "mixed")}
    assert phases == {
        "disjoint": ["last", "last", "heads", "heads"],
        "mixed": ["last", "last", "joint", "joint"],
    }
    assert phase_of("joint", 0, 2) == "joint" and phase_of("equilibrium", 0, 2) == "equilibrium"
    assert [phase_of("disjoint", 0, 0), phase_of("mixed", 3, 4)] == ["heads", "last"]


def test_phases_say_what_is_trained_through():
    network, _ = small_msdnet(nBlocks=2)
    assert all(trained_through(network, phase, (3, 32, 32)) is network for phase in ("joint", "last"))
    assert isinstance(trained_through(network, "equilibrium", (3, 32, 32)), Equilibrium)
    assert all(p.requires_grad for p in network.parameters())
    assert isinstance(trained_through(network, "heads", (3, 32, 32)), HeadsOnly)
