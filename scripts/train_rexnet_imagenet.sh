#!/usr/bin/env bash
# ReXNet and ReXNet-lite of any width, ImageNet, as published (https://arxiv.org/abs/2007.00992).
#
#   DATA=/path/to/imagenet bash scripts/train_rexnet_imagenet.sh rexnetv1_100 runs/rexnet
#
# Networks: rexnetv1_{090,100,130,150,200,220,300}, rexnetv1_lite_{100,130,150,200}, with exits rexnet_ee_..., _lite_...
# Recipe of the ReXNet repository: timm's train script on 4 GPUs of 128 images, --opt sgd --amp --lr 0.5
#   --weight-decay 1e-5 --epochs 400 --sched cosine --remode pixel --reprob 0.2 --drop 0.2 --aa rand-m9-mstd0.5,
#   and that script's defaults: momentum 0.9 (Nesterov's), smoothing 0.1, 3 epochs of warm-up, crops of 0.08 to 1.
# Wider networks may need --drop_path 0.1 or --mixup 0.2. Dropout of 0.2 is the networks' default.
# Published top-1 (not reproduced here): 0.9x 77.2, 1.0x 77.9, 1.3x 79.5, 1.5x 80.3, 2.0x 81.6, 3.0x 82.8;
# lite 1.0x 76.2, 1.3x 77.8, 1.5x 78.6, 2.0x 80.2. Hours: not measured.
# Hardware: 4 GPUs of 128 images; GPUS=1 or 2 takes more micro-batches per step instead. DATA holds train/ and val/
# (https://image-net.org); `--num_calib 0` trains on all images, as published.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 2 "name of a network, folder for results" "$@"
needs_data
model=$1 out=$2 gpus=${GPUS:-4}
exec python "$root/scripts/launch.py" --nproc_per_node="$gpus" "$root/main_earlyExit.py" --model "$model" \
    --data_set IMNET --data_path "$DATA" --input_size 224 --output_dir "$out" \
    --epochs 400 --warmup_epochs 3 --batch_size 128 --global_batch 512 \
    --opt nesterov --lr 0.5 --min_lr 1e-5 --momentum 0.9 --weight_decay 1e-5 --use_amp true \
    --aa rand-m9-mstd0.5 --reprob 0.2 --remode pixel --smoothing 0.1 --mixup 0 --cutmix 0 "${@:3}"
