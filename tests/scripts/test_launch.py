"""torchrun ends as its processes do."""

import importlib
import logging

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


@pytest.fixture
def ended(monkeypatch, capsys):
    """`ended(error)`: the exit code and what is on stderr if torchrun raises this."""
    launch = importlib.import_module("launch")
    monkeypatch.setattr(logging, "disable", lambda level: None)

    def run(error):
        def torchrun(argv):
            assert argv == ["--nproc_per_node", "2", "x.py"]
            if error:
                raise error

        monkeypatch.setattr(launch, "torchrun", torchrun)
        return launch.main(["--nproc_per_node", "2", "x.py"]), capsys.readouterr().err

    return run


def failed(code):
    return ChildFailedError(
        "x.py", {1: ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="<N/A>")}
    )


def test_a_failure_that_was_said_is_not_said_again(ended):
    assert ended(None) == (0, "")
    assert ended(failed(2)) == (2, "")
    assert ended(failed(1)) == (1, "")


def test_a_process_that_could_not_speak_is_spoken_for(ended):
    assert ended(failed(-9)) == (137, "error: process 1 ended with exit code -9\n")
    assert ended(SignalException("Ctrl-C", sigval=2)) == (130, "interrupted\n")
