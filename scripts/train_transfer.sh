#!/usr/bin/env bash
# Fine-tunes ImageNet weights of a ReXNet, or of any network here, on a smaller data set.
#
#   DATA=/path/to/sets bash scripts/train_transfer.sh Flowers102 rexnetv1_100 rexnetv1_1.0.pth runs/flowers
#
# Data sets: Food101, StanfordCars, FGVCAircraft, Flowers102, OxfordIIITPet, in torchvision's folders under DATA;
# `--download true` fetches all but StanfordCars. Weights: a published .pth, one of timm's or torchvision's, or a
# checkpoint of main_earlyExit.py. Features learn at a tenth of the classifier's rate: `--lr_scales features.=0.1` is
# for ReXNet; for another network name the start of its features' parameters, as in `--lr_scales blocks.=0.1`.
# To train only the exits on a backbone that stays as it is: rexnet_ee_100 ... --freeze_backbone true.
# The settings are common ones, not those of a paper. Their accuracy was not measured here.
# Hardware: 1 GPU of 64 images; hours: not measured.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 4 "name of a data set, name of a network, file of weights, folder for results" "$@"
needs_data
set_=$1 model=$2 weights=$3 out=$4
exec python "$root/scripts/launch.py" --nproc_per_node="${GPUS:-1}" "$root/main_earlyExit.py" --model "$model" \
    --data_set "$set_" --data_path "$DATA" --input_size 224 --output_dir "$out" \
    --finetune "$weights" --lr_scales features.=0.1 --epochs 60 --warmup_epochs 3 --batch_size 64 \
    --opt nesterov --lr 0.05 --min_lr 1e-5 --momentum 0.9 --weight_decay 1e-4 --use_amp true \
    --aa rand-m9-mstd0.5 --reprob 0.1 --smoothing 0.1 --mixup 0 --cutmix 0 "${@:5}"
