#!/usr/bin/env bash
# MSDNet (https://arxiv.org/abs/1703.09844, section 5) and RANet (https://arxiv.org/abs/2003.07326), which is trained in
# the same way, on ImageNet, with the settings of their authors.
#
#   DATA=/path/to/imagenet bash scripts/train_msdnet_imagenet.sh msdnet_imagenet_step4 runs/msdnet_step4
#   ... ranet_imagenet ...     RANet with 64 channels; ranet_imagenet_script and ranet_imagenet_readme have 16 and 32
#
# Command of the MSDNet repository: --nBlocks 5 --stepmode even --step 4 --base 4 --nChannels 32 --growthRate 16
#   --grFactor 1-2-4-4 --bnFactor 1-2-4-4 --epochs 90 --batch-size 256 --lr 0.1 (decayed every 30 epochs)
#   --momentum 0.9 --weight-decay 1e-4 (biases and batch norm too).
# Those of the RANet repository name neither epochs nor batch: its script's defaults are 300 epochs of 64, the rest as above.
#   As long as MSDNet's is `--epochs 90 --decay_epochs 30 60 --batch_size 32`, the last per GPU.
# Hardware: 8 GPUs, 32 images each (RANet 8). Published top-1 of the five exits (step 7, base 7, measured by a user of the released
# model): 62.90 70.32 73.00 73.59 74.59; of RANet's eight (64 channels, figure): 63.1 67.4 69.5 70.4 74.0 74.6 74.7 74.8; not
# reproduced here. DATA holds train/ and val/ (https://image-net.org). 50,000 of the 1,281,167 training images are held out, as
# for the released MSDNet, to choose the best epoch and thresholds; `--num_calib 0` trains on all.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 2 "name of a network, folder for results" "$@"
needs_data
model=$1 out=$2 gpus=${GPUS:-8} epochs=90 batch=256
case $model in ranet*) epochs=300 batch=64 ;; esac
[ $((batch % (gpus * nodes))) = 0 ] || fail "GPUS=$gpus on $nodes machines does not divide $batch"
exec python "$root/scripts/launch.py" --nproc_per_node="$gpus" "$root/main_earlyExit.py" --model "$model" \
    --data_set IMNET --data_path "$DATA" --output_dir "$out" \
    --epochs "$epochs" --batch_size $((batch / gpus / nodes)) --drop_last false \
    --opt sgd --lr 0.1 --momentum 0.9 --weight_decay 1e-4 --filter_bias_and_bn false \
    --schedule multistep --decay_epochs $(seq 30 30 $((epochs - 1))) --decay_rate 0.1 --warmup_epochs 0 \
    --train_interpolation bilinear --interpolation bilinear \
    --smoothing 0 --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 "${@:3}"
