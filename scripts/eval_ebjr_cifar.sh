#!/usr/bin/env bash
# EBJR's published pairs on CIFAR: the student answers, the teacher where the student's energy is below the threshold.
#
# Their command:  python cifar.py -d cifar10 -c checkpoints/cifar10/densenet-bc-52-6 --tc checkpoints/cifar10/densenet-bc-64-12 \
#                     --depth 52 --growthRate 6 --tdepth 64 --tgrowthRate 12 --router_threshold 2.46
# Ours:           bash scripts/eval_ebjr_cifar.sh STUDENT TEACHER --data_path "$DATA"
# CIFAR-100:      NETWORKS="58_6 88_8" bash scripts/eval_ebjr_cifar.sh STUDENT TEACHER --data_set CIFAR100 \
#                     --data_path "$DATA" --router_threshold 4.6195
# Weights:        model_best.pth.tar of each network, from https://github.com/vbdi/ebjr
# Published:      CIFAR-10 94.77 %, 72.03 % by the student, 1.3653 x 10^8 FLOPs; CIFAR-100 74.79 %, 56.73 %, 1.5688.
set -euo pipefail
read -r student teacher <<<"${NETWORKS:-52_6 64_12}"
cd "$(dirname "$0")/.."
exec python eval_dynamic.py --model ebjr --data_set CIFAR10 --confidence energy_softmax --router_threshold 2.46 \
    --networks "cifar_densenet_$student:weights=$1" "cifar_densenet_$teacher:weights=$2" "${@:3}"
