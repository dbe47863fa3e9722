"""Where packages are missing, an entry script says what to do."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_an_interrupt_while_packages_are_imported_is_one_line():
    program = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['eval_dynamic.py']; import installed; "
    program += "os.kill(os.getpid(), signal.SIGINT); raise SystemExit(0)"
    for names, said in (({}, "interrupted\n"), ({"TORCHELASTIC_RUN_ID": "7"}, "")):
        environment = os.environ | names
        end = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert (end.returncode, end.stderr) == (130, said)


def test_a_signal_while_packages_are_imported_ends_with_the_code_to_start_again():
    for words, code in (
        ([], 75),
        (["--requeue-code=9"], 9),
        (["--requeue_code", "8"], 8),
        (["--requeue_code", "x"], 75),
    ):
        argv = ["main_earlyExit.py", *words]
        program = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {argv}; import installed; "
        program += "os.kill(os.getpid(), signal.SIGUSR1); raise SystemExit(0)"
        end = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (end.returncode, end.stdout) == (
            code,
            "stopped before training: the same command starts again\n",
        )


@pytest.mark.parametrize(
    "script",
    ["main_earlyExit.py", "eval_dynamic.py", "installed.py", "scripts/plot_curves.py", "scripts/launch.py"],
)
def test_missing_packages_are_one_line(script, monkeypatch, capsys):
    for name in ("installed", "common"):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else name)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ") and line.endswith("then source .venv/bin/activate")
    assert " has no timm: bash scripts/install.sh makes .venv" in line
