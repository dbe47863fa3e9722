"""Breaks training runs and tells how they fare: killed, stopped, out of room, damaged, with a jumping clock.

    python scripts/chaos.py                    # all faults, 10 to 20 minutes on 2 cores
    python scripts/chaos.py --preset ci        # some of them, a minute
    python scripts/chaos.py --faults kill rank --trials 50
    python scripts/chaos.py --matrix true      # stopped and resumed: every regime, loader and process count

A run has survived if the same command, given as often as needed, leaves the same bits as an unbroken run:
checkpoints with all their parts, and the log but for its seconds. Steps that are lost are done twice. Runs
start without the seconds that importing takes.
"""

import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from common import print_table, read_flags

import chaos_faults as faults
import numpy as np
import torch
from chaos_runs import EPOCHS, NAMES, STOPPED, Moment, Result, send

from utils import option, run_main

# With the trials of each in all of it and in continuous integration.
FAULTS: dict[str, tuple[Callable[[faults.Bench], Result], int, int]] = {
    "kill": (faults.kill, 120, 4),
    "term": (partial(faults.stop, numbers=(signal.SIGTERM,)), 20, 2),
    "usr1": (partial(faults.stop, numbers=(signal.SIGUSR1,)), 10, 0),
    "ctrl-c": (partial(faults.stop, numbers=(signal.SIGINT,)), 10, 0),
    "ctrl-c-twice": (partial(faults.stop, numbers=(signal.SIGINT,) * 2, code=130, line="interrupted"), 10, 1),
    "rank": (faults.rank, 20, 0),
    "worker": (faults.worker, 10, 1),
    "disk": (faults.disk, 20, 1),
    "small-disk": (faults.small_disk, 20, 0),
    "damage": (faults.damage, 300, 30),
    "clock": (faults.clock, 10, 0),
    "folder": (faults.folder, 5, 0),
}
STOPS = ("first", "middle", "last", "within")  # steps of an epoch; and before one is done


@dataclass(frozen=True)
class Flags:
    """What is broken how often."""

    faults: tuple[str, ...] = option((), "these only", choices=tuple(FAULTS))
    preset: Literal["full", "ci"] = option("full", "how many trials of each fault there are")
    trials: int = option(0, "trials of each fault, in place of the preset's", low=0)
    seconds: float = option(3600.0, "no trial starts later", low=0)
    seed: int = option(0, "of what is drawn", low=0)
    matrix: bool = option(False, "stop and resume every kind of run in place of all faults")
    regimes: tuple[str, ...] = option(NAMES, "kinds of runs", choices=NAMES)
    workers: tuple[int, ...] = option((0, 2), "loader's processes in the matrix", low=0)
    processes: tuple[int, ...] = option((1, 2), "processes of a run in the matrix", low=1)
    stops: tuple[str, ...] = option(STOPS, "where runs are stopped in the matrix", choices=STOPS)
    folder: Path | None = option(None, "where files of failed trials are kept")


def survey(bench: faults.Bench, flags: Flags) -> dict[str, list[Result]]:
    """The results by fault; the faults take turns."""
    end = time.monotonic() + flags.seconds
    results: dict[str, list[Result]] = {name: [] for name in flags.faults or FAULTS}
    counts = {name: flags.trials or FAULTS[name][1 + (flags.preset == "ci")] for name in results}
    for turn in range(max(counts.values())):
        for name, found in results.items():
            if turn >= counts[name] or time.monotonic() > end:
                continue
            try:
                found.append(FAULTS[name][0](bench))
            except RuntimeError as error:
                found.append(Result(str(error), [], []))
            if wrong := found[-1].wrong:
                print(f"{name}: {wrong}", flush=True)
    return {name: found for name, found in results.items() if found}


def show(results: dict[str, list[Result]]) -> None:
    """Prints the table."""
    rows = []
    for name, found in results.items():
        lost = [steps for one in found for steps in one.lost] or [0]
        seconds = [one for result in found for one in result.seconds]
        went_on = f"{np.mean(seconds):.2f}" if seconds else "-"
        survived = sum(not one.wrong for one in found)
        rows.append((name, len(found), survived, float(np.mean(lost)), max(lost), went_on))
    print_table(["fault", "tried:d", "survived:d", "lost steps:.2f", "most:d", "s to go on"], rows)


def matrix(bench: faults.Bench, flags: Flags) -> int:
    """Prints whether a run that SIGTERM stops at a step and that is resumed is the unbroken one."""
    wrong, row = 0, "{:16} {:>7} {:>9}" + " {:>8}" * len(flags.stops)
    print(row.format("stopped at step", "workers", "processes", *flags.stops))
    for regime, workers, processes in itertools.product(flags.regimes, flags.workers, flags.processes):
        cells = []
        for stop in flags.stops:
            story = bench.story(regime, workers, processes)
            each = len(bench.whole(story).launches[0].steps) // EPOCHS
            count = {"first": 1, "middle": (each + 1) // 2, "last": each, "within": each + 1}[stop]
            place = "loss" if stop == "within" else "step"
            codes = story.start(Moment(place, count, partial(send, signal.SIGTERM))).wait()
            failed = f"ended with {codes}" if set(codes) != {STOPPED} else ""
            result = bench.result(story, failed)
            cells.append("NO" if result.wrong else "same")
            if result.wrong:
                print(result.wrong)
        wrong += cells.count("NO")
        print(row.format(regime, workers, processes, *cells), flush=True)
    return wrong


def main(argv: list[str]) -> int:
    """Breaks runs and prints the table; returns 1 if one did not survive."""
    flags = read_flags(Flags, argv, __doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        bench = faults.Bench(flags.folder or Path(name), flags.seed, flags.regimes)
        if flags.matrix:
            return int(matrix(bench, flags) > 0)
        results = survey(bench, flags)
        show(results)
    return int(any(one.wrong for found in results.values() for one in found))


if __name__ == "__main__":
    run_main(lambda argv: sys.exit(main(argv)))
