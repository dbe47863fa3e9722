"""Networks from any checkpoint: our own, the published ones of the reproduced papers, and bare state
dicts."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from models import MultiExitModel, create_model, list_models, model_options, spelled_out
from training.augment import Augment
from training.checkpoint import check_arch, load, load_weights
from training.flags import Flag, flags_of_signature
from training.l2w import SampleWeighting
from training.optim import Update, param_groups

MODEL_KEY = "model|module|state_dict_ema"
# What a published file's flags do not tell: folders are on another machine, and its networks have 1000
# classes always.
NOT_TAKEN = ("data_path", "eval_data_path", "nb_classes")
# Options that matter in training only: a run may go on with others, as with another learning rate.
RATES = {"drop_path", "dropout", "drop_path_rate", "drop_rate"}


def weights_of(
    content: dict, source: str | Path, *, model_key: str = MODEL_KEY, ema: bool = False
) -> dict[str, Tensor]:
    """Weights in the `content` of checkpoint `source`, which is its name in messages.

    The weights are the first entry that `model_key` names ("|" between names), else `state_dict` (MSDNet,
    L2W, EBJR), else the file itself; with `ema` they are `model_ema`. A prefix "module." that all keys share,
    left by data-parallel training, is dropped. Raises ValueError in one line when these weights are not
    there.
    """
    names = ["model_ema"] if ema else [*model_key.split("|"), "state_dict"]
    weights = next((content[name] for name in names if isinstance(content.get(name), dict)), None)
    if weights is None and ema:
        raise ValueError(f"checkpoint {source} has no EMA weights (model_ema)")
    if weights is None:
        weights = content
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        found = ", ".join(str(key) for key in list(content)[:6]) or "nothing"
        raise ValueError(f"checkpoint {source} has no weights under {', '.join(names)}; it holds {found}")
    if all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def from_timm(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the network's own names: translated if they have timm's, else as they are."""
    ours = {theirs: name for name, theirs in getattr(network, "timm_modules", dict)().items()}
    if not ours or not any(key.rpartition(".")[0] in ours for key in weights):
        return weights
    return _renamed(weights, ours, network.state_dict())


def to_timm(network: MultiExitModel) -> dict[str, Tensor]:
    """The network's weights under the names of timm's version of it, whose classifier is a linear layer.

    Raises ValueError for a network that timm does not have, or has without its exits.
    """
    theirs = network.timm_modules()
    if not theirs or network.num_exits > 1:
        raise ValueError(
            f"timm has no counterpart of this {type(network).__name__} with {network.num_exits} exits"
        )
    renamed = _renamed(network.state_dict(), theirs, {})
    return {key: value.flatten(1) if key == "head.fc.weight" else value for key, value in renamed.items()}


def _renamed(
    weights: dict[str, Tensor], names: dict[str, str], shapes: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Weights whose modules have other names, in the shapes of `shapes` where these have as many elements."""
    found = {}
    for key, value in weights.items():
        module, _, tensor = key.rpartition(".")
        name = f"{names.get(module, module)}.{tensor}"
        fits = name in shapes and shapes[name].numel() == value.numel()
        found[name] = value.reshape(shapes[name].shape) if fits else value
    return found


def named_in_order(weights: dict[str, Tensor], name: str, source: str | Path) -> dict[str, Tensor]:
    """`weights` under the names of the registered network `name`, whose entries have the same shapes in the
    same order.

    Batches that batch norms have counted need not be there. Raises ValueError where the shapes differ.
    """
    own = create_model(name, next(reversed(weights.values())).shape[0]).state_dict()
    wanted, given = ([k for k in keys if not k.endswith("num_batches_tracked")] for keys in (own, weights))
    pairs = list(zip(wanted, given, strict=False))
    wrong = [f"{b} {list(weights[b].shape)} for {a}" for a, b in pairs if weights[b].shape != own[a].shape]
    if wrong or len(given) != len(wanted):
        raise ValueError(
            f"{source} is not {name}: {len(given)} entries for {len(wanted)}; {'; '.join(wrong[:2])}"
        )
    return own | {a: weights[b] for a, b in pairs}


def stored_flags(content: dict, flags: list[Flag], source: str | Path) -> dict[str, Any]:
    """What checkpoint `source` says of these flags: ours hold a dict of them, Dyn-Perceiver's a Namespace.

    Raises ValueError for a value that the command line would not take either.
    """
    args = content.get("args")
    if isinstance(args, Namespace):
        args = {name: value for name, value in vars(args).items() if name not in NOT_TAKEN}
    found = {}
    for flag in flags if isinstance(args, dict) else ():
        if flag.name in args:
            try:
                found[flag.name] = flag.restore(args[flag.name])
            except (ArgumentTypeError, TypeError) as error:
                raise ValueError(
                    f"checkpoint {source} was trained with a strange --{flag.name}: {error}"
                ) from error
    return found


def architecture(
    name: str, options: dict[str, Any], num_classes: int, input_size: int, **stats: Sequence[float]
) -> dict[str, Any]:
    """What a checkpoint stores to build its network again.

    A network that depends on the images' side, or on their normalisation (mean, std), is told it.
    """
    # Published weights to start from are no part of what the network is.
    lasting = {option: value for option, value in options.items() if option != "pretrained"}
    told = {"input_size": input_size, **{key: list(value) for key, value in stats.items()}}
    told = {key: value for key, value in told.items() if key in model_options(name)}
    return {"name": name, "options": lasting | told, "num_classes": num_classes}


def stored_arch(content: dict, source: str | Path) -> dict[str, Any] | None:
    """The architecture that checkpoint `source` names: ours in `arch`, Dyn-Perceiver's by its flags; None if
    neither.

    Elsewhere `arch` is a bare name, which does not say how the network was built.
    """
    if isinstance(content.get("arch"), dict):
        return content["arch"]
    name = getattr(content.get("args"), "model", None)
    if name not in list_models():
        return None
    # That script did not hand drop_path on to its networks: each has its family's, which is the default here.
    flags = [flag for flag in flags_of_signature(model_options(name)) if flag.name != "drop_path"]
    given = {
        option: value for option, value in stored_flags(content, flags, source).items() if value is not None
    }
    return {"name": name, "options": given, "num_classes": 1000}  # nor did it hand on nb_classes


def load_network(
    content: dict,
    source: str | Path,
    weights: str,
    *,
    name: str,
    options: dict[str, Any],
    num_classes: int,
    input_size: int,
    **stats: Sequence[float],
) -> tuple[MultiExitModel, dict[str, Any], str]:
    """The network of checkpoint `source` for evaluation, its architecture, and which weights it has.

    `weights` is model, ema, or auto (the moving average if there is one). `name` (or "") and `options` must
    agree with the file, and are needed if that names no network; the rest (with `mean`, `std`) describes the
    images. ValueError.
    """
    ema = content.get("model_ema") is not None if weights == "auto" else weights == "ema"
    values, arch = weights_of(content, source, ema=ema), stored_arch(content, source)
    if arch is None:
        if not name:
            raise ValueError(
                f"checkpoint {source} does not name a network known here: give --model and its options"
            )
        arch = architecture(name, options, num_classes, input_size, **stats)
    elif (
        name not in ("", arch["name"])
        or not _compared(options).items() <= spelled_out(arch)["options"].items()
    ):
        raise ValueError(
            f"checkpoint {source} holds another network than --model and its options say: {arch}"
        )
    if arch["num_classes"] != num_classes:
        raise ValueError(f"checkpoint {source} has {arch['num_classes']} classes, the data set {num_classes}")
    told = {key: list(value) for key, value in stats.items() if key in model_options(arch["name"])}
    arch = {**arch, "options": arch["options"] | told}
    model = create_model(arch["name"], arch["num_classes"], **arch["options"])
    load_weights(model, from_timm(model, values), f"checkpoint {source}")
    return model.eval(), arch, "moving average of the weights" if ema else "weights"


def _compared(options: dict[str, Any]) -> dict[str, Any]:
    """The options that must agree with a checkpoint's."""
    free = RATES | (
        {"input_size"} if options.get("spatial_reduction") else set()
    )  # maps are pooled to one size
    return {option: value for option, value in options.items() if option not in free}


def check_same_run(
    given: dict[str, Any], content: dict, source: str | Path | None, flags: list[Flag]
) -> None:
    """Refuses to go on from checkpoint `source` with other images, or another optimizer, than it was trained
    with."""
    stored = stored_flags(content, flags, source)
    for name in ("data_set", "num_calib", "seed", "opt"):
        if stored.get(name, given[name]) != given[name]:
            raise ValueError(f"--{name} {given[name]}, but {source} was trained with {stored[name]}")


def resume_weights(network: nn.Module, arch: dict[str, Any], content: dict, source: str | Path) -> None:
    """Loads the weights of checkpoint `source`, which must hold a network of this architecture and a state to
    go on."""
    epoch = content.get("epoch")
    if not isinstance(epoch, int) or "optimizer" not in content:
        lacks = (
            f"its epoch is {epoch!r}"
            if isinstance(epoch, str)
            else "it does not hold both epoch and optimizer"
        )
        raise ValueError(
            f"checkpoint {source} can be evaluated or fine-tuned (--finetune) but not resumed: {lacks}"
        )
    stored = stored_arch(content, source)
    if stored is not None:
        there, here = (
            {**full, "options": _compared(full["options"])} for full in map(spelled_out, (stored, arch))
        )
        check_arch(there, here, source)
    load_weights(network, weights_of(content, source), f"checkpoint {source}")


def resume_update(update: Update, content: dict, source: str | Path, steps: int) -> int:
    """Restores what checkpoint `source` says of the optimizer; returns the epoch, of `steps` each, to go on
    with."""
    # L2W's program stores how many epochs are done, all others the last one done.
    first, average = content["epoch"] + ("meta_state_dict" not in content), content.get("model_ema")
    if update.ema is not None and average is not None:
        load_weights(update.ema.module, average, f"the moving average in checkpoint {source}")
    # Not the steps that are done: with another batch size, or without L2W, an epoch took another number of
    # them.
    state = {"scaler": {}, "model_ema": None, **content, "step": first * steps}
    try:
        if isinstance(content.get("args"), Namespace):
            state["optimizer"] = _regrouped(state["optimizer"], update)
        update.load_state_dict(state)
    except (KeyError, ValueError) as error:  # what torch raises for other parameter groups
        raise ValueError(
            f"the optimizer of checkpoint {source} does not fit the one of this run: {error}"
        ) from error
    return first


def resume_weighting(objective: SampleWeighting, content: dict, source: str | Path | None, first: int) -> str:
    """Restores the weight net of checkpoint `source`, ours or L2W's, for epoch `first`; a line if it holds
    none."""
    state, line = objective.state_dict(), ""
    try:
        if content.get("l2w"):
            state = content["l2w"]
        elif "meta_state_dict" in content:  # the published program's
            state = {"weight_net": content["meta_state_dict"], "optimizer": content["meta_optimizer"]}
        elif source:
            line = f"checkpoint {source} holds no weight net: it starts anew"
        objective.load_state_dict({**state, "batch": first * objective.batches})
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"the weight net of checkpoint {source} does not fit this run's: {reason}"
        ) from error
    return line


def load_teacher(source: str | Path, num_classes: int, augment: Augment) -> MultiExitModel:
    """The network of checkpoint `source`, in evaluation mode, as a teacher on images that `augment` makes."""
    content = load(source)
    stored = stored_flags(
        content, [Flag("mean", float, None, many=True), Flag("std", float, None, many=True)], source
    )
    for name, ours in (("mean", augment.mean), ("std", augment.std)):
        if list(stored.get(name) or ours) != list(ours):
            raise ValueError(
                f"teacher {source} reads images of --{name} {stored[name]}, this run has {list(ours)}"
            )
    images = {
        "num_classes": num_classes,
        "input_size": augment.input_size,
        "mean": augment.mean,
        "std": augment.std,
    }
    return load_network(content, source, "auto", name="", options={}, **images)[0].requires_grad_(False)


def _regrouped(published: dict, update: Update) -> dict:
    """The state of Dyn-Perceiver's optimizer, whose groups decay embeddings too, for the groups of this
    run's."""
    there = [
        p
        for group in param_groups(update.bare_model, 0.0, True, decay_embeddings=True)
        for p in group["params"]
    ]
    numbers = [number for group in published["param_groups"] for number in group["params"]]
    number_of = dict(zip(there, numbers, strict=True))
    here = update.optimizer.state_dict()["param_groups"]
    parameters = [p for group in update.optimizer.param_groups for p in group["params"]]
    states = {i: published["state"].get(number_of[p]) for i, p in enumerate(parameters)}
    return {"state": {i: state for i, state in states.items() if state is not None}, "param_groups": here}


class Fit(NamedTuple):
    """Weights with exactly a model's keys, and where they come from."""

    weights: dict[str, Tensor]
    kept: list[str]  # entries of the file that the model takes
    renewed: list[
        str
    ]  # modules, and tensors that stand beside modules, that keep the model's own initial values
    unused: list[str]  # entries of the file that the model does not have


def fit_to(model: nn.Module, state_dict: dict[str, Tensor]) -> Fit:
    """Weights for fine-tuning `model` from a network that differs in its heads, or otherwise in part.

    A layer of which `state_dict` lacks a tensor, or has it in another shape, is initialised anew, and if it
    stands in an nn.Sequential so is all of that: batch-norm statistics of what another layer put out would be
    wrong. Raises ValueError when nothing fits.
    """
    own = model.state_dict()

    def fits(key: str) -> bool:
        # Files older than torch 0.4.1 count no batches, which is no reason to drop their statistics.
        return (
            state_dict[key].shape == own[key].shape
            if key in state_dict
            else key.endswith("num_batches_tracked")
        )

    roots = {_renewed_with(model, key) for key in own if not fits(key)}
    lost = [key for key in own if any(path in roots for path in _paths(key))]
    kept = [key for key in own if key in state_dict and key not in lost]
    if not kept:
        raise ValueError(f"none of the {len(state_dict)} given weights fits any of the model's {len(own)}")
    alive = {path for key in own if key not in lost for path in _paths(key)}
    renewed = [next(path for path in _paths(key) if path not in alive) for key in lost]
    weights = own | {key: state_dict[key] for key in kept}
    return Fit(weights, kept, list(dict.fromkeys(renewed)), [key for key in state_dict if key not in own])


def _paths(key: str) -> list[str]:
    """The modules around a tensor, outermost first, and the tensor: a, a.b, a.b.weight."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _renewed_with(model: nn.Module, key: str) -> str:
    """The module that is initialised anew with its tensor `key`, or `key` where the tensor stands beside
    modules."""
    name = key.rpartition(".")[0]
    if not name or [*model.get_submodule(name).children()]:
        return key
    while (parent := name.rpartition(".")[0]) and isinstance(model.get_submodule(parent), nn.Sequential):
        name = parent
    return name


def fine_tune(network: nn.Module, source: str, *, model_key: str, model_prefix: str) -> str:
    """Loads what fits of the weights in checkpoint `source`, their names prefixed; returns a line that says
    what."""
    weights = from_timm(network, weights_of(load(source), source, model_key=model_key))
    fit = fit_to(network, {model_prefix + key: value for key, value in weights.items()})
    network.load_state_dict(fit.weights)
    renewed = ", ".join(fit.renewed) or "nothing"
    line = f"fine-tuning {source}: {len(fit.kept)} entries kept; initialised anew: {renewed}"
    if not fit.unused:
        return line
    return f"{line}; {len(fit.unused)} unused: {', '.join(fit.unused[:3])}{', ...' if len(fit.unused) > 3 else ''}"
