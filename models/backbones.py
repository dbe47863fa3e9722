"""CNNs cut into a stem and four stages, for two-stream networks, and the same CNNs alone with one exit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.bases import SingleExit
from models.errors import UserError
from models.registry import nearest, register


@dataclass(frozen=True)
class Backbone:
    """A CNN in parts, and the names under which its parts are released.

    Attributes:
        stem, stages: images [B, 3, H, W] to the map that enters stage 1; then four stages, map to map.
        widths: channels of the maps that enter stages 1 to 4, and of the one that leaves stage 4.
        strides: pixels per position of the maps that enter stages 1 to 4.
        plain: names and modules of the CNN alone, in order of execution; its classifier is named
            `classifier_name`.
        classifier_before: the part of a two-stream network that its classifier precedes in released files.
        dropout: rate before the last linear layer of its classifier.
        hidden: width of the hidden layer of its classifiers; 0 where they are linear.
        classifier_std: standard deviation of a linear classifier's initial weights; 0 is PyTorch's default.
        joined: the stages in one module, where released two-stream networks have them so.
    """

    stem: nn.Sequential
    stages: list[nn.Sequential]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    plain: list[tuple[str, nn.Module]]
    classifier_name: str
    classifier_before: str
    dropout: float
    hidden: int = 0
    classifier_std: float = 0.0
    joined: nn.Sequential | None = None

    @property
    def stage_path(self) -> str:
        """Where stage i is inside a two-stream network, with braces for i."""
        return "cnn_body.block{}" if self.joined else "cnn_body_stage{}"

    @property
    def body(self) -> list[tuple[str, nn.Module]]:
        """Names and modules that hold the stages inside a two-stream network."""
        if self.joined:
            return [("cnn_body", self.joined)]
        return [(self.stage_path.format(i), stage) for i, stage in enumerate(self.stages, 1)]

    def classifier_layers(self, n_in: int, num_classes: int) -> list[nn.Module]:
        """The layers from pooled features [B, n_in] to logits [B, num_classes]."""
        if not self.hidden:
            return [nn.Linear(n_in, num_classes)]
        return [
            nn.Linear(n_in, self.hidden),
            nn.Hardswish(inplace=True),
            nn.Dropout(self.dropout),
            nn.Linear(self.hidden, num_classes),
        ]

    def classifier(self, num_classes: int) -> nn.Module:
        """The classifier of the map that leaves stage 4, pooled: [B, widths[4]] to [B, num_classes]."""
        layers = self.classifier_layers(self.widths[-1], num_classes)
        if self.hidden:
            return nn.Sequential(*layers)
        (linear,) = layers
        if self.classifier_std:
            nn.init.normal_(linear.weight, 0.0, self.classifier_std)
            nn.init.zeros_(linear.bias)
        return linear

    @property
    def last_dropout(self) -> float:
        """Rate before the classifier as a whole; one with a hidden layer has its own dropout inside."""
        return 0.0 if self.hidden else self.dropout


# Makes a core from its rates of stochastic depth and dropout; None is the published rate.
Builder = Callable[[float | None, float | None], Backbone]
CORES: dict[str, Builder] = {}


def make_backbone(core: str, drop_path: float | None = None, dropout: float | None = None) -> Backbone:
    """The named core; rates of None are those it was published with.

    Raises ValueError for an unknown name or an invalid rate.
    """
    if not 0 <= (drop_path or 0.0) < 1:
        raise UserError(f"drop_path is {drop_path}; accepted: 0 up to, but not, 1")
    if core not in CORES:
        raise UserError(f"unknown core {core!r}; {nearest(core, CORES)}")
    return CORES[core](drop_path, dropout)


class PlainCNN(SingleExit):
    """A core alone as a one-exit network, the static baseline of the two-stream networks.

    Args:
        core: which CNN.
        drop_path: stochastic depth, rising linearly to this rate; None as published: 0.2 for ResNets, else 0.
        dropout: before the last linear layer; None as published: 0.2 for ResNets and MobileNets, else 0.
    """

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
        self.dropout = backbone.last_dropout

    def extract(self, images: Tensor) -> Tensor:
        """The last map's mean [B, C]."""
        *parts, _ = self.children()
        x = images
        for part in parts:
            x = part(x)
        return x.mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        *_, classifier = self.children()
        return classifier(F.dropout(features, self.dropout, self.training))


def register_core(name: str, build: Builder) -> None:
    """Makes a core known to two-stream networks, and registers it alone as a network of the same name."""
    CORES[name] = build
    register(PlainCNN, name, f"{name.replace('_', ' ')}, one exit", core=name)


def check_timm_name(name: str) -> None:
    """Raises ValueError for a name that timm does not know."""
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; {nearest(name, timm.list_models())[:400]}")


def stochastic_depth(rate: float) -> dict[str, float]:
    """The option of timm's networks; none for zero, which those without stochastic depth would refuse."""
    return {"drop_path_rate": rate} if rate else {}
