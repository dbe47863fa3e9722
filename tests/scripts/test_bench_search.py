"""The search is timed, and judged on samples that it has not seen."""


def test_it_is_timed_and_beats_the_quota_rule(printed):
    text = printed("bench_search", "--samples", 600, "--exits", 3, "--rounds", 1, "--unseen", 20_000)
    (title, heads, row), samples = text.splitlines(), 600
    assert title.startswith("K = 3, 1 rounds") and heads.startswith("samples")
    figures = row.split()
    assert int(figures[0]) == samples and float(figures[1]) <= float(figures[2])
    assert float(figures[4]) > 0.2
