"""Training that starts on smaller images, which cost less."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.flops import check_side
from models import MultiExitModel
from training.losses import ObjectiveFunction
from utils import UserError, option


@dataclass(frozen=True)
class LowStart:
    """A first share of the epochs that trains on smaller images; evaluation is always at full size."""

    low_size: int = option(0, "side of the training images in the first epochs; 0: as --input_size", low=0)
    low_share: float = option(0.4, "share of the epochs that train at --low_size", low=0, high=1)

    def check(self, network: MultiExitModel, side: int) -> None:
        """Raises ValueError unless this network reads images of `side`, and those of `low_size`."""
        check_side(network, side)
        if self.low_size >= side:
            raise UserError(f"--low_size {self.low_size}: accepted: below {side}, as --input_size")
        if self.low_size:
            check_side(network, self.low_size, "--low_size")

    def objective(self, objective: ObjectiveFunction, epoch: int, epochs: int) -> ObjectiveFunction:
        """The objective of an epoch, counted from 0, of so many: on smaller images in the first ones."""
        small = self.low_size and epoch < round(self.low_share * epochs)
        return at_side(objective, self.low_size) if small else objective


def at_side(objective: ObjectiveFunction, side: int) -> ObjectiveFunction:
    """The objective on images reduced to this side on their device, without aliasing."""

    def reduced(model: nn.Module, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return objective(model, images, targets)

    return reduced
