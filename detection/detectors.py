"""Faster R-CNN and Mask R-CNN with a feature pyramid on ReXNet, built from torchvision's detection stack.

https://arxiv.org/abs/1506.01497, https://arxiv.org/abs/1703.06870, https://arxiv.org/abs/1612.03144; the
pyramid reads ReXNetV1's maps after blocks 2, 4, 10 and 15, at strides 4, 8, 16 and 32. The detectors of the
ReXNet paper were not released; its table of results names no more than their backbones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from experiment.fit import load_weights
from experiment.options import fill
from experiment.verify import check_weights
from models.registry import create_model, nearest
from utils import UserError, option

# Number in ReXNetV1.features of each map that the pyramid reads, finest first.
LEVELS = (5, 7, 13, 18)
WIDTHS = ("090", "100", "130", "150", "200", "220", "300")
KINDS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
PYRAMID = 256  # channels of its levels


@dataclass(frozen=True)
class DetectorOptions:
    """How a detector is built, beside its name and its classes."""

    freeze_norm: bool = option(False, "keep the backbone's batch norms as they are")
    min_size: int = option(800, "short side of the images in pixels", low=32)
    max_size: int = option(1333, "longest long side in pixels", low=32)
    smallest_anchor: int = option(32, "side of the finest level's anchors in pixels", low=1)
    proposals: int = option(1000, "boxes per image that are classified in evaluation", low=1)
    sampled: int = option(512, "boxes per image that training classifies", low=1)


DEFAULTS = DetectorOptions()


def list_detectors() -> list[str]:
    """All names, sorted."""
    return sorted(f"{kind}_rexnet_{width}" for kind in KINDS for width in WIDTHS)


def create_detector(
    name: str,
    num_classes: int = 91,
    options: DetectorOptions = DEFAULTS,
    backbone_weights: dict[str, Tensor] | None = None,
) -> FasterRCNN:
    """A detector under torchvision's protocol; `num_classes` includes the background, which is class 0.

    In training it maps a list of images [3, H, W] (pixels in 0..1) and a list of dicts (boxes [N, 4] as x1 y1
    x2 y2 in pixels, labels [N], for Mask R-CNN masks [N, H, W]) to a dict of losses, in evaluation the images
    to a list of dicts with boxes, labels, scores and masks [N, 1, H, W].

    `backbone_weights` is the state dict of a ReXNetV1 classifier, whose features are taken. Raises ValueError
    for an unknown name, or weights that do not fit.
    """
    if name not in list_detectors():
        raise UserError(f"unknown detector {name!r}; {nearest(name, list_detectors())}")
    kind, _, width = name.rpartition("_rexnet_")
    classifier = create_model(f"rexnetv1_{width}")
    if backbone_weights is not None:
        _load_features(classifier, backbone_weights)
    whole: Any = classifier.features
    features = whole[: max(LEVELS) + 1]
    channels = [features[i].out[-2].out_channels for i in LEVELS]
    if options.freeze_norm:
        features = freeze_batch_norm_2d(features)
    names = {str(i): str(level) for level, i in enumerate(LEVELS)}
    # One size more than maps: the coarsest is pooled once again.
    sides = [options.smallest_anchor * 2**level for level in range(len(LEVELS) + 1)]
    return KINDS[kind](
        BackboneWithFPN(features, names, channels, PYRAMID),
        num_classes,
        options.min_size,
        options.max_size,
        rpn_anchor_generator=AnchorGenerator([(side,) for side in sides], [(0.5, 1.0, 2.0)] * len(sides)),
        # Training proposes twice as many, of which it classifies a sample.
        rpn_post_nms_top_n_train=2 * options.proposals,
        rpn_post_nms_top_n_test=options.proposals,
        box_batch_size_per_image=options.sampled,
    )


def detector_of(content: dict[str, Any], source: str | Path) -> FasterRCNN:
    """The detector in the `content` of a checkpoint of scripts/main_detection.py; ValueError for others."""
    if not {"model_name", "args", "categories", "model"} <= content.keys():
        raise UserError(f"checkpoint {source} holds no detector of scripts/main_detection.py")
    options = fill(DetectorOptions, content["args"])
    detector = create_detector(content["model_name"], len(content["categories"]) + 1, options)
    load_weights(detector, content["model"], f"checkpoint {source}")
    return detector


def _load_features(classifier: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads a classifier's features, not its head."""
    own = {key: value for key, value in classifier.state_dict().items() if key.startswith("features.")}
    wrong = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
    if wrong:
        raise UserError(
            f"these are not the backbone's weights: {len(wrong)} of {len(own)} do not fit, say {wrong[0]}"
        )
    check_weights(weights, own, "the backbone's weights")
    classifier.load_state_dict({key: weights[key] for key in own}, strict=False)


class DetectorCosts(NamedTuple):
    """Multiply-adds of a detector's parts on one image, and its parameters."""

    params: int
    backbone: int
    pyramid: int
    proposals: int  # the network that proposes boxes
    boxes: int  # classifying and refining all of them
    masks: int  # of the detections; 0 where there are none

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self[1:])


def _macs(part: nn.Module, *inputs: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        out = part(*inputs)
    return counter.get_total_flops() // 2, out


@torch.no_grad()
def detector_costs(detector: FasterRCNN, height: int, width: int) -> DetectorCosts:
    """Costs of a detector on the meta device, for an image of this size as the backbone reads it."""
    detector.eval().requires_grad_(False)
    heads = detector.roi_heads
    backbone, maps = _macs(detector.backbone.body, torch.empty(1, 3, height, width, device="meta"))
    pyramid, levels = _macs(detector.backbone.fpn, maps)
    proposals, _ = _macs(detector.rpn.head, list(levels.values()))
    count = detector.rpn.post_nms_top_n()
    vectors_macs, vectors = _macs(heads.box_head, torch.empty(count, PYRAMID, 7, 7, device="meta"))
    boxes_macs, _ = _macs(heads.box_predictor, vectors)
    masks = 0
    if heads.has_mask():
        shape = (heads.detections_per_img, PYRAMID, 14, 14)
        regions_macs, regions = _macs(heads.mask_head, torch.empty(shape, device="meta"))
        masks = regions_macs + _macs(heads.mask_predictor, regions)[0]
    params = sum(p.numel() for p in detector.parameters())
    return DetectorCosts(params, backbone, pyramid, proposals, vectors_macs + boxes_macs, masks)
