#!/bin/bash
# Pre-train on 8 GPUs of one node under SLURM: sbatch docs/slurm.sh
# A requeued or resubmitted job goes on from last.pth, bit for bit.
#SBATCH --job-name=mae
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
set -euo pipefail

IMAGES=${IMAGES:-$HOME/imagenet/train}
OUT=${OUT:-runs/mae_vit_base}

# The first job starts the run; the following ones resume it with its own settings.
if [ -f "$OUT/run.json" ]; then
  options=(--resume)
else
  options=(--recipe mae_vit_base --images "$IMAGES" --mto --precision bf16 --num-workers 12 --save-steps 500)
fi

# In the background, so that the signal before the time limit reaches this script; it lasts until the run has ended.
trap 'kill $run; wait $run' USR1
torchrun --standalone --nproc-per-node 8 -m mto_analyze pretrain --out "$OUT" "${options[@]}" &
run=$!
wait $run
