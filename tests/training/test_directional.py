"""Passes with tangents, against differences of two passes at moved weights."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from models import create_model
from models.layers import drop_path
from training.directional import Recording, buffers_of, tangent_of
from training.weight_net import loss_table

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")

NETWORKS = {
    "msdnet": ("msdnet", {"nBlocks": 2, "nChannels": 4, "growthRate": 4}, 32),
    # Maps of 14 and 7 x 7, which tokens read through one convolution; squeeze-excite; attention of one and
    # more heads.
    "perceiver": ("mobilenetV3_0x5_perceiver_t128", {"SA_widening_factor": 1}, 56),
}


class Noisy(nn.Module):
    """Two exits after convolutions with and without bias, strides and groups; drop-out and stochastic
    depth."""

    def __init__(self, rate=0.5, inplace=True):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=inplace)
        )  # overwritten if in place
        self.strided = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.Tanh())
        self.drop, self.drop_path = nn.Dropout(rate), drop_path(rate)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, images):
        x = self.strided(self.stem(images))
        y = x + self.drop_path(self.deep(x))
        return [head(self.drop(map_.mean((2, 3)))) for head, map_ in zip(self.heads, (x, y), strict=True)]


def noisy(**options):
    """The network, five images, classes."""
    torch.manual_seed(0)
    return (
        Noisy(**options).double().train(),
        torch.randn(5, 3, 9, 9, dtype=torch.float64),
        torch.arange(5) % 3,
    )


def directions_in(network):
    return {name: torch.randn_like(p) for name, p in network.named_parameters() if p.requires_grad}


@torch.no_grad()
def difference(function, network, directions, images, draws=None, h=1e-8):
    """The same derivative from two passes, which start from the same generator state; `h` crosses no kink of
    a ReLU."""
    named, results = dict(network.named_parameters()), []
    for sign in (1, -1):
        moved = {name: named[name] + sign * h * direction for name, direction in directions.items()}
        if draws is not None:
            torch.set_rng_state(draws)
        results.append(function(functional_call(network, moved | buffers_of(network), images)))
    return (results[0] - results[1]) / (2 * h)


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_are_derivatives_and_leave_no_trace(name):
    model, options, side = NETWORKS[name]
    torch.manual_seed(0)
    network = create_model(model, num_classes=5, **options).double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images, table = (
        torch.randn(5, 3, side, side, dtype=torch.float64),
        partial(loss_table, targets=torch.arange(5)),
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    directions = directions_in(network)
    tangent = tangent_of(table, network, directions, images)
    assert tangent.shape == (5, network.num_exits) and not tangent.requires_grad
    assert tangent.abs().min() > 0
    assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in network.parameters()) and network.training
    assert_close(tangent, difference(table, network, directions, images), rtol=1e-4, atol=1e-6)


def test_a_direction_may_leave_parameters_out():
    network, images, targets = noisy(rate=0.0)
    table = partial(loss_table, targets=targets)
    for part in ("stem.0.bias", "deep", "heads.1"):
        directions = {name: d for name, d in directions_in(network).items() if name.startswith(part)}
        tangent = tangent_of(table, network, directions, images)
        assert_close(tangent, difference(table, network, directions, images), rtol=1e-5, atol=1e-7)
        assert tangent[:, 0].eq(0).all() == (part != "stem.0.bias")  # the others are behind exit 0


def test_an_operator_without_a_derivative_of_this_kind_is_an_error():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    network, images, targets = noisy()
    network.drop.forward = Opaque.apply
    with pytest.raises(RuntimeError, match="jvp"):
        tangent_of(partial(loss_table, targets=targets), network, directions_in(network), images)


# The repetition of a pass


class Convolutions(TorchDispatchMode):
    """Counts those that are really computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def recorded(network, images, targets):
    """A pass, and where the generators stood before it."""
    recording, draws = Recording(images.device), torch.get_rng_state()
    with recording.first():
        losses = loss_table(network(images), targets)
    return recording, losses, draws


def repeated(recording, network, directions, images, targets):
    """Its tangent, its value, and the convolutions computed for it."""
    values = []

    def table(exits):
        losses = loss_table(exits, targets)
        values.append(torch.autograd.forward_ad.unpack_dual(losses).primal.clone())
        return losses

    with recording.again(), Convolutions() as computed:
        tangent = tangent_of(table, network, directions, images)
    return tangent, values[0], computed.count


@pytest.mark.parametrize("inplace", [False, True])
def test_the_repetition_draws_what_the_pass_drew(inplace):
    network, images, targets = noisy(inplace=inplace)
    directions = directions_in(network)
    recording, losses, draws = recorded(network, images, targets)
    after = torch.get_rng_state()
    assert not torch.equal(after, draws)
    tangent, value, _ = repeated(recording, network, directions, images, targets)
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(value, losses.detach(), rtol=1e-12, atol=1e-12)
    assert_close(
        tangent,
        difference(partial(loss_table, targets=targets), network, directions, images, draws),
        rtol=1e-5,
        atol=1e-7,
    )
    losses.sum().backward()  # what the pass kept for its backward pass is whole


def test_the_generators_are_put_back_after_an_error_too():
    recording, after = Recording(torch.device("cpu")), torch.get_rng_state()
    with pytest.raises(KeyError), recording.again():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), after)


def test_results_of_convolutions_are_used_again_unless_overwritten():
    counts = {}
    for inplace in (False, True):
        network, images, targets = noisy(inplace=inplace)
        directions = directions_in(network)
        recording, _, _ = recorded(network, images, targets)
        counts[inplace] = repeated(recording, network, directions, images, targets)[2]
    # Of the three, one product for each input that moves: the images do not.
    assert counts[False] == 2 * 3 - 1
    anew = repeated(Recording(images.device), network, directions, images, targets)[2]
    assert counts[False] < counts[True] < anew and anew >= counts[False] + 3


def test_results_used_again_are_those_of_the_pass():
    network, images, targets = noisy(rate=0.0, inplace=False)
    recording, losses, _ = recorded(network, images, targets)
    with torch.no_grad():
        network.deep[0].weight.mul_(2)  # would show if that convolution were computed again
    _, value, _ = repeated(recording, network, directions_in(network), images, targets)
    assert_close(value, losses.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("moving", ["bias", "weight", "weight and bias", "input", "everything", "nothing"])
def test_convolutions_of_known_result(moving):
    torch.manual_seed(0)
    network = nn.Module()
    network.conv, network.scale = (
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Parameter(torch.tensor(1.5)),
    )
    network.forward = lambda images: network.conv(images * network.scale)
    network.double()
    parts = {"input": ["scale"], "everything": ["scale", "weight", "bias"]}.get(moving, moving.split(" and "))
    directions = {name: d for name, d in directions_in(network).items() if name.rpartition(".")[2] in parts}
    images = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    recording = Recording(images.device)
    with recording.first():
        network(images)
    with recording.again():
        tangent = tangent_of(lambda maps: maps, network, directions, images)
    if moving == "nothing":
        assert tangent is None
    else:
        assert_close(
            tangent, difference(lambda maps: maps, network, directions, images), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    "moving", ["scale", "scale weight", "scale bias", "scale weight bias", "weight bias"]
)
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(3),
        lambda: nn.BatchNorm2d(3, affine=False),
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
        lambda: nn.BatchNorm2d(3, eps=0.5).eval(),
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12, eps=0.5)),
        lambda: nn.Sequential(nn.BatchNorm2d(3, eps=0.5).eval(), nn.BatchNorm2d(3)),  # its tangent is in fp32
    ],
)
def test_batch_norm(norm, moving):
    """Half precision has a rule of its own; whatever moves, it says what the exact one does."""
    torch.manual_seed(0)
    network, dtype = nn.Module(), torch.float64
    network.norm, network.scale = norm(), nn.Parameter(torch.tensor(1.5))
    network.forward = lambda images: network.norm((images * network.scale + images**2).to(dtype))
    network.double()
    for p in network.norm.parameters():
        nn.init.normal_(p)
    moved = {
        name: d for name, d in directions_in(network).items() if name.rpartition(".")[2] in moving.split()
    }
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    exact = tangent_of(lambda maps: maps, network, moved, images)
    network, dtype = network.float(), torch.bfloat16
    before, moved = buffers_of(network), {name: direction.float() for name, direction in moved.items()}
    tangent = tangent_of(lambda maps: maps, network, moved, images)
    assert (tangent is None) == (not moved)
    if moved:
        assert F.cosine_similarity(tangent.double().flatten(), exact.flatten(), dim=0) > 0.9995
        assert float(tangent.double().norm()) == pytest.approx(float(exact.norm()), rel=0.02)
    assert_close(buffers_of(network), before, rtol=0, atol=0)


def test_a_recorded_pass_in_mixed_precision_is_repeated_in_it():
    network, images, targets = noisy(rate=0.0, inplace=False)
    network, images, table = network.float(), images.float(), partial(loss_table, targets=targets)
    directions = directions_in(network)
    exact = tangent_of(table, network, directions, images)
    with torch.autocast("cpu", torch.bfloat16):
        recording, _, _ = recorded(network, images, targets)
        with recording.again():
            tangent = tangent_of(table, network, directions, images)
    assert tangent.dtype == torch.float32 and not torch.equal(tangent, exact)
    assert F.cosine_similarity(tangent.flatten(), exact.flatten(), dim=0) > 0.999
