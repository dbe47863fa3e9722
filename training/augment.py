"""Image transforms (PIL image of any size -> normalised tensor [3, size, size]) and the mixup collate."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

SMALL = 32  # up to this size images are padded and shifted rather than cropped and zoomed, as on CIFAR
LARGE = 384  # from this size evaluation squeezes the whole image into a square, as ConvNeXt does
MIXUP_MODES = ("batch", "pair", "elem")


@dataclass(frozen=True)
class Augment:
    """Options of both transforms; names and defaults are those of Dyn-Perceiver's command line."""

    input_size: int
    mean: tuple[float, ...]  # per channel, for pixels in 0..1
    std: tuple[float, ...]
    color_jitter: float = 0.4
    aa: str | None = "rand-m9-mstd0.5-inc1"
    train_interpolation: str = "bicubic"
    scale: tuple[float, float] = (
        0.08,
        1.0,
    )  # share of the area that a training crop takes, least and largest
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    crop_pct: float | None = None  # share of the short side that evaluation keeps; None is 224/256


def train_transform(a: Augment) -> Callable:
    """timm's standard training transform: random resized crop, flip, RandAugment or colour jitter, random
    erasing.

    For `input_size` <= 32 the crop is a random crop with 4 pixels of black padding. With `aa` off ("none", ""
    or None), `color_jitter` 0 and `reprob` 0 that leaves crop, flip and normalisation, which is MSDNet's
    recipe for CIFAR. Raises ValueError for an `aa`, `train_interpolation` or `remode` that timm does not
    know, and for a bad `scale`.
    """
    least, largest = a.scale
    if not 0 < least <= largest <= 1:
        raise ValueError(
            f"scale is {least} {largest}; give two shares above 0 and at most 1, the smaller one first"
        )
    ops = dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize)
    random_erasing = {"re_prob": a.reprob, "re_mode": a.remode, "re_count": a.recount}
    look = {"interpolation": a.train_interpolation, "mean": a.mean, "std": a.std}
    policy = {"color_jitter": a.color_jitter or None, "auto_augment": None if a.aa == "none" else a.aa}
    try:
        with patch.dict(
            auto_augment.NAME_TO_OP, ops
        ):  # timm looks its operations up while it builds the transform
            transform = create_transform(
                a.input_size, is_training=True, scale=a.scale, **policy, **look, **random_erasing
            )
    except (AssertionError, KeyError, ValueError) as error:
        given = f"aa={a.aa!r}, train_interpolation={a.train_interpolation!r}, remode={a.remode!r}"
        raise ValueError(f"timm does not understand this augmentation: {given} ({error})") from None
    if a.input_size <= SMALL:
        crop = [_square(a.input_size), transforms.RandomCrop(a.input_size, padding=4)]
        transform = transforms.Compose(crop + transform.transforms[1:])  # [0] is the random resized crop
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Posterize as timm does, but black for 0 bits: the published recipe draws them and recent Pillow refuses
    them."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def eval_transform(a: Augment) -> Callable:
    """Evaluation transform: short side to `input_size / crop_pct`, centre crop, normalise; bicubic.

    Images for `input_size` <= 32 or >= 384 are resized to the square instead, without a crop; an image that
    has the size already is left as it is. Raises ValueError for a `crop_pct` outside (0, 1].
    """
    crop_pct = 224 / 256 if a.crop_pct is None else a.crop_pct
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
    if SMALL < a.input_size < LARGE:
        resize = transforms.Resize(int(a.input_size / crop_pct), InterpolationMode.BICUBIC)
        sizing = [resize, transforms.CenterCrop(a.input_size)]
    else:
        sizing = [_square(a.input_size)]
    return transforms.Compose([*sizing, transforms.ToTensor(), transforms.Normalize(a.mean, a.std)])


def _square(size: int) -> transforms.Resize:
    return transforms.Resize((size, size), InterpolationMode.BICUBIC)


class MixupCollate:
    """Collate function that mixes a batch: list of (image [3, H, W], int) -> images [B, 3, H, W], targets [B,
    C].

    It draws from NumPy's global generator, which torch seeds in every loader worker.
    """

    def __init__(self, mixup: Mixup):
        self.mixup = mixup

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Stack the samples, then mix each with its mirror image in the batch (i with B - 1 - i)."""
        return self.mixup(*default_collate(samples))


def mixup_collate(
    *,
    mixup: float,
    cutmix: float,
    cutmix_minmax: tuple[float, float] | None,
    prob: float,
    switch_prob: float,
    mode: str,
    smoothing: float,
    num_classes: int,
) -> MixupCollate | None:
    """Build the collate function for mixup and cutmix, or None when both are off.

    `mixup` and `cutmix` are the alphas of their Beta distributions (0 is off); `cutmix_minmax` replaces the
    second by a range of box sizes. `prob` is the chance to mix at all, `switch_prob` to take cutmix where
    both are on. Targets put `smoothing / C` off the label before mixing. Batches must have an even size,
    which is the caller's to check. Raises ValueError for an unknown `mode`.
    """
    if mode not in MIXUP_MODES:
        raise ValueError(f"unknown mixup mode {mode!r}; choose from {', '.join(MIXUP_MODES)}")
    if mixup <= 0 and cutmix <= 0 and cutmix_minmax is None:
        return None
    return MixupCollate(
        Mixup(mixup, cutmix, cutmix_minmax, prob, switch_prob, mode, True, smoothing, num_classes)
    )
