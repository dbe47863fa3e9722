"""Whatever a file or a command line holds, its reader gives a valid value or an error of one line.

Files are whole ones with a few edits, or have one entry replaced by anything. No other exception may come, nothing may
hang (`SECONDS`) or take much memory (`MEMORY`). FUZZ_EXAMPLES=5000 looks longer, each time for other cases; what was
found once stands as an example.
"""

import io
import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import tarfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from adaptive.policy import Made, Policy
from deploy import decide
from deploy.folder import Folder
from experiment import open_network
from experiment.checkpoint import latest, load
from experiment.recipe import GROUPS, Recipe, read_command, read_recipe
from loading.pixels import UNREADABLE, read_image
from loading.shards import Shards
from loading.sources import load_npz
from models import create_model
from utils import UserError

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

MORE = int(os.environ.get("FUZZ_EXAMPLES", 0))
SECONDS = 10  # of computing, for one case
MEMORY = 2 << 30  # bytes on top of what the process has
TINY = {"name": "cifar_resnet", "options": {"depth": 8}, "num_classes": 3}


def fuzz(cases):
    """So many cases, the same ones at each call, unless more are asked for."""
    return settings(
        max_examples=MORE or cases,
        derandomize=not MORE,
        phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def bounded():
    """Neither hangs nor large amounts of memory."""

    def expired(*_):
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGVTALRM, expired), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1][1]))
    yield
    signal.signal(signal.SIGVTALRM, before[0])
    resource.setrlimit(resource.RLIMIT_AS, before[1])


@contextmanager
def in_one_line(*others):
    """Lets errors for users pass, of one line, and `others`."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (UserError, decide.RunnerError) as error:
        text = str(error)
        assert text.splitlines() == [text] and len(text) < 10_000, repr(text)
    except others:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


# Cases

KINDS = ("cut", "flip", "zero", "insert", "double")
EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)), max_size=4
)


def edited(whole, edits):
    """Bytes with edits (kind, place, bytes) one after the other."""
    for kind, place, what in edits:
        at = place % (len(whole) + 1)
        if kind == "cut":
            whole = whole[:at]
        elif kind == "flip":
            whole = (
                whole[:at]
                + bytes(a ^ b for a, b in zip(whole[at:], what, strict=False))
                + whole[at + len(what) :]
            )
        elif kind == "zero":
            whole = whole[:at] + bytes(len(whole[at : at + 64 * len(what)])) + whole[at + 64 * len(what) :]
        elif kind == "insert":
            whole = whole[:at] + what + whole[at:]
        else:
            whole = whole[:at] + whole[at // 2 :]
    return whole


NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400]),
    st.floats(),
)
WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "\n", "\0", "a\u2028b", "\ud800", "../x", "nan", "auto"])
)
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def replaced(content, place, value):
    """A nest with its part number `place`, of all in it, replaced."""
    parts = []

    def walk(part, path):
        parts.append(path)
        for key, one in (
            part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        ):
            walk(one, (*path, key))

    def put(part, path):
        if not path:
            return value
        copy = dict(part) if isinstance(part, dict) else list(part)
        copy[path[0]] = put(part[path[0]], path[1:])
        return copy

    walk(content, ())
    return put(content, parts[place % len(parts)])


PLACES = st.integers(0, 200)


# Checkpoints


@pytest.fixture(scope="module")
def content():
    """What a small run's checkpoint holds."""
    torch.manual_seed(0)
    weights = dict(create_model("cifar_resnet", 3, depth=8).state_dict())
    args = {
        "data_set": "CIFAR10",
        "seed": 0,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "input_size": 32,
        "lr": 0.1,
    }
    return {
        "model": weights,
        "arch": TINY,
        "args": args,
        "calib_indices": [1, 2],
        "epoch": 3,
        "class_names": list("abc"),
    }


def written(content, kind):
    """A checkpoint's bytes."""
    file = io.BytesIO()
    if kind == "pickle":
        pickle.dump({"model": {"w": [1.0, 2.0]}, "epoch": 3}, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


@pytest.fixture(scope="module")
def files(content, tmp_path_factory):
    """Whole files by kind."""
    path = tmp_path_factory.mktemp("safe") / "x.safetensors"
    save_file({"w": torch.arange(6.0)}, path)
    small = {**content, "model": {"w": torch.arange(6.0)}}
    return {kind: written(small, kind) for kind in ("zip", "legacy", "pickle")} | {
        "safetensors": path.read_bytes()
    }


@fuzz(40)
@given(st.sampled_from(["zip", "legacy", "pickle", "safetensors"]), EDITS)
def test_checkpoint_files(files, tmp_path, kind, edits):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "checkpoint-last.pth")
    path.write_bytes(edited(files[kind], edits))
    with in_one_line():
        assert isinstance(load(path), dict)
    if kind != "safetensors":
        with in_one_line():
            assert latest(tmp_path, lambda line: None) in (None, path)


@fuzz(15)
@given(PLAIN, st.booleans())
def test_other_pickles_as_checkpoints(tmp_path, value, ours):
    path = tmp_path / "checkpoint-last.pth"
    if ours:
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    with in_one_line():
        assert isinstance(load(path), dict)


@fuzz(15)
@given(PLACES, PLAIN)
def test_checkpoints_with_a_strange_entry(content, tmp_path, place, value):
    torch.save(replaced(content, place, value), tmp_path / "x.pth")
    with in_one_line():
        assert open_network(tmp_path / "x.pth").network.num_exits == 1


# Policies and exported folders

MADE = Made("command", "CIFAR10", 10)
POLICY = Policy(
    (0.9, 1e8, 0.0),
    temperatures=(1.0, 1.5, 2.0),
    off=(1,),
    accuracy=0.9,
    macs=2.0,
    shares=(0.5, 0.0, 0.5),
    made=MADE,
)


def check_policy(path):
    for read in (Policy.load, decide.Policy):
        with in_one_line():
            assert len(read(path).thresholds) > 0


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The text of a policy's file."""
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    POLICY.save(path)
    return path.read_bytes()


@fuzz(30)
@given(EDITS)
def test_policy_files(policy, tmp_path, edits):
    (tmp_path / "policy.json").write_bytes(edited(policy, edits))
    check_policy(tmp_path / "policy.json")


@fuzz(40)
@given(PLACES, PLAIN)
def test_policies_with_a_strange_entry(policy, tmp_path, place, value):
    (tmp_path / "policy.json").write_text(json.dumps(replaced(json.loads(policy), place, value)))
    check_policy(tmp_path / "policy.json")


@pytest.fixture(scope="module")
def exported(exported_colors, tmp_path_factory):
    """An exported folder of our own."""
    return Path(shutil.copytree(exported_colors, tmp_path_factory.mktemp("copied") / "folder"))


@pytest.fixture(scope="module")
def manifest(exported):
    """The text of its manifest."""
    return (exported / "manifest.json").read_bytes()


@fuzz(20)
@given(EDITS)
def test_manifest_files(exported, manifest, edits):
    (exported / "manifest.json").write_bytes(edited(manifest, edits))
    with in_one_line():
        assert len(Folder(exported, "fp32").stages) > 0


@fuzz(30)
@example(73, {"\x1e": None})
@given(PLACES, PLAIN)
def test_manifests_with_a_strange_entry(exported, manifest, place, value):
    (exported / "manifest.json").write_text(json.dumps(replaced(json.loads(manifest), place, value)))
    with in_one_line():
        assert len(Folder(exported, "fp32").stages) > 0


# Recipes and command lines

FLAGS = [
    "--model",
    "--data_set",
    "--data_path",
    "--lr",
    "--epochs",
    "--scale",
    "--mean",
    "--opt_betas",
    "--use_amp",
]
FLAGS += [
    "--nBlocks",
    "--grFactor",
    "--seed",
    "--popular_classes",
    "--recipe",
    "--decay_epochs",
    "--arch",
    "--data",
    "-a",
    "--sched",
]
FLAGS += [
    "--procedure",
    "--threshold",
    "--tresume",
    "--evalmode",
    "--use_valid",
    "--epsilon",
    "--lr_type",
    "--tarch",
]
VALUES = [
    "msdnet",
    "ranet",
    "ebjr",
    "timm/resnet18",
    "DIGITS",
    "CIFAR10",
    "cifar10",
    "1",
    "0",
    "-1",
    "0.5",
    "true",
    "nan",
    "1e400",
    "published",
    "9" * 5000,
    "--",
    "=",
]
LINES = st.lists(
    st.one_of(
        st.sampled_from(FLAGS + VALUES),
        st.text(max_size=6),
        st.tuples(st.sampled_from(FLAGS), st.sampled_from(VALUES) | WORDS).map("=".join),
    ).filter(lambda word: word.partition("=")[0] not in ("-h", "--help")),
    max_size=8,
)


def read_line(words):
    found = read_command(list(GROUPS.values()), words)
    recipe = Recipe.of(found.values, options=found.options)
    assert shlex.split(recipe.command()) is not None


@fuzz(50)
@example(["--epochs", "--evalmode"])
@example(["--epochs", "9" * 5000, "--evalmode"])
@example(["--epochs", "9" * 15, "--evalmode", "--data", "imagenet"])
@example(["a\nb"])
@given(LINES)
def test_command_lines(words):
    with in_one_line():
        read_line(words)


YAML = b"""model: msdnet
lr: 1.0e-3
scale: [0.5, 1.0]
use_amp: true
grFactor: [1, 2]
"""


@fuzz(20)
@given(EDITS)
def test_recipe_files(tmp_path, edits):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(edited(YAML, edits))
    with in_one_line():
        assert all(type(word) is str for word in read_recipe(str(path)))
        read_line(["--recipe", str(path)])


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(9 * ['*' + before])}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@fuzz(40)
@example(BOMB)
@example("a: &a [*a]")
@example("a: 2001-99-99")
@example("a: 0x" + 5000 * "f")
@example("[" * 500)
@given(st.text(alphabet="abc:?-[]{}&*!|>%@ \n\t'\"0123456789.=<~,#", max_size=40))
def test_texts_as_recipes(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with in_one_line():
        assert all(type(word) is str for word in read_recipe(str(path)))


@fuzz(15)
@given(
    st.dictionaries(
        st.sampled_from([flag.lstrip("-") for flag in FLAGS])
        | PLAIN.filter(lambda key: not isinstance(key, (list, dict))),
        PLAIN,
        max_size=3,
    )
)
def test_recipes_with_strange_entries(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    with suppress(UnicodeEncodeError):
        path.write_text(yaml.safe_dump(content, allow_unicode=False))
    with in_one_line():
        read_line(["--recipe", str(path)])


# Images

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")


@pytest.fixture(scope="module")
def pictures():
    """A small image in every format, and a few modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    found = {}
    for kind in FORMATS:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        found[kind] = file.getvalue()
    for mode in ("P", "1", "LA", "I;16"):
        file = io.BytesIO()
        image = (
            Image.fromarray(pixels[..., 0].astype(np.uint16))
            if mode == "I;16"
            else Image.fromarray(pixels).convert(mode)
        )
        image.save(file, "PNG" if mode != "1" else "TIFF")
        found[mode] = file.getvalue()
    return found


@fuzz(60)
@given(st.sampled_from([*FORMATS, "P", "1", "LA", "I;16"]), EDITS)
def test_image_files(pictures, tmp_path, kind, edits):
    path = tmp_path / "image"
    path.write_bytes(edited(pictures[kind], edits))
    with in_one_line(*UNREADABLE):
        assert read_image(str(path)).mode == "RGB"


@pytest.fixture(scope="module")
def arrays(pictures):
    """A file of small images, plain and as JPEG bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG")
        files.append(file.getvalue())
    ends = np.cumsum([0, *map(len, files)])
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    return {"images": pixels}, {"jpeg": jpeg, "offsets": ends}


@fuzz(20)
@given(st.booleans(), EDITS)
def test_npz_files(arrays, tmp_path, jpeg, edits):
    file = io.BytesIO()
    np.savez(file, labels=np.arange(3), **arrays[jpeg])
    path = tmp_path / "x.npz"
    path.write_bytes(edited(file.getvalue(), edits))
    with in_one_line():
        assert len(load_npz(path, 10)) > 0


ARRAYS = st.one_of(
    st.builds(
        lambda kind, shape, value: np.full(shape, value).astype(kind),
        st.sampled_from(["u1", "i8", "f4", "?", "S2", "U1", "c8", "M8[s]"]),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(-2, 9),
    ),
    st.lists(st.integers(-(2**40), 2**40), max_size=4).map(lambda values: np.array(values, np.int64)),
)


@fuzz(20)
@example(True, {"offsets": np.array(0)})
@example(True, {"jpeg": np.array(0)})
@given(
    st.booleans(),
    st.dictionaries(st.sampled_from(["images", "labels", "jpeg", "offsets", "x"]), ARRAYS, max_size=3),
)
def test_npz_files_of_strange_arrays(arrays, tmp_path, jpeg, others):
    path = tmp_path / "x.npz"
    np.savez(path, **{"labels": np.arange(3), **arrays[jpeg], **others})
    with in_one_line():
        assert len(load_npz(path, 10)) > 0


# Shards


@pytest.fixture(scope="module")
def shard(pictures):
    """A tar of three samples."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, kind in enumerate(("PNG", "JPEG", "WEBP")):
            label = (f"{i}.cls", str(i).encode()) if i < 2 else ("2.json", b'{"label": 2}')
            for name, content in ((f"{i}.{kind.lower()}", pictures[kind]), label):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def read_shards(folder):
    found = Shards(folder)
    assert len(found) > 0 and min(found.labels) >= 0
    for i in range(len(found)):
        with in_one_line(*UNREADABLE):
            assert found[i][0].mode == "RGB" and found.name(i)
    return found


@fuzz(30)
@given(EDITS)
def test_shards(shard, tmp_path, edits):
    (tmp_path / "index.npz").unlink(missing_ok=True)
    (tmp_path / "x.tar").write_bytes(edited(shard, edits))
    with in_one_line():
        read_shards(tmp_path)


@fuzz(10)
@given(
    st.dictionaries(
        st.sampled_from(["starts", "spans", "labels", "keys", "alone", "names", "stats"]), ARRAYS, max_size=2
    ),
    EDITS,
)
def test_indexes_of_shards(shard, tmp_path, arrays, edits):
    if not (tmp_path / "x.tar").exists():
        (tmp_path / "x.tar").write_bytes(shard)
    path = tmp_path / "index.npz"
    path.unlink(missing_ok=True)
    Shards(tmp_path)
    content = dict(np.load(path))
    np.savez(path, **(content | arrays))
    path.write_bytes(edited(path.read_bytes(), edits))
    found = read_shards(tmp_path)
    assert len(found) == 3
