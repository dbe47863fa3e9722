"""Where a step's time goes, on two small networks."""

import re

import pytest


def test_a_row_for_every_network(printed):
    words = ["--models", "cifar_alexnet", "rexnet_ee_lite_100", "--batch_size", "2", "--rounds", "1"]
    lines = printed("profile_step", *words).splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["cifar_alexnet", "rexnet_ee_lite_100"]
    for line in lines[-2:]:
        numbers, largest = re.match(r"\S+ +((?:[\d.]+ +){4})(.*)", line).groups()
        assert float(numbers.split()[2]) > 1 and largest.startswith(
            ("convolution", "matrix product", "optimizer")
        )


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::convolution_backward", "convolution"),
        ("aten::native_batch_norm", "batch norm"),
        ("aten::addmm", "matrix product"),
        ("aten::_foreach_add_", "optimizer"),
        ("aten::cat", "join and copy"),
        ("aten::relu_", "elementwise"),
        ("aten::zzz", "other"),
    ],
)
def test_operators_are_sorted_by_kind(script, operator, kind):
    assert script("profile_step").kind_of(operator) == kind
