import json
from dataclasses import replace

import torch

from adaptive.exit_tables import ExitFigures
from adaptive.front import FrontRow
from adaptive.guarantee import Guarantee
from adaptive.headline import Headline
from adaptive.intervals import Estimate
from adaptive.policy import OperatingPoint, Policy
from adaptive.routing import Routing
from adaptive.thresholds import EVERYBODY
from adaptive.timing import Comparison, Measurement, TimedPoint
from experiment.lines import (
    anytime_lines,
    dynamic_lines,
    front_lines,
    headline_lines,
    routing_lines,
    runtime_lines,
)
from experiment.record import Provenance, Record, describe_machine


def test_anytime_lines_hold_every_exit():
    exits = [
        ExitFigures(0, 6_032_384, 6_032_384, 1.23456, 0.61234, 0.9),
        ExitFigures(1, 12_875_776, 12_800_000, 0.5, 1.0, 1.0),
    ]
    head, *lines = anytime_lines(exits)
    assert head.split() == ["exit", "MACs,", "M", "loss", "top-1", "%", "top-5", "%"]
    assert [line.split() for line in lines] == [
        ["0", "6.03", "1.2346", "61.23", "90.00"],
        ["1", "12.88", "0.5000", "100.00", "100.00"],
    ]


def rows(count):
    return [
        OperatingPoint(Policy((0.5, -1e8), name=f"p = {i}"), i / 100, 1e6 * i, [0.125, 0.875])
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


POINT = TimedPoint(
    point="row 7",
    thresholds=[0.5, -1e8],
    mismatches={"latency": 1, "throughput": 3},
    accuracy=0.715,
    macs=20.5e6,
    shares=[0.5, 0.5],
    speedup=2.346,
    macs_ratio=2.829,
    speedup_over_plain=3.5,
    static_accuracy=0.72,
    speedup_interval=(2.25, 2.4),
    speedup_over_plain_interval=(3.4, 3.75),
)
RUNTIME = Comparison(
    num_images=2000,
    table=[
        Measurement("exit 4 alone", 128, 812.4, 3.25, 4.5, 58e6, 0.72, torch.zeros(9)),
        Measurement("row 7, throughput order", 64, 1905.6, None, None, 20.5e6, 0.715, torch.zeros(9)),
    ],
    points=[POINT],
)


def test_runtime_lines_hold_what_was_measured():
    runtime = RUNTIME
    lines = runtime_lines(runtime)
    assert lines[0] == "measured on 2000 test images"
    assert lines[2].split()[3:] == ["812", "128", "3.25", "4.50", "58.00", "72.00"]
    assert lines[2].startswith("exit 4 alone")
    assert lines[3].split()[4:] == ["1906", "64", "-", "-", "20.50", "71.50"]
    assert lines[4].startswith("row 7: ") and lines[4].endswith("1 (latency), 3 (throughput)")
    assert "2.35x [2.25, 2.40] the images/s of the static network, for 2.83x fewer MACs" in lines[4]
    assert "3.50x [3.40, 3.75] all exits, plain" in lines[4]
    assert len(lines) == 5
    assert len({len(line) for line in lines[1:4]}) == 1  # columns line up


ROUTING = Routing(
    point=OperatingPoint(
        Policy((2.46, -1e8), "energy_softmax", "threshold 2.46"), 0.95, 66e6, [0.728, 0.272]
    ),
    samples=1000,
    deferred=0.272,
    four_way={"right_right": 183, "right_wrong": 14, "wrong_right": 45, "wrong_wrong": 30},
    oracle={"accuracy": 0.966, "macs": 33e6},
    auroc={"max_prob": [0.919]},
    flops=1.3428e8,
)


def test_routing_is_said_in_counts_and_shares():
    router = ROUTING
    text = "\n".join(routing_lines(router))
    assert "95.00 % of 1000 images right at 66.00 M multiply-adds (1.3428 x 10^8 FLOPs" in text
    assert (
        "728 stay at exit 0, 272 (27.20 %) are deferred; of these 45 are corrected, 14 degraded, 183 right and 30 wrong"
        in text
    )
    assert "oracle: 96.60 % at 33.00 M" in text and "0.919" in text


def test_columns_of_the_front_stand_apart_and_below_their_titles():
    policy = Policy((0.5, EVERYBODY))
    rows = [FrontRow(policy, Estimate(0.7025, 0.6575, 0.7475), 5.9e6, [1.0, 0.0], "")]
    rows += [FrontRow(policy, Estimate(1.0, 1.0, 1.0), 123.4e6, [1.0, 0.0], "")]
    title, *lines = front_lines(rows)
    assert lines[0].split()[-5:] == ["70.25", "[65.75,", "74.75]", "100.0", "0.0"]
    assert lines[1].split() == ["123.40", "100.00", "[100.00,", "100.00]", "100.0", "0.0"]
    assert len(lines[0]) == len(lines[1])
    start = title.index("leave at")
    assert [line[start:] for line in lines] == ["100.0   0.0"] * 2


HEADLINE = Headline(
    name="row 7",
    reason="the most accurate of 9 settings within 20 M multiply-adds; all 39 were judged on calib",
    num_images=1000,
    point=replace(
        ROUTING.point, policy=replace(ROUTING.point.policy, accuracy=0.9, macs=19.5e6, shares=(0.75, 0.25))
    ),
    accuracy=Estimate(0.95, 0.94, 0.96),
    macs=Estimate(20e6, 19e6, 21e6),
    static_accuracy=Estimate(0.945, 0.93, 0.955),
    static_macs=60_000_000,
    difference=Estimate(0.005, -0.002, 0.012),
    fewer_macs=Estimate(3.0, 2.857, 3.158),
    fewer_than_all=Estimate(4.0, 3.8, 4.2),
)


def test_nothing_is_expected_of_thresholds_without_calibration_images():
    lines = headline_lines(replace(HEADLINE, calibrated=False))
    assert [line.split()[0] for line in lines[3:5]] == ["test", "static"]


def test_headline_says_why_what_was_expected_and_what_was_gained():
    title, thresholds, _, calib, test, static, gain = headline_lines(HEADLINE)
    assert title == f"row 7 (threshold 2.46): {HEADLINE.reason}"
    assert thresholds == "thresholds 2.46 of energy_softmax"
    assert calib.split() == ["expected", "from", "calib", "90.00", "19.50", "75.0", "25.0"]
    assert test.split() == [
        "test",
        "95.00",
        "[94.00,",
        "96.00]",
        "20.00",
        "[19.00,",
        "21.00]",
        "72.8",
        "27.2",
    ]
    assert static.split() == ["static", "network", "94.50", "[93.00,", "95.50]", "60.00"]
    assert gain.startswith("+0.50 points [-0.20, +1.20] for 3.00x [2.86, 3.16] fewer MACs than the static")
    assert "4.00x [3.80, 4.20] fewer than all exits" in gain


# Files

PROVENANCE = Provenance(
    network="msdnet",
    options={"nBlocks": 2},
    num_classes=10,
    weights="moving average of the weights",
    source="some.pth",
    data_set="DIGITS",
    data_path="folder",
    input_size=32,
    num_test=360,
    calib="143 images",
    confidence="max_prob",
    quota_sweep="msdnet",
    uncounted=[],
    machine="a CPU",
)
EXITS = [ExitFigures(0, 100, 100, 1.5, 0.5, 0.75), ExitFigures(1, 300, 250, 1.25, 0.625, 0.875)]


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_what_is_not_known_yet_is_not_written(tmp_path):
    record = Record(exits=EXITS, provenance=PROVENANCE)
    record.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["anytime.json"]
    assert read(tmp_path, "anytime")[1] == {
        "exit": 1,
        "macs": 300,
        "alone": 250,
        "loss": 1.25,
        "acc1": 0.625,
        "acc5": 0.875,
    }
    policy = Policy((0.5, -1e8), "margin", "p=1", accuracy=0.5, macs=150.0, shares=(0.75, 0.25))
    point = OperatingPoint(policy, 0.625, 200.0, [0.5, 0.5])
    replace(record, points=[point]).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"anytime.json", "dynamic.json", "dynamic.txt"}
    (row,) = read(tmp_path, "dynamic")
    assert list(row.items()) == [
        ("policy", "p=1"),
        ("confidence", "margin"),
        ("num_classes", 10),
        ("thresholds", [0.5, -1e8]),
        ("accuracy", 0.625),
        ("macs", 200.0),
        ("shares", [0.5, 0.5]),
        ("calib_accuracy", 0.5),
        ("calib_macs", 150.0),
    ]
    assert (tmp_path / "dynamic.txt").read_text() == "62.500000\t200.0\n"


def test_figures_that_are_not_finite_are_null(tmp_path):
    Record(exits=[replace(EXITS[0], loss=float("inf"))], provenance=PROVENANCE).save(tmp_path)
    (row,) = read(tmp_path, "anytime")
    assert row["loss"] is None and row["acc1"] == 0.5


def test_the_whole_record_is_written(tmp_path):
    record = Record(
        exits=EXITS,
        points=[ROUTING.point],
        policies=[ROUTING.point.policy, Policy((0.75, -1e8))],
        headlines=[HEADLINE] * 2,
        routing=ROUTING,
        runtime=RUNTIME,
        headline=HEADLINE,
        provenance=PROVENANCE,
    )
    record.save(tmp_path)
    record.report(tmp_path)
    assert Policy.load(tmp_path / "policy.json") == ROUTING.point.policy
    assert Policy.load(tmp_path / "policy-2.json").thresholds == (0.75, -1e8)
    routing, runtime = read(tmp_path, "routing"), read(tmp_path, "runtime")
    assert list(routing)[9:] == ["samples", "routed", "four_way", "oracle", "auroc", "flops"]
    assert routing["policy"] == "threshold 2.46" and routing["routed"] == 0.272
    assert list(runtime) == ["num_images", "table", "points"]
    keys = ["policy", "micro_batch", "images_per_s", "p50_ms", "p95_ms", "macs", "accuracy"]
    assert [list(row) for row in runtime["table"]] == [keys] * 2
    assert runtime["table"][0]["p50_ms"] == 3.25 and runtime["points"][0]["mismatches"]["throughput"] == 3
    assert runtime["points"][0]["speedup_interval"] == [2.25, 2.4] and "seconds" not in runtime["table"][0]
    whole = read(tmp_path, "record")
    assert whole["headline"]["fewer_macs"] == {"value": 3.0, "low": 2.857, "high": 3.158}
    assert whole["headlines"] == [whole["headline"]] * 2
    assert whole["headline"]["reason"] == HEADLINE.reason and whole["headline"]["name"] == "row 7"
    assert whole["routing"] == routing and whole["runtime"] == runtime
    assert whole["provenance"]["source"] == "some.pth" and len(whole["anytime"]) == 2
    page = (tmp_path / "report.html").read_text()
    assert "<h1>msdnet on DIGITS</h1>" in page and "2 exits, 360 test images" in page
    assert "moving average of the weights in some.pth" in page and "uncounted: none" in page
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_machine_is_described():
    text = describe_machine(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in text and not text.startswith(
        ","
    )


def test_a_guarantee_is_said_once_also_of_a_policy_from_a_file():
    given = Guarantee("drop", 0.1, 0.05, "ltt", True, 9, 0, 0.01, 0.02, "It holds.", "No more.", "Of these.")
    point = replace(HEADLINE.point, policy=replace(HEADLINE.point.policy, guarantee=given))
    told = [
        headline_lines(replace(HEADLINE, point=point, reason=reason))[2:5]
        for reason in ("read from p.json", "It holds. No more.")
    ]
    assert told[0] == ["It holds.", "No more.", "Of these."] and told[1][0] == "Of these."


def test_long_names_leave_the_columns_of_timings_below_their_titles():
    long = "guaranteed disagreement 30 %, throughput order"
    named = replace(RUNTIME, table=[replace(row, contestant=long) for row in RUNTIME.table] + RUNTIME.table)
    rows = runtime_lines(named)[1 : 2 + len(named.table)]
    assert len({len(row) for row in rows}) == 1
