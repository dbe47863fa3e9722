"""Every command and every program in README.md and docs/ runs, on small networks and data.

A bash block is cut into commands. Each is made small by the table `SMALLER` (words put at its end, where they win) and
run in an empty folder in which the files it names have been made (`FILES`); a recipe is run by bash with a python that
notes what it would start, which is then run. Commands in `PARSED` cannot run here: only their flags are checked. A
Python block is run with its files made. Blocks of `OUTPUT` are not run. Whatever fits no table fails: extend them.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import eval_dynamic
import main_earlyExit
from models import create_model

pytestmark = pytest.mark.usefixtures("costs_once", "no_pictures")  # they have tests of their own
ROOT = Path(__file__).resolve().parents[1]
OUTPUT = {"", "text"}  # what a command prints, a diagram

# (pattern in a command, words that make it small); all that fit are put at the command's end, in this order.
RUN = "--num_workers 0 --device cpu"
SMALL_MSDNET = "--model msdnet --nBlocks 2 --nChannels 4 --growthRate 4 --grFactor 1-2 --bnFactor 1-2"
SMALL_RANET = "--model ranet --nBlocks 1 --nChannels 8 --growthRate 4 --scale_list 1-2-3 --grFactor 4-2-1 --bnFactor 4-2-1"
FOLDER = "--data_set image_folder --data_path $DATA/imagenet --input_size 64"
NPZ = "--data_path $DATA/cifar{0}_train.npz --eval_data_path $DATA/cifar{0}_test.npz"
SMALLER = [
    (r"^main_earlyExit.py", f"{RUN} --epochs 1 --batch_size 8 --save_ckpt_num 0 --warmup_epochs 0"),
    (r"--schedule multistep", "--decay_epochs 1"),
    (r"--global_batch", "--global_batch 8"),
    (r"--accuracy", "--accuracy 0"),  # no more can be asked of a network that saw 24 images of noise
    (r"^eval_dynamic.py", f"{RUN} --batch_size 8 --runtime_images 2 --micro_batch 2"),
    (r"--data_set CIFAR10 ", NPZ.format(10)),
    # Evaluated is a run on the stand-in of CIFAR-10.
    (r"^eval_dynamic.py .*\bruns/.*--data_path \S*/cifar", NPZ.format(10)),
    (r"^eval_dynamic.py --checkpoint runs/(quickstart|resnet10t)", NPZ.format(10)),
    (r"--accuracy", "--accuracy 0"),
    (r"--data_set CIFAR100 ", NPZ.format(100)),
    (r"--data_set (IMNET|shards)", "--input_size 64"),
    # Digits, which are also what a run trains on that names no data.
    (
        r"--data_set DIGITS|^main_earlyExit.py (?!.*--(data_set|recipe|help))",
        f"--data_set CIFAR10 --num_calib 4 {NPZ.format(10)}",
    ),
    (r"--data_set Flowers102", FOLDER),
    (r"--model msdnet_cifar", SMALL_MSDNET),
    (r"--model msdnet_imagenet", f"{SMALL_MSDNET} --stem imagenet"),
    (r"--model ranet_imagenet", f"{SMALL_RANET} --stem imagenet"),
    (
        r"--model (reg|resnet50_|mobilenetV3_)\w+perceiver",
        "--model reg400m_perceiver_t32 --input_size 32",
    ),
    (r"--model cifar_resnet --depth", "--depth 8"),
    (r"--model timm_ee", "--backbone resnet10t --pretrained false --head_width 8"),
    (r"^eval_dynamic.py.*(dyn_regnet|dp_c10)", "--mode dynamic --flops false"),
    (r"--budget 20e6", "--budget 4e6 --mode dynamic"),
    (r"--latency 5ms", "--latency 10s --mode dynamic"),
    (r"^eval_dynamic.py.*(--confidence_level|--policy )", "--mode dynamic"),
    (r"^scripts/(compare_policies|measure_confidence).py", "--halves 2"),
    (
        r"^scripts/bench_monitor.py",
        "--streams 4 --length 50 --changes 0 20 --after 30 --reference 20 --shifted_images 8",
    ),
    (r"--networks timm/", "--networks" + 2 * " timm/resnet10t:weights=weights/resnet50.pth"),
    (r"--cache_features", "--input_size 64"),
    (r"^eval_dynamic.py.*runs/lite0", "--mode dynamic"),
    (
        r"^scripts/bench_features.py",
        f"{RUN} --images 8 --rounds 1 --batch_size 8 --networks vit_ee:test_vit:32 --exits 2 --head_width 8",
    ),
    (r"^scripts/bench_latency.py", "--models cifar_resnet --input_size 32 --rounds 1"),
    (r"^scripts/bench_thresholds.py", "--samples 300"),
    (r"^scripts/bench_ebjr.py", "--rounds 1 --product 256"),
    (
        r"^scripts/bench_loader.py",
        "--batches 1 --rounds 1 --workers 0 --device cpu --batch_size 8",
    ),
    (r"^scripts/compare_cascades.py", f"{RUN} --steps 3 --budgets 1e9 --drop 1"),
]
# (pattern in a word, what stands there instead), where words at the end cannot win.
REPLACED = [
    (r"cifar_densenet_\w+:", "cifar_resnet:depth=8,"),
    (r"cifar_densenet:depth=\d+,growthRate=\d+", "cifar_resnet:depth=8"),
]
# Commands that cannot run here: their flags are checked, and what runs them, or why nothing does, is said.
PARSED = [
    (
        r"^scripts/(main_detection.py.*--data_path|bench_detection.py|eval_detection_cascade.py)",
        "tests/detection",
    ),
    (r"weights/reg800m_t128.pth.*--quota_sweep|reg800m_t128.pth.*--quota_sweep", "tests/test_published.py"),
    (r"^scripts/eval_ebjr_imagenet.py", "weights are packages that are not installed"),
    (r"^scripts/convert_checkpoint.py", "tests/scripts/test_convert_checkpoint.py"),
    (
        r"^scripts/(bench_monitor|bench_search|check_guarantees|compare_policies|measure_confidence).py",
        "their tests in tests/scripts: they draw images hundreds of times",
    ),
    (r"^scripts/(bench_checkpoint|chaos|compare_regimes|profile_step).py", "their tests in tests/scripts"),
    (r"^eval_dynamic.py.*--export", "tests/deploy: exports take seconds each"),
    (
        r"^scripts/(bench_(backends|scenarios|server)|check_export|compare_earlyon|measure_precision).py",
        "their tests in tests/scripts: they export networks",
    ),
    (r"^main_earlyExit.py --model rexnet_ee", "tests/test_objectives.py"),
]
# Commands of which nothing is checked here, and what runs them.
ELSEWHERE = [(r"^(curl|serve|python -m deploy\.server|python runs/deployed/runner\.py) ", "tests/deploy")]
NOT_OURS = {"-m pytest", "ruff", "pyrefly", "shellcheck"}  # what a recipe may start besides our scripts


def state_of(name: str, classes: int, **options: object) -> dict:
    """Weights of a network of ours."""
    torch.manual_seed(0)
    return create_model(name, classes, **options).state_dict()


def small_msdnet() -> dict:
    """Weights of `SMALL_MSDNET` on images of ImageNet's size, as its authors store them."""
    lists = {"grFactor": (1, 2), "bnFactor": (1, 2)}
    return {
        "state_dict": state_of("msdnet", 2, stem="imagenet", nBlocks=2, nChannels=4, growthRate=4, **lists)
    }


# Pattern in a file's name, and what such a file holds; a folder runs/NAME is that of a small run and its evaluation.
FILES = {
    r"52-6|64-12|STUDENT|TEACHER": lambda: {"state_dict": state_of("cifar_resnet", 10, depth=8)},
    r"resnet(18|50)\.pth|^FILE|lite0": lambda: timm.create_model("resnet10t", num_classes=2).state_dict(),
    r"rexnetv1": lambda: state_of("rexnetv1", 1000),
    r"reg800m": lambda: state_of("reg400m_perceiver_t32", 1000),
    r"msdnet-step4": small_msdnet,
}
ONE_EXIT = r"runs/(student|teacher|special|small|large)"  # these runs are of a network with one exit
A_FILE = re.compile(
    r"[\w./-]*\.(?:pth\.tar|pth|pt|npz)\b|\b(?:FILE|STUDENT|TEACHER)\b|\bruns/\w+(?:/[\w.-]+)?"
)


# Blocks


class Block(NamedTuple):
    """A fenced block: where it is, what it is, what it says."""

    place: str
    language: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a document."""
    found, start, lines = [], None, path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip().startswith("```"):
            if start is None:
                start, language = number, line.strip()[3:]
            else:
                text = "\n".join(lines[start : number - 1]) + "\n"
                found.append(Block(f"{path.relative_to(ROOT)}:{start}", language, text))
                start = None
    assert start is None, f"{path}:{start}: a block is not closed"
    return found


BLOCKS = [
    block for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] for block in blocks_of(path)
]


def of_language(language: str) -> list:
    """The blocks of a language as parameters."""
    return [pytest.param(block, id=block.place) for block in BLOCKS if block.language == language]


def commands_of(text: str) -> list[list[str]]:
    """The words of every command of a block, without comments and dots that stand for more words."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [[word for word in shlex.split(line, comments=True) if word != "..."] for line in lines]
    return [words for words in commands if words]


# A place to run in


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The folder that $DATA names: 24 + 8 images of 32 x 32 in ten and in a hundred classes, a tree in two."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for classes, names in ((10, ("cifar10_", "cifar10_jpeg_")), (100, ("cifar100_",))):
        for part, count in (("train", 24), ("test", 8)):
            arrays = {"images": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)}
            arrays["labels"] = rng.integers(0, classes, count)
            for name in names:
                np.savez(root / f"{name}{part}.npz", **arrays)
    for part, count in (("train", 12), ("val", 4)):
        for name in ("ant", "bee"):
            folder = root / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (64, 72, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> Callable[[str], Path]:
    """`finished(network)`: the folder of a small run on CIFAR-10's stand-in, and its evaluation."""

    @cache
    def folder(network: str) -> Path:
        out = tmp_path_factory.mktemp("finished")
        command = (
            f"{network} --data_set CIFAR10 {NPZ.format(10)} {RUN} --epochs 1 --batch_size 8 --warmup_epochs 0"
        )
        main_earlyExit.main([*expanded(shlex.split(command), {"DATA": str(data)}), "--output_dir", str(out)])
        command = f"--checkpoint {out}/checkpoint-best.pth {NPZ.format(10)} {RUN} --runtime_images 2 --micro_batch 2"
        eval_dynamic.main(expanded(shlex.split(command), {"DATA": str(data)}))
        return out

    return folder


@pytest.fixture(scope="session")
def done() -> set[tuple[str, ...]]:
    """Commands that have run: the same one need not run again for another block."""
    return set()


@pytest.fixture
def workplace(tmp_path, data, monkeypatch) -> Path:
    """An empty folder to run commands in, with the repository's pictures and $DATA."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.setenv("DATA", str(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expanded(words: list[str], environment: dict[str, str]) -> list[str]:
    """Words with their variables in place; KeyError for one that nobody set."""
    return [re.sub(r"\$\{?(\w+)\}?", lambda match: environment[match[1]], word) for word in words]


def make_files(text: str, finished: Callable[[str], Path]) -> None:
    """Makes the files that a command or program reads and that are not here yet."""
    for name in A_FILE.findall(re.sub(r"--(output_dir|log_dir|cache_dir)[ =]\S+", "", text)):
        run = re.match(r"runs/\w+", name)
        if Path(run[0] if run else name).exists() or name.startswith("/"):
            continue
        if run:
            before = sorted(
                path for path in Path("runs").glob("*") if (path / "checkpoint-last.pth").exists()
            )
            network = "--model cifar_resnet --depth 8" if re.match(ONE_EXIT, name) else SMALL_MSDNET
            shutil.copytree(before[0] if before else finished(network), run[0], dirs_exist_ok=True)
            continue
        made = [make for pattern, make in FILES.items() if re.search(pattern, name)]
        assert made, f"nobody knows how to make {name}: extend FILES"
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(made[0](), name)


# Commands


def started_by(words: list[str], environment: dict[str, str], folder: Path) -> list[list[str]]:
    """What a recipe hands to python or torchrun, as commands; nothing is installed."""
    scripts, log = folder / "scripts", folder / "started"
    shutil.copytree(ROOT / "scripts", scripts, dirs_exist_ok=True)
    (scripts / "install.sh").write_text("install() { :; }\n")
    for name in ("python", "torchrun", "ruff", "pyrefly", "shellcheck"):
        fake = folder / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(
            f"#!/bin/sh\n{{ echo {name}; printf '%s\\n' \"$@\"; echo; }} >> {shlex.quote(str(log))}\n"
        )
        fake.chmod(0o755)
    environment = environment | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", *words], cwd=folder, env=environment, check=True)
    return [command.splitlines() for command in log.read_text().split("\n\n") if command]


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Script and arguments of `python [...] script.py ...` or `torchrun [...] script.py ...`."""
    launcher = "scripts/launch.py"  # torchrun
    at = next((i for i, word in enumerate(words) if word.endswith(".py") and launcher not in word), None)
    assert words[0] in ("python", "torchrun") and at, f"nobody knows how to run {words}: extend `Runner`"
    path = Path(words[at])
    return (f"scripts/{path.name}" if path.parent.name == "scripts" else path.name), words[at + 1 :]


class Runner:
    """Runs commands one after the other in the current folder."""

    def __init__(
        self, run_script, data: Path, finished: Callable[[str], Path], done: set[tuple[str, ...]]
    ) -> None:
        self.run_script, self.data, self.finished, self.done = run_script, str(data), finished, done

    def __call__(self, words: list[str], environment: dict[str, str]) -> None:
        """Runs a command as a reader would type it."""
        while re.match(r"\w+=", words[0]):
            name, _, value = words[0].partition("=")
            (value,) = expanded([value], environment)
            environment, words = environment | {name: value}, words[1:]
        words = expanded(words, environment)
        if words[0] == "sbatch":  # tests/scripts/test_slurm.py: SLURM runs what is behind its script
            words = words[words.index("scripts/slurm.sh") + 1 :]
        if any(re.search(pattern, " ".join(words)) for pattern, _ in ELSEWHERE):
            return
        if words[0] == "bash":
            for command in started_by(words[1:], environment, Path.cwd()):
                if not " ".join(command[1:]).startswith("-m pytest") and command[0] not in NOT_OURS:
                    self(command, environment)
            return
        self.script(*script_of(words))

    def script(self, path: str, words: list[str]) -> None:
        """Runs a script of ours, made small."""
        text = " ".join([path, *words, ""])
        if any(re.search(pattern, text) for pattern, _ in PARSED):
            self.parse(path, words)
            return
        smaller = [word for pattern, more in SMALLER if re.search(pattern, text) for word in more.split()]
        words = [*words, *expanded(smaller, {"DATA": self.data})]
        for pattern, other in REPLACED:
            words = [re.sub(pattern, other, word) for word in words]
        folder = words[words.index("--output_dir") + 1] if "--output_dir" in words else ""
        if (path, *words) not in self.done or not Path(folder).exists():
            make_files(" ".join(words), self.finished)
            self.run_script(path, *words)
            self.done.add((path, *words))

    def parse(self, path: str, words: list[str]) -> None:
        """Checks that a script has the flags of a command, and that their values are such as it accepts."""
        text = self.run_script(path, *words, "--help")
        if "eval_dynamic.py" in text:  # which has the other flags
            text += self.run_script("eval_dynamic.py", "--model", "ebjr", "--help")
        for word in words:
            name = word.partition("=")[0]
            assert not name.startswith("--") or re.search(rf"{name}\b", text), f"{path} has no flag {name}"


def new_commands_of(block: Block) -> list[list[str]]:
    """The commands of a block that no block before it has, or whose folder a later one of the block reads."""
    before = [other for other in BLOCKS[: BLOCKS.index(block)] if other.language == "bash"]
    known = [words for other in before for words in commands_of(other.text)]
    commands, found = commands_of(block.text), []
    for i, words in enumerate(commands):
        folders = [word for word in words if word.startswith("runs/")]
        later = " ".join(word for other in commands[i + 1 :] for word in other)
        if words not in known or any(folder in later for folder in folders):
            found.append(words)
    return found


@pytest.mark.parametrize("block", of_language("bash"))
def test_commands_run(block, workplace, run_script, data, finished, done):
    runner = Runner(run_script, data, finished, done)
    for words in new_commands_of(block):
        runner(words, dict(os.environ))


@pytest.mark.parametrize("block", of_language("python"))
def test_programs_run(block, workplace, finished):
    make_files(block.text, finished)
    names = {"__name__": "readme", "images": torch.randn(4, 3, 32, 32), "create_model": create_model}
    exec(compile(block.text, block.place, "exec"), names)


@pytest.mark.parametrize("block", of_language("yaml"))
def test_recipes_name_flags_of_training(block, run_script):
    words = [f"--{line.replace(':', '=', 1).replace(' ', '')}" for line in block.text.splitlines()]
    Runner(run_script, Path(), lambda network: Path(), set()).parse("main_earlyExit.py", words)


def test_every_block_is_of_a_known_kind():
    known = {"bash", "python", "yaml", *OUTPUT}
    command = re.compile(r"^(python|bash|torchrun|import|from) ", re.MULTILINE)
    strange = [block.place for block in BLOCKS if block.language not in known]
    strange += [block.place for block in BLOCKS if block.language in OUTPUT and command.search(block.text)]
    assert not strange, f"blocks of no known language (give one, or extend this test): {strange}"
