"""Two detectors in a row: class vectors, an image's confidence, and who asks the teacher."""

import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torchvision.models import detection

from adaptive.confidence import energy_softmax
from adaptive.policy import Policy, model_hash
from detection.cascade import DetectionCascade, EffDet, WithLogits, image_confidence
from detection.detectors import create_detector

NONE = {"weights": None, "weights_backbone": None}


def kind(name, tiny):
    torch.manual_seed(0)
    if name == "ssdlite":
        return detection.ssdlite320_mobilenet_v3_large(
            num_classes=4, score_thresh=0.0, detections_per_img=5, **NONE
        )
    if name == "retinanet":
        return detection.retinanet_resnet50_fpn(
            num_classes=4, score_thresh=0.0, min_size=64, max_size=64, **NONE
        )
    detector = create_detector("faster_rcnn_rexnet_090", 4, tiny)
    detector.roi_heads.score_thresh = 0.0
    return detector


@pytest.mark.parametrize("name", ["faster_rcnn", "ssdlite", "retinanet"])
def test_every_detection_has_the_class_vector_that_gives_its_score(name, tiny):
    detector = WithLogits(kind(name, tiny).eval())
    found, again = detector([torch.rand(3, 64, 80), torch.rand(3, 64, 64)])
    probabilities = detector.probability(found["class_logits"])
    assert len(found["scores"]) and found["class_logits"].shape == (len(found["scores"]), 4)
    torch.testing.assert_close(probabilities.gather(1, found["labels"][:, None])[:, 0], found["scores"])
    assert again["class_logits"].shape[1] == 4


def test_other_detectors_are_refused():
    with torch.device("meta"):
        fcos = detection.fcos_resnet50_fpn(num_classes=4, **NONE)
    with pytest.raises(ValueError, match="FCOS does not show the class vectors"):
        WithLogits(fcos)


def found(*scores):
    logits = torch.tensor([[0.0, 5 * s] for s in scores]).reshape(-1, 2)
    return {"scores": torch.tensor(scores), "class_logits": logits, "boxes": torch.zeros(len(scores), 4)}


def test_an_image_is_as_sure_as_its_best_detections():
    some = found(0.2, 0.9, 0.6, 0.01)
    expected = energy_softmax(some["class_logits"][[1, 2]]).mean().item()
    assert image_confidence(some, energy_softmax, top=2) == pytest.approx(expected)
    three = energy_softmax(some["class_logits"][:3]).mean().item()
    assert image_confidence(some, energy_softmax, top=10, floor=0.05) == pytest.approx(three)
    assert (
        image_confidence(found(), energy_softmax)
        == image_confidence(found(0.01), energy_softmax)
        == -float("inf")
    )


def policy_at(threshold):
    return Policy((threshold, -1e8), "energy_softmax", "p")


class Says(nn.Module):
    def __init__(self, *answers):
        super().__init__()
        self.answers, self.seen = list(answers), []

    def forward(self, images):
        self.seen += images
        return [self.answers[len(self.seen) - 1]]


def test_whole_images_are_routed_and_the_teacher_gets_the_original():
    student, teacher = Says(found(0.9), found(0.1), found()), Says(found(0.7, 0.7), found(0.8))
    limit = image_confidence(found(0.5), energy_softmax)
    images = [torch.full((3, 4, n), float(n)) for n in (4, 5, 6)]
    answers = DetectionCascade(student, teacher, policy_at(limit))(images)
    assert [int(answer["exit"]) for answer in answers] == [0, 1, 1]
    assert [len(answer["scores"]) for answer in answers] == [1, 2, 1]
    assert teacher.seen[0] is images[1] and teacher.seen[1] is images[2]


def test_a_confidence_of_exactly_the_threshold_stays_with_the_student():
    tie = image_confidence(found(0.5), energy_softmax)
    for threshold, exits in ((tie, [0, 0]), (math.nextafter(tie, 1e9), [1, 1])):
        student, teacher = Says(found(0.5), found(0.5)), Says(found(0.8), found(0.8))
        cascade = DetectionCascade(student, teacher, policy_at(threshold))
        answers = cascade([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
        assert [int(answer["exit"]) for answer in answers] == exits
        assert len(teacher.seen) == sum(exits)
        assert all(answer["confidence"] == torch.tensor(tie) for answer in answers)
    sure = torch.tensor([tie - 0.1, tie, tie + 0.1], dtype=torch.float64)
    assert policy_at(tie).exit_of(sure.expand(2, -1)).tolist() == [1, 0, 0]


def test_an_image_without_detections_is_deferred_by_any_threshold():
    student, teacher = Says(found(), found(0.01)), Says(found(0.8), found(0.8))
    answers = DetectionCascade(student, teacher, policy_at(-1e8))([torch.zeros(3, 4, 4)] * 2)
    assert [int(answer["exit"]) for answer in answers] == [1, 1]


def test_class_vectors_are_read_as_the_policy_says():
    logits = found(0.5, 0.9)["class_logits"]
    policy = Policy((0.9, -1e8), "max_prob", temperatures=(4.0, 1.0))
    cascade = DetectionCascade(Says(), Says(), policy, top=2)
    expected = (logits / 4).softmax(-1).amax(-1).double().mean()
    torch.testing.assert_close(cascade.confidence(found(0.5, 0.9)), expected[None])


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        (Policy((0.5, 0.5, -1e8), name="p"), "policy 'p' is for 3 exits, of which [] are off; accepted: 2, "),
        (Policy((1e8, -1e8), name="p", off=(0,)), "policy 'p' is for 2 exits, of which [0] are off"),
        (Policy((0.5, -1e8), answer="mean"), "confidence max_prob, answer mean: boxes of two detectors are"),
        (Policy((1.0, -1e8), "agreement"), "confidence agreement, answer exit: boxes of two"),
    ],
)
def test_policies_that_need_more_than_a_confidence_are_refused(policy, line):
    with pytest.raises(ValueError) as error:
        DetectionCascade(Says(), Says(), policy)
    assert str(error.value).startswith(line)


def test_a_policy_knows_its_pair_and_how_many_detections_it_asks():
    torch.manual_seed(0)
    pair, policy = (nn.Linear(2, 2), nn.Linear(2, 2)), policy_at(2.4)
    signed = replace(policy, model_hash=model_hash(DetectionCascade(*pair, policy)))
    assert signed.check_network(DetectionCascade(*pair, signed)) is signed
    for other in (DetectionCascade(*pair[::-1], signed), DetectionCascade(*pair, signed, top=5)):
        with pytest.raises(ValueError, match=r"^policy 'p' is for weights \w{12}, the network has"):
            signed.check_network(other)


@pytest.mark.skipif(find_spec("effdet") is None, reason="effdet is not installed")
def test_an_efficientdet_answers_in_pixels_of_the_image_it_is_given():
    torch.manual_seed(0)
    detector = EffDet("tf_efficientdet_d0", 3, floor=0.0).eval()
    (answer,) = detector([torch.rand(3, 60, 90)])
    assert answer["class_logits"].shape == (len(answer["scores"]), 3) and len(answer["scores"])
    picked = answer["class_logits"].sigmoid().gather(1, answer["labels"][:, None] - 1)[:, 0]
    torch.testing.assert_close(picked, answer["scores"])
    assert answer["boxes"][:, [0, 2]].max() <= 90 and answer["boxes"][:, [1, 3]].max() <= 60


@pytest.mark.skipif(find_spec("effdet") is not None, reason="effdet is installed")
def test_the_package_is_asked_for():
    with pytest.raises(ValueError, match="tf_efficientdet_d0 needs a package: pip install effdet"):
        EffDet("tf_efficientdet_d0")
