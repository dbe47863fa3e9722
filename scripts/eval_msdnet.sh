#!/usr/bin/env bash
# Evaluates a trained MSDNet: every exit, the quotas of the papers (p = 1 ... 39), and real early exit.
#
#   bash scripts/eval_msdnet.sh runs/msdnet_c100/checkpoint-best.pth --data_path "$DATA"
#   bash scripts/eval_msdnet.sh msdnet-step4.pth.tar --model msdnet_imagenet_step4 --data_set IMNET --data_path "$DATA"
#
# The second form evaluates a file of the MSDNet or L2W repository, which does not name its network. Thresholds come from
# images held out of training. If none were held out, add `--calib half_test`. One CPU or GPU.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
python "$root/eval_dynamic.py" --checkpoint "${1:?checkpoint}" --mode all --quota_sweep msdnet --confidence max_prob --flops true "${@:2}"
