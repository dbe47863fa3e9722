"""Command lines of the other papers' programs, in our flags.

Dyn-Perceiver's flags are ours, so that its command lines run as they are. One with flags that only another
program has is answered with the command that does the same here: by its user's values, and by that program's
own defaults where it is silent.
"""

import re
import shlex

from models import list_models, model_options
from utils import UserError

Flags = dict[str, str]  # the words after each flag


def _inverted(lines: str) -> Flags:
    """Of lines "name: word word", the name for each word."""
    pairs = [line.partition(":") for line in lines.strip().splitlines()]
    return {word: name for name, _, words in pairs for word in words.split()}


# Our flag, and theirs for it. Those of the last lines mean nothing here: devices, launchers, and the like.
RENAMED = _inverted("""
output_dir: train_url save output
data_path: data_url data_root data_dir
checkpoint: evaluate_from
arch: a
tarch: ta
data: d dataset
batch_size: b
num_workers: j workers
print_freq: p log_interval
lr: learning_rate
weight_decay: wd
use_amp: amp native_amp
schedule: sched
router_threshold: th
seed: manualSeed
dropRate: drop dropout
width_mult: rex_width_mult
input_size: img_size
finetune: initial_checkpoint
: gpu gpu_id world_size rank dist_url dist_backend multiprocessing_distributed round finetune_from index_path
: num_sample_valid arch_config optimizer decay_rate e evaluate c tc tcheckpoint test_batch warmup_lr dist_bn
: bnAfter
""")
SWITCHES = {"use_valid", "use_amp", "model_ema", "channels_last", "pin_mem"}  # only true or false may follow
DATA_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "imagenet": "IMNET"}

# Programs, and flags by which they are known: no command line of ours has them.
MARKS = _inverted("""
EBJR: tresume tarch ta tdepth tgrowthRate tblock_name tcheckpoint test_batch th
timm: rex_width_mult sched amp native_amp warmup_lr dist_bn log_interval
L2W: train_url data_url index_path finetune_from num_sample_valid arch_config
MSDNet: data_root use_valid evalmode evaluate_from arch a lr_type
""")

# The programs' own defaults, and what they always do.
OPTIONS = {
    "msdnet": "--nBlocks 1 --nChannels 32 --base 4 --stepmode lin_grow --step 1 --growthRate 6 "
    "--grFactor 1-2-4 --bnFactor 1-2-4 --prune max --bottleneck true --reduction 0.5",
    "ranet": "--nBlocks 2 --block_step 2 --nChannels 16 --growthRate 6 --grFactor 4-2-1 --bnFactor 4-2-1 "
    "--scale_list 1-2-3 --step 4 --stepmode even --compress_factor 0.25 --reduction 0.5",
}
SGD = (
    "--epochs 300 --batch_size 64 --opt sgd --lr 0.1 --min_lr 0 --momentum 0.9 --weight_decay 1e-4 "
    "--filter_bias_and_bn false --warmup_epochs 0 --smoothing 0 --mixup 0 --cutmix 0 --aa none "
    "--color_jitter 0 --reprob 0 --num_calib 0 --drop_last false"
)
WEIGHTING = (
    "--l2w true --target_p_index 20 --meta_net_hidden_size 100 --meta_net_num_layers 1 --meta_interval 1 "
    "--meta_lr 1e-5 --meta_weight_decay 0 --meta_net_input_type both"
)
PAIR = (
    "--data cifar10 --data_path data --router_threshold 2.46 --dropRate 0 --cardinality 8 --widen_factor 4 "
    "--compressionRate 2 --arch densenet --depth 52 --growthRate 6 --block_name BasicBlock "
    "--resume checkpoints/cifar10/densenet-bc-52-6/model_best.pth.tar "
    "--tarch densenet --tdepth 64 --tgrowthRate 12 --tblock_name BasicBlock "
    "--tresume checkpoints/cifar10/densenet-bc-64-12/model_best.pth.tar"
)
REXNET = (
    "--data_set IMNET --epochs 300 --batch_size 128 --opt sgd --lr 0.05 --min_lr 1e-5 --momentum 0.9 "
    "--weight_decay 2e-5 --warmup_epochs 3 --smoothing 0.1 --mixup 0 --cutmix 0 --aa none --reprob 0 "
    "--num_calib 0"
)


def refuse_published(argv: list[str]) -> None:
    """Raises ValueError with the command to give here, if a command line is another program's."""
    given, others = _read(argv)
    model = given.get("model", "")
    programs = {MARKS[name] for name in given if name in MARKS}
    if model in list_models() and not model.startswith("rexnet"):
        programs.discard("timm")  # a slip in a command of ours
    if not model and given.get("data", "").lower() in DATA_SETS:
        programs.add("MSDNet")
    if not programs:
        return
    flags = {RENAMED.get(name, name): value for name, value in given.items()}
    flags.pop("", None)
    if "EBJR" in programs:
        program, words = "EBJR", _pair(flags)
    elif "timm" in programs:
        program, words = "timm", _timm(flags, others)
    else:
        program = "RANet" if flags.get("arch", "").lower() == "ranet" else "MSDNet"
        program = "L2W" if "L2W" in programs or "epsilon" in given else program
        words = _dense(flags, program)
    raise UserError(f"this is {program}'s command line; here: {words}")


def _read(argv: list[str]) -> tuple[Flags, list[str]]:
    """The flags of a command line, "_" for "-" in their names, and the words that belong to none."""
    flags: Flags = {}
    others: list[str] = []
    name = ""
    for word in argv:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            flags[name] = shlex.quote(value) if equals else ""
        elif name and (RENAMED.get(name, name) not in SWITCHES or word.lower() in ("true", "false")):
            flags[name] = f"{flags[name]} {shlex.quote(word)}".strip()
        else:
            others.append(shlex.quote(word))
    return flags, others


def _defaults(text: str) -> Flags:
    return _read(text.split())[0]


def _command(script: str, flags: Flags) -> str:
    return " ".join([script, *(f"--{name} {value or 'true'}" for name, value in flags.items())])


def _data_set(theirs: str) -> str:
    return DATA_SETS.get(theirs.lower(), theirs)


def _dense(given: Flags, program: str) -> str:
    """MSDNet's, RANet's and L2W's programs, which have one parser; with `--evalmode` they evaluate."""
    name = "ranet" if given.pop("arch", "").lower() == "ranet" else "msdnet"
    data_set = _data_set(given.pop("data", "cifar10"))
    options = {"stem": "imagenet" if data_set == "IMNET" else "cifar", **_defaults(OPTIONS[name])}
    options |= {key: value for key, value in given.items() if key in model_options(name)}
    if name == "msdnet" and options["stepmode"] != "even":
        options["stepmode"] = "lin_grow"  # as theirs takes every other word
    others = _defaults(" ".join(OPTIONS.values())).keys()
    network = {"model": name, **options, "data_set": data_set}
    given = {key: value for key, value in given.items() if key not in others}
    if program == "L2W":
        given.pop("use_valid", None)  # not read there: it trains on all images
    mode = given.pop("evalmode", "")
    return _evaluating(network, given, program, mode) if mode else _training(network, given, program)


def _training(network: Flags, given: Flags, program: str) -> str:
    settings = _defaults(f"{SGD} {WEIGHTING}" if program == "L2W" else SGD) | given
    if settings.pop("use_valid", None) is not None:
        del settings["num_calib"]
    small = network["data_set"] != "IMNET"
    if settings.pop("lr_type", "multistep") == "multistep" and program != "L2W":  # which has a cosine always
        epochs = _epochs_of(settings["epochs"])
        milestones = [epochs // 2, epochs * 3 // 4] if small else range(30, epochs, 30)
        settings |= {"schedule": "multistep", "decay_epochs": " ".join(map(str, milestones))}
    bilinear = dict.fromkeys(["train_interpolation", "interpolation"], "bilinear")
    settings |= {"download": "true"} if small else bilinear
    return _command("python main_earlyExit.py", network | settings)


def _epochs_of(word: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", word):
        raise UserError(f"--epochs {word[:40]}: accepted: a whole number of at most five digits")
    return int(word)


def _evaluating(network: Flags, given: Flags, program: str, mode: str) -> str:
    file = given.get("checkpoint") or given.get("resume") or "FILE"
    ours = ("data_path", "output_dir", "batch_size", "num_workers")
    kept = {key: given[key] for key in ours if key in given}
    mode = "anytime" if mode == "anytime" else "dynamic"
    images = {}
    if mode == "dynamic" and "use_valid" not in given:  # the test images, of which half are an honest choice
        images = {"calib": "train_augmented" if program == "L2W" else "half_test"}
    words = {"checkpoint": file, **network, **kept, "procedure": "published", "mode": mode, **images}
    return _command("python eval_dynamic.py", words)


def _pair(given: Flags) -> str:
    """EBJR's program, which evaluates a student and a teacher."""
    flags = _defaults(PAIR) | given
    teacher = {key.removeprefix("t"): value for key, value in flags.items() if key[0] == "t"}
    networks = []
    for side in (flags, flags | teacher):
        name = f"cifar_{side['arch']}"
        own = [f"{key}={side[key]}" for key in model_options(name) if key in side]
        networks.append(f"{name}:{','.join([*own, 'weights=' + side['resume']])}")
    words = {"model": "ebjr", "networks": " ".join(networks), "data_set": _data_set(flags["data"])}
    kept = ("data_path", "num_workers", "seed", "router_threshold")
    words |= {key: flags[key] for key in kept if key in flags}
    return _command("python eval_dynamic.py", words | {"procedure": "published"})


def _timm(given: Flags, others: list[str]) -> str:
    """timm's training script, with the flag that ReXNet's authors added."""
    flags = _defaults(REXNET) | given
    name = re.sub(r"^rexnet_(?=\d)", "rexnetv1_", flags.pop("model", "rexnetv1"))
    name = name if name.startswith("rexnetv1") else f"timm/{name}"
    if "dropRate" in flags:
        option = "dropout_ratio" if "dropout_ratio" in model_options(name) else "drop_rate"
        flags[option] = flags.pop("dropRate")
    flags["opt"] = {"sgd": "nesterov", "momentum": "sgd"}.get(flags["opt"], flags["opt"])  # what timm means
    script = "python main_earlyExit.py"
    if others and others[0].isdigit():  # of its launcher: the number of GPUs
        script = f"python scripts/launch.py --nproc_per_node={others[0]} main_earlyExit.py"
        others = others[1:]
    if others:
        flags["data_path"] = others[0]
    return _command(script, {"model": name, **flags})
