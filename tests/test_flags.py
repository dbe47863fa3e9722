"""The flags of the command line and their defaults are frozen."""

import pytest

import main_earlyExit
from experiment.options import options_of
from experiment.recipe import GROUPS
from experiment.subject import EVALUATION
from utils import WORKERS

# Defaults of Dyn-Perceiver's script, unless said otherwise.
SHARED_DEFAULTS = {
    "data_set": "DIGITS",  # there IMNET
    "data_path": None,  # there a cluster's folder
    "eval_data_path": None,
    "nb_classes": None,  # there 1000; None is "the data set's own", also below
    "input_size": None,  # there 224
    "imagenet_default_mean_and_std": True,
    "crop_pct": None,
    "interpolation": "bicubic",  # as there
    "seed": 0,
    "output_dir": "",
    "device": "auto",  # there cuda
    "batch_size": 64,
    "num_workers": WORKERS,  # there 10
    "pin_mem": True,
    "use_amp": False,
    # not there
    "mean": None,
    "std": None,
    "num_calib": None,
    "drop_last": True,  # as it does
    "epoch_images": 0,
    "download": False,
    "train_split": "train",
    "val_split": "validation",
    "calib_split": None,
    "on_bad_image": "error",
    "max_bad_images": 0.001,
    "amp_dtype": "auto",
    "channels_last": False,
    "flops": False,
    "mode": "all",
    "confidence": "max_prob",
    "answer": "exit",
    "temperature": False,
    "calib": "held_out",
    "policies": "search",
    "quota_sweep": "msdnet",
    "quota_scales": (),
    "router_threshold": (),
    "shares": (),
    "popular_classes": (),
    "budget": (),
    "latency": (),
    "latency_of": "mean",
    "accuracy": (),
    "drop": (),
    "harm": (),
    "disagreement": (),
    "exit_error": (),
    "confidence_level": None,
    "guarantee": "ltt",
    "mapped_accuracy": (),
    "row": (),
    "policy": "",
    "backend": "eager",
    "precision": "fp32",
    "export": "",
    "export_compiled": False,
    "runtime_images": 2000,
    "micro_batch": None,
    "fold_bn": True,
    "weights": "auto",
    "model": "",  # there convnext_tiny, which is no model here
    "recipe": "",
    "procedure": None,  # published in main_earlyExit.py, ours in eval_dynamic.py
}
TRAIN_DEFAULTS = {
    "update_freq": 1,
    "global_batch": None,
    "epochs": 300,
    "classifier_type": "cnn",
    "with_kd": False,
    "energy_hinge": (),
    "T_kd": 4.0,
    "alpha_kd": 0.5,
    "layer_scale_init_value": 1e-6,
    "model_ema": False,
    "model_ema_decay": 0.9999,
    "kd_teacher": "",
    "regime": "joint",
    "first_share": 0.5,
    "freeze_backbone": False,
    "cache_features": False,
    "cache_views": 1,
    "cache_dir": "",
    "l2w": False,
    "target_p_index": 15,
    "epsilon": 0.8,
    "constraint_dimension": "col",
    "meta_net_input_type": "loss",
    "meta_net_hidden_size": 500,
    "meta_net_num_layers": 1,
    "meta_interval": 1,
    "meta_lr": 1e-4,
    "meta_weight_decay": 1e-4,
    "l2w_tables": 0,
    "low_size": 0,
    "low_share": 0.4,
    "model_ema_warmup": False,
    "model_ema_force_cpu": False,
    "model_ema_eval": False,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "clip_grad": None,
    "decay_embeddings": False,  # there always
    "momentum": 0.9,
    "weight_decay": 0.05,
    "weight_decay_end": None,
    "lr": 4e-3,
    "layer_decay": 1.0,
    "min_lr": 1e-6,
    "lr_scales": (),
    "warmup_epochs": 20,
    "warmup_steps": -1,
    "loss_cnn_factor": None,  # there 0.25, what it is here too once another one is given
    "loss_att_factor": None,  # there 0.25
    "loss_merge_factor": None,  # there 0.5
    "color_jitter": 0.4,
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "scale": (0.08, 1.0),  # fixed there
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "resplit": False,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "finetune": "",
    "head_init_scale": 1.0,
    "model_key": "model|module|state_dict_ema",
    "model_prefix": "",
    "log_dir": None,
    "resume": "",
    "auto_resume": True,
    "other_world_size": "keep",
    "save_ckpt": True,
    "save_ckpt_freq": 1,
    "save_ckpt_num": 3,
    "save_every_steps": 0,
    "save_every_minutes": 15.0,
    "requeue_code": 75,
    "start_epoch": 0,
    "eval": False,
    "dist_eval": True,
    "disable_eval": False,
    "world_size": 1,
    "local_rank": -1,
    "dist_on_itp": False,
    "dist_url": "env://",
    "enable_wandb": False,
    "project": "dynexit",  # there convnext
    "wandb_ckpt": False,
    "cka": False,
    "visualize": False,
    # not there
    "filter_bias_and_bn": True,
    "scale_lr": False,
    "schedule": "cosine",
    "decay_epochs": (),
    "decay_rate": 0.1,
    "exit_weights": None,
    "print_freq": 50,
    "compile": False,
    "flip": "random",
    "device_data": False,
}


def defaults(groups):
    flags = [flag for group in groups for flag in options_of(group)]
    assert len(flags) == len({flag.name for flag in flags})
    return {flag.name: flag.default for flag in flags}


def test_flags_of_training_are_frozen():
    assert defaults(GROUPS.values()) == SHARED_DEFAULTS | TRAIN_DEFAULTS


def test_flags_of_evaluation_are_frozen():
    assert defaults(EVALUATION) == SHARED_DEFAULTS | {"checkpoint": None}


def test_flags_that_do_nothing_are_documented_with_their_reason(capsys):
    with pytest.raises(SystemExit):
        main_earlyExit.main(["--help", "--model", "msdnet"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--layer_decay FLOAT defined for ConvNeXt only" in text
    assert "options of msdnet" in text and "--stepmode STR default: lin_grow" in text
