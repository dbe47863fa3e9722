"""How fast a cascade of two networks answers images: the published way, the teacher alone, really routed.

    python scripts/bench_ebjr.py "$DATA/cifar10_test.npz" STUDENT.pth TEACHER.pth [--policy policy.json]

The published way is batch 1: student, a test in Python, teacher. Student, teacher and cascade run at their
fastest micro-batch, as trained and as deployed (batch norm folded, channels-last), all in turn in one run.
The floor is the multiply-adds at the speed of a large matrix product.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common import check_policy_alone, matrix_products, policy_for, print_table, read_flags, warm_times, word

import torch
from torch import Tensor

from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY
from adaptive.timing import Contestant, Deployed, Measurement, early_contestants, measure, static_contestants
from datasets import View
from experiment import open_network
from experiment.cascade import read_cascade
from experiment.record import describe_machine
from loading.sources import load_npz
from models import MultiExitModel
from utils import option, run_main

CPU = torch.device("cpu")
FIRST = "(a) the published way"
HEADS = [
    "way",
    "images/s:.0f",
    "of (a):.2f",
    "MACs, M:.2f",
    "top-1, %:.2f",
    "floor, images/s:.0f",
    "of floor:.2f",
]


@dataclass(frozen=True)
class Flags:
    """What is timed."""

    images: Path = word("an .npz file of 32 x 32 test images")
    student: str = word("NAME:weights=FILE, or a checkpoint of ours")
    teacher: str = word("the same")
    confidence: str | None = option(None, "by which the student defers; default: energy_softmax")
    threshold: float | None = option(None, "below which it does; default: 2.46")
    policy: str = option("", "a saved policy of the cascade, which says both")
    classes: int = option(10, low=2)
    rounds: int = option(5, "of which the median is shown", low=1)
    product: int = option(2048, "side of the matrices", low=1)


@torch.inference_mode()
def published(model: MultiExitModel, policy: Policy, images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and exits [N], image by image: deferred to the teacher below the threshold."""
    answers = []
    exits = []
    for image in images.split(1):
        memory = None
        for k, logits in model.each_exit(image):
            answer, leaves, memory = policy.decide(k, logits, memory)
            if leaves.item():
                break
        answers.append(answer)
        exits.append(k)
    return torch.cat(answers), torch.tensor(exits)


def by_hand(flags: Flags) -> Policy:
    """The policy of confidence and threshold."""
    threshold = 2.46 if flags.threshold is None else flags.threshold
    return Policy.of([threshold, EVERYBODY], flags.confidence or "energy_softmax")


def contestants_of(deployed: dict[str, Deployed], policy: Policy) -> dict[str, Contestant]:
    """All contestants, by name and form."""
    plain = deployed["plain"]
    run = partial(published, plain.plain, policy)
    found = {FIRST: Contestant(FIRST, run, plain.images, plain.costs.leaving())}
    for form, one in deployed.items():
        alone = static_contestants(one)
        found[f"student alone, {form}"] = alone["exit 0 alone"]
        found[f"(b) teacher alone, {form}"] = alone["exit 1 alone"]
        found[f"(c) cascade, {form}"] = early_contestants(one, policy)["throughput"]
    return {name: replace(one, kind=name) for name, one in found.items()}  # each has its own micro-batch


def report(rows: dict[str, Measurement], peaks: dict[str, float]) -> None:
    """Prints the table; `peaks` are operations per second by precision."""
    lines = []
    for name, row in rows.items():
        floor = peaks["bf16" if name.endswith("bf16") else "fp32"] / 2 / row.macs
        speed = row.images_per_s
        title = name if name == FIRST else f"{name}, batches of {row.micro_batch}"
        gain = speed / rows[FIRST].images_per_s
        lines.append((title, speed, gain, row.macs / 1e6, 100 * row.accuracy, floor, speed / floor))
    print_table(HEADS, lines)


def main(argv: list[str]) -> None:
    """Prints a table of all variants, and the cascade's gain over the teacher."""
    flags = read_flags(Flags, argv, __doc__)
    check_policy_alone(flags, "confidence", "threshold")
    data = load_npz(flags.images, flags.classes)
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous() / 255
    files = [text if "weights=" in text else f"weights={text}" for text in (flags.student, flags.teacher)]
    view = View(32, (0.0,) * 3, (1.0,) * 3)
    model = open_network(read_cascade(files), num_classes=flags.classes, view=view).network
    policy = policy_for(flags.policy, model) or by_hand(flags)
    deployed = {
        "plain": Deployed(model, model, images, images),
        "tuned": Deployed.of(model, images, channels_last=True),
        "tuned bf16": Deployed.of(model, images, channels_last=True, dtype=torch.bfloat16),
    }
    contestants = contestants_of(deployed, policy)
    measured = measure(contestants, torch.as_tensor(data.labels), rounds=flags.rounds, singles=1)
    rows = {row.contestant: row for row in measured}
    products = warm_times(matrix_products(flags.product, CPU), flags.rounds, CPU)
    peaks = {name: 2 * flags.product**3 / spent for name, spent in products.items()}
    share = (rows[FIRST].exits > 0).double().mean().item()
    print(f"{describe_machine(CPU)}; {len(images)} images, {100 * share:.1f} % deferred")
    print(f"matrix product {peaks['fp32'] / 1e9:.0f} GFLOP/s in fp32, {peaks['bf16'] / 1e9:.0f} in bf16")
    report(rows, peaks)
    for form in deployed:
        student, teacher, cascade = (row for name, row in rows.items() if name.endswith(f", {form}"))
        possible = 1 / (teacher.images_per_s / student.images_per_s + share)
        gains = [cascade.images_per_s / teacher.images_per_s, teacher.macs / cascade.macs, possible]
        both = "(c) / (b) {:.2f}; by multiply-adds {:.2f}, by the speeds of both networks {:.2f}"
        print(f"{form}: {both.format(*gains)}")


if __name__ == "__main__":
    run_main(main)
