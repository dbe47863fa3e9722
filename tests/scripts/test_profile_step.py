"""Where a step's time goes, on two small networks."""

import re

import pytest

from adaptive.flops import exit_costs
from models import create_model


def test_a_row_for_every_network(printed):
    words = ["--models", "cifar_alexnet", "rexnet_ee_lite_100", "--batch_size", "2", "--rounds", "1"]
    lines = printed("profile_step", *words).splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["cifar_alexnet", "rexnet_ee_lite_100"]
    for line in lines[-2:]:
        numbers, largest = re.match(r"\S+ +((?:[\d.]+ +){4})(.*)", line).groups()
        assert float(numbers.split()[2]) > 1 and largest.startswith(
            ("convolution", "matrix product", "optimizer")
        )


def test_hours_of_a_training_follow_from_its_images(printed):
    words = ["--models", "cifar_alexnet", "--batch_size", "2", "--rounds", "1"]
    line = printed("profile_step", *words, "--images", "1e12", "--gpu_tflops", "100").splitlines()[-1]
    times, _, floor, hours = map(float, re.match(r"\S+ +[\d.]+ +[\d.]+((?: +[\d.]+){4})", line)[1].split())
    macs = exit_costs(create_model("cifar_alexnet", 10), (3, 32, 32))[-1]
    assert floor == pytest.approx(6 * macs * 1e12 / 100e12 / 3600, abs=0.051)
    assert hours == pytest.approx(floor * times, rel=0.05)


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
