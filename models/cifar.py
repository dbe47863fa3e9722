"""Residual and dense networks for 32 x 32 images with one exit, as EBJR's model zoo has them.

https://arxiv.org/abs/2110.10343: DenseNet-BC (https://arxiv.org/abs/1608.06993), ResNet (1512.03385),
PreResNet (1603.05027) and Wide ResNet (1605.07146). Weights have the names and shapes of the released files.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bases import SingleExit
from models.errors import UserError
from models.layers import check_choice, conv, init_he_out
from models.registry import register

WIDTHS = (16, 32, 64)  # of the three stages of residual networks, before multipliers


def blocks_of(depth: int, first: int, step: int, what: str) -> int:
    """n of depth = step * n + first. Raises ValueError where there is none."""
    if depth < step + first or (depth - first) % step:
        near = max(1, round((depth - first) / step))
        accepted = ", ".join(str(step * n + first) for n in sorted({max(1, near - 1), near, near + 1}))
        raise UserError(f"depth is {depth}; {what} accepts {step}n + {first}, as in {accepted}")
    return (depth - first) // step


class CifarNet(SingleExit):
    """A family writes `last_map`, and ends its constructor with `add_classifier`."""

    normalisation = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    side = 32
    classifier_name = "fc"

    def add_classifier(self, width: int, num_classes: int) -> nn.Linear:
        """The linear layer after a last map of `width` channels, under the family's name for it."""
        self.pool = nn.AdaptiveAvgPool2d(1)
        classifier = nn.Linear(width, num_classes)
        self.add_module(self.classifier_name, classifier)
        return classifier

    def last_map(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the last map [B, C, h, w]."""
        raise NotImplementedError

    def extract(self, images: Tensor) -> Tensor:
        """The last map's mean [B, C]."""
        return self.pool(self.last_map(images)).flatten(1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.get_submodule(self.classifier_name)(features)


class DenseLayer(nn.Module):
    """Appends `growth` channels: batch norm, ReLU and 1x1 to 4 * `growth`, then the same with 3x3."""

    folds = (("conv1", "bn2"),)

    def __init__(self, n_in: int, growth: int, drop: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = conv(n_in, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv(4 * growth, growth)
        self.relu = nn.ReLU(inplace=True)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_in + growth, H, W], new channels last."""
        new = self.conv1(self.relu(self.bn1(x)))
        new = self.conv2(self.relu(self.bn2(new)))
        return torch.cat([x, F.dropout(new, self.drop, self.training)], 1)


class Transition(nn.Module):
    """Batch norm, ReLU, 1x1 convolution and 2x2 mean: [B, n_in, H, W] to [B, n_out, H / 2, W / 2]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = conv(n_in, n_out, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        # A function: the published counter of operations would count a module.
        return F.avg_pool2d(self.conv1(self.relu(self.bn1(x))), 2)


class CifarDenseNet(CifarNet):
    """DenseNet-BC: three dense blocks of (depth - 4) / 6 layers.

    Args:
        depth: 6n + 4.
        growthRate: channels that each layer adds.
        compressionRate: by how much a transition divides the channels.
        dropRate: dropout after each layer.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        depth: int = 22,
        growthRate: int = 12,
        compressionRate: int = 2,
        dropRate: float = 0.0,
    ) -> None:
        super().__init__()
        count = blocks_of(depth, 4, 6, "DenseNet-BC")
        width = 2 * growthRate
        self.conv1 = conv(3, width)
        for i in (1, 2, 3):
            layers = [DenseLayer(width + j * growthRate, growthRate, dropRate) for j in range(count)]
            self.add_module(f"dense{i}", nn.Sequential(*layers))
            width += count * growthRate
            if i < 3:
                self.add_module(f"trans{i}", Transition(width, width // compressionRate))
                width //= compressionRate
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.add_classifier(width, num_classes)
        init_he_out(self, zero_bias=nn.Conv2d)

    def last_map(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        x = self.trans1(self.dense1(self.conv1(images)))
        x = self.trans2(self.dense2(x))
        return self.relu(self.bn(self.dense3(x)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 to four times the width, added to the shortcut.

    Batch norm and ReLU come before each convolution if `before`, else after it. A shortcut of another shape
    is a 1x1 convolution of the block's raw input, with batch norm where that comes after.
    """

    def __init__(self, n_in: int, planes: int, stride: int, *, bottleneck: bool, before: bool) -> None:
        super().__init__()
        convs = [(3, planes, stride), (3, planes, 1)]
        if bottleneck:
            convs = [(1, planes, 1), (3, planes, stride), (1, 4 * planes, 1)]
        self.before = before
        self.count = len(convs)
        width = n_in
        for i, (kernel, n_out, step) in enumerate(convs, 1):
            layer = conv(width, n_out, kernel, step)
            if before:
                self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            self.add_module(f"conv{i}", layer)
            if not before:
                self.add_module(f"bn{i}", nn.BatchNorm2d(n_out))
            width = n_out
        follows = 1 if before else 0  # the batch norm after convolution i is number i + follows
        self.folds = [(f"conv{i}", f"bn{i + follows}") for i in range(1, len(convs) + 1 - follows)]
        self.relu = nn.ReLU(inplace=not before)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or width != n_in:
            norm = [] if before else [nn.BatchNorm2d(width)]
            self.downsample = nn.Sequential(conv(n_in, width, 1, stride), *norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        y = x
        for i in range(1, self.count + 1):
            layer = self.get_submodule(f"conv{i}")
            norm = self.get_submodule(f"bn{i}")
            if self.before:
                y = layer(self.relu(norm(y)))
            else:
                y = norm(layer(y))
                y = self.relu(y) if i < self.count else y
        y = y + self.downsample(x)
        return y if self.before else self.relu(y)


class CifarResNet(CifarNet):
    """ResNet of three stages.

    Args:
        depth: 6n + 2 of "BasicBlock", 9n + 2 of "Bottleneck".
        block_name: which.
    """

    before = False  # whether batch norm and ReLU come before each convolution

    def __init__(self, *, num_classes: int = 10, depth: int = 20, block_name: str = "BasicBlock") -> None:
        super().__init__()
        check_choice("block_name", block_name, ("BasicBlock", "Bottleneck"))
        bottleneck = block_name == "Bottleneck"
        count = blocks_of(depth, 2, 9 if bottleneck else 6, block_name)
        width = WIDTHS[0]
        self.conv1 = conv(3, width)
        if not self.before:
            self.bn1 = nn.BatchNorm2d(width)
        for i, planes in enumerate(WIDTHS, 1):
            blocks = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(ResidualBlock(width, planes, stride, bottleneck=bottleneck, before=self.before))
                width = planes * (4 if bottleneck else 1)
            self.add_module(f"layer{i}", blocks)
        if self.before:
            self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.add_classifier(width, num_classes)
        init_he_out(self, zero_bias=nn.Conv2d)

    def last_map(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        x = self.conv1(images)
        if not self.before:
            x = self.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.relu(self.bn(x)) if self.before else x


class CifarPreResNet(CifarResNet):
    """ResNet with batch norm and ReLU before every convolution; options as in CifarResNet."""

    before = True


class WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions; a shortcut of another width reads the activated input."""

    folds = (("conv1", "bn2"),)

    def __init__(self, n_in: int, n_out: int, stride: int, drop: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = conv(n_in, n_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = conv(n_out, n_out)
        self.relu = nn.ReLU()
        self.drop = drop
        self.convShortcut = None if n_in == n_out else conv(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        active = self.relu(self.bn1(x))
        y = self.relu(self.bn2(self.conv1(active)))
        y = self.conv2(F.dropout(y, self.drop, self.training))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class CifarWRN(CifarNet):
    """Wide ResNet: ResNet's widths times `widen_factor`; depth 6n + 4, dropout `dropRate` in all blocks."""

    def __init__(
        self, *, num_classes: int = 10, depth: int = 28, widen_factor: int = 1, dropRate: float = 0.0
    ) -> None:
        super().__init__()
        count = blocks_of(depth, 4, 6, "WRN")
        width = WIDTHS[0]
        self.conv1 = conv(3, width)
        for i, planes in enumerate(WIDTHS, 1):
            blocks = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(WideBlock(width, planes * widen_factor, stride, dropRate))
                width = planes * widen_factor
            self.add_module(f"block{i}", nn.Sequential(OrderedDict(layer=blocks)))
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.add_classifier(width, num_classes)
        init_he_out(self, zero_bias=(nn.Conv2d, nn.Linear))

    def last_map(self, images: Tensor) -> Tensor:
        """See CifarNet."""
        x = self.block1(self.conv1(images))
        return self.relu(self.bn1(self.block3(self.block2(x))))


register(CifarDenseNet, "cifar_densenet", "DenseNet-BC for 32 x 32 images")
for _depth, _growth in ((52, 6), (64, 12), (58, 6), (88, 8)):
    _about = f"DenseNet-BC of {_depth} layers and growth {_growth}, of EBJR's pairs"
    register(CifarDenseNet, f"cifar_densenet_{_depth}_{_growth}", _about, depth=_depth, growthRate=_growth)
register(CifarResNet, "cifar_resnet", "ResNet for 32 x 32 images")
register(CifarPreResNet, "cifar_preresnet", "pre-activation ResNet for 32 x 32 images")
register(CifarWRN, "cifar_wrn", "Wide ResNet for 32 x 32 images")
