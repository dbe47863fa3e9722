"""What a checkpoint holds is checked before it is used: every refusal is one line that names what is wrong."""

import argparse
import os
import random
import re
import zipfile

import pytest
import torch
from torch import nn

from experiment import open_network
from experiment.checkpoint import load, save
from experiment.open import read_weights
from experiment.published import read, understood
from experiment.recipe import Start
from experiment.run import Run, Saving
from models import create_model
from training.optim import Optimization, Update, make_optimizer

SMALL = {"nBlocks": 2, "nChannels": 4, "growthRate": 4}
ARCH = {"name": "msdnet", "options": SMALL, "num_classes": 5}


def refused(match, function, *words, **options):
    """Calls a function that must end with one line of an error."""
    with pytest.raises(ValueError, match=match) as error:
        function(*words, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    """Whether two nests of tensors and plain values are the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# Bytes


@pytest.fixture(scope="module")
def content():
    """A small run: its layer, its optimizer, its flags."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    args = {"lr": 0.1, "decay_epochs": [1, 2], "resume": None}
    return {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": args}


def damaged(whole):
    """The bytes of a file with single bits flipped, and cut, at many places."""
    generator = random.Random(0)
    for _ in range(400):
        place = generator.randrange(len(whole))
        flipped = bytes([whole[place] ^ 1 << generator.randrange(8)])
        yield whole[:place] + flipped + whole[place + 1 :]
    for _ in range(60):
        yield whole[: generator.randrange(len(whole))]


@pytest.mark.filterwarnings("ignore")  # torch's, of strange pickles
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_are_refused_and_never_another_content(content, tmp_path, zipped):
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = 0
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        try:
            found = load(path)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        loaded += 1
        # Files of torch before 1.6 have no checksums.
        assert same(found, content) or not zipped
    assert loaded < 460 / (2 if zipped else 1)


def test_a_flipped_bit_of_a_weight_is_named(content, tmp_path):
    save(tmp_path / "x.pth", content)
    data, weight = (tmp_path / "x.pth").read_bytes(), content["model"]["weight"].numpy().tobytes()
    (tmp_path / "x.pth").write_bytes(data.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1]), 1))
    refused(
        r"^\S*x.pth is truncated or not a checkpoint: Bad CRC-32 for file '\S*/data/\d'",
        load,
        tmp_path / "x.pth",
    )


def test_a_file_that_torch_wrote_without_checksums_is_read(content, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / "x.pth", content)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(load(tmp_path / "x.pth"), content)


def test_what_is_no_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    refused("^cannot read checkpoint .*x.pth: Is a FIFO$", load, tmp_path / "x.pth")
    refused("^cannot read checkpoint /dev/zero: Is a device or a socket$", load, "/dev/zero")
    refused("^cannot read checkpoint .*: Is a directory$", load, tmp_path)
    refused("^cannot read checkpoint .*: Is a FIFO$", read, tmp_path / "x.pth")


# Size


def test_a_zip_that_swells_is_refused(content, tmp_path):
    save(tmp_path / "x.pth", {**content, "zeros": torch.zeros(2_000_000)})
    with zipfile.ZipFile(tmp_path / "x.pth") as there:
        for name, kind in (("dense", zipfile.ZIP_STORED), ("swells", zipfile.ZIP_DEFLATED)):
            with zipfile.ZipFile(tmp_path / f"{name}.pth", "w", kind) as here:
                for entry in there.infolist():
                    here.writestr(entry.filename, there.read(entry))
    assert load(tmp_path / "dense.pth")["epoch"] == 3
    line = refused("unpacks to more than 20 times its", load, tmp_path / "swells.pth")
    assert line.endswith(f" {(tmp_path / 'swells.pth').stat().st_size} bytes")


def laughing(depth):
    """A list that holds one list twice, and so on."""
    value = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


def endless():
    value = []
    value.append(value)
    return value


@pytest.mark.filterwarnings("ignore")  # torch's, of sparse tensors
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(1).expand(10_000_000), "unpacks to more than 20 times"),
        (laughing(40), "unpacks to more than 20 times"),
        (endless(), "unpacks to more than 20 times"),
        (["a" * 50_000] * 10_000, "unpacks to more than 20 times"),
        (argparse.Namespace(a=laughing(40)), "unpacks to more than 20 times"),
        (torch.zeros(3, device="meta"), "holds a tensor that is torch.strided, on meta"),
        (torch.zeros(3, 3).to_sparse(), "holds a tensor that is torch.sparse_coo, on cpu"),
    ],
)
def test_what_is_larger_than_its_file_is_refused(tmp_path, value, reason):
    torch.save({"args": value}, tmp_path / "x.pth")
    refused(f"^checkpoint .*x.pth is refused: it {reason}", load, tmp_path / "x.pth")


def test_tensors_that_share_memory_are_fine(tmp_path):
    weights = torch.randn(100_000)
    save(tmp_path / "x.pth", {str(i): weights.view(1000, 100) for i in range(100)})
    assert len(load(tmp_path / "x.pth")) == 100


# Entries


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"arch": 3}, "arch 3; accepted: name, options and num_classes"),
        ({"epoch": -2}, "epoch -2; accepted: a number from -1, or a word"),
        ({"epoch": True}, "epoch True"),
        ({"epoch": 1.5}, "epoch 1.5"),
        ({"best": "high"}, "best 'high'; accepted: a finite number"),
        ({"best": float("nan")}, "best nan"),
        ({"calib_indices": 3}, "calib_indices 3; accepted: distinct numbers of rows, from 0"),
        ({"calib_indices": [4, 5, -6]}, "among calib_indices -6"),
        ({"calib_indices": [4, 5, 4]}, "among calib_indices 4"),
        ({"calib_indices": [4, 5.0]}, "among calib_indices 5.0"),
        ({"args": {"input_size": 10**6}}, "input_size 1000000; accepted: at most 4096"),
        ({"args": argparse.Namespace(input_size=10**6)}, "input_size 1000000"),
        ({"class_names": 5}, "class_names 5; accepted: a list of words"),
        ({"pace": {"images": 0, "at_start": 1, "world_size": 1}}, "pace .*; accepted: numbers for at_start"),
        ({"pace": [1, 2, 3]}, r"pace \[1, 2, 3\]"),
        ({"record": {"epoch": 1}}, "record .*; accepted: a line of log.txt"),
        ({"class_names": [1, 2]}, r"class_names \[1, 2\]"),
        ({"arch": {"name": "msdnet", "options": {}}}, "arch num_classes None; accepted: 1 and more"),
        ({"arch": ARCH | {"num_classes": 0}}, "arch num_classes 0"),
        ({"arch": ARCH | {"name": None}}, "arch name None; accepted: a str"),
        ({"arch": ARCH | {"options": [1]}}, r"arch options \[1\]; accepted: a dict"),
    ],
)
def test_strange_entries_are_named(entries, complaint):
    refused(f"^checkpoint x.pth has {complaint}", understood, entries, "x.pth")


@pytest.fixture(scope="module")
def blank():
    torch.manual_seed(0)
    return create_model("msdnet", 5, **SMALL)


@pytest.fixture(scope="module")
def weights(blank):
    return blank.state_dict()


@pytest.mark.parametrize(
    ("arch", "complaint"),
    [
        ({"num_classes": 10**12}, f"with {10**12} in it, more than its weights make plausible: 4096"),
        ({"options": SMALL | {"nBlocks": 10**9}}, "with 1000000000 in it"),
        (
            {"options": SMALL | {"nChannels": 4000, "growthRate": 4000}},
            "msdnet that .*: it is far larger than",
        ),
        (
            {"options": SMALL | {"nChannels": 99}},
            "msdnet that cannot be built: it has [0-9]+ numbers, and the file's weights [0-9]+$",
        ),
        ({"options": SMALL | {"nBlocks": "2"}}, "option nBlocks '2'; accepted: int"),
        ({"options": SMALL | {"grFactor": 3}}, "option grFactor 3; accepted: a list of int"),
        (
            {"options": SMALL | {"nBlock": 2}},
            "msdnet that cannot be built: model msdnet has no option 'nBlock'",
        ),
        ({"options": SMALL | {"nBlocks": -2}}, "msdnet that cannot be built: "),
        (
            {"name": "timm/hf-hub:somebody/net", "options": {}},
            "timm/hf-hub:somebody/net that cannot be built: timm has no model",
        ),
        ({"name": "ebjr", "options": {"networks": [3]}}, "ebjr that cannot be built: "),
    ],
)
def test_networks_that_the_weights_cannot_be_of_are_not_built(weights, arch, complaint):
    stored = understood({"model": weights, "arch": ARCH | arch}, "x.pth")
    refused(f"^checkpoint x.pth has arch {complaint}", open_network, stored)


@pytest.mark.parametrize(
    "arch",
    [
        {"name": "timm/resnet18", "options": {"pretrained": True}},
        {"name": "timm_ee", "options": {"backbone": "resnet10t", "pretrained": True}},
        {
            "name": "ebjr",
            "options": {"networks": [{"name": "timm/resnet18", "options": {"pretrained": True}}] * 2},
        },
        {"name": "ebjr", "options": {"networks": ["timm/resnet18:pretrained=true"] * 2}},
    ],
)
def test_a_file_makes_no_network_fetch_weights(arch):
    arch = understood({"arch": arch | {"num_classes": 3}}, "x.pth").arch
    assert "pretrained" not in repr(arch) and "resnet1" in repr(arch)


# Weights


@pytest.mark.parametrize(
    ("key", "change", "complaint"),
    [
        ("classifier.1.linear.bias", lambda t: t.fill_(torch.nan), "holds nan, not finite numbers"),
        ("classifier.1.linear.bias", lambda t: t * torch.inf, "holds (inf|-inf|nan), not finite numbers"),
        ("classifier.1.linear.bias", lambda t: t.long(), "is of type torch.int64, accepted: torch.float32"),
        (
            "classifier.1.linear.bias",
            lambda t: t.cfloat(),
            "is of type torch.complex64, accepted: torch.float32",
        ),
        ("running_var", lambda t: t - 2, "is -1 somewhere, but variances are 0 or more"),
        ("num_batches_tracked", lambda t: t.float(), "is of type torch.float32, accepted: torch.int64"),
    ],
)
def test_weights_that_no_training_gives_are_named(weights, blank, tmp_path, key, change, complaint):
    key = next(name for name in weights if name.endswith(key))
    spoilt = {**weights, key: change(weights[key].clone())}
    path = tmp_path / "x.pth"
    save(path, {"model": weights, "model_ema": spoilt, "arch": ARCH})
    refused(f"^checkpoint {path}: {re.escape(key)} {complaint}", open_network, path)
    start = Start(finetune=str(path), model_key="model_ema")
    refused(f"{re.escape(key)} {complaint}", read_weights, start, blank)


# What a run resumes from


def run_of(opt, fp16=False):
    """A run of a layer that has taken a step."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    optimizer = make_optimizer(layer, Optimization(opt=opt, lr=0.1))
    update = Update(layer, optimizer, lr=lambda step: 0.1, weight_decay=lambda step: 0.0)
    if fp16:
        update.scaler = torch.amp.GradScaler("cpu")
    update(layer(torch.randn(5, 3)).square().mean())
    return Run({"model": layer, **update.parts}, dict, Saving(None), score=lambda figures: None), update


def test_other_parts_of_an_optimizers_state_are_checked():
    run, _ = run_of("adamw")
    states = run.state(0)["optimizer"]["state"]
    wrong = {
        name: {0: states[0] | {"exp_avg": value}}
        for name, value in (("shape", torch.ones(3)), ("nan", torch.full((4, 3), torch.nan)))
    }
    complaints = {
        r"does not fit this run's: exp_avg has the shape \[3\]": {"state": wrong["shape"]},
        "state 0 exp_avg holds nan, not finite numbers": {"state": wrong["nan"]},
        "there is no parameter 7": {"state": {7: states[0]}},
        "state is 5|'int' object": {"state": 5},
        "param_groups 0 eps is 'small', accepted: a number": {
            "param_groups": [group | {"eps": "small"} for group in run.state(0)["optimizer"]["param_groups"]]
        },
    }
    for complaint, change in complaints.items():
        state = run.state(3)
        state["optimizer"] |= change
        refused(f"^optimizer of checkpoint x.pth.*({complaint})", run.resume, state, "x.pth")


def test_a_scaler_is_checked():
    run, update = run_of("sgd", fp16=True)
    scaler = {**update.scaler.state_dict(), "_growth_tracker": 3}
    for change, complaint in (
        ({"scale": "large"}, "scale is 'large', accepted: a number"),
        ({"scale": float("inf")}, "scale holds inf, not finite numbers"),
    ):
        state = run.state(3) | {"scaler": scaler | change}
        refused(f"^scaler of checkpoint x.pth: {complaint}", run.resume, state, "x.pth")
    run.resume(run.state(3) | {"scaler": scaler}, "x.pth")
    assert update.scaler.state_dict() == scaler
