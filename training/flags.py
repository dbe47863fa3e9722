"""The command line as tables: what a flag is, how a table is parsed, and the flags of training, with their
checks."""

import argparse
import re
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import Any, NamedTuple

from models import kind_of

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class Flag(NamedTuple):
    """One command-line flag: `kind` is int, float, str or bool; `many` takes a list; `low` is the least
    accepted."""

    name: str
    kind: type
    default: Any
    help: str = ""
    many: bool = False
    low: float | None = None
    choices: tuple[str, ...] = ()

    def convert(self, word: str) -> Any:
        """The value that `word` stands for; a list if `many`, of numbers joined by dashes or commas or of
        one."""
        if self.many:
            one = self._replace(many=False)
            if self.kind is str:
                return [one.convert(word)]
            return [one.convert(part) for part in re.split(r"(?<=\d)-|,", word)]
        if self.kind is bool:
            if word.lower() not in TRUE + FALSE:
                raise argparse.ArgumentTypeError(f"{word!r} is not true or false")
            return word.lower() in TRUE
        try:
            value = self.kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not of type {self.kind.__name__}") from None
        if self.low is not None and not value >= self.low:
            raise argparse.ArgumentTypeError(f"{word} is below the least value accepted, {self.low}")
        if self.choices and value not in self.choices:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(self.choices)}")
        return value

    def restore(self, value: Any) -> Any:
        """A `value` read from a file, as the command line would have it; None stays None."""
        if value is None:
            return None
        if self.many:
            return [self._replace(many=False).convert(str(part)) for part in value]
        return self.convert(str(value))

    def add_to(self, group: Any) -> None:
        """Declares the flag in an argparse group."""
        text = "; ".join(
            filter(None, [self.help, ", ".join(self.choices), f"default: {_words(self.default)}"])
        )
        group.add_argument(
            f"--{self.name}",
            type=self.convert,
            nargs="+" if self.many else None,
            action=_Flatten if self.many else "store",
            metavar="LIST" if self.many else self.kind.__name__.upper(),
            help=text.replace("%", "%%"),
        )


def flags_of_signature(parameters: dict[str, Parameter]) -> list[Flag]:
    """The flags that a constructor's keyword parameters make, by their annotations and defaults."""
    flags = []
    for name, parameter in parameters.items():
        kind, many = kind_of(parameter.annotation)
        flags.append(Flag(name, kind, parameter.default, many=many))
    return flags


def parse_flags(
    groups: dict[str, list[Flag]],
    argv: list[str],
    options_of: Callable[[str], dict[str, Parameter]],
    nearest: Callable[[str, Iterable[str]], str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parses a command line by a table of flags and the options of the model that `--model` names.

    `options_of(name)` gives a model's options, `nearest(word, words)` the end of a message about a misspelt
    word. Returns what was given of the table's flags and of the model's options. "-" equals "_" in flag
    names. Raises ValueError.
    """
    argv = [_underscored(word) for word in argv]
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", default="")
    model = finder.parse_known_args(argv)[0].model
    table = {flag.name for flags in groups.values() for flag in flags}
    options = [
        flag for flag in flags_of_signature(options_of(model) if model else {}) if flag.name not in table
    ]
    epilog = None if model else "With --model NAME, the options of that network are listed too."
    parser = _Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, epilog=epilog)
    for name, flags in {**groups, f"options of {model}": options}.items():
        group = parser.add_argument_group(name)
        for flag in flags:
            flag.add_to(group)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name}" for name in (*table, *(flag.name for flag in options))]
        hint = "" if model else "; a network's options need --model NAME"
        raise ValueError(f"unknown flag {unknown[0]}; {nearest(unknown[0], names)[:300]}{hint}")
    chosen = {flag.name for flag in options}
    return tuple(
        {k: v for k, v in vars(given).items() if (k in chosen) == wanted} for wanted in (False, True)
    )


def with_defaults(groups: dict[str, list[Flag]], *given: dict[str, Any]) -> argparse.Namespace:
    """The table's flags: defaults, replaced by what each of `given` has of them, the later ones first."""
    flags = {flag.name: flag.default for flags in groups.values() for flag in flags}
    for values in given:
        flags.update({name: value for name, value in values.items() if name in flags})
    return argparse.Namespace(**flags)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))


class _Flatten(argparse.Action):
    """Joins the lists that the words of a list flag stand for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# Names and defaults are those of Dyn-Perceiver's script.
MODEL_FLAG = Flag("model", str, "", "registered network or timm/NAME; our checkpoints name theirs")
MODEL_FLAGS = [
    Flag("finetune", str, "", "checkpoint whose weights to start from, other heads than ours left out"),
    Flag("model_key", str, "model|module|state_dict_ema", "where --finetune looks for weights"),
    Flag("model_prefix", str, "", "put before the weights' names by --finetune"),
]
TRANSFORM_FLAGS = [
    Flag("color_jitter", float, 0.4, "strength of colour jitter where --aa is off", low=0),
    Flag("aa", str, "rand-m9-mstd0.5-inc1", "timm's auto augmentation policy, or none"),
    Flag("train_interpolation", str, "bicubic", "bicubic, bilinear, random ..."),
    Flag(
        "scale",
        float,
        (0.08, 1.0),
        "least and largest share of the area that a training crop takes",
        many=True,
    ),
    Flag("reprob", float, 0.25, "probability of random erasing", low=0),
    Flag("remode", str, "pixel", "what is erased with: const, rand or pixel"),
    Flag("recount", int, 1, "boxes erased per image", low=1),
]
AUGMENTATION_FLAGS = [
    *TRANSFORM_FLAGS,
    Flag("smoothing", float, 0.1, "label smoothing", low=0),
    Flag("mixup", float, 0.8, "mixup alpha, 0 = off", low=0),
    Flag("cutmix", float, 1.0, "cutmix alpha, 0 = off", low=0),
    Flag("cutmix_minmax", float, None, "least and largest cutmix box instead of an alpha", many=True),
    Flag("mixup_prob", float, 1.0, "probability of mixing a batch", low=0),
    Flag("mixup_switch_prob", float, 0.5, "probability of cutmix where both are on", low=0),
    Flag("mixup_mode", str, "batch", "batch, pair or elem"),
]
OPTIMIZATION_FLAGS = [
    Flag("epochs", int, 300, "", low=1),
    Flag("update_freq", int, 1, "micro-batches per optimizer step", low=1),
    Flag("opt", str, "adamw", "any optimizer of timm; sgd is plain SGD with momentum"),
    Flag("opt_eps", float, 1e-8, "", low=0),
    Flag("opt_betas", float, None, "", many=True),
    Flag("momentum", float, 0.9, "", low=0),
    Flag("weight_decay", float, 0.05, "", low=0),
    Flag("weight_decay_end", float, None, "final weight decay of a cosine; default: constant", low=0),
    Flag("filter_bias_and_bn", bool, True, "no weight decay for biases and other 1-D parameters"),
    Flag(
        "decay_embeddings",
        bool,
        False,
        "weight decay for Dyn-Perceiver's latents and positions too, as published",
    ),
    Flag("clip_grad", float, None, "largest gradient norm", low=0),
    Flag("lr", float, 4e-3, "peak learning rate, never scaled by the batch", low=0),
    Flag("lr_scales", str, (), "rates of parts, in multiples of --lr: features.=0.1 ...", many=True),
    Flag("min_lr", float, 1e-6, "final learning rate of the cosine", low=0),
    Flag("schedule", str, "cosine", "", choices=("cosine", "multistep", "constant")),
    Flag("decay_epochs", int, (), "epochs at which multistep decays", many=True, low=0),
    Flag("decay_rate", float, 0.1, "what multistep multiplies by", low=0),
    Flag("warmup_epochs", int, 20, "", low=0),
    Flag("warmup_steps", int, -1, "optimizer steps of warm-up, instead of epochs where above 0"),
    Flag("model_ema", bool, False, "keep a moving average of the weights"),
    Flag("model_ema_decay", float, 0.9999, "", low=0),
    Flag(
        "model_ema_warmup", bool, False, "forget the first steps sooner, as timm does: for runs of few steps"
    ),
    Flag("model_ema_force_cpu", bool, False, "keep the average in main memory"),
    Flag("model_ema_eval", bool, False, "evaluate the average too, and choose the best checkpoint by it"),
]
OBJECTIVE_FLAGS = [
    Flag("exit_weights", float, None, "weight of each exit's loss; default: all 1", many=True, low=0),
    Flag("loss_att_factor", float, None, "four exits: weight of exits 0 and 1", low=0),
    Flag("loss_cnn_factor", float, None, "four exits: weight of exit 2", low=0),
    Flag("loss_merge_factor", float, None, "four exits: weight of exit 3", low=0),
    Flag("with_kd", bool, False, "the last exit teaches the others"),
    Flag("kd_teacher", str, "", "checkpoint of a network that teaches all exits"),
    Flag("T_kd", float, 4.0, "distillation temperature", low=1e-6),
    Flag("alpha_kd", float, 0.5, "distillation weight", low=0),
    Flag("energy_hinge", float, (), "popular classes: weight, energy of others, energy of these", many=True),
    Flag(
        "regime", str, "joint", "how exits are trained", choices=("joint", "equilibrium", "disjoint", "mixed")
    ),
    Flag("freeze_backbone", bool, False, "train the heads alone, on features that stay as they are"),
    Flag(
        "first_share",
        float,
        0.5,
        "disjoint, mixed: share of the epochs that train the last exit alone",
        low=0,
    ),
]
# Named as in L2W's trainers; the defaults are its settings for CIFAR.
L2W_FLAGS = [
    Flag("l2w", bool, False, "learn to weight samples"),
    Flag(
        "target_p_index",
        int,
        15,
        "p: exit k is judged by a share of the samples that goes with (p / 20)^k",
        low=1,
    ),
    Flag("epsilon", float, 0.8, "how far weights may be from 1; above 0.5 they can be negative", low=0),
    Flag(
        "constraint_dimension",
        str,
        "col",
        "totals kept: all, exits', samples'",
        choices=("mat", "row", "col"),
    ),
    Flag("meta_net_input_type", str, "loss", "what the weight net reads", choices=("loss", "conf", "both")),
    Flag("meta_net_hidden_size", int, 500, "units of its hidden layers", low=1),
    Flag("meta_net_num_layers", int, 1, "hidden layers", low=1),
    Flag("meta_interval", int, 1, "batches between two steps of the weight net", low=1),
    Flag("meta_lr", float, 1e-4, "its peak learning rate", low=0),
    Flag("meta_weight_decay", float, 1e-4, "", low=0),
    Flag("l2w_tables", int, 0, "epochs between files of every sample's weights and losses; 0 = none", low=0),
]
RUN_FLAGS = [
    Flag("output_dir", str, "", "where results go; default when evaluating: beside the checkpoint"),
    Flag("device", str, "auto", "auto, cpu, cuda or cuda:N"),
    Flag(
        "batch_size", int, 64, "images per process and micro-batch; evaluation takes 1.5 times as many", low=1
    ),
    Flag("num_workers", int, 10, "data loading processes", low=1),
    Flag("pin_mem", bool, True, "load into pinned memory (GPU only)"),
    Flag("use_amp", bool, False, "mixed precision"),
    Flag(
        "amp_dtype", str, "auto", "its type; auto: fp16 on GPU, bf16 on CPU", choices=("auto", "bf16", "fp16")
    ),
    Flag("channels_last", bool, False, "channels-last memory format"),
    Flag("flops", bool, False, "print what every exit costs, under each convention"),
]
TRAIN_RUN_FLAGS = [
    Flag("log_dir", str, None, "folder for TensorBoard"),
    Flag("print_freq", int, 50, "batches between two reports", low=1),
    Flag("compile", bool, False, "torch.compile the forward pass"),
    Flag("resume", str, "", "checkpoint to go on from, a file or an https URL"),
    Flag("auto_resume", bool, True, "go on from the last checkpoint in --output_dir"),
    Flag("start_epoch", int, 0, "", low=0),
    Flag("save_ckpt", bool, True, "write checkpoints"),
    Flag("save_ckpt_freq", int, 1, "epochs between numbered checkpoints", low=1),
    Flag("save_ckpt_num", int, 3, "numbered checkpoints kept; last and best are kept besides", low=0),
    Flag(
        "eval", bool, False, "evaluate --resume, or the last checkpoint in --output_dir, instead of training"
    ),
    Flag("disable_eval", bool, False, "no evaluation between epochs"),
    Flag("enable_wandb", bool, False, "mirror TensorBoard to Weights & Biases (pip install wandb)"),
    Flag("project", str, "dynexit", "project name there"),
    Flag("local_rank", int, -1, "set by launchers, read from the environment"),
    Flag("world_size", int, 1, "read from the environment"),
]
# Flags of that script which cannot do anything here: the one value accepted, and why no other is.
REFUSED = {
    "layer_decay": (1.0, "defined for ConvNeXt only, which is not a model here"),
    "layer_scale_init_value": (1e-6, "defined for ConvNeXt only, which is not a model here"),
    "head_init_scale": (1.0, "defined for ConvNeXt only, which is not a model here"),
    "classifier_type": ("cnn", "all exits are always trained; weigh them with --exit_weights"),
    "resplit": (False, "splits are made by --num_calib and --seed"),
    "dist_on_itp": (False, "start processes with torchrun or SLURM"),
    "dist_url": ("env://", "start processes with torchrun or SLURM"),
    "dist_eval": (True, "evaluation is always shared by the processes and exact"),
    "wandb_ckpt": (False, "checkpoints stay in --output_dir"),
    "cka": (False, "there is no such analysis here"),
    "visualize": (False, "there is no such picture here; see report.html of an evaluation"),
}

GROUPS = {
    "model": [MODEL_FLAG, *MODEL_FLAGS],
    "augmentation": AUGMENTATION_FLAGS,
    "optimization": OPTIMIZATION_FLAGS,
    "objective": OBJECTIVE_FLAGS,
    "sample weighting (L2W)": L2W_FLAGS,
    "running": [*RUN_FLAGS, *TRAIN_RUN_FLAGS],
    "accepted with their default only": [Flag(name, type(v), v, why) for name, (v, why) in REFUSED.items()],
}


def check(args: argparse.Namespace) -> None:
    """Refuses combinations that no single flag's limits catch."""
    for name, (accepted, reason) in REFUSED.items():
        if getattr(args, name) != accepted:
            raise ValueError(f"--{name} {getattr(args, name)} is not supported: {reason}")
    if not args.model:
        raise ValueError("name a network: --model NAME")
    for name in ("opt_betas", "cutmix_minmax", "scale"):
        if len(getattr(args, name) or (0, 1)) != 2:
            raise ValueError(f"--{name} {getattr(args, name)}: give two numbers")
    for name in ("first_share", "model_ema_decay"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name} {getattr(args, name)}: at most 1")
    if args.batch_size < 2:
        raise ValueError("--batch_size 1: batch norm needs 2 images or more to train on")
    if args.smoothing >= 1:
        raise ValueError(f"--smoothing {args.smoothing}: it must be below 1")
    if args.schedule == "multistep" and not args.decay_epochs:
        raise ValueError("--schedule multistep needs --decay_epochs")
    if args.freeze_backbone and (args.l2w or args.regime != "joint"):
        raise ValueError(
            "--freeze_backbone true trains heads, jointly: not for --l2w true or another --regime"
        )
    if args.compile and (args.l2w or args.freeze_backbone or args.regime != "joint"):
        raise ValueError(
            "--compile true compiles the plain forward pass: not for --l2w true, --freeze_backbone or another --regime"
        )
    if args.enable_wandb and not args.log_dir:
        raise ValueError("--enable_wandb mirrors TensorBoard: give --log_dir")
    mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixed and args.batch_size % 2:
        raise ValueError(f"--batch_size {args.batch_size}: mixup and cutmix need an even number")
    if args.energy_hinge and (len(args.energy_hinge) != 3 or not args.popular_classes or mixed or args.l2w):
        raise ValueError(
            "--energy_hinge takes three numbers, with --popular_classes, without mixup, cutmix and L2W"
        )
    if args.l2w:
        _check_l2w(args, mixed)


def _check_l2w(args: argparse.Namespace, mixed: bool) -> None:
    if mixed:
        raise ValueError("--l2w true weighs samples of one class each: give --mixup 0 --cutmix 0")
    if args.batch_size < 4:
        raise ValueError(
            f"--batch_size {args.batch_size}: L2W trains on halves of a batch and needs at least 4"
        )
    if args.regime in ("disjoint", "mixed"):
        raise ValueError(
            f"--regime {args.regime}: L2W weighs all exits at once; accepted: joint, equilibrium"
        )
    if args.target_p_index > 39:
        raise ValueError(f"--target_p_index {args.target_p_index}: accepted: 1 to 39, 20 for equal shares")
    if args.opt.lower().startswith("lookahead_"):
        raise ValueError(
            f"--opt {args.opt}: L2W looks one step of SGD ahead and cannot read this optimizer's state"
        )
