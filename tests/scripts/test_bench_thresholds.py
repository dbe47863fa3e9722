"""The vectorised quota rule gives what the loop gives."""


def test_both_ways_agree(printed):
    text = printed("bench_thresholds", "--samples", 200, "--exits", 3)
    assert text.endswith("thresholds, accuracies and costs are identical\n")
