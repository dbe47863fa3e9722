"""What `chaos.py` does to training runs."""

import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

from common import digest_of

import numpy as np
from chaos_runs import (
    MISTAKE,
    STOPPED,
    Launch,
    Moment,
    Result,
    Story,
    as_nobody,
    harm,
    refusal,
    send,
    words_of_regime,
    write_digits,
)

from experiment.checkpoint import BEST, LAST, latest, load, numbered
from utils import UserError


class Bench:
    """Where runs are broken: their data, the unbroken ones, and the draws."""

    def __init__(self, folder: Path, seed: int, regimes: Sequence[str]) -> None:
        self.folder, self.draws, self.count = folder, np.random.default_rng(seed), 0
        self.regimes = regimes
        self.unbroken: dict[tuple[str, int], Story] = {}
        self.halves: list[Path] = []
        write_digits(folder)

    def story(self, regime: str = "plain", workers: int = 0, processes: int = 1) -> Story:
        """A run in a folder of its own, not yet started."""
        if regime == "teacher" and not (self.folder / regime).exists():
            Story(self.folder / regime, words_of_regime("plain", self.folder)).finish()
        self.count += 1
        words = [*words_of_regime(regime, self.folder), "--num_workers", str(workers)]
        return Story(self.folder / f"{regime}-{processes}-{self.count}", words, processes)

    def some(self, processes: int | None = None) -> Story:
        """A run of any regime."""
        workers, several = int(self.draws.choice([0, 0, 2])), int(self.draws.choice([1, 1, 1, 2]))
        return self.story(self.draws.choice(self.regimes), workers, processes or several)

    def whole(self, story: Story) -> Story:
        """The same run, unbroken."""
        regime = story.folder.name.rsplit("-", 2)[0]
        key = regime, story.processes
        if key not in self.unbroken:
            whole = self.story(regime, processes=story.processes)
            codes = whole.finish()
            if any(codes):
                raise RuntimeError(f"{regime}, unbroken, ended with {codes}")
            self.unbroken[key] = whole
        return self.unbroken[key]

    def written(self) -> Path:
        """The folder of a run that has ended, or of one that was stopped within its second epoch."""
        half = self.story(self.regimes[0])
        whole = self.whole(half)
        if not self.halves:
            steps = len(whole.launches[0].steps) * 3 // 4
            half.start(Moment("step", steps, partial(send, signal.SIGTERM))).wait()
            self.halves = [whole.folder, half.folder]
        return self.halves[self.draws.integers(2)]

    def step(self, story: Story) -> int:
        """Any step of a run but the last, counted from 1."""
        return int(self.draws.integers(1, len(self.whole(story).launches[0].steps)))

    def result(self, story: Story, wrong: str = "") -> Result:
        """Finishes the run and compares it with the unbroken one."""
        codes = story.finish()
        if any(codes):
            wrong = wrong or f"ended with {codes}: {story.launches[-1].lines[-1]}"
        else:
            found, expected = story.left(), self.whole(story).left()
            differ = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
            wrong = wrong or (f"other bits in {', '.join(sorted(differ))}" if differ else "")
        result = Result(f"{story.folder.name}: {wrong}" if wrong else "", *story.losses())
        if not wrong:
            story.remove()
        return result


DIE = partial(send, signal.SIGKILL)
AIMED = {"start": 1, "opening": 1, "loss": 2, "evaluation": 2, "save": 8, "rename": 8, "link": 3, "log": 2}


def kill(bench: Bench) -> Result:
    """SIGKILL for all processes, once or twice, at any time or aimed at a place."""
    story = bench.some()
    bench.whole(story)
    for _ in range(bench.draws.integers(1, 3)):
        place = bench.draws.choice([*AIMED, "any", "step"])
        if place == "any":
            launch, whole = story.start(), bench.whole(story).launches[0]
            time.sleep(bench.draws.uniform(0, whole.steps[-1][0] - whole.began))
            launch.kill()
            continue
        count = bench.draws.integers(1, AIMED[place] + 1) if place in AIMED else bench.step(story)
        delay = bench.draws.choice([0, bench.draws.uniform(0, 0.02)])
        story.start(Moment(place, count, DIE, delay)).wait(together=True)
    return bench.result(story)


def stop(bench: Bench, numbers: tuple[int, ...], code: int = STOPPED, line: str = "stopped by") -> Result:
    """Signals to one process, which the run answers by saving, one line and its exit code."""
    story = bench.some(processes=None if code == STOPPED else 1)
    rank = int(bench.draws.integers(story.processes))
    launch = story.start(Moment("loss", bench.step(story), partial(send, *numbers), rank=rank))
    codes, said = launch.wait(), [text for text in launch.lines if text.startswith(line)]
    right = set(codes) == {code} and len(said) == 1
    result = bench.result(story, "" if right else f"ended with {codes}, {said}")
    lost = f"{story.folder.name}: lost steps" if code == STOPPED and any(result.lost) else ""
    return replace(result, wrong=result.wrong or lost)


def rank(bench: Bench) -> Result:
    """One process of two is killed; the other ends by itself, and both are started again."""
    story, number = bench.some(processes=2), int(bench.draws.integers(2))
    codes = story.start(Moment("loss", bench.step(story), DIE, rank=number)).wait()
    return bench.result(story, "" if 0 not in codes else f"ended with {codes}")


def worker(bench: Bench) -> Result:
    """A loader's process is killed; the run goes on without it."""
    story = bench.story(bench.draws.choice(bench.regimes), workers=2)

    def end_one() -> None:
        os.kill(active_children()[-1].pid or 0, signal.SIGKILL)

    codes = story.start(Moment("step", bench.draws.integers(1, 3), end_one)).wait()
    replaced = any("is read again" in line for launch in story.launches for line in launch.lines)
    return bench.result(
        story, "" if codes == [0] and replaced else f"ended with {codes}, replaced: {replaced}"
    )


def disk(bench: Bench) -> Result:
    """Files cannot grow any more; the run ends with one line, and goes on when there is room again."""
    story = bench.some(processes=1)
    needed = (bench.whole(story).folder / LAST).stat().st_size
    limit = int(needed * bench.draws.uniform(0.05, 0.95))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, hard))
    return bench.result(story, full_disk(story.start(Moment("step", bench.step(story), full))))


def full_disk(launch: Launch) -> str:
    """What is wrong with how a run ended whose disk was full, maybe."""
    codes, last = launch.wait(), launch.lines[-1]
    right = codes == [0] or (codes == [MISTAKE] and last.startswith("error: cannot write "))
    return "" if right else f"{codes}: {last}"


def small_disk(bench: Bench) -> Result:
    """A disk of its own fills up; the run goes on when it has grown. As `disk` for who may not mount."""
    story = bench.some(processes=1)
    size = int((bench.whole(story).folder / LAST).stat().st_size * bench.draws.uniform(0, 2.5)) + 4096
    story.folder.mkdir()
    place = str(story.folder)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", place]
    if subprocess.run(mount, capture_output=True).returncode:
        return disk(bench)
    try:
        wrong = full_disk(story.start())
        subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
        return bench.result(story, wrong)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def clock(bench: Bench) -> Result:
    """The wall clock jumps to and fro, also while the run is stopped; files get other dates."""
    story, real = bench.some(), time.time
    draws = np.random.default_rng(bench.draws.integers(2**32))

    def jump() -> None:
        time.time = lambda: real() + draws.uniform(-1e8, 1e8)

    for _ in range(2):
        story.start(Moment("step", bench.step(story), partial(send, signal.SIGTERM)), prepare=jump).wait()
        for path in story.folder.glob("*.pth"):
            os.utime(path, (0, draws.integers(2**31)))
    return bench.result(story)


def folder(bench: Bench) -> Result:
    """A folder that may not be written to, and a second run in a folder: refused in one line."""
    story = bench.some(processes=1)
    story.folder.mkdir(mode=0o555)
    bench.folder.chmod(0o755)
    wrong = refusal(story, "cannot write", as_nobody)
    story.folder.chmod(0o755)
    first = story.start(Moment("step", bench.step(story), partial(send, signal.SIGSTOP)))
    while not first.steps:
        time.sleep(0.01)
    second = Story(story.folder, story.words)
    second.launches += story.launches
    wrong = wrong or refusal(second, "--output_dir")
    while first.processes[0].is_alive():
        os.kill(first.processes[0].pid or 0, signal.SIGCONT)
        time.sleep(0.01)
    code = first.processes[0].exitcode
    return bench.result(story, wrong or (f"the first ended with {code}" if code else ""))


def damage(bench: Bench) -> Result:
    """Bytes of checkpoints change; the newest intact one is found, with what was written into it."""
    draws, source = bench.draws, bench.written()
    files = [source / LAST, *numbered(source)[::-1], source / BEST]
    written = {path.name: (digest_of(content := load(path)), content["epoch"]) for path in files}
    with tempfile.TemporaryDirectory() as name:
        for path in files:
            Path(name, path.name).write_bytes(path.read_bytes())
        for path in files[: draws.integers(1, len(files))]:
            harm(Path(name, path.name), draws)
        try:
            found = latest(name, lambda line: None)
            content = load(found or "")
        except UserError as error:
            return Result(f"nothing found: {error}", [], [])
        digest, epoch = written[found.name if found else LAST]
        if digest_of(content) != digest:
            return Result(f"{found} was loaded with other bits", [], [])
        intact = [path.name for path in files if Path(name, path.name).read_bytes() == path.read_bytes()]
        older = epoch < max(written[name][1] for name in intact)
        return Result(f"{found} was taken, which is not the newest" if older else "", [], [])
