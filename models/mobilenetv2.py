"""MobileNetV2 (https://arxiv.org/abs/1801.04381): torchvision's, with the names of weights of EBJR's zoo."""

from torch import Tensor, nn

from models.cifar import CifarNet
from models.registry import register


class MobileNetV2(CifarNet):
    """MobileNetV2 with one exit, `width_mult` times as wide; the last map is widened only above 1."""

    normalisation = ()
    classifier_name = "classifier"

    def __init__(self, *, num_classes: int = 1000, width_mult: float = 1.0) -> None:
        from torchvision.models import MobileNetV2 as TorchvisionNet

        super().__init__()
        divisor = 4 if width_mult == 0.1 else 8
        network = TorchvisionNet(num_classes, width_mult, round_nearest=divisor, dropout=0.0)
        stem, *blocks, last = network.features
        for block in blocks:
            *units, projection, norm = block.conv
            layers = [layer for unit in units for layer in unit]
            block.conv = nn.Sequential(*layers, projection, norm)  # numbered through, as in the zoo
        self.features = nn.Sequential(stem, *blocks)
        self.conv = last
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = network.classifier[-1]

    def last_map(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        return self.conv(self.features(images))


register(MobileNetV2, "mobilenetv2", "MobileNetV2 for ImageNet, as in EBJR's zoo")
