"""Dynamic curves of several runs in one figure, and their exits in one Markdown table.

    python scripts/plot_curves.py curves.png plain=runs/plain l2w=runs/l2w ...

Each run is a label and a folder that `eval_dynamic.py` wrote `anytime.json` and `dynamic.json` to.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import replacing, run_main


def read(folder, name):
    """One of the files of an evaluation; ValueError where there is none."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"no {name} in {folder}: run eval_dynamic.py on its checkpoint first")
    return json.loads(path.read_text())


def table(runs):
    """Top-1 of every exit, and of the best row of the dynamic curve that costs no more than each exit but the
    first."""
    costs = {label: [e["macs"] for e in exits] for label, (exits, _) in runs.items()}
    first = next(iter(costs))
    for label, other in costs.items():
        if other != costs[first]:
            raise ValueError(
                f"{label} is another network than {first}: exits cost {other}, not {costs[first]}"
            )
    rows = []
    for label, (exits, curve) in runs.items():
        best = [
            max((r["accuracy"] for r in curve if r["macs"] <= e["macs"]), default=None) for e in exits[1:]
        ]
        words = [f"{100 * e['acc1']:.2f}" for e in exits] + [
            "–" if b is None else f"{100 * b:.2f}" for b in best
        ]
        rows.append(f"| {label} | {' | '.join(words)} |")
    exits = next(iter(runs.values()))[0]
    heads = [f"exit {e['exit']}" for e in exits] + [f"up to {e['macs'] / 1e6:.1f} M" for e in exits[1:]]
    return "\n".join([f"| run | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *rows])


def draw(path, runs):
    """Accuracy against multiply-adds: lines for the curves, dots for single exits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for label, (exits, curve) in runs.items():
        points = sorted((row["macs"] / 1e6, 100 * row["accuracy"]) for row in curve)
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=1.6, label=label)
        single = [(e["macs"] / 1e6, 100 * e["acc1"]) for e in exits]
        axes.scatter(*zip(*single, strict=True), s=24, color=line.get_color())
    axes.set(xlabel="multiply-adds per image (M)", ylabel="top-1 accuracy (%)")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="lines: early exit; dots: one exit for all")
    with replacing(path) as temp:
        figure.savefig(temp, format=path.suffix[1:])


def main(argv):
    """Draws the figure and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", type=Path, help="file to draw to: .png, .svg or .pdf")
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    args = parser.parse_args(argv)
    runs = {}
    for word in args.runs:
        label, equals, folder = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not LABEL=FOLDER")
        runs[label] = read(folder, "anytime.json"), read(folder, "dynamic.json")
    text = table(runs)
    draw(args.figure, runs)
    print(text)


if __name__ == "__main__":
    run_main(main)
