"""Dynamic curves of several runs in one figure, and their exits in one Markdown table.

    python scripts/plot_curves.py curves.png plain=runs/plain l2w=runs/l2w kept=results/cifar10/x.json ...

Each run is a label and a record of eval_dynamic.py, or the folder that has its record.json.
"""

from dataclasses import dataclass
from pathlib import Path

from common import read_flags, word

from experiment.layout import Exit, QuotaRow, read_record
from experiment.results import read_as
from utils import UserError, replacing, run_main


@dataclass(frozen=True)
class Flags:
    """What is drawn."""

    figure: Path = word("file to draw to: .png, .svg or .pdf")
    runs: tuple[str, ...] = word("LABEL=RECORD, a file or its folder")


@dataclass(frozen=True)
class Curves:
    """An evaluated run: its exits, and the settings of all of them; accuracies are fractions."""

    label: str
    exits: list[Exit]
    settings: list[QuotaRow]

    @classmethod
    def read(cls, text: str) -> "Curves":
        """The results from LABEL=RECORD; ValueError where there are none."""
        label, equals, place = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not LABEL=RECORD")
        path = Path(place) / "record.json" if Path(place).is_dir() else Path(place)
        if not path.is_file():
            raise UserError(f"there is no {path}: run eval_dynamic.py on the checkpoint first")
        record = read_as(path, "record of an evaluation", read_record)
        if not record.dynamic:
            raise UserError(f"{path} has no dynamic curve: evaluate with --mode dynamic or all")
        return cls(label, record.anytime, record.dynamic)

    @property
    def costs(self) -> list[float]:
        """Multiply-adds of the exits."""
        return [row.macs for row in self.exits]

    def row(self) -> str:
        """Top-1 of every exit, and of the best setting that costs no more than each exit but the first."""
        words = [f"{100 * row.acc1:.2f}" for row in self.exits]
        for cost in self.costs[1:]:
            good = [row.accuracy for row in self.settings if row.macs <= cost]
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
    heads = [f"exit {k}" for k in range(len(first.exits))]
    heads += [f"up to {cost / 1e6:.1f} M" for cost in first.costs[1:]]
    lines = [f"| run | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*lines, *(run.row() for run in runs)])


def draw(path: Path, runs: list[Curves]) -> None:
    """Accuracy against multiply-adds: lines for the curves, dots for single exits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        points = sorted((row.macs / 1e6, 100 * row.accuracy) for row in run.settings)
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=1.6, label=run.label)
        tops = [100 * row.acc1 for row in run.exits]
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
