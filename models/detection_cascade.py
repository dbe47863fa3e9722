"""Two detectors in a row: the second sees an image again where the first is unsure of what it found in it.

After "Energy-Based Joint Reasoning for Adaptive Inference", https://arxiv.org/abs/2110.10343, which shows
EfficientDet-D0 and -D4 so. Whole images are routed: all boxes of an image are of one detector, and the second
gets the original image.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Found = dict[str, Tensor]


class WithLogits(nn.Module):
    """A torchvision detector whose detections also have "class_logits" [N, C], the class vector each came
    from.

    For Faster and Mask R-CNN, SSD, SSDLite and RetinaNet, in evaluation. Raises ValueError for other
    detectors.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        if hasattr(detector, "roi_heads"):
            self.probability, source = softmax, detector.roi_heads.box_predictor
        elif type(detector).__name__ in ("SSD", "RetinaNet"):  # other heads score by more than the class
            sigmoid = type(detector).__name__ == "RetinaNet"
            self.probability, source = torch.sigmoid if sigmoid else softmax, detector.head
        else:
            raise ValueError(f"{type(detector).__name__} does not show the class vectors of its detections")
        self._seen: list[Tensor] = []
        source.register_forward_hook(lambda module, inputs, out: self._seen.append(_class_logits(out)))

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[Found]:
        """Images [3, H, W] in 0..1 to a dict each: boxes [N, 4], labels, scores and class_logits [N, C]."""
        return [self._one(image) for image in images]

    def _one(self, image: Tensor) -> Found:
        self._seen.clear()
        (found,) = self.detector([image])
        logits = self._seen.pop().flatten(0, -2).float()
        # A detection's score is the probability of its label at the place that it was made from.
        scores = self.probability(logits)[:, found["labels"]]
        rows = (scores - found["scores"]).abs().argmin(0) if len(found["labels"]) else found["labels"]
        return {**found, "class_logits": logits[rows]}


def softmax(logits: Tensor) -> Tensor:
    """Probabilities over the last dim."""
    return logits.softmax(-1)


def _class_logits(out: dict[str, Tensor] | tuple[Tensor, Tensor]) -> Tensor:
    return out["cls_logits"] if isinstance(out, dict) else out[0]


class EffDet(nn.Module):
    """An EfficientDet of the package effdet under torchvision's protocol, with class_logits (before the
    sigmoid).

    Images are scaled to fit the network's square, normalised as ImageNet and padded; `net` is what training
    and weights are for. Raises ValueError without the package or for an unknown name.
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self, name: str, num_classes: int = 90, *, pretrained: bool = False, floor: float = 0.05
    ) -> None:
        super().__init__()
        try:
            import effdet
            from effdet.anchors import Anchors
        except ImportError as error:
            raise ValueError(f"{name} needs a package: pip install effdet") from error
        if name not in effdet.config.model_config.efficientdet_model_param_dict:
            raise ValueError(
                f"effdet has no model {name!r}; accepted: tf_efficientdet_d0 to _d7, efficientdet_d0 ..."
            )
        options = {"pretrained": pretrained, "pretrained_backbone": False, "num_classes": num_classes}
        self.net, self.floor = effdet.create_model(name, bench_task="", **options), floor
        self.anchors = Anchors.from_config(self.net.config)
        self.register_buffer("mean", torch.tensor(self.MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(3, 1, 1), persistent=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network reads."""
        return tuple(self.net.config.image_size)

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[Found]:
        """As `WithLogits`; labels count from 1."""
        return [self._one(image) for image in images]

    def _one(self, image: Tensor) -> Found:
        from effdet.anchors import decode_box_outputs
        from effdet.bench import _post_process
        from torchvision.ops import batched_nms, clip_boxes_to_image

        high, wide = image.shape[-2:]
        scale = min(self.size[0] / high, self.size[1] / wide)
        sides = (round(high * scale), round(wide * scale))
        pixels = F.interpolate(image[None], sides, mode="bilinear", antialias=True)
        padded = F.pad(
            (pixels - self.mean) / self.std, (0, self.size[1] - sides[1], 0, self.size[0] - sides[0])
        )
        levels, boxes = self.net(padded)
        config, count = self.net.config, self.net.config.num_classes
        top, boxes, places, labels = _post_process(
            levels,
            boxes,
            config.num_levels,
            count,
            min(config.max_detection_points, len(self.anchors.boxes) * count),
        )
        places, labels, scores = places[0], labels[0], top[0, :, 0].sigmoid()
        boxes = decode_box_outputs(
            boxes[0].float(), self.anchors.boxes[places].to(boxes.device), output_xyxy=True
        )
        kept = batched_nms(boxes, scores, labels, 0.5)[: config.max_det_per_image]
        kept = kept[scores[kept] > self.floor]
        vectors = torch.cat([level[0].permute(1, 2, 0).reshape(-1, count) for level in levels])
        boxes = clip_boxes_to_image(boxes[kept] / scale, (high, wide))
        return {
            "boxes": boxes,
            "labels": labels[kept] + 1,
            "scores": scores[kept],
            "class_logits": vectors[places[kept]],
        }


def image_confidence(
    found: Found, confidence: Callable[[Tensor], Tensor], top: int = 10, floor: float = 0.05
) -> float:
    """How sure a detector is of an image: the mean confidence of its `top` detections that score `floor` or
    more.

    Minus infinity, so that the next detector is asked, where there are none.
    """
    scores = found["scores"]
    best = scores.argsort(descending=True)[:top]
    best = best[scores[best] >= floor]
    return confidence(found["class_logits"][best]).double().mean().item() if len(best) else -float("inf")


class DetectionCascade(nn.Module):
    """Student and teacher (`WithLogits`, `EffDet`): the teacher answers where the student's confidence is too
    low.

    Args:
        threshold: least image confidence at which the student's boxes are kept.
        confidence: from class vectors [N, C] to [N], of `adaptive.confidence`.
        top, floor: see `image_confidence`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        threshold: float,
        confidence: Callable[[Tensor], Tensor],
        top: int = 10,
        floor: float = 0.05,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.threshold = student, teacher, threshold
        self.confidence, self.top, self.floor = confidence, top, floor

    def forward(self, images: list[Tensor]) -> list[Found]:
        """Images [3, H, W] to the detections of one detector each, with "exit" (0 or 1) and its
        "confidence"."""
        answers = []
        for image in images:
            (found,), k = self.student([image]), 0
            sure = image_confidence(found, self.confidence, self.top, self.floor)
            if sure < self.threshold:
                (found,), k = self.teacher([image]), 1
            answers.append({**found, "exit": torch.tensor(k), "confidence": torch.tensor(sure)})
        return answers
