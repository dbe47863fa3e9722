"""What each paper's program does where its command line is silent: `--procedure published`, in one table.

`published` sets the flags of the network's family, above their defaults and, in an evaluation, above what the
checkpoint stores; what the command line or a recipe file gives goes before them. `ours` sets nothing. For a
network of no row, `published` is `ours`, and an evaluation says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from experiment.options import Given
from experiment.recipe import DEFAULTS, Recipe, words_of
from experiment.record import MACS, Unit
from models import create_model

PUBLISHED, OURS = "published", "ours"


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """What a paper's program does with networks of these `models` (patterns of registered names).

    `training` and `evaluation` are values of our flags, `unit` is that of dynamic.txt, `about` says what an
    evaluation does and `near` what these flags reach only nearly. A row may be for one data set, for training
    with sample weights (L2W), or for a number of exits.
    """

    family: str
    models: tuple[str, ...]
    source: str
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any]
    unit: Unit = MACS
    about: str
    near: str = ""
    data_set: str = "*"
    l2w: bool = False
    num_exits: int | None = None


QUOTAS = {
    "weights": "model",
    "policies": "quotas",
    "confidence": "max_prob",
    "quota_sweep": "msdnet",
    "quota_scales": (),
}
RESIZED = {**QUOTAS, "interpolation": "bilinear"}
PAIR = {"weights": "model", "policies": "quotas", "confidence": "energy_softmax", "calib": "none"}
OPERATIONS = Unit("FLOPs by the papers' counter", counter="papers")
DOUBLED = Unit("10^8 FLOPs (twice the papers' counter)", counter="papers", operations=0.5e8, digits=8)
MSDNET = Procedure(
    family="MSDNet",
    models=("msdnet*",),
    source="https://arxiv.org/abs/1703.09844, --evalmode dynamic",
    evaluation={**RESIZED, "calib": "held_out"},
    unit=OPERATIONS,
    about="39 quotas, thresholds from held-out images",
    near="clean images here, augmented there; with none held out half of the test images here, all there",
)
EBJR = Procedure(
    family="EBJR on CIFAR-10",
    models=("ebjr*",),
    data_set="CIFAR10",
    num_exits=2,
    source="https://arxiv.org/abs/2110.10343, evaluation script",
    evaluation={**PAIR, "router_threshold": (2.46,)},
    unit=DOUBLED,
    about="one threshold, test images only",
)
# The first row that fits holds. Defaults of main_earlyExit.py are those of Dyn-Perceiver's program: only its
# training has something left to set. The training settings of the other papers are recipes in scripts/.
TABLE = (
    Procedure(
        family="L2W",
        models=("msdnet*", "ranet*"),
        l2w=True,
        source="https://arxiv.org/abs/2209.08310, end of training",
        evaluation={**RESIZED, "calib": "train_augmented"},
        unit=OPERATIONS,
        about="39 quotas, thresholds from augmented training images",
        near="101 training batches here, all of them there",
    ),
    Procedure(
        family="Dyn-Perceiver",
        models=("*_perceiver_t*",),
        source="https://arxiv.org/abs/2306.11248, main_earlyExit.py",
        training={"decay_embeddings": True},
        evaluation={
            **QUOTAS,
            "quota_sweep": "dyn_perceiver",
            "quota_scales": (0.85, 1.0, 0.5),
            "calib": "train_augmented",
        },
        unit=Unit("GFLOPs", counter="macs", operations=1e9, digits=9),
        about="33 quotas, thresholds from 101 augmented training batches",
        near="multiply-adds here, a hand-written table within 0.5 % of them there",
    ),
    MSDNET,
    replace(
        MSDNET,
        family="RANet",
        models=("ranet*",),
        source="https://arxiv.org/abs/2003.07326, --evalmode dynamic",
    ),
    EBJR,
    replace(
        EBJR,
        family="EBJR on CIFAR-100",
        data_set="CIFAR100",
        evaluation={**PAIR, "router_threshold": (4.6195,)},
        near="the published threshold here; there the default is 2.46, below all scores of 100 classes",
    ),
    Procedure(
        family="ReXNet",
        models=("rexnetv1*",),
        source="https://arxiv.org/abs/2007.00992, timm's script",
        evaluation={"weights": "model", "mode": "anytime"},
        about="accuracy of the one exit, no thresholds",
    ),
)


def published(
    name: str, data_set: str, l2w: bool, options: Mapping[str, Any] | None = None
) -> Procedure | None:
    """The row of registered network `name` on a data set, trained with sample weights or not.

    With its options given, only a row for its number of exits.
    """
    for row in TABLE:
        named = any(fnmatchcase(name, pattern) for pattern in row.models)
        if named and fnmatchcase(data_set, row.data_set) and l2w >= row.l2w:
            fits = row.num_exits is None or options is None or _num_exits(name, options) == row.num_exits
            return row if fits else None
    return None


def _num_exits(name: str, options: Mapping[str, Any]) -> int:
    with torch.device("meta"):
        return create_model(name, **options).num_exits


def implied(wanted: str, row: Procedure | None, *, training: bool = False) -> dict[str, Any]:
    """The flags that procedure `wanted` sets, its name among them, for an evaluation or for training."""
    if wanted == OURS or row is None:
        return {"procedure": OURS}
    return {"procedure": PUBLISHED, **(row.training if training else row.evaluation)}


def row_of(recipe: Recipe) -> Procedure | None:
    """The row of a recipe to train."""
    return published(recipe.network.model, recipe.data.data_set, recipe.weighting.l2w)


def training_recipe(given: Given) -> Recipe:
    """What a command line of main_earlyExit.py trains; its procedure is the published one unless named."""
    values = dict(given.values)
    wanted = values.pop("procedure", PUBLISHED)
    row = row_of(Recipe.of(values, options=given.options))
    return Recipe.of(implied(wanted, row, training=True), values, options=given.options)


def evaluation_line(wanted: str, row: Procedure | None, recipe: Recipe, name: str) -> str:
    """What an evaluation of network `name` as published does, beside our own way; "" if ours is wanted."""
    if wanted == OURS:
        return ""
    if row is None:
        return f"no procedure is published for {name}: it is evaluated in our own way (--procedure {OURS})"
    flags = recipe.flags()
    changed = [name for name in row.evaluation if flags[name] != DEFAULTS[name]]
    here, there = _side(flags, changed, row.unit), _side(DEFAULTS, changed, MACS)
    return f"as published for {row.family}: {row.about} ({here}); --procedure {OURS}: {there}"


def _side(flags: Mapping[str, Any], names: list[str], unit: Unit) -> str:
    words = [word for name in names if flags[name] for word in words_of(name, flags[name])]
    return f"{' '.join(words)}, dynamic.txt in {unit.name}"
