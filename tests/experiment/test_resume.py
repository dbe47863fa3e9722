import argparse
import copy
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from experiment.checkpoint import load, save
from experiment.published import understood
from experiment.recipe import Recipe
from experiment.resume import Pace, check_same_run, checkpoint_of, resume, with_global_batch
from experiment.run import Run, Saving
from models import MultiExitModel, create_model
from models.errors import UserError
from training.l2w import SampleWeighting, Weighting
from training.losses import Losses
from training.optim import Optimization, Update, make_optimizer

PERCEIVER = "mobilenetV3_0x5_perceiver_t128"
ARCH = {"name": "x", "options": {}, "num_classes": 2}


class Linear(MultiExitModel):
    """A linear layer as a network with one exit."""

    num_exits = 1

    def __init__(self, n_in=3, n_out=2):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def begin(self, images):
        return images

    def trunk(self, k, state):
        return state, None

    def head(self, k, features):
        return self.linear(features)


def make_update(model, **options):
    optimization = Optimization(opt="adamw", lr=0.1, weight_decay=0.3, **options)
    rates = {"lr": lambda step: 0.1, "weight_decay": lambda step: 0.3}
    return Update(model, make_optimizer(model, optimization), **rates, ema=ModelEmaV3(model, decay=0.9))


def run_of(update, **parts):
    model = {"model": update.bare_model}
    return Run({**model, **update.parts, **parts}, dict, Saving(None), score=lambda figures: None)


def go_on(update, content, **parts):
    """Resumes a run with this update from a file of this content; what the file lacks, and the first epoch to do."""
    run = run_of(update, **parts)
    content = {"model": update.bare_model.state_dict(), **content}
    missing = resume(run, understood(content, "x.pth"), update.bare_model, update.optimizer, ARCH)
    return missing, run.first


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": "best"}, "its epoch is 'best'"),
        ({"epoch": "best-ema", "optimizer": {}}, "its epoch is 'best-ema'"),
        ({"optimizer": {}}, "it does not hold both epoch and optimizer"),
        ({"epoch": 3}, "it does not hold both epoch and optimizer"),
    ],
)
def test_a_file_to_evaluate_only_is_not_resumed(content, reason):
    line = rf"^checkpoint x.pth can be evaluated or fine-tuned \(--finetune\) but not resumed: {reason}$"
    with pytest.raises(ValueError, match=line):
        go_on(make_update(Linear()), content)


def test_rates_may_change_on_resuming_but_not_the_network():
    flags = {"model": PERCEIVER, "SA_widening_factor": 2, "depth_factor": [1, 1, 1, 2], "with_isc": False}
    args = argparse.Namespace(**flags, input_size=64, drop_path=0.3, dropout=0.0)
    options = {"depth_factor": (1, 1, 1, 2), "SA_widening_factor": 2, "with_isc": False, "input_size": 64}
    arch = {"name": PERCEIVER, "options": options | {"drop_path": 0.0, "dropout": 0.5}, "num_classes": 1000}
    there = create_model(PERCEIVER, **options)
    optimizer = make_optimizer(there, Optimization(decay_embeddings=True))
    content = {"model": there.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": args}
    model = create_model(PERCEIVER, **arch["options"])
    update, stored = make_update(model), understood(content, "x.pth")
    run = run_of(update)
    assert resume(run, stored, model, update.optimizer, arch) == ["scaler", "model_ema"] and run.first == 4
    assert torch.equal(model.latent, there.latent)
    with pytest.raises(ValueError, match="x.pth holds another architecture: with_isc is False, wanted True"):
        other = arch | {"options": options | {"with_isc": True}}
        resume(run, stored, model, update.optimizer, other)


def test_a_published_optimizer_goes_on_as_if_not_interrupted():
    torch.manual_seed(0)
    images = torch.randn(6, 4, 3)
    model = Linear()
    update = make_update(model)
    for batch in images[:4]:
        update(model(batch)[0].square().mean())
    state = copy.deepcopy(update.optimizer.state_dict())
    for group in state["param_groups"]:
        for name in group.keys() - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params", "lr_scale"}:
            del group[name]  # not there in the torch and the script of the time
    content = {"optimizer": state, "scaler": {"scale": 65536.0, "_growth_tracker": 3}, "epoch": 1}

    later = copy.deepcopy(model)
    later_update = make_update(later)
    missing, first = go_on(later_update, content)
    assert missing == ["model_ema"] and first == 2
    later_update.start(4)
    for batch in images[4:]:
        update(model(batch)[0].square().mean())
        later_update(later(batch)[0].square().mean())
    torch.testing.assert_close(later.linear.weight, model.linear.weight)
    torch.testing.assert_close(later.linear.bias, model.linear.bias)

    average = {"linear.weight": torch.ones(2, 3), "linear.bias": torch.ones(2)}
    assert go_on(later_update, content | {"model_ema": average})[0] == []
    assert torch.equal(later_update.ema.module.linear.weight, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (make_update(Linear(), filter_bias_and_bn=False).optimizer.state_dict(), "different number of param"),
        (make_update(nn.Sequential(Linear(), Linear(2))).optimizer.state_dict(), "doesn't match the"),
        ({"state": {}}, "'param_groups'"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_in_one_line(optimizer, reason):
    complaint = f"^optimizer of checkpoint x.pth does not fit this run's: .*{reason}"
    with pytest.raises(ValueError, match=complaint) as error:
        go_on(make_update(Linear()), {"optimizer": optimizer, "epoch": 3})
    assert "\n" not in str(error.value)


def test_epochs_that_are_done_are_counted_as_their_programs_do():
    content = {"optimizer": make_update(Linear()).optimizer.state_dict(), "epoch": 4, "step": 123}
    assert go_on(make_update(Linear()), content)[1] == 5
    # L2W's program counts epochs that are done.
    published = content | {"meta_state_dict": {}, "meta_optimizer": {}}
    assert go_on(make_update(Linear()), published)[1] == 4


def test_a_run_keeps_its_images_its_seed_and_its_optimizer():
    given = {"data_set": "DIGITS", "num_calib": None, "seed": 3, "drop_last": True, "epoch_images": 100}
    given["opt"] = "sgd"
    recipe = Recipe.of(given)
    for args in ({}, {"seed": 3, "lr": 7}, given):  # an old file without the others
        check_same_run(recipe, understood({"args": args}, "x.pth"))
    others = {"data_set": "CIFAR10", "num_calib": 5, "seed": 0, "drop_last": False, "epoch_images": 9}
    others["opt"] = "adamw"
    for name, other in others.items():
        here = given[name] or "default"
        with pytest.raises(ValueError, match=f"^--{name} {here}, but x.pth was trained with {other}$"):
            check_same_run(recipe, understood({"args": given | {name: other}}, "x.pth"))


def pace_of(flags, world_size, content=None):
    """The pace of a run by these flags, which goes on from a file of this content, the file, and the recipe."""
    recipe = Recipe.of({"batch_size": 8, **flags})
    stored = None if content is None else understood(content, "x.pth")
    return Pace.of(recipe, world_size, stored), stored, recipe


def test_a_run_goes_on_with_other_rates_and_processes_and_says_so():
    start, _, recipe = pace_of({"lr": 0.1, "epochs": 2, "update_freq": 2}, 1)
    content = {"args": recipe.flags(), "pace": asdict(start)}
    assert content["pace"] == {"world_size": 1, "images": 16, "at_start": 16}
    same, stored, recipe = pace_of({"lr": 0.1, "epochs": 2, "update_freq": 2}, 1, content)
    assert same == start and same.changes(recipe, stored) == ""
    pace, stored, recipe = pace_of({"lr": 0.2, "epochs": 2, "update_freq": 2}, 4, content)
    assert pace.changes(recipe, stored) == (
        "--lr 0.2 instead of 0.1, 4 processes instead of 1, 64 images per step instead of 16, "
        "--scale_lr true would multiply learning rates by 4"
    )
    assert pace.scaled(recipe.optimization) == recipe.optimization
    pace, stored, recipe = pace_of({"lr": 0.1, "epochs": 2, "update_freq": 1}, 2, content)
    assert pace.changes(recipe, stored) == "--update_freq 1 instead of 2"  # as many images


def test_images_per_step_are_kept_or_the_change_is_refused():
    _, stored, _ = pace_of({}, 2, {"args": {}, "pace": {"world_size": 2, "images": 32, "at_start": 32}})

    def update_freq(flags, world_size, stored=stored):
        recipe = Recipe.of({"batch_size": 8, "update_freq": 2, **flags})
        return with_global_batch(recipe, world_size, stored).optimization.update_freq

    assert [update_freq({}, n) for n in (1, 2, 4)] == [4, 2, 1]
    for world_size in (1, 1, 2, 4):  # however often it is resumed, by the same flags
        recipe = with_global_batch(Recipe.of({"batch_size": 8, "update_freq": 2}), world_size, stored)
        pace = Pace.of(recipe, world_size, stored)
        assert pace == Pace(2, 32, 32)
        stored = understood({"args": recipe.flags(), "pace": asdict(pace)}, "x.pth")
    assert update_freq({"global_batch": 64}, 2) == update_freq({"global_batch": 64}, 2, None) == 4
    assert update_freq({"other_world_size": "accept"}, 4) == update_freq({"scale_lr": True}, 4) == 2
    was = "x.pth was trained by 2 processes, not"
    for flags, world_size, message in (
        ({"other_world_size": "refuse"}, 1, f"--other_world_size refuse: {was} 1"),
        ({}, 3, f"{was} 3: --global_batch 32; accepted: a multiple of 3 processes x --batch_size 8"),
        ({"global_batch": 20}, 2, "--global_batch 20; accepted: a multiple of 2 processes x --batch_size 8"),
        ({"l2w": True}, 1, f"--l2w true: {was} 1; --other_world_size accept trains so, with other halves"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            update_freq(flags, world_size)


def test_a_run_that_was_started_again_goes_on_from_its_own_checkpoint(trained, tmp_path, monkeypatch):
    own = shutil.copy(trained / "checkpoint-last.pth", tmp_path)
    recipe = Recipe.of(torch.load(own, weights_only=True)["args"], {"output_dir": str(tmp_path)})
    given = replace(recipe, start=replace(recipe.start, resume=str(trained / "checkpoint-last.pth")))
    assert checkpoint_of(given, print).source == given.start.resume
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert checkpoint_of(given, print).source == str(own)


def test_scaled_rates_follow_the_images_per_step_since_the_start_however_often_a_run_is_resumed():
    flags = {"lr": 0.1, "min_lr": 0.01, "scale_lr": True}
    start, _, recipe = pace_of(flags, 1)
    assert start.scaled(recipe.optimization) == recipe.optimization
    content = {"args": recipe.flags(), "pace": asdict(start)}
    for world_size in (2, 2, 4, 1):
        pace, stored, recipe = pace_of(flags, world_size, content)
        rates = pace.scaled(recipe.optimization)
        assert (rates.lr, rates.min_lr) == pytest.approx((0.1 * world_size, 0.01 * world_size))
        if content["pace"]["world_size"] != world_size:
            changes = f"true multiplies learning rates by {world_size}"
            assert pace.changes(recipe, stored).endswith(changes)
        content = {"args": recipe.flags(), "pace": asdict(pace)}


def test_old_files_do_not_say_how_many_images_a_step_had():
    pace, stored, recipe = pace_of({"lr": 0.1}, 2, {"args": {"lr": 0.1}})
    assert pace == Pace(2, 16, 16) and pace.changes(recipe, stored) == ""
    with pytest.raises(ValueError, match=r"^--scale_lr true: x.pth does not say how many images a step had$"):
        pace_of({"scale_lr": True}, 2, {"args": {}})


# The weight net


def weighting(seed, num_exits=2):
    """A weight net that has taken a step, on 5 batches an epoch."""
    torch.manual_seed(seed)
    objective = SampleWeighting(
        Weighting(meta_net_hidden_size=3),
        make_update(Linear()),
        Losses([1.0] * num_exits),
        proportions=torch.full((num_exits,), 1 / num_exits),
        batches=5,
        epochs=3,
    )
    for p in objective.weight_net.parameters():
        p.grad = torch.randn_like(p)
    objective.optimizer.step()
    objective.batch = 99
    return objective


def weight_net_of(objective):
    """Its weights, and what its optimizer remembers."""
    return objective.state_dict()["weight_net"], objective.state_dict()["optimizer"]["state"]


def go_on_weighting(objective, content):
    optimizer = objective.update.optimizer.state_dict()
    return go_on(objective.update, {"optimizer": optimizer, "epoch": 1} | content, l2w=objective)[0]


@pytest.mark.parametrize("published", [False, True])
def test_a_weight_net_goes_on(tmp_path, published):
    there, here = weighting(0), weighting(1)
    state = there.state_dict()
    content = {"l2w": state}
    if published:
        content = {"meta_state_dict": state["weight_net"], "meta_optimizer": state["optimizer"]}
    save(tmp_path / "x.pth", content)
    assert "l2w" not in go_on_weighting(here, load(tmp_path / "x.pth"))
    torch.testing.assert_close(weight_net_of(here), weight_net_of(there), rtol=0, atol=0)
    here.start(2)
    assert here.batch == 2 * 5


@pytest.mark.parametrize("content", [{}, {"l2w": None}])
def test_a_weight_net_starts_anew_where_a_file_has_none(content):
    objective = weighting(0)
    before = copy.deepcopy(weight_net_of(objective))
    assert "l2w" in go_on_weighting(objective, content)
    torch.testing.assert_close(weight_net_of(objective), before, rtol=0, atol=0)


def test_a_weight_net_that_does_not_fit_is_refused_in_one_line():
    other, state = weighting(0, num_exits=3).state_dict(), weighting(0).state_dict()
    bare = {"state": {}, "param_groups": []}
    complaints = {
        "size mismatch for output_layer.bias: ": {"l2w": other},
        "'optimizer'": {"meta_state_dict": state["weight_net"]},
        "loaded state dict has a different number of parameter groups": {"l2w": state | {"optimizer": bare}},
    }
    for complaint, content in complaints.items():
        with pytest.raises(
            ValueError, match=f"^l2w of checkpoint x.pth does not fit this run's: .*{complaint}"
        ) as error:
            go_on_weighting(weighting(1), content)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_a_published_optimizer_state_follows_its_weights_into_other_groups(decay_embeddings):
    torch.manual_seed(0)
    model = Linear()
    model.latent, model.embeddings = nn.Parameter(torch.randn(4, 2)), ("latent",)
    old = make_update(model, decay_embeddings=True).optimizer
    (model.linear.weight.sum() + 2 * model.linear.bias.sum() + 3 * model.latent.sum()).backward()
    old.step()
    update = make_update(model, decay_embeddings=decay_embeddings)
    args = argparse.Namespace(model="x")
    go_on(update, {"optimizer": old.state_dict(), "epoch": 0, "args": args})
    new = update.optimizer
    for scale, parameter in ((1, model.linear.weight), (2, model.linear.bias), (3, model.latent)):
        torch.testing.assert_close(new.state[parameter]["exp_avg"], torch.full_like(parameter, 0.1 * scale))
    assert sorted(len(group["params"]) for group in new.param_groups) == [1, 2]
    assert [g["weight_decay"] for g in new.param_groups if any(p is model.latent for p in g["params"])] == [
        0.3 * decay_embeddings
    ]
