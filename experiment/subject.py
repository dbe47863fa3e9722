"""What is evaluated: a network on its data, by the command line and otherwise as it was trained."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptive.backend import Backend
from adaptive.exits import Exits
from adaptive.flops import check_side
from adaptive.policy import Policy
from adaptive.reading import Reading
from datasets import PREFIXES, Data, Splits, View, open_splits
from experiment.cascade import CascadeFiles, read_cascade
from experiment.open import IMAGES, Opened, open_network
from experiment.options import Given, plain
from experiment.procedures import OURS, Procedure, evaluation_line, implied, published
from experiment.published import Stored, read
from experiment.recipe import Network, Recipe
from experiment.record import MACS, Provenance, Unit, describe_machine
from models import MultiExitModel
from training.parallel import start_compute
from utils import Compute, Runtime, UserError, option


@dataclass(frozen=True)
class Checkpoint:
    """The file to evaluate; its data and view are the defaults."""

    checkpoint: str | None = option(
        None, "file to evaluate, ours or a published one; what is not given is as stored in it"
    )


NAMED = "data_set", "data_path", "eval_data_path"  # what is opened
ELSEWHERE = {"data_path": None, "eval_data_path": None, "download": False}
EVALUATION: list[type] = [Checkpoint, Network, Data, View, Runtime, Exits]


@dataclass(frozen=True)
class Subject:
    """A network on its data.

    `held_out` are the training images that the network has not seen, None if unknown; `assembled` says that
    the network is a cascade put together here; `unit` is that of costs in dynamic.txt, `procedure_line` says
    what is done as published, if anything is, and `policy` is the one to evaluate, if it comes from a file.
    `backend` is what runs the network, if not PyTorch as it is.
    """

    opened: Opened
    splits: Splits
    recipe: Recipe
    compute: Compute
    held_out: list[int] | None
    assembled: bool
    unit: Unit
    procedure_line: str
    policy: Policy | None = None
    backend: Backend | None = None

    @property
    def network(self) -> MultiExitModel:
        """In evaluation mode, on the device."""
        return self.opened.network

    @property
    def running(self) -> MultiExitModel:
        """The network where it runs."""
        return self.backend.network() if self.backend else self.network

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: (3, H, W)."""
        return 3, self.splits.view.size, self.splits.view.size

    def provenance(self, calib: str, num_test: int, uncounted: list[str]) -> Provenance:
        """How the metrics of an evaluation are obtained."""
        data, arch, exits = self.recipe.data, self.opened.arch, self.recipe.exits
        return Provenance(
            network=arch["name"],
            options=arch["options"],
            num_classes=arch["num_classes"],
            weights=self.opened.weights,
            source=self.opened.source,
            data_set=data.data_set,
            data_path=data.eval_data_path or data.data_path or "",
            input_size=self.splits.view.size,
            num_test=num_test,
            calib=calib,
            confidence=exits.confidence,
            quota_sweep=exits.quota_sweep,
            uncounted=uncounted,
            machine=describe_machine(self.compute.device),
            procedure=self.recipe.network.procedure or OURS,
            unit=self.unit.name,
            backend=f"{self.backend.name}, {self.backend.precision}" if self.backend else "eager",
        )

    def checkpoint(self) -> dict[str, Any]:
        """The network as a self-contained checkpoint."""
        return {
            "model": self.network.state_dict(),
            "arch": self.opened.arch,
            "args": plain(self.recipe.data, self.splits.view),
            "calib_indices": self.held_out,
            "class_names": list(self.splits.source.class_names),
            "epoch": "cascade",
        }


def open_evaluation(given: Given) -> Subject:
    """Opens the network and the images that flags name. Raises ValueError in one line."""
    options, values = dict(given.options), dict(given.values)
    wanted = values.pop("procedure", OURS)
    file = _file(values.get("checkpoint"), options)
    stored = file.stored if isinstance(file, CascadeFiles) else file
    _check_named(stored, given.values)
    said = _said(stored, values)
    recipe = Recipe.of(said, values, options=options)
    name, row = _procedure(file, recipe, wanted)
    flags = implied(wanted, row)
    if flags.get("calib") == "held_out" and recipe.data.num_calib == 0:
        flags["calib"] = "half_test"  # where nothing is held out, thresholds are published from test images
    recipe = Recipe.of(said, flags, values, options=options)
    Reading(recipe.exits.confidence, recipe.exits.answer)  # a wrong name fails before images are read
    compute = start_compute(recipe.runtime)
    held_out = stored.held_out if _same_split(stored, recipe.data) else None
    # As published: all training images can be sampled.
    rows = [] if held_out is None and recipe.exits.calib == "train_augmented" else held_out
    splits = open_splits(recipe.data, recipe.view, recipe.transform, rows)
    opened = open_network(
        file,
        name=recipe.network.model,
        options=options,
        weights=recipe.exits.weights,
        num_classes=splits.source.num_classes,
        view=splits.view,
        device=compute.device,
    )
    check_side(opened.network, splits.view.size)
    policy = Policy.load(recipe.exits.policy).check(opened) if recipe.exits.policy else None
    if policy:
        exits = replace(recipe.exits, confidence=policy.confidence, answer=policy.answer)
        recipe = replace(recipe, exits=exits)
    return Subject(
        opened,
        splits,
        recipe,
        compute,
        held_out,
        assembled=isinstance(file, CascadeFiles),
        unit=row.unit if row else MACS,
        procedure_line=evaluation_line(wanted, row, recipe, name),
        policy=policy,
    )


def _procedure(file: Stored | CascadeFiles, recipe: Recipe, wanted: str) -> tuple[str, Procedure | None]:
    """The name of the network in a file, and how networks like it were published, if that is wanted."""
    name, options, stored = recipe.network.model, recipe.options, file
    if isinstance(file, CascadeFiles):
        name, options, stored = "ebjr", {"networks": [part.member for part in file.parts]}, file.stored
    elif file.arch:
        name, options = file.arch["name"], file.arch["options"]
    l2w = bool(stored.flags.get("l2w")) or "l2w" in stored.state
    return name, None if wanted == OURS else published(name, recipe.data.data_set, l2w, options)


def _file(path: str | None, options: dict[str, Any]) -> Stored | CascadeFiles:
    """The file to evaluate, or the files of a cascade, which are taken out of the options."""
    if path:
        return read(path)
    if not options.get("networks"):
        raise UserError(
            "name the file to evaluate: --checkpoint FILE, or the networks of a cascade: --networks"
        )
    return read_cascade(options.pop("networks"))


def _said(stored: Stored, given: dict[str, Any]) -> dict[str, Any]:
    """What the file stores about the images that it was trained on, but not where they are."""
    said = {**stored.values(*IMAGES), **ELSEWHERE}
    if given.get("model"):
        said |= stored.sight(given["model"])
    return said


def _check_named(stored: Stored, given: Mapping[str, Any]) -> None:
    """Raises ValueError, with what the file stores, where `given` does not name the images to evaluate on.

    A file must not decide what is opened or fetched. The digits are part of scikit-learn.
    """
    said = stored.values(Data)
    data_set = said.get("data_set", "DIGITS")
    fetched = data_set.startswith(PREFIXES)
    if data_set == "DIGITS" or given.get("data_path" if not fetched else "data_set"):
        return
    if given.get("data_set", data_set) != data_set:  # which says by itself what it needs
        return
    words = {"data_path": "PATH", **{name: said[name] for name in NAMED if said.get(name)}}
    command = shlex.join(word for name in NAMED if name in words for word in (f"--{name}", words[name]))
    raise UserError(f"name the images to evaluate on; {stored.source} was trained with {command}")


def _same_split(stored: Stored, data: Data) -> bool:
    """Whether the file's training set was split as this one is."""
    names = ("data_set", "num_calib", "seed")
    return all(stored.flags.get(name) == getattr(data, name) for name in names)
