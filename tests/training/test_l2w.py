import copy
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from adaptive.thresholds import geometric_quotas
from models import MultiExitModel, create_model
from training.l2w import SampleWeighting, Weighting, confidence_table
from training.losses import Losses, self_distillation
from training.optim import Update
from training.regimes import Equilibrium, HeadsOnly
from training.weight_net import assign_exits, judgement, loss_table, sample_weights, weight_inputs
from utils import Compute

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")

LR, CLASSES = 0.1, 5
CPU = Compute(torch.device("cpu"))


class Square(torch.autograd.Function):
    """Differentiable twice, but backwards only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Toy(MultiExitModel):
    """Three exits on a convolution and linear layers, with batch norm; `square` takes the place of tanh."""

    num_exits = 3

    def __init__(self, square=None, dropout=0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
        self.body = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)) for _ in range(3))
        self.act, self.dropout = square or torch.tanh, nn.Dropout(dropout)

    def begin(self, images):
        return self.act(self.stem(images)).mean((2, 3))

    def trunk(self, k, state):
        state = state + self.act(self.body[k](self.dropout(state)))
        return state, state

    def head(self, k, features):
        return self.heads[k](features)


def toy(seed=0, **options):
    torch.manual_seed(seed)
    return Toy(**options).double()


def small_msdnet(name="msdnet"):
    torch.manual_seed(0)
    return create_model(name, num_classes=CLASSES, nBlocks=2, nChannels=4, growthRate=4).double()


def small_perceiver():
    torch.manual_seed(0)
    return create_model("reg400m_perceiver_t32", num_classes=CLASSES, SA_widening_factor=1).double()


def batch(n, side=6, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, 3, side, side, dtype=torch.float64), torch.randint(CLASSES, (n,))


def sgd(network, **options):
    """Plain SGD with momentum, and what steps it."""
    optimizer = torch.optim.SGD(
        network.parameters(), LR, **{"momentum": 0.9, "weight_decay": 0.01, **options}
    )
    decay = optimizer.param_groups[0]["weight_decay"]
    return partial(Update, optimizer=optimizer, lr=lambda step: LR, weight_decay=lambda step: decay)


def weighting(network, *, update=None, forward_mode=None, batches=4, exit_weights=None, seed=2, **options):
    """The objective in double precision, with a weight net that does not depend on the network."""
    update = update or sgd(network)(network)
    names = ("smoothing", "distil")
    losses = {name: options.pop(name) for name in names if name in options}
    torch.manual_seed(seed)
    objective = SampleWeighting(
        Weighting(**{"meta_net_hidden_size": 8, "meta_lr": 0.01, **options}),
        update,
        Losses(exit_weights or [1.0] * network.num_exits, **losses),
        proportions=geometric_quotas(0.75, network.num_exits),
        batches=batches,
        epochs=2,
        forward_mode=forward_mode,
    )
    objective.weight_net.to(next(network.parameters()).dtype)
    return objective


def train(objective, model, batches):
    """Every batch, with the steps it asks for; the losses."""
    return [train_on(objective, loss) for images in batches for loss in objective(model.train(), *images)]


def train_on(objective, pair):
    objective.update(pair[0])
    return pair[0].item()


def gradients_of(objective):
    """The weight net's, of its last step."""
    return [p.grad.clone() for p in objective.weight_net.parameters()]


def values_of(module):
    return [value.clone() for value in module.state_dict().values()]


def all_equal(these, those):
    return all(map(torch.equal, these, those))


# The weight net's gradient

OPTIONS = {
    "plain": {},
    "centred by exit, reads both": {"constraint_dimension": "row", "meta_net_input_type": "both"},
    "everything": {
        "constraint_dimension": "mat",
        "meta_net_input_type": "conf",
        "exit_weights": [0.5, 1.0, 2.0],
        "smoothing": 0.1,
        "distil": self_distillation(0.5, 2.0),
    },
}
SGDS = {
    "momentum": {},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.5},
    "plain": {"momentum": 0.0},
}


def judged(objective, model, train, judge, weight_net):
    """The judgement after a real step of the optimizer under the weights that `weight_net` gives."""
    options, (images, targets) = objective.options, train
    model, optimizer = copy.deepcopy((model, objective.update.optimizer))
    exits = model(images)
    plain, smoothed = loss_table(exits, targets), loss_table(exits, targets, objective.smoothing)
    inputs = weight_inputs(options.meta_net_input_type, plain, confidence_table(exits))
    weights = sample_weights(weight_net(inputs), options.epsilon, options.constraint_dimension).detach()
    loss = sum(
        w * column.mean() for w, column in zip(objective.exit_weights, (weights * smoothed).T, strict=True)
    )
    optimizer.zero_grad()
    (loss + (objective.distil(images, exits) if objective.distil else 0)).backward()
    optimizer.step()
    exits = model(judge[0])
    return judgement(exits, judge[1], assign_exits(confidence_table(exits), objective.proportions))


def check_slope(objective, model, images, targets):
    """The weight net's gradient against the judgement's difference along it; for the first half of a
    batch."""
    half = (len(images) + 1) // 2
    parts = (images[:half], targets[:half]), (images[half:], targets[half:])
    before = copy.deepcopy((objective, model))
    pair = next(objective(model, images, targets))
    gradient, (objective, model) = gradients_of(objective), before
    h, values = 1e-5, []
    length = sum(g.square().sum() for g in gradient).sqrt()
    for sign in (1, -1):
        moved = copy.deepcopy(objective.weight_net)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradient, strict=True):
                p += sign * h * g / length
        values.append(judged(objective, model, *parts, moved))
    assert (values[0] - values[1]).item() / (2 * h) == pytest.approx(length.item(), rel=1e-4)
    return pair


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_is_the_slope_of_the_judgement_after_a_real_step(options, forward_mode):
    network = toy().train()
    objective = weighting(network, forward_mode=forward_mode, **options)
    train(objective, network, [batch(9)])  # so that there is momentum
    check_slope(objective, network, *batch(9, seed=3))


@pytest.mark.parametrize("options", SGDS.values(), ids=SGDS)
@pytest.mark.parametrize("steps", [0, 1])
def test_the_look_ahead_knows_every_kind_of_sgd(options, steps):
    network = toy().train()
    objective = weighting(network, update=sgd(network, **options)(network))
    train(objective, network, steps * [batch(8)])
    check_slope(objective, network, *batch(9, seed=3))


def test_the_gradient_with_gradient_equilibrium_is_the_slope_too():
    network = toy().train()
    model = Equilibrium(network)
    objective = weighting(network)
    train(objective, model, [batch(8)])
    check_slope(objective, model, *batch(9, seed=3))


def first_half(network, forward_mode, images, targets, wrap=lambda network: network, **options):
    """The weight net's gradient from the first half of a batch, and the loss."""
    network = copy.deepcopy(network).train()
    objective = weighting(network, forward_mode=forward_mode, **options)
    loss, _ = next(objective(wrap(network), images, targets))
    return gradients_of(objective), loss.item()


@pytest.mark.parametrize(
    ("build", "n", "side", "options"),
    [
        (small_msdnet, 9, 32, OPTIONS["plain"]),
        (small_msdnet, 9, 32, OPTIONS["everything"] | {"exit_weights": [0.5, 2.0]}),
        (partial(small_msdnet, "boosted/msdnet"), 9, 32, OPTIONS["plain"]),
        # Maps that tokens read through one convolution; all the attention.
        (small_perceiver, 7, 56, OPTIONS["everything"] | {"exit_weights": [0.5, 0.25, 1.0, 2.0]}),
    ],
    ids=["msdnet", "msdnet, everything", "boosted", "perceiver, everything"],
)
def test_forward_mode_and_second_order_agree(build, n, side, options):
    network, images = build(), batch(n, side)
    (forward, loss), (second, same) = (
        first_half(network, mode, *images, **options) for mode in (None, False)
    )
    assert loss == pytest.approx(same, rel=1e-9)
    assert max(g.abs().max() for g in forward) > 1e-4
    assert_close(forward, second, rtol=1e-6, atol=1e-9)


def test_forward_mode_and_second_order_agree_with_gradient_equilibrium():
    network, images = small_msdnet(), batch(9, 32)
    forward, second = (first_half(network, mode, *images, wrap=Equilibrium)[0] for mode in (None, False))
    assert_close(forward, second, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(forward[0], first_half(network, None, *images)[0][0], rtol=0.01, atol=0)


def test_random_draws_of_the_pass_are_those_of_its_derivative():
    network, images = toy(dropout=0.5), batch(9)
    found = []
    for forward_mode in (None, False):
        torch.manual_seed(5)
        found.append(first_half(network, forward_mode, *images, seed=2))
    assert_close(*found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("forward_mode", [True, False])
def test_the_scale_of_losses_in_half_precision_cancels(forward_mode):
    network, images = toy(), batch(9)
    exact = first_half(network, forward_mode, *images)
    network = network.train()
    objective = weighting(network, update=sgd(network)(network, fp16=True), forward_mode=forward_mode)
    assert objective.update.scaler.get_scale() == 2**16
    loss, _ = next(objective(network, *images))
    assert_close([gradients_of(objective), loss.item()], list(exact), rtol=1e-9, atol=1e-12)


def test_an_overflow_leaves_the_weight_net_as_it_is():
    network = toy().float().train()
    objective = weighting(network, update=sgd(network)(network, fp16=True))
    objective.update.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    images, targets = batch(9)
    before = values_of(objective.weight_net)
    next(objective(network, images.float() * 100, targets))
    assert not all(g.isfinite().all() for g in gradients_of(objective))
    assert all_equal(values_of(objective.weight_net), before)


def test_mixed_precision_is_near():
    network, (images, targets) = small_msdnet().float(), batch(32, 32)
    exact, loss = first_half(network, None, images.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        half, near = first_half(network, None, images.float(), targets)
    assert loss != near == pytest.approx(loss, rel=0.02) and all(g.dtype == torch.float32 for g in half)
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (exact, half)]
    assert F.cosine_similarity(*flat, dim=0) > 0.9


# A step of training


def test_a_batch_is_cut_in_two_the_larger_half_first():
    network = toy().train()
    objective = weighting(network)
    images, targets = batch(7)
    exits = []
    for loss, logits in objective(network, images, targets):
        exits.append([len(y) for y in logits])
        objective.update(loss)
    assert exits == [[4] * 3, [3] * 3] and objective.update.step == 2
    assert objective.take_tables()["losses"].shape == (7, 3) and objective.batch == 1


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_that_cannot_be_cut_is_refused(n):
    network = toy().train()
    with pytest.raises(ValueError, match=f"a batch of {n} cannot be cut into two halves .*; 4 or more can"):
        next(weighting(network)(network, *batch(n)))
    assert len(list(weighting(network)(network, *batch(4)))) == 2


def test_losses_are_those_of_the_weights_learned_last():
    network = toy().train()
    teach = self_distillation(0.5, 2.0)
    objective = weighting(network, exit_weights=[0.5, 1.0, 2.0], smoothing=0.2, distil=teach)
    images, targets = batch(8)
    first = weighting(network).weight_net  # before it learned
    losses, expected = [], []
    for part, (loss, exits) in zip(
        (slice(0, 4), slice(4, 8)), objective(network, images, targets), strict=True
    ):
        losses.append(loss.detach())
        plain, smoothed = (loss_table([y.detach() for y in exits], targets[part], s) for s in (0.0, 0.2))
        weights = sample_weights(objective.weight_net(plain), 0.8, "col").detach()
        assert not torch.allclose(weights, sample_weights(first(plain), 0.8, "col"), rtol=1e-4)
        by_exit = (weights * smoothed).sum(0) / 4
        expected.append(by_exit @ torch.tensor([0.5, 1.0, 2.0]).double() + teach(None, exits).detach())
        tables = {name: parts[-1] for name, parts in objective.tables.items()}
        wanted = {"weights": weights, "losses": plain, "confidence": confidence_table(exits)}
        assert_close(tables, {name: table.float() for name, table in wanted.items()})
        objective.update(loss)
    assert_close(losses, expected)


@pytest.mark.parametrize("forward_mode", [True, False])
def test_the_weight_nets_step_leaves_no_trace_in_the_classifier(forward_mode):
    network, (images, targets) = toy().train(), batch(8)
    plain = copy.deepcopy(network)
    objective = weighting(network, forward_mode=forward_mode)
    loss, exits = next(objective(network, images, targets))
    twins = plain(images[:4])
    assert all_equal([y.detach() for y in exits], [y.detach() for y in twins])
    assert all_equal(values_of(network), values_of(plain))  # batch-norm statistics moved once
    assert all(p.grad is None for p in network.parameters()) and not objective.update.optimizer.state
    weights = objective.tables["weights"][0].double()
    (weights * loss_table(twins, targets[:4])).mean(0).sum().backward()
    loss.backward()
    assert_close(
        [p.grad for p in network.parameters()], [p.grad for p in plain.parameters()], rtol=1e-6, atol=1e-8
    )


def test_the_weight_net_learns_on_every_so_many_batches_of_an_epoch():
    network = toy().train()
    objective = weighting(network, batches=3, meta_interval=2)
    learned = []
    for i in range(6):
        before = values_of(objective.weight_net)
        train(objective, network, [batch(8, seed=i)])
        learned.append(not all_equal(values_of(objective.weight_net), before))
    assert learned == [True, False, True] * 2
    assert objective.meters.counts["meta_loss"] == 8 and len(objective.take_tables()["weights"]) == 48


def test_its_rate_falls_to_zero_by_the_batch():
    network = toy().train()
    objective = weighting(network, batches=2, meta_lr=0.5)
    rates = []
    for i in range(4):
        pairs = objective(network, *batch(8, seed=i))
        for pair in pairs:
            train_on(objective, pair)
            rates.append(objective.optimizer.param_groups[0]["lr"])
    falling = [0.5, 0.25 + 0.25 * 2**-0.5, 0.25, 0.25 - 0.25 * 2**-0.5]
    assert rates == pytest.approx([rate for rate in falling for _ in range(2)])  # the same for both halves
    assert objective.take_figures(CPU)["meta_lr"] == pytest.approx(0)


def test_figures_count_negative_weights_and_start_anew():
    network = toy().train()
    objective = weighting(network, meta_lr=0.0)
    with torch.no_grad():
        objective.weight_net.output_layer.weight.zero_()
        objective.weight_net.output_layer.bias.copy_(torch.tensor([10.0, 10.0, -10.0]))
    train(objective, network, [batch(8)])
    figures = objective.take_figures(CPU)
    assert figures["negative_weights"] == pytest.approx(1 / 3) and figures["meta_loss"] > 0
    assert objective.take_tables()["weights"].lt(0).sum(0).tolist() == [0, 0, 8]
    assert objective.take_figures(CPU).keys() == {"meta_lr"} and objective.take_tables() == {}


def test_halves_may_be_micro_batches_of_one_step():
    network, (images, targets) = toy().train(), batch(8)
    plain = copy.deepcopy(network)
    objective = weighting(network, update=sgd(network)(network, micro_batches=lambda step: 2), meta_lr=0.0)
    optimizer = torch.optim.SGD(plain.parameters(), LR, weight_decay=0.01)
    for part in (slice(0, 4), slice(4, 8)):  # both at the weights that the batch found
        losses = loss_table(plain(images[part]), targets[part])
        weights = sample_weights(objective.weight_net(losses.detach()), 0.8, "col").detach()
        ((weights * losses).mean(0).sum() / 2).backward()
    optimizer.step()
    train(objective, network, [(images, targets)])
    assert objective.update.step == 1
    assert_close(dict(network.state_dict()), dict(plain.state_dict()))


def test_a_resumed_objective_equals_an_unbroken_one(tmp_path):
    def begun(seed):
        network = toy(seed)
        return network, weighting(network, batches=2, seed=seed)

    images = [batch(8, seed=seed) for seed in range(4)]
    (whole, objective), (parts, later) = begun(0), begun(1)
    assert not all_equal(values_of(later.weight_net), values_of(objective.weight_net))
    train(objective, whole, images[:2])
    states = [part.state_dict() for part in (objective, whole, *objective.update.parts.values())]
    torch.save(states, tmp_path / "x.pth")
    states = torch.load(tmp_path / "x.pth", weights_only=True)
    for part, state in zip((later, parts, *later.update.parts.values()), states, strict=True):
        part.load_state_dict(state)
    later.update.start(objective.update.step)
    assert train(objective, whole, images[2:]) == train(later, parts, images[2:])
    for these, those in ((whole, parts), (objective.weight_net, later.weight_net)):
        assert all_equal(values_of(these), values_of(those))
    assert later.batch == 4
    assert_close(later.state_dict(), objective.state_dict(), rtol=0, atol=0)


def test_a_resumed_weight_net_has_the_decay_of_its_own_run():
    network = toy()
    state = weighting(network, meta_weight_decay=0.3).state_dict()
    objective = weighting(network, meta_weight_decay=0.1)
    objective.load_state_dict(state)
    assert [group["weight_decay"] for group in objective.optimizer.param_groups] == [0.1]


# The way that the gradient is found


def test_a_network_without_forward_mode_learns_from_second_order(capsys):
    images, found = [batch(8, seed=seed) for seed in range(2)], []
    for forward_mode in (None, False):
        network = toy(square=Square.apply)
        objective = weighting(network, forward_mode=forward_mode)
        found.append((train(objective, network, images), gradients_of(objective)))
        assert objective.forward_mode is False
    assert_close(*found, rtol=1e-12, atol=1e-14)
    (line,) = capsys.readouterr().out.splitlines()  # from the first, and once
    assert (
        line.startswith("weights are learned from a second-order graph, which is slower: ") and "jvp" in line
    )


def test_the_way_is_found_without_a_trace(capsys):
    found = []
    for forward_mode in (None, True):
        network = toy(dropout=0.5)
        objective = weighting(network, forward_mode=forward_mode)
        found.append(
            (train(objective, network, [batch(8)]), values_of(network), values_of(objective.weight_net))
        )
        assert objective.forward_mode is True
    assert_close(*found, rtol=0, atol=0)
    assert capsys.readouterr().out == ""


# Two processes


def worker(folder):
    """Two batches of eight per process, then two steps of the heads alone; writes what the process ends
    with."""
    rank = int(os.environ["RANK"])
    mine = [batch(8, seed=10 * rank + i) for i in range(2)]
    results = {"apart": first_half(toy(), None, *mine[0])[0]}  # this process's part of the first gradient
    dist.init_process_group("gloo")
    network = toy(seed=rank)  # the first process's weights count
    objective = weighting(network, batches=2)
    objective.update.attach(model := DistributedDataParallel(network))
    for i, pair in enumerate(objective(model.train(), *mine[0])):
        if i == 0:
            results["together"] = gradients_of(objective)
        train_on(objective, pair)
    train(objective, model, mine[1:])
    results |= {"weights": [p.detach().clone() for p in network.parameters()]}
    results |= {"weight_net": values_of(objective.weight_net), "tables": objective.take_tables()}
    results |= {"figures": objective.take_figures(Compute(torch.device("cpu"), rank=rank, world_size=2))}

    objective.update.attach(heads := DistributedDataParallel(HeadsOnly(network, (3, 6, 6))))
    for images, targets in mine:
        objective.update(loss_table(heads.train()(images), targets).mean())
    torch.save(results | {"heads": values_of(network), "steps": objective.update.step}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def both(in_processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_processes(2, worker, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_have_one_weight_net_that_learns_from_both(both):
    first, second = both
    assert_close(
        first["together"], [(a + b) / 2 for a, b in zip(first["apart"], second["apart"], strict=True)]
    )
    assert not torch.allclose(first["apart"][0], second["apart"][0], rtol=0.1)
    for what in ("together", "weight_net", "weights"):
        assert all_equal(first[what], second[what])
    assert first["figures"] == second["figures"] and first["steps"] == second["steps"] == 4 + 2
    shares = [process["tables"]["weights"].lt(0).double().mean().item() for process in both]
    assert first["figures"]["negative_weights"] == pytest.approx(sum(shares) / 2)


def test_two_processes_go_on_with_the_heads_alone(both):
    names = list(toy().state_dict())
    for name, weight, other in zip(names, *(process["heads"] for process in both), strict=True):
        if "running" not in name:  # every process has statistics of its own images
            assert torch.equal(weight, other), name
    trained = dict(zip([name for name, _ in toy().named_parameters()], both[0]["weights"], strict=True))
    after = dict(zip(names, both[0]["heads"], strict=True))
    for name, weight in trained.items():
        assert torch.equal(weight, after[name]) == (not name.startswith("heads")), name


def test_compiled_code_is_gone_around_where_the_weight_net_learns(monkeypatch):
    network, stances, set_stance = toy(), [], torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda one: stances.append(one) or set_stance(one))
    objective = weighting(network, meta_interval=2)
    for _ in range(3):
        for loss, _ in objective(network, *batch(8)):
            objective.update(loss)
    assert stances == ["force_eager"] * 2 + ["default"] * 2 + ["force_eager"] * 2
