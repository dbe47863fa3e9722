"""What a record says of where its figures come from."""

import hashlib
import json

import numpy as np
import torch

from adaptive.policy import Policy, content_hash
from datasets import Data
from experiment import open_network
from experiment.origin import changed, file_hash, hashes_of, in_common
from experiment.portable import paths_in, portable
from experiment.recipe import DEFAULTS


def test_a_record_says_what_repeats_it(trained, evaluate_into, tmp_path):
    file = trained / "checkpoint-last.pth"
    folder = evaluate_into(tmp_path, file, "--mode", "dynamic")
    record = json.loads((folder / "record.json").read_text())
    origin, policy = record["origin"], Policy.load(folder / "policy.json").check(open_network(file))
    assert (
        record["schema"] == 2
        and origin["model"] == policy.model_hash
        and origin["calib"] == policy.calib_hash
    )
    assert record["policies"][0]["thresholds"] == list(policy.thresholds)
    assert origin["training"]["batch_size"] == 4 and origin["training"]["seed"] == 0
    assert origin["evaluation"]["mode"] == "dynamic"
    assert policy.made and origin["made"]["command"] == portable(policy.made.command)
    assert record["provenance"]["source"] == file.name and not list(paths_in(record))
    assert all("command" not in row for row in record["front"])
    again = evaluate_into(tmp_path / "exits", file, "--mode", "anytime")
    brief = json.loads((again / "record.json").read_text())
    assert (
        "policies" not in brief and brief["origin"]["calib"] == "" and brief["anytime"] == record["anytime"]
    )
    assert brief["origin"]["test"] == origin["test"] != content_hash({"test": torch.zeros(3)})


def test_files_of_data_are_hashed(tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.arange(3))
    expected = hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    assert file_hash(tmp_path / "a.npz") == expected
    data = Data(data_path=str(tmp_path), eval_data_path=str(tmp_path / "a.npz"))
    assert hashes_of(data) == {"a.npz": expected}


def test_a_cascade_has_the_flags_of_all_its_networks():
    first = {"seed": 0, "epochs": 2, "epoch_images": 7}
    assert in_common(first, [first, {"seed": 0, "epochs": 2}]) == {"seed": 0, "epochs": 2}
    assert in_common(first, [first, first]) == first


def test_flags_at_their_defaults_are_left_out_but_the_seed():
    assert changed(DEFAULTS) == {"seed": DEFAULTS["seed"]}
    assert changed({**DEFAULTS, "lr": 7.0}) == {"seed": DEFAULTS["seed"], "lr": 7.0}
