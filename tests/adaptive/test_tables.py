from adaptive.tables import anytime_lines, dynamic_lines, routing_lines, runtime_lines


def test_anytime_lines_hold_every_exit():
    exits = [
        {"exit": 0, "macs": 6_032_384, "loss": 1.23456, "acc1": 0.61234, "acc5": 0.9},
        {"exit": 1, "macs": 12_875_776, "loss": 0.5, "acc1": 1.0, "acc5": 1.0},
    ]
    head, *lines = anytime_lines(exits)
    assert head.split() == ["exit", "MACs,", "M", "loss", "top-1", "%", "top-5", "%"]
    assert [line.split() for line in lines] == [
        ["0", "6.03", "1.2346", "61.23", "90.00"],
        ["1", "12.88", "0.5000", "100.00", "100.00"],
    ]


def rows(count):
    return [
        {"policy": f"p = {i}", "macs": 1e6 * i, "accuracy": i / 100, "shares": [0.125, 0.875]}
        for i in range(count)
    ]


def test_dynamic_lines_hold_the_numbers_of_a_row():
    lines = dynamic_lines(rows(3))
    assert len(lines) == 1 + 3
    assert lines[3].split() == ["2", "p", "=", "2", "2.00", "2.00", "12.5", "87.5"]


def test_dynamic_lines_of_a_long_sweep_are_a_few_spread_over_it():
    shown = [int(line.split()[0]) for line in dynamic_lines(rows(39))[1:]]
    assert shown == list(range(0, 39, 4))
    assert dynamic_lines([]) == dynamic_lines(rows(1))[:1]


def test_runtime_lines_hold_the_measured_policies():
    waiting = {"micro_batch": 64, "p50_ms": None, "p95_ms": None, "macs": 20.5e6, "accuracy": 0.715}
    single = {"micro_batch": 128, "p50_ms": 3.25, "p95_ms": 4.5, "macs": 58e6, "accuracy": 0.72}
    point = {"point": "row 7", "speedup": 2.346, "macs_ratio": 2.829, "speedup_over_plain": 3.5}
    runtime = {
        "num_images": 2000,
        "points": [{**point, "mismatches": {"latency": 1, "throughput": 3}}],
        "table": [
            {"policy": "exit 4 alone", "images_per_s": 812.4, **single},
            {"policy": "row 7, throughput order", "images_per_s": 1905.6, **waiting},
        ],
    }
    lines = runtime_lines(runtime)
    assert lines[0] == "measured on 2000 test images"
    assert lines[2].split()[3:] == ["812", "128", "3.25", "4.50", "58.00", "72.00"]
    assert lines[2].startswith("exit 4 alone")
    assert lines[3].split()[4:] == ["1906", "64", "-", "-", "20.50", "71.50"]
    assert lines[4].startswith("row 7: ") and lines[4].endswith("1 (latency), 3 (throughput)")
    assert all(number in lines[4] for number in ("2.35x", "2.83x", "3.50x"))
    assert len(lines) == 5
    assert len({len(line) for line in lines[1:4]}) == 1  # columns line up


def test_routing_is_told_in_counts_and_shares():
    router = {
        "policy": "threshold 2.46",
        "confidence": "energy_softmax",
        "accuracy": 0.95,
        "macs": 66e6,
        "flops": 1.3428e8,
        "samples": 1000,
        "routed": 0.272,
        "four_way": {"right_right": 183, "right_wrong": 14, "wrong_right": 45, "wrong_wrong": 30},
        "oracle": {"accuracy": 0.966, "macs": 33e6},
        "auroc": {"max_prob": [0.919]},
    }
    text = "\n".join(routing_lines(router))
    assert "95.00 % of 1000 images right at 66.00 M multiply-adds (1.3428 x 10^8 FLOPs" in text
    assert (
        "728 stay at exit 0, 272 (27.20 %) go on; of these 45 are mended, 14 spoilt, 183 right and 30 wrong"
        in text
    )
    assert "oracle: 96.60 % at 33.00 M" in text and "0.919" in text
