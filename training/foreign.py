"""Weights from any checkpoint: our own, the published ones of the reproduced papers, and bare state dicts."""

from pathlib import Path

from torch import Tensor, nn

from training.checkpoint import load


def read_weights(
    source: str | Path, *, model_key: str = "model|module|state_dict_ema", ema: bool = False
) -> tuple[dict[str, Tensor], dict | None]:
    """`weights_of` the checkpoint `source`, a path or an https URL."""
    return weights_of(load(source), source, model_key=model_key, ema=ema)


def weights_of(
    content: dict, source: str | Path, *, model_key: str = "model|module|state_dict_ema", ema: bool = False
) -> tuple[dict[str, Tensor], dict | None]:
    """Weights in the `content` of checkpoint `source`, and its architecture if it tells (ours do).

    The weights are the first entry that `model_key` names ("|" between names), else `state_dict` (MSDNet, L2W, EBJR),
    else the file itself; with `ema` they are `model_ema`. A prefix "module." that all keys share, left by data-parallel
    training, is dropped. Raises ValueError in one line when these weights are not there.
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
    arch = content.get("arch")
    # Published files keep a bare name there, which does not say how the network was built.
    return _without_module(weights), arch if isinstance(arch, dict) else None


def _without_module(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def fit_to(model: nn.Module, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights for fine-tuning `model` from a network that differs in its heads, or otherwise in part.

    Returns a state dict with exactly the model's keys, and the keys that keep the model's own initial values because
    `state_dict` lacks them or has them in another shape. Raises ValueError when nothing fits.
    """
    own = model.state_dict()
    kept = [key for key, value in own.items() if key not in state_dict or state_dict[key].shape != value.shape]
    if len(kept) == len(own):
        raise ValueError(f"none of the {len(state_dict)} given weights fits any of the model's {len(own)}")
    return {key: own[key] if key in kept else state_dict[key] for key in own}, kept
