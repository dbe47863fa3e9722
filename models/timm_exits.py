"""Networks from timm (https://github.com/huggingface/pytorch-image-models) under the multi-exit protocol."""

from torch import Tensor, nn

from models.multi_exit import MultiExitModel, State
from models.registry import nearest, register


class TimmNet(MultiExitModel):
    """Any timm model as a one-exit network: the trunk is its `forward_features`, the head its `forward_head`.

    `pretrained` loads timm's published weights (needs network access), whose own head is kept if `num_classes` agrees.
    """

    num_exits = 1

    def __init__(
        self,
        *,
        name: str,
        num_classes: int = 1000,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        import timm

        super().__init__()
        if not timm.is_model(name):
            raise ValueError(f"timm has no model {name!r}; {nearest(name, timm.list_models())[:400]}")
        # Some architectures know no stochastic depth; passing a zero to those would be an error.
        regularisation = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        self.net: nn.Module = timm.create_model(
            name, num_classes=num_classes, pretrained=pretrained, drop_rate=drop_rate, **regularisation
        )

    def begin(self, images: Tensor) -> State:
        """The state is the images [B, 3, H, W]."""
        return images

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """timm's features before pooling, and no state: there is no later stage."""
        return self.net.forward_features(state), None

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.net.forward_head(features)


register(TimmNet, "timm/", "any timm model as a one-exit network")
