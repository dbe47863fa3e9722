"""Any checkpoint under our names: ours, those of the reproduced papers, and bare state dicts."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import View
from experiment.checkpoint import load
from experiment.entries import check_entries
from experiment.fit import Weights
from experiment.options import options_of_signature, restore, restored
from experiment.verify import checked_arch
from models import create_model, list_models, model_class, model_options
from training.optim import param_groups
from utils import UserError

MODEL_KEY = "model|module|state_dict_ema"
# Flags of published files that mean nothing here: folders are another machine's, and nb_classes was unused.
NOT_TAKEN = ("data_path", "eval_data_path", "nb_classes")


@dataclass(frozen=True)
class Stored:
    """The content of a file, whoever wrote it.

    `content` is the file as it is, `flags` its flags as a plain dict, `arch` the architecture (`name`,
    `options`, `num_classes`) if it names one that is known here. `state` holds what a run resumes from, part
    by part under our names: optimizer, scaler, l2w; `epoch` is the last one done, counted from 0, if the file
    says so.
    """

    source: str
    content: dict[str, Any]
    flags: dict[str, Any] = field(default_factory=dict)
    arch: dict[str, Any] | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def weights(self, which: str = "auto", *, model_key: str = MODEL_KEY) -> Weights:
        """The weights: "model", "ema" (the moving average) or "auto", which is the average if there is one.

        They are the first entry that `model_key` names ("|" between names), else `state_dict` (MSDNet, L2W,
        EBJR), else the file itself. A prefix "module." that all keys share, left by data-parallel training,
        is dropped. Raises ValueError in one line when these weights are not there.
        """
        ema = self.has_average if which == "auto" else which == "ema"
        names = ["model_ema"] if ema else [*model_key.split("|"), "state_dict"]
        found = next((self.content[name] for name in names if isinstance(self.content.get(name), dict)), None)
        if found is None and ema:
            raise UserError(f"checkpoint {self.source} has no EMA weights (model_ema)")
        if found is None:
            found = self.content
        if not found or not all(isinstance(value, Tensor) for value in found.values()):
            held = ", ".join(str(key) for key in list(self.content)[:6]) or "nothing"
            raise UserError(
                f"checkpoint {self.source} has no weights under {', '.join(names)}; it holds {held}"
            )
        if all(key.startswith("module.") for key in found):
            return {key.removeprefix("module."): value for key, value in found.items()}
        return found

    @property
    def has_average(self) -> bool:
        """Whether the file holds a moving average of the weights."""
        return self.content.get("model_ema") is not None

    @property
    def published_flags(self) -> bool:
        """Whether Dyn-Perceiver's program wrote it, and so numbered the parameters of its optimizer."""
        return isinstance(self.content.get("args"), Namespace)

    @property
    def held_out(self) -> list[int] | None:
        """Rows of the training set that the network has never seen, if the file says which."""
        return self.content.get("calib_indices")

    def values(self, *groups: type) -> dict[str, Any]:
        """The values that the file's flags give for these groups of flags, checked."""
        return restore(groups, self.flags, self.source)

    def sight(self, name: str) -> dict[str, Any]:
        """How the registered network `name` sees images: as the flags say, or, without any, as published."""
        if self.flags:
            return self.values(View)
        family = model_class(name)
        statistics = dict(zip(("mean", "std"), family.normalisation, strict=False))
        return {**statistics, "interpolation": family.interpolation}


def read(source: str | Path) -> Stored:
    """Reads any checkpoint. Raises ValueError in one line."""
    return understood(load(source), source)


def understood(content: dict[str, Any], source: str | Path) -> Stored:
    """The parsed `content` of file `source`. Raises ValueError in one line for what no run writes."""
    check_entries(content, source)
    args = content.get("args")
    flags = args if isinstance(args, dict) else {}
    if isinstance(args, Namespace):  # Dynamic Perceiver's
        flags = {name: value for name, value in vars(args).items() if name not in NOT_TAKEN}
    return Stored(str(source), content, flags, _arch(content, source), _state(content))


def _arch(content: dict[str, Any], source: object) -> dict[str, Any] | None:
    """The architecture from our `arch`, or from Dyn-Perceiver's flags.

    Elsewhere `arch` is a bare name, which is not enough to build a network.
    """
    if isinstance(content.get("arch"), dict):
        return checked_arch(content["arch"], source)
    args = content.get("args")
    name = getattr(args, "model", None)
    if name not in list_models():
        return None
    options = {}
    for option in options_of_signature(model_options(name)):
        # That script did not pass drop_path on: its networks have their family's, which is the default here.
        value = None if option.name == "drop_path" else getattr(args, option.name, None)
        if value is not None:
            options[option.name] = restored(option, value, source)
    return {"name": name, "options": options, "num_classes": 1000}  # nor did it pass on nb_classes


def _state(content: dict[str, Any]) -> dict[str, Any]:
    """What a run resumes from, under our names."""
    names = ("epoch", "partial", "record", "best", "optimizer", "scaler", "l2w")
    state = {name: content[name] for name in names if name in content}
    if "meta_state_dict" in content:  # L2W's program stores the number of epochs done, not the last one
        theirs = {"weight_net": "meta_state_dict", "optimizer": "meta_optimizer"}
        state["l2w"] = {ours: content[name] for ours, name in theirs.items() if name in content}
        if isinstance(content.get("epoch"), int):
            state["epoch"] = content["epoch"] - 1
    return state


def regrouped(
    published: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state of Dyn-Perceiver's optimizer, regrouped for `optimizer`.

    The former's groups decay embeddings too.
    """
    there = [p for group in param_groups(network, 0.0, True, decay_embeddings=True) for p in group["params"]]
    numbers = [number for group in published["param_groups"] for number in group["params"]]
    number_of = dict(zip(there, numbers, strict=True))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {i: published["state"].get(number_of[p]) for i, p in enumerate(parameters)}
    kept = {i: state for i, state in states.items() if state is not None}
    return {"state": kept, "param_groups": optimizer.state_dict()["param_groups"]}


def named_in_order(weights: Weights, name: str, source: str | Path) -> Weights:
    """`weights` under the names of the registered network `name`, matched by their order.

    Its entries must have these shapes in this order; batch counters of batch norms may be missing. Raises
    ValueError where the shapes differ.
    """
    own = create_model(name, next(reversed(weights.values())).shape[0]).state_dict()
    wanted = _without_counters(own)
    given = _without_counters(weights)
    pairs = list(zip(wanted, given, strict=False))
    wrong = [f"{b} {list(weights[b].shape)} for {a}" for a, b in pairs if weights[b].shape != own[a].shape]
    if wrong or len(given) != len(wanted):
        counts = f"{len(given)} entries for {len(wanted)}"
        raise UserError(f"{source} is not {name}: {counts}; {'; '.join(wrong[:2])}")
    return own | {a: weights[b] for a, b in pairs}


def _without_counters(names: Sequence[str] | Weights) -> list[str]:
    return [name for name in names if not name.endswith("num_batches_tracked")]
