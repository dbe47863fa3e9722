"""MobileNetV2 (https://arxiv.org/abs/1801.04381) under the names of EBJR's zoo; torchvision's and timm's are
others."""

from itertools import chain

from torch import Tensor, nn

from models.cifar import CifarNet, init_he_out
from models.layers import rounded
from models.registry import register

# expansion, channels, blocks, stride of the first
ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _normed(
    n_in: int, n_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> list[nn.Module]:
    """Convolution, batch norm and, if `act`, ReLU6."""
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(n_out), *([nn.ReLU6(inplace=True)] if act else [])]


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1 to `n_out` without activation; added where it
    fits."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        parts = [_normed(n_in, wide)] if expansion > 1 else []
        parts += [_normed(wide, wide, 3, stride, wide), _normed(wide, n_out, act=False)]
        self.conv, self.added = nn.Sequential(*chain(*parts)), stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        return x + self.conv(x) if self.added else self.conv(x)


class MobileNetV2(CifarNet):
    """MobileNetV2 with one exit, `width_mult` times as wide; the last map is widened only above 1."""

    normalisation = ()
    classifier_name = "classifier"

    def __init__(self, *, num_classes: int = 1000, width_mult: float = 1.0) -> None:
        super().__init__()
        divisor = 4 if width_mult == 0.1 else 8
        width = rounded(32 * width_mult, divisor)
        features: list[nn.Module] = [nn.Sequential(*_normed(3, width, 3, 2))]
        for expansion, channels, count, stride in ROWS:
            n_out = rounded(channels * width_mult, divisor)
            for i in range(count):
                features.append(InvertedResidual(width, n_out, stride if i == 0 else 1, expansion))
                width = n_out
        last = rounded(1280 * width_mult, divisor) if width_mult > 1 else 1280
        self.features, self.conv = nn.Sequential(*features), nn.Sequential(*_normed(width, last))
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(last, num_classes)
        self.apply(init_he_out)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def features_of(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        return self.conv(self.features(images))


register(MobileNetV2, "mobilenetv2", "MobileNetV2 for ImageNet, as in EBJR's zoo")
