"""Resuming from a checkpoint: it must be of the same run, and every part gets its state back."""

from typing import Any

import torch

from datasets import Data
from experiment.fit import check_arch
from experiment.open import compared
from experiment.published import Stored, regrouped
from experiment.recipe import Recipe
from experiment.run import Run
from models import MultiExitModel, spelled_out
from training.optim import Optimization


def check_same_run(recipe: Recipe, stored: Stored) -> None:
    """Raises ValueError for a checkpoint that was trained with other images or another optimizer."""
    said, flags = stored.values(Data, Optimization), recipe.flags()
    for name in ("data_set", "num_calib", "drop_last", "seed", "opt"):
        if name in said and said[name] != flags[name]:
            raise ValueError(f"--{name} {flags[name]}, but {stored.source} was trained with {said[name]}")


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
        raise ValueError(
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
            raise ValueError(f"optimizer of checkpoint {source} does not fit this run's: {error}") from error
    state["model"] = stored.weights("model")
    if stored.has_average:
        state["model_ema"] = stored.weights("ema")
    return run.resume(state, source)
