#!/usr/bin/env bash
# Dynamic Perceiver on MobileNetV3-Large of 0.75 width, ImageNet, as published (https://arxiv.org/abs/2306.11248).
#
#   DATA=/path/to/imagenet bash scripts/train_dyn_perceiver_mobilenet_imagenet.sh runs/dyn_mobilenet
#
# Command of the Dynamic Perceiver repository: 8 GPUs, --batch_size 128 each --model mobilenetV3_0x75_perceiver_t128
#   --depth_factor 1 1 1 3 --SA_widening_factor 4 --spatial_reduction true --with_last_CA true --with_x2z true
#   --with_dwc true --with_z2x true --with_isc true --with_kd true --T_kd 1 --alpha_kd 0.5 --loss_cnn_factor 1
#   --loss_att_factor 0.5 --loss_merge_factor 1 --model_ema true --model_ema_eval true --epochs 600
#   --warmup_epochs 20 --lr 1e-3 --weight_decay 0.05, AdamW, default augmentation, no mixed precision.
# Dropout of 0.2 before the last layer of exits 2 and 3 is the network's default, as published.
# Published (not reproduced here): top-1 of exits 0 to 3 53.13 71.65 71.89 74.59; 9.299 M parameters.
# Hardware: 8 GPUs. GPUS=4, 2 or 1 keeps the batch of 1,024 by taking more micro-batches of 128 per step,
# so that batch norm still sees 128 images at a time. Hours: not measured.
# DATA holds train/ and val/ (https://image-net.org). As published, all 1,281,167 training images are trained on, the
# last epoch counts, and thresholds come from augmented training images:
#   bash scripts/eval_dyn_perceiver_imagenet.sh runs/dyn_mobilenet/checkpoint-best.pth --data_path "$DATA" --procedure published
# `--num_calib 50000` holds images out for both. Flags after the folder for results are added.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 1 "folder for results" "$@"
needs_data
out=$1 gpus=${GPUS:-8}
exec python "$root/scripts/launch.py" --nproc_per_node="$gpus" "$root/main_earlyExit.py" --model mobilenetV3_0x75_perceiver_t128 \
    --data_set IMNET --data_path "$DATA" --input_size 224 --output_dir "$out" --num_calib 0 \
    --depth_factor 1 1 1 3 --SA_widening_factor 4 --spatial_reduction true --with_last_CA true \
    --with_x2z true --with_dwc true --with_z2x true --with_isc true \
    --with_kd true --T_kd 1 --alpha_kd 0.5 --loss_cnn_factor 1 --loss_att_factor 0.5 --loss_merge_factor 1 \
    --epochs 600 --warmup_epochs 20 --batch_size 128 --global_batch 1024 \
    --opt adamw --lr 1e-3 --weight_decay 0.05 --decay_embeddings true --use_amp false \
    --model_ema true --model_ema_eval true "${@:2}"
