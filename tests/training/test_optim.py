import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import create_model
from training import optim
from training.optim import Optimization, Update, make_optimizer, param_groups

SGD = Optimization(opt="sgd", lr=0.1, weight_decay=0.05, opt_eps=None)


def state_of(update):
    """What a checkpoint holds of an update."""
    return {name: part.state_dict() for name, part in update.parts.items()} | {"step": update.step}


def go_on(update, state):
    """Continues an update where another was left."""
    for name, part in update.parts.items():
        if state.get(name):
            part.load_state_dict(state[name])
    update.start(state["step"])


def make_update(model, opt="sgd", lr=0.1, **options):
    optimizer = make_optimizer(model, replace(SGD, opt=opt))
    return Update(
        model, optimizer, lr=lambda step: lr / (step + 1), weight_decay=lambda step: 0.01 * step, **options
    )


def squared_error(model, inputs):
    return model(inputs).pow(2).mean()


def toy():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 2))
    net.table = nn.Parameter(torch.zeros(2, 2))
    return net


def test_param_groups_come_in_order_of_first_occurrence():
    net = toy()
    names = {param: name for name, param in net.named_parameters()}
    decay, no_decay = param_groups(net, 0.05, True)
    assert [names[p] for p in decay["params"]] == ["table", "1.weight", "2.weight"]
    assert [names[p] for p in no_decay["params"]] == ["0.weight", "0.bias", "1.bias", "2.bias"]
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)

    first, second = param_groups(net[:2], 0.05, True)  # begins with a batch norm
    assert (first["weight_decay"], second["weight_decay"]) == (0.0, 0.05)


def test_embeddings_are_spared_unless_asked_for():
    net = create_model("reg400m_perceiver_t32", num_classes=3)
    names = {param: name for name, param in net.named_parameters()}
    embeddings = {
        "latent",
        *(f"cross_att{i}_x2z.cross_attn.attention.relative_position_bias" for i in (1, 2, 3, 4)),
    }
    for decay_embeddings in (False, True):
        no_decay, decay = sorted(
            param_groups(net, 0.05, True, decay_embeddings), key=lambda g: g["weight_decay"]
        )
        decayed = {names[p] for p in decay["params"]}
        assert decayed & embeddings == (embeddings if decay_embeddings else set())
        assert all(p.ndim > 1 for p in decay["params"]) and len(decayed) > 200
        assert decayed | {names[p] for p in no_decay["params"]} == set(names.values())


def test_param_groups_skip_frozen_parameters_and_may_decay_everything():
    net = toy()
    net[1].weight.requires_grad_(False)
    (group,) = param_groups(net, 0.05, False)
    assert len(group["params"]) == 6
    assert group["weight_decay"] == 0.05


def test_bias_of_two_dimensions_is_not_decayed():
    net = nn.Module()
    net.bias, net.deep = nn.Parameter(torch.zeros(2, 2)), nn.Module()
    net.deep.bias = nn.Parameter(torch.zeros(2, 2))
    assert [group["weight_decay"] for group in param_groups(net.deep, 0.05, True)] == [
        0.05
    ]  # named "bias", no dot
    assert [group["weight_decay"] for group in param_groups(net, 0.05, True)] == [0.05, 0.0]


@pytest.mark.parametrize(("opt", "second_step"), [("sgd", 1.9), ("nesterov", 2.71), ("momentum", 1.9)])
def test_sgd_is_plain_momentum_and_nesterov_is_nesterov(opt, second_step):
    net = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(net, replace(SGD, opt=opt, lr=1.0, weight_decay=0.0))
    for _ in range(2):
        before = net.weight.item()
        net.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert before - net.weight.item() == pytest.approx(second_step)  # buffer 1.9; Nesterov 1 + 0.9 * 1.9


def test_optimizer_options_reach_timm():
    optimizer = make_optimizer(toy(), replace(SGD, opt="lookahead_AdamW", opt_eps=1e-6, opt_betas=(0.8, 0.9)))
    assert type(optimizer).__name__ == "Lookahead"
    assert (optimizer.defaults["eps"], optimizer.defaults["betas"]) == (1e-6, (0.8, 0.9))


@pytest.mark.parametrize("opt", ["adamv", "foo_sgd", "lookahead_adamv"])
def test_unknown_optimizer_is_refused_with_close_names(opt):
    with pytest.raises(ValueError, match=f"{opt}.*(adam|sgd)"):
        make_optimizer(toy(), replace(SGD, opt=opt))


def test_fused_optimizer_without_cuda_is_one_clear_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="fusedadam.*CUDA"):
        make_optimizer(toy(), replace(SGD, opt="fusedadam"))


def test_accumulation_equals_one_big_batch():
    inputs = torch.randn(6, 4)
    whole, parts = nn.Linear(4, 3), nn.Linear(4, 3)
    parts.load_state_dict(whole.state_dict())
    update_whole, update_parts = (
        make_update(whole, clip_grad=0.1),
        make_update(parts, clip_grad=0.1, micro_batches=lambda step: 3),
    )
    for _ in range(2):
        update_whole(squared_error(whole, inputs))
        for chunk in inputs.chunk(3):
            update_parts(squared_error(parts, chunk))
    assert update_parts.step == update_whole.step == 2
    torch.testing.assert_close(parts.weight, whole.weight)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches():
    """Steps of 4 and 2 micro-batches: each is one of their mean loss, at the rates of its number."""
    optimization = replace(SGD, epochs=2, warmup_epochs=0, min_lr=0.0)
    torch.manual_seed(0)
    inputs = torch.randn(2, 6, 5, 4)
    whole, parts = nn.Linear(4, 3), nn.Linear(4, 3)
    parts.load_state_dict(whole.state_dict())
    once = optim.make_update(whole, optimization, steps=2)
    update = optim.make_update(parts, replace(optimization, update_freq=4), steps=2, rest=2)
    for epoch in inputs:
        for group in (epoch[:4], epoch[4:]):
            once(torch.stack([squared_error(whole, chunk) for chunk in group]).mean())
        for chunk in epoch:
            update(squared_error(parts, chunk))
        assert update.step == once.step and update.figures() == once.figures()
        torch.testing.assert_close(parts.weight, whole.weight)
    assert update.step == 4 and update.figures()["opt/lr"] == 0


def test_warm_up_may_take_a_fraction_of_epochs():
    options = replace(SGD, epochs=4, warmup_epochs=0.5, min_lr=0.0, schedule="linear")
    update = optim.make_update(toy(), options, steps=8)
    triangle = [*(0.1 * i / 3 for i in range(4)), *(0.1 * (1 - i / 27) for i in range(28))]
    assert [update.lr(step) for step in range(32)] == pytest.approx(triangle)


def test_start_drops_a_half_done_step():
    model, inputs = nn.Linear(4, 3), torch.randn(2, 4)
    once = copy.deepcopy(model)
    update = make_update(model, micro_batches=lambda step: 2)
    update(squared_error(model, inputs))
    update.start(0)
    for _ in range(2):
        update(squared_error(model, inputs))
    make_update(once)(squared_error(once, inputs))
    torch.testing.assert_close(model.weight, once.weight)


@pytest.mark.parametrize("fp16", [False, True])
def test_clipping_works_with_and_without_loss_scaling(fp16):
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    update = make_update(model, clip_grad=1.0, fp16=fp16)
    update(model(torch.tensor([[30.0, 40.0]])).sum())
    assert update.grad_norm.item() == pytest.approx(50.0)
    torch.testing.assert_close(model.weight, torch.tensor([[-0.06, -0.08]]))  # lr 0.1, gradient (0.6, 0.8)


def test_rates_are_set_for_the_next_step_and_scaled_by_group():
    net = toy()
    optimizer = make_optimizer(net, replace(SGD, opt="adamw"))
    optimizer.param_groups[1]["lr_scale"] = 0.5
    update = Update(
        net, optimizer, lr=lambda step: [0.3, 0.2][step], weight_decay=lambda step: [0.0, 0.4][step]
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.15]
    update(squared_error(net, torch.randn(3, 4)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.0]


def test_ema_follows_every_optimizer_step():
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    ema = ModelEmaV3(model, decay=0.75)
    update = make_update(model, ema=ema, micro_batches=lambda step: 2)
    for _ in range(2):
        update(squared_error(model, torch.randn(5, 2)))
    torch.testing.assert_close(ema.module.weight, 0.75 * before + 0.25 * model.weight)


@pytest.mark.parametrize(
    ("opt", "fp16"), [("sgd", False), ("adamw", True), ("lookahead_adamw", False), ("muon", False)]
)
def test_resumed_update_equals_an_uninterrupted_one(opt, fp16):
    torch.manual_seed(0)
    batches = torch.randn(8, 5, 4)
    model = nn.Linear(4, 3)
    update = make_update(model, opt, fp16=fp16, ema=ModelEmaV3(model, decay=0.9))
    for inputs in batches[:4]:
        update(squared_error(model, inputs))
    state, weights = copy.deepcopy(state_of(update)), copy.deepcopy(model.state_dict())
    assert state["step"] == 4

    resumed = nn.Linear(4, 3)
    resumed.load_state_dict(weights)
    resumed_update = make_update(resumed, opt, fp16=fp16, ema=ModelEmaV3(resumed, decay=0.9))
    go_on(resumed_update, state)
    for inputs in batches[4:]:
        update(squared_error(model, inputs))
        resumed_update(squared_error(resumed, inputs))
    assert torch.equal(model.weight, resumed.weight)
    assert torch.equal(update.ema.module.weight, resumed_update.ema.module.weight)


def test_the_weight_decay_shown_is_that_of_the_groups_that_have_it():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))  # the first group is without
    optimizer = torch.optim.SGD(param_groups(net, 0.05, True), lr=0.1)
    update = Update(net, optimizer, lr=lambda step: 0.1, weight_decay=lambda step: 0.05)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert update.figures() == {"opt/lr": 0.1, "opt/weight_decay": 0.05}


def test_a_warm_ema_forgets_the_first_steps():
    model = nn.Linear(3, 2)
    ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
    update = make_update(model, ema=ema)
    seen = []
    for _ in range(3):
        update(model(torch.ones(1, 3)).sum())
        seen.append(model.weight.detach().clone())
    average = seen[0]
    for step, weight in enumerate(seen[1:], 1):
        decay = 1 - (1 + step) ** (-2 / 3)
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(ema.module.weight, average)


def test_loaded_groups_do_not_change_what_is_decayed():
    net = toy()
    state = state_of(make_update(net, "adamw"))
    for group in state["optimizer"]["param_groups"]:  # as in a published checkpoint
        del group["wd_scale"]
    update = make_update(toy(), "adamw")
    go_on(update, state | {"step": 3})
    assert [group["weight_decay"] for group in update.optimizer.param_groups] == [0.03, 0.0]


def test_muon_steps_convolutions_and_leaves_the_rest_to_adamw():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 5))
    update = optim.make_update(net, replace(SGD, opt="muon", warmup_epochs=0), steps=4)
    before = [p.detach().clone() for p in net.parameters()]
    update(squared_error(net, torch.randn(6, 3, 3, 3)))
    assert not any(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))
    state = update.optimizer.state
    stepped = {name for name, p in net.named_parameters() if "momentum_buffer" in state[p]}
    assert stepped == {"0.weight", "3.weight"}  # and not the last layer, though it is a matrix too


def test_muon_orthogonalizes_in_fp32_where_bf16_is_slow(monkeypatch):
    torch.manual_seed(0)
    start, inputs, steps = nn.Conv2d(3, 8, 3), torch.randn(6, 3, 3, 3), []
    for fast, kind in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(optim, "has_bf16", lambda kind, fast=fast: fast)
        net = copy.deepcopy(start)
        update = make_update(net, "muon")
        assert optim.muon.zeropower_via_newtonschulz(torch.eye(4), 1, [(2.0, -1.5, 0.5)]).dtype is kind
        update(squared_error(net, inputs))
        steps.append(net.weight.detach() - start.weight.detach())
    apart = (steps[0] - steps[1]).norm() / steps[1].norm()
    assert 0 < apart < 0.3, apart  # bf16 rounds what the iteration then magnifies


def test_second_order_optimizer_steps():
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    with pytest.warns(UserWarning, match="create_graph"):
        make_update(model, "adahessian")(squared_error(model, torch.randn(5, 4)))
    assert not torch.equal(model.weight, before)


def test_distributed_gradients_are_reduced_once_per_optimizer_step(tmp_path):
    inputs = torch.randn(3, 2, 4)
    model = nn.Linear(4, 3)
    alone = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        reductions = []

        def count(_, bucket):
            reductions.append(bucket.buffer().clone())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, count)
        update = make_update(wrapped, micro_batches=lambda step: (4, 2, 3)[step], ema=ModelEmaV3(model))
        update_alone = make_update(alone, micro_batches=lambda step: (4, 2, 3)[step])
        for chunk in [*inputs, *inputs]:
            update(squared_error(wrapped, chunk))
            update_alone(squared_error(alone, chunk))
    finally:
        dist.destroy_process_group()
    assert len(reductions) == 2
    torch.testing.assert_close(model.weight, alone.weight)


def test_a_second_forward_under_the_same_autocast_sees_the_step():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update = Update(model, optimizer, lr=lambda step: 1.0, weight_decay=lambda step: 0.0)
    inputs = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(inputs)
        update(before.sum())
        after = model(inputs)
    torch.testing.assert_close(after, before - 2)


def test_the_gradient_norm_is_measured_now_and_then_without_a_trace_in_the_weights():
    measured = [step for step in range(14) if optim.measured_at(step, every=3, steps=7)]
    assert measured == [2, 5, 6, 9, 12, 13]
    assert not any(optim.measured_at(step, every=0, steps=7) for step in range(14))
    torch.manual_seed(0)
    images, weights = torch.randn(4, 5, 3), {}
    start = nn.Linear(3, 2)
    for every in (0, 2):
        net = copy.deepcopy(start)
        update = optim.make_update(net, replace(SGD, warmup_epochs=0), steps=4, measure_every=every)
        for step, batch in enumerate(images):
            loss = net(batch).square().sum()
            norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())]).norm()
            update(net(batch).square().sum())
            figures = update.figures()
            if every and step % 2:
                assert figures["opt/grad_norm"] == pytest.approx(norm.item())
            assert ("opt/grad_norm" in figures) == (every > 0 and step > 0)
        weights[every] = net.weight
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], start.weight)


def test_spellings_of_optimizers():
    kinds = {
        opt: type(make_optimizer(nn.Linear(3, 2), replace(SGD, opt=opt))).__name__
        for opt in ("sgd", "nvnovograd")
    }
    assert kinds == {"sgd": "SGD", "nvnovograd": "NvNovoGrad"}


def test_a_second_order_optimizer_trains_attention():
    enabled = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    net = create_model("reg400m_perceiver_t32", num_classes=2)
    try:
        optimizer = make_optimizer(net, replace(SGD, opt="adahessian", weight_decay=0.0))
        update = Update(net, optimizer, lr=lambda step: 0.1, weight_decay=lambda step: 0.0)
        update(sum(logits.square().mean() for logits in net(torch.randn(2, 3, 32, 32))))
    finally:
        torch.backends.cuda.enable_flash_sdp(enabled[0])
        torch.backends.cuda.enable_mem_efficient_sdp(enabled[1])
    assert update.step == 1


def test_parts_learn_at_rates_of_their_own():
    net = nn.ModuleDict({"stem": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups = param_groups(net, 0.1, True, lr_scales=["stem.bias=0", "stem=0.1"])
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    parts = [p for name in ("stem", "head") for p in (net[name].weight, net[name].bias)]
    assert [found[id(p)] for p in parts] == [
        (0.1, 0.1),
        (0, 0),
        (1, 0.1),
        (1, 0),
    ]
