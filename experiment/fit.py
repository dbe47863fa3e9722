"""Matching weights to networks: exactly, in part for fine-tuning, or with a one-line reason why not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiment.verify import check_weights
from models import MultiExitModel, create_model
from utils import UserError

Weights = dict[str, Tensor]
PROBE = 911  # a number of classes that equals no layer's width


def load_weights(model: nn.Module, weights: Weights, where: str) -> None:
    """Loads `weights` into `model`, every key and shape as in the model; `where` says what is being loaded.

    Raises ValueError in one line with the counts and the first of the keys that do not fit, or with the first
    key whose values cannot be.
    """
    check_weights(weights, model.state_dict(), where)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(_misfit(model.state_dict(), weights, where)) from error


def _misfit(own: Weights, given: Weights, where: str) -> str:
    """One line on how the weights `given` differ from the model's `own`."""
    reshaped = {}
    for key, value in own.items():
        if key in given and given[key].shape != value.shape:
            reshaped[key] = (list(given[key].shape), list(value.shape))
    kinds = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [f"{key} {there} instead of {here}" for key, (there, here) in reshaped.items()],
    }
    classes = _class_counts(list(reshaped.values()))
    if classes and not kinds["missing"] and not kinds["unexpected"]:
        return f"{where} has {classes[0]} classes, the model {classes[1]}"
    parts = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]
    return f"{where} does not fit the model: {'; '.join(parts)}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _class_counts(pairs: list[tuple[list[int], list[int]]]) -> tuple[int, int] | None:
    """The two numbers of classes, if these pairs of shapes differ in nothing else.

    Then only linear layers differ, all by the same two sizes: the outputs of heads, and inputs from logits.
    """
    sizes = set()
    for there, here in pairs:
        if len(there) != len(here) or len(here) > 2:
            return None
        sizes |= {(a, b) for a, b in zip(there, here, strict=True) if a != b}
    return sizes.pop() if len(sizes) == 1 else None


def classes_of(weights: Weights, name: str, options: Mapping[str, Any], where: str) -> int:
    """The number of classes of the registered network `name` that these weights belong to.

    `where` says where they are from. Raises ValueError if they fit such a network for no number of classes.
    """
    with torch.device("meta"):
        network = create_model(name, PROBE, **options)
    own, given = network.state_dict(), renamed_for(network, weights)
    pairs = [(list(given[key].shape), list(own[key].shape)) for key in own if key in given]
    found = _class_counts([pair for pair in pairs if pair[0] != pair[1]])
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    if found is None or found[1] != PROBE or missing:
        raise UserError(_misfit(own, given, where))
    return found[0]


def check_arch(stored: dict[str, Any], wanted: dict[str, Any], source: object) -> None:
    """Raises ValueError, naming what differs, if architecture `stored` in `source` is not `wanted`.

    Both are dicts of `name`, `options` (a dict) and `num_classes`.
    """
    differences = _differences(
        {key: stored[key] for key in ("name", "num_classes")},
        {key: wanted[key] for key in ("name", "num_classes")},
    )
    if stored["name"] == wanted["name"]:  # options of another network cannot be compared
        differences += _differences(stored["options"], wanted["options"])
    if differences:
        raise UserError(f"checkpoint {source} holds another architecture: {'; '.join(differences)}")


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    keys = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    return [f"{key} is {stored.get(key)!r}, wanted {wanted.get(key)!r}" for key in keys]


def renamed_for(network: nn.Module, weights: Weights) -> Weights:
    """Weights under the network's own names.

    timm's names are translated for a network that timm has too; names of a bare network get the prefix of the
    module that holds it here ("net." in timm/NAME, "backbone." in timm_ee and vit_ee), and so do those of
    timm/NAME. All others stay as they are.
    """
    own = network.state_dict()
    if isinstance(network, MultiExitModel):
        ours = {theirs: name for name, theirs in network.timm_modules().items()}
        if any(key.rpartition(".")[0] in ours for key in weights):
            return renamed(weights, ours, own)
    bare = {key.removeprefix("net."): value for key, value in weights.items()}
    for prefix in ("net.", "backbone."):
        held = [key for key in bare if prefix + key in own]
        if held and not any(key in own for key in weights):
            return {prefix + key if prefix + key in own else key: value for key, value in bare.items()}
    return weights


def renamed(weights: Weights, names: dict[str, str], shapes: Weights) -> Weights:
    """Weights whose modules have other names, in the shapes of `shapes` where these have as many elements."""
    found = {}
    for key, value in weights.items():
        module, _, tensor = key.rpartition(".")
        name = f"{names.get(module, module)}.{tensor}"
        fits = name in shapes and shapes[name].numel() == value.numel()
        found[name] = value.reshape(shapes[name].shape) if fits else value
    return found


class Fit(NamedTuple):
    """Weights with exactly a model's keys, and where they come from."""

    weights: Weights
    kept: list[str]  # entries of the file that the model takes
    renewed: list[str]  # modules, and tensors beside modules, that keep the model's own initial values
    unused: list[str]  # entries of the file that the model does not have

    def line(self, source: object) -> str:
        """What fine-tuning took from file `source`, for a log."""
        text = f"fine-tuning {source}: {len(self.kept)} entries kept"
        text += f"; initialised anew: {', '.join(self.renewed) or 'nothing'}"
        return f"{text}; {len(self.unused)} unused: {_first(self.unused)}" if self.unused else text


def fit_to(model: nn.Module, weights: Weights) -> Fit:
    """Weights for fine-tuning `model` from a network that differs in its heads, or otherwise in part.

    A layer for which `weights` lacks a tensor, or has one of another shape, is initialised anew. If it is in
    an nn.Sequential, so is all of that: batch-norm statistics of another layer's outputs would be wrong.
    Raises ValueError when nothing fits.
    """
    own = model.state_dict()

    def fits(key: str) -> bool:
        # Files older than torch 0.4.1 lack the batch counters, which is no reason to drop their statistics.
        return weights[key].shape == own[key].shape if key in weights else key.endswith("num_batches_tracked")

    roots = {_renewed_with(model, key) for key in own if not fits(key)}
    lost = [key for key in own if any(path in roots for path in _paths(key))]
    kept = [key for key in own if key in weights and key not in lost]
    if not kept:
        raise UserError(f"none of the {len(weights)} given weights fits any of the model's {len(own)}")
    alive = {path for key in own if key not in lost for path in _paths(key)}
    renewed_modules = [next(path for path in _paths(key) if path not in alive) for key in lost]
    return Fit(
        weights=own | {key: weights[key] for key in kept},
        kept=kept,
        renewed=list(dict.fromkeys(renewed_modules)),
        unused=[key for key in weights if key not in own],
    )


def _paths(key: str) -> list[str]:
    """The modules around a tensor, outermost first, and the tensor: a, a.b, a.b.weight."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _renewed_with(model: nn.Module, key: str) -> str:
    """The module to initialise anew for its tensor `key`; `key` itself for a tensor beside modules."""
    name = key.rpartition(".")[0]
    if not name or list(model.get_submodule(name).children()):
        return key
    while (parent := name.rpartition(".")[0]) and isinstance(model.get_submodule(parent), nn.Sequential):
        name = parent
    return name
