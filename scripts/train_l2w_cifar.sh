#!/usr/bin/env bash
# MSDNet, RANet or any other network on CIFAR-10 or -100 with learned sample weights (L2W, https://arxiv.org/abs/2209.08310).
#
#   DATA=/path/to/torchvision/data bash scripts/train_l2w_cifar.sh CIFAR10 msdnet_cifar_lin5 runs/l2w_c10
#
# Command of the L2W repository: msdnet, --epochs 300 --batch-size 1024 --lr 0.8 --meta_net_hidden_size 500
#   --meta_net_num_layers 1 --meta_interval 1 --meta_lr 1e-4 --meta_weight_decay 1e-4 --epsilon 0.8
#   --target_p_index 15 --meta_net_input_type loss --constraint_dimension col --seed 1; SGD, momentum 0.9, cosine.
# Hardware: one GPU. Published (read off figures, dynamic): CIFAR-10 94.0 % at 18 M, at most 94.75; CIFAR-100 at most 76.0, 75 % at
# 49 M; not reproduced here. DATA is what train_msdnet_cifar.sh takes. Flags after the three arguments are added.
# As published, all 50,000 images are trained on, the last epoch counts, and thresholds come from augmented training images:
#   bash scripts/eval_msdnet.sh runs/l2w_c10/checkpoint-best.pth --data_path "$DATA" --procedure published
# `--num_calib 5000` holds images out for both.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 3 "CIFAR10 or CIFAR100, name of a network, folder for results" "$@"
needs_data
data_set=$1 model=$2 out=$3
exec python "$root/main_earlyExit.py" --model "$model" --data_set "$data_set" \
    --data_path "$DATA" --output_dir "$out" --num_calib 0 --drop_last false \
    --epochs 300 --batch_size 1024 --opt sgd --lr 0.8 --min_lr 0 --momentum 0.9 --weight_decay 1e-4 \
    --filter_bias_and_bn false --warmup_epochs 0 --seed 1 \
    --l2w true --meta_net_hidden_size 500 --meta_net_num_layers 1 --meta_interval 1 --meta_lr 1e-4 \
    --meta_weight_decay 1e-4 --epsilon 0.8 --target_p_index 15 --meta_net_input_type loss --constraint_dimension col \
    --smoothing 0 --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 "${@:4}"
