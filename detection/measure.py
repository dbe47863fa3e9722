"""What a detector finds in the images of a split, and its average precision by COCO's metrics."""

from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from detection.cascade import Found
from detection.data import CocoImages
from models.multi_exit import map_leaves
from utils import Progress

MEASURES = ("AP", "AP50", "AP75")


@torch.no_grad()
def detect(detector: nn.Module, loader: Any, device: torch.device) -> dict[int, Found]:
    """What the detector finds (boxes, labels, scores, masks) in every image, by image id, on the CPU."""
    detector.eval()
    found = {}
    for images, targets in Progress(loader, "evaluate", len(loader), shown=True):
        outputs = detector([image.to(device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            found[int(target["image_id"])] = map_leaves(Tensor.cpu, output)
    return found


def precision(data: CocoImages, found: dict[int, Found]) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 of the boxes, and of the masks (`mask_AP` ...) if there are any.

    They are 0 where nothing is found.
    """
    from pycocotools.cocoeval import COCOeval

    figures: dict[str, float] = {}
    for prefix, kind in (("", "bbox"), ("mask_", "segm"))[: 1 + data.masks]:
        results, values = [], [0.0] * len(MEASURES)
        for number, output in found.items():
            results += _entries(data, number, output, kind)
        if results:
            with redirect_stdout(StringIO()):  # pycocotools prints its progress
                judge = COCOeval(data.coco, data.coco.loadRes(results), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
            values = judge.stats.tolist()
        figures |= {prefix + name: value for name, value in zip(MEASURES, values, strict=False)}
    return figures


def _entries(data: CocoImages, number: int, output: Found, kind: str) -> Iterable[dict[str, Any]]:
    """One image's detections in COCO's format of results: with a bbox or a segmentation, as `kind` says."""
    from pycocotools import mask

    boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
    labels = output["labels"].tolist()
    for i, score in enumerate(output["scores"].tolist()):
        entry = {"image_id": number, "category_id": data.categories[labels[i] - 1][0], "score": score}
        if kind == "bbox":
            yield {**entry, "bbox": boxes[i]}
        else:
            shape = output["masks"][i, 0].numpy() > 0.5
            yield {**entry, "segmentation": mask.encode(np.asfortranarray(shape.astype(np.uint8)))}
