from types import SimpleNamespace

from adaptive.reliability_plot import panels


def exit_with(*bins, auroc=0.9):
    rows = [SimpleNamespace(count=n, confidence=c, accuracy=a) for n, c, a in bins]
    return SimpleNamespace(ece=0.0123, auroc=auroc, bins=rows)


def test_dots_are_where_confidence_and_accuracy_are():
    nan = float("nan")
    first, second = panels(
        [exit_with((0, nan, nan), (25, 0.2, 0.3), (75, 0.9, 0.8)), exit_with((1, 1.0, 1.0), auroc=None)]
    )
    assert (first.exit, first.text) == (0, "ECE 1.23 %, AUROC\N{NO-BREAK SPACE}0.900")
    assert (second.exit, second.text) == (1, "ECE 1.23 %")
    low, high = first.dots
    assert (low.x, low.y, low.diagonal) == (20, 70, 80) and (high.x, high.y, high.diagonal) == (90, 20, 10)
    assert 1.5 < low.radius < high.radius < second.dots[0].radius == 7
    assert low.text == "25 images: confidence 0.200, accuracy 0.300"
    assert panels([]) == []
