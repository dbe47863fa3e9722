"""A cascade of two detectors on data in COCO's format: average precision and cost by the share of images
handed on.

    python scripts/eval_detection_cascade.py "$DATA/coco" runs/small/checkpoint-last.pth
    runs/large/checkpoint-last.pth python scripts/eval_detection_cascade.py "$DATA/coco" tf_efficientdet_d0
    tf_efficientdet_d4 --limit 4   # effdet

Detectors are checkpoints of scripts/main_detection.py or names of effdet (random weights unless
`--pretrained`). Both run on every image, whose multiply-adds are counted as it runs. The last line runs the
cascade for real.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.confidence import CONFIDENCES, confidence_function
from models.detection_cascade import DetectionCascade, EffDet, WithLogits, image_confidence
from training.checkpoint import load
from training.detection import CocoImages, detector_of, precision
from utils import Progress, run_main

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def opened(name, pretrained):
    """A detector of effdet by name, with COCO's classes, or one from a checkpoint."""
    if "efficientdet" in name:
        return EffDet(name, pretrained=pretrained).eval()
    return WithLogits(detector_of(load(name), name).eval()).eval()


def run(detector, images, title):
    """Detections, multiply-adds and seconds of every image."""
    found, macs, seconds = [], [], []
    for i in Progress(range(len(images)), title, len(images), shown=True):
        with FlopCounterMode(display=False) as counter:
            detector([images[i][0]])
        start = time.perf_counter()
        found += detector([images[i][0]])
        seconds.append(time.perf_counter() - start)
        macs.append(counter.get_total_flops() // 2)
    return found, torch.tensor(macs, dtype=torch.float64), seconds


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_path", type=Path)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--val_split", default="val2017")
    parser.add_argument("--confidence", default="energy_softmax", help=", ".join(CONFIDENCES))
    parser.add_argument("--top", type=int, default=10, help="detections of an image that are asked")
    parser.add_argument("--limit", type=int, help="only so many images, without average precision")
    parser.add_argument("--pretrained", action="store_true", help="effdet: its weights for COCO")
    args = parser.parse_args(argv)
    sure = confidence_function(args.confidence)
    data = CocoImages(args.data_path, args.val_split)
    images = Subset(data, range(min(args.limit, len(data)))) if args.limit else data
    detectors = [opened(name, args.pretrained) for name in (args.student, args.teacher)]
    results = [run(d, images, name) for d, name in zip(detectors, ("student", "teacher"), strict=True)]
    (first, student_macs, student_time), (second, teacher_macs, teacher_time) = results
    for name, detector, (_, macs, spent) in zip(
        (args.student, args.teacher), detectors, results, strict=True
    ):
        size = sum(p.numel() for p in detector.parameters()) / 1e6
        print(
            f"{name}: {size:.2f} M parameters, {macs.mean() / 1e9:.4f} G, {1e3 * sum(spent) / len(spent):.1f} ms"
        )
    scores = torch.tensor([image_confidence(found, sure, args.top) for found in first], dtype=torch.float64)
    order = scores.argsort()
    ids = [int(images[i][1]["image_id"]) for i in range(len(images))]
    print(
        f"{'routed':>8}{'threshold':>12}{'mean G':>9}"
        + ("" if args.limit else f"{'AP':>8}{'AP50':>8}{'AP75':>8}")
    )

    def row(name, routed, cost, threshold=""):
        answers = {
            number: (second if at else first)[i]
            for i, (number, at) in enumerate(zip(ids, routed, strict=True))
        }
        figures = "" if args.limit else "".join(f"{v:8.3f}" for v in precision(data, answers).values())
        print(f"{name:>8}{threshold:>12}{cost / 1e9:9.4f}{figures}", flush=True)

    for share in SHARES:
        count = round(share * len(images))
        routed = torch.zeros(len(images), dtype=torch.bool)
        routed[order[:count]] = True
        limit = scores[order[count]].item() if count < len(images) else float("inf")
        cost = (student_macs + routed * teacher_macs).mean()
        row(f"{100 * share:.0f} %", routed.tolist(), cost, f"{limit:.6g}")
    row("teacher", [True] * len(images), teacher_macs.mean())
    limit = scores[order[round(0.3 * len(images))]].item()
    cascade = DetectionCascade(*detectors, threshold=limit, confidence=sure, top=args.top)
    start = time.perf_counter()
    exits = torch.stack([cascade([images[i][0]])[0]["exit"] for i in range(len(images))])
    spent = 1e3 * (time.perf_counter() - start) / len(images)
    differ = int((exits != (scores < limit).long()).sum())
    handed = 100 * exits.double().mean().item()
    print(f"run for real at {limit:.6g}: {handed:.1f} % handed on, {spent:.1f} ms an image, {differ} differ")


if __name__ == "__main__":
    run_main(main)
