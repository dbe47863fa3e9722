"""Resuming from a checkpoint: it must be of the same run, and every part gets its state back."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from datasets import Data
from experiment.checkpoint import latest
from experiment.fit import check_arch
from experiment.open import compared
from experiment.options import plain
from experiment.procedures import OURS, row_of
from experiment.published import Stored, read, regrouped
from experiment.recipe import DEFAULTS, GROUPS, Recipe
from experiment.run import Run
from models import MultiExitModel, spelled_out
from training.optim import Optimization
from utils import UserError

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # how often a launcher began a run anew


def checkpoint_of(recipe: Recipe, say: Callable[[str], None]) -> Stored | None:
    """The checkpoint that a run goes on from, of the same data and optimizer; `say` gets what is amiss.

    A run that torchrun or SLURM starts again goes on from its own, not from `--resume` once more.
    """
    start, folder = recipe.start, recipe.runtime.output_dir
    again = any(os.environ.get(name, "0") != "0" for name in RESTARTS)
    path = (again and folder and start.auto_resume and latest(folder, say)) or start.resume
    path = path or (folder and start.auto_resume and latest(folder, say))
    if not path:
        return None
    stored = read(path)
    check_same_run(recipe, stored)
    return stored


def check_same_run(recipe: Recipe, stored: Stored) -> None:
    """Raises ValueError for a checkpoint that was trained with other images or another optimizer."""
    said, flags = stored.values(Data, Optimization), recipe.flags()
    for name in ("data_set", "num_calib", "drop_last", "epoch_images", "seed", "opt"):
        if name in said and said[name] != flags[name]:
            here, there = ("default" if one is None else one for one in (flags[name], said[name]))
            raise UserError(f"--{name} {here}, but {stored.source} was trained with {there}")


def with_global_batch(recipe: Recipe, world_size: int, stored: Stored | None) -> Recipe:
    """The recipe with as many micro-batches per optimizer step as make its images per step.

    That is `--global_batch`, or what the checkpoint had that is resumed with another number of processes.
    Raises ValueError where it cannot be had, or may not be.
    """
    optimization, choice = recipe.optimization, recipe.start.other_world_size
    wanted, name, batch_size = optimization.global_batch, "--global_batch", recipe.runtime.batch_size
    before = (stored.content.get("pace") if stored else None) or {}
    was = before.get("world_size", world_size)
    if stored and was != world_size and choice != "accept" and not optimization.scale_lr:
        said = f"{stored.source} was trained by {was} processes, not {world_size}"
        if choice == "refuse":
            raise UserError(f"--other_world_size refuse: {said}")
        if recipe.weighting.l2w:
            accept = "--other_world_size accept trains so, with other halves of batches"
            raise UserError(f"--l2w true: {said}; {accept}")
        if wanted is None:
            wanted, name = before["images"], f"{said}: --global_batch"
    if wanted is None:
        return recipe
    if wanted % (world_size * batch_size):
        multiple = f"a multiple of {world_size} processes x --batch_size {batch_size}"
        raise UserError(f"{name} {wanted}; accepted: {multiple}")
    update_freq = wanted // (world_size * batch_size)
    return replace(recipe, optimization=replace(optimization, update_freq=update_freq))


@dataclass(frozen=True)
class Pace:
    """What an optimizer step sees: `images` in all, by the flags read by `world_size` processes.

    `at_start` is the number of images per step with which the run began, for which its `--lr` is meant.
    """

    world_size: int
    images: int
    at_start: int

    @classmethod
    def of(cls, recipe: Recipe, world_size: int, stored: Stored | None) -> "Pace":
        """That of a run that starts or goes on; ValueError if `--scale_lr` lacks something to scale by."""
        images = recipe.runtime.batch_size * recipe.optimization.update_freq * world_size
        before = stored.content.get("pace") if stored else None
        if stored and not before and recipe.optimization.scale_lr:
            raise UserError(f"--scale_lr true: {stored.source} does not say how many images a step had")
        if before and images == before["images"] and recipe.start.other_world_size == "keep":
            world_size = before["world_size"]  # by which the flags, as given, are to be read
        return cls(world_size, images, before["at_start"] if before else images)

    def scaled(self, optimization: Optimization) -> Optimization:
        """With the learning rates of this run: as given, or multiplied as `--scale_lr` says."""
        factor = self.images / self.at_start if optimization.scale_lr else 1.0
        return replace(optimization, lr=optimization.lr * factor, min_lr=optimization.min_lr * factor)

    def changes(self, recipe: Recipe, stored: Stored) -> str:
        """What is other than in the run until now, for its user; "" if nothing is."""
        optimization = plain(recipe.optimization)
        said, before = stored.values(Optimization), stored.content.get("pace") or {}
        found = [
            f"--{name} {optimization[name]} instead of {value}"
            for name, value in said.items()
            if name != "scale_lr" and value != optimization[name]
        ]
        for name, what in (("world_size", "processes"), ("images", "images per step")):
            if before.get(name, value := getattr(self, name)) != value:
                found.append(f"{value} {what} instead of {before[name]}")
        if before.get("images", self.images) != self.images:
            ratio = f"learning rates by {self.images / self.at_start:g}"
            scales = recipe.optimization.scale_lr
            found.append(f"--scale_lr {'true multiplies' if scales else 'true would multiply'} {ratio}")
        return ", ".join(found)


def as_started(recipe: Recipe, stored: Stored) -> Recipe:
    """The recipe by the procedure that a checkpoint of ours was trained by; older files name none: ours."""
    said = stored.flags.get("procedure") or OURS
    row = row_of(recipe)
    if row is None or not stored.flags or stored.published_flags or said == recipe.network.procedure:
        return recipe
    flags = DEFAULTS | stored.values(*GROUPS.values())
    kept = {name: flags[name] for name in row.training}
    return Recipe.of(recipe.flags(), {"procedure": said, **kept}, options=recipe.options)


def resume(
    run: Run, stored: Stored, network: MultiExitModel, optimizer: torch.optim.Optimizer, arch: dict[str, Any]
) -> list[str]:
    """Restores all parts of a run of `network` from a checkpoint; returns the names of missing ones.

    Raises ValueError for a checkpoint that can only be evaluated, or holds another architecture.
    """
    source, state = stored.source, dict(stored.state)
    epoch = state.get("epoch")
    if not isinstance(epoch, int) or "optimizer" not in state:
        lacks = "it does not hold both epoch and optimizer"
        if isinstance(epoch, str):
            lacks = f"its epoch is {epoch!r}"
        raise UserError(
            f"checkpoint {source} can be evaluated or fine-tuned (--finetune) but not resumed: {lacks}"
        )
    if stored.arch is not None:
        there, here = spelled_out(stored.arch), spelled_out(arch)
        there["options"], here["options"] = compared(there["options"]), compared(here["options"])
        check_arch(there, here, source)
    if stored.published_flags:
        try:
            state["optimizer"] = regrouped(state["optimizer"], network, optimizer)
        except (KeyError, ValueError) as error:
            raise UserError(f"optimizer of checkpoint {source} does not fit this run's: {error}") from error
    state["model"] = stored.weights("model")
    if stored.has_average:
        state["model_ema"] = stored.weights("ema")
    return run.resume(state, source)
