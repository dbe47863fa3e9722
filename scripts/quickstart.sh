#!/usr/bin/env bash
# The whole path to real early exit: installs into .venv, trains a five-exit MSDNet on 1,797 real handwritten digits
# (part of scikit-learn, no download), evaluates every exit, sweeps thresholds, and times real early exit with those chosen.
# Leaves curve.png, report.html and the tables in runs/quickstart. Some minutes on two CPU cores after installation.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install requirements.txt
out=runs/quickstart
rm -rf "$out"
python main_earlyExit.py --model msdnet_cifar_lin5 --data_set DIGITS --num_calib 300 --epochs 8 --batch_size 32 \
    --opt sgd --lr 0.05 --min_lr 0 --weight_decay 1e-4 --filter_bias_and_bn false --warmup_epochs 0 \
    --smoothing 0 --mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 \
    --use_amp true --num_workers 1 --save_ckpt_num 0 --output_dir "$out"
python eval_dynamic.py --checkpoint "$out/checkpoint-best.pth" --num_workers 1
echo "to run it without PyTorch, or as a service: pip install -r requirements-deploy.txt, then docs/deploy.md"
