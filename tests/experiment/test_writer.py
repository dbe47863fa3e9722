import threading
import time

import pytest
import torch

from experiment.writer import Writer
from models.errors import UserError


def test_jobs_run_one_after_another_on_the_state_as_it_was():
    seen, running = [], []

    def save(path, state):
        running.append(len(running) - len(seen))
        time.sleep(0.05)
        seen.append((path, state["x"].item(), threading.current_thread() is threading.main_thread()))

    state = {"x": torch.zeros(1), "same": None}
    with Writer() as writer:
        for i in range(3):
            writer.add_copy(state, save, i)
            state["x"] += 1
        assert len(seen) == 2  # the third is waited for at the end
    assert seen == [(0, 0.0, False), (1, 1.0, False), (2, 2.0, False)] and running == [0, 0, 0]


def test_what_fails_is_raised_and_nothing_is_written_after_it():
    written = []

    def fail():
        raise UserError("no room")

    with pytest.raises(UserError, match="^no room$"), Writer() as writer:
        writer.add(fail)
        writer.add(written.append, 1)
    with pytest.raises(UserError, match="^no room$"):
        writer.wait()
    with pytest.raises(KeyError), Writer() as writer:  # another error is not hidden
        writer.add(fail)
        raise KeyError
    assert written == []
