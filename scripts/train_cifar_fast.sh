#!/usr/bin/env bash
# A network on CIFAR-10 or CIFAR-100 in few epochs, as fast programs for CIFAR train theirs (https://arxiv.org/abs/2404.00498):
# Muon, a triangle of learning rates and label smoothing, which pay for MSDNet here; bf16 and channels-last, as more images fit
# into the same time; neither alternating flips nor a start on smaller images, which are not shown to pay.
# docs/train.md has measurements and flags for other networks.
#
#   DATA=/path/to/torchvision/data bash scripts/train_cifar_fast.sh CIFAR10 msdnet_cifar_lin5 runs/msdnet_fast
#
# Hardware: one GPU. On a CPU, where a small network's step gains little from a second thread, a process per core is faster:
# OMP_NUM_THREADS=1 PROCESSES=2 DATA=... bash ... (2 cores). A step has 128 images however many processes share them.
# To a CPU without bf16 instructions (AVX2 alone) give --use_amp false.
# Published: nothing for these networks. docs/train.md has what they reach.
# 5,000 of the 50,000 images are held out for the best epoch and thresholds. DATA comes from
# https://www.cs.toronto.edu/~kriz/cifar.html or is fetched by `--download true`. Flags after the three arguments are added;
# with `--epochs N` give `--warmup_epochs` too, a fifth of it.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 3 "CIFAR10 or CIFAR100, name of a network, folder for results" "$@"
needs_data
data_set=$1 model=$2 out=$3 processes=${PROCESSES:-1}
shift 3
[ $((128 % processes)) = 0 ] || fail "PROCESSES=$processes does not divide 128"
exec python "$root/scripts/launch.py" --nproc_per_node="$processes" "$root/main_earlyExit.py" \
    --model "$model" --data_set "$data_set" --data_path "$DATA" --output_dir "$out" \
    --epochs 7 --batch_size $((128 / processes)) --opt muon --lr 0.01 --weight_decay 5e-4 --filter_bias_and_bn false \
    --schedule linear --warmup_epochs 1.4 --min_lr 0 --smoothing 0.1 \
    --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 \
    --device_data true --use_amp true --amp_dtype bf16 --channels_last true "$@"
