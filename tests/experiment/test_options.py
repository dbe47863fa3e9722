import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from experiment.options import Option, fill, options_of, options_of_signature, plain, restore
from experiment.options import parse as parse_words
from utils import option


@dataclass(frozen=True)
class Model:
    """model"""

    model: str = option("", "the network")


@dataclass(frozen=True)
class Other:
    """Other things."""

    lr: float = option(0.1, "rate", low=0)
    batch_size: int = option(64, low=1)
    use_amp: bool = option(False)
    row: tuple[int, ...] = option((), "rows of 100 % interest", low=0)
    opt_betas: tuple[float, ...] | None = option(None)
    mode: Literal["some", "all"] = option("all")
    warmup_steps: int = option(-1)


@dataclass(frozen=True)
class Output:
    """Where to."""

    out: str = option("")


def parse(*argv):
    return parse_words([Model, Other], list(argv))


def test_fields_are_flags():
    assert options_of(Other) == [
        Option("lr", float, 0.1, "rate", low=0),
        Option("batch_size", int, 64, low=1),
        Option("use_amp", bool, False),
        Option("row", int, (), "rows of 100 % interest", many=True, low=0),
        Option("opt_betas", float, None, many=True),
        Option("mode", str, "all", choices=("some", "all")),
        Option("warmup_steps", int, -1),
    ]


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        (int, "12", 12),
        (int, "-3", -3),
        (float, "1e-3", 0.001),
        (float, "-.5", -0.5),
        (str, "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        (str, "", ""),
        *((bool, word, True) for word in ("true", "True", "yes", "t", "y", "1")),
        *((bool, word, False) for word in ("false", "FALSE", "no", "f", "n", "0")),
    ],
)
def test_words_become_values(kind, word, value):
    converted = Option("x", kind, None).convert(word)
    assert converted == value and type(converted) is kind


@pytest.mark.parametrize(
    ("kind", "word", "values"),
    [
        (int, "4", [4]),
        (int, "1-2-4-4", [1, 2, 4, 4]),
        (int, "1,2", [1, 2]),
        (int, "-1", [-1]),
        (float, "1e-3", [0.001]),
        (float, "1e-3,-2,0.5", [0.001, -2.0, 0.5]),
        (bool, "true,no", [True, False]),
    ],
)
def test_a_word_of_a_list_is_one_value_or_several_joined(kind, word, values):
    assert Option("x", kind, None, many=True).convert(word) == values


@pytest.mark.parametrize(
    ("flag", "word", "complaint"),
    [
        (Option("x", int, 0), "1.5", "'1.5' is not of type int"),
        (Option("x", float, 0), "fast", "'fast' is not of type float"),
        (Option("x", bool, False), "maybe", "'maybe' is not true or false"),
        (Option("x", int, 0, low=1), "0", "0 is below the least value accepted, 1"),
        (Option("x", float, 0, low=0), "nan", "nan is below"),
        (Option("x", float, 0, high=1), "1.5", "1.5 is above the greatest value accepted, 1"),
        (Option("x", float, 0, high=1), "nan", "nan is above"),
        (Option("x", float, 0), "inf", "inf is not accepted: give a finite number"),
        (Option("x", float, (), many=True), "nan", "nan is not accepted: give a finite number"),
        (Option("x", int, 0, low=0, many=True), "3--1", "-1 is below"),
        (Option("x", int, 0, many=True), "1-b", "'b' is not of type int"),
        (Option("x", str, "a", choices=("a", "b")), "c", "'c' is not one of a, b"),
    ],
)
def test_unacceptable_words_are_named(flag, word, complaint):
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        flag.convert(word)


@pytest.mark.parametrize(
    ("flag", "stored", "value"),
    [
        (Option("x", int, 1), None, None),
        (Option("x", int, 1), 3, 3),
        (Option("x", float, 1), 3, 3.0),
        (Option("x", bool, True), False, False),
        (Option("x", str, "", choices=("a", "b")), "b", "b"),
        (Option("x", float, (), many=True), (1e-5, 0.1), [1e-5, 0.1]),
        (Option("x", float, (), many=True), [], []),
    ],
)
def test_stored_values_come_back(flag, stored, value):
    assert flag.restore(stored) == value and type(flag.restore(stored)) is type(value)


def test_stored_values_are_held_to_the_limits_of_words():
    with pytest.raises(argparse.ArgumentTypeError, match="0 is below the least value accepted, 1"):
        Option("x", int, 1, low=1).restore(0)
    with pytest.raises(argparse.ArgumentTypeError, match="'None' is not of type int"):
        Option("x", int, (), many=True).restore([1, None])


def test_only_what_is_given_is_returned_and_a_repeated_flag_counts_last():
    assert parse() == ({}, {})
    given, options = parse("--lr", "1", "--batch_size", "2", "--lr", "3e-2", "--warmup_steps", "-1")
    assert given == {"lr": 0.03, "batch_size": 2, "warmup_steps": -1} and options == {}


def test_spellings_of_a_flag():
    for argv in (["--batch-size", "8"], ["--batch_size=8"], ["--batch-size=8"]):
        assert parse(*argv)[0] == {"batch_size": 8}
    assert parse("--row", "6", "12-14", "--opt-betas", "0.9", "0.999")[0] == {
        "row": [6, 12, 14],
        "opt_betas": [0.9, 0.999],
    }
    assert parse("--opt_betas=0.9,0.99", "--use-amp", "yes")[0] == {"opt_betas": [0.9, 0.99], "use_amp": True}


def test_a_dash_in_a_value_stays():
    assert parse("--model=timm/efficientnet_lite0")[0] == {"model": "timm/efficientnet_lite0"}
    assert parse_words([Model, Output], ["--out", "runs/a-b"])[0] == {"out": "runs/a-b"}


def test_options_of_the_model_come_from_its_signature():
    words = (
        "--nBlocks 7 --grFactor 1-2-4-4 --bnFactor 1 2 4 4 --bottleneck false --prune=min --reduction 0.25"
    )
    given, options = parse("--model", "msdnet", *words.split(), "--lr", "2")
    assert given == {"model": "msdnet", "lr": 2.0}
    assert options == {
        "nBlocks": 7,
        "grFactor": [1, 2, 4, 4],
        "bnFactor": [1, 2, 4, 4],
        "bottleneck": False,
        "prune": "min",
        "reduction": 0.25,
    }


def test_annotations_become_kinds():
    def build(
        *,
        a: int = 1,
        b: float | None = None,
        c: Sequence[int] = (1,),
        d: Sequence[float] | None = None,
        e: bool = True,
    ):
        """Nothing."""

    flags = options_of_signature(dict(inspect.signature(build).parameters))
    assert [(f.name, f.kind, f.many, f.default) for f in flags] == [
        ("a", int, False, 1),
        ("b", float, False, None),
        ("c", int, True, (1,)),
        ("d", float, True, None),
        ("e", bool, False, True),
    ]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--model", "msdnett"], "^unknown model 'msdnett'; did you mean msdnet"),
        (["--model", "msdnet", "--nBlock", "5"], "^unknown flag --nBlock; did you mean --nBlocks"),
        (["--nBlocks", "5"], "^unknown flag --nBlocks; .*; a network's options need --model NAME$"),
        (["--bath-size=3"], "^unknown flag --bath_size=3; did you mean --batch_size"),
        (["--batch", "3"], "^unknown flag --batch; "),  # no abbreviations
        (["stray"], "^unknown flag stray; "),
        (["--lr", "-1"], "^--lr: -1 is below the least value accepted, 0$"),
        (["--row", "-1"], "^--row: -1 is below the least value accepted, 0$"),
        (["--mode", "none"], "^--mode: 'none' is not one of some, all$"),
        (["--use_amp", "maybe"], "^--use_amp: 'maybe' is not true or false$"),
        (["--lr"], "^--lr: expected one argument$"),
        (["--model"], "^--model: expected one argument$"),
    ],
)
def test_mistakes_are_one_line(argv, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_help_lists_the_options_of_the_model_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help", "--model", "msdnet_cifar_even7")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "options of msdnet_cifar_even7" in text
    assert "--nBlocks INT default: 7" in text and "--grFactor LIST [LIST ...] default: 1 2 4" in text
    assert "some, all; default: all" in text and "100 % interest" in text


def test_help_without_a_model_says_how_to_list_options(capsys):
    with pytest.raises(SystemExit):
        parse("-h")
    text = capsys.readouterr().out
    assert "With --model NAME, the options" in text and "--nBlocks" not in text


def test_defaults_give_way_to_stored_values_and_these_to_given_ones():
    stored, given = {"lr": 1.0, "mode": "some", "unknown": 3, "row": [1, 2]}, {"lr": 2.0}
    group = fill(Other, stored, given)
    assert (group.lr, group.mode, group.batch_size, group.row) == (2.0, "some", 64, (1, 2))
    assert not hasattr(group, "unknown")
    assert plain(Model(), group).keys() == {
        entry.name for kind in (Model, Other) for entry in options_of(kind)
    }
    assert plain(group)["row"] == [1, 2]


def test_what_a_file_says_of_groups_is_checked():
    assert restore([Other], {"lr": 3, "row": (1,), "unknown": 0}, "x.pth") == {"lr": 3.0, "row": [1]}
    with pytest.raises(ValueError, match="^checkpoint x.pth was trained with a strange --lr: -1 is below"):
        restore([Other], {"lr": -1}, "x.pth")
