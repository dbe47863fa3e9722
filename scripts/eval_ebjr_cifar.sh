#!/usr/bin/env bash
# Evaluates EBJR's published pairs on CIFAR: the student answers, and defers to the teacher where its energy is too low.
#
#   bash scripts/eval_ebjr_cifar.sh 52-6.pth.tar 64-12.pth.tar --data_path "$DATA" --download true
#   NETWORKS="58_6 88_8" bash scripts/eval_ebjr_cifar.sh 58-6.pth.tar 88-8.pth.tar --data_set CIFAR100 --data_path "$DATA" --router_threshold 4.6195
#
# The weights are the files model_best.pth.tar of https://github.com/vbdi/ebjr, whose own command for the first line is
#   its evaluation script with -d cifar10 --arch densenet --depth 52 --growthRate 6 --resume 52-6.pth.tar
#       --tarch densenet --tdepth 64 --tgrowthRate 12 --tresume 64-12.pth.tar --router_threshold 2.46
# Published: CIFAR-10 94.77 %, 72.03 % answered by the student, 1.3653 x 10^8 FLOPs; CIFAR-100 74.79 %, 56.73 %, 1.5688 x 10^8.
# On the first 1,000 CIFAR-10 test images: 95.0 %, 72.7 %, 1.3457 (docs/measurements.md). One CPU or GPU, minutes.
set -euo pipefail
read -r student teacher <<<"${NETWORKS:-52_6 64_12}"
root=$(dirname "${BASH_SOURCE[0]}")/..
source "$root/scripts/recipe.sh"
needs 2 "the student's file, the teacher's file" "$@"
python "$root/eval_dynamic.py" --model ebjr --data_set CIFAR10 --confidence energy_softmax --router_threshold 2.46 \
    --quota_sweep wide --networks "cifar_densenet_$student:weights=$1" "cifar_densenet_$teacher:weights=$2" "${@:3}"
