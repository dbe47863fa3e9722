"""RegNetY, ResNet and MobileNetV3 alone, under the names their weights have in torchvision and timm."""

import torch.nn.functional as F
from torch import Tensor

from models.backbones import CORES, make_backbone
from models.multi_exit import MultiExitModel, State
from models.registry import register


class PlainCNN(MultiExitModel):
    """A CNN of `models.backbones` as a one-exit network, the static baseline of the two-stream networks.

    Args:
        core: which CNN.
        drop_path: stochastic depth, rising linearly to this rate; None is the published 0.2 of ResNets, else
            0.
        dropout: before the last linear layer; None is the published 0.2 of ResNets and MobileNets, 0 of
            RegNets.
    """

    num_exits = 1

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        core: str,
        drop_path: float | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        backbone = make_backbone(core, drop_path, dropout)
        for name, part in backbone.plain:
            self.add_module(name, part)
        self.add_module(backbone.classifier_name, backbone.classifier(num_classes))
        self.dropout = (
            0.0 if backbone.hidden else backbone.dropout
        )  # a classifier with a hidden layer has its own

    def begin(self, images: Tensor) -> State:
        """The state is the images [B, 3, H, W]."""
        return images

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """The last map's mean [B, C]."""
        *parts, _ = self.children()
        for part in parts:
            state = part(state)
        return state.mean((2, 3)), None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        *_, classifier = self.children()
        return classifier(F.dropout(features, self.dropout, self.training))


for _core in CORES:
    register(PlainCNN, _core, f"{_core.replace('_', ' ')}, one exit", core=_core)
