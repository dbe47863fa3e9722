"""Terminal lines about the confidence of every exit."""

from collections.abc import Sequence

from adaptive.reliability import ConfidenceFigures

HEADS = "exit       NLL    ECE, %   over, %     AUROC   corrected, %     AUROC"
SCALED = "   temperature       NLL    ECE, %   over, %"


def confidence_lines(rows: Sequence[ConfidenceFigures]) -> list[str]:
    """Every exit: fit, calibration error, overconfidence, and how well confidence tells right answers, and
    wrong ones that a later exit corrects; then the first three with temperatures, if there are any."""
    scaled = any(row.temperature is not None for row in rows)
    lines = [
        "largest probability of each exit as its confidence"
        + "; to the right, of logits over a temperature" * scaled,
        HEADS + SCALED * scaled,
    ]
    for row in rows:
        cells = [_cell(row.nll, 10, 4), _cell(row.ece, 10), _cell(row.gap, 10), _cell(row.auroc, 10, 3)]
        cells += [_cell(row.failure_rate, 15), _cell(row.failure_auroc, 10, 3)]
        if scaled:
            cells += [_cell(row.temperature, 14, 3), _cell(row.nll_scaled, 10, 4)]
            cells += [_cell(row.ece_scaled, 10), _cell(row.gap_scaled, 10)]
        lines.append(f"{row.exit:4}{''.join(cells)}")
    return lines


def _cell(value: float | None, width: int, digits: int = 0) -> str:
    """A figure with so many digits behind the point, or as a percentage with two where there are none."""
    if value is None:
        return "-".rjust(width)
    return f"{value:{width}.{digits}f}" if digits else f"{100 * value:{width}.2f}"
