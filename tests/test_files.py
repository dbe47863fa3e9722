"""Files are written whole or not at all."""

import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from files import replacing, to_json, write_text, writing
from models.errors import UserError


@contextmanager
def full_after(size):
    """In the block, files cannot grow beyond `size` bytes: the system takes what fits, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_text_replaces_the_file_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "fsync", fail)
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with (
        pytest.raises(UserError, match=rf"^cannot write {path}: .*; [\d,.]+ MB are free there$"),
        full_after(100),
    ):
        write_text(path, "new" * 100)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/none/a.txt: No such file or directory$"):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_bugs_pass():
    for error in (RuntimeError("ours"), OSError("ours"), KeyError("ours")):
        with pytest.raises(type(error), match="ours"), writing(None):
            raise error


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".a.txt.tmp").write_text("half")
    with replacing(tmp_path / "a.txt") as temp:
        temp.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_has_null_where_a_number_is_not_finite():
    text = to_json(
        {"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], "c": {"d": np.float64("nan")}}
    )
    assert text == '{"a": null, "b": [null, [1.5, null]], "c": {"d": null}}'
    assert to_json([1, True, None, "NaN"], indent=0) == '[\n1,\ntrue,\nnull,\n"NaN"\n]'
