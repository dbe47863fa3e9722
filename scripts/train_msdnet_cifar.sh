#!/usr/bin/env bash
# MSDNet on CIFAR-10 or CIFAR-100, as its authors train it (https://arxiv.org/abs/1703.09844, section 5).
#
#   DATA=/path/to/torchvision/data bash scripts/train_msdnet_cifar.sh CIFAR100 msdnet_cifar_lin5 runs/msdnet_c100
#   ... msdnet_cifar_even7 ...     the seven-exit network of the anytime curves
#
# Command of the MSDNet repository: --nBlocks 5 --stepmode lin_grow --step 1 --base 1 --nChannels 16 --epochs 300
#   --batch-size 64 --lr 0.1 (decayed at 50 % and 75 %) --momentum 0.9 --weight-decay 1e-4 (biases and batch norm too).
# Hardware: one GPU. Published: CIFAR-100 up to about 75.0 % (dynamic, figure); not yet reproduced here.
# Images held out for thresholds: 5,000, as there. DATA comes from https://www.cs.toronto.edu/~kriz/cifar.html
# or is fetched by `--download true`. Further flags may follow the three words.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data_set=$1 model=$2 out=$3
python main_earlyExit.py --model "$model" --data_set "$data_set" --data_path "$DATA" --output_dir "$out" \
    --epochs 300 --batch_size 64 --opt sgd --lr 0.1 --momentum 0.9 --weight_decay 1e-4 --filter_bias_and_bn false \
    --schedule multistep --decay_epochs 150 225 --decay_rate 0.1 --warmup_epochs 0 \
    --smoothing 0 --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 "${@:4}"
