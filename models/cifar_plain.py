"""ResNeXt, VGG and AlexNet for 32 x 32 images, with the names and shapes of EBJR's model zoo.

See `models.cifar`; ResNeXt is https://arxiv.org/abs/1611.05431, VGG https://arxiv.org/abs/1409.1556.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from models.cifar import CifarNet, blocks_of
from models.errors import UserError
from models.layers import conv, init_he_out
from models.registry import register

# Numbers of convolutions between two poolings (table 1 of the VGG paper), and their widths.
VGG_COUNTS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
VGG_WIDTHS = (64, 128, 256, 512, 512)


class ResNeXtBlock(nn.Module):
    """1x1 convolution to `inner` channels, grouped 3x3, 1x1, each with batch norm, added to the shortcut."""

    def __init__(self, n_in: int, n_out: int, inner: int, cardinality: int, stride: int) -> None:
        super().__init__()
        self.conv_reduce = conv(n_in, inner, 1)
        self.bn_reduce = nn.BatchNorm2d(inner)
        self.conv_conv = conv(inner, inner, 3, stride, cardinality)
        self.bn = nn.BatchNorm2d(inner)
        self.conv_expand = conv(inner, n_out, 1)
        self.bn_expand = nn.BatchNorm2d(n_out)
        # Drawn in every block, also where it is not used, so that a seed always gives the same weights.
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
            raise UserError(
                f"widen_factor is {widen_factor}; accepted: 4, for which the classifier reads 1024 channels"
            )
        count = blocks_of(depth, 2, 9, "ResNeXt")
        width = 64
        self.conv_1_3x3 = conv(3, width)
        self.bn_1 = nn.BatchNorm2d(width)
        for i in (1, 2, 3):
            planes = 64 * 2 ** (i - 1)
            blocks = OrderedDict()
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                block = ResNeXtBlock(width, planes * widen_factor, planes * cardinality, cardinality, stride)
                blocks[f"stage_{i}_bottleneck_{j}"] = block
                width = planes * widen_factor
            self.add_module(f"stage_{i}", nn.Sequential(blocks))
        classifier = self.add_classifier(width, num_classes)
        init_he_out(self, zero_bias=nn.Linear)
        nn.init.kaiming_normal_(classifier.weight)

    def last_map(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        x = F.relu(self.bn_1(self.conv_1_3x3(images)), inplace=True)
        return self.stage_3(self.stage_2(self.stage_1(x)))


class CifarVGG(CifarNet):
    """VGG of `layers` layers (11, 13, 16 or 19), with batch norm if `norm`."""

    classifier_name = "classifier"

    def __init__(self, *, num_classes: int = 10, layers: int = 16, norm: bool = False) -> None:
        super().__init__()
        if layers not in VGG_COUNTS:
            raise UserError(f"layers is {layers}; accepted: {', '.join(map(str, VGG_COUNTS))}")
        self.features = nn.Sequential()
        n_in = 3
        for n_out, count in zip(VGG_WIDTHS, VGG_COUNTS[layers], strict=True):
            for _ in range(count):
                self.features.append(conv(n_in, n_out, bias=True))
                if norm:
                    self.features.append(nn.BatchNorm2d(n_out))
                self.features.append(nn.ReLU(inplace=True))
                n_in = n_out
            self.features.append(nn.MaxPool2d(2))
        classifier = self.add_classifier(n_in, num_classes)
        init_he_out(self, zero_bias=(nn.Conv2d, nn.Linear))
        nn.init.normal_(classifier.weight, 0.0, 0.01)

    def last_map(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        return self.features(images)


class CifarAlexNet(CifarNet):
    """AlexNet for 32 x 32 images."""

    classifier_name = "classifier"

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(conv(64, 192, 5, bias=True), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(conv(192, 384, bias=True), nn.ReLU(inplace=True)),
            *(conv(384, 256, bias=True), nn.ReLU(inplace=True)),
            *(conv(256, 256, bias=True), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.add_classifier(256, num_classes)

    def last_map(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        return self.features(images)


register(CifarResNeXt, "cifar_resnext", "ResNeXt for 32 x 32 images")
register(CifarAlexNet, "cifar_alexnet", "AlexNet for 32 x 32 images")
for _layers in VGG_COUNTS:
    register(CifarVGG, f"cifar_vgg{_layers}", f"VGG-{_layers} for 32 x 32 images", layers=_layers)
    _about = f"VGG-{_layers} with batch norm for 32 x 32 images"
    register(CifarVGG, f"cifar_vgg{_layers}_bn", _about, layers=_layers, norm=True)
