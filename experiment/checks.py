"""Combinations of flags that no single flag's limits catch, each rejected with one line."""

from dataclasses import fields

from experiment.recipe import Recipe
from utils import UserError


def check(recipe: Recipe) -> None:
    """Raises ValueError for a recipe that cannot be trained."""
    for entry in fields(recipe.unsupported):
        value = getattr(recipe.unsupported, entry.name)
        if value != entry.default:
            raise UserError(f"--{entry.name} {value} is not supported: {entry.metadata['about']}")
    if not recipe.network.model:
        raise UserError("name a network: --model NAME")
    _check_numbers(recipe)
    _check_objective(recipe)
    _check_device_data(recipe)
    if recipe.session.enable_wandb and not recipe.session.log_dir:
        raise UserError("--enable_wandb mirrors TensorBoard: give --log_dir")
    if recipe.weighting.l2w:
        _check_l2w(recipe)


def _check_numbers(recipe: Recipe) -> None:
    o, batch_size = recipe.optimization, recipe.runtime.batch_size
    if o.opt_betas and len(o.opt_betas) != 2:
        raise UserError(f"--opt_betas {list(o.opt_betas)}: give two numbers")
    if batch_size < 2:
        raise UserError("--batch_size 1: batch norm needs 2 images or more to train on")
    if o.schedule == "multistep" and not o.decay_epochs:
        raise UserError("--schedule multistep needs --decay_epochs")
    if list(o.decay_epochs) != sorted(set(o.decay_epochs)):
        raise UserError(f"--decay_epochs {list(o.decay_epochs)}: give them in ascending order, each once")
    if recipe.mixing.on and batch_size % 2:
        raise UserError(f"--batch_size {batch_size}: mixup and cutmix need an even number")


def _check_device_data(recipe: Recipe) -> None:
    transform = recipe.transform
    if transform.device_data and (transform.aa not in ("", "none") or transform.color_jitter):
        asked = f"--aa {transform.aa} --color_jitter {transform.color_jitter:g}"
        raise UserError(f"--device_data true: {asked} work image by image; give --aa none --color_jitter 0")
    if transform.flip != "random" and not transform.device_data:
        raise UserError(f"--flip {transform.flip} needs --device_data true")


def _check_objective(recipe: Recipe) -> None:
    objective, l2w = recipe.objective, recipe.weighting.l2w
    plain = objective.regime == "joint" and not l2w
    if objective.freeze_backbone and not plain:
        raise UserError(
            "--freeze_backbone true trains heads, jointly: not for --l2w true or another --regime"
        )
    if recipe.caching.cache_features:
        _check_cache(recipe)
    if objective.with_kd and objective.kd_teacher:
        raise UserError(
            f"--with_kd true, and --kd_teacher {objective.kd_teacher}: either the last exit teaches "
            "or the teacher; give one of them"
        )
    hinge = objective.energy_hinge
    if hinge and (len(hinge) != 3 or not recipe.data.popular_classes or recipe.mixing.on or l2w):
        raise UserError(
            "--energy_hinge takes three numbers, with --popular_classes, without mixup, cutmix and L2W"
        )


def _check_cache(recipe: Recipe) -> None:
    if not recipe.objective.freeze_backbone:
        raise UserError("--cache_features true needs --freeze_backbone true: other features change")
    if recipe.mixing.on:
        raise UserError("--cache_features true: features are not mixed; give --mixup 0 --cutmix 0")
    if recipe.transform.device_data:
        raise UserError("--cache_features true reads no images in training; give --device_data false")
    if recipe.low_start.low_size:
        raise UserError("--cache_features true: features have one size; give no --low_size")
    if recipe.objective.kd_teacher:
        raise UserError("--cache_features true: a teacher reads images; give no --kd_teacher")


def _check_l2w(recipe: Recipe) -> None:
    batch_size, opt, regime = recipe.runtime.batch_size, recipe.optimization.opt, recipe.objective.regime
    if recipe.mixing.on:
        raise UserError("--l2w true weighs samples of one class each: give --mixup 0 --cutmix 0")
    if batch_size < 4:
        raise UserError(f"--batch_size {batch_size}: L2W trains on halves of a batch and needs at least 4")
    if regime in ("disjoint", "mixed"):
        raise UserError(f"--regime {regime}: L2W weighs all exits at once; accepted: joint, equilibrium")
    if opt.lower().startswith("lookahead_"):
        raise UserError(
            f"--opt {opt}: L2W looks one step of SGD ahead and cannot read this optimizer's state"
        )
