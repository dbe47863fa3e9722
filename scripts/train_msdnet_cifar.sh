#!/usr/bin/env bash
# MSDNet (https://arxiv.org/abs/1703.09844, section 5) and RANet (https://arxiv.org/abs/2003.07326), which is trained in
# the same way, on CIFAR-10 or CIFAR-100, with the settings of their authors.
#
#   DATA=/path/to/torchvision/data bash scripts/train_msdnet_cifar.sh CIFAR100 msdnet_cifar_lin5 runs/msdnet_c100
#   ... msdnet_cifar_even7 ...     the seven-exit network of the anytime curves
#   ... ranet_cifar ...            RANet with eight exits; ranet_cifar_lg has six
#
# Command of the MSDNet repository: --nBlocks 5 --stepmode lin_grow --step 1 --base 1 --nChannels 16 --epochs 300
#   --batch-size 64 --lr 0.1 (decayed at 50 % and 75 %) --momentum 0.9 --weight-decay 1e-4 (biases and batch norm too).
# Hardware: one GPU. Published (read off figures): MSDNet on CIFAR-100 up to about 75.0 % (dynamic); RANet, the eight exits on
# CIFAR-10 91.3 91.9 93.1 93.1 93.2 93.3 93.6 93.7, on CIFAR-100 66.3 69.4 71.7 71.7 72.3 72.4 73.8 74.4; not reproduced.
# As published, MSDNet's budgeted network (lin5) has 5,000 of the 50,000 images held out, which choose the best epoch and
# thresholds; even7 and RANet have none, so that the last epoch counts and thresholds come from half of the test images:
#   bash scripts/eval_msdnet.sh runs/msdnet_c100/checkpoint-best.pth
#   bash scripts/eval_msdnet.sh runs/ranet_c100/checkpoint-best.pth --calib half_test
# DATA comes from https://www.cs.toronto.edu/~kriz/cifar.html or is fetched by `--download true`. Flags after the three
# arguments are added; `--num_calib N` holds out another number.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 3 "CIFAR10 or CIFAR100, name of a network, folder for results" "$@"
needs_data
data_set=$1 model=$2 out=$3
shift 3
case $model in msdnet_cifar_even7 | ranet*) set -- --num_calib 0 "$@" ;; esac
exec python "$root/main_earlyExit.py" --model "$model" --data_set "$data_set" \
    --data_path "$DATA" --output_dir "$out" --drop_last false \
    --epochs 300 --batch_size 64 --opt sgd --lr 0.1 --momentum 0.9 --weight_decay 1e-4 --filter_bias_and_bn false \
    --schedule multistep --decay_epochs 150 225 --decay_rate 0.1 --warmup_epochs 0 \
    --smoothing 0 --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 "$@"
