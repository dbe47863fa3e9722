"""Files of plain types: they come back as they were, and whatever is damaged is refused in one line."""

import json
import random
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from adaptive.guarantee import Guarantee
from adaptive.plain import read_plain, write_plain
from adaptive.policy import Made, Policy


@dataclass(frozen=True)
class Inner:
    words: tuple[str, ...] = ()
    count: int = 0
    right: bool = False
    method: Literal["ltt", "crc"] = "ltt"


@dataclass(frozen=True)
class Outer:
    numbers: tuple[float, ...]
    inner: Inner | None = None
    least: float | None = None


WHOLE = Outer((0.1 + 0.2, 1.0), Inner(("a", "ü"), 3, True, "crc"), 2.5)


def refusal(path, text, kind: Any = Outer):
    """The line with which the text is refused; None if it is read."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        read_plain(path, kind, (1, 2), "thing")
    except ValueError as error:
        line = str(error)
        assert line.startswith(f"{path} is no thing that can be read: ") and "\n" not in line
        assert type(error).__name__ == "UserError" and len(line) < 300 + len(str(path))
        assert line.isprintable()
        return line.partition("read: ")[2]
    return None


@pytest.mark.parametrize("value", [WHOLE, Outer((1.0,)), Outer((), Inner())])
def test_values_come_back_and_equal_values_give_equal_files(tmp_path, value):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_plain(first, value, 2)
    found = read_plain(first, Outer, (1, 2), "thing")
    assert found == value and all(type(one) is float for one in found.numbers)
    write_plain(second, found, 2)
    assert first.read_bytes() == second.read_bytes()
    assert ("least" in json.loads(first.read_text())) == (value.least is not None)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", "it has no schema"),
        ('{"schema": true}', "its schema is True, accepted: 1, 2"),
        ('{"schema": [1]}', "its schema is [1], accepted: 1, 2"),
        ('{"schema": 1}', "it has no numbers"),
        ('{"schema": 1, "numbers": 0.5}', "numbers is 0.5; accepted: a list"),
        ('{"schema": 1, "numbers": {"a": 1}}', "numbers is {'a': 1}; accepted: a list"),
        ('{"schema": 1, "numbers": [0, "1"]}', "numbers[1] is '1'; accepted: a finite number"),
        ('{"schema": 1, "numbers": [true]}', "numbers[0] is True; accepted: a finite number"),
        ('{"schema": 1, "numbers": [null]}', "numbers[0] is None; accepted: a finite number"),
        ('{"schema": 1, "numbers": [[0.5]]}', "numbers[0] is [0.5]; accepted: a finite number"),
        ('{"schema": 1, "numbers": [NaN]}', "numbers[0] is nan; accepted: a finite number"),
        ('{"schema": 1, "numbers": [1e999]}', "numbers[0] is inf; accepted: a finite number"),
        ('{"schema": 1, "numbers": [], "least": -Infinity}', "least is -inf; accepted: a finite number"),
        ('{"schema": 1, "numbers": [], "inner": 5}', "inner is 5; accepted: an object"),
        ('{"schema": 1, "numbers": [], "inner": {"b": 5}}', "unknown entry 'inner.b'"),
        ('{"schema": 1, "numbers": [], "a\\nb": 5}', "unknown entry 'a\\nb'"),
        ('{"schema": 1, "numbers": [], "inner": {"count": 1.0}}', "inner.count is 1.0; accepted: a whole"),
        ('{"schema": 1, "numbers": [], "inner": {"right": 1}}', "inner.right is 1; accepted: true or false"),
        ('{"schema": 1, "numbers": [], "inner": {"words": "ab"}}', "inner.words is 'ab'; accepted: a list"),
        ('{"schema": 1, "numbers": [], "inner": {"words": ["\\ud800"]}}', "inner.words[0] is '\\ud800'"),
        ('{"schema": 1, "numbers": [], "inner": {"method": ["ltt"]}}', "inner.method is ['ltt']; accepted"),
        ('{"schema": 1, "numbers": [], "inner": {"method": "x"}}', "inner.method is 'x'; accepted: ltt, crc"),
    ],
)
def test_the_entry_at_fault_is_named(tmp_path, content, line):
    assert (refusal(tmp_path / "f.json", content) or "").startswith(line)


def test_numbers_without_end_and_nests_without_end_are_refused(tmp_path):
    path, start = tmp_path / "f.json", '{"schema": 1, "numbers": '
    assert "numbers[0] is 1000" in refusal(path, start + "[1" + 400 * "0" + "]}")
    assert refusal(path, start + "[1" + 9000 * "0" + "]}")  # more digits than Python reads
    assert refusal(path, start + 100_000 * "[")
    assert refusal(path, b"\xff\xfe\x00") and refusal(path, "")
    assert "No such file" in str(
        pytest.raises(ValueError, read_plain, tmp_path / "g", Outer, (1,), "p").value
    )
    assert pytest.raises(ValueError, read_plain, tmp_path, Outer, (1,), "p")


POLICY = Policy(
    (0.5, 1e8, -1e8),
    "energy_logits:2",
    "p=1",
    temperatures=(1.0, 2.5, 0.5),
    off=(1,),
    accuracy=0.75,
    macs=12.5,
    shares=(0.5, 0.0, 0.5),
    model_hash="ab",
    made=Made("python a.py 'b c'", "CIFAR10", "held out", 500, "CPU", "abc", ("torch 2", "python 3")),
    guarantee=Guarantee(
        "drop", 0.01, 0.05, "ltt", True, 500, 0.0, None, 0.006, "At most 1 %", "0.6 %", "Alike"
    ),
)


def test_a_policy_with_all_that_it_may_hold_comes_back(tmp_path):
    POLICY.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == POLICY


def test_every_truncated_policy_is_refused(tmp_path):
    POLICY.save(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    for end in range(0, len(text.rstrip()), 7):
        assert refusal(tmp_path / "f.json", text[:end], Policy)


def places(content, path=()):
    """The path of every value in a nest."""
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in parts:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


STRANGE = [None, True, -1, 1.5, float("nan"), float("inf"), 10**400, "", "\ud800", "x" * 99, [], [[]], {}]
STRANGE += [{"x": 1}, [1e308, -1e308, "a"], -(10**30)]


def test_no_damage_is_a_traceback(tmp_path):
    """Every entry of a whole file is replaced by every strange value, dropped, and joined by another."""
    POLICY.save(tmp_path / "policy.json")
    whole, draw = json.loads((tmp_path / "policy.json").read_text()), random.Random(0)
    refused = 0
    for place in list(places(whole)):
        for strange in draw.sample(STRANGE, 5):
            content = json.loads(json.dumps(whole))
            part = content
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = strange
            refused += refusal(tmp_path / "f.json", json.dumps(content), Policy) is not None
        if isinstance(part, dict):
            part["other"] = part.pop(place[-1])
            line = refusal(tmp_path / "f.json", json.dumps(content), Policy)
            assert "other" in line or place == ("schema",)
    assert refused > 150


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"accuracy": 75}, "accuracy 75: accepted: from 0 to 1"),
        ({"macs": -1}, "macs -1: accepted: 0 and more"),
        ({"shares": [0.5]}, "1 shares for 3 exits; give one per exit"),
        ({"shares": [0.5, 0, -0.5]}, "share -0.5: accepted: from 0 to 1"),
        ({"off": [0]}, "exit 0 is off; accepted"),
        ({"answer": "last"}, "unknown answer 'last'"),
    ],
)
def test_figures_that_cannot_be_are_refused(tmp_path, entry, line):
    POLICY.save(tmp_path / "policy.json")
    content = json.loads((tmp_path / "policy.json").read_text()) | entry
    assert refusal(tmp_path / "f.json", json.dumps(content), Policy).startswith(line)
