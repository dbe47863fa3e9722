"""The benchmark of features in files prints a row for each network."""

import pytest

WORDS = ["--batch_size", "4", "--head_width", "8", "--num_workers", "0", "--device", "cpu"]
SHORT = ["--images", "8", "--rounds", "1", "--networks"]


def test_a_row_for_every_network(printed):
    text = printed(
        "bench_features", *WORDS, *SHORT, "timm_ee:test_resnet:32", "vit_ee:test_vit:32", "--exits", "2"
    )
    assert "an epoch of 8 images of DIGITS, 1 rounds" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == [
        "timm_ee:test_resnet:32",
        "vit_ee:test_vit:32",
    ]


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18::32", "vit_ee:test_vit:large"])
def test_a_strange_name_is_refused(script, name):
    with pytest.raises(ValueError, match="accepted: MODEL:BACKBONE:PIXELS"):
        script("bench_features").main([*WORDS, *SHORT, name])
