"""What early exit gains over the network that would be deployed without it, with the uncertainty of both."""

from dataclasses import dataclass

import torch

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.goals import Choice
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
    static_macs: float
    difference: Estimate
    fewer_macs: Estimate
    fewer_than_all: Estimate
    calibrated: bool = True

    @property
    def title(self) -> str:
        """The row of the sweep, and how its thresholds were found."""
        return f"{self.name} ({self.point.policy.name})"


def headline_of(choice: Choice, test: ExitTables, costs: StageCosts) -> Headline:
    """The headline of a chosen policy on the images of `test`; `costs` are multiply-adds."""
    point = choice.policy.simulate(test, costs)
    met = choice.policy.outcome(test)
    right = met.correct.double()
    static = test.full_correct.double()
    leaving = torch.tensor(choice.policy.leaving(costs), dtype=torch.float64, device=right.device)
    accuracy, macs, static_accuracy, difference = mean_estimates(
        torch.stack([right, leaving[met.exits], static, right - static])
    )
    alone = costs.alone()[-1]
    together = costs.leaving()[-1]
    return Headline(
        name=choice.name,
        reason=choice.reason,
        num_images=len(test),
        point=point,
        accuracy=accuracy,
        macs=macs,
        static_accuracy=static_accuracy,
        static_macs=alone,
        difference=difference,
        fewer_macs=macs.below(alone),
        fewer_than_all=macs.below(together),
    )
