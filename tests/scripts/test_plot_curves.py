"""Curves of several runs in one figure and one table."""

import json

import pytest
from matplotlib.figure import Figure


def test_the_legend_is_beside_the_curves(script, tmp_path, monkeypatch):
    curves = script("plot_curves")
    rows = [{"macs": 1e6 * i, "accuracy": 0.5 + 0.1 * (i % 2)} for i in range(20)]
    exits = [{"exit": k, "macs": 1e7 * k, "acc1": 0.5 + 0.1 * k} for k in (0, 1)]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure) or path.touch())
    curves.draw(tmp_path / "x.png", [curves.Curves(f"run {i}", exits, rows) for i in range(4)])
    (figure,) = figures
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (legend,) = [*figure.legends, *filter(None, [axes.get_legend()])]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_curves_of_runs_are_drawn_and_tabled(script, tmp_path, capsys):
    exits = [{"exit": k, "macs": macs, "acc1": acc} for k, (macs, acc) in enumerate([(1e6, 0.5), (2e6, 0.6)])]
    rows = [
        {"macs": 1.5e6, "accuracy": 0.625},
        {"macs": 2.5e6, "accuracy": 0.9},
    ]  # the second costs more than exit 1
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "anytime.json").write_text(json.dumps(exits))
        (tmp_path / name / "dynamic.json").write_text(json.dumps(rows))
    draw = script("plot_curves").main
    draw([str(tmp_path / "x.svg"), f"plain={tmp_path / 'a'}", f"l2w={tmp_path / 'b'}"])
    *_, plain, l2w = capsys.readouterr().out.splitlines()
    assert plain == "| plain | 50.00 | 60.00 | 62.50 |" and l2w.startswith("| l2w |")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    with pytest.raises(ValueError, match="no anytime.json in"):
        draw([str(tmp_path / "y.svg"), f"c={tmp_path}"])
    (tmp_path / "b" / "anytime.json").write_text(json.dumps(exits[:1]))
    with pytest.raises(ValueError, match="b is another network than a"):
        draw([str(tmp_path / "y.svg"), f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"])
    assert not (tmp_path / "y.svg").exists()
