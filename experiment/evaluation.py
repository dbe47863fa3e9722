"""What an evaluation does with the tables of its images: finds policies, judges them, shows what they do."""

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from adaptive.choices import Calibration, Found, find_policies
from adaptive.classes import class_rows
from adaptive.exits import CHOOSING
from adaptive.flops import Costs
from adaptive.front import front_rows
from adaptive.goals import Choice
from adaptive.headline import headline_of
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.reference import Reference
from adaptive.routing import routing
from adaptive.rules import Rule, rules_of
from adaptive.stage_timing import StageTimes, measure_stages
from adaptive.timing import Comparison, Deployed, compare_orders
from experiment.galleries import galleries
from experiment.origin import Origin
from experiment.provenance import command_line
from experiment.record import Record, describe_machine
from experiment.sample_rows import write_samples
from experiment.samples import Seen, see, test_images
from experiment.subject import Subject
from utils import UserError

TIMED_IMAGES = 200  # that the stages of one image at a time are timed on


def find(
    subject: Subject, rules: list[Rule], seen: Seen, costs: Costs, times: StageTimes | None = None
) -> Found:
    """The policy read from a file, or policies found on the calibration images.

    Goals in milliseconds need `times`.
    """
    exits = subject.recipe.exits
    if subject.policy:
        return Found([], [], [Choice("policy", subject.policy, f"read from {exits.policy}")])
    assert seen.calib is not None
    calib = Calibration(seen.calib, seen.reading, costs.stages, times, subject.recipe.data.seed)
    return find_policies(exits, rules, calib)


def deployed_policy(subject: Subject, costs: Costs) -> tuple[Policy, Seen]:
    """The policy that an evaluation would deploy, and the images that it is found and judged with."""
    exits = subject.recipe.exits
    rules = [] if subject.policy else rules_of(exits, costs.macs)
    times = stage_times(subject) if exits.latency else None
    seen = see(subject)
    return find(subject, rules, seen, costs, times).choices[0].policy, seen


def stage_times(subject: Subject) -> StageTimes:
    """What every stage takes for one image at a time, tuned for deployment.

    Raises ValueError for a goal that is below the first exit's time.
    """
    exits = subject.recipe.exits
    images, _ = test_images(subject, TIMED_IMAGES)
    machine = describe_machine(subject.compute.device)
    reading = Reading(exits.confidence, exits.answer)
    times = measure_stages(deployed(subject, images), reading=reading, machine=machine)
    first = times.costs.leaving()[0]
    for goal in exits.goals:
        if goal.kind == "latency" and goal.value < first:
            raise UserError(f"a latency of {goal.value:.4g} ms is below the {first:.4g} ms of the first exit")
    return times


def deployed(subject: Subject, images: Tensor) -> Deployed:
    """The network as trained and as deployed, and images for both."""
    if subject.backend:
        return Deployed.by(subject.backend, subject.network, images)
    return Deployed.of(
        subject.network,
        images,
        fold_bn=subject.recipe.exits.fold_bn,
        channels_last=subject.compute.channels_last,
        dtype=subject.compute.amp,
    )


def judge(record: Record, found: Found, subject: Subject, seen: Seen, costs: Costs) -> Record:
    """The record with what all policies do to the test images."""
    choices = [replace(one, policy=sign(one.policy, record.origin, subject)) for one in found.choices]
    headlines = [headline_of(one, seen.read_by(one.policy), costs.stages) for one in choices]
    if seen.calib is seen.test:
        headlines = [replace(one, calibrated=False) for one in headlines]
    chosen, point = choices[0].policy, headlines[0].point
    test = seen.read_by(chosen)
    return replace(
        record,
        points=[policy.simulate(seen.test, costs.macs) for policy in found.sweep],
        front=front_rows(found.front, seen.test, costs.stages, command_of, keep=chosen),
        policies=[one.policy for one in choices],
        headline=headlines[0],
        headlines=headlines,
        guarantee=chosen.guarantee,
        routing=routing(test, point, costs.macs, costs.papers) if len(record.exits) > 1 else None,
        classes=class_rows(test, chosen.exit_of(test), subject.splits.source.class_names),
    )


def command_of(policy: Policy) -> str:
    """The command of this evaluation with the budget of a policy in place of its goals."""
    assert policy.macs is not None
    return f"{command_line(without(sys.argv, CHOOSING))} --budget {math.ceil(policy.macs)}"


def without(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept, keeps = [], True
    for word in argv:
        if word.startswith("--"):
            keeps = word[2:].partition("=")[0].replace("-", "_") not in names
        if keeps:
            kept.append(word)
    return kept


def sign(policy: Policy, origin: Origin, subject: Subject) -> Policy:
    """The policy with the hashes of weights and images that it was found with, and how it was made.

    One that comes from a file stays as it is.
    """
    if subject.policy:
        return policy
    return replace(policy, model_hash=origin.model, calib_hash=origin.calib, made=origin.made)


def show(record: Record, subject: Subject, seen: Seen, folder: Path) -> Record:
    """Writes samples.csv and monitor.json by the first policy, and adds images of what it does to the record.

    A monitor compares with the images reported on, since no threshold was chosen on them.
    """
    policy, names = record.policies[0], subject.splits.source.class_names
    test, images = seen.read_by(policy), subject.splits.test
    data = subject.recipe.data
    write_samples(
        folder / "samples.csv",
        images,
        seen.places,
        test,
        policy,
        data.eval_data_path or data.data_path or "",
    )
    Reference.of_policy(policy, test).save(folder / "monitor.json")
    return replace(record, galleries=galleries(images, seen.places, test, policy, names))


def time_policies(record: Record, subject: Subject) -> Comparison:
    """Runs real early exit with the chosen policies and times it beside the static networks."""
    images, targets = test_images(subject, subject.recipe.exits.runtime_images)
    named = {one.name: one.point.policy for one in record.headlines}
    micro_batch = subject.recipe.exits.micro_batch
    return compare_orders(named, deployed(subject, images), targets, micro_batch=micro_batch)
