#!/usr/bin/env bash
# Evaluates a Dynamic Perceiver: every exit, the 33 published exit distributions, and real early exit.
#
#   bash scripts/eval_dyn_perceiver_imagenet.sh runs/dyn_regnet/checkpoint-best.pth --data_path "$DATA" --procedure published
#   bash scripts/eval_dyn_perceiver_imagenet.sh reg800m.pth --data_path "$DATA"
#   bash scripts/eval_dyn_perceiver_imagenet.sh reg800m.pth --data_path "$DATA" --procedure published
#
# Our checkpoints name their network, and so do the flags that published ones (https://arxiv.org/abs/2306.11248) store;
# for other files add `--model reg800m_perceiver_t128 --depth_factor 1 1 1 2`. `--procedure published` is the published
# evaluation: the weights themselves, thresholds from augmented training images, GFLOPs in dynamic.txt. Without it the moving
# average is evaluated, and thresholds come from held-out images under the evaluation transform. The recipes hold none out, and
# a published network was trained on these images; `--calib half_test` takes unseen ones.
# DATA holds train/ and val/ (https://image-net.org). One CPU or GPU.
# Published (not reproduced here), top-1 of exits 0 to 3: reg800m_perceiver_t128 68.62 78.32 79.15 79.86,
#   resnet50_0375_perceiver_t128 72.93 77.52 74.32 77.70, mobilenetV3_0x75_perceiver_t128 53.13 71.65 71.89 74.59.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 1 "checkpoint" "$@"
python "$root/eval_dynamic.py" --checkpoint "$1" --mode all --quota_sweep dyn_perceiver --quota_scales 0.85 1 0.5 \
    --confidence max_prob --flops true "${@:2}"
