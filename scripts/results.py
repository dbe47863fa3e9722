"""Tables of the records in results/: index.csv and index.html there, and the marked blocks of the documents.

    python scripts/results.py                  # rewrites all
    python scripts/results.py --check true     # says what differs; exit code 1 if anything does

A record is the record.json of an evaluation under a name of its own; to add one, add its file. A block is

    <!-- results: exits PATTERN ... -->
    <!-- end of results -->

where each PATTERN names records (cifar10/msdnet*), which are listed in this order. `exits` is the accuracy of
every exit; `curves` the area below the curve over log cost and the accuracy within three costs that all
share, with p of Welch's t-test against the first setting, corrected by Holm's method, the seeds of one
setting as a row: mean ± standard deviation; `speed` the speed of the chosen policies that a record has timed.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path

from common import read_flags

from experiment.comparison import Group, comparison, markdown
from experiment.provenance import ROOT
from experiment.published_points import read_published
from experiment.results import Result, Spread, by_setting, read_results
from experiment.results_page import page_of
from utils import UserError, option, run_main, write_text

BLOCK = re.compile(r"(<!-- results: (\w+) ([^>]+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
MARKS = re.compile(r"^<!-- *(?:end of )?results\b[^>]*>", re.IGNORECASE | re.MULTILINE)  # well formed or not
COLUMNS = (
    "record",
    "network",
    "regime",
    "data_set",
    "test_images",
    "seed",
    "exits",
    "macs",
    "top1",
    "commit",
    "machine",
)


@dataclass(frozen=True)
class Flags:
    """Where records and documents are."""

    results: Path = option(ROOT / "results", "folder of records")
    docs: Path = option(ROOT / "docs", "folder of documents with marked blocks")
    check: bool = option(False, "write nothing; say what differs, with exit code 1")


def index_of(results: Sequence[Result]) -> str:
    """One line per record, as CSV; cost and accuracy are those of the last exit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in results:
        about, made, last = one.about, one.origin.made, one.exits[-1]
        trained = (one.name, about.network, one.regime, about.data_set, about.num_test, one.seed)
        figures = (len(one.exits), round(last.macs), last.accuracy)
        writer.writerow((*trained, *figures, made.commit, made.machine))
    return text.getvalue()


def exits_table(results: Sequence[Result]) -> str:
    """Cost and accuracy of every exit, a row per setting."""
    groups = by_setting(results).values()
    count = max(len(group[0].exits) for group in groups)
    rows = []
    for group in groups:
        columns = zip(*(one.exits for one in group), strict=True)
        cells = [
            f"{Spread.of([one.accuracy for one in column]).text(100)} at {column[0].macs / 1e6:.2f} M"
            for column in columns
        ]
        first = group[0]
        about = (first.stem, f"`{first.about.network}`", first.regime, f"{first.about.num_test:,}")
        rows.append([*about, *cells, *["–"] * (count - len(cells))])
    return markdown(
        ["record", "network", "regime", "test images", *(f"exit {k}, %" for k in range(count))], rows
    )


def curves_table(results: Sequence[Result]) -> str:
    """Area below the curve and accuracy within three budgets, with p against the first setting."""
    groups = [Group(found[0].stem, found) for found in by_setting(results).values()]
    heads, rows = comparison(groups)
    trained = [_images(group.results[0]) for group in groups]
    rows = [[title, images, *cells] for (title, *cells), images in zip(rows, trained, strict=True)]
    return markdown(["record", "images trained on", *heads[1:]], rows)


def _images(result: Result) -> str:
    """How many images a training with a budget, or all of a cascade's, has seen, repetitions counted."""
    trainings = result.origin.training.members or [result.origin.training]
    counts = [(one.epochs or 0) * (one.epoch_images or 0) for one in trainings]
    return f"{sum(counts):,}" if all(counts) else "–"


def speed_table(results: Sequence[Result]) -> str:
    """Speed of the chosen policies that a record has timed; accuracy and cost are of all test images."""
    rows = []
    for one in results:
        record = one.record
        chosen = {each.name: each for each in (record.headline, *record.headlines) if each}
        ways = {way.policy: way for way in record.runtime.table} if record.runtime else {}
        for gain in record.runtime.points if record.runtime else ():
            policy, way = chosen.get(gain.point), ways.get(f"{gain.point}, throughput order")
            alone = ways.get(f"exit {len(one.exits) - 1} alone")
            if not policy or not way or not alone:
                said = "was timed, but is no chosen policy with images/s beside those of the last exit alone"
                raise UserError(f"{one.name}: {gain.point} {said}")
            figures = 100 * policy.accuracy.value, policy.macs.value / 1e6
            low, high = gain.speedup_interval
            times = f"{gain.speedup:.2f} [{low:.2f}, {high:.2f}]"
            speeds = f"{way.images_per_s:,.0f}", f"{alone.images_per_s:,.0f} at {alone.macs / 1e6:.2f} M"
            rows.append([one.stem, gain.point, *(f"{figure:.2f}" for figure in figures), *speeds, times])
    heads = ["record", "policy", "top-1, %", "MACs, M", "images/s", "the last exit alone", "times [95 %]"]
    return markdown(heads, rows)


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "exits": exits_table,
    "curves": curves_table,
    "speed": speed_table,
}


def rewritten(text: str, results: Sequence[Result], where: str) -> str:
    """A document with its blocks made anew. Raises ValueError for an unknown kind and for no records.

    And for a mark without its other one, between which and the next block prose would be lost.
    """
    marks = [mark for match in BLOCK.finditer(text) for mark in (match[1].rstrip("\n"), match[5])]
    for found, expected in zip_longest(MARKS.findall(text), marks):
        if found != expected:
            raise UserError(f"{where}: {found} is no pair of <!-- results: KIND PATTERN ... --> and its end")

    def block(match: re.Match) -> str:
        start, kind, patterns, _, end = match.groups()
        if kind not in TABLES:
            raise UserError(f"{where}: results: {kind}; accepted: {', '.join(TABLES)}")
        chosen = {}
        for pattern in patterns.split():
            found = {one.name: one for one in results if fnmatchcase(one.name, pattern)}
            if not found:
                raise UserError(f"{where}: no record is named {pattern}")
            chosen = chosen | found  # in the order of the patterns
        return f"{start}\n{TABLES[kind]([*chosen.values()])}\n{end}"

    return BLOCK.sub(block, text)


def main(argv: list[str]) -> int:
    """Rewrites the files that differ, or names them; returns the exit code."""
    flags = read_flags(Flags, argv, __doc__)
    for name, folder in (("results", flags.results), ("docs", flags.docs)):
        if not folder.is_dir():
            raise UserError(f"--{name} {folder}: no such folder")
    results = read_results(flags.results)
    page = page_of(results, read_published(flags.results))
    made = {flags.results / "index.csv": index_of(results), flags.results / "index.html": page}
    for path in sorted(flags.docs.glob("*.md")):
        made[path] = rewritten(path.read_text(encoding="utf-8"), results, path.name)
    differ = [
        path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in differ:
        if not flags.check:
            write_text(path, made[path])
        print(f"{path} {'differs from the records' if flags.check else 'written'}")
    print(f"{len(results)} records, {len(differ)} of {len(made)} files differ")
    return int(flags.check and bool(differ))


if __name__ == "__main__":
    run_main(lambda argv: sys.exit(main(argv)))
