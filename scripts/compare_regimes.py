"""Compares ways to train early exits on the same images, each for the same seconds of one thread.

    python scripts/compare_regimes.py --out runs/regimes --seconds 3600 --seeds 0 1 2 --jobs 2 \\
        --data_set CIFAR10 --data_path "$DATA/cifar10"

The rows are in compare_regimes.yaml. First a few training steps of every row are timed in turn, in processor
seconds of one thread; the budget over that is the images that a row trains on. What a teacher and the
networks of a cascade take is part of the budget of the rows that need them. Nothing is evaluated in training,
and nothing is chosen: the last weights count. Then policies are searched on held-out images.

The same command goes on where it was stopped, at whatever time. Kept in --out are steps.json, the seconds
per image; runs/, logs/ and evaluations/; and records/, which the tables are made of. A run that fails is
named and does not stop the others. `--speed true`, with nothing beside it on the machine, then times every
row's network of the first seed with its cheapest policy that comes, on the held-out images, within a point of
the best of the family's first row.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from common import print_table, read_flags

from regimes_rows import Row, chosen, plan_of, read_rows
from regimes_runs import Matrix
from regimes_steps import measure
from regimes_table import Outcome, family_table

from experiment.recipe import words_of
from utils import UserError, option, run_main, to_json, write_text

DROP = 0.01  # of accuracy, at which speed is compared


@dataclass(frozen=True)
class Flags:
    """What is compared, on which images, for how long."""

    out: Path = option(Path("runs/regimes"), "folder of everything that the runs leave")
    rows: Path = option(Path(__file__).with_suffix(".yaml"), "file of rows")
    only: tuple[str, ...] = option((), "these families or rows (FAMILY-ROW), and what they need")
    seconds: float = option(600.0, "processor seconds of a row's training, on one thread", low=0)
    seeds: tuple[int, ...] = option((0, 1, 2), "of splits, weights and training", low=0)
    jobs: int = option(1, "runs at a time, a thread each", low=1)
    steps: int = option(3, "training steps that are timed, twice in a round; a multiple of 3", low=1)
    rounds: int = option(3, "in which all rows are timed, after one that does not count", low=1)
    data_set: str = option("DIGITS", "as in main_earlyExit.py")
    data_path: str = option("", "as there")
    eval_data_path: str = option("", "as there")
    speed: bool = option(False, "also time the networks at equal accuracy, with nothing beside")
    runtime_images: int = option(2000, "test images for that", low=1)

    @property
    def data(self) -> list[str]:
        """The data, as words of a command line."""
        names = "data_set", "data_path", "eval_data_path"
        return sum((words_of(name, getattr(self, name)) for name in names if getattr(self, name)), [])


def timed_steps(rows: Sequence[Row], flags: Flags) -> dict[str, Any]:
    """Seconds per image of every row that is trained, and the number of training images; kept in steps.json.

    Raises ValueError if the folder was begun with another budget or with rows that have changed since.
    """
    path = flags.out / "steps.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    about = {"seconds": flags.seconds, "data": flags.data}
    for name, value in about.items():
        if known.get(name, value) != value:
            raise UserError(f"--out {flags.out} was begun with {name} {known[name]}, not {value}")
    listed = known.get("rows", {})
    for row in rows:
        now = json.loads(to_json(asdict(row)))
        if listed.setdefault(row.name, now) != now:
            raise UserError(f"--out {flags.out} was begun with another {row.name}; take a new folder")
    times = known.get("image_seconds", {})
    new = [row for row in rows if not row.members and row.name not in times]
    if new:
        teachers = {row.teacher for row in read_rows(flags.rows)}
        lengths = {"teachers": teachers, "steps": flags.steps, "rounds": flags.rounds}
        known["num_train"], found = measure(new, flags.data, flags.out / "untrained", **lengths)
        times |= found
    known |= {**about, "rows": listed, "image_seconds": times}
    write_text(path, to_json(known, indent=1))
    return known


def shown_steps(rows: Sequence[Row], times: dict[str, float], matrix: Matrix) -> None:
    """Prints what the budget allows."""
    heads = ["row", "ms/image:.2f", "images/s:.0f", "epochs:d", "images in each:d", "s:.1f"]
    trained = [row.name for row in rows if not row.members]
    print_table(heads, [(one, 1e3 * times[one], 1 / times[one], *matrix.plans[one]) for one in trained])


def show_speed(outcomes: Sequence[Outcome], matrix: Matrix, images: int) -> None:
    """Prints images/s of a family's rows, each with its cheapest policy as accurate as the first row's.

    All are of the first seed. That a policy is as accurate is known from the held-out images; it may be a
    point below the best of the first row's. Test images say how accurate it is.
    """
    seed = matrix.seeds[0]
    fronts = [matrix.record(f"{one.row.name}-seed{seed}")["front"] for one in outcomes]
    goal = max(point["policy"]["accuracy"] for point in fronts[0]) - DROP
    found = []
    for row, front in zip((one.row for one in outcomes), fronts, strict=True):
        good = [point for point in front if point["policy"]["accuracy"] >= goal]
        if not good:
            found.append((row.title, "not reached", *["–"] * 2))
            continue
        record = matrix.speed(row, seed, min(good, key=lambda point: point["macs"])["policy"], images)
        chosen = record["headline"]
        named = f"{chosen['name']}, throughput order"
        speed = next(line["images_per_s"] for line in record["runtime"]["table"] if line["policy"] == named)
        figures = chosen["macs"]["value"] / 1e6, 100 * chosen["accuracy"]["value"]
        found.append((row.title, f"{speed:,.0f}", *(f"{figure:.2f}" for figure in figures)))
    expected = f"{100 * goal:.2f} % of held-out images"
    print(f"\n{outcomes[0].row.family}, seed {seed}: at {expected} or more, one thread")
    print_table(["row", "images/s", "M", "test accuracy, %"], found)


def main(argv: list[str]) -> int:
    """Runs what is left of the matrix and prints its tables; returns the exit code."""
    flags = read_flags(Flags, argv, __doc__)
    rows = chosen(read_rows(flags.rows), flags.only)
    flags.out.mkdir(parents=True, exist_ok=True)
    known = timed_steps(rows, flags)
    times = known["image_seconds"]
    plans = {
        row.name: plan_of(row, flags.seconds, times[row.name], known["num_train"])
        for row in rows
        if not row.members
    }
    matrix = Matrix(flags.out, flags.seeds, flags.data, plans)
    shown_steps(rows, times, matrix)
    failed = matrix.run_all(rows, flags.jobs)
    parts = {name for row in rows for name in row.needs}
    for _, family in groupby(matrix.outcomes(rows), key=lambda one: one.row.family):
        outcomes = list(family)
        if parts.issuperset(one.row.name for one in outcomes):
            continue  # nothing but parts of other rows
        first = next(row for row in rows if row.family == outcomes[0].row.family)
        if outcomes[0].row != first:
            failed.append(f"no table of {first.family}: {first.title}, its first row, has no record")
            continue
        print(f"\n{family_table(outcomes)}", end="")
        if flags.speed:
            try:
                show_speed(outcomes, matrix, flags.runtime_images)
            except RuntimeError as error:
                failed.append(f"speed: {error}")
    print("\n" + "\n".join([f"{len(failed)} runs failed", *failed]))
    return int(bool(failed))


if __name__ == "__main__":
    run_main(lambda argv: sys.exit(main(argv)))
