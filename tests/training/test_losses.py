import math

import pytest
import torch
import torch.nn.functional as F

from training.losses import (
    Losses,
    exit_weights,
    joint_objective,
    kd_loss,
    self_distillation,
    soft_cross_entropy,
    teacher_distillation,
    with_energy_hinge,
)

LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2


def three_exits(images):
    return [images, 2 * images, 3 * images]


def run(objective, images, targets):
    (step,) = objective(three_exits, images, targets)
    return step


def test_cross_entropy_of_classes_by_hand():
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert soft_cross_entropy(LOGITS, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_smoothing_moves_a_share_of_the_target_to_all_classes():
    smoothed = soft_cross_entropy(LOGITS[:1], torch.tensor([0]), smoothing=0.2)
    assert smoothed.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_soft_targets_are_not_smoothed_again():
    targets = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    expected = (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2
    assert soft_cross_entropy(LOGITS, targets, smoothing=0.2).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_float32_losses(dtype):
    logits = torch.randn(4, 5).to(dtype)
    targets = torch.arange(4)
    assert torch.equal(soft_cross_entropy(logits, targets), soft_cross_entropy(logits.float(), targets))
    assert torch.equal(
        kd_loss(logits, logits.flip(0), 2.0), kd_loss(logits.float(), logits.float().flip(0), 2.0)
    )


def test_float64_logits_keep_their_precision():
    assert soft_cross_entropy(LOGITS.double(), torch.tensor([0, 1])).dtype == torch.float64


def test_kd_agrees_with_kl_div_and_scales_with_temperature():
    student, teacher = torch.randn(2, 4, 5).double()
    expected = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean") * 9
    torch.testing.assert_close(kd_loss(student, teacher, 3.0), expected)


def test_kd_by_hand():
    # KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 log(2/3) + 1/2 log 2; the second row agrees with itself
    loss = kd_loss(LOGITS, torch.zeros(2, 2), 1.0)
    assert loss.item() == pytest.approx((0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2)


def test_kd_teacher_gets_no_gradient():
    student, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    kd_loss(student[0], teacher, 2.0).backward()
    assert teacher.grad is None
    assert student.grad[0].abs().sum() > 0


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, 2.0]])
def test_joint_objective_weighs_exits_but_not_their_distillation(weights):
    images, targets = torch.randn(4, 5), torch.arange(4)
    objective = joint_objective(Losses(weights, 0.1, distil=self_distillation(0.3, 2.0)))
    loss, logits = run(objective, images, targets)
    task = sum(
        weight * F.cross_entropy(factor * images, targets, label_smoothing=0.1)
        for weight, factor in zip(weights, [1, 2, 3], strict=True)
    )
    taught = kd_loss(images, 3 * images, 2.0) + kd_loss(2 * images, 3 * images, 2.0)
    torch.testing.assert_close(loss, task + 0.3 * taught)
    assert len(logits) == 3


def test_joint_objective_has_nothing_to_distil_at_one_exit():
    objective = joint_objective(Losses([1.0], 0.0, distil=self_distillation(0.5, 1.0)))
    ((loss, _),) = objective(lambda images: [images], LOGITS, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_the_last_exit_teaches_the_others_and_learns_nothing_from_it():
    exits = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    loss = self_distillation(0.3, 2.0)(None, exits)
    torch.testing.assert_close(
        loss, 0.3 * (kd_loss(exits[0], exits[2], 2.0) + kd_loss(exits[1], exits[2], 2.0))
    )
    loss.backward()
    assert [y.grad is None for y in exits] == [False, False, True]


@pytest.mark.parametrize(("last_only", "taught"), [(False, [0, 1, 2]), (True, [2])])
def test_a_teachers_last_exit_teaches_all_exits_or_the_last(last_only, taught):
    images, teacher = torch.randn(4, 5), torch.nn.Linear(5, 3)
    exits = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    distil = teacher_distillation(lambda x: [-teacher(x), teacher(x)], 0.3, 2.0, last_only=last_only)
    loss = distil(images, exits)
    torch.testing.assert_close(loss, 0.3 * sum(kd_loss(exits[k], teacher(images), 2.0) for k in taught))
    loss.backward()
    assert [k for k, y in enumerate(exits) if y.grad is not None] == taught and teacher.weight.grad is None


def test_joint_objective_shows_the_teacher_the_images():
    images, targets = torch.randn(4, 5), torch.arange(4)
    distil = teacher_distillation(lambda x: [-2 * x], 0.3, 2.0)
    loss, _ = run(joint_objective(Losses([1.0] * 3, 0.0, distil=distil)), images, targets)
    plain, _ = run(joint_objective(Losses([1.0] * 3, 0.0)), images, targets)
    taught = sum(kd_loss(factor * images, -2 * images, 2.0) for factor in (1, 2, 3))
    torch.testing.assert_close(loss, plain + 0.3 * taught)


def test_exit_weights_are_ones_or_as_given():
    assert exit_weights(3) == [1.0, 1.0, 1.0]
    assert exit_weights(3, [1.0, 0.5, 2.0]) == [1.0, 0.5, 2.0]


def test_exit_weights_of_the_published_factors():
    assert exit_weights(4, att=0.5, cnn=1.0, merge=2.0) == [0.5, 0.5, 1.0, 2.0]
    assert exit_weights(4, merge=1.0) == [0.25, 0.25, 0.25, 1.0]
    assert exit_weights(4, cnn=0.0) == [0.25, 0.25, 0.0, 0.5]


def test_there_is_one_exit_weight_per_exit():
    with pytest.raises(ValueError, match="2 exit weights given, the network has 3 exits"):
        exit_weights(3, [1.0, 1.0])
    with pytest.raises(ValueError, match="the network has 5: give exit weights"):
        exit_weights(5, att=1.0)
    with pytest.raises(ValueError, match="choose one of them"):
        exit_weights(4, [1.0] * 4, att=1.0)


@pytest.mark.parametrize("given", [{"weights": [0.0] * 4}, {"att": 0.0, "cnn": 0.0, "merge": 0.0}])
def test_one_exit_weight_is_above_0(given):
    with pytest.raises(ValueError, match=r"^exit weights \[0.0, .*\]: .* give one above 0$"):
        exit_weights(4, **given)


def test_the_hinge_wants_high_energy_of_known_classes_and_low_energy_of_others():
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    model, targets = lambda images: [logits], torch.tensor([0, 2])
    plain = joint_objective(Losses([1.0], 0.0))
    ((loss, _),) = plain(model, None, targets)
    ((hinged, exits),) = with_energy_hinge(plain, 2, 0.1, 1.0, 5.0)(model, None, targets)
    known, other = logits.logsumexp(1).tolist()
    assert (hinged - loss).item() == pytest.approx(0.1 * ((5 - known) ** 2 + (other - 1) ** 2), rel=1e-5)
    assert exits[0] is logits
