"""Two detectors in a row: the second sees an image again where the first is not confident.

After "Energy-Based Joint Reasoning for Adaptive Inference", https://arxiv.org/abs/2110.10343, which does so
with EfficientDet-D0 and -D4. Whole images are routed: all boxes of an image come from one detector, and the
second gets the original image.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.transforms.functional import normalize

from adaptive.policy import Policy
from utils import UserError

Found = dict[str, Tensor]
softmax = partial(torch.softmax, dim=-1)
# The part of each kind of detector that outputs class vectors, and what turns these into scores. In other
# kinds a score depends on more than the class.
CLASS_HEADS: dict[type[nn.Module], tuple[str, Callable[[Tensor], Tensor]]] = {
    FasterRCNN: ("roi_heads.box_predictor.cls_score", softmax),
    SSD: ("head.classification_head", softmax),
    RetinaNet: ("head.classification_head", torch.sigmoid),
}


class ImageByImage(nn.Module):
    """A network that maps images [3, H, W], in 0..1 and of any size, to the detections in each.

    Detections are a dict: boxes [N, 4], labels [N], scores [N], and class_logits [N, C], a vector for each.
    """

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[Found]:
        return [self.one(image) for image in images]

    def one(self, image: Tensor) -> Found:
        """The detections in an image."""
        raise NotImplementedError


class WithLogits(ImageByImage):
    """A torchvision detector in evaluation, whose detections have class_logits too.

    For Faster and Mask R-CNN, SSD, SSDLite and RetinaNet; raises ValueError for other detectors.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        head = next((head for kind, head in CLASS_HEADS.items() if isinstance(detector, kind)), None)
        if head is None:
            raise UserError(f"{type(detector).__name__} does not show the class vectors of its detections")
        place, self.probability = head
        self.detector = detector
        self._seen: list[Tensor] = []
        detector.get_submodule(place).register_forward_hook(lambda part, inputs, out: self._seen.append(out))

    def one(self, image: Tensor) -> Found:
        self._seen.clear()
        (found,) = self.detector([image])
        logits = self._seen.pop().flatten(0, -2).float()  # (places, C)
        # A detection's score is the probability of its label at the place that it was made from.
        scores = self.probability(logits)[:, found["labels"]]  # (places, N)
        rows = (scores - found["scores"]).abs().argmin(0) if len(found["labels"]) else found["labels"]
        return {**found, "class_logits": logits[rows]}


class EffDet(ImageByImage):
    """An EfficientDet of the package effdet; class_logits are those before the sigmoid.

    Images are scaled to fit the network's square, normalised as for ImageNet and padded; labels count from 1;
    `net` is the part that is trained and has the weights. Raises ValueError without the package or for an
    unknown name.
    """

    def __init__(
        self, name: str, num_classes: int = 90, *, pretrained: bool = False, floor: float = 0.05
    ) -> None:
        super().__init__()
        try:
            import effdet
            from effdet.anchors import Anchors
        except ImportError as error:
            raise UserError(f"{name} needs a package: pip install effdet") from error
        if name not in effdet.config.model_config.efficientdet_model_param_dict:
            raise UserError(
                f"effdet has no model {name!r}; accepted: tf_efficientdet_d0 to _d7, efficientdet_d0 ..."
            )
        self.net = effdet.create_model(
            name,
            bench_task="",
            pretrained=pretrained,
            pretrained_backbone=False,
            num_classes=num_classes,
        )
        self.floor = floor
        self.anchors = Anchors.from_config(self.net.config)
        self.size = tuple(self.net.config.image_size)  # height and width of what the network reads

    def one(self, image: Tensor) -> Found:
        from effdet.anchors import decode_box_outputs
        from effdet.bench import _post_process

        config = self.net.config
        padded, scale = self._fitted(image)
        levels, deltas = self.net(padded)
        points = min(config.max_detection_points, len(self.anchors.boxes) * config.num_classes)
        top, deltas, places, labels = _post_process(
            levels, deltas, config.num_levels, config.num_classes, points
        )
        anchors = self.anchors.boxes[places[0]].to(deltas.device)
        boxes = decode_box_outputs(deltas[0].float(), anchors, output_xyxy=True)
        scores = top[0, :, 0].sigmoid()
        kept = batched_nms(boxes, scores, labels[0], 0.5)[: config.max_det_per_image]
        kept = kept[scores[kept] > self.floor]
        vectors = [level[0].permute(1, 2, 0).reshape(-1, config.num_classes) for level in levels]
        return {
            "boxes": clip_boxes_to_image(boxes[kept] / scale, image.shape[-2:]),
            "labels": labels[0, kept] + 1,
            "scores": scores[kept],
            "class_logits": torch.cat(vectors)[places[0, kept]],
        }

    def _fitted(self, image: Tensor) -> tuple[Tensor, float]:
        """The image as the network reads it, [1, 3, *size], and the factor by which it was scaled."""
        high, wide = image.shape[-2:]
        scale = min(self.size[0] / high, self.size[1] / wide)
        sides = (round(high * scale), round(wide * scale))
        pixels = F.interpolate(image[None], sides, mode="bilinear", antialias=True)
        missing = (0, self.size[1] - sides[1], 0, self.size[0] - sides[0])
        return F.pad(normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), missing), scale


def image_confidence(
    found: Found, confidence: Callable[[Tensor], Tensor], top: int = 10, floor: float = 0.05
) -> float:
    """The confidence in an image: the mean over its `top` best detections that score `floor` or more.

    `confidence` maps class vectors [N, C] to [N], as in `adaptive.confidence`. Minus infinity where there are
    no such detections, so that the image is deferred.
    """
    scores = found["scores"]
    best = scores.argsort(descending=True)[:top]
    best = best[scores[best] >= floor]
    return confidence(found["class_logits"][best]).double().mean().item() if len(best) else -float("inf")


class DetectionCascade(ImageByImage):
    """Student and teacher (`WithLogits`, `EffDet`): the teacher answers where the student is not confident.

    All detections in an image come from one of them: "exit" says which (0: student, 1: teacher), "confidence"
    is the student's. `policy`, of two exits, decides by the student's confidence in the image: that of class
    vectors, as the policy reads them, in its `top` best detections (`image_confidence`). `top` is part of the
    state, so that a policy's hash is of it too. Raises ValueError for a policy that needs more than that.
    """

    num_exits = 2

    def __init__(self, student: nn.Module, teacher: nn.Module, policy: Policy, *, top: int = 10) -> None:
        super().__init__()
        if len(policy.thresholds) != self.num_exits or policy.off:
            found = f"{len(policy.thresholds)} exits, of which {list(policy.off)} are off"
            raise UserError(f"policy {policy.name!r} is for {found}; accepted: 2, student and teacher")
        if policy.reading.remembers:
            found = f"confidence {policy.confidence}, answer {policy.answer}"
            raise UserError(f"{found}: boxes of two detectors are not one answer; accepted: answer exit")
        self.student = student
        self.teacher = teacher
        self.policy = policy
        self.register_buffer("top", torch.tensor(top))

    def confidence(self, found: Found) -> Tensor:
        """The confidence in an image [1], float64, by the student's detections in it."""
        return torch.tensor([image_confidence(found, self._read, int(self.top))], dtype=torch.float64)

    def _read(self, logits: Tensor) -> Tensor:
        return self.policy.reading.read(0, logits).confidence

    def one(self, image: Tensor) -> Found:
        (found,) = self.student([image])
        confidence = self.confidence(found)
        asks = not self.policy.leaves(0, confidence)
        if asks:
            (found,) = self.teacher([image])
        return {**found, "exit": torch.tensor(int(asks)), "confidence": confidence[0].float()}
