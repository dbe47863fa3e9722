"""A recipe: everything that defines a run, as groups whose fields are the flags of the command line."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from adaptive.exits import Exits
from datasets import Data, Mixing, Transform, View
from experiment.options import Given, fill, given_of, parse, plain
from experiment.published import MODEL_KEY
from experiment.published_commands import refuse_published
from training.l2w import Weighting
from training.losses import Objective
from training.optim import Optimization
from training.resolution import LowStart
from utils import Runtime, UserError, option


@dataclass(frozen=True)
class Network:
    """The network; its own options are flags too."""

    model: str = option("", "registered network or timm/NAME; our checkpoints name theirs")
    recipe: str = option("", "file of flags (YAML); those of the command line go before them")
    procedure: str | None = option(
        None,
        "what is not given is as the network's authors have it, or ours; default: published in "
        "main_earlyExit.py, ours in eval_dynamic.py",
        choices=("published", "ours"),
    )


@dataclass(frozen=True)
class Start:
    """Where weights come from."""

    finetune: str = option("", "checkpoint whose weights to start from, other heads than ours left out")
    model_key: str = option(MODEL_KEY, "where --finetune looks for weights")
    model_prefix: str = option("", "put before the weights' names by --finetune")
    resume: str = option("", "checkpoint to go on from, a file or an https URL")
    auto_resume: bool = option(True, "go on from the last checkpoint in --output_dir")
    other_world_size: Literal["keep", "refuse", "accept"] = option(
        "keep",
        "resumed with another number of processes: keep the images per step (--update_freq changes), refuse, "
        "or accept other ones",
    )
    start_epoch: int = option(0, "epochs taken as done", low=0)


@dataclass(frozen=True)
class Caching:
    """Features of a frozen backbone in files."""

    cache_features: bool = option(False, "--freeze_backbone true: compute the features once, for all epochs")
    cache_views: int = option(
        1, "views of a training image, by turns of epochs: as it is, and augmented from the second on", low=1
    )
    cache_dir: str = option(
        "", "folder of the files, which runs may share; default: features in --output_dir"
    )


@dataclass(frozen=True)
class Session:
    """What a run does beside training."""

    log_dir: str | None = option(None, "folder for TensorBoard")
    print_freq: int = option(50, "batches between two reports", low=1)
    compile: bool = option(False, "torch.compile the forward pass")
    save_ckpt: bool = option(True, "write checkpoints")
    save_ckpt_freq: int = option(1, "epochs between numbered checkpoints", low=1)
    save_ckpt_num: int = option(3, "numbered checkpoints kept; last and best are kept besides", low=0)
    save_every_steps: int = option(0, "optimizer steps between two saves within an epoch; 0: none", low=0)
    save_every_minutes: float = option(15.0, "minutes between two saves within an epoch; 0: none", low=0)
    requeue_code: int = option(
        75,
        "exit code of a run stopped by SIGTERM, SIGUSR1 or Ctrl-C: it is saved, and the same command goes on",
        low=0,
        high=255,
    )
    eval: bool = option(
        False, "evaluate --resume, or the last checkpoint in --output_dir, instead of training"
    )
    disable_eval: bool = option(False, "no evaluation between epochs")
    enable_wandb: bool = option(False, "mirror TensorBoard to Weights & Biases (pip install wandb)")
    project: str = option("dynexit", "project name there")
    local_rank: int = option(-1, "set by launchers, read from the environment")
    world_size: int = option(1, "read from the environment")


@dataclass(frozen=True)
class Unsupported:
    """Accepted with their default only."""

    layer_decay: float = option(1.0, "defined for ConvNeXt only, which is not a model here")
    layer_scale_init_value: float = option(1e-6, "defined for ConvNeXt only, which is not a model here")
    head_init_scale: float = option(1.0, "defined for ConvNeXt only, which is not a model here")
    classifier_type: str = option("cnn", "all exits are always trained; weigh them with --exit_weights")
    resplit: bool = option(False, "splits are made by --num_calib and --seed")
    dist_on_itp: bool = option(False, "start processes with torchrun or SLURM")
    dist_url: str = option("env://", "start processes with torchrun or SLURM")
    dist_eval: bool = option(True, "evaluation is always shared by the processes and exact")
    wandb_ckpt: bool = option(False, "checkpoints stay in --output_dir")
    cka: bool = option(False, "there is no such analysis here")
    visualize: bool = option(False, "there is no such picture here; see report.html of an evaluation")


@dataclass(frozen=True)
class Recipe:
    """A run, group by group; `options` are those of the network's constructor."""

    network: Network = field(default_factory=Network)
    start: Start = field(default_factory=Start)
    data: Data = field(default_factory=Data)
    view: View = field(default_factory=View)
    transform: Transform = field(default_factory=Transform)
    mixing: Mixing = field(default_factory=Mixing)
    optimization: Optimization = field(default_factory=Optimization)
    objective: Objective = field(default_factory=Objective)
    weighting: Weighting = field(default_factory=Weighting)
    low_start: LowStart = field(default_factory=LowStart)
    caching: Caching = field(default_factory=Caching)
    exits: Exits = field(default_factory=Exits)
    runtime: Runtime = field(default_factory=Runtime)
    session: Session = field(default_factory=Session)
    unsupported: Unsupported = field(default_factory=Unsupported)
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, *values: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> "Recipe":
        """The recipe from these flags; later `values` win, and missing ones have their defaults.

        Images in a folder are ImageNet's unless a data set is named.
        """
        implied = {"data_set": "IMNET"} if any(given.get("data_path") for given in values) else {}
        groups = {name: fill(group, implied, *values) for name, group in GROUPS.items()}
        return cls(**groups, options=options or {})

    def flags(self) -> dict[str, Any]:
        """All flags by name, as plain types."""
        return plain(*(getattr(self, name) for name in GROUPS))

    def command(self) -> str:
        """The command line that repeats this run: the flags that are not at their defaults."""
        changed = {name: value for name, value in self.flags().items() if value != DEFAULTS[name]}
        words = [words_of(name, value) for name, value in {**changed, **self.options}.items()]
        return shlex.join(sum(words, []))


GROUPS: dict[str, type] = {entry.name: entry.type for entry in fields(Recipe) if entry.name != "options"}
NESTS = dict, list, tuple, set  # which a few lines of YAML may make larger than any memory
DEFAULTS = plain(*(group() for group in GROUPS.values()))


def read_command(groups: list[type], argv: list[str]) -> Given:
    """What a command line gives of some groups; its `--recipe` file fills the rest. Raises ValueError.

    A command line of another paper's program is answered with the command here.
    """
    refuse_published(argv)
    path = given_of("recipe", argv)
    given = parse(groups, [*read_recipe(path), *argv] if path else argv)
    given.values.pop("recipe", None)  # its flags are given now
    return given


def read_recipe(path: str) -> list[str]:
    """The flags in a YAML file (NAME: VALUE), as the words of a command line."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the second of a date such as 2001-99-99
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "recipe" in content:
        held = "a recipe" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"recipe {path} holds {held}, expected flags as NAME: VALUE")
    given = {name: value for name, value in content.items() if value not in (None, [])}
    for name, value in given.items():
        if any(isinstance(part, NESTS) for part in (value if isinstance(value, list) else [value])):
            raise UserError(f"recipe {path}: {name} is nested, accepted: a value or a list of values")
    try:
        return [word for name, value in given.items() for word in words_of(name, value)]
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"recipe {path}: {error}") from None


def words_of(name: str, value: Any) -> list[str]:
    """A flag and its value as words of a command line."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{name}", *(str(one).lower() if isinstance(one, bool) else str(one) for one in values)]
