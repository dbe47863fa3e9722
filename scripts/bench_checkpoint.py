"""What saving a run within an epoch costs its training: the wait for a copy, slower steps, memory.

    python scripts/bench_checkpoint.py [--model msdnet_cifar_lin5] [--batch_size 64] [--folder DIR]

A network with a moving average takes steps on random images that lie in memory. "step" is a step with nothing
being written; "wait" is how long `Run.save_within` holds training up; "while writing" is a step while the
checkpoint goes to the disk; "on the spot" is a save that training would wait for. The cost is all that saves
take from steps, over the default interval of `--save_every_minutes`. Floor of the wait: the state is read and
written once, 2 bytes moved per byte, at the rate at which a large tensor is copied in the same rounds.
"""

import ctypes
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common import Steps, network_options, print_table, read_known, timed

import torch

from experiment.checkpoint import LAST, save
from experiment.recipe import Session
from experiment.record import describe_machine
from experiment.run import Run, Saving
from models import create_model, tune
from training.optim import Optimization, make_update
from utils import UserError, option, run_main

OPTIMIZATION = Optimization(opt="adamw", lr=1e-6, schedule="constant", warmup_epochs=0, model_ema=True)
CPU = torch.device("cpu")
MB = 1e6


@dataclass(frozen=True)
class Flags:
    """What is timed; options of the network are flags too."""

    model: str = option("msdnet_cifar_lin5", "registered network")
    batch_size: int = option(64, low=1)
    input_size: int = option(32, "side of the images", low=1)
    rounds: int = option(5, "of which the median is shown", low=1)
    folder: str = option("", "where checkpoints are written; default: a temporary folder")


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory this process has held while the block ran, in bytes above what it held before."""

    def __enter__(self) -> "Peak":
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        self.ended, self.before, self.most = threading.Event(), resident(), 0
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, resident() - self.before)

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def size_of(state: object) -> int:
    """Bytes of the tensors in a nest."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state
    return sum(map(size_of, parts)) if isinstance(state, (dict, list, tuple)) else 0


def one_round(run: Run, steps: Steps, path: Path) -> dict[str, float]:
    """Seconds of everything, once; a checkpoint is written twice."""
    state, block = run.state(0), torch.zeros(size_of(run.state(0)), dtype=torch.uint8)
    figures = {"copy": timed(block.clone)[1], "step": timed(steps)[1]}
    figures["on the spot"] = timed(lambda: save(path, state))[1]
    figures["step"] = min(figures["step"], timed(steps)[1])
    with Peak() as peak:
        run.save_within(0, {})
        run.writer.wait()
    start, during = time.perf_counter(), []
    figures["wait"] = timed(lambda: run.save_within(0, {}))[1]
    while run.writer.last and not run.writer.last.done():
        during.append(timed(steps)[1])
    run.writer.wait()
    figures["writing"] = time.perf_counter() - start - figures["wait"]
    figures["while writing"] = sum(during) / max(len(during), 1)
    # Steps that were due in that time and were not done.
    figures["lost"] = max(0.0, sum(during) - len(during) * figures["step"])
    return {**figures, "memory": peak.most}


def main(argv: list[str]) -> None:
    """The command line."""
    flags, words = read_known(Flags, argv, __doc__)
    if not flags.model:
        raise UserError("name a network: --model NAME")
    torch.manual_seed(0)
    network = create_model(flags.model, 10, **network_options(Flags, flags.model, words)).train()
    tune(network, CPU)
    update = make_update(network, OPTIMIZATION, steps=1)
    steps = Steps(network, update, flags.batch_size, flags.input_size)
    for _ in range(3):
        steps()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"model": network, **update.parts}
        run = Run(parts, dict, Saving(folder), score=lambda figures: None)
        one_round(run, steps, folder / "warm.pth")
        rounds = [one_round(run, steps, folder / LAST) for _ in range(flags.rounds)]
        (folder / "warm.pth").unlink()
    middle = {name: sorted(row[name] for row in rounds)[len(rounds) // 2] for name in rounds[0]}
    size, interval = size_of(run.state(0)), 60 * Session().save_every_minutes
    cost = (middle["wait"] + middle["lost"]) / interval
    print(
        f"{flags.model}, batch {flags.batch_size}, checkpoint of {size / MB:.1f} MB, {describe_machine(CPU)}"
    )
    heads = ["", "ms:.2f", "steps:.3f"]
    names = ["step", "copy", "wait", "on the spot", "writing", "while writing"]
    print_table(heads, [[name, 1000 * middle[name], middle[name] / middle["step"]] for name in names])
    print(f"cost at the default interval, {interval / 60:g} minutes: {100 * cost:.4f} % of the time")
    print(f"memory while saving: {middle['memory'] / size:.2f} x the checkpoint")


if __name__ == "__main__":
    run_main(main)
