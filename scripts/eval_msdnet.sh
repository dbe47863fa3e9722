#!/usr/bin/env bash
# Evaluates a trained MSDNet: every exit, the quotas of the papers (p = 1 ... 39), and real early exit.
#
#   bash scripts/eval_msdnet.sh runs/msdnet_c100/checkpoint-best.pth --data_path "$DATA"
#   bash scripts/eval_msdnet.sh runs/l2w_c10/checkpoint-best.pth --data_path "$DATA" --procedure published
#   bash scripts/eval_msdnet.sh msdnet-step4.pth.tar --model msdnet_imagenet_step4 --data_set IMNET --data_path "$DATA"
#
# The third form evaluates a file of the MSDNet, RANet or L2W repository, which does not name its network; images are then
# resized bilinearly, as there. Thresholds come from images held out of training. If none were held out, as by the recipes of
# L2W, RANet (CIFAR) and msdnet_cifar_even7, add `--calib train_augmented`, L2W's way, or `--calib half_test`. One CPU or GPU.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 1 "checkpoint" "$@"
python "$root/eval_dynamic.py" --checkpoint "$1" --mode all --quota_sweep msdnet --confidence max_prob --flops true "${@:2}"
