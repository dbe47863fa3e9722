"""The one way from any file to a network that is ready to use: `open_network`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from datasets import IMAGENET_STATS, Data, Transform, View, eval_transform, to_rgb
from experiment.cascade import CascadeFiles
from experiment.fit import Weights, classes_of, fit_to, load_weights, renamed_for
from experiment.members import upgraded
from experiment.published import Stored, read
from experiment.recipe import GROUPS, Recipe, Start
from experiment.verify import check_network, check_weights
from models import MultiExitModel, create_model, model_class, model_options, spelled_out, tune
from utils import UserError

IMAGES = (Data, View, Transform)  # the flags that say what a network was trained on
# Options that matter in training only: a resumed run may change them, like the learning rate.
RATES = {"drop_path", "dropout", "drop_path_rate", "drop_rate"}


@dataclass(frozen=True)
class Opened:
    """A network in evaluation mode, and what is known about it.

    `arch` (name, options, num_classes) is enough to build it again; `recipe` is how it was trained, as far as
    the file says, and `view` its preprocessing of images; `held_out` are the rows of its training set that it
    never saw (None: not known); `weights` says which weights it has. `members` are how the networks of a
    cascade were trained.
    """

    network: MultiExitModel
    arch: dict[str, Any]
    recipe: Recipe
    view: View
    held_out: list[int] | None
    source: str
    weights: str
    class_names: tuple[str, ...]
    members: tuple[Recipe, ...] = ()

    def transform(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """An image or several (PIL, of any size) as the network reads them: [N, 3, H, W]."""
        several = [images] if isinstance(images, Image.Image) else images
        transform = eval_transform(self.view)
        return torch.stack([transform(to_rgb(image)) for image in several])


def open_network(
    source: str | Path | Stored | CascadeFiles | Recipe,
    *,
    name: str = "",
    options: Mapping[str, Any] | None = None,
    weights: str = "auto",
    num_classes: int | None = None,
    view: View | None = None,
    device: torch.device | str = "cpu",
) -> Opened:
    """The network of any file, on a device: our checkpoints, cascades, published layouts, timm weights ...

    `name` and `options` (of the registered network) are needed where the file names no network, and must
    agree with it where it does. `weights` is model, ema, or auto: the moving average if there is one.
    `num_classes` and `view` describe the images where the file does not; the number of classes must agree. A
    recipe gives the network that it would train, before training. Raises ValueError in one line.
    """
    given = dict(options or {})
    if isinstance(source, Recipe):
        return _ready(_untrained(source, num_classes, view), device)
    if isinstance(source, CascadeFiles):
        if name not in ("", "ebjr") or given:
            raise UserError(f"--networks makes a cascade, ebjr, without other options, not {name} {given}")
        return _ready(_cascade(source, weights, num_classes, view), device)
    stored = source if isinstance(source, Stored) else read(source)
    values = stored.weights(weights)
    arch = _arch_of(stored, values, name, given, num_classes)
    if stored.arch is not None:
        check_network(arch, values, stored.source)
    groups = IMAGES if stored.published_flags else GROUPS.values()
    recipe = Recipe.of(stored.sight(arch["name"]), stored.values(*groups), options=arch["options"])
    seen = view or _view_of(recipe.view, arch)
    if stored.arch is None:
        arch = architecture(name, given, arch["num_classes"], seen)
    options_here = {**arch["options"], **_statistics(arch["name"], seen)}
    network = create_model(arch["name"], arch["num_classes"], **options_here)
    load_weights(network, renamed_for(network, values), f"checkpoint {stored.source}")
    averaged = weights == "ema" or (weights == "auto" and stored.has_average)
    opened = Opened(
        network=network,
        arch={**arch, "options": options_here},
        recipe=recipe,
        view=seen,
        held_out=stored.held_out,
        source=stored.source,
        weights="moving average of the weights" if averaged else "weights",
        class_names=_class_names(stored.content.get("class_names"), arch["num_classes"]),
    )
    return _ready(opened, device)


def architecture(name: str, options: Mapping[str, Any], num_classes: int, view: View) -> dict[str, Any]:
    """What a checkpoint stores to build its network again.

    A network that depends on the images' side, or on their normalisation, gets these from `view`.
    """
    # Published weights to start from are not part of the architecture.
    lasting = {option: value for option, value in options.items() if option != "pretrained"}
    if "input_size" in model_options(name):
        lasting["input_size"] = view.input_size
    arch = {"name": name, "options": lasting | _statistics(name, view), "num_classes": num_classes}
    return upgraded(arch)  # a cascade may still have its networks in words


def _statistics(name: str, view: View) -> dict[str, Any]:
    known = {"mean": view.mean, "std": view.std}
    return {key: list(value) for key, value in known.items() if value and key in model_options(name)}


def _arch_of(
    stored: Stored, weights: Weights, name: str, options: dict[str, Any], num_classes: int | None
) -> dict[str, Any]:
    """The architecture that a file names, with which any given one must agree, else the given one."""
    where, arch = f"checkpoint {stored.source}", stored.arch
    if arch is None:
        if not name:
            raise UserError(f"{where} does not name a network known here: give --model and its options")
        num_classes = num_classes or classes_of(weights, name, options, where)
        return {"name": name, "options": options, "num_classes": num_classes}
    if (
        name not in ("", arch["name"])
        or not compared(options).items() <= spelled_out(arch)["options"].items()
    ):
        raise UserError(f"{where} holds another network than --model and its options say: {arch}")
    if num_classes not in (None, arch["num_classes"]):
        raise UserError(f"{where} has {arch['num_classes']} classes, the data set {num_classes}")
    return arch


def compared(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that must agree with a checkpoint's."""
    free = set(RATES)
    if options.get("spatial_reduction"):  # maps are pooled to one size
        free.add("input_size")
    return {option: value for option, value in options.items() if option not in free}


def _view_of(view: View, arch: dict[str, Any]) -> View:
    """The view, completed where a file's flags leave it open.

    The normalisation is the network's own, else its family's, else ImageNet's; so is the side.
    """
    options = arch["options"]
    family = model_class(arch["name"])
    mean, std = family.normalisation or IMAGENET_STATS[:2]
    size = options.get("input_size") or family.side
    return view.completed(size, options.get("mean") or mean, options.get("std") or std)


def _ready(opened: Opened, device: torch.device | str) -> Opened:
    """The network in evaluation mode on the device, with the fastest kernels for that."""
    opened.network.eval().to(device)
    tune(opened.network, device)
    return opened


def _class_names(names: Any, num_classes: int) -> tuple[str, ...]:
    if isinstance(names, (list, tuple)) and len(names) == num_classes:
        return tuple(map(str, names))
    return tuple(map(str, range(num_classes)))


def _untrained(recipe: Recipe, num_classes: int | None, view: View | None) -> Opened:
    """The network that a recipe would train, with the weights that it starts from if it names any."""
    name = recipe.network.model
    view = view or _view_of(recipe.view, {"name": name, "options": recipe.options})
    arch = architecture(name, recipe.options, num_classes or recipe.data.nb_classes or 1000, view)
    network = create_model(name, arch["num_classes"], **{**recipe.options, **arch["options"]})
    if recipe.start.finetune:
        network.load_state_dict(fit_to(network, read_weights(recipe.start, network)).weights)
    names = _class_names(None, arch["num_classes"])
    return Opened(network, arch, recipe, view, None, "recipe", "initial weights", names)


def read_weights(start: Start, network: nn.Module) -> dict[str, Tensor]:
    """The weights that `--finetune` names, under the network's names."""
    weights = read(start.finetune).weights("model", model_key=start.model_key)
    if start.model_prefix:
        weights = {start.model_prefix + key: value for key, value in weights.items()}
    else:
        weights = renamed_for(network, weights)
    check_weights(weights, network.state_dict(), f"checkpoint {start.finetune}")
    return weights


def _cascade(files: CascadeFiles, weights: str, num_classes: int | None, view: View | None) -> Opened:
    """The cascade of networks from files of weights, on images of `num_classes` as in `view`."""
    recipe, last = Recipe.of(files.stored.values(*IMAGES)), files.parts[-1]
    view = view or _view_of(recipe.view, {"name": last.member.name, "options": {}})
    if num_classes is None:
        alone = open_network(last.stored, name=last.member.name, options=last.member.options)
        num_classes = alone.arch["num_classes"]
    opened, members = [], []
    for part in files.parts:
        member = part.member
        one = open_network(
            part.stored,
            name=member.name,
            options=member.options,
            weights=weights,
            num_classes=len(member.classes or ()) or num_classes,
            view=View(input_size=member.size or view.input_size),
        )
        opened.append(one)
        members.append(member._replace(options=one.arch["options"]).to_dict())
    arch = {"name": "ebjr", "options": {"networks": members}, "num_classes": num_classes}
    arch["options"] |= _statistics("ebjr", view)
    network = create_model("ebjr", num_classes, **arch["options"])
    for whole, one in zip(network.networks, opened, strict=True):
        whole.load_state_dict(one.network.state_dict())
    kinds = dict.fromkeys(one.weights for one in opened)
    return Opened(
        network=network,
        arch=arch,
        recipe=recipe,
        view=view,
        held_out=files.stored.held_out,
        source="; ".join(one.source for one in opened),
        weights=" and ".join(kinds),
        class_names=_class_names(None, num_classes),
        members=tuple(one.recipe for one in opened),
    )


def open_teacher(source: str, num_classes: int, view: View, device: torch.device | str) -> MultiExitModel:
    """The network of a checkpoint, without gradients, as a teacher on images of `view`. Raises ValueError."""
    stored = read(source)
    said = stored.values(View)
    for name, ours in (("mean", view.mean), ("std", view.std)):
        if list(said.get(name) or ours or ()) != list(ours or ()):
            raise UserError(
                f"teacher {source} reads images of --{name} {said[name]}, this run has {list(ours or ())}"
            )
    opened = open_network(stored, num_classes=num_classes, view=view, device=device)
    return opened.network.requires_grad_(False)
