from adaptive.reliability import ConfidenceFigures
from experiment.confidence_lines import confidence_lines

PLAIN = [
    ConfidenceFigures(0, 1.25, 0.1, 0.08, 0.9, 0.15, 0.8),
    ConfidenceFigures(1, 0.5, 0.05, -0.02, None, None, None),
]
SCALED = ConfidenceFigures(0, 1.25, 0.1, 0.08, 0.9, 0.15, 0.8, 1.5, 1.0, 0.01, -0.001)


def test_lines_hold_every_exit():
    about, head, *lines = confidence_lines(PLAIN)
    assert "temperature" not in about + head
    assert [line.split() for line in lines] == [
        ["0", "1.2500", "10.00", "8.00", "0.900", "15.00", "0.800"],
        ["1", "0.5000", "5.00", "-2.00", "-", "-", "-"],
    ]


def test_temperatures_have_columns_of_their_own():
    about, head, line = confidence_lines([SCALED])
    assert "over a temperature" in about and line.split()[-4:] == ["1.500", "1.0000", "1.00", "-0.10"]
    assert len(head) == len(line)
