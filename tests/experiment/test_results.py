"""Records as data."""

import json
import math

import pytest

from experiment.results import Point, Result, Spread, by_setting, read_results, regime_of


def record(seed=0, front=((1e6, 0.5, 0.5), (4e6, 0.75, 0.75), (8e6, 0.875, 0.8)), **training):
    about = {"network": "msdnet", "options": {}, "data_set": "DIGITS", "num_test": 8}
    return {
        "schema": 2,
        "provenance": {**about, "input_size": 32, "confidence": "max_prob"},
        "origin": {
            "training": {"seed": seed, "output_dir": f"runs/{seed}", **training},
            "made": {"commit": "abcdef0", "machine": "a CPU"},
            "model": f"{seed:08x}",
            "test": "0a7a339b",
            "files": {"train.npz": "37b57ea9"},
        },
        "anytime": [{"macs": 1e6, "acc1": 0.25}, {"macs": 8e6, "acc1": 0.875}],
        "front": [
            {"macs": macs, "accuracy": {"value": accuracy}, "policy": {"accuracy": expected}}
            for macs, accuracy, expected in front
        ],
    }


def test_an_evaluation_is_a_result(evaluated, tmp_path):
    (tmp_path / "mine.json").write_text((evaluated / "record.json").read_text())
    (one,) = read_results(tmp_path)
    content = json.loads((evaluated / "anytime.json").read_text())
    assert (one.name, one.about.network, one.regime, one.about.num_test) == ("mine", "msdnet", "joint", 20)
    assert [point.accuracy for point in one.exits] == [row["acc1"] for row in content]
    assert one.at(math.inf) == (one.front or one.exits)[-1].accuracy and math.isnan(one.at(1.0))


def test_seeds_are_of_one_setting_and_other_flags_are_not():
    results = [Result.of("a", record(0)), Result.of("b", record(1)), Result.of("c", record(0, l2w=True))]
    assert [[one.name for one in group] for group in by_setting(results).values()] == [["a", "b"], ["c"]]
    assert [one.regime for one in results] == ["joint", "joint", "L2W"]


def test_data_are_the_same_by_their_hashes():
    """Wherever the files are and whatever their names."""
    renamed, other, others = (record(seed, data_path=f"{seed}.npz") for seed in (1, 2, 3))
    renamed["origin"]["files"] = {"1.npz": "37b57ea9"}
    other["origin"]["files"] = {"train.npz": "33d2e294"}
    others["origin"]["test"] = "074b123e"
    results = [Result.of(str(i), one) for i, one in enumerate([record(), renamed, other, others])]
    assert [[one.name for one in group] for group in by_setting(results).values()] == [
        ["0", "1"],
        ["2"],
        ["3"],
    ]


def test_a_cascade_is_of_the_setting_of_its_networks():
    """The seeds of two networks make one setting; networks trained in another way make another."""
    members = [{"seed": 0, "epochs": 2}, {"seed": 0, "epochs": 3}]
    others = [one | {"seed": 1} for one in members]
    results = [Result.of("a", record(0, members=members)), Result.of("b", record(1, members=others))]
    results.append(Result.of("c", record(2, members=[others[0], others[1] | {"with_kd": True}])))
    assert [[one.name for one in group] for group in by_setting(results).values()] == [["a", "b"], ["c"]]
    content = record()
    content["provenance"]["options"] = {"networks": []}
    assert (results[0].regime, Result.of("d", content).regime) == ("joint", "cascade")
    with pytest.raises(ValueError, match=r"^origin\.training\.members: Input should be a valid list, not 3$"):
        Result.of("a", record(members=3))


def test_area_is_the_mean_over_log_cost():
    one = Result.of("a", record())
    assert one.exits[1] == Point(8e6, 0.875, 1) and one.at(5e6) == 0.75
    assert one.area(1e6, 8e6) == pytest.approx((2 * 0.5 + 0.75) / 3)  # doubled three times
    assert one.area(1e6, 16e6) == pytest.approx((2 * 0.5 + 0.75 + 0.875) / 4)


def test_what_is_chosen_within_a_budget_knows_nothing_of_the_test_images():
    front = ((1e6, 0.75, 0.5), (2e6, 0.5, 0.6), (3e6, 0.875, 0.55))
    one = Result.of("a", record(front=front))
    assert [one.at(budget) for budget in (1e6, 2e6, 3e6, 9e6)] == [0.75, 0.5, 0.5, 0.5]
    assert Result.of("a", record(front=front[1:])).at(1e6) == 0.25
    without = Result.of("a", record(front=()))
    assert [without.at(budget) for budget in (1e6, 7e6, 8e6)] == [0.25, 0.25, 0.875]


@pytest.mark.parametrize(
    ("network", "exits", "training", "name"),
    [
        ("ranet", 4, {}, "joint"),
        ("cifar_resnet", 1, {}, "single exit"),
        ("cifar_resnet", 1, {"kd_teacher": "a.pth"}, "teacher"),
        ("boosted/msdnet", 5, {"with_kd": True}, "boosted + self-KD"),
        ("msdnet", 5, {"l2w": True, "with_kd": True}, "L2W + self-KD"),
        ("msdnet", 5, {"l2w": True, "meta_interval": 3}, "L2W, 1 step in 3"),
        ("msdnet", 5, {"regime": "equilibrium"}, "equilibrium"),
    ],
)
def test_the_regime_is_read_from_flags(network, exits, training, name):
    assert regime_of({"network": network, "options": {}}, exits, training) == name


def test_what_is_no_record_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.json"
    for content, said in (
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ("{}" + " " * 100_000, "100,002 bytes"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=said) as raised:
            read_results(tmp_path)
        assert str(raised.value).startswith(f"{path} is no record of an evaluation: ")
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"^it is called 'a\|b', accepted: letters, digits and "):
        Result.of("a|b", record())
    path.unlink(), path.mkdir()
    with pytest.raises(ValueError, match=r"x\.json is no record of an evaluation: .*[Dd]irectory"):
        read_results(tmp_path)


def test_weights_count_once_in_a_setting(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(record()))
    with pytest.raises(
        ValueError, match=r"b.json is a.json again: setting, weights and machine .* \(seed 0\)"
    ):
        read_results(tmp_path)
    other = record()
    other["origin"]["made"]["machine"] = "a GPU"
    (tmp_path / "b.json").write_text(json.dumps(other))
    results = read_results(tmp_path)
    assert len(results) == 2 and [len(group) for group in by_setting(results).values()] == [1]
    (tmp_path / "b.json").write_text(json.dumps(record(1) | {"anytime": [{"macs": 1, "acc1": 0.5}]}))
    with pytest.raises(
        ValueError, match=r"b.json: exits cost \[1.0\], in a.json of its setting \[1000000.0, "
    ):
        read_results(tmp_path)


def test_published_points_are_no_records(tmp_path):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "x.json").write_text("{}")
    assert read_results(tmp_path) == []


def test_spreads():
    assert Spread.of([0.5]).text(100) == "50.00 (n = 1)"
    assert Spread.of([0.8, 0.82]).text(100, 1) == "81.0 ± 1.4 (n = 2)"
