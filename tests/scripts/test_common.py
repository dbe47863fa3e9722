"""Flags are the fields of a dataclass, and tables are aligned."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common import (
    check_policy_alone,
    largest_difference,
    network_options,
    policy_for,
    print_table,
    read_flags,
    read_known,
    timed,
    word,
)

import pytest
import torch

from adaptive.policy import Policy
from utils import option


@dataclass(frozen=True)
class Flags:
    """Every kind of flag."""

    source: Path = word("a file")
    others: tuple[str, ...] = word("more files")
    rounds: int = option(5, "how often", low=1)
    shares: tuple[float, ...] = option((0.5,), "some numbers")
    quick: bool = option(False, "no time")
    batch_size: int | None = option(None)


@dataclass(frozen=True)
class Model:
    """A network."""

    model: str = option("msdnet")


def test_flags_are_fields():
    assert read_flags(Flags, ["a", "b", "c"], "") == Flags(Path("a"), ("b", "c"))
    words = ["a", "b", "--rounds", "2", "--shares", "0.25", "0.75", "--quick", "--batch-size=4"]
    assert read_flags(Flags, words, "") == Flags(Path("a"), ("b",), 2, (0.25, 0.75), True, 4)
    assert not read_flags(Flags, ["a", "b", "--quick", "false"], "").quick


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "required: others"),
        (["a", "b", "--round", "2"], "unknown flag --round; did you mean --rounds"),
        (["a", "b", "--rounds", "0"], "--rounds: 0 is below the least value accepted, 1"),
    ],
)
def test_wrong_words_are_one_line(words, message):
    with pytest.raises(ValueError, match=message):
        read_flags(Flags, words, "")


def test_other_words_are_options_of_a_network():
    flags, rest = read_known(Flags, ["a", "b", "--nBlocks", "2", "--rounds", "3"], "")
    assert flags.rounds == 3
    assert network_options(Model, "msdnet", rest) == {"nBlocks": 2}
    with pytest.raises(ValueError, match="unknown flag --nBlock; did you mean --nBlocks"):
        network_options(Model, "msdnet", ["--nBlock", "2"])
    with pytest.raises(ValueError, match="unknown flag --modle; did you mean --model"):
        network_options(Model, "msdnet", ["--modle", "2"])


def test_help_shows_the_command(capsys):
    with pytest.raises(SystemExit):
        read_flags(Flags, ["--help"], "Does this.\n\n    python that.py")
    text = capsys.readouterr().out
    assert "Does this.\n\n    python that.py" in text and "a file" in text and "default: 5" in text


def test_tables_are_aligned(capsys):
    print_table(["name", "ms:.1f", "n"], [("a", 1.25, 3), ("longer", 10.0, "-")])
    assert capsys.readouterr().out == "name       ms   n\na         1.2   3\nlonger   10.0   -\n"


def test_differences_and_times():
    assert largest_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, -4.0])) == 7 / 4
    found, seconds = timed(lambda: 3)
    assert found == 3 and seconds >= 0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"confidence": "margin"}, "--policy p.json and --confidence margin: give one of them"),
        ({"threshold": 0.0}, "--policy p.json and --threshold 0.0: give one of them"),
    ],
)
def test_a_policy_is_not_given_beside_what_it_replaces(given, line):
    free = {"confidence": "", "threshold": None}
    check_policy_alone(SimpleNamespace(**free, policy="p.json"), *free)
    check_policy_alone(SimpleNamespace(**free | given, policy=""), *free)
    with pytest.raises(ValueError) as error:
        check_policy_alone(SimpleNamespace(**free | given, policy="p.json"), *free)
    assert str(error.value) == line


def test_a_policy_is_read_for_its_network(tmp_path):
    path, network = str(tmp_path / "p.json"), SimpleNamespace(num_exits=2)
    assert policy_for("", network) is None
    Policy((0.5, -1e8)).save(path)
    assert policy_for(path, network) == Policy((0.5, -1e8))
    with pytest.raises(ValueError, match="is for 2 exits, the network has 3"):
        policy_for(path, SimpleNamespace(num_exits=3))
