import argparse
import os
import resource
from urllib.error import URLError

import pytest
import torch

from experiment import checkpoint
from experiment.checkpoint import latest, load, save, save_epoch
from models.errors import UserError


class TouchesFile:
    """An object that, unpickled without care, creates the file `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


class RunsCommand(TouchesFile):
    """The same through the shell."""

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def one_line(error):
    return "\n" not in str(error.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saved_state_comes_back(tmp_path):
    state = {
        "model": {"w": torch.arange(3)},
        "epoch": 4,
        "args": {"lr": 0.1, "milestones": [1, 2], "resume": None},
    }
    save(tmp_path / "x.pth", state)
    loaded = load(tmp_path / "x.pth")
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w"))
    assert loaded == state


@pytest.mark.parametrize("crash", ["replace", "fsync"])
def test_crash_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, crash):
    save(tmp_path / "x.pth", {"epoch": 1})

    def fail(*_):
        raise OSError("no more disk")

    monkeypatch.setattr(checkpoint.os, crash, fail)
    with pytest.raises(OSError, match="no more disk"):
        save(tmp_path / "x.pth", {"epoch": 2})
    assert names(tmp_path) == ["x.pth"]
    assert load(tmp_path / "x.pth") == {"epoch": 1}


def test_unsaveable_state_leaves_the_old_file(tmp_path):
    save(tmp_path / "x.pth", {"epoch": 1})
    with pytest.raises(Exception, match="local object"):
        save(tmp_path / "x.pth", {"epoch": lambda: 2})
    assert names(tmp_path) == ["x.pth"]
    assert load(tmp_path / "x.pth") == {"epoch": 1}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.98, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_named_in_one_line(tmp_path, share, zipped):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="x.pth is truncated or not a checkpoint") as error:
        load(path)
    assert one_line(error)


def test_text_missing_file_folder_and_list_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("hello\n")
    save(tmp_path / "list.pth", [1, 2])
    for name, message in {
        "text.pth": "not a checkpoint",
        "none.pth": "cannot read checkpoint .*none.pth: No such file",
        "": "Is a directory",
        "list.pth": "it holds a list",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / name)
        assert one_line(error)


@pytest.mark.parametrize(
    ("attack", "held"), [(TouchesFile, r"_?io\.open"), (RunsCommand, r"(posix|nt)\.system")]
)
def test_malicious_pickle_is_refused_and_not_run(tmp_path, attack, held):
    touched = tmp_path / "touched"
    torch.save({"model": attack(touched)}, tmp_path / "x.pth")
    way_out = "; .*; scripts/convert_checkpoint.py rewrites a file that holds no worse than NumPy's numbers$"
    with pytest.raises(ValueError, match=f"x.pth is refused: it holds {held}{way_out}") as error:
        load(tmp_path / "x.pth")
    assert one_line(error)
    assert not touched.exists()


def test_published_namespace_loads(tmp_path):
    torch.save({"args": argparse.Namespace(model="x", depth_factor=[1, 1])}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth")["args"].depth_factor == [1, 1]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_urls_of_the_same_file_name_are_kept_apart(tmp_path, monkeypatch):
    calls = []

    def download(url, path):
        calls.append(url)
        save(path, {"url": url})

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    urls = ["https://a.org/best.pth", "https://b.org/best.pth"]
    for _ in range(2):
        assert [load(url) for url in urls] == [{"url": url} for url in urls]
    assert calls == urls  # each once


def test_unreachable_url_is_one_line(tmp_path, monkeypatch):
    def download(url, path):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="cannot read checkpoint https://a.org/x.pth: .*no route"):
        load("https://a.org/x.pth")


def run_epochs(folder, count, **options):
    for epoch in range(1, count + 1):
        save_epoch(
            folder, {"epoch": epoch}, epoch=epoch, **({"best": epoch == 2, "freq": 2, "keep": 2} | options)
        )


def test_epochs_keep_last_best_and_the_newest_numbered(tmp_path):
    run_epochs(tmp_path, 12)
    assert names(tmp_path) == [
        "checkpoint-10.pth",
        "checkpoint-12.pth",
        "checkpoint-best.pth",
        "checkpoint-last.pth",
    ]
    epochs = [load(tmp_path / f"checkpoint-{name}.pth")["epoch"] for name in ("10", "12", "best", "last")]
    assert epochs == [10, 12, 2, 12]


def test_keep_zero_writes_no_numbered_files(tmp_path):
    run_epochs(tmp_path, 4, keep=0)
    assert names(tmp_path) == ["checkpoint-best.pth", "checkpoint-last.pth"]


def test_epochs_are_copied_where_hard_links_fail(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(checkpoint.os, "link", fail)
    (tmp_path / ".checkpoint-best.pth.tmp").write_text("left by a killed process")
    run_epochs(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2.pth", "checkpoint-best.pth", "checkpoint-last.pth"]
    assert load(tmp_path / "checkpoint-best.pth") == {"epoch": 2}


def test_latest_prefers_last_then_the_highest_number(tmp_path):
    assert latest(tmp_path) is None
    for name in ("checkpoint-9.pth", "checkpoint-10.pth", "checkpoint-best.pth", "checkpoint-x1.pth"):
        save(tmp_path / name, {})
    assert latest(tmp_path).name == "checkpoint-10.pth"
    save(tmp_path / "checkpoint-last.pth", {})
    assert latest(str(tmp_path)).name == "checkpoint-last.pth"


def test_the_last_checkpoint_is_written_last(tmp_path, monkeypatch):
    save_epoch(tmp_path, {"epoch": 1}, epoch=1, best=True, freq=1, keep=3)
    replaced = []
    monkeypatch.setattr(
        os, "replace", lambda a, b, replace=os.replace: (replaced.append(os.path.basename(b)), replace(a, b))
    )
    save_epoch(tmp_path, {"epoch": 2}, epoch=2, best=True, freq=1, keep=3)
    assert replaced == ["checkpoint-2.pth", "checkpoint-best.pth", "checkpoint-last.pth"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path / "x.pth", {"epoch": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(UserError, match=r"^cannot write \S+x.pth: .*; [\d,.]+ MB are free there$"):
            save(tmp_path / "x.pth", {"w": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["x.pth"] and load(tmp_path / "x.pth") == {"epoch": 1}


def flip(path):
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_in_place_of_a_damaged_checkpoint_is_the_newest_intact_one(tmp_path, capsys):
    said = []
    for name, epoch in (("best", 4), ("9", 2), ("10", 3), ("last", 5)):
        save(tmp_path / f"checkpoint-{name}.pth", {"epoch": epoch, "weights": torch.zeros(1000)})
    assert latest(tmp_path, said.append).name == "checkpoint-last.pth" and said == []
    for damage, expected in (("last", "best"), ("best", "10"), ("10", "9")):
        flip(tmp_path / f"checkpoint-{damage}.pth")
        assert latest(tmp_path, said.append).name == f"checkpoint-{expected}.pth"
        line = f"{tmp_path}/checkpoint-last.pth is truncated or not a checkpoint: Bad CRC-32"
        end = f"; going on from the newest intact one beside it, checkpoint-{expected}.pth"
        assert said[-1].startswith(line) and said[-1].endswith(end)
    flip(tmp_path / "checkpoint-9.pth")
    with pytest.raises(ValueError, match="last.pth is .*; no intact checkpoint is beside it$"):
        latest(tmp_path)
    assert len(said) == 3 and capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", bytes(5000)])  # what a power cut leaves
def test_a_last_checkpoint_without_content_is_damaged_too(tmp_path, capsys, data):
    save(tmp_path / "checkpoint-best.pth", {"epoch": 0})
    (tmp_path / "checkpoint-last.pth").write_bytes(data)
    assert latest(tmp_path).name == "checkpoint-best.pth"
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_damaged_numbered_checkpoint_is_replaced_too(tmp_path):
    for epoch in (1, 2):
        save(tmp_path / f"checkpoint-{epoch}.pth", {"epoch": epoch, "weights": torch.zeros(1000)})
    flip(tmp_path / "checkpoint-2.pth")
    assert latest(tmp_path).name == "checkpoint-1.pth"
