"""Dynamic curves of several runs in one figure, and their exits in one Markdown table.

    python scripts/plot_curves.py curves.png plain=runs/plain l2w=runs/l2w ...

Each run is a label and a folder that `eval_dynamic.py` wrote `anytime.json` and `dynamic.json` to.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import read_flags, word

from utils import UserError, replacing, run_main

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Flags:
    """What is drawn."""

    figure: Path = word("file to draw to: .png, .svg or .pdf")
    runs: tuple[str, ...] = word("LABEL=FOLDER")


@dataclass(frozen=True)
class Curves:
    """An evaluated run: rows for each exit, and for each setting of all; accuracies are fractions."""

    label: str
    exits: Rows
    settings: Rows

    @classmethod
    def read(cls, text: str) -> "Curves":
        """The results from LABEL=FOLDER; ValueError where the folder holds none."""
        label, equals, folder = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not LABEL=FOLDER")
        contents = []
        for name in ("anytime.json", "dynamic.json"):
            path = Path(folder) / name
            if not path.is_file():
                raise UserError(f"no {name} in {folder}: run eval_dynamic.py on its checkpoint first")
            contents.append(json.loads(path.read_text()))
        return cls(label, *contents)

    @property
    def costs(self) -> list[int]:
        """Multiply-adds of the exits."""
        return [row["macs"] for row in self.exits]

    def row(self) -> str:
        """Top-1 of every exit, and of the best setting that costs no more than each exit but the first."""
        words = [f"{100 * row['acc1']:.2f}" for row in self.exits]
        for cost in self.costs[1:]:
            good = [row["accuracy"] for row in self.settings if row["macs"] <= cost]
            words.append(f"{100 * max(good):.2f}" if good else "–")
        return f"| {self.label} | {' | '.join(words)} |"


def table(runs: list[Curves]) -> str:
    """A row for each run; ValueError where they are not of one network."""
    first = runs[0]
    for other in runs[1:]:
        if other.costs != first.costs:
            raise UserError(
                f"{other.label} is another network than {first.label}: "
                f"exits cost {other.costs}, not {first.costs}"
            )
    heads = [f"exit {row['exit']}" for row in first.exits]
    heads += [f"up to {cost / 1e6:.1f} M" for cost in first.costs[1:]]
    lines = [f"| run | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*lines, *(run.row() for run in runs)])


def draw(path: Path, runs: list[Curves]) -> None:
    """Accuracy against multiply-adds: lines for the curves, dots for single exits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        points = sorted((row["macs"] / 1e6, 100 * row["accuracy"]) for row in run.settings)
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=1.6, label=run.label)
        tops = [100 * row["acc1"] for row in run.exits]
        axes.scatter([cost / 1e6 for cost in run.costs], tops, s=24, color=line.get_color())
    axes.set(xlabel="multiply-adds per image (M)", ylabel="top-1 accuracy (%)")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    title = "lines: early exit; dots: one exit for all"
    figure.legend(loc="outside lower center", ncols=3, frameon=False, title=title)
    with replacing(path) as temp:
        figure.savefig(temp, format=path.suffix[1:])


def main(argv: list[str]) -> None:
    """Draws the figure and prints the table."""
    flags = read_flags(Flags, argv, __doc__)
    runs = [Curves.read(text) for text in flags.runs]
    text = table(runs)
    draw(flags.figure, runs)
    print(text)


if __name__ == "__main__":
    run_main(main)
