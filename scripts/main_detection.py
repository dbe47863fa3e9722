"""Trains a detector of detection/detectors.py on data in COCO's format and evaluates it with COCO's metrics.

    python scripts/main_detection.py --model faster_rcnn_rexnet_100 --data_path "$DATA/coco" \
        --output_dir runs/coco --backbone_weights rexnetv1_1.0.pth --freeze_norm true

`--data_path` holds annotations/instances_{split}.json and the images in {split}/, as https://cocodataset.org
has it. The same command resumes a stopped run; `--eval true` only evaluates; `--flops true` only prints what
the detector costs. Needs pycocotools (requirements-extra.txt).
"""

from common import read_flags

import torch

from detection.detectors import create_detector, detector_costs
from detection.train import Detection, evaluate, fit
from utils import run_main


def print_costs(name: str, num_classes: int) -> None:
    """What the parts of a detector cost for 800 x 1200 pixels, the published size, and for 800 x 1280."""
    with torch.device("meta"):
        detector = create_detector(name, num_classes)
    print(f"{name}: {num_classes} classes, multiply-adds in G on one image, 1,000 proposals")
    for height, width in ((800, 1200), (800, 1280)):
        costs = detector_costs(detector, height, width)
        macs = costs._asdict()
        params = macs.pop("params")
        parts = ", ".join(f"{part} {value / 1e9:.1f}" for part, value in macs.items())
        print(f"{height} x {width}: {params / 1e6:.2f} M parameters; {parts}; total {costs.total / 1e9:.1f}")


def main(argv: list[str]) -> None:
    """The command line."""
    detection = read_flags(Detection, argv, __doc__)
    if detection.flops:
        print_costs(detection.model, 91)
    elif detection.eval:
        print(", ".join(f"{name} {value:.4f}" for name, value in evaluate(detection).items()))
    else:
        fit(detection)


if __name__ == "__main__":
    run_main(main)
