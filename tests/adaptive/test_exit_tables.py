import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive.exit_tables import ExitFigures, ExitTables, GrowingTables, exit_figures


def test_tables_of_a_batch():
    logits = torch.zeros(2, 2, 6)
    logits[0, 0, 1] = logits[1, 1, 5] = 2.0
    logits[0, 1] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    tables = ExitTables.of(list(logits), torch.tensor([1, 5]))
    total = math.exp(2) + 5
    ramp = sum(math.exp(i) for i in range(6))
    assert_close(
        tables.confidence,
        torch.tensor([[math.exp(2) / total, math.exp(5) / ramp], [1 / 6, math.exp(2) / total]]),
    )
    assert tables.correct[:, 1].tolist() == [False, True] and tables.correct[0, 0]
    assert tables.correct5[0].tolist() == [True, False] and tables.correct5[1, 1]
    assert_close(
        tables.loss, torch.tensor([[math.log(total) - 2, math.log(ramp)], [math.log(6), math.log(total) - 2]])
    )
    assert len(tables) == 2


def test_tables_take_any_confidence_and_few_classes():
    logits = torch.tensor([[[2.0, 0.0, 0.0]]])
    tables = ExitTables.of(list(logits), torch.tensor([2]), "energy_logits")
    assert tables.confidence.item() == pytest.approx(math.log(math.exp(2) + 2))
    assert not tables.correct.item() and tables.correct5.item()


class Largest(TorchDispatchMode):
    """Remembers the most elements of a tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_tables_of_a_batch_copy_the_logits_of_one_exit_at_a_time():
    exits, targets = torch.randn(4, 3, 50).unbind(), torch.tensor([1, 5, 7])
    with Largest() as largest:
        ExitTables.of(exits, targets)
    assert largest.elements == 3 * 50


def numbered(*numbers):
    """Tables of two exits whose every entry tells the sample."""
    row = torch.tensor(numbers)
    two = torch.stack([row, row + 100])
    hits = torch.stack([row > 3, row > 4])
    flat = row.expand(2, -1)
    return ExitTables(two, hits, flat > 0, -flat, two + 7, torch.stack([two, -two]), row, row + 8)


def check_samples(tables, *numbers):
    expected = numbered(*numbers)
    for column in ("confidence", "correct", "correct5", "loss", "answers", "scores", "targets", "full"):
        assert torch.equal(getattr(tables, column), getattr(expected, column))
    assert len(tables) == len(numbers)


def test_tables_join_in_order():
    check_samples(ExitTables.cat([numbered(5, 3), numbered(4)]), 5, 3, 4)


def test_tables_of_shards_interleave():
    check_samples(ExitTables.interleave([numbered(0, 3, 6), numbered(1, 4), numbered(2, 5)]), *range(7))


def test_growing_tables_are_those_of_all_batches_without_spare_room():
    growing = GrowingTables()
    assert growing.table() is None
    for numbers in ((5, 3), (4,), (1, 2, 8), (9,)):
        growing.add(numbered(*numbers))
    tables = growing.table()
    check_samples(tables, 5, 3, 4, 1, 2, 8, 9)
    assert tables.correct.dtype == torch.bool and len(growing.columns[0][0]) > 7
    assert all(len(c.untyped_storage()) == c.numel() * c.element_size() for c in vars(tables).values())


def test_part_of_a_table():
    check_samples(numbered(7, 8, 9, 0).part(torch.tensor([2, 0])), 9, 7)


def test_exits_of_a_table():
    tables = numbered(7, 8, 9)
    swapped = tables.of_exits([1, 0])
    for column in ("confidence", "correct", "correct5", "loss"):
        assert torch.equal(getattr(swapped, column), getattr(tables, column).flip(0))
    assert torch.equal(swapped.scores, tables.scores.flip(1)) and torch.equal(swapped.targets, tables.targets)
    assert len(tables.of_exits([1]).confidence) == 1


def test_figures_of_every_exit():
    first, second = exit_figures(numbered(4, 5, 0), [10, 40], [10, 30])
    assert first == ExitFigures(0, macs=10, alone=10, loss=-3.0, acc1=2 / 3, acc5=2 / 3)
    assert second == ExitFigures(1, macs=40, alone=30, loss=-3.0, acc1=1 / 3, acc5=2 / 3)
