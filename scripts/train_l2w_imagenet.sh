#!/usr/bin/env bash
# MSDNet on ImageNet with learned sample weights (L2W, https://arxiv.org/abs/2209.08310), one machine or several.
#
#   DATA=/path/to/imagenet bash scripts/train_l2w_imagenet.sh msdnet_imagenet_step4 runs/l2w_step4
#   DATA=/path/to/imagenet sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 scripts/slurm.sh \
#       bash scripts/train_l2w_imagenet.sh msdnet_imagenet_step4 runs/l2w_step4
#
# Command of the L2W repository: --epochs 100 --batch-size 4096 --lr 0.8 --meta_net_hidden_size 500
#   --meta_net_num_layers 1 --meta_interval 100 --meta_lr 1e-4 --meta_weight_decay 1e-4 --epsilon 0.3
#   --target_p_index 15 --meta_net_input_type loss --constraint_dimension mat --seed 0; SGD, momentum 0.9, cosine.
# Hardware: 32 GPUs of 128 images; others with GPUS (per machine). Published top-1 of the five exits: step 4 59.54
# 67.22 71.03 72.33 73.93, step 6 60.05 69.13 73.33 75.19 76.30, step 7 59.24 69.65 73.94 75.66 76.72; with 300 epochs and
# smoothing 0.1 step 4 61.64 67.89 71.61 73.82 75.03; not reproduced here. DATA holds train/ and val/.
# As published, all 1,281,167 images are trained on, the last epoch counts, and thresholds come from augmented training images:
#   bash scripts/eval_msdnet.sh runs/l2w_step4/checkpoint-best.pth --data_path "$DATA" --procedure published
# `--num_calib 50000` holds images out for both.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 2 "name of a network, folder for results" "$@"
needs_data
model=$1 out=$2 gpus=${GPUS:-8}
exec python "$root/scripts/launch.py" --nproc_per_node="$gpus" "$root/main_earlyExit.py" --model "$model" --data_set IMNET \
    --data_path "$DATA" --output_dir "$out" --num_calib 0 --drop_last false \
    --epochs 100 --batch_size $((4096 / (nodes * gpus))) --opt sgd --lr 0.8 --min_lr 0 --momentum 0.9 \
    --weight_decay 1e-4 --filter_bias_and_bn false --warmup_epochs 0 --seed 0 \
    --train_interpolation bilinear --interpolation bilinear \
    --l2w true --meta_net_hidden_size 500 --meta_net_num_layers 1 --meta_interval 100 --meta_lr 1e-4 \
    --meta_weight_decay 1e-4 --epsilon 0.3 --target_p_index 15 --meta_net_input_type loss --constraint_dimension mat \
    --smoothing 0 --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 "${@:3}"
