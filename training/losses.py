"""Exit-weighted cross-entropy, distillation among exits, and the objective made of them.

An objective is a generator function: `for loss, logits in objective(model, images, targets)` yields every
loss that calls for an optimizer step, and the exits' logits from which it was computed: of the batch, or of
one part after another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import MultiExitModel
from utils import UserError, option

Distillation = Callable[[Tensor, list[Tensor]], Tensor]  # from images and the logits of all exits to a scalar
ObjectiveFunction = Callable[[nn.Module, Tensor, Tensor], Iterator[tuple[Tensor, list[Tensor]]]]


@dataclass(frozen=True)
class Losses:
    """What is summed: cross-entropy of every exit by its weight, label smoothing, and what `distil` adds."""

    exit_weights: Sequence[float]
    smoothing: float = 0.0
    distil: Distillation | None = None


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how exits are trained."""

    smoothing: float = option(0.1, "label smoothing", low=0, high=0.9999)
    exit_weights: tuple[float, ...] | None = option(None, "weight of each exit's loss; default: all 1", low=0)
    loss_att_factor: float | None = option(None, "four exits: weight of exits 0 and 1", low=0)
    loss_cnn_factor: float | None = option(None, "four exits: weight of exit 2", low=0)
    loss_merge_factor: float | None = option(None, "four exits: weight of exit 3", low=0)
    with_kd: bool = option(False, "the last exit teaches the others")
    kd_teacher: str = option("", "checkpoint of a network that teaches all exits")
    T_kd: float = option(4.0, "distillation temperature", low=1e-6)
    alpha_kd: float = option(0.5, "distillation weight", low=0)
    energy_hinge: tuple[float, ...] = option((), "popular classes: weight, energy of others, energy of these")
    regime: Literal["joint", "equilibrium", "disjoint", "mixed"] = option("joint", "how exits are trained")
    freeze_backbone: bool = option(False, "train the heads alone, on features that stay as they are")
    first_share: float = option(
        0.5, "disjoint, mixed: share of the epochs that train the last exit alone", low=0, high=1
    )

    @property
    def way(self) -> str:
        """The regime, where training heads alone is one too."""
        return "heads" if self.freeze_backbone else self.regime

    def weights_of(self, network: MultiExitModel) -> list[float]:
        """The weight of each exit's loss: as given, else as published for the network's family."""
        factors = (self.loss_att_factor, self.loss_cnn_factor, self.loss_merge_factor)
        given = self.exit_weights
        if not given and factors == (None, None, None):
            given = network.loss_weights
        return exit_weights(network.num_exits, given, *factors)

    def function(
        self, network: MultiExitModel, phase: str, teacher: nn.Module | None = None, num_popular: int = 0
    ) -> ObjectiveFunction:
        """The losses of a phase (`training.regimes.phase_of`) of training without sample weights."""
        objective = joint_objective(self.losses(network, phase, teacher))
        if self.energy_hinge:
            weight, low, high = self.energy_hinge
            return with_energy_hinge(objective, num_popular, weight, low, high)
        return objective

    def losses(self, network: MultiExitModel, phase: str, teacher: nn.Module | None = None) -> Losses:
        """The losses of a phase."""
        weights, distil = self.weights_of(network), None
        if phase == "last":
            weights = [0.0] * (network.num_exits - 1) + [1.0]
        if teacher is not None:
            distil = teacher_distillation(teacher, self.alpha_kd, self.T_kd, last_only=phase == "last")
        elif self.with_kd and phase != "last":
            distil = self_distillation(self.alpha_kd, self.T_kd)
        return Losses(weights, self.smoothing, distil)


def full_precision(logits: Tensor) -> Tensor:
    """`logits` in float32 if they are of a half type, whose precision is too low for log-softmax."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy averaged over the batch (a scalar).

    `logits` are [B, C]; `targets` are classes [B], or soft targets [B, C], for instance from mixup.
    `smoothing` spreads that share of a class target evenly over all C; soft targets are used unchanged, as
    they may be smoothed already.
    """
    if targets.is_floating_point():
        smoothing = 0.0
    return F.cross_entropy(full_precision(logits), targets, label_smoothing=smoothing)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)), a scalar: the mean over the batch.

    It is summed over classes. Both are logits [B, C]; the teacher gets no gradient (Hinton et al., 2015,
    arXiv 1503.02531).
    """
    log_p = F.log_softmax(full_precision(teacher.detach()) / temperature, dim=1)
    log_q = F.log_softmax(full_precision(student) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def exit_weights(
    num_exits: int,
    weights: Sequence[float] | None = None,
    att: float | None = None,
    cnn: float | None = None,
    merge: float | None = None,
) -> list[float]:
    """The weight of each exit's loss: as given, or ones, or Dynamic Perceiver's factors for its four exits.

    `att` weighs exits 0 and 1, `cnn` exit 2, `merge` exit 3; those that are not given have the published
    defaults. Raises ValueError unless there is one weight per exit, and one of them above 0.
    """
    if (att, cnn, merge) != (None, None, None):
        if weights:
            raise UserError(f"exit weights {list(weights)} and loss factors are given; choose one of them")
        if num_exits != 4:
            raise UserError(
                f"loss factors are for four exits, the network has {num_exits}: give exit weights"
            )
        att, cnn, merge = (
            default if w is None else w for w, default in ((att, 0.25), (cnn, 0.25), (merge, 0.5))
        )
        weights = [att, att, cnn, merge]
    if weights and len(weights) != num_exits:
        raise UserError(f"{len(weights)} exit weights given, the network has {num_exits} exits")
    if weights and not any(weights):
        raise UserError(f"exit weights {list(weights)}: nothing would be trained; give one above 0")
    return list(weights or [1.0] * num_exits)


def self_distillation(alpha: float, temperature: float) -> Distillation:
    """alpha * sum_{k < K} KD(exit k from exit K): the last exit teaches the others.

    As in Dynamic Perceiver and IMTA.
    """
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


def with_energy_hinge(
    objective: ObjectiveFunction, other: int, weight: float, low: float, high: float
) -> ObjectiveFunction:
    """Adds a term that separates known classes from class `other` by their energy, at every exit.

    It is weight * (mean max(0, high - e)^2 of known classes + mean max(0, e - low)^2 of class `other`), where
    e = log sum exp(logits) is the negated free energy, in nats, which the router may read: known inputs
    should have at least `high`, others at most `low` (energy-based out-of-distribution training, arXiv
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


def joint_objective(losses: Losses) -> ObjectiveFunction:
    """All exits trained at once: sum_k exit_weights[k] * CE_k, plus what `distil` adds."""

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        logits = model(images)
        terms = [soft_cross_entropy(y, targets, losses.smoothing) for y in logits]
        loss = sum(w * term for w, term in zip(losses.exit_weights, terms, strict=True))
        yield loss if losses.distil is None else loss + losses.distil(images, logits), logits

    return objective
