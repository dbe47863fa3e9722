"""The comparison with a packaged rival runs the same network on both sides."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("earlyon")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six random JPEG files."""
    path, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path / f"{i}.JPEG")
    return path


def test_both_give_the_same_exits_and_classes(printed, folder):
    words = ["--images", 6, "--input_size", 32, "--shares", 34, 34, "--runners", "openvino fp32"]
    lines = printed("compare_earlyon", folder, *words).splitlines()
    assert lines[1].endswith("leaving at each exit: [2, 2, 2]")
    rows = [[cell.strip() for cell in line.split("   ") if cell] for line in lines[3:]]
    assert [row[0] for row in rows[2:]] == ["PyTorch", "PyTorch, tuned", "openvino fp32"]
    assert {row[3] for row in rows} == {row[5] for row in rows[2:]} == {"0, 0"}
    assert rows[0][5].startswith("4, ")  # a batch leaves as a whole


def test_more_images_than_there_are(printed, folder):
    with pytest.raises(ValueError, match=r"^--images 7: .* has 6 files \*\.JPEG$"):
        printed("compare_earlyon", folder, "--images", 7)
