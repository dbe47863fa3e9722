"""What a record must hold to be read."""

import json

import pytest

from experiment.layout import read_record
from experiment.record import SCHEMA


@pytest.fixture(scope="module")
def text(evaluated):
    """A record, with a front of one policy."""
    accuracy = {"value": 0.5, "low": 0.4, "high": 0.6}
    front = [{"macs": 1e6, "accuracy": accuracy, "policy": {"accuracy": 0.5}}]
    return json.dumps(json.loads((evaluated / "record.json").read_text()) | {"front": front})


def test_what_is_written_can_be_read(text):
    record = read_record(json.loads(text))
    assert (
        record.layout == SCHEMA and record.provenance.network == "msdnet" and record.front and record.runtime
    )


def put(content, place, value):
    """Sets what stands at a place: "anytime.0.acc1"; removes it where the value is `put`."""
    *parts, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    for part in parts:
        content = content[part]
    if value is put:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("schema", 1, "schema: Input should be 2, not 1"),
        ("schema", put, "it has no schema"),
        ("origin", None, "origin: Input should be a valid dictionary .*, not None"),
        ("origin.model", put, "it has no origin.model"),
        ("origin.made.commit", "HEAD", "origin.made.commit: .* not 'HEAD'"),
        ("origin.training.seed", "0", "origin.training.seed: .* valid integer, not '0'"),
        ("origin.training.regime", "a | b", "origin.training.regime: .* not 'a | b'"),
        ("anytime", [], "anytime: .* at least 1 item .* not \\[\\]"),
        ("anytime.0.acc1", put, "it has no anytime.0.acc1"),
        ("anytime.0.acc1", 87.5, "anytime.0.acc1: .* less than or equal to 1, not 87.5"),
        ("anytime.0.acc1", True, "anytime.0.acc1: .* valid number, not True"),
        ("anytime.0.acc1", float("nan"), "anytime.0.acc1: .* finite number, not nan"),
        ("anytime.1.macs", 0, "anytime.1.macs: .* greater than 0, not 0"),
        ("anytime.0.macs", 1e12, "anytime: a later exit must cost more than an earlier one, not "),
        ("front.0.accuracy.value", -1, "front.0.accuracy.value: .* greater than or equal to 0, not -1"),
        ("runtime.table.0.images_per_s", "9", "runtime.table.0.images_per_s: .* valid number, not '9'"),
        ("provenance.num_test", 0, "provenance.num_test: .* greater than or equal to 1, not 0"),
        ("provenance.network", "<script>" * 9, "provenance.network: .* not '<script>.*[.]{3}$"),
        ("provenance.source", "/home/me/x.pth", "provenance.source: /home/me/x.pth is a path of a machine; "),
    ],
)
def test_a_wrong_field_is_named_in_one_line(text, place, value, said):
    content = json.loads(text)
    put(content, place, value)
    with pytest.raises(ValueError, match=f"^{said}") as raised:
        read_record(content)
    assert "\n" not in str(raised.value)


def test_what_is_no_table_is_refused():
    with pytest.raises(ValueError, match="^the whole: .* not \\[1\\]"):
        read_record([1])
