"""What `--procedure published` sets: its table, its way into training and evaluation, and back out of a run."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_dynamic
import main_earlyExit
from adaptive.flops import count
from experiment.options import options_of
from experiment.procedures import TABLE, implied, published, training_recipe
from experiment.published import understood
from experiment.recipe import GROUPS, read_command, words_of
from experiment.resume import as_started
from experiment.subject import EVALUATION
from models import create_model, list_models, model_class, tune
from training.schedules import lr_at

pytestmark = pytest.mark.usefixtures("costs_once", "no_pictures")
PERCEIVER = shlex.split("--model mobilenetV3_0x5_perceiver_t128 --num_latents 8 --SA_widening_factor 1")
PLAIN = shlex.split("--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0")
RUN = shlex.split("--num_workers 0 --device cpu")


def recipe_of(*words):
    return training_recipe(read_command(list(GROUPS.values()), list(words)))


def read_json(path):
    return json.loads(path.read_text())


# The table


def test_the_table_sets_known_flags_to_values_that_they_accept():
    training = {option.name: option for group in GROUPS.values() for option in options_of(group)}
    evaluation = {option.name: option for group in EVALUATION for option in options_of(group)}
    for row in TABLE:
        for flags, values in ((training, row.training), (evaluation, row.evaluation)):
            for name, value in values.items():
                restored = flags[name].restore(list(value) if isinstance(value, tuple) else value)
                assert restored == (list(value) if isinstance(value, tuple) else value)


def flags_in_words(values):
    words = [" ".join(words_of(name, value)) for name, value in values.items() if value]
    return f"`{' '.join(words)}`" if words else "-"


def test_the_documents_have_the_table():
    page = (Path(__file__).parents[2] / "docs/evaluate.md").read_text()
    for row in TABLE:
        given = [f"`{' '.join(row.models)}`", flags_in_words(row.evaluation), row.unit.name, row.near or "-"]
        line = f"| {row.family} | {' | '.join(given)} |\n"
        assert line in page, line
    text = (Path(__file__).parents[2] / "docs/train.md").read_text()
    assert {flags_in_words(row.training) for row in TABLE} == {"-", "`--decay_embeddings true`"}
    assert "`--decay_embeddings true` for a Dynamic Perceiver" in text


QUOTAS = {
    "weights": "model",
    "policies": "quotas",
    "confidence": "max_prob",
    "quota_sweep": "msdnet",
    "quota_scales": (),
}
RESIZED = {**QUOTAS, "interpolation": "bilinear"}


@pytest.mark.parametrize(
    ("name", "data_set", "l2w", "title", "evaluation", "unit"),
    [
        (
            "reg800m_perceiver_t128",
            "IMNET",
            False,
            "Dyn-Perceiver",
            QUOTAS
            | {"quota_sweep": "dyn_perceiver", "quota_scales": (0.85, 1.0, 0.5), "calib": "train_augmented"},
            "GFLOPs",
        ),
        ("msdnet_imagenet_step4", "IMNET", False, "MSDNet", RESIZED | {"calib": "held_out"}, "counter"),
        ("ranet", "CIFAR10", False, "RANet", RESIZED | {"calib": "held_out"}, "counter"),
        ("msdnet_cifar_lin5", "CIFAR10", True, "L2W", RESIZED | {"calib": "train_augmented"}, "counter"),
        (
            "ebjr",
            "CIFAR10",
            False,
            "EBJR on CIFAR-10",
            {
                "weights": "model",
                "policies": "quotas",
                "confidence": "energy_softmax",
                "calib": "none",
                "router_threshold": (2.46,),
            },
            "10^8 FLOPs",
        ),
        (
            "ebjr_cifar100",
            "CIFAR100",
            False,
            "EBJR on CIFAR-100",
            {
                "weights": "model",
                "policies": "quotas",
                "confidence": "energy_softmax",
                "calib": "none",
                "router_threshold": (4.6195,),
            },
            "10^8 FLOPs",
        ),
        ("rexnetv1_130", "IMNET", False, "ReXNet", {"weights": "model", "mode": "anytime"}, "MACs"),
    ],
)
def test_what_published_sets_for_each_family(name, data_set, l2w, title, evaluation, unit):
    row = published(name, data_set, l2w, {})
    assert row.family == title and row.evaluation == evaluation and unit in row.unit.name
    assert row.training == ({"decay_embeddings": True} if title == "Dyn-Perceiver" else {})
    assert implied("published", row) == {"procedure": "published", **evaluation}
    assert implied("ours", row) == implied("published", None) == {"procedure": "ours"}


@pytest.mark.parametrize(
    "name",
    ["timm/resnet18", "timm_ee", "cifar_resnet", "resnet50", "rexnet_ee_100", "boosted/msdnet", "ebjr"],
)
def test_networks_without_a_published_procedure(name):
    assert published(name, "IMNET", False, {}) is None


def test_thresholds_of_a_pair_are_not_for_longer_cascades():
    three = {"networks": ["cifar_alexnet"] * 3}
    assert published("ebjr", "CIFAR10", False, three) is None
    assert published("ebjr", "CIFAR10", False, {"networks": ["cifar_alexnet"] * 2}).num_exits == 2


def test_every_dyn_perceiver_has_the_four_exits_that_its_scales_are_for():
    names = list_models("*_perceiver_t*")
    assert len(names) >= 56 and {model_class(name).num_exits for name in names} == {4}
    assert {published(name, "", False, {}).family for name in names} == {"Dyn-Perceiver"}


# Training


def test_what_is_given_goes_before_the_procedure():
    assert recipe_of(*PERCEIVER).optimization.decay_embeddings
    assert recipe_of(*PERCEIVER, "--procedure", "published").network.procedure == "published"
    for words in ("--procedure ours", "--decay_embeddings false"):
        assert not recipe_of(*PERCEIVER, *words.split()).optimization.decay_embeddings
    assert recipe_of(*PERCEIVER, "--procedure", "ours").network.procedure == "ours"
    for words in ("--model cifar_resnet", "--model timm/resnet18 --procedure published"):
        assert recipe_of(*words.split()).network.procedure == "ours"
    for name in ("msdnet", "ranet", "rexnetv1"):  # their losses are as before
        assert not recipe_of("--model", name).optimization.decay_embeddings


def test_a_recipe_file_goes_before_the_procedure(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: reg400m_perceiver_t32\ndecay_embeddings: false\n")
    recipe = recipe_of("--recipe", str(path))
    assert recipe.network.procedure == "published" and not recipe.optimization.decay_embeddings


def test_a_dyn_perceiver_trains_as_published_without_flags(images, tmp_path, monkeypatch):
    """Six steps of the command line equal a hand-written AdamW that decays all but biases and 1-D weights."""
    words = [*PERCEIVER, *PLAIN, *RUN, "--data_set", "image_folder", "--data_path", str(images)]
    words += shlex.split(
        "--input_size 32 --num_calib 0 --batch_size 6 --lr 0.01 --warmup_epochs 0 --epochs 1"
    )
    words += ["--disable_eval", "true", "--output_dir", str(tmp_path), "--weight_decay", "0.5"]
    batches, start = [], {}
    objective_of = main_earlyExit.Classifier._objectives

    def noted(run):
        start.update({key: value.clone() for key, value in run.network.state_dict().items()})
        objectives = objective_of(run)

        def watch(inner):
            def objective(model, pictures, targets):
                batches.append((pictures.clone(), targets.clone(), torch.get_rng_state()))
                yield from inner(model, pictures, targets)

            return objective

        return {phase: watch(inner) for phase, inner in objectives.items()}

    monkeypatch.setattr(main_earlyExit.Classifier, "_objectives", noted)
    main_earlyExit.main(words)
    content = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert content["args"]["procedure"] == "published" and len(batches) == 6

    arch = content["arch"]
    network = create_model(arch["name"], arch["num_classes"], **arch["options"])
    network.load_state_dict(start)
    decayed = [p for name, p in network.named_parameters() if p.ndim > 1 and not name.endswith(".bias")]
    spared = [p for name, p in network.named_parameters() if p.ndim < 2 or name.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8, fused=True)
    for step, (pictures, targets, state) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(
                step, schedule="cosine", base=0.01, minimum=1e-6, warmup_steps=0, total_steps=6
            )
        torch.set_rng_state(state)
        weights = network.loss_weights or (1.0,) * 4
        tune(network.train(), "cpu")
        exits = network(pictures)
        loss = sum(w * F.cross_entropy(y, targets) for w, y in zip(weights, exits, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    there = network.state_dict()
    for key, value in content["model"].items():
        torch.testing.assert_close(value, there[key], rtol=0, atol=1e-6, msg=key)
    assert {"latent", "cross_att1_x2z.cross_attn.attention.relative_position_bias"} <= there.keys()


@pytest.mark.parametrize(("stored", "procedure"), [({}, "ours"), ({"procedure": "published"}, "published")])
def test_a_run_goes_on_by_the_procedure_that_it_was_started_by(stored, procedure):
    args = {"model": PERCEIVER[1], "decay_embeddings": procedure == "published", **stored}
    file = understood({"args": args}, "x.pth")
    for words in ("", "--procedure ours", "--procedure published"):
        recipe = as_started(recipe_of(*PERCEIVER, "--lr", "3", *words.split()), file)
        assert recipe.network.procedure == procedure and recipe.optimization.lr == 3
        assert recipe.optimization.decay_embeddings == (procedure == "published")
        assert recipe.options["num_latents"] == 8
    other = recipe_of("--model", "msdnet")
    assert as_started(other, file).optimization == other.optimization


def test_a_run_of_before_there_were_procedures_goes_on_as_it_was(images, tmp_path, capsys):
    words = [*PERCEIVER, *PLAIN, *RUN, "--data_set", "image_folder", "--data_path", str(images)]
    words += ["--input_size", "32", "--num_calib", "0", "--batch_size", "20", "--disable_eval", "true"]
    words += ["--save_ckpt_num", "0", "--output_dir", str(tmp_path)]
    main_earlyExit.main([*words, "--epochs", "1", "--procedure", "ours"])
    path = tmp_path / "checkpoint-last.pth"
    content = torch.load(path, weights_only=True)
    del content["args"]["procedure"]
    torch.save(content, path)
    capsys.readouterr()
    main_earlyExit.main([*words, "--epochs", "2"])
    assert f"procedure ours, going on from {path}" in capsys.readouterr().out
    args = torch.load(path, weights_only=True)["args"]
    assert (args["procedure"], args["decay_embeddings"]) == ("ours", False)


# Evaluation


def test_an_msdnet_is_evaluated_as_published_by_the_training_script(
    trained, tmp_path, capsys, read_log, images
):
    path = trained / "checkpoint-last.pth"
    words = ["--mode", "dynamic", "--output_dir", str(tmp_path), "--data_path", str(images), *RUN]
    main_earlyExit.main(["--eval", "true", "--resume", str(path), *words])
    printed = capsys.readouterr().out
    line = r"as published for MSDNet: 39 quotas, thresholds from held-out images \(--weights model --policies quotas --interpolation bilinear, dynamic.txt in F.*; "
    assert re.search(
        line
        + r"--procedure ours: --weights auto --policies search --interpolation bicubic, dynamic.txt in MACs\n",
        printed,
    )
    exits, rows = read_json(tmp_path / "anytime.json"), read_json(tmp_path / "dynamic.json")
    log = read_log(trained)[-1]
    assert [row["acc1"] for row in exits] == pytest.approx([log[f"test/acc1/exit{k}"] for k in range(2)])
    options = torch.load(path, weights_only=True)["arch"]["options"]
    costs = count(create_model("msdnet", 2, **options, lazy=False), (3, 32, 32)).papers
    pairs = [
        tuple(map(float, one.split("\t"))) for one in (tmp_path / "dynamic.txt").read_text().splitlines()
    ]
    assert len(pairs) == 39
    for (accuracy, cost), row in zip(pairs, rows, strict=True):
        assert accuracy == pytest.approx(100 * row["accuracy"], abs=1e-5)
        assert cost == pytest.approx(sum(s * c for s, c in zip(row["shares"], costs, strict=True)), abs=0.1)
        assert cost > row["macs"]  # ReLU, pooling, and maps that no exit reads
    known = read_json(tmp_path / "record.json")["provenance"]
    assert (known["procedure"], known["unit"]) == ("published", "FLOPs by the papers' counter")
    assert "published; costs in dynamic.txt are FLOPs by" in (tmp_path / "report.html").read_text()


def test_both_scripts_take_either_procedure(trained, evaluated, tmp_path, evaluate_into, images):
    path = trained / "checkpoint-last.pth"
    known = read_json(evaluated / "record.json")["provenance"]
    assert (known["procedure"], known["unit"]) == ("ours", "MACs")
    words = ["--mode", "dynamic", "--procedure", "published", "--data_path", images]
    evaluate_into(tmp_path / "a", path, *words)
    main_earlyExit.main(
        ["--eval", "true", "--resume", str(path), "--output_dir", str(tmp_path / "b"), *RUN, *map(str, words)]
    )
    for name in ("anytime.json", "dynamic.json", "dynamic.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "dynamic.json").read_bytes() != (evaluated / "dynamic.json").read_bytes()


def test_where_nothing_is_held_out_half_of_the_test_images_choose(trained, tmp_path, capsys, images):
    words = [
        "--checkpoint",
        str(trained / "checkpoint-last.pth"),
        "--data_path",
        str(images),
        "--num_calib",
        "0",
    ]
    words += ["--procedure", "published", "--mode", "dynamic", "--output_dir", str(tmp_path), *RUN]
    eval_dynamic.main(words)
    assert (
        "--weights model --policies quotas --interpolation bilinear --calib half_test, dynamic.txt in"
        in capsys.readouterr().out
    )
    assert "10 random test images" in read_json(tmp_path / "record.json")["provenance"]["calib"]


def test_a_network_that_nobody_published_is_evaluated_in_our_way(tmp_path, capsys):
    torch.manual_seed(0)
    weights = create_model("cifar_alexnet", 10).state_dict()
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": weights, "arch": {"name": "cifar_alexnet", "options": {}, "num_classes": 10}}, path)
    main_earlyExit.main(["--eval", "true", "--output_dir", str(tmp_path), "--mode", "dynamic", *RUN])
    said = "no procedure is published for cifar_alexnet: it is evaluated in our own way (--procedure ours)\n"
    assert said in capsys.readouterr().out
    known = read_json(tmp_path / "record.json")["provenance"]
    assert (known["procedure"], known["unit"]) == ("ours", "MACs")


@pytest.fixture
def pair(tmp_path):
    """Files of two small networks for CIFAR-10, and of test images."""
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(path, images=rng.integers(0, 256, (24, 32, 32, 3), np.uint8), labels=np.arange(24) % 10)
    names = []
    for depth in (8, 14):
        torch.manual_seed(depth)
        file = tmp_path / f"{depth}.pth.tar"
        torch.save({"state_dict": create_model("cifar_resnet", 10, depth=depth).state_dict()}, file)
        names.append(f"cifar_resnet:depth={depth},weights={file}")
    return names, ["--data_set", "CIFAR10", "--data_path", str(path), "--eval_data_path", str(path)]


def test_a_pair_is_evaluated_as_published_on_test_images_alone(pair, tmp_path, capsys):
    networks, data = pair
    words = ["--model", "ebjr", "--networks", *networks, *data, *RUN, "--output_dir", str(tmp_path / "out")]
    eval_dynamic.main([*words, "--procedure", "published", "--mode", "dynamic"])
    printed = capsys.readouterr().out
    assert "as published for EBJR on CIFAR-10: one threshold, test images only (" in printed
    assert "calibrate" not in printed and "images held out" not in printed
    (row,) = read_json(tmp_path / "out" / "dynamic.json")
    assert row["policy"] == "threshold 2.46" and row["confidence"] == "energy_softmax"
    routing = read_json(tmp_path / "out" / "routing.json")
    _, cost = (tmp_path / "out" / "dynamic.txt").read_text().split("\t")
    assert float(cost) == pytest.approx(routing["flops"] / 1e8, rel=1e-6) and routing["samples"] == 24
    # Of three networks nothing is published; our own way needs no threshold.
    cascade = [*words[:3], *networks, networks[0], *words[5:], "--num_calib", "4", "--mode", "dynamic"]
    eval_dynamic.main([*cascade, "--procedure", "published"])
    assert "no procedure is published for ebjr: " in capsys.readouterr().out
    assert len(read_json(tmp_path / "out" / "dynamic.json")) == 39


def test_no_images_for_thresholds_need_thresholds(pair, error_of):
    networks, data = pair
    words = ["--model", "ebjr", "--networks", *networks, *data, *RUN, "--calib", "none"]
    for more in (
        [],
        ["--router_threshold", "0.5", "--row", "0"],
        ["--router_threshold", "1", "--shares", "0.5"],
    ):
        line = error_of(eval_dynamic.main, *words, *more)
        assert line == "--calib none: give thresholds (--router_threshold) and no other goal or policy"
