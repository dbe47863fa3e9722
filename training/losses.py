"""Exit-weighted cross-entropy, distillation among exits, and the objective made of them.

An objective is a generator function: `for loss, logits in objective(model, images, targets)` yields every
loss that calls for an optimizer step, and the exits' logits it was computed from: of the batch, or of one
part after another.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Distillation = Callable[[Tensor, list[Tensor]], Tensor]  # from images and the logits of all exits to a scalar
Objective = Callable[[nn.Module, Tensor, Tensor], Iterator[tuple[Tensor, list[Tensor]]]]


def full_precision(logits: Tensor) -> Tensor:
    """`logits` in float32 if they are of a half type; logarithms of softmax need the digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy averaged over the batch (a scalar).

    `logits` are [B, C]; `targets` are classes [B], or soft targets [B, C], for instance from mixup.
    `smoothing` spreads that share of a class target evenly over all C; soft targets are taken as they are,
    smoothed by whoever made them.
    """
    if targets.is_floating_point():
        smoothing = 0.0
    return F.cross_entropy(full_precision(logits), targets, label_smoothing=smoothing)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)): summed over classes, averaged over the batch (a
    scalar).

    Both are logits [B, C]; the teacher gets no gradient (Hinton et al., arXiv 1503.02531).
    """
    log_p = F.log_softmax(full_precision(teacher.detach()) / temperature, dim=1)
    log_q = F.log_softmax(full_precision(student) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def exit_weights(
    num_exits: int,
    weights: Sequence[float] | None = None,
    *,
    att: float | None = None,
    cnn: float | None = None,
    merge: float | None = None,
) -> list[float]:
    """The weight of each exit's loss: as given, or ones, or Dynamic Perceiver's factors for its four exits.

    `att` weighs exits 0 and 1, `cnn` exit 2, `merge` exit 3; of these, what is not given has the published
    default. Raises ValueError unless there is one weight per exit.
    """
    if (att, cnn, merge) != (None, None, None):
        if weights:
            raise ValueError(f"exit weights {list(weights)} and loss factors are given; choose one of them")
        if num_exits != 4:
            raise ValueError(
                f"loss factors are for four exits, the network has {num_exits}: give exit weights"
            )
        att, cnn, merge = (
            default if w is None else w for w, default in ((att, 0.25), (cnn, 0.25), (merge, 0.5))
        )
        return [att, att, cnn, merge]
    if weights and len(weights) != num_exits:
        raise ValueError(f"{len(weights)} exit weights given, the network has {num_exits} exits")
    return list(weights or [1.0] * num_exits)


def self_distillation(alpha: float, temperature: float) -> Distillation:
    """alpha * sum_{k < K} KD(exit k from exit K): the last exit teaches the others (Dynamic Perceiver;
    IMTA)."""
    return lambda images, exits: alpha * sum(kd_loss(y, exits[-1], temperature) for y in exits[:-1])


def teacher_distillation(
    teacher: nn.Module, alpha: float, temperature: float, *, last_only: bool = False
) -> Distillation:
    """alpha * sum_k KD(exit k from the last exit of `teacher`), a network of its own in evaluation mode."""

    def distil(images: Tensor, exits: list[Tensor]) -> Tensor:
        with torch.no_grad():
            taught = teacher(images)[-1]
        return alpha * sum(kd_loss(y, taught, temperature) for y in (exits[-1:] if last_only else exits))

    return distil


def with_energy_hinge(objective: Objective, other: int, weight: float, low: float, high: float) -> Objective:
    """Adds weight * (mean max(0, high - e)^2 of known classes + mean max(0, e - low)^2 of class `other`) at
    every exit.

    e = log sum exp(logits) is the negated free energy, in nats, which the router may read: known inputs are
    to have at least `high`, others at most `low` (energy-based out-of-distribution training, arXiv
    2010.03759). Targets are classes [B].
    """

    def hinged(model: nn.Module, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for loss, exits in objective(model, images, targets):
            known = (targets != other).float()
            for logits in exits:
                energy = full_precision(logits).logsumexp(1)
                inside = (known * F.relu(high - energy) ** 2).sum() / known.sum().clamp(min=1)
                outside = ((1 - known) * F.relu(energy - low) ** 2).sum() / (1 - known).sum().clamp(min=1)
                loss = loss + weight * (inside + outside)
            yield loss, exits

    return hinged


def joint_objective(
    *, exit_weights: Sequence[float], smoothing: float, distil: Distillation | None = None
) -> Objective:
    """All exits trained at once: sum_k exit_weights[k] * CE_k, one weight per exit, plus what `distil`
    adds."""

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        logits = model(images)
        losses = [soft_cross_entropy(y, targets, smoothing) for y in logits]
        loss = sum(w * one for w, one in zip(exit_weights, losses, strict=True))
        yield loss if distil is None else loss + distil(images, logits), logits

    return objective
