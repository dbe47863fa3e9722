"""Command lines of the papers' programs are answered with the command that does the same here."""

import re
import shlex

import pytest
import torch

import eval_dynamic
import main_earlyExit
from experiment import published_commands as programs
from experiment.checks import check
from experiment.options import options_of
from experiment.procedures import published, training_recipe
from experiment.recipe import GROUPS, Recipe, read_command
from experiment.subject import EVALUATION
from models import create_model, list_models, model_options

ALL = list(GROUPS.values())
STEP4 = """--nBlocks 5 --stepmode even --step 4 --base 4 --nChannels 32 --growthRate 16 --grFactor 1-2-4-4
    --bnFactor 1-2-4-4"""
LIN5 = "--nBlocks 5 --stepmode lin_grow --step 1 --base 1 --nChannels 16"
L2W = """--data_url /data --arch msdnet --meta_net_hidden_size 500 --meta_net_num_layers 1 --meta_lr 1e-4
    --meta_weight_decay 1e-4 --target_p_index 15 --meta_net_input_type loss --lr 0.8 -j 16"""
REXNET = """--rex-width-mult 1.0 --opt sgd --amp --lr 0.5 --weight-decay 1e-5 --batch-size 128 --epochs 400
    --sched cosine --remode pixel --reprob 0.2 --drop 0.2 --aa rand-m9-mstd0.5"""
PAIR = """-d cifar10 --arch densenet --depth 52 --growthRate 6 --resume 52-6.pth.tar --tarch densenet --tdepth 64
    --tgrowthRate 12 --tresume 64-12.pth.tar --router_threshold 2.46 -j 4 --gpu-id 0"""


def answer_of(words, error_of, main=main_earlyExit.main):
    """The program that is named, and the words of the command that is suggested for it."""
    line = error_of(main, *shlex.split(words))
    match = re.fullmatch(r"this is (\S+)'s command line; here: (.*)", line)
    return match[1], shlex.split(match[2])


def recipe_of(words):
    """What a suggested command trains, checked as it would be."""
    script = words.index("main_earlyExit.py")
    recipe = training_recipe(read_command(ALL, words[script + 1 :]))
    check(recipe)
    return words[:script], recipe


def named_of(recipe, preset):
    """Whether a recipe's network is that of a preset."""
    known = {name: option.default for name, option in model_options(preset).items()}
    own = {name: option.default for name, option in model_options(recipe.network.model).items()}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in recipe.options.items()}
    assert own | given == known


def test_no_flag_of_ours_is_taken_for_another_program_s():
    ours = {option.name for group in [*ALL, *EVALUATION] for option in options_of(group)}
    for name in [*list_models(), "timm/resnet18", "boosted/msdnet"]:
        ours |= model_options(name).keys()
    assert not programs.MARKS.keys() & ours and "data" not in ours
    for words in (
        "--model msdnet --data_set CIFAR10 -h",
        "--model ebjr --router_threshold 2",
        "--datas cifar10",
    ):
        programs.refuse_published(shlex.split(words))


@pytest.mark.parametrize(
    ("words", "preset", "numbers"),
    [
        (
            f"--train_url c10 --data cifar10 {L2W} {LIN5} --epochs 300 --batch-size 1024 --meta_interval 1 "
            "--epsilon 0.8 --constraint_dimension col --seed 1",
            "msdnet_cifar_lin5",
            (300, 1024, 1, 0.8, "col", 1, "CIFAR10"),
        ),
        (
            f"--train_url=step4 --data ImageNet {L2W} {STEP4} --epochs 100 -b 4096 --meta_interval 100 "
            "--epsilon 0.3 --constraint_dimension mat --seed 0 --use_valid --lr-type multistep",
            "msdnet_imagenet_step4",
            (100, 4096, 100, 0.3, "mat", 0, "IMNET"),
        ),
    ],
)
def test_l2w_s_commands(words, preset, numbers, error_of):
    program, answer = answer_of(words, error_of)
    launcher, recipe = recipe_of(answer)
    named_of(recipe, preset)
    o, w = recipe.optimization, recipe.weighting
    found = (o.epochs, recipe.runtime.batch_size, w.meta_interval, w.epsilon, w.constraint_dimension)
    assert (*found, recipe.data.seed, recipe.data.data_set) == numbers
    assert program == "L2W" and launcher == ["python"] and w.l2w and recipe.data.num_calib == 0
    assert (w.meta_net_hidden_size, w.meta_lr, w.meta_weight_decay, w.target_p_index) == (500, 1e-4, 1e-4, 15)
    assert (o.opt, o.lr, o.min_lr, o.schedule, o.warmup_epochs) == ("sgd", 0.8, 0.0, "cosine", 0)
    assert not o.filter_bias_and_bn and o.weight_decay == 1e-4 and recipe.objective.smoothing == 0
    assert recipe.data.data_path == "/data" and recipe.runtime.num_workers == 16
    assert recipe.runtime.output_dir == {"CIFAR10": "c10", "IMNET": "step4"}[recipe.data.data_set]
    resized = "bicubic" if numbers[-1] == "CIFAR10" else "bilinear"
    assert recipe.transform.train_interpolation == recipe.view.interpolation == resized
    assert not recipe.data.drop_last


def test_what_l2w_s_command_leaves_open_is_as_there(error_of):
    words = "--data_url /data --data cifar100 --arch msdnet --epsilon 0.5 --constraint_dimension row"
    _, recipe = recipe_of(answer_of(words, error_of)[1])
    w, o = recipe.weighting, recipe.optimization
    assert (w.target_p_index, w.meta_net_hidden_size, w.meta_lr, w.meta_weight_decay) == (20, 100, 1e-5, 0)
    assert (w.meta_net_input_type, o.lr, recipe.runtime.batch_size) == ("both", 0.1, 64)
    assert recipe.options["nBlocks"] == 1 and recipe.options["nChannels"] == 32


@pytest.mark.parametrize(
    ("words", "preset", "numbers"),
    [
        (
            f"--data-root /data --data cifar100 --save out --arch msdnet --batch-size 64 --epochs 300 {LIN5} "
            "--use-valid -j 16",
            "msdnet_cifar_lin5",
            (300, 64, (150, 225), None, "CIFAR100"),
        ),
        (
            "--data-root /data --data cifar10 --save out --arch msdnet --batch-size 64 --epochs 200 --nBlocks 7 "
            "--stepmode even --step 2 --base 4 --nChannels 16 -j 16",
            "msdnet_cifar_even7",
            (200, 64, (100, 150), 0, "CIFAR10"),
        ),
        (
            f"--data-root /data --data ImageNet --save out --arch msdnet --batch-size 256 --epochs 90 {STEP4} "
            "--use-valid --gpu 0,1,2,3 -j 16",
            "msdnet_imagenet_step4",
            (90, 256, (30, 60), None, "IMNET"),
        ),
        (
            "--arch RANet --gpu '0,1' --data-root /data --data 'cifar10' --step 2 --nChannels 16 --stepmode 'lg' "
            "--scale-list '1-2-3' --grFactor '4-2-1' --bnFactor '4-2-1' --save out -j 16",
            "ranet_cifar_lg",
            (300, 64, (150, 225), 0, "CIFAR10"),
        ),
        (
            "--arch RANet --data-root /data --data ImageNet --step 8 --nChannels 32 --growthRate 16 --stepmode even "
            "--scale-list 1-2-3-4 --grFactor 4-2-2-1 --bnFactor 4-2-2-1 --save out -j 16",
            "ranet_imagenet_readme",
            (300, 64, tuple(range(30, 300, 30)), 0, "IMNET"),
        ),
    ],
)
def test_msdnet_s_and_ranet_s_commands(words, preset, numbers, error_of):
    program, answer = answer_of(words, error_of)
    _, recipe = recipe_of(answer)
    named_of(recipe, preset)
    o = recipe.optimization
    found = (o.epochs, recipe.runtime.batch_size, o.decay_epochs, recipe.data.num_calib, recipe.data.data_set)
    assert found == numbers and program == ("RANet" if preset.startswith("ranet") else "MSDNet")
    assert (o.schedule, o.decay_rate, o.lr, o.momentum, o.weight_decay) == ("multistep", 0.1, 0.1, 0.9, 1e-4)
    assert not recipe.weighting.l2w and not recipe.mixing.on and recipe.runtime.output_dir == "out"


@pytest.mark.parametrize(
    ("words", "mode", "calib", "title"),
    [
        (f"--data-root d --arch msdnet --data cifar10 {LIN5} --evalmode anytime", "anytime", None, "MSDNet"),
        (
            f"--data-root d --arch msdnet --data cifar10 {LIN5} --evalmode dynamic",
            "dynamic",
            "half_test",
            "MSDNet",
        ),
        (f"--arch msdnet {LIN5} --use-valid --evalmode dynamic --data cifar10", "dynamic", None, "MSDNet"),
        (
            "--arch RANet --data cifar10 --data-root d --evalmode both --gpu 0",
            "dynamic",
            "half_test",
            "RANet",
        ),
        (f"--data_url d --data ImageNet {STEP4} --evalmode dynamic", "dynamic", "train_augmented", "MSDNet"),
    ],
)
def test_commands_that_evaluate(words, mode, calib, title, error_of):
    for main in (main_earlyExit.main, eval_dynamic.main):
        _, answer = answer_of(f"{words} --evaluate-from some.pth.tar", error_of, main)
        assert answer[:2] == ["python", "eval_dynamic.py"]
        values, options = read_command(EVALUATION, answer[2:])
        assert (values["checkpoint"], values["mode"], values["procedure"]) == (
            "some.pth.tar",
            mode,
            "published",
        )
        assert values.get("calib") == calib and options["nBlocks"] in (2, 5)
        row = published(values["model"], values["data_set"], False, options)
        assert row.family == title


def test_ebjr_s_command(error_of):
    program, answer = answer_of(PAIR, error_of, eval_dynamic.main)
    values, options = read_command(EVALUATION, answer[2:])
    assert program == "EBJR" and answer[:2] == ["python", "eval_dynamic.py"] and values["model"] == "ebjr"
    assert (values["data_set"], values["data_path"], values["router_threshold"]) == (
        "CIFAR10",
        "data",
        [2.46],
    )
    shared = "compressionRate=2,dropRate=0"
    assert options["networks"] == [
        f"cifar_densenet:depth=52,growthRate=6,{shared},weights=52-6.pth.tar",
        f"cifar_densenet:depth=64,growthRate=12,{shared},weights=64-12.pth.tar",
    ]
    assert values["procedure"] == "published"
    words = (
        "-d cifar100 -a resnet --depth 20 --block-name BasicBlock -ta vgg16_bn --tresume 't 1.pth' --th 4.6"
    )
    _, answer = answer_of(words, error_of)
    values, options = read_command(EVALUATION, answer[2:])
    assert values["data_set"] == "CIFAR100" and values["router_threshold"] == [4.6]
    assert options["networks"][0].startswith(
        "cifar_resnet:depth=20,block_name=BasicBlock,weights=checkpoints/"
    )
    assert options["networks"][1] == "cifar_vgg16_bn:weights=t 1.pth"


@pytest.mark.parametrize(
    ("words", "launcher", "preset"),
    [
        (
            f"4 /imagenet/ --model rexnetv1 {REXNET}",
            ["python", "scripts/launch.py", "--nproc_per_node=4"],
            "rexnetv1",
        ),
        (f"--model rexnetv1 {REXNET} --pin-mem /imagenet/", ["python"], "rexnetv1"),
        (
            f"/imagenet/ --model rexnet_130 {REXNET.replace('--rex-width-mult 1.0', '')}",
            ["python"],
            "rexnetv1_130",
        ),
    ],
)
def test_rexnet_s_command(words, launcher, preset, error_of):
    program, answer = answer_of(words, error_of)
    started, recipe = recipe_of(answer)
    o = recipe.optimization
    assert program == "timm" and started == launcher and recipe.network.model == preset
    assert (o.opt, o.lr, o.weight_decay, o.epochs, o.schedule) == ("nesterov", 0.5, 1e-5, 400, "cosine")
    assert (o.warmup_epochs, recipe.objective.smoothing, recipe.mixing.on) == (3, 0.1, False)
    assert (recipe.transform.aa, recipe.transform.reprob) == ("rand-m9-mstd0.5", 0.2)
    assert (
        recipe.runtime.use_amp and recipe.runtime.batch_size == 128 and recipe.data.data_path == "/imagenet/"
    )
    assert recipe.options["dropout_ratio"] == 0.2
    with torch.device("meta"):
        assert create_model(preset, **recipe.options).num_exits == 1


def test_other_networks_of_timm_are_timm_s(error_of):
    _, answer = answer_of("/d --model mobilenetv3_small_050 --sched cosine --drop 0.1", error_of)
    _, recipe = recipe_of(answer)
    assert recipe.network.model == "timm/mobilenetv3_small_050" and recipe.options == {"drop_rate": 0.1}


def test_a_slip_in_a_command_of_ours_is_no_other_program_s(error_of):
    for words in ("--model msdnet --data CIFAR10", "--model reg400m_perceiver_t32 --amp true"):
        assert error_of(main_earlyExit.main, *words.split()).startswith("unknown flag --")


def test_the_published_commands_of_dyn_perceiver_run_as_they_are():
    words = "--model reg800m_perceiver_t128 --depth_factor 1 1 1 2 --loss_cnn_factor 1.0 --output_dir out"
    programs.refuse_published(words.split())
    assert Recipe.of(read_command(ALL, words.split()).values).objective.loss_cnn_factor == 1.0
