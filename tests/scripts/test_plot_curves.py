"""Curves of several runs in one figure and one table."""

import json

import pytest
from matplotlib.figure import Figure

from experiment.layout import Exit, QuotaRow


def test_the_legend_is_beside_the_curves(script, tmp_path, monkeypatch):
    curves = script("plot_curves")
    rows = [QuotaRow(macs=1e6 * i, accuracy=0.5 + 0.1 * (i % 2)) for i in range(1, 20)]
    exits = [Exit(macs=1e7 * k, acc1=0.5 + 0.1 * k) for k in (1, 2)]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure) or path.touch())
    curves.draw(tmp_path / "x.png", [curves.Curves(f"run {i}", exits, rows) for i in range(4)])
    (figure,) = figures
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (legend,) = [*figure.legends, *filter(None, [axes.get_legend()])]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_curves_of_records_are_drawn_and_tabled(script, evaluated, tmp_path, capsys):
    record = json.loads((evaluated / "record.json").read_text())
    record["anytime"] = [{"macs": 1e6, "acc1": 0.5}, {"macs": 2e6, "acc1": 0.6}]
    # The second setting costs more than exit 1.
    record["dynamic"] = [{"macs": 1.5e6, "accuracy": 0.625}, {"macs": 2.5e6, "accuracy": 0.9}]
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a" / "record.json", tmp_path / "b.json"):
        path.write_text(json.dumps(record))
    draw = script("plot_curves").main
    draw([str(tmp_path / "x.svg"), f"plain={tmp_path / 'a'}", f"l2w={tmp_path / 'b.json'}"])
    *_, plain, l2w = capsys.readouterr().out.splitlines()
    assert plain == "| plain | 50.00 | 60.00 | 62.50 |" and l2w.startswith("| l2w |")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    with pytest.raises(ValueError, match="there is no .*record.json: run eval_dynamic.py"):
        draw([str(tmp_path / "y.svg"), f"c={tmp_path}"])
    (tmp_path / "b.json").write_text(json.dumps(record | {"anytime": record["anytime"][:1]}))
    with pytest.raises(ValueError, match="b is another network than a"):
        draw([str(tmp_path / "y.svg"), f"a={tmp_path / 'a'}", f"b={tmp_path / 'b.json'}"])
    (tmp_path / "b.json").write_text(json.dumps(record | {"dynamic": []}))
    with pytest.raises(ValueError, match="b.json has no dynamic curve: evaluate with --mode dynamic or all"):
        draw([str(tmp_path / "y.svg"), f"b={tmp_path / 'b.json'}"])
    assert not (tmp_path / "y.svg").exists()
