"""Image transforms (PIL image of any size -> normalised tensor [3, size, size]) and the mixup collate."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from loading.sources import Source
from utils import UserError, option

SMALL = 32  # up to this size images are padded and shifted rather than cropped and zoomed, as on CIFAR
LARGE = 384  # from this size evaluation squeezes the whole image into a square, as ConvNeXt does
CROP_PCT = 224 / 256
MIXUP_MODES = ("batch", "pair", "elem")


@dataclass(frozen=True)
class View:
    """What a network sees of an image."""

    input_size: int | None = option(None, "side of the images in pixels; default: the data set's own", low=1)
    mean: tuple[float, ...] | None = option(None, "mean per channel instead of the data set's own")
    std: tuple[float, ...] | None = option(
        None, "standard deviation per channel instead of the data set's own"
    )
    imagenet_default_mean_and_std: bool = option(
        True, "false: normalise with 0.5 / 0.5 instead of the data set's own"
    )
    crop_pct: float | None = option(
        None, "share of the short side that evaluation keeps above 32 pixels; default 224/256"
    )
    interpolation: Literal["bicubic", "bilinear"] = option(
        "bicubic",
        "how evaluation resizes above 32 pixels; where --model names the network of a published "
        "file, its family's: bilinear for MSDNet, RANet and L2W",
    )

    def __post_init__(self) -> None:
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")

    def resolved(self, source: Source) -> "View":
        """With size and normalisation of the data set where none are given. Raises ValueError."""
        return self.completed(source.input_size, source.mean, source.std)

    def completed(self, size: int, mean: Sequence[float], std: Sequence[float]) -> "View":
        """With these where none are given; statistics are for pixels in 0..1. Raises ValueError."""
        if not self.imagenet_default_mean_and_std:
            mean = std = (0.5,) * 3
        mean, std = tuple(self.mean or mean), tuple(self.std or std)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"--mean {mean} --std {std}: give three numbers each, deviations above 0")
        return replace(self, input_size=self.input_size or size, mean=mean, std=std)

    @property
    def size(self) -> int:
        """Side in pixels, of a resolved view."""
        assert self.input_size is not None
        return self.input_size


@dataclass(frozen=True)
class Transform:
    """Augmentation of an image."""

    color_jitter: float = option(0.4, "strength of colour jitter where --aa is off", low=0)
    aa: str = option("rand-m9-mstd0.5-inc1", "timm's auto augmentation policy, or none")
    train_interpolation: str = option("bicubic", "bicubic, bilinear, random ...")
    scale: tuple[float, ...] = option(
        (0.08, 1.0), "least and largest share of the area that a training crop takes"
    )
    reprob: float = option(0.25, "probability of random erasing", low=0)
    remode: str = option("pixel", "what is erased with: const, rand or pixel")
    recount: int = option(1, "boxes erased per image", low=1)
    flip: Literal["random", "alternating"] = option(
        "random", "each time by chance, or every other epoch (--device_data true)"
    )
    device_data: bool = option(
        False,
        "keep training images of up to 64 pixels on the device and augment them there, by crops "
        "(4 black pixels around), flips, --reprob, mixup and cutmix: without --aa and --color_jitter",
    )

    def __post_init__(self) -> None:
        _check_pair("scale", self.scale)
        least, largest = self.scale
        if not 0 < least <= largest <= 1:
            wanted = "give two shares above 0 and at most 1, the smaller one first"
            raise UserError(f"scale is {least} {largest}; {wanted}")


@dataclass(frozen=True)
class Mixing:
    """Mixing of a batch."""

    mixup: float = option(0.8, "mixup alpha, 0 = off", low=0)
    cutmix: float = option(1.0, "cutmix alpha, 0 = off", low=0)
    cutmix_minmax: tuple[float, ...] | None = option(None, "least and largest cutmix box instead of an alpha")
    mixup_prob: float = option(1.0, "probability of mixing a batch", low=0)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", low=0)
    mixup_mode: str = option("batch", "batch, pair or elem")

    def __post_init__(self) -> None:
        _check_pair("cutmix_minmax", self.cutmix_minmax)
        if self.mixup_mode not in MIXUP_MODES:
            raise UserError(f"unknown mixup mode {self.mixup_mode!r}; choose from {', '.join(MIXUP_MODES)}")

    @property
    def on(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


def _check_pair(name: str, numbers: tuple[float, ...] | None) -> None:
    if numbers is not None and len(numbers) != 2:
        raise UserError(f"--{name} {list(numbers)}: give two numbers")


def train_transform(view: View, transform: Transform) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: random resized crop, flip, RandAugment or colour jitter, random erasing.

    For sizes <= 32 the crop is a random crop with 4 pixels of black padding. With `aa` off ("none" or ""),
    `color_jitter` 0 and `reprob` 0, only crop, flip and normalisation remain: MSDNet's recipe for CIFAR.
    Raises ValueError for an `aa`, `train_interpolation` or `remode` that timm does not know.
    """
    t = transform
    try:
        whole: Any = create_transform(
            view.size,
            is_training=True,
            scale=t.scale,
            color_jitter=t.color_jitter or None,
            auto_augment=None if t.aa == "none" else t.aa,
            interpolation=t.train_interpolation,
            mean=view.mean,
            std=view.std,
            re_prob=t.reprob,
            re_mode=t.remode,
            re_count=t.recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        words = f"aa={t.aa!r}, train_interpolation={t.train_interpolation!r}, remode={t.remode!r}"
        raise UserError(f"timm does not understand this augmentation: {words} ({error})") from None
    parts = whole.transforms
    for part in parts:
        policy = getattr(part, "policy", [getattr(part, "ops", [])])  # AutoAugment; RandAugment, AugMix
        for operation in chain(*policy):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    if view.size <= SMALL:
        crop = [_square(view.size), transforms.RandomCrop(view.size, padding=4)]
        parts = crop + parts[1:]  # [0] is the random resized crop
    return transforms.Compose(parts)


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """As timm does it, but black for 0 bits, which the published recipe draws and recent Pillow refuses."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def eval_transform(view: View) -> Callable[[Image.Image], Tensor]:
    """Evaluation transform: short side to `input_size / crop_pct`, centre crop, normalise.

    Images for sizes <= 32 or >= 384 are resized to the square instead, without a crop; an image that already
    has the size is left as it is. Up to 32 pixels that is bicubic, as in training.
    """
    size, mode = view.size, InterpolationMode(view.interpolation)
    if SMALL < size < LARGE:
        resize = transforms.Resize(int(size / (view.crop_pct or CROP_PCT)), mode)
        sizing = [resize, transforms.CenterCrop(size)]
    else:
        sizing = [_square(size, mode if size > SMALL else InterpolationMode.BICUBIC)]
    return transforms.Compose([*sizing, transforms.ToTensor(), transforms.Normalize(view.mean, view.std)])


def _square(size: int, mode: InterpolationMode = InterpolationMode.BICUBIC) -> transforms.Resize:
    return transforms.Resize((size, size), mode)


def mixer(mixing: Mixing, smoothing: float, num_classes: int) -> Mixup | None:
    """Mixes a batch: images [B, 3, H, W], labels [B] -> images, targets [B, C]; None if off.

    Sample i is mixed with sample B - 1 - i, so the batch size must be even. `mixup` and `cutmix` are the
    alphas of their Beta distributions; `cutmix_minmax` replaces the second by a range of box sizes. Targets
    spread `smoothing` evenly over all C classes before mixing. It draws from NumPy's global generator.
    """
    # The fields are timm's parameters, in its order.
    return Mixup(*astuple(mixing), label_smoothing=smoothing, num_classes=num_classes) if mixing.on else None


def _mixed(mixup: Mixup, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return mixup(*default_collate(samples))


def mixup_collate(mixing: Mixing, smoothing: float, num_classes: int) -> Callable | None:
    """`mixer` for a loader: list of (image [3, H, W], int) -> images [B, 3, H, W], targets [B, C]."""
    mixup = mixer(mixing, smoothing, num_classes)
    return partial(_mixed, mixup) if mixup else None
