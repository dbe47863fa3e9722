"""The runs of `compare_regimes.py`: a process for each training and each evaluation, and their files."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from regimes_rows import Plan, Row
from regimes_table import Outcome

from experiment.results import read_results
from utils import write_text

ROOT = Path(__file__).resolve().parents[1]
PLACE = ["--device", "cpu", "--num_workers", "0"]  # of evaluations
# util-linux's, before a command: it is stopped, and saves, when the script dies, however that is killed.
GUARD = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def report(name: str, run: Future) -> None:
    """Says how a run has ended."""
    if not run.cancelled():
        print(f"{name}: {run.exception() or 'done'}\n", end="", flush=True)  # at once: threads print


class Matrix:
    """Rows and seeds as processes of their own, and the files that they leave."""

    def __init__(
        self, out: Path, seeds: Sequence[int], data: Sequence[str], plans: Mapping[str, Plan]
    ) -> None:
        self.out, self.seeds, self.data, self.plans = out, seeds, data, plans

    def folder(self, name: str, seed: int) -> Path:
        """Of a training run."""
        return self.out / "runs" / f"{name}-seed{seed}"

    def checkpoint(self, name: str, seed: int) -> Path:
        """The last weights of a run."""
        return self.folder(name, seed) / "checkpoint-last.pth"

    def subject(self, row: Row, seed: int) -> list[str]:
        """What is evaluated, as words of a command line."""
        if row.members:
            files = [f"weights={self.checkpoint(name, seed)}" for name in row.members]
            return ["--model", "ebjr", "--networks", *files, *self.data, *PLACE]
        return ["--checkpoint", str(self.checkpoint(row.name, seed)), *self.data, *PLACE]

    def call(self, script: str, words: Sequence[str], log: str) -> None:
        """Runs a script on one thread; what it prints goes to a file.

        RuntimeError with its last line if it fails.
        """
        path = self.out / "logs" / f"{log}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*GUARD, sys.executable, str(ROOT / script), *words]
        with path.open("a", encoding="utf-8") as file:
            ended = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            )
        if ended.returncode:
            lines = path.read_text(encoding="utf-8").splitlines() or ["nothing was said"]
            raise RuntimeError(f"{script} ended with {ended.returncode}: {lines[-1]}; {path}")

    def run(self, row: Row, seed: int, needed: Sequence[Future]) -> None:
        """Trains a row once those that it needs are done, evaluates it and keeps the record."""
        for one in needed:
            if one.exception():
                raise RuntimeError("a row that it needs has failed")
        name = f"{row.name}-seed{seed}"
        record = self.out / "records" / f"{name}.json"
        if record.exists():
            return
        if not row.members:
            taught = ["--kd_teacher", str(self.checkpoint(row.teacher, seed))] if row.teacher else []
            words = [*row.words, *self.plans[row.name].words, *taught, *self.data, "--seed", str(seed)]
            places = ["--output_dir", str(self.folder(row.name, seed)), "--disable_eval", "true"]
            self.call("main_earlyExit.py", [*words, *places], name)
        folder = self.out / "evaluations" / name
        words = [*self.subject(row, seed), "--mode", "dynamic", "--output_dir", str(folder)]
        self.call("eval_dynamic.py", words, name)
        record.parent.mkdir(exist_ok=True)
        write_text(record, (folder / "record.json").read_text(encoding="utf-8"))

    def run_all(self, rows: Sequence[Row], jobs: int) -> list[str]:
        """Every row with every seed, so many at a time; returns what failed, a line each."""
        pool, runs = ThreadPoolExecutor(jobs), {}
        try:
            for seed in self.seeds:
                for row in rows:
                    needed = [runs[name, seed] for name in row.needs]
                    run = pool.submit(self.run, row, seed, needed)
                    run.add_done_callback(partial(report, f"{row.name}, seed {seed}"))
                    runs[row.name, seed] = run
            ends = {f"{name}, seed {seed}": run.exception() for (name, seed), run in runs.items()}
            return [f"{name}: {error}" for name, error in ends.items() if error]
        finally:
            pool.shutdown(cancel_futures=True)

    def record(self, name: str) -> dict[str, Any]:
        """The content of a record. RuntimeError without one."""
        path = self.out / "records" / f"{name}.json"
        if not path.exists():
            raise RuntimeError(f"{name} has no record")
        return json.loads(path.read_text(encoding="utf-8"))

    def wall(self, name: str, seed: int) -> float:
        """The seconds that a run's epochs took; nan where the record alone has been kept."""
        log = self.folder(name, seed) / "log.txt"
        if not log.exists():
            return math.nan
        lines = log.read_text(encoding="utf-8").splitlines()
        return sum(json.loads(line)["seconds"] for line in lines)

    def outcomes(self, rows: Sequence[Row]) -> list[Outcome]:
        """What the records say of every row that has any."""
        results = {one.name: one for one in read_results(self.out / "records")}
        found = []
        for row in rows:
            seeds = [seed for seed in self.seeds if f"{row.name}-seed{seed}" in results]
            if not seeds:
                continue
            trained = [*row.needs, *([] if row.members else [row.name])]
            planned = sum(self.plans[name].seconds for name in trained)
            wall = mean(sum(self.wall(name, seed) for name in trained) for seed in seeds)
            found.append(Outcome(row, [results[f"{row.name}-seed{seed}"] for seed in seeds], planned, wall))
        return found

    def speed(self, row: Row, seed: int, policy: Mapping[str, Any], images: int) -> dict[str, Any]:
        """The record of a row's network, with this policy of its front timed on test images.

        It takes the place of the record without, and has the same exits. The policy is its headline, before
        the one as accurate as the last exit; so a front that is thinned out may keep other policies.
        """
        name = f"{row.name}-seed{seed}"
        known = self.record(name)
        timed = known.get("runtime", {"num_images": 0})
        if timed["num_images"] != images or known["policies"][0]["macs"] != policy["macs"]:
            folder = self.out / "speed" / name
            # The best of the front within what it costs is the policy itself.
            words = ["--mode", "all", "--drop", "0", "--budget", str(math.ceil(policy["macs"]))]
            words += ["--runtime_images", str(images), "--output_dir", str(folder)]
            self.call("eval_dynamic.py", [*self.subject(row, seed), *words], f"{name}-speed")
            text = (folder / "record.json").read_text(encoding="utf-8")
            write_text(self.out / "records" / f"{name}.json", text)
        return self.record(name)
