import argparse
import os
from urllib.error import URLError

import pytest
import torch
from torch import nn

from training import checkpoint
from training.checkpoint import check_arch, latest, load, load_weights, save, save_epoch

ARCH = {"name": "msdnet", "options": {"nBlocks": 5, "growth": [1, 2]}, "num_classes": 10}


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
    with pytest.raises(Exception, match="pickle"):
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
    ("attack", "held"), [(TouchesFile, r"io\.open"), (RunsCommand, r"(posix|nt)\.system")]
)
def test_malicious_pickle_is_refused_and_not_run(tmp_path, attack, held):
    touched = tmp_path / "touched"
    torch.save({"model": attack(touched)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth is refused: it holds {held}") as error:
        load(tmp_path / "x.pth")
    assert one_line(error)
    assert not touched.exists()


def test_published_namespace_loads(tmp_path):
    torch.save({"args": argparse.Namespace(model="x", depth_factor=[1, 1])}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth")["args"].depth_factor == [1, 1]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_urls_of_the_same_file_name_are_kept_apart(monkeypatch):
    calls = []

    def download(url, **options):
        calls.append(options)
        return {"url": url}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert load("https://a.org/best.pth") == {"url": "https://a.org/best.pth"}
    load("https://b.org/best.pth")
    assert calls[0]["file_name"] != calls[1]["file_name"]
    assert all(options["weights_only"] for options in calls)


def test_unreachable_url_is_one_line(monkeypatch):
    def download(url, **options):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(ValueError, match="cannot read checkpoint https://a.org/x.pth: .*no route"):
        load("https://a.org/x.pth")


def run_epochs(folder, count, **options):
    for epoch in range(count):
        save_epoch(
            folder, {"epoch": epoch}, epoch=epoch, **({"best": epoch == 1, "freq": 2, "keep": 2} | options)
        )


def test_epochs_keep_last_best_and_the_newest_numbered(tmp_path):
    run_epochs(tmp_path, 12)
    assert names(tmp_path) == [
        "checkpoint-11.pth",
        "checkpoint-9.pth",
        "checkpoint-best.pth",
        "checkpoint-last.pth",
    ]
    epochs = [load(tmp_path / f"checkpoint-{name}.pth")["epoch"] for name in ("9", "11", "best", "last")]
    assert epochs == [9, 11, 1, 11]


def test_keep_zero_writes_no_numbered_files(tmp_path):
    run_epochs(tmp_path, 4, keep=0)
    assert names(tmp_path) == ["checkpoint-best.pth", "checkpoint-last.pth"]


def test_epochs_are_copied_where_hard_links_fail(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(checkpoint.os, "link", fail)
    (tmp_path / ".checkpoint-best.pth.tmp").write_text("left by a killed process")
    run_epochs(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-last.pth"]
    assert load(tmp_path / "checkpoint-best.pth") == {"epoch": 1}


def test_latest_prefers_last_then_the_highest_number(tmp_path):
    assert latest(tmp_path) is None
    for name in ("checkpoint-9.pth", "checkpoint-10.pth", "checkpoint-best.pth", "checkpoint-x1.pth"):
        save(tmp_path / name, {})
    assert latest(tmp_path).name == "checkpoint-10.pth"
    save(tmp_path / "checkpoint-last.pth", {})
    assert latest(str(tmp_path)).name == "checkpoint-last.pth"


def test_same_architecture_passes():
    check_arch(ARCH, ARCH | {"options": dict(ARCH["options"])}, "x.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "ranet", "options": {"step": 2}}, "name is 'msdnet', wanted 'ranet'$"),
        ({"num_classes": 100}, "num_classes is 10, wanted 100$"),
        ({"options": {"nBlocks": 7, "growth": [1, 2]}}, "nBlocks is 5, wanted 7$"),
        ({"options": {"nBlocks": 5}}, r"growth is \[1, 2\], wanted None$"),
    ],
)
def test_another_architecture_is_named(change, message):
    with pytest.raises(ValueError, match=f"x.pth holds another architecture: {message}"):
        check_arch(ARCH, ARCH | change, "x.pth")


def network(classes=10, width=4):
    """Two heads; the second also reads the logits of the first."""
    return nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)),
            "head0": nn.Linear(4, classes),
            "isc": nn.Linear(classes, 4),
            "head1": nn.Linear(8, classes),
        }
    )


def test_fitting_weights_load():
    source, target = network(), network()
    load_weights(target, source.state_dict(), "x.pth")
    assert torch.equal(target["head1"].weight, source["head1"].weight)


def test_weights_older_than_the_batch_counter_load():
    weights = {key: value for key, value in network().state_dict().items() if "num_batches" not in key}
    model = network()
    load_weights(model, weights, "x.pth")
    assert all(
        torch.equal(value, weights[key]) for key, value in model.state_dict().items() if key in weights
    )


def test_another_number_of_classes_is_said():
    with pytest.raises(ValueError, match="^x.pth has 100 classes, the model 10$"):
        load_weights(network(10), network(100).state_dict(), "x.pth")


def test_another_width_is_not_called_classes():
    with pytest.raises(
        ValueError, match=r"6 of another shape \(trunk.0.weight \[6, 3, 1, 1\] instead of \[4, 3,"
    ) as error:
        load_weights(network(), network(width=6).state_dict(), "x.pth")
    assert one_line(error)


def test_missing_and_unexpected_keys_are_counted():
    weights = network().state_dict()
    for key in ("head0.weight", "head0.bias", "isc.weight", "isc.bias"):
        weights["old." + key] = weights.pop(key)
    with pytest.raises(ValueError, match="^x.pth does not fit the model: ") as error:
        load_weights(network(), weights, "x.pth")
    assert "4 missing (head0.weight, head0.bias, isc.weight, ...); 4 unexpected (old.head0.weight" in str(
        error.value
    )
    assert one_line(error)


def test_the_last_checkpoint_is_written_last(tmp_path, monkeypatch):
    save_epoch(tmp_path, {"epoch": 0}, epoch=0, best=True, freq=1, keep=3)
    replaced = []
    monkeypatch.setattr(
        os, "replace", lambda a, b, replace=os.replace: (replaced.append(os.path.basename(b)), replace(a, b))
    )
    save_epoch(tmp_path, {"epoch": 1}, epoch=1, best=True, freq=1, keep=3)
    assert replaced == ["checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-last.pth"]
