"""What early exit gains over the network that would be deployed without it, with the uncertainty of both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaptive.exit_tables import ExitFigures, ExitTables
from adaptive.intervals import Estimate, mean_estimates
from adaptive.policy import OperatingPoint


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The policy to deploy beside the static network, both on the same test images.

    The static network ends at the last exit and has no earlier heads; of a cascade, it is the last network
    alone. `reason` says why the policy was chosen, on calibration images alone. Accuracies are fractions,
    `difference` is that of early exit less that of the static network, image by image. `macs` are
    multiply-adds per image; the static network takes `fewer_macs` times as many, all exits `fewer_than_all`
    times. Intervals are of 95 %, over images. Without calibration images (not `calibrated`) nothing is
    expected of the policy beforehand.
    """

    name: str
    reason: str
    num_images: int
    point: OperatingPoint
    accuracy: Estimate
    macs: Estimate
    static_accuracy: Estimate
    static_macs: int
    difference: Estimate
    fewer_macs: Estimate
    fewer_than_all: Estimate
    calibrated: bool = True

    @property
    def title(self) -> str:
        """The row of the sweep, and how its thresholds were found."""
        return f"{self.name} ({self.point.policy.name})"


def headline_of(
    name: str, reason: str, test: ExitTables, point: OperatingPoint, exits: Sequence[ExitFigures]
) -> Headline:
    """The headline of an operating point, called `name`, on the images of `test`; `exits` have the costs."""
    left_at, last = point.policy.exit_of(test), exits[-1]
    right = test.correct.gather(0, left_at[None])[0].double()
    static = test.correct[-1].double()
    costs = torch.tensor([row.macs for row in exits], dtype=torch.float64, device=left_at.device)[left_at]
    accuracy, macs, static_accuracy, difference = mean_estimates(
        torch.stack([right, costs, static, right - static])
    )
    return Headline(
        name=name,
        reason=reason,
        num_images=len(test),
        point=point,
        accuracy=accuracy,
        macs=macs,
        static_accuracy=static_accuracy,
        static_macs=last.alone,
        difference=difference,
        fewer_macs=macs.below(last.alone),
        fewer_than_all=macs.below(last.macs),
    )
