"""Evaluates a checkpoint: exits (anytime), thresholds by budget (dynamic), real early exit (runtime)."""

import installed  # noqa: F401

# isort: split
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from adaptive.exit_tables import ExitTables, exit_figures
from adaptive.flops import Costs, as_published, count, print_costs, single_costs
from adaptive.headline import headline_of
from adaptive.policy import Policy, choose, content_hash, model_hash, policies_of, rules_of
from adaptive.routing import routing
from adaptive.timing import Comparison, Deployed, compare_orders
from datasets import Split, ordered_loader
from engine import evaluate
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
from experiment.subject import EVALUATION, Subject, open_evaluation
from utils import Compute, UserError, run_main, writing


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
    exits = exit_figures(test, costs.macs, single_costs(subject.network, subject.shape))
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
    test = tables(subject, subject.splits.test, "test")
    return (test, None, "none") if subject.recipe.exits.mode == "anytime" else calibrate(subject, test)


def tables(subject: Subject, images: Dataset, title: str) -> ExitTables:
    """What every exit predicts for every image."""
    loader = ordered_loader(images, subject.recipe.runtime, subject.compute)
    confidence = subject.recipe.exits.confidence
    return evaluate(subject.network, loader, subject.compute, confidence=confidence, title=title)


def calibrate(subject: Subject, test: ExitTables) -> tuple[ExitTables, ExitTables, str]:
    """Tables to report on, tables to choose thresholds on, and a description of the latter's images."""
    train, calib, kind = subject.splits.train, subject.splits.calib, subject.recipe.exits.calib
    if kind == "none":
        return test, test, "no images, as they are given; expected figures are of the test images"
    generator = torch.Generator().manual_seed(subject.recipe.data.seed)
    if kind == "half_test":
        order, half = torch.randperm(len(test), generator=generator), len(test) // 2
        origin = f"{half} random test images, not reported on"
        return test.part(order[half:]), test.part(order[:half]), origin
    origin = f"{len(calib)} images held out of the training set, evaluation transform"
    if kind == "train_augmented":
        if not isinstance(train, Split):
            raise UserError("--calib train_augmented needs training images by index; a stream has none")
        first = torch.randperm(len(train), generator=generator)[: 101 * subject.recipe.runtime.batch_size]
        calib = Subset(train, first.tolist())
        origin = f"{len(calib)} training images with training augmentation, the published procedure"
    elif subject.held_out is None:
        origin += " (of a checkpoint without a stored split: the network was probably trained on them)"
    if len(calib) == 0:
        other = "use --calib half_test, or train_augmented as L2W and Dyn-Perceiver do"
        raise UserError(f"no images were held out for calibration (--num_calib 0); {other}")
    if subject.compute.rank == 0:
        print(f"thresholds are chosen on {origin}")
    return test, tables(subject, calib, "calibrate"), origin


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


def test_images(subject: Subject, number: int) -> tuple[Tensor, Tensor]:
    """At most `number` test images [N, 3, H, W], evenly spread, and their targets [N], on the device."""
    test, device = subject.splits.test, subject.compute.device
    if isinstance(test, Split):  # files may be sorted by class
        number = min(number, len(test))
        test = Subset(test, torch.linspace(0, len(test) - 1, number).long().tolist())
    loader = ordered_loader(test, subject.recipe.runtime, Compute(device))
    columns = zip(*islice(loader, -(-number // loader.batch_size)), strict=True)
    images, targets = (torch.cat(column)[:number].to(device) for column in columns)
    return images, targets


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
