"""The benchmark of loaders prints a row for each loader, the step, and both together."""

import pytest

WORDS = [
    *("--model", "cifar_resnet", "--depth", "8", "--batch_size", "4", "--num_calib", "8", "--device", "cpu"),
    *("--mixup", "0", "--cutmix", "0", "--aa", "none", "--color_jitter", "0", "--reprob", "0"),
    *("--batches", "1", "--rounds", "1", "--workers", "0"),
]


@pytest.mark.parametrize(
    ("words", "names"), [([], ["0 processes"]), (["--device_data", "true"], ["0 processes", "on the device"])]
)
def test_a_row_for_every_loader_and_the_step(printed, words, names):
    text = printed("bench_loader", *WORDS, *words)
    rows = [f"loader alone, {name}" for name in names] + ["step alone"] + [f"both, {name}" for name in names]
    assert "cifar_resnet, DIGITS, batch 4, 32 pixels" in text
    assert [line.split("   ")[0].strip() for line in text.splitlines()[-len(rows) :]] == rows


def test_an_epoch_that_is_too_short_is_refused(script):
    with pytest.raises(ValueError, match=r"--batches 500: an epoch has \d+, one more is needed"):
        script("bench_loader").main([*WORDS, "--batches", "500"])
