"""ResNeXt, VGG and AlexNet for 32 x 32 images, with the names and shapes of EBJR's model zoo; see
`models.cifar`."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from models.cifar import CifarNet, blocks_of, conv, init_he_out
from models.registry import register

# Widths of the convolutions between two poolings (table 1 of the VGG paper).
VGG_PLANS = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class ResNeXtBlock(nn.Module):
    """1x1 convolution to `inner` channels, grouped 3x3, 1x1, each with batch norm, added to the shortcut."""

    def __init__(self, n_in: int, n_out: int, inner: int, cardinality: int, stride: int) -> None:
        super().__init__()
        self.conv_reduce, self.bn_reduce = conv(n_in, inner, 1), nn.BatchNorm2d(inner)
        self.conv_conv, self.bn = conv(inner, inner, 3, stride, cardinality), nn.BatchNorm2d(inner)
        self.conv_expand, self.bn_expand = conv(inner, n_out, 1), nn.BatchNorm2d(n_out)
        parts = OrderedDict(shortcut_conv=conv(n_in, n_out, 1, stride), shortcut_bn=nn.BatchNorm2d(n_out))
        self.shortcut = nn.Sequential(parts if n_in != n_out else OrderedDict())

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        y = F.relu(self.bn_reduce(self.conv_reduce(x)), inplace=True)
        y = F.relu(self.bn(self.conv_conv(y)), inplace=True)
        return F.relu(self.bn_expand(self.conv_expand(y)) + self.shortcut(x), inplace=True)


class CifarResNeXt(CifarNet):
    """ResNeXt of three stages.

    Args:
        depth: 9n + 2.
        cardinality: groups of the 3x3 convolutions.
        widen_factor: 4 alone, the only one for which the published classifier fits.
        dropRate: accepted and without effect, as published.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        *,
        num_classes: int = 10,
        depth: int = 29,
        cardinality: int = 8,
        widen_factor: int = 4,
        dropRate: float = 0.0,
    ) -> None:
        super().__init__()
        if widen_factor != 4:
            raise ValueError(
                f"widen_factor is {widen_factor}; accepted: 4, for which the classifier reads 1024 channels"
            )
        count, width = blocks_of(depth, 2, 9, "ResNeXt"), 64
        self.conv_1_3x3, self.bn_1 = conv(3, 64), nn.BatchNorm2d(64)
        for i in (1, 2, 3):
            n_out, blocks = 64 * widen_factor * 2 ** (i - 1), OrderedDict()
            inner = cardinality * n_out // widen_factor
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                blocks[f"stage_{i}_bottleneck_{j}"] = ResNeXtBlock(width, n_out, inner, cardinality, stride)
                width = n_out
            self.add_module(f"stage_{i}", nn.Sequential(blocks))
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def features_of(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        x = F.relu(self.bn_1(self.conv_1_3x3(images)), inplace=True)
        return self.stage_3(self.stage_2(self.stage_1(x)))


class CifarVGG(CifarNet):
    """VGG of `layers` layers (11, 13, 16 or 19), with batch norm if `norm`."""

    classifier_name = "classifier"

    def __init__(self, *, num_classes: int = 10, layers: int = 16, norm: bool = False) -> None:
        super().__init__()
        if layers not in VGG_PLANS:
            raise ValueError(f"layers is {layers}; accepted: {', '.join(map(str, VGG_PLANS))}")
        parts, width = [], 3
        for group in VGG_PLANS[layers]:
            for n_out in group:
                parts += [
                    conv(width, n_out, bias=True),
                    *([nn.BatchNorm2d(n_out)] if norm else []),
                    nn.ReLU(inplace=True),
                ]
                width = n_out
            parts.append(nn.MaxPool2d(2))
        self.features, self.pool = nn.Sequential(*parts), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        self.apply(init_he_out)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def features_of(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        return self.features(images)


class CifarAlexNet(CifarNet):
    """AlexNet for 32 x 32 images."""

    classifier_name = "classifier"

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        pooled, parts = (0, 1, 4), []
        convs = [nn.Conv2d(3, 64, 11, 4, 5), nn.Conv2d(64, 192, 5, padding=2)]
        convs += [conv(a, b, bias=True) for a, b in ((192, 384), (384, 256), (256, 256))]
        for i, layer in enumerate(convs):
            parts += [layer, nn.ReLU(inplace=True), *([nn.MaxPool2d(2)] if i in pooled else [])]
        self.features, self.pool = nn.Sequential(*parts), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(256, num_classes)

    def features_of(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        return self.features(images)


register(CifarResNeXt, "cifar_resnext", "ResNeXt for 32 x 32 images")
register(CifarAlexNet, "cifar_alexnet", "AlexNet for 32 x 32 images")
for _layers in VGG_PLANS:
    register(CifarVGG, f"cifar_vgg{_layers}", f"VGG-{_layers} for 32 x 32 images", layers=_layers)
    _about = f"VGG-{_layers} with batch norm for 32 x 32 images"
    register(CifarVGG, f"cifar_vgg{_layers}_bn", _about, layers=_layers, norm=True)
