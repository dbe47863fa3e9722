"""What tests of several rooms share: a small network of every family, a small data set, a network trained
on it."""

import copy
import gc
import hashlib
import json
import os
import runpy
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

import eval_dynamic
import main_earlyExit
from adaptive import curve, flops
from adaptive.policy import Policy, model_hash
from adaptive.reference import Reference
from datasets import View
from deploy.export import export
from experiment import Opened, subject
from experiment.recipe import Recipe
from models import MultiExitModel, State, create_model, model_options
from training import resolution
from utils import run_main

ROOT = Path(__file__).resolve().parents[1]
NETWORK = shlex.split("--model msdnet --nBlocks 2 --nChannels 8 --growthRate 4 --grFactor 1-2 --bnFactor 1-2")
DATA = shlex.split("--data_set image_folder --input_size 32 --num_calib 8 --batch_size 4")
PLAIN = shlex.split("--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0")
RUN = shlex.split("--num_workers 0 --device cpu")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "DYNEXIT_TRACEBACK")

# One variant per registered class that is small enough to really run.
SMALL = {
    "msdnet": {"nBlocks": 3, "nChannels": 4, "growthRate": 4},
    "ranet": {
        "nChannels": 4,
        "growthRate": 4,
        "step": 2,
        "grFactor": (2, 1, 1),
        "bnFactor": (2, 1, 1),
        "scale_list": (1, 2, 2),
    },
    "boosted/msdnet": {"nBlocks": 3, "nChannels": 4, "growthRate": 4},
    "reg400m_perceiver_t32": {},
    "resnet18": {},
    "rexnet_ee_100": {"input_ch": 4, "final_ch": 16, "head_width": 8},
    "rexnet_ee_lite_100": {"input_ch": 4, "final_ch": 16, "head_width": 8},
    "cifar_densenet": {"depth": 10, "growthRate": 4},
    "cifar_resnet": {"depth": 11, "block_name": "Bottleneck"},
    "cifar_preresnet": {"depth": 8},
    "cifar_wrn": {"depth": 10},
    "cifar_resnext": {"depth": 11, "cardinality": 2},
    "cifar_vgg11_bn": {},
    "cifar_alexnet": {},
    "timm/mobilenetv3_small_050": {},
    "ebjr": {
        "networks": (
            {"name": "cifar_resnet", "options": {"depth": 8}, "size": 16},
            {
                "name": "msdnet",
                "options": {"nBlocks": 2, "nChannels": 4, "growthRate": 4},
                "std": (0.5, 1.0, 1.0),
            },
        )
    },
    "mobilenetv2": {"width_mult": 0.1},
    "timm_ee": {"backbone": "mobilenetv3_small_050", "head_width": 8},
    "vit_ee": {"backbone": "test_vit", "exits": 2, "head_width": 8},
}
SIDES = {"cifar_resnext": 16, "vit_ee": 32}  # of its images, where 36 pixels cost much or do not fit

# Files of tests that take long.
LONGEST = {"test_golden.py", "test_published.py", "test_readme.py"}


def pytest_collection_modifyitems(items):
    """The longest come first, so that at the end of several processes none is left alone with one."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """What is imported stays: the garbage collector need not visit it, nor copy it in every loader's process."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000)  # tests make many objects, and few cycles


@pytest.fixture(scope="session", autouse=True)
def no_launcher():
    """The tests are no process of torchrun or SLURM, whatever started them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHERS:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_flushing():
    """Files are not flushed to the disk, which takes long: what is read back is the same, short of a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


# Networks


def pytest_generate_tests(metafunc):
    """A test that asks for `family` runs once for each of SMALL, for `family_or_relay` also for "relay"."""
    for argument, names in (("family", SMALL), ("family_or_relay", ["relay", *SMALL])):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)


@pytest.fixture(scope="session")
def small_options() -> dict[str, dict]:
    """The options of every family's small variant."""
    return SMALL


def _is_cifar(name: str) -> bool:
    stem = model_options(name).get("stem")
    return name.startswith(("cifar_", "ebjr")) or (stem is not None and stem.default == "cifar")


@pytest.fixture(scope="session")
def is_cifar() -> Callable[[str], bool]:
    """`is_cifar(name)`: whether a registered network is for images of 32 x 32 pixels."""
    return _is_cifar


@pytest.fixture(scope="session")
def on_meta() -> Callable[..., MultiExitModel]:
    """`on_meta(name, ...)`: what `create_model` makes on the meta device, where initial values cost much and
    are nothing."""
    drawn = dict.fromkeys(("normal_", "uniform_", "fill_", "zero_"), lambda tensor, *_, **__: tensor)

    def create(*words: object, **options: object) -> MultiExitModel:
        with torch.device("meta"), mock.patch.multiple(torch.Tensor, **drawn):
            return create_model(*words, **options)

    return create


def _settled(model: MultiExitModel, images: Tensor) -> MultiExitModel:
    model.double().train()
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.fixture(scope="session")
def settled() -> Callable[[MultiExitModel, Tensor], MultiExitModel]:
    """`settled(model, images)`: the model in float64 and eval mode, with batch norm statistics of its own."""
    return _settled


@cache
def _small(name: str) -> tuple[MultiExitModel, Tensor]:
    torch.manual_seed(0)
    side = SIDES.get(name, 32 if _is_cifar(name) else 36)
    images = torch.randn(5, 3, side, side, dtype=torch.float64)
    return _settled(create_model(name, num_classes=7, **SMALL[name]), images), images


@pytest.fixture(scope="session")
def small() -> Callable[[str], tuple[MultiExitModel, Tensor]]:
    """`small(name)`: the family's small variant with 7 classes, which the test may change, and five images for it."""

    def copied(name: str) -> tuple[MultiExitModel, Tensor]:
        network, images = _small(name)
        return copy.deepcopy(network), images

    return copied


class _Relay(MultiExitModel):
    """Three exits; a stage reads the images and what the exit before it said. Remembers what it was asked to
    do."""

    num_exits = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12 + 4, 8) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        self.stages, self.answers = [], []

    def begin(self, images):
        return {"images": images.flatten(1), "said": images.new_zeros(len(images), 4)}

    def trunk(self, k, state):
        self.stages.append(
            (k, state["images"][:, 0].int().tolist())
        )  # the first pixel tells which image it is
        return self.layers[k](torch.cat([state["images"], state["said"]], dim=1)).tanh(), state

    def head(self, k, features):
        self.answers.append(k)
        return 3 * self.heads[k](features)

    def carry(self, k, state, logits):
        return {**state, "said": logits}


@pytest.fixture(scope="session")
def relay_class() -> type[MultiExitModel]:
    """A network of three linear stages on 2 x 2 images, each of which reads what the exit before it said."""
    return _Relay


class _Tiny(MultiExitModel):
    """Two exits on 8 x 8 pixels; the second reads the map and the logits of the first."""

    num_exits = 2

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 4), (4, 8))
        )
        self.heads = nn.ModuleList(nn.Linear(width, 3) for width in (4, 8 + 3))

    def begin(self, images):
        return {"map": images, "said": None}

    def trunk(self, k, state):
        x = self.layers[k](state["map"])
        said = [state["said"]] if k else []
        return torch.cat([x.mean((2, 3)), *said], 1), {"map": x, "said": None} if k == 0 else None

    def head(self, k, features):
        return 8 * self.heads[k](features)

    def carry(self, k, state, logits):
        return {**state, "said": logits} if k == 0 else state


@pytest.fixture(scope="session")
def tiny() -> Opened:
    """A network of two exits and three classes as opened from a file, with random weights."""
    torch.manual_seed(0)
    network = _Tiny().train()
    with torch.no_grad():
        network(torch.randn(64, 3, 8, 8))
    view = View(8, mean=(0.5,) * 3, std=(0.25,) * 3)
    arch = {"name": "tiny", "options": {}, "num_classes": 3}
    return Opened(network.eval(), arch, Recipe(), view, None, "here", "random weights", ("ant", "bee", "cat"))


@pytest.fixture(scope="session")
def exported(tiny, tmp_path_factory) -> Path:
    """The folder that the tiny network is exported to, with a policy by which about half leave early."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    confidence = tiny.network(images)[0].softmax(-1).amax(-1).sort().values
    limit = confidence[31:33].mean().item()  # between two samples, so that none of them is a tie
    policy = Policy((limit, -1e8), name="half", accuracy=0.5, model_hash=model_hash(tiny.network))
    export(tiny, policy, folder, menu=[replace(policy, thresholds=(0.99, -1e8), name="late")])
    return folder


def _rest(model: MultiExitModel, k: int, state: State) -> list[Tensor]:
    exits = []
    for j in range(k, model.num_exits):
        logits, state = model.step(j, state)
        exits.append(logits)
    return exits


@pytest.fixture(scope="session")
def rest() -> Callable[[MultiExitModel, int, State], list[Tensor]]:
    """`rest(model, k, state)`: logits of the exits from k on."""
    return _rest


def _leaves(state: State) -> list[tuple[Tensor, Callable[[Tensor], State]]]:
    """The tensors of a state, each with a function that gives the state with this tensor replaced."""
    if isinstance(state, torch.Tensor):
        return [(state, lambda new: new)]
    if isinstance(state, dict):
        return [
            (leaf, lambda new, key=key, put=put: {**state, key: put(new)})
            for key, value in state.items()
            for leaf, put in _leaves(value)
        ]
    return [
        (leaf, lambda new, i=i, put=put: type(state)([*state[:i], put(new), *state[i + 1 :]]))
        for i, value in enumerate(state or ())
        for leaf, put in _leaves(value)
    ]


@pytest.fixture(scope="session")
def states_hold_only_what_is_read() -> Callable[[MultiExitModel, Tensor], None]:
    """Asserts of a network, on some images, that spoiling any leaf of any state spoils a later answer."""

    @torch.no_grad()
    def check(net: MultiExitModel, images: Tensor) -> None:
        state = net.begin(images)
        for k in range(net.num_exits):
            for leaf, put in _leaves(state):
                assert len(leaf) == len(images)
                spoilt = _rest(net, k, put(torch.full_like(leaf, torch.nan)))
                assert any(logits.isnan().any() for logits in spoilt), (
                    f"stage {k} is given a tensor that nobody reads"
                )
            _, state = net.step(k, state)
        assert _leaves(state) == []

    return check


# Data and runs


def write_images(folder: Path, count: int) -> None:
    """Noise of 32 x 32 pixels, darker for class `dim` than for `lit`; the two overlap a little."""
    rng = np.random.default_rng(count)
    for label, name in enumerate(("dim", "lit")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 160, (32, 32, 3)) + 60 * label + rng.integers(0, 36)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A data set of 40 + 20 images in two classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 20)
    write_images(root / "val", 10)
    return root


@pytest.fixture(scope="session")
def on(images) -> Callable[..., list[str]]:
    """`on(*words)`: arguments for training a small network on 32 of the images; the other 8 are for calibration."""

    def arguments(*words: object, data: Path = images, network: list[str] = NETWORK) -> list[str]:
        return [*network, *DATA, "--data_path", str(data), *RUN, *map(str, words)]

    return arguments


@pytest.fixture(scope="session")
def trained(on, tmp_path_factory) -> Path:
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    flags = (
        "--epochs 2 --warmup_epochs 0 --model_ema true --model_ema_decay 0.5 --model_ema_eval true --lr 0.01"
    )
    main_earlyExit.main(on(*flags.split(), *PLAIN, "--output_dir", out))
    return out


@pytest.fixture(scope="session")
def evaluate_into(images) -> Callable[..., Path]:
    """`evaluate_into(out, checkpoint, *words)` evaluates a file on `images` and returns the folder of its results, `out`."""

    def evaluate(out: Path, checkpoint: Path, *words: object) -> Path:
        into = ["--checkpoint", str(checkpoint), "--data_path", str(images), "--output_dir", str(out)]
        eval_dynamic.main([*into, *RUN, *map(str, words)])
        return out

    return evaluate


@pytest.fixture(scope="session")
def evaluated(trained, evaluate_into, tmp_path_factory) -> Path:
    """The results of evaluating the run's last checkpoint in every mode."""
    return evaluate_into(
        tmp_path_factory.mktemp("evaluated"), trained / "checkpoint-last.pth", "--row", 3, 35
    )


def _described(network: nn.Module) -> str:
    """Everything that a network's costs can depend on."""
    modules = [(type(m), {k: v for k, v in vars(m).items() if k[0] != "_"}) for m in network.modules()]
    return repr((network, modules, [(key, value.shape) for key, value in network.state_dict().items()]))


@pytest.fixture(scope="session")
def counted() -> dict[tuple, object]:
    """What counters of costs have found so far."""
    return {}


@pytest.fixture
def costs_once(counted, monkeypatch):
    """Runs count what an architecture costs, and check that it reads images of a side, once in all: both take
    longer than to evaluate it on few images."""

    def remembered(function):
        def find(network, shape, *words):
            key = function.__name__, _described(network), shape
            if key not in counted:
                counted[key] = function(network, shape, *words)
            return counted[key]

        return find

    count = remembered(flops.count)
    # A script that is run as one imports from the first; in the second it is imported already.
    for module in (flops, eval_dynamic):
        monkeypatch.setattr(module, "count", count)
    check_side = remembered(flops.check_side)
    for module in (resolution, subject):
        monkeypatch.setattr(module, "check_side", check_side)


@pytest.fixture
def no_pictures(monkeypatch):
    """Evaluations draw no curves, for tests of something else: an empty figure stands for them."""

    def draw(target, *_, **__):
        if isinstance(target, Path):
            target.write_text("<svg></svg>")
        else:
            target.write("<svg></svg>")

    monkeypatch.setattr(curve, "_save_curve", draw)


# Files and messages


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path], list[dict[str, float]]]:
    """`read_log(out)`: the epochs in a run's log."""
    return lambda out: [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="session")
def last_of() -> Callable[[Path], dict]:
    """`last_of(out)`: what a run's last checkpoint holds."""
    return lambda out: torch.load(out / "checkpoint-last.pth", weights_only=True)


@pytest.fixture
def error_of(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script that must end with one line on stderr and exit code 2; returns that line."""

    def run(main: Callable[[list[str]], None], *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_main(main)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


# Scripts and processes


@pytest.fixture
def run_script(monkeypatch, capsys) -> Callable[..., str]:
    """`run_script(path, *words)` runs a script as `python path words` does, in this process; returns what it prints."""

    def run(path: str, *words: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(ROOT / path), *map(str, words)])
            patch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
            capsys.readouterr()
            try:
                runpy.run_path(str(ROOT / path), run_name="__main__")
            except SystemExit as end:
                assert not end.code, f"{path} ended with {end.code}: {capsys.readouterr().err}"
        return capsys.readouterr().out

    return run


def _rank(rank: int, count: int, port: int, function: Callable[..., None], words: tuple) -> None:
    """One of `count` processes, as torchrun would start it."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    function(*words)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()


@pytest.fixture(scope="session")
def in_processes() -> Callable[..., None]:
    """`in_processes(count, function, *words)` calls a function in processes that know each other as torchrun's do.

    They are forks of this one where that is safe (no CUDA), because importing torch takes seconds.
    """

    def start(count: int, function: Callable[..., None], *words: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        method = "spawn" if torch.cuda.is_available() else "fork"
        mp.start_processes(_rank, (count, port, function, words), nprocs=count, start_method=method)

    return start


def _script(path: str, words: list[str], folder: Path) -> None:
    """What `python path words` does, with all that it prints in files of the folder."""
    with open(folder / "out", "w", buffering=1) as out, open(folder / "err", "w", buffering=1) as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        sys.argv, sys.path = [path, *words], [str((ROOT / path).parent), *sys.path]
        torch.set_num_threads(1)
        runpy.run_path(str(ROOT / path), run_name="__main__")


@pytest.fixture
def forked(tmp_path_factory) -> Callable[..., tuple[int, str, str]]:
    """`forked(path, *words)` runs a script in a process of its own: its exit code, stdout and stderr.

    Which is a fork of this one where that is safe, as in `in_processes`.
    """

    def run(path: str, *words: object) -> tuple[int, str, str]:
        folder = tmp_path_factory.mktemp("forked")
        context = mp.get_context("spawn" if torch.cuda.is_available() else "fork")
        process = context.Process(target=_script, args=(path, list(map(str, words)), folder))
        process.start()
        process.join()
        return process.exitcode, (folder / "out").read_text(), (folder / "err").read_text()

    return run


# Exported networks


def _color_stage(place: int) -> bytes:
    """Logits of the mean of each channel: a red image is of class 0; the second stage is surer by far."""
    port = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])]
    logits = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
    scale = numpy_helper.from_array(np.array(100.0 if place else 2.0, np.float32), "scale")
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Mul", ["flat", "scale"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "stage", port, logits, [scale])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    ).SerializeToString()


@pytest.fixture(scope="session")
def exported_colors(tmp_path_factory) -> Path:
    """An exported network of two stages for images of one color, and two policies: in one, all leave at once."""
    path = tmp_path_factory.mktemp("exported")
    port = {"name": "images", "shape": [3, 4, 4], "dtype": "float32"}
    rows = []
    for k in range(2):
        (path / f"stage{k}.onnx").write_bytes(_color_stage(k))
        rows.append({"exit": k, "inputs": [port], "outputs": [], "fp32": f"stage{k}.onnx"})
    Policy((0.9, 0.0)).save(path / "policy.json")
    Policy((0.0, 0.0)).save(path / "fast.json")
    rng = np.random.default_rng(0)
    Reference.of(rng.integers(0, 2, 300), rng.random(300), num_exits=2).save(path / "policy.reference.json")
    manifest = {
        "schema": 1,
        "model_hash": "",
        "class_names": ["red", "green", "blue"],
        "view": {"size": 4, "resize": 0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3},
        "policies": {"fp32": "policy.json"},
        "menu": ["fast.json"],
        "stages": rows,
        "files": {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in path.iterdir()},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path
