#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1 --signal=USR1@120 --requeue --open-mode=append
# Runs a command as a SLURM job, on one machine or several, again and again until it is done. Submit it from the repository:
#
#   DATA=/path/to/imagenet sbatch --time 24:00:00 --nodes 1 --gpus-per-node 8 --cpus-per-task 64 \
#       scripts/slurm.sh bash scripts/train_dyn_perceiver_regnet_imagenet.sh runs/dyn_regnet
#
# Two minutes before the job's time is over (up to three: SLURM looks once a minute) training is sent SIGUSR1. It saves
# and exits with 75; then the job queues again, and the same command goes on from the step that was saved. Other exit
# codes end the job. Every machine starts the command once; torchrun's processes find each other through the first.
# Options of sbatch on the command line go before those above. Where a step and a save take minutes:
#   PET_SHUTDOWN_TIMEOUT=590 sbatch --signal USR1@600 ...
set -euo pipefail
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: submit it: sbatch scripts/slurm.sh COMMAND" >&2 && exit 2; }
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS=${SLURM_GPUS_ON_NODE:-${GPUS:-1}} # processes per machine, for the recipes
# torchrun reads its flags from here. It would kill processes that take longer than 30 s to save.
export PET_NNODES=$SLURM_JOB_NUM_NODES PET_RDZV_BACKEND=c10d PET_RDZV_ID=$SLURM_JOB_ID
export PET_RDZV_ENDPOINT=$first:$((29500 + SLURM_JOB_ID % 1000)) PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-110}
# srun does not take sbatch's over since SLURM 22.05
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
trap 'exit 143' TERM # of scancel or a preemption: whether the job queues again is then not for us to say
code=0
# One machine is done before another: they have a minute to end by themselves.
srun --kill-on-bad-exit=0 --wait=60 "$@" || code=$?
[ "$code" != 75 ] || exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
