import copy

import pytest
import torch
from torch import nn

from training.optim import Optimization, make_optimizer
from training.restore import load_optimizer


def stepped(opt):
    """A small network and its optimizer after a step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    optimizer = make_optimizer(network, Optimization(opt=opt, lr=0.1))
    network(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    return network, optimizer


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw", "adafactor", "lamb", "muon", "novograd"])
def test_an_optimizer_goes_on_as_if_not_interrupted(opt):
    (network, optimizer), (other, later) = stepped(opt), stepped(opt)
    for parameter in other.parameters():
        later.state.pop(parameter, None)
    load_optimizer(later, copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step()
        later.step()
    for there, here in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(there, here)


@pytest.mark.parametrize(
    ("opt", "change", "complaint"),
    [
        ("adamw", {"exp_avg": torch.zeros(1, 3)}, r"exp_avg has the shape \[1, 3\] for a parameter \[4, 3\]"),
        ("adamw", {"exp_avg": torch.zeros(4000, 3)}, r"exp_avg has the shape \[4000, 3\]"),
        ("adamw", {"exp_avg": torch.zeros(1)}, r"exp_avg has the shape \[1\]"),
        ("adamw", {"step": torch.ones(7)}, r"step has the shape \[7\]"),
        ("adamw", {"exp_avg": None}, "a parameter has no tensor exp_avg$"),
        ("adamw", {"exp_avg": 0.5}, "a parameter has no tensor exp_avg$"),
        ("lookahead_adamw", {"exp_avg_sq": torch.zeros(3)}, r"exp_avg_sq has the shape \[3\]"),
        ("sgd", {"momentum_buffer": torch.zeros(3)}, r"momentum_buffer has the shape \[3\]"),
    ],
)
def test_a_state_of_other_shapes_is_refused(opt, change, complaint):
    _, optimizer = stepped(opt)
    state = optimizer.state_dict()
    entries = state["state"][0] | change
    state["state"][0] = {key: value for key, value in entries.items() if value is not None}
    with pytest.raises(ValueError, match=f"^{complaint}"):
        load_optimizer(optimizer, state)


def test_a_state_of_one_number_for_all_gets_memory_of_its_own():
    network, optimizer = stepped("adamw")
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.ones(1, 1).expand(4, 3)
    load_optimizer(optimizer, state)
    found = optimizer.state[network[0].weight]["exp_avg"]
    assert found.is_contiguous() and torch.equal(found, torch.ones(4, 3))
