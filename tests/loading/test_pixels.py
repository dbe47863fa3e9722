import numpy as np
import pytest
from PIL import Image

from loading.pixels import UNREADABLE, read_image, to_rgb

RAMP = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)  # 257 times 0, 1 ... 255


@pytest.mark.parametrize(("kind", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_greys_of_16_bits_are_scaled(kind, dtype):
    image = Image.frombytes(kind, (16, 16), RAMP.astype(dtype).tobytes())
    rgb = to_rgb(image)
    assert image.mode == kind and rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb), np.arange(256).reshape(16, 16, 1).repeat(3, 2))


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_files_of_16_bits_are_scaled(tmp_path, ending):
    if ending == "pgm":  # which not all versions of Pillow write
        (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP).save(tmp_path / f"a.{ending}")
    rgb = np.asarray(read_image(str(tmp_path / f"a.{ending}")))
    assert np.array_equal(rgb[..., 1].ravel(), np.arange(256))


@pytest.mark.parametrize("grey", [-1, 65_536])
def test_greys_of_more_than_16_bits_are_refused(grey):
    image = Image.fromarray(np.array([[0, grey]], np.int32))
    with pytest.raises(
        ValueError, match=f"its greys go from {min(0, grey)} to {max(0, grey)}; accepted: 0 to 65535"
    ):
        to_rgb(image)


def test_other_modes_are_converted_as_by_pil():
    colours = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 4), dtype=np.uint8), "RGBA")
    for image in (
        colours,
        colours.convert("P"),
        colours.convert("L"),
        colours.convert("1"),
        colours.convert("LA"),
    ):
        assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_the_first_frame_of_a_film_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "a.gif"))), np.asarray(frames[0]))


@pytest.mark.parametrize("size", [(20, 10), (30, 10)])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, size, recwarn):
    """PIL itself only warns up to twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120)
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(
        UNREADABLE, match="20 x 10 pixels; accepted: at most 120|300 pixels. exceeds limit of 240"
    ):
        read_image(str(tmp_path / "a.png"))


def test_a_file_of_no_image_format_is_said_in_plain_words(tmp_path):
    (tmp_path / "a.png").write_text("nonsense")
    with pytest.raises(ValueError, match="^what it holds is of no image format known here$"):
        read_image(str(tmp_path / "a.png"))
