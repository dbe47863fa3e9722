"""Image files are prepared without PyTorch as they are with it; files that are none are refused."""

import io

import numpy as np
import pytest
from PIL import Image

from deploy.decide import RunnerError
from deploy.pictures import check_file, prepared
from loading.pixels import to_rgb
from loading.transforms import View, eval_transform

VIEW = {"size": 2, "resize": 0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25, 0.5, 1]}
PICTURES = {
    "colour": Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)),
    "grey16": Image.fromarray(np.random.default_rng(1).integers(0, 65_536, (300, 250), np.uint16)),
    "grey32": Image.fromarray(np.random.default_rng(1).integers(0, 65_536, (33, 32), np.int32)),
    "tiny": Image.new("RGB", (1, 1), (9, 99, 199)),
    "narrow": Image.fromarray(np.random.default_rng(2).integers(0, 256, (3, 200, 3), np.uint8)),
    "square": Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)),
}
PICTURES["palette"] = PICTURES["colour"].quantize(16)
PICTURES["alpha"] = Image.fromarray(np.random.default_rng(4).integers(0, 256, (50, 30, 4), np.uint8), "RGBA")
PICTURES["ink"] = PICTURES["colour"].convert("CMYK")
PICTURES["bits"] = PICTURES["colour"].convert("1")
PICTURES["large"] = PICTURES["colour"].resize((400, 261))
VIEWS = {
    (32, "bicubic"): 0,
    (224, "bilinear"): 256,
    (48, "bicubic"): 48,  # no crop: --crop_pct 1
    (384, "bicubic"): 0,
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("sight", VIEWS, ids=str)
def test_images_are_prepared_as_in_pytorch(sight, picture):
    size, interpolation = sight
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    resize = VIEWS[sight]
    view = View(size, mean, std, crop_pct=1.0 if resize == size else None, interpolation=interpolation)
    theirs = eval_transform(view)(to_rgb(PICTURES[picture])).numpy()
    ours = prepared(PICTURES[picture], {"size": size, "resize": resize, "interpolation": interpolation, "mean": mean, "std": std})  # fmt: skip
    assert ours.dtype == np.float32 and ours.flags["C_CONTIGUOUS"]
    np.testing.assert_array_max_ulp(ours, theirs, 1)


def test_files_are_read_like_pictures_and_not_turned(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    PICTURES["colour"].save(tmp_path / "a.png", exif=turned)
    with open(tmp_path / "a.png", "rb") as file:
        both = prepared(tmp_path / "a.png", VIEW), prepared(io.BytesIO(file.read()), VIEW)
    for one in both:
        np.testing.assert_array_equal(one, prepared(PICTURES["colour"], VIEW))


@pytest.mark.parametrize("cut", [0, 5, 60, 200])
def test_unreadable_images_are_refused(cut, tmp_path):
    path = tmp_path / "a.png"
    PICTURES["colour"].save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RunnerError, match=r"a\.png is no image that can be read: .*") as error:
        prepared(path, VIEW)
    assert len(str(error.value).splitlines()) == 1
    if cut < 20:
        with pytest.raises(RunnerError):
            check_file(path)


def test_images_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for size, view in (((101, 100), VIEW), ((1, 500), {**VIEW, "size": 16, "resize": 18})):
        with pytest.raises(RunnerError, match="pixels; accepted: at most 10000 in all"):
            prepared(Image.new("L", size), view)
    with pytest.raises(RunnerError, match="accepted: 0 to 65535"):
        prepared(Image.fromarray(np.full((3, 3), 70_000, np.int32)), VIEW)
