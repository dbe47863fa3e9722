import pytest
import torch

from adaptive.classes import ClassRow, class_rows, worst_and_best
from adaptive.exit_tables import ExitTables


def tables_of(answers, targets):
    """Tables of exits that give these answers [K, N] with certainty."""
    logits = [10.0 * torch.nn.functional.one_hot(torch.tensor(row), 6) for row in answers]
    return ExitTables.of(logits, torch.tensor(targets))


def test_a_class_has_its_exits_shares_and_answers():
    tables = tables_of([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]], [0, 0, 0, 0, 1])
    first, second = class_rows(tables, torch.tensor([0, 1, 1, 1, 0]), ["cat", "dog"])
    assert first == ClassRow("cat", 4, [0.5, 0.5], [0.25, 0.75], 0.5)
    assert second == ClassRow("dog", 1, [0.0, 1.0], [1.0, 0.0], 0.0)


def test_classes_without_images_are_left_out_and_those_without_a_name_have_a_number():
    tables = tables_of([[5, 0]], [5, 2])
    rows = class_rows(tables, torch.zeros(2, dtype=torch.int64), ["a", "b", "c"])
    assert [(row.name, row.images, row.accuracy) for row in rows] == [("c", 1, 0.0), ("class 5", 1, 1.0)]
    assert [row.name for row in class_rows(tables, torch.zeros(2, dtype=torch.int64))] == [
        "class 2",
        "class 5",
    ]


def test_rows_equal_those_of_one_class_after_another():
    torch.manual_seed(0)
    logits, targets = list(torch.randn(3, 500, 6)), torch.randint(6, (500,))
    tables, left_at = ExitTables.of(logits, targets), torch.randint(3, (500,))
    for c, row in enumerate(class_rows(tables, left_at)):
        own = (targets == c).nonzero()[:, 0]
        part = tables.part(own)
        assert row.images == len(own) and row.exits == pytest.approx(part.means()["acc1"])
        assert row.shares == pytest.approx([(left_at[own] == k).double().mean().item() for k in range(3)])
        right = part.correct.gather(0, left_at[own][None])
        assert row.accuracy == pytest.approx(right.double().mean().item())


def test_of_many_classes_the_worst_and_the_best_are_shown():
    rows = [ClassRow(str(i), 1, [], [], (7 * i % 31) / 31) for i in range(31)]
    shown = [31 * row.accuracy for row in worst_and_best(rows, 2)]
    assert shown == pytest.approx([0, 1, 29, 30])
    assert len(worst_and_best(rows[:4], 2)) == 4 and worst_and_best([]) == []
