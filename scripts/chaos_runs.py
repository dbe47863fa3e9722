"""Training runs that `chaos.py` breaks: forked from one process, which has imported all that they need."""

import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import digest_of

import numpy as np
import torch

import engine
import main_earlyExit
from experiment import run
from experiment.checkpoint import load
from experiment.classifier import Classifier
from experiment.stopping import Timetable
from training.optim import Update
from utils import run_main

EPOCHS, TRAIN, CALIB, TEST = 2, 36, 8, 8  # images
COMMON = (
    "--data_set CIFAR10 --data_path {data}/train.npz --eval_data_path {data}/test.npz "
    f"--num_calib {CALIB} --device cpu --batch_size 4 --epochs {EPOCHS} --seed 3 --procedure ours "
    "--opt adamw --lr 0.01 --warmup_epochs 1 --save_every_steps 3 --save_ckpt_num 2 "
    "--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0 "
)
MSDNET = "msdnet --nBlocks 2 --nChannels 4 --growthRate 4 --grFactor 1-2 --bnFactor 1-2"
L2W = "--l2w true --meta_net_hidden_size 8 --meta_lr 0.01"
REGIMES = {
    "plain": "",
    "self-KD": "--with_kd true",
    "teacher": "--kd_teacher {data}/teacher/checkpoint-last.pth",
    "l2w": L2W,
    "l2w-every-3": f"{L2W} --meta_interval 3",
    "equilibrium": "--regime equilibrium",
    "disjoint": "--regime disjoint",
    "mixed": "--regime mixed",
    "ema": "--model_ema true --model_ema_decay 0.5 --model_ema_eval true",
    "bf16": "--use_amp true --amp_dtype bf16",
    "fp16": "--use_amp true --amp_dtype fp16",
    "accumulation-2": "--update_freq 2 --drop_last false --clip_grad 1",
    "accumulation-3": "--update_freq 3 --drop_last false --batch_size 3",
    "mixing": "--mixup 0.8 --cutmix 1.0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25",
}
NETWORKS = {
    "boosted": f"boosted/{MSDNET}",
    "dropout": "cifar_wrn --depth 10 --widen_factor 1 --dropRate 0.3",
}
MISTAKE, STOPPED = 2, 75  # exit codes
NAMES = (*REGIMES, *NETWORKS)
# Where something can happen to a run: at a call of one of these.
PLACES: dict[str, tuple[Any, str]] = {
    "start": (main_earlyExit, "start_compute"),
    "opening": (Classifier, "_start"),
    "loss": (Update, "__call__"),
    "step": (Timetable, "after_step"),
    "evaluation": (engine, "evaluate_readings"),
    "save": (torch, "save"),
    "rename": (os, "replace"),
    "link": (os, "link"),
    "log": (run, "append_json"),
}


@dataclass(frozen=True)
class Moment:
    """`act` in process `rank` at the `count`-th call of a place, or `delay` seconds later."""

    place: str
    count: int
    act: Callable[[], None]
    delay: float = 0.0
    rank: int = 0

    def await_it(self) -> None:
        """From now on this process watches the place."""
        calls = itertools.count(1)

        def act() -> None:
            if next(calls) != self.count:
                return
            if not self.delay:
                self.act()
                return
            timer = threading.Timer(self.delay, self.act)
            timer.daemon = True
            timer.start()

        watch(*PLACES[self.place], lambda *_: act())


def watch(owner: Any, name: str, see: Callable[..., None]) -> None:
    """From now on every call of a function calls `see` before, with the same arguments."""
    function = getattr(owner, name)

    def watched(*args: Any, **options: Any) -> Any:
        see(*args)
        return function(*args, **options)

    setattr(owner, name, watched)


@dataclass
class Launch:
    """A start of a run, of one process or several; what they print is in `out`, their steps in `log`."""

    out: Path
    log: Path
    processes: list[multiprocessing.process.BaseProcess] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def wait(self, *, together: bool = False, most: float = 600.0) -> list[int]:
        """The exit codes; once one was killed, all are if `together`. RuntimeError for what does not end."""
        while any(process.is_alive() for process in self.processes):
            time.sleep(0.005)
            killed = together and any(process.exitcode == -9 for process in self.processes)
            if killed or time.monotonic() > self.began + most:
                self.kill()
            if not killed and time.monotonic() > self.began + most:
                raise RuntimeError(f"did not end within {most:.0f} s")
        return [process.exitcode or 0 for process in self.processes]

    def kill(self) -> None:
        """SIGKILL for all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    @property
    def steps(self) -> list[tuple[float, int]]:
        """When the first process did each optimizer step, and its number from 1."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(float(line.split()[0]), int(line.split()[1])) for line in lines]

    @property
    def lines(self) -> list[str]:
        """What all processes have printed."""
        return self.out.read_text().splitlines()


class Story:
    """A run and all its starts, by the same command."""

    def __init__(self, folder: Path, words: Iterable[str], processes: int = 1) -> None:
        self.folder, self.processes = folder, processes
        self.words = [*words, "--output_dir", str(folder)]
        self.launches: list[Launch] = []

    def start(self, *moments: Moment, prepare: Callable[[], None] = lambda: None) -> Launch:
        """Starts it once more; `prepare` is called in the new process."""
        sys.stdout.flush()
        name = f"{self.folder.name}-{len(self.launches)}"
        launch = Launch(self.folder.with_name(f"{name}.out"), self.folder.with_name(f"{name}.steps"))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        several = {"WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(self.processes):
            number = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            env = several | number if self.processes > 1 else {}
            here = [moment for moment in moments if moment.rank == rank]
            options = (self.words, env, here, prepare, launch)
            process = multiprocessing.get_context("fork").Process(target=_train, args=options)
            process.start()
            launch.processes.append(process)
        self.launches.append(launch)
        return launch

    def finish(self) -> list[int]:
        """Starts it until it ends well, or with a mistake or a bug; returns the last exit codes."""
        codes = [-9]
        while any(code < 0 or code == STOPPED for code in codes):
            codes = self.start().wait()
        return codes

    def losses(self) -> tuple[list[int], list[float]]:
        """Per restart: steps that were done and are done again, and seconds until the first new one."""
        lost, seconds, done = [], [], 0
        for launch in self.launches:
            steps = launch.steps
            new = [at for at, step in steps if step > done]
            if launch is not self.launches[0] and new:
                lost.append(len(steps) - len(new))
                seconds.append(new[0] - launch.began)
            done = max([done, *(step for _, step in steps)])
        return lost, seconds

    def left(self) -> dict[str, str]:
        """Digests of all files that the run leaves, without seconds and what names the folder."""
        found = {path.name: "" for path in self.folder.iterdir()}
        for path in self.folder.glob("*.pth"):
            content = {**load(path), "args": None}
            content["record"] = without_seconds(content["record"])
            content["partial"] = without_seconds(content["partial"])
            found[path.name] = digest_of(content)
        log = (self.folder / "log.txt").read_text(encoding="utf-8").splitlines()
        return found | {"log.txt": digest_of([without_seconds(json.loads(line)) for line in log])}

    def remove(self) -> None:
        """Deletes its files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for launch in self.launches:
            launch.out.unlink(missing_ok=True)
            launch.log.unlink(missing_ok=True)


def without_seconds(record: dict[str, Any]) -> dict[str, Any]:
    """A record of the log without what differs from run to run."""
    return {name: value for name, value in record.items() if name != "seconds"}


def _train(
    words: list[str], env: dict[str, str], moments: list[Moment], prepare: Callable, launch: Launch
) -> None:
    """What a forked process does."""
    out = open(launch.out, "a", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = out
    for descriptor in (1, 2):
        os.dup2(out.fileno(), descriptor)
    os.environ |= env
    sys.argv = ["main_earlyExit.py", *words]
    for moment in moments:
        moment.await_it()
    if env.get("RANK", "0") == "0":
        log = os.open(launch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        watch(*PLACES["step"], lambda _, step, *__: os.write(log, f"{time.monotonic()} {step}\n".encode()))
    prepare()
    run_main(main_earlyExit.main)


def write_digits(folder: Path) -> None:
    """Some of scikit-learn's digits as files of small images."""
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    parts = {"train": slice(0, TRAIN + CALIB), "test": slice(TRAIN + CALIB, TRAIN + CALIB + TEST)}
    for name, part in parts.items():
        pictures = np.stack([images[part]] * 3, axis=3)
        np.savez(folder / f"{name}.npz", images=pictures, labels=digits.target[part])


def words_of_regime(regime: str, data: Path) -> list[str]:
    """The command line of a run."""
    words = f"{COMMON} --model {NETWORKS.get(regime, MSDNET)} {REGIMES.get(regime, '')}"
    return shlex.split(words.format(data=data))


def send(*numbers: int) -> None:
    """Sends signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Result:
    """What came of one trial: what is wrong, or ""; steps lost and seconds to go on, per restart."""

    wrong: str
    lost: list[int]
    seconds: list[float]


def harm(path: Path, draws: np.random.Generator) -> None:
    """Truncates a file, flips one of its bits, or zeroes a page or all to its end."""
    data = bytearray(path.read_bytes())
    place, kind = int(draws.integers(len(data))), draws.integers(3)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place] ^= 1 << int(draws.integers(8))
    else:
        count = min(4096 if draws.integers(2) else len(data), len(data) - place)
        data[place : place + count] = bytes(count)
    path.write_bytes(data)


def as_nobody() -> None:
    """Gives up the right to write anywhere."""
    if os.geteuid() == 0:
        os.setuid(65534)


def refusal(story: Story, line: str, prepare: Callable[[], None] = lambda: None) -> str:
    """What is wrong if a start is not refused in one line that begins so."""
    launch = story.start(prepare=prepare)
    codes, lines = launch.wait(), launch.lines
    right = codes == [MISTAKE] and len(lines) == 1 and lines[0].startswith(f"error: {line}")
    return "" if right else f"not refused: {codes}, {lines[-1:]}"
