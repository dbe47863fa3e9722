"""Cascades of any networks: a small one sees every image; if it is not confident, the next answers (EBJR).

Akbari et al., "Energy-Based Joint Reasoning for Adaptive Inference", https://arxiv.org/abs/2110.10343, for
two networks or more. Routing thresholds the exits' confidence, as in every network here: an image that stays
with the student never reaches the teacher, whose answer otherwise replaces the student's.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.multi_exit import MultiExitModel, State
from models.registry import create_model, register
from models.tuning import Tunable

NO = -1e4  # logit of a class that is ruled out: no probability, yet a finite loss


class Member(NamedTuple):
    """One network of a cascade, and how it sees the images.

    Attributes:
        name, options: of the network, as `create_model` takes them.
        mean, std: per channel, normalise what it reads (None: as the cascade's images are).
        size, crop: it reads `size` pixels, cut from the middle of the images resized to `size / crop` (None:
            the images as they are).
        classes: its output j means class `classes[j]` of the cascade, or "none of these" where that is -1
            (None: the same classes in the same order).
    """

    name: str
    options: dict[str, Any] = {}
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    crop: float | None = None
    classes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, network: "Member | dict[str, Any] | str") -> "Member":
        """A member as it is, or made from a dict of its attributes or a bare registered name.

        Raises ValueError for impossible values, TypeError for an unknown attribute.
        """
        if not isinstance(network, Member):
            network = cls(network) if isinstance(network, str) else cls(**network)
        network.check()
        return network

    def check(self) -> None:
        """Raises ValueError for impossible values."""
        given = [stats for stats in (self.mean, self.std) if stats is not None]
        if any(len(stats) != 3 for stats in given) or min(self.std or (1,)) <= 0:
            raise UserError(f"network {self.name!r}: mean and std are three numbers each, std above 0")
        size = 1 if self.size is None else self.size
        crop = 1.0 if self.crop is None else self.crop
        if size < 1 or not 0 < crop <= 1:
            raise UserError(f"network {self.name!r}: size is at least 1, crop above 0 and at most 1")

    def to_dict(self) -> dict[str, Any]:
        """What is set, in plain types: what a checkpoint stores."""
        options = {key: _plain(value) for key, value in self.options.items()}
        values = {**self._asdict(), "options": options}
        return {key: _plain(value) for key, value in values.items() if value not in (None, {})}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Cascade(MultiExitModel):
    """Networks in a row; every exit of each is an exit, and the next network begins from the images again.

    Args:
        networks: `Member`s, dicts of their attributes or bare names, the cheapest first; a multi-exit network
            brings all its exits.
        mean, std: normalisation per channel of the images that the cascade itself is given.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        networks: Sequence[str | dict[str, Any] | Member] = ("cifar_densenet_52_6", "cifar_densenet_64_12"),
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if len(networks) < 2:
            raise UserError(f"networks is {list(networks)}; a cascade has two or more")
        self.members = [Member.of(network) for network in networks]
        self.networks = nn.ModuleList(
            create_model(member.name, len(member.classes or ()) or num_classes, **member.options)
            for member in self.members
        )
        self.views = nn.ModuleList(View(m, mean, std) for m in self.members)
        self.answers = nn.ModuleList(ClassMap(m.classes, num_classes) for m in self.members)
        # Of each stage: its network, and the exit there.
        self.stages = [(i, j) for i, network in enumerate(self.networks) for j in range(network.num_exits)]
        self.num_exits = len(self.stages)
        for member, network in zip(self.members, self.networks, strict=True):
            if member.classes and network.reads_logits(0):
                raise UserError(
                    f"classes of {member.name}: it reads its own logits and cannot have them renamed"
                )

    def begin(self, images: Tensor) -> State:
        """The images [B, 3, H, W], and no state of a network."""
        return {"images": images, "inner": None}

    def trunk(self, k: int, state: State) -> tuple[Tensor, State]:
        """What exit k reads; a network's first stage reads the images, which the next network sees again."""
        i, j = self.stages[k]
        network = self.networks[i]
        inner = state["inner"]
        if j == 0:
            inner = network.begin(self.views[i](state["images"]))
        features, inner = network.trunk(j, inner)
        images = state["images"] if i < len(self.networks) - 1 else None
        return features, {"images": images, "inner": inner if j < network.num_exits - 1 else None}

    def head(self, k: int, features: Tensor) -> Tensor:
        """Logits [B, num_classes] over the cascade's classes."""
        i, j = self.stages[k]
        return self.answers[i](self.networks[i].head(j, features))

    def carry(self, k: int, state: State, logits: Tensor) -> State:
        """As in the network of exit k."""
        i, j = self.stages[k]
        if j == self.networks[i].num_exits - 1:
            return state
        return {**state, "inner": self.networks[i].carry(j, state["inner"], logits)}

    def reads_logits(self, k: int) -> bool:
        """As in the network of exit k."""
        i, j = self.stages[k]
        return self.networks[i].reads_logits(j)

    def stages_before(self, k: int) -> Iterable[int]:
        """The earlier stages of the same network."""
        return range(k - self.stages[k][1], k)


class View(Tunable):
    """The cascade's images as one network reads them: resized (bicubic, antialiased), cut, normalised."""

    def __init__(self, member: Member, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.size = member.size
        self.side = round((member.size or 0) / (member.crop or 1))
        self.resize = in_floats
        own_mean = member.mean or mean
        own_std = member.std or std
        self.same = (*own_mean, *own_std) == (*mean, *std)
        values = {
            "scale": [b / own for b, own in zip(std, own_std, strict=True)],
            "shift": [(a - own) / b for a, own, b in zip(mean, own_mean, own_std, strict=True)],
            "given_mean": list(mean),
            "given_std": list(std),
        }
        for name, value in values.items():  # options, not weights
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def choose_kernels(self, *, on_cpu: bool, training: bool) -> None:
        """A CPU has a kernel for bytes, which rounds as PIL does."""
        self.resize = in_bytes if on_cpu else in_floats

    def choose_portable(self) -> None:
        """Some runtimes ignore antialiasing."""
        self.resize = in_products

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 3, size, size]: short side to `size / crop` pixels, then a centre crop."""
        short = min(images.shape[-2:])
        if self.size and self.side != short:
            sides = [int(self.side * side / short) for side in images.shape[-2:]]
            levels = (images.float() * self.given_std + self.given_mean).mul(255).round()
            resized = self.resize(levels, sides) / 255
            images = ((resized - self.given_mean) / self.given_std).to(images.dtype)
        if self.size and max(images.shape[-2:]) > self.size:
            top, left = (round((side - self.size) / 2) for side in images.shape[-2:])
            images = images[:, :, top : top + self.size, left : left + self.size]
        return images if self.same else images * self.scale + self.shift


# Bicubic resizing of 8-bit pixels 0..255 in float32, [B, 3, H, W] to these sides: published networks were
# trained on such.


def in_floats(levels: Tensor, sides: list[int]) -> Tensor:
    """By the kernel that every device has."""
    return F.interpolate(levels, sides, mode="bicubic", antialias=True).round().clamp(0, 255)


def in_bytes(levels: Tensor, sides: list[int]) -> Tensor:
    """By the kernel of CPUs."""
    return F.interpolate(levels.to(torch.uint8), sides, mode="bicubic", antialias=True).float()


def in_products(levels: Tensor, sides: list[int]) -> Tensor:
    """By products with matrices, which all runtimes compute alike: what `in_bytes` gives, nearly always."""
    down, across = (_resizing(*pair) for pair in zip(levels.shape[2:], sides, strict=True))
    rows = (levels @ across.mT + 0.5).floor().clamp(0, 255)
    return (down @ rows + 0.5).floor().clamp(0, 255)


@cache
def _resizing(old: int, new: int) -> Tensor:
    """The matrix [new, old] that resizes a column of pixels, in the 16 bits that the kernel for bytes has."""
    with torch.inference_mode(False):
        columns = torch.eye(old)[None, None]
        matrix = F.interpolate(columns, (new, old), mode="bicubic", antialias=True)[0, 0]
        unit = 2.0 ** int(math.log2((2**15 - 0.5) / matrix.max()))
        return (matrix * unit).round() / unit


class ClassMap(nn.Module):
    """One network's logits as logits over the cascade's classes.

    Classes that it does not know have no probability. Where it predicts "none of these", no class has any:
    all logits are equal and low, so that every kind of confidence is at its minimum and the image is deferred
    (specialised EBJR).
    """

    def __init__(self, classes: Sequence[int] | None, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.same = classes is None
        if classes is None:
            return
        own = [c for c in classes if c >= 0]
        if not own or len(set(own)) < len(own) or max(own) >= num_classes:
            raise UserError(
                f"classes are {list(classes)}; accepted: different numbers below {num_classes}, or -1"
            )
        for name, value in {
            "outputs": torch.tensor([j for j, c in enumerate(classes) if c >= 0]),
            "meanings": torch.tensor(own),
            "none": torch.tensor([c < 0 for c in classes]),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """[B, outputs of the network] to [B, num_classes]."""
        if self.same:
            return logits
        known = logits.new_full((logits.shape[0], self.num_classes), NO)
        known = known.index_copy(1, self.meanings, logits.index_select(1, self.outputs))
        return known.masked_fill(self.none[logits.argmax(1)][:, None], NO)


register(Cascade, "ebjr", "cascade of any networks (EBJR); as it is, the published pair for CIFAR-10")
register(
    Cascade,
    "ebjr_cifar100",
    "EBJR's pair for CIFAR-100",
    networks=("cifar_densenet_58_6", "cifar_densenet_88_8"),
)
