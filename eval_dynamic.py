"""Evaluates a checkpoint: exits (anytime), thresholds by budget (dynamic), real early exit (runtime)."""

import installed  # noqa: F401

# isort: split
from dataclasses import replace
from pathlib import Path

import torch

from adaptive.choices import check_guarantees
from adaptive.exit_tables import exit_figures
from adaptive.flops import Costs, as_published, count, print_costs
from adaptive.reliability import ConfidenceFigures, confidence_figures, reliability
from adaptive.rules import rules_of
from deploy.backends import Exported, with_backend
from deploy.export import check_target, export_policies
from experiment.checkpoint import save
from experiment.confidence_lines import confidence_lines
from experiment.evaluation import find, judge, show, stage_times, time_policies
from experiment.lines import (
    anytime_lines,
    dynamic_lines,
    front_lines,
    headline_lines,
    routing_lines,
    runtime_lines,
)
from experiment.options import Given
from experiment.origin import origin_of
from experiment.recipe import read_command
from experiment.record import Record
from experiment.samples import Seen, see
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import run_main, writing


def evaluate_checkpoint(given: Given) -> None:
    """Evaluates what the flags name; prints and writes what the mode asks for."""
    subject = open_evaluation(given)
    exits = subject.recipe.exits
    costs = count(subject.network, subject.shape)
    # Wrong numbers fail before images are read.
    rules = []
    if exits.mode != "anytime" and not subject.policy:
        rules = rules_of(exits, costs.macs)
        check_guarantees(exits, costs.stages)
    if exits.export:
        check_target(Path(exits.export), compiled=exits.export_compiled)
    introduce(subject)
    subject, why = with_backend(subject)
    if why:
        print(why)
    times = stage_times(subject) if exits.latency and exits.mode != "anytime" else None
    seen = see(subject)
    if subject.compute.rank > 0:
        return  # all processes have the same tables
    folder = results_folder(subject)
    record = opening(subject, seen, costs)
    tell(record, anytime_lines(record.exits), folder)
    tell(record, confidence_lines(record.confidence), folder)
    if exits.mode == "anytime":
        record.write(folder)
        return
    found = find(subject, rules, seen, costs, times)
    record = judge(record, found, subject, seen, costs)
    tell(record, dynamic_lines(record.points) if record.points else [], folder)
    tell(record, front_lines(record.front) if record.front else [], folder)
    if record.routing:
        tell(record, routing_lines(record.routing), folder)
    for headline in record.headlines:
        tell(record, headline_lines(headline), folder)
    if exits.mode in ("runtime", "all"):
        record = replace(record, runtime=time_policies(record, subject))
        tell(record, runtime_lines(record.runtime), folder)
    show(record, subject, seen, folder).report(folder)
    print(f"wrote the tables, curve.png and report.html to {folder}")
    if exits.export:
        print(export_policies(record, subject, seen, evaluated_int8(subject)))


def evaluated_int8(subject: Subject) -> Path | None:
    """The exported folder whose stages in int8 have made the tables, if they did."""
    backend = subject.backend
    in_int8 = isinstance(backend, Exported) and backend.precision == "int8"
    return backend.exports.without((), "int8") if in_int8 else None


def opening(subject: Subject, seen: Seen, costs: Costs) -> Record:
    """The record of what every exit does to the test images."""
    return Record(
        exits=exit_figures(seen.test, costs.macs, costs.stages.alone()),
        provenance=subject.provenance(seen.origin, len(seen.test), costs.uncounted),
        origin=origin_of(subject, seen),
        unit=subject.unit,
        unit_costs=unit_costs(subject, costs),
        confidence=confidence_of(seen),
        reliability=reliability(seen.test.scores[0], seen.test.correct),
    )


def confidence_of(seen: Seen) -> list[ConfidenceFigures]:
    """What the confidence of the exits' own answers is worth, also with temperatures if there are any."""
    temperatures = seen.reading.temperatures
    if temperatures and seen.reading.answer == "exit":
        return confidence_figures(seen.own, seen.test, temperatures)
    return confidence_figures(seen.own)


def unit_costs(subject: Subject, costs: Costs) -> list[float]:
    """Costs of exits 0..k in the unit of dynamic.txt; a paper's count is of the network run as it does."""
    if subject.unit.counter == "papers":
        with torch.device("meta"):
            network = as_published(subject.network, subject.opened.arch)
        costs = count(network, subject.shape)
    return [one / subject.unit.operations for one in getattr(costs, subject.unit.counter)]


def introduce(subject: Subject) -> None:
    """Says what is evaluated."""
    if subject.compute.rank > 0:
        return
    name, images = subject.opened.arch["name"], len(subject.splits.test)
    print(f"{name}: {subject.opened.weights} in {subject.opened.source}, {images} test images")
    for note in subject.splits.source.notes:
        print(note)
    if subject.procedure_line:
        print(subject.procedure_line)
    if subject.recipe.runtime.flops:
        print_costs(subject.network, subject.opened.arch, subject.shape[1])


def results_folder(subject: Subject) -> Path:
    """The folder for results; a cascade leaves a self-contained checkpoint there."""
    beside = "runs/ebjr" if subject.assembled else Path(subject.opened.source).parent
    folder = Path(subject.recipe.runtime.output_dir or beside)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if subject.assembled:
        save(folder / "cascade.pth", subject.checkpoint())
    return folder


def tell(record: Record, lines: list[str], folder: Path) -> None:
    """Prints the latest results and writes all so far, so that nothing is lost if the rest fails."""
    if lines:
        print("\n".join(lines))
    record.save(folder)


def main(argv: list[str]) -> None:
    """The command line."""
    evaluate_checkpoint(read_command(EVALUATION, argv))


if __name__ == "__main__":
    run_main(main)
