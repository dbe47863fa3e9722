"""A cascade of two detectors on data in COCO's format: average precision and cost by share deferred.

Deferred images are answered by the teacher.

    python scripts/eval_detection_cascade.py "$DATA/coco" runs/small/checkpoint-last.pth \
        runs/large/checkpoint-last.pth
    python scripts/eval_detection_cascade.py "$DATA/coco" tf_efficientdet_d0 tf_efficientdet_d4 --limit 4

Detectors are checkpoints of scripts/main_detection.py or names of effdet (random weights unless
`--pretrained`). Both run on every image, and multiply-adds are counted during the run. The last line is of a
real run of the cascade: by `--policy`, or else with 30 % of these images deferred. `--output_dir` names the
folder for the policy.json of that run.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common import check_policy_alone, policy_for, print_table, read_flags, timed, word

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaptive.confidence import CONFIDENCES, EVERYBODY
from adaptive.policy import Policy, content_hash, model_hash
from detection.cascade import DetectionCascade, EffDet, Found, WithLogits
from detection.data import CocoImages
from detection.detectors import detector_of
from detection.measure import MEASURES, precision
from experiment.checkpoint import load
from experiment.provenance import made
from utils import Progress, option, run_main, writing

DEFERRED = 0.3  # of the images, without a policy
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Flags:
    """What is evaluated."""

    data_path: Path = word("folder in COCO's layout")
    student: str = word("checkpoint of scripts/main_detection.py, or a name of effdet")
    teacher: str = word("the same")
    val_split: str = option("val2017", "name of the split")
    policy: str = option("", "a saved policy of this pair, instead of a confidence")
    output_dir: str = option("", "folder for the policy, if it is to be saved")
    confidence: str | None = option(None, f"{', '.join(CONFIDENCES)}; default: energy_softmax")
    top: int = option(10, "detections of an image that are asked", low=1)
    limit: int | None = option(None, "only so many images, without average precision", low=1)
    pretrained: bool = option(False, "effdet: its weights for COCO")


def opened(name: str, pretrained: bool) -> nn.Module:
    """A detector of effdet by name, with COCO's classes, or one from a checkpoint."""
    if "efficientdet" in name:
        return EffDet(name, pretrained=pretrained).eval()
    return WithLogits(detector_of(load(name), name)).eval()


class Answers(NamedTuple):
    """What a detector found in N images, and the multiply-adds [N], float64, that each took."""

    found: list[Found]
    macs: Tensor


def answers_of(name: str, detector: nn.Module, data: CocoImages, count: int) -> Answers:
    """Runs a detector on `count` images, once to count and once to time; prints its size and mean cost."""
    found: list[Found] = []
    macs = []
    seconds = 0.0
    for i in Progress(range(count), name, count, shown=True):
        image, _ = data[i]
        with FlopCounterMode(display=False) as counter:
            detector([image])
        macs.append(counter.get_total_flops() // 2)
        output, spent = timed(partial(detector, [image]))
        found += output
        seconds += spent
    params = sum(p.numel() for p in detector.parameters())
    ms = 1e3 * seconds / count
    print(f"{name}: {params / 1e6:.2f} M parameters, {sum(macs) / count / 1e9:.4f} G, {ms:.1f} ms")
    return Answers(found, torch.tensor(macs, dtype=torch.float64))


def print_shares(data: CocoImages, student: Answers, teacher: Answers, scores: Tensor) -> None:
    """A line for each share of the images, the least confident first, that is deferred to the teacher.

    `scores` [N] are the student's; there is no average precision where N is not the whole of the data.
    """
    order = scores.argsort()
    thresholds = [*scores[order].tolist(), float("inf")]
    measures = MEASURES if len(scores) == len(data) else ()
    rows = []

    def add(name: str, threshold: str, asked: Tensor, macs: Tensor) -> None:
        found = [(teacher if at else student).found[i] for i, at in enumerate(asked.tolist())]
        figures = precision(data, dict(zip(data.ids, found, strict=True))) if measures else {}
        rows.append((name, threshold, macs.mean().item() / 1e9, *figures.values()))

    for share in SHARES:
        count = round(share * len(scores))
        asked = torch.zeros(len(scores), dtype=torch.bool)
        asked[order[:count]] = True
        add(f"{100 * share:.0f} %", f"{thresholds[count]:.6g}", asked, student.macs + asked * teacher.macs)
    add("teacher", "", torch.ones(len(scores), dtype=torch.bool), teacher.macs)
    print_table(["deferred", "threshold", "mean G:.4f", *(f"{name}:.3f" for name in measures)], rows)


def policy_of(kind: str, scores: Tensor, macs: Tensor) -> Policy:
    """The policy by which `DEFERRED` of the images are deferred, the least confident by `scores` [N].

    `macs` [2, N] are the multiply-adds of student and teacher.
    """
    limit = scores.sort().values[round(DEFERRED * len(scores))].item()
    limit = max(limit, EVERYBODY)  # where so many have no detection, which are deferred by any threshold
    policy = Policy((limit, EVERYBODY), kind, f"{100 * DEFERRED:.0f} % deferred")
    asked = policy.exit_of(scores.expand(2, -1))
    share = asked.double().mean().item()
    spent = (macs[0] + asked * macs[1]).mean().item()
    return replace(policy, macs=spent, shares=(1 - share, share))


def signed(policy: Policy, cascade: DetectionCascade, data: CocoImages, count: int) -> Policy:
    """The policy with the hashes of both detectors and of the first `count` images, and where it is from."""
    images = content_hash({str(data.path.name): torch.tensor(data.ids[:count])})
    about = made(torch.device("cpu"), data_set=str(data.path), images="the first images", num_images=count)
    return replace(policy, model_hash=model_hash(cascade), calib_hash=images, made=about)


def print_real_run(cascade: DetectionCascade, data: CocoImages, scores: Tensor) -> None:
    """Runs the cascade and compares its deferred images with those that the student's `scores` [N] give."""
    answers, seconds = timed(lambda: [cascade([data[i][0]])[0] for i in range(len(scores))])
    exits = torch.stack([answer["exit"] for answer in answers])
    ms = 1e3 * seconds / len(scores)
    differ = int((exits != cascade.policy.exit_of(scores.expand(2, -1))).sum())
    share = f"{100 * exits.double().mean():.1f} % deferred to the teacher"
    print(
        f"run for real at {cascade.policy.thresholds[0]:.6g}: {share}, {ms:.1f} ms an image, {differ} differ"
    )


def main(argv: list[str]) -> None:
    """The command line."""
    flags = read_flags(Flags, argv, __doc__)
    check_policy_alone(flags, "confidence")
    kind = flags.confidence or "energy_softmax"
    data = CocoImages(flags.data_path, flags.val_split)
    count = min(flags.limit or len(data), len(data))
    pair = [opened(name, flags.pretrained) for name in (flags.student, flags.teacher)]
    policy = Policy.load(flags.policy) if flags.policy else Policy.of([EVERYBODY, EVERYBODY], kind)
    cascade = DetectionCascade(*pair, policy, top=flags.top)
    policy_for(flags.policy, cascade)
    first, second = (
        answers_of(name, detector, data, count)
        for name, detector in zip((flags.student, flags.teacher), pair, strict=True)
    )
    scores = torch.cat([cascade.confidence(found) for found in first.found])
    print_shares(data, first, second, scores)
    if not flags.policy:
        cascade.policy = policy_of(kind, scores, torch.stack([first.macs, second.macs]))
        cascade.policy = signed(cascade.policy, cascade, data, count)
    print_real_run(cascade, data, scores)
    if flags.output_dir:
        folder = Path(flags.output_dir)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        cascade.policy.save(folder / "policy.json")


if __name__ == "__main__":
    run_main(main)
