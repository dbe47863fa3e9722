"""Agreement with the reference numbers: every file below $GOLDEN_DIR, whatever subset is there."""

import hashlib
import importlib.util
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptive.confidence import max_prob
from adaptive.flops import count, exit_costs
from adaptive.thresholds import DYN_PERCEIVER_RATIOS, MSDNET_RATIOS, geometric_quotas, quota_thresholds, simulate
from models import create_model, list_models, model_options
from training.losses import exit_weights, joint_objective, kd_loss, soft_cross_entropy

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[2] / "shared" / "golden")
if not GOLDEN.is_dir():
    pytest.skip(f"no reference numbers at {GOLDEN}", allow_module_level=True)

FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.json"))

# Kinds of files whose code does not exist yet.
LATER = ("meta_step.json",)

# Names that are generic outside the 32x32 networks have a prefix here.
CIFAR_NETS = re.compile(r"densenet|resnet|preresnet|wrn|resnext|vgg\d+(_bn)?|alexnet")
CLASSES = {"cifar10": 10, "cifar100": 100, "ImageNet": 1000}


@pytest.fixture(scope="module")
def fill():
    """The folder's own module that draws weights and inputs."""
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_name(name):
    return f"cifar_{name}" if CIFAR_NETS.fullmatch(name) else name.replace("ReXNetV1", "rexnetv1")


def our_options(options):
    """The reference program's options under our names."""
    options = dict(options)
    if "data" in options:
        data = options.pop("data")
        options |= {"stem": "imagenet" if data == "ImageNet" else "cifar", "num_classes": CLASSES[data]}
    if "classes" in options:
        options["num_classes"] = options.pop("classes")
    return options


@pytest.mark.parametrize("file", FILES)
def test_agrees_with_the_reference(file, fill):
    golden, base = json.loads((GOLDEN / file).read_text()), Path(file).name
    if base in LATER:
        pytest.skip("not built yet")
    if base == "manifests.json":
        check = check_manifests
    elif base == "train_loss.json":
        check = check_train_loss
    elif base == "dynamic_eval.json":
        check = check_l2w_evaluation if "cases" in golden else check_dyn_perceiver_evaluation
    elif {"model", "state_dict", "exits"} <= golden.keys():
        check = check_model
    else:
        pytest.fail(f"no test knows what {file} is")
    check(golden, fill)


def check_model(golden, fill):
    name, options = our_name(golden["model"]), our_options(golden["kwargs"])
    if name not in list_models():
        pytest.skip(f"family {name} is not registered yet")
    net = create_model(name, **options)
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == golden["state_dict"]
    # Released optimizer states number the parameters in this order.
    if "perceiver" in name:
        assert list(net.state_dict()) == list(golden["state_dict"])
    assert sum(p.numel() for p in net.parameters()) == golden["num_params"]
    check_costs(net, create_published(name, options), golden)
    fill.fill_(net)
    with torch.no_grad():
        exits = net(fill.make_input(*golden["input_shape"]))
    assert len(exits) == len(golden["exits"]) == net.num_exits
    wrong = [k for k in range(net.num_exits) if not fill.matches(exits[k], golden["exits"][k], rtol=1e-6)]
    assert wrong == [], "exits whose outputs differ"


def create_published(name, options):
    """The network that executes as its paper's program does."""
    with torch.device("meta"):
        return create_model(name, **options, **({"lazy": False} if "lazy" in model_options(name) else {}))


def check_costs(net, published, golden):
    shape = tuple(golden["input_shape"][1:])
    if "fvcore_by_operator_per_exit" in golden:  # fvcore drops what an exit does not read
        assert exit_costs(net, shape) == [ops["conv"] + ops["linear"] for ops in golden["fvcore_by_operator_per_exit"]]
    if "macs_executed_per_exit" in golden:
        whole = count(published, shape)
        assert whole.macs == golden["macs_executed_per_exit"]
        assert whole.papers == golden["flops_per_exit"]
    if "macs_per_exit" in golden:  # attention was rounded to four digits
        assert exit_costs(net, shape) == pytest.approx(golden["macs_per_exit"], rel=1e-5)
    if golden["model"] == "densenet":
        assert count(net, shape).papers[-1] == golden["reference_flops"]


def check_manifests(golden, fill):
    assert set(golden["models"]) == set(list_models("*perceiver*"))
    wrong = []
    for name, manifest in golden["models"].items():
        with torch.device("meta"):
            net = create_model(name, **golden["kwargs"])
        shapes = {key: "x".join(map(str, tensor.shape)) for key, tensor in net.state_dict().items()}
        lines = "\n".join(sorted(f"{key} {shape}" for key, shape in shapes.items()))
        found = {"num_params": sum(p.numel() for p in net.parameters()), "num_entries": len(shapes)}
        found["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
        wrong += [name] if found != manifest else []
    assert wrong == []


def check_train_loss(golden, fill):
    net = fill.fill_(create_model(golden["model"], **golden["kwargs"]))
    images, labels = fill.make_input(*golden["input_shape"]), torch.tensor(golden["targets"])
    soft = torch.full((len(labels), 1000), 0.1 / 1000, dtype=torch.float64)
    soft[torch.arange(len(labels)), labels] += 0.9
    criteria = {
        "cross_entropy": (labels, 0.0),
        "label_smoothing_0.1": (labels, 0.1),
        "soft_target_0.1": (soft, 0.0),
    }
    for mode in ("eval", "train"):
        exits = net.train(mode == "train")(images)  # once: the cases differ in the loss only
        for case in (case for case in golden["cases"] if case["mode"] == mode):
            targets, smoothing = criteria[case["criterion"]]
            factors = {name: case[f"loss_{name}_factor"] for name in ("att", "cnn", "merge")}
            objective = joint_objective(
                exit_weights=exit_weights(4, **factors),
                smoothing=smoothing,
                kd_alpha=case["alpha_kd"],
                kd_temperature=case["T_kd"],
            )
            ((loss, _),) = objective(lambda _, exits=exits: exits, images, targets)
            assert loss.item() == pytest.approx(case["loss"], rel=1e-7)
            for k, name in enumerate(("early3", "att", "cnn", "merge")):
                task = soft_cross_entropy(exits[k], targets, smoothing).item()
                assert task == pytest.approx(case["terms"][f"task_{name}"], rel=1e-7)
                if k < 3:
                    kd = kd_loss(exits[k], exits[-1], case["T_kd"]).item()
                    assert kd == pytest.approx(case["terms"][f"kd_{name}"], rel=1e-7)
            names, parameters = zip(*net.named_parameters(), strict=True)
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            norms = {name: gradient.norm().item() for name, gradient in zip(names, gradients, strict=True)}
            assert math.hypot(*norms.values()) == pytest.approx(case["grad_norm_total"], rel=1e-7)
            for name, norm in case["grad_norms"].items():
                assert norms[name] == pytest.approx(norm, rel=1e-7), name


def check_dyn_perceiver_evaluation(golden, fill):
    recipe = golden["inputs"]
    val, test = (dyn_perceiver_tables(recipe, split, fill) for split in ("val", "test"))
    for split, tables in {"val": val, "test": test}.items():
        percent = [100 * accuracy for accuracy in tables.correct.double().mean(1).tolist()]
        assert percent == pytest.approx(golden["anytime_accuracy"][split], abs=1e-9)
    quotas = {
        "distribution": [geometric_quotas(ratio, 4, (0.85, 1, 0.5)) for ratio in DYN_PERCEIVER_RATIOS],
        "one_hot": list(torch.eye(4)),
    }
    assert golden["settings"].keys() == quotas.keys()
    for mode, settings in golden["settings"].items():
        for quota, setting in zip(quotas[mode], settings, strict=True):
            assert quota.tolist() == pytest.approx(setting["p"], rel=1e-6)
            thresholds = quota_thresholds(val.confidence, quota)
            assert torch.equal(thresholds, torch.tensor(setting["thresholds"]))
            for split, tables in {"val": val, "test": test}.items():
                result = simulate(tables.confidence, tables.correct, thresholds, recipe["flops"])
                assert 100 * result.accuracy == pytest.approx(setting[f"{split}_accuracy"], abs=1e-9)
                assert result.cost == pytest.approx(setting[f"{split}_expected_flops"], rel=1e-6)
                assert result.shares == pytest.approx(setting[f"{split}_exit_fractions"], abs=1e-9)
                if split == "test":
                    wanted = [torch.nan if x is None else x for x in setting["test_accuracy_per_exit"]]
                    per_exit = accuracy_per_exit(tables.correct, result.exit_index)
                    assert per_exit == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def dyn_perceiver_tables(recipe, split, fill):
    """Tables by the recipe in the file's note."""
    num_exits, num_samples, num_classes = shape = recipe[f"{split}_shape"]
    logits = torch.from_numpy(fill.draw(recipe[f"{split}_key"], tuple(shape)))
    labels = torch.arange(num_samples) % num_classes
    for k in range(num_exits):
        logits[k] *= recipe["sharpness"][k]
        logits[k, torch.arange(num_samples), labels] += recipe["label_bump"][k]
    if recipe["duplicate"]:
        logits, labels = torch.cat([logits, logits], dim=1), torch.cat([labels, labels])
    return SimpleNamespace(confidence=max_prob(logits).float(), correct=logits.argmax(-1) == labels)


def accuracy_per_exit(correct, exits):
    """Share of the samples leaving at an exit that it gets right, NaN where nobody leaves."""
    return [correct[k, exits == k].double().mean().item() for k in range(len(correct))]


def check_l2w_evaluation(golden, fill):
    for case in golden["cases"].values():
        val, test = (l2w_tables(case, split, fill) for split in ("val", "test"))
        assert [row["p_index"] for row in case["rows"]] == list(range(1, len(MSDNET_RATIOS) + 1))
        for ratio, row in zip(MSDNET_RATIOS, case["rows"], strict=True):
            thresholds = quota_thresholds(val.confidence, geometric_quotas(ratio, case["num_exits"]))
            assert torch.equal(thresholds, torch.tensor(row["thresholds"]))
            for split, tables in {"val": val, "test": test}.items():
                result = simulate(tables.confidence, tables.correct, thresholds, case["flops"])
                assert 100 * result.accuracy == pytest.approx(row[f"{split}_acc"], abs=1e-9)
                assert result.cost == pytest.approx(row[f"{split}_flops"], rel=1e-6)


def l2w_tables(case, split, fill):
    """Tables by the recipe in the file."""
    size = (case[f"n_{split}"], case["classes"])
    logits = torch.from_numpy(2 * fill.draw(f"{case['key']} {split}", (case["num_exits"], *size))).float()
    noise = torch.from_numpy(fill.draw(f"{case['key']} {split} noise", size))
    targets = (logits[-1].double() + noise).argmax(-1)
    return SimpleNamespace(confidence=max_prob(logits), correct=logits.argmax(-1) == targets)
