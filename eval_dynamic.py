"""Evaluates a checkpoint: exits (anytime), thresholds by budget (dynamic), real early exit (runtime)."""

import installed  # noqa: F401

# isort: split
from dataclasses import replace
from pathlib import Path

import torch

from adaptive.exit_tables import ExitTables, exit_figures
from adaptive.flops import Costs, as_published, count, print_costs
from adaptive.headline import headline_of
from adaptive.policy import Policy, content_hash, model_hash
from adaptive.routing import routing
from adaptive.rules import choose, policies_of, rules_of
from adaptive.timing import Comparison, Deployed, compare_orders
from experiment.checkpoint import save
from experiment.options import Given
from experiment.recipe import read_command
from experiment.record import (
    Record,
    anytime_lines,
    dynamic_lines,
    headline_lines,
    routing_lines,
    runtime_lines,
)
from experiment.samples import calibrate, check_calibration, tables, test_images
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import run_main, writing


def evaluate_checkpoint(given: Given) -> None:
    """Evaluates what the flags name; prints and writes what the mode asks for."""
    subject = open_evaluation(given)
    wanted = subject.recipe.exits
    costs = count(subject.network, subject.shape)
    rules = rules_of(wanted, costs.macs)  # wrong numbers fail before images are read
    test, calib, origin = read_tables(subject)
    if subject.compute.rank > 0:
        return  # all processes have the same tables
    folder = results_folder(subject)
    exits = exit_figures(test, costs.macs, costs.stages.alone())
    record = Record(
        exits=exits,
        provenance=subject.provenance(origin, len(test), costs.uncounted),
        unit=subject.unit,
        unit_costs=unit_costs(subject, costs),
    )
    tell(record, anytime_lines(exits), folder)
    if calib is None:
        return
    policies = policies_of(rules, calib, costs.macs, subject.recipe.exits.confidence)
    points = [policy.simulate(test, costs.macs) for policy in policies]
    record = replace(record, points=points)
    tell(record, dynamic_lines(points), folder)
    choice = choose(policies, subject.recipe.exits, calib.means()["acc1"][-1])
    chosen = choice.rows[0]
    record = replace(record, policy=signed(policies[chosen], subject, calib, origin))
    if len(exits) > 1:
        record = replace(record, routing=routing(test, points[chosen], costs.macs, costs.papers))
        tell(record, routing_lines(record.routing), folder)
    headline = headline_of(f"row {chosen}", choice.reason, test, points[chosen], exits)
    headline = replace(headline, calibrated=calib is not test)
    record = replace(record, headline=headline)
    tell(record, headline_lines(headline), folder)
    if subject.recipe.exits.mode in ("runtime", "all"):
        runtime = time_policies(subject, {f"row {i}": policies[i] for i in choice.rows})
        record = replace(record, runtime=runtime)
        tell(record, runtime_lines(runtime), folder)
    record.report(folder)
    print(f"wrote the tables, curve.png and report.html to {folder}")


def unit_costs(subject: Subject, costs: Costs) -> list[float]:
    """Costs of exits 0..k in the unit of dynamic.txt; a paper's count is of the network run as it does."""
    if subject.unit.counter == "papers":
        with torch.device("meta"):
            network = as_published(subject.network, subject.opened.arch)
        costs = count(network, subject.shape)
    return [one / subject.unit.operations for one in getattr(costs, subject.unit.counter)]


def read_tables(subject: Subject) -> tuple[ExitTables, ExitTables | None, str]:
    """Tables to report on, tables to choose thresholds on (None for anytime), and what the latter are of."""
    if subject.compute.rank == 0:
        name, images = subject.opened.arch["name"], len(subject.splits.test)
        print(f"{name}: {subject.opened.weights} in {subject.opened.source}, {images} test images")
        for note in subject.splits.source.notes:
            print(note)
        if subject.procedure_line:
            print(subject.procedure_line)
        if subject.recipe.runtime.flops:
            print_costs(subject.network, subject.opened.arch, subject.shape[1])
    calibrated = subject.recipe.exits.mode != "anytime"
    if calibrated:
        check_calibration(subject)  # before any image is read
    test = tables(subject, subject.splits.test, "test")
    return calibrate(subject, test) if calibrated else (test, None, "none")


def signed(policy: Policy, subject: Subject, calib: ExitTables, origin: str) -> Policy:
    """The policy with the hashes of the weights and of the images that it was found with."""
    images = content_hash({f"{subject.recipe.data.data_set}: {origin}": calib.targets})
    return replace(policy, model_hash=model_hash(subject.network), calib_hash=images)


def time_policies(subject: Subject, policies: dict[str, Policy]) -> Comparison:
    """Runs real early exit with some policies and times it beside the static networks."""
    images, targets = test_images(subject, subject.recipe.exits.runtime_images)
    deployed = Deployed.of(
        subject.network,
        images,
        fold_bn=subject.recipe.exits.fold_bn,
        channels_last=subject.compute.channels_last,
        dtype=subject.compute.amp,
    )
    return compare_orders(policies, deployed, targets, micro_batch=subject.recipe.exits.micro_batch)


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
    print("\n".join(lines))
    record.save(folder)


def main(argv: list[str]) -> None:
    """The command line."""
    evaluate_checkpoint(read_command(EVALUATION, argv))


if __name__ == "__main__":
    run_main(main)
