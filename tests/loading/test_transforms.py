import pickle
import random
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.testing import assert_close

from loading.transforms import Mixing, Transform, View, eval_transform, mixup_collate, train_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = {"color_jitter": 0.0, "aa": "none", "reprob": 0.0}


def view(input_size, **changes):
    return View(input_size, MEAN, STD, **changes)


def trained(input_size, **changes):
    return train_transform(view(input_size), Transform(**changes))


def noise_image(width, height):
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised(image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def mixing(smoothing=0.1, **changes):
    return mixup_collate(Mixing(**{"cutmix": 0.0, **changes}), smoothing, num_classes=4)


@pytest.mark.parametrize("size, native", [(32, 32), (32, 28), (16, 32), (64, 32), (224, 32), (384, 32)])
def test_both_transforms_give_the_input_size_whatever_the_image_has(size, native):
    for transform in (trained(size), eval_transform(view(size))):
        assert transform(noise_image(native, native)).shape == (3, size, size)


def test_plain_small_training_transform_is_a_shifted_and_perhaps_flipped_copy():
    image = noise_image(32, 32)
    padded = torch.nn.functional.pad(normalised(image), (4, 4, 4, 4))
    black = normalised(Image.new("RGB", (32, 32)))[:, :1, :1]
    padded[:, :4], padded[:, -4:], padded[:, :, :4], padded[:, :, -4:] = black, black, black, black
    crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    transform = trained(32, **PLAIN)
    seen_flip = set()
    torch.manual_seed(0)
    for _ in range(20):
        output = transform(image)
        plain = any(torch.allclose(output, crop, atol=1e-6) for crop in crops)
        flipped = any(torch.allclose(output, crop.flip(2), atol=1e-6) for crop in crops)
        assert plain or flipped
        seen_flip.add(flipped)
    assert seen_flip == {True, False}


def test_training_transform_pads_small_images_and_zooms_large_ones():
    names = [[type(part).__name__ for part in trained(size).transforms] for size in (32, 33)]
    assert names[0][:3] == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    assert names[1][:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert names[0][3:] == names[1][2:] == ["RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"]


def test_randaugment_bears_its_strongest_posterize():
    """Magnitude 10 keeps 0 bits of a colour, which the default policy does to one or two images in a
    thousand."""
    random.seed(0)
    np.random.seed(0)
    transform = trained(32, aa="rand-m10-n20-inc1", reprob=0.0)
    outputs = [transform(noise_image(32, 32)) for _ in range(20)]
    assert any(
        len(output.unique()) <= 3 for output in outputs
    )  # one black image, each channel normalised apart


def test_colour_jitter_stands_in_for_randaugment():
    names = [type(part).__name__ for part in trained(32, aa="", reprob=0.0).transforms]
    assert names[3:] == ["ColorJitter", "MaybeToTensor", "Normalize"]


@pytest.mark.parametrize("change", [{"aa": "strong"}, {"train_interpolation": "cubist"}, {"remode": "blot"}])
def test_unknown_augmentation_is_one_clear_line(change):
    with pytest.raises(ValueError, match=next(iter(change.values()))) as caught:
        trained(32, **change)
    assert "\n" not in str(caught.value)


def test_scale_is_the_area_of_a_training_crop():
    half_green = Image.new("RGB", (64, 64))
    half_green.paste((0, 255, 0), (0, 0, 64, 32))
    rows = [
        trained(64, **PLAIN, scale=scale)(half_green)[1].max(1).values
        for scale in [(1.0, 1.0)] * 5 + [(0.05, 0.05)] * 5
    ]
    # All of the image is half green; one twentieth of it seldom is.
    assert all((row > 0).sum() == 32 for row in rows[:5]) and any((row > 0).sum() != 32 for row in rows[5:])


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale is {scale[0]} {scale[1]}; give two shares"):
        trained(64, scale=scale)


def test_eval_transform_leaves_a_fitting_small_image_alone():
    image = noise_image(32, 32)
    assert_close(eval_transform(view(32))(image), normalised(image))


def test_eval_transform_crops_the_centre_of_an_image_whose_short_side_is_256():
    image = noise_image(300, 256)
    assert_close(eval_transform(view(224))(image), normalised(image)[:, 16:240, 38:262])


def test_eval_transform_honours_crop_pct():
    image = noise_image(100, 80)
    assert_close(eval_transform(view(80, crop_pct=1.0))(image), normalised(image)[:, :, 10:90])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_resizes_as_it_is_told(interpolation):
    """Of MSDNet, RANet and L2W bilinearly, of Dyn-Perceiver bicubically; up to 32 pixels as in training."""
    image, kind = noise_image(60, 50), Image.Resampling[interpolation.upper()]
    short = image.resize((48, 40), kind)  # 35 / 0.875 pixels
    zoomed = eval_transform(view(35, interpolation=interpolation))(image)
    assert_close(zoomed, normalised(short)[:, 2:37, 6:41])
    squeezed = eval_transform(view(384, interpolation=interpolation))(image)
    assert_close(squeezed, normalised(image.resize((384, 384), kind)))
    small = eval_transform(view(32, interpolation=interpolation))(image)
    assert_close(small, normalised(image.resize((32, 32), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("crop_pct", [0.0, -1.0, 1.5])
def test_crop_pct_out_of_range_is_refused(crop_pct):
    with pytest.raises(ValueError, match=f"crop_pct.*{crop_pct}"):
        eval_transform(view(224, crop_pct=crop_pct))


def test_eval_transform_squeezes_the_whole_image_into_a_large_square():
    image = Image.new("RGB", (600, 400))
    image.paste(
        (255, 255, 255), (0, 0, 30, 400)
    )  # a stripe at the left border, which a centre crop would lose
    output = eval_transform(view(384))(image)
    assert_close(output[:, 192, 0], normalised(Image.new("RGB", (1, 1), "white"))[:, 0, 0])


def test_mixup_is_off_when_all_its_parts_are():
    assert mixing(mixup=0.0) is None
    assert mixing(mixup=0.0, cutmix_minmax=(0.2, 0.8)) is not None


def test_mixup_mixes_each_sample_with_its_mirror_image_and_smooths_targets():
    samples = [(torch.full((3, 2, 2), float(i)), i) for i in range(4)]
    np.random.seed(0)
    images, targets = mixing()(samples)
    np.random.seed(0)
    np.random.rand()  # whether to mix
    kept = np.random.beta(0.8, 0.8)
    assert_close(images[:, 0, 0, 0], torch.tensor([i * kept + (3 - i) * (1 - kept) for i in range(4)]))
    own, mirror = torch.eye(4) * 0.9 + 0.025, torch.eye(4).flip(0) * 0.9 + 0.025
    assert_close(targets, own * kept + mirror * (1 - kept))


def test_cutmix_pastes_a_box_and_weighs_targets_by_its_area():
    samples = [(torch.full((3, 8, 8), float(i)), i) for i in range(2)]
    images, targets = mixing(mixup=0.0, cutmix_minmax=(0.3, 0.8), smoothing=0.0)(samples)
    kept = (images[0, 0] == 0).float().mean()
    assert 0 < kept < 1
    assert_close(targets[0], torch.tensor([kept, 1 - kept, 0, 0]))


def test_collate_survives_pickling():
    samples = [(torch.rand(3, 2, 2), 0), (torch.rand(3, 2, 2), 1)]
    collate = pickle.loads(pickle.dumps(mixing()))
    assert collate(samples)[1].shape == (2, 4)


def test_unknown_mixup_mode_is_refused():
    with pytest.raises(ValueError, match="'half'.*batch, pair, elem"):
        mixing(mixup_mode="half")


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original-mstd0.5", "v0r", "3a"])
def test_posterize_alone_is_ours_and_the_rest_draws_as_timm_does(aa):
    def drawn(transform):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return [transform(noise_image(40, 40)) for _ in range(12)]

    theirs = create_transform(
        40, is_training=True, auto_augment=aa, interpolation="bicubic", mean=MEAN, std=STD
    )
    assert all(
        torch.equal(a, b) for a, b in zip(drawn(trained(40, aa=aa, reprob=0.0)), drawn(theirs), strict=True)
    )


def test_zero_bits_of_a_colour_are_black():
    parts = trained(32, aa="rand-m10-inc1").transforms
    (policy,) = [part for part in parts if isinstance(part, auto_augment.RandAugment)]
    (posterize,) = [operation.aug_fn for operation in policy.ops if operation.name == "PosterizeIncreasing"]
    assert not np.asarray(posterize(noise_image(4, 4), 0)).any()
    assert posterize(noise_image(4, 4), 4) == auto_augment.posterize(noise_image(4, 4), 4)
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize


@pytest.mark.parametrize(
    ("group", "field", "numbers"), [(Transform, "scale", (0.5,)), (Mixing, "cutmix_minmax", (0.1, 0.2, 0.3))]
)
def test_a_range_is_two_numbers(group, field, numbers):
    with pytest.raises(ValueError, match=rf"--{field} \[.*\]: give two numbers"):
        group(**{field: numbers})


def test_a_view_takes_what_is_not_given_from_the_data():
    source = SimpleNamespace(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=48)
    assert View().resolved(source) == View(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    half = View(imagenet_default_mean_and_std=False, input_size=24, std=(0.3,) * 3).resolved(source)
    assert (half.input_size, half.mean, half.std) == (24, (0.5,) * 3, (0.3,) * 3)
    for wrong in ({"mean": (0.5,)}, {"std": (0.1, 0.0, 0.1)}):
        with pytest.raises(
            ValueError, match="--mean .* --std .*: give three numbers each, deviations above 0"
        ):
            View(**wrong).resolved(source)


PUBLISHED = {
    View: {"imagenet_default_mean_and_std": True, "crop_pct": None},
    Transform: {
        "color_jitter": 0.4,
        "aa": "rand-m9-mstd0.5-inc1",
        "train_interpolation": "bicubic",
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
    },
    Mixing: {
        "mixup": 0.8,
        "cutmix": 1.0,
        "cutmix_minmax": None,
        "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5,
        "mixup_mode": "batch",
    },
}
ADDED = {
    View: {"input_size", "mean", "std", "interpolation"},
    Transform: {"scale", "flip", "device_data"},
    Mixing: set(),
}


@pytest.mark.parametrize("group", PUBLISHED)
def test_fields_are_the_published_flags(group):
    """Names and defaults of Dyn-Perceiver's script; `input_size` has the data set's own instead of 224."""
    ours = {field.name: field.default for field in fields(group)}
    assert {name: ours[name] for name in ours if name not in ADDED[group]} == PUBLISHED[group]
    assert ours.keys() == PUBLISHED[group].keys() | ADDED[group]
    assert all(field.metadata["about"] for field in fields(group))
