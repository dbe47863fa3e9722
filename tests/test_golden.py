"""Agreement with the reference numbers: every file below $GOLDEN_DIR, whatever subset is there."""

import copy
import hashlib
import importlib.util
import json
import math
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from adaptive.confidence import max_prob
from adaptive.flops import count
from adaptive.thresholds import (
    DYN_PERCEIVER_RATIOS,
    MSDNET_RATIOS,
    geometric_quotas,
    quota_thresholds,
    simulate,
)
from models import create_model, list_models, model_options
from training import l2w
from training.directional import buffers_of
from training.l2w import SampleWeighting, Weighting
from training.losses import (
    Losses,
    exit_weights,
    joint_objective,
    kd_loss,
    self_distillation,
    soft_cross_entropy,
)
from training.optim import Optimization, Update, make_optimizer
from training.weight_net import WeightNet

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[2] / "shared" / "golden")
if not GOLDEN.is_dir():
    pytest.skip(f"no reference numbers at {GOLDEN}", allow_module_level=True)

FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.json"))

# Names that are generic outside the 32x32 networks have a prefix here.
CIFAR_NETS = re.compile(r"densenet|resnet|preresnet|wrn|resnext|vgg\d+(_bn)?|alexnet")
CLASSES = {"cifar10": 10, "cifar100": 100, "ImageNet": 1000}
HALVES = ("half1_train_first_meta_second", "half2_train_second_meta_first")  # of an L2W case


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
def test_agrees_with_the_reference(file, fill, on_meta):
    golden, base = json.loads((GOLDEN / file).read_text()), Path(file).name
    if base == "manifests.json":
        check = partial(check_manifests, on_meta=on_meta)
    elif base == "train_loss.json":
        check = check_train_loss
    elif base == "meta_step.json":
        check = check_meta_step
    elif base == "dynamic_eval.json":
        check = check_l2w_evaluation if "cases" in golden else check_dyn_perceiver_evaluation
    elif {"model", "state_dict", "exits"} <= golden.keys():
        check = partial(check_model, on_meta=on_meta)
    else:
        pytest.fail(f"no test knows what {file} is")
    check(golden, fill)


def check_model(golden, fill, on_meta):
    name, options = our_name(golden["model"]), our_options(golden["kwargs"])
    net = on_meta(name, **options)  # weights are filled in below
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == golden["state_dict"]
    # Released optimizer states number the parameters in this order.
    if "perceiver" in name:
        assert list(net.state_dict()) == list(golden["state_dict"])
    assert sum(p.numel() for p in net.parameters()) == golden["num_params"]
    check_costs(net, golden, partial(on_meta, name, **options))
    fill.fill_(net.to_empty(device="cpu"))
    with torch.no_grad():
        exits = net(fill.make_input(*golden["input_shape"]))
    assert len(exits) == len(golden["exits"]) == net.num_exits
    wrong = [k for k in range(net.num_exits) if not fill.matches(exits[k], golden["exits"][k], rtol=1e-6)]
    assert wrong == [], "exits whose outputs differ"


def check_costs(net, golden, on_meta):
    shape = tuple(golden["input_shape"][1:])
    ours = whole = count(net, shape)
    if "lazy" in model_options(our_name(golden["model"])):
        whole = count(
            on_meta(lazy=False), shape
        )  # what executes as its paper's program does is another network
    if "fvcore_by_operator_per_exit" in golden:  # fvcore drops what an exit does not read
        assert ours.macs == [ops["conv"] + ops["linear"] for ops in golden["fvcore_by_operator_per_exit"]]
    if "macs_executed_per_exit" in golden:
        assert whole.macs == golden["macs_executed_per_exit"]
        assert whole.papers == golden["flops_per_exit"]
    if "macs_per_exit" in golden:  # attention was rounded to four digits
        assert ours.macs == pytest.approx(golden["macs_per_exit"], rel=1e-5)
    if golden["model"] == "densenet":
        assert ours.papers[-1] == golden["reference_flops"]


def check_manifests(golden, fill, on_meta):
    ours = {
        name for name in list_models("*perceiver*") if not name.startswith("rexnet")
    }  # which were never published
    assert set(golden["models"]) == ours
    wrong = []
    for name, manifest in golden["models"].items():
        net = on_meta(name, **golden["kwargs"])
        shapes = {key: "x".join(map(str, tensor.shape)) for key, tensor in net.state_dict().items()}
        lines = "\n".join(sorted(f"{key} {shape}" for key, shape in shapes.items()))
        found = {"num_params": sum(p.numel() for p in net.parameters()), "num_entries": len(shapes)}
        found["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
        wrong += [name] if found != manifest else []
    assert wrong == []


def test_a_family_that_is_not_registered_fails(fill, on_meta):
    with pytest.raises(ValueError, match="unknown model 'wideresnet'"):
        check_model({"model": "wideresnet", "kwargs": {}}, fill, on_meta)


def check_meta_step(golden, fill):
    start = fill.fill_(create_model(golden["model"], **our_options(golden["model_kwargs"]))).train()
    inputs = set()
    for case in golden["cases"].values():
        # Second order takes long, and cases of the same inputs differ in the weights' centring and size alone.
        both = case["options"]["meta_net_input_type"] not in inputs
        inputs.add(case["options"]["meta_net_input_type"])
        for forward_mode in (True, False) if both else (True,):
            with pytest.MonkeyPatch.context() as patch:
                MetaStep(start, case, fill, forward_mode, patch).check([case[name] for name in HALVES])


def test_a_meta_step_in_which_exits_stay_without_samples(fill):
    """Three of five exits are judged by nobody; expected is what a graph of second order gives."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "epochs": 300}
    options |= {"meta_lr": 1e-4, "meta_weight_decay": 1e-4, "meta_interval": 1, "meta_net_input_type": "loss"}
    options |= {"meta_net_hidden_size": 20, "meta_net_num_layers": 1, "target_p_index": 4}
    options |= {"constraint_dimension": "mat", "epsilon": 0.3, "batch": 12, "input_key": "input"}
    model = {"nBlocks": 5, "nChannels": 8, "growthRate": 4, "grFactor": (1, 2), "bnFactor": (1, 2)}
    start = fill.fill_(create_model("msdnet", 10, **model)).train()
    case = recorded(start, options, fill)
    assert [len(rows) for rows in case[HALVES[0]]["9_selected"]] == [4, 0, 0, 0, 2]
    check_meta_step(
        {"model": "msdnet", "model_kwargs": {**model, "num_classes": 10}, "cases": {"": case}}, fill
    )


def recorded(start, options, fill):
    """A case of the L2W golden, by the published steps written out for inputs and centring of these options."""
    shares = torch.tensor([(options["target_p_index"] / 20) ** k for k in range(1, start.num_exits + 1)])
    case = {"options": options, "target_probs_float32": (shares / shares.sum()).tolist()}
    net, hidden = copy.deepcopy(start), options["meta_net_hidden_size"]
    weight_net = fill.fill_(WeightNet(start.num_exits, start.num_exits, hidden=hidden))
    case["meta_net_state_dict"] = {name: list(p.shape) for name, p in weight_net.state_dict().items()}
    decay = options["weight_decay"]
    sgd = torch.optim.SGD(net.parameters(), options["lr"], options["momentum"], weight_decay=decay)
    adam = torch.optim.Adam(
        weight_net.parameters(), options["meta_lr"], weight_decay=options["meta_weight_decay"]
    )
    n = options["batch"]
    images = torch.from_numpy(fill.draw(options["input_key"], (n, 3, 32, 32)))
    parts = list(zip(images.chunk(2), (torch.arange(n) % 10).chunk(2), strict=True))
    for name, (train, judge) in zip(HALVES, (parts, parts[::-1]), strict=True):
        case[name] = recorded_half(net, weight_net, sgd, adam, options, case, train, judge, fill)
    return case


def recorded_half(net, weight_net, sgd, adam, options, case, train, judge, fill):
    named, before = dict(net.named_parameters()), [p.detach().clone() for p in net.parameters()]
    meta_named = dict(weight_net.named_parameters())
    meta_before = {name: p.detach().clone() for name, p in meta_named.items()}
    losses = torch.stack([F.cross_entropy(y, train[1], reduction="none") for y in net(train[0])], 1)

    def weighed():
        raw = weight_net(losses.detach())
        return raw, 1 + options["epsilon"] * (raw - raw.mean())

    raw, weights = weighed()
    half = {"1_pseudo_losses": losses.tolist(), "2_meta_net_input": losses.tolist()}
    half |= {"3_raw_weights": raw.tolist(), "4_weights": weights.tolist()}
    pseudo = (weights * losses).mean(0).sum()
    gradients = torch.autograd.grad(pseudo, named.values(), create_graph=True)
    half |= {"5_pseudo_loss": pseudo.item(), "6_pseudo_grad_norm": norm(gradients)}
    moved = {}
    for (name, p), gradient in zip(named.items(), gradients, strict=True):
        buffer = sgd.state[p].get("momentum_buffer", torch.zeros(()))
        step = options["momentum"] * buffer + gradient + options["weight_decay"] * p
        moved[name] = p - options["lr"] * step
    half["7_pseudo_param_norm"] = norm(moved.values())
    half["7_pseudo_delta_norm"] = norm(moved[name] - p for name, p in named.items())
    judged = functional_call(net, moved | buffers_of(net), judge[0])
    half["8_meta_logits"] = list(map(fill.summary, judged))
    left, half["9_selected"] = set(range(len(judge[1]))), []
    for y, share in zip(judged, case["target_probs_float32"], strict=True):
        count = len(left) if y is judged[-1] else int(len(judge[1]) * share)
        order = y.softmax(1).amax(1).argsort(descending=True).tolist()
        half["9_selected"].append([i for i in order if i in left][:count])
        left -= set(half["9_selected"][-1])
    pairs = zip(judged, half["9_selected"], strict=True)
    meta_loss = sum(F.cross_entropy(y[rows], judge[1][rows]) for y, rows in pairs if rows)
    half["10_meta_loss"] = meta_loss.item()
    found = torch.autograd.grad(meta_loss, meta_named.values(), retain_graph=True)
    half["11_meta_grad_norm"] = {name: g.norm().item() for name, g in zip(meta_named, found, strict=True)}
    half["11_meta_grad_output_bias"] = found[-1].tolist()
    for p, gradient in zip(meta_named.values(), found, strict=True):
        p.grad = gradient
    adam.step()
    deltas = {name: p.detach() - meta_before[name] for name, p in meta_named.items()}
    half["12_meta_param_norm_after"] = {name: p.norm().item() for name, p in meta_named.items()}
    half["12_meta_delta_norm"] = {name: d.norm().item() for name, d in deltas.items()}
    half["12_meta_delta_sum"] = {name: d.sum().item() for name, d in deltas.items()}
    raw, weights = weighed()
    per_exit = (weights.detach() * losses).mean(0)
    half |= {"14_raw_weights": raw.tolist(), "14_weights": weights.tolist()}
    half |= {"15_weighted_loss_per_exit": per_exit.tolist(), "15_weighted_loss": per_exit.sum().item()}
    sgd.zero_grad()
    per_exit.sum().backward()
    sgd.step()
    half["17_param_norm_after"] = norm(net.parameters())
    half["17_delta_norm"] = norm(p.detach() - old for p, old in zip(net.parameters(), before, strict=True))
    for kind in ("mean", "var"):
        buffers = [b for name, b in net.named_buffers() if name.endswith(f"running_{kind}")]
        half[f"18_running_{kind}_norm"] = norm(buffers)
    return half


def near(value, atol=0.0):
    return pytest.approx(value, rel=1e-8, abs=atol)


def norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


STEPS = ("loss_table", "weight_inputs", "sample_weights", "_gradients", "look_ahead", "functional_call")
STEPS += ("assign_exits", "judgement")


class MetaStep:
    """The set-up of the L2W golden, and what each function of an iteration is given and gives."""

    def __init__(self, net, case, fill, forward_mode, patch):
        self.fill, options = fill, case["options"]
        self.net = copy.deepcopy(net)
        given = {name: options[name] for name in ("lr", "weight_decay", "momentum")}
        sgd = Optimization(opt="sgd", opt_eps=None, filter_bias_and_bn=False, **given)
        optimizer = make_optimizer(self.net, sgd)
        rates = {name: lambda step, value=options[name]: value for name in ("lr", "weight_decay")}
        self.update = Update(self.net, optimizer, **rates)
        proportions = geometric_quotas(options["target_p_index"] / 20, self.net.num_exits)
        assert proportions.tolist() == pytest.approx(case["target_probs_float32"], rel=1e-6)
        self.objective = SampleWeighting(
            Weighting(**{name: options[name] for name in Weighting.__annotations__ if name in options}),
            self.update,
            Losses([1.0] * self.net.num_exits),
            proportions=proportions,
            batches=1000,
            epochs=options["epochs"],
            forward_mode=forward_mode,
        )
        self.weight_net = fill.fill_(self.objective.weight_net)
        shapes = {name: list(p.shape) for name, p in self.weight_net.state_dict().items()}
        assert shapes == case["meta_net_state_dict"]
        n = options["batch"]
        self.images = torch.from_numpy(fill.draw(options["input_key"], (n, 3, 32, 32)))
        self.targets = torch.arange(n) % 10
        self.before = self.snapshot()
        self.calls = {}
        for name in STEPS:
            patch.setattr(l2w, name, partial(self.call, name, getattr(l2w, name)))

    def call(self, name, function, *args, **options):
        result = function(*args, **options)
        self.calls.setdefault(name, []).append((args, result))
        return result

    def snapshot(self):
        return [[p.detach().clone() for p in net.parameters()] for net in (self.net, self.weight_net)]

    def check(self, halves):
        for half, (loss, _) in zip(halves, self.objective(self.net, self.images, self.targets), strict=True):
            self.check_learning(half)
            self.check_weight_net(half)
            assert loss.item() == near(half["15_weighted_loss"])
            self.update(loss)
            self.check_after(half)
            self.calls.clear()

    def check_learning(self, half):
        """The steps of a half until the weights are learned and applied."""
        results = {name: [result for _, result in calls] for name, calls in self.calls.items()}
        losses = results["loss_table"][0]
        assert losses.tolist() == [near(row) for row in half["1_pseudo_losses"]]
        (inputs,) = results["weight_inputs"]
        assert inputs.tolist() == [near(row) for row in half["2_meta_net_input"]]
        names = ("3_raw_weights", "4_weights"), ("14_raw_weights", "14_weights")  # before and after it learns
        for (of_raw, of_weights), call in zip(names, self.calls["sample_weights"], strict=True):
            (raw, *_), weights = call
            assert raw.tolist() == [near(row) for row in half[of_raw]]
            assert weights.tolist() == [near(row) for row in half[of_weights]]
        assert (weights * losses).mean(0).tolist() == near(half["15_weighted_loss_per_exit"])
        (pseudo_loss, _), gradients = self.calls["_gradients"][0]
        assert pseudo_loss.item() == near(half["5_pseudo_loss"])
        assert norm(gradients.values()) == near(half["6_pseudo_grad_norm"])
        ((moved, _),) = results["look_ahead"]
        assert norm(moved.values()) == near(half["7_pseudo_param_norm"])
        assert norm(moved[p] - p for p in moved) == near(half["7_pseudo_delta_norm"])
        (judged,) = results["functional_call"]
        assert all(map(self.fill.matches, judged, half["8_meta_logits"]))
        (assigned,) = results["assign_exits"]
        assert [rows.tolist() for rows in assigned] == half["9_selected"]
        (meta_loss,) = results["judgement"]
        assert meta_loss.item() == near(half["10_meta_loss"])
        norms = {name: p.grad.norm().item() for name, p in self.weight_net.named_parameters()}
        assert norms == near(half["11_meta_grad_norm"])
        assert list(self.weight_net.parameters())[-1].grad.tolist() == near(half["11_meta_grad_output_bias"])

    def check_weight_net(self, half):
        pairs = zip(self.weight_net.named_parameters(), self.before[1], strict=True)
        deltas = {name: (p.detach() - old) for (name, p), old in pairs}
        after = {name: p.norm().item() for name, p in self.weight_net.named_parameters()}
        assert after == near(half["12_meta_param_norm_after"])
        assert {name: d.norm().item() for name, d in deltas.items()} == near(half["12_meta_delta_norm"])
        assert {name: d.sum().item() for name, d in deltas.items()} == near(
            half["12_meta_delta_sum"], atol=1e-9
        )

    def check_after(self, half):
        self.check_weight_net(half)
        now = self.snapshot()
        assert norm(now[0]) == near(half["17_param_norm_after"])
        assert norm(a - b for a, b in zip(now[0], self.before[0], strict=True)) == near(half["17_delta_norm"])
        for kind in ("mean", "var"):
            buffers = [b for name, b in self.net.named_buffers() if name.endswith(f"running_{kind}")]
            assert norm(buffers) == near(half[f"18_running_{kind}_norm"])
        self.before = now


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
        known = []  # slopes of the loss by the exits, and norms of gradients
        for case in (case for case in golden["cases"] if case["mode"] == mode):
            targets, smoothing = criteria[case["criterion"]]
            factors = {name: case[f"loss_{name}_factor"] for name in ("att", "cnn", "merge")}
            distil = self_distillation(case["alpha_kd"], case["T_kd"])
            objective = joint_objective(Losses(exit_weights(4, **factors), smoothing, distil))
            leaves = [logits.detach().requires_grad_() for logits in exits]
            ((loss, _),) = objective(lambda _, leaves=leaves: leaves, images, targets)
            assert loss.item() == pytest.approx(case["loss"], rel=1e-7)
            for k, name in enumerate(("early3", "att", "cnn", "merge")):
                task = soft_cross_entropy(exits[k], targets, smoothing).item()
                assert task == pytest.approx(case["terms"][f"task_{name}"], rel=1e-7)
                if k < 3:
                    kd = kd_loss(exits[k], exits[-1], case["T_kd"]).item()
                    assert kd == pytest.approx(case["terms"][f"kd_{name}"], rel=1e-7)
            slopes = torch.cat(torch.autograd.grad(loss, leaves))
            same = [norms for other, norms in known if torch.allclose(slopes, other, rtol=1e-12, atol=1e-15)]
            norms = same[0] if same else gradient_norms(net, exits, slopes.chunk(len(exits)))
            known.append((slopes, norms))
            assert math.hypot(*norms.values()) == pytest.approx(case["grad_norm_total"], rel=1e-7)
            for name, norm in case["grad_norms"].items():
                assert norms[name] == pytest.approx(norm, rel=1e-7), name


def gradient_norms(net, exits, slopes):
    """The norm of every parameter's gradient, by name, where the loss has these slopes by the exits."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients = torch.autograd.grad(exits, parameters, slopes, retain_graph=True)
    return {name: gradient.norm().item() for name, gradient in zip(names, gradients, strict=True)}


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
    # Equal on a CPU with AVX-512; one with AVX2 alone rounds softmax otherwise.
    rounding = 0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2**-22
    for case in golden["cases"].values():
        val, test = (l2w_tables(case, split, fill) for split in ("val", "test"))
        assert [row["p_index"] for row in case["rows"]] == list(range(1, len(MSDNET_RATIOS) + 1))
        for ratio, row in zip(MSDNET_RATIOS, case["rows"], strict=True):
            thresholds = quota_thresholds(val.confidence, geometric_quotas(ratio, case["num_exits"]))
            torch.testing.assert_close(thresholds, torch.tensor(row["thresholds"]), rtol=rounding, atol=0)
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
