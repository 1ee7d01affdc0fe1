#!/usr/bin/env bash
# A run of all stale stages on SLURM, from the project's folder on a shared disk: sbatch docs/scale/slurm.sh
#SBATCH --job-name=almrr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gres=gpu:8
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
source .venv/bin/activate
export RAY_USAGE_STATS_ENABLED=0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS="$address:6379"
size=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --block)

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port=6379 --include-dashboard=false "${size[@]}" &
sleep 15
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$RAY_ADDRESS" "${size[@]}" &
  sleep 15
fi

almrr repro --engine ray # goes on where an earlier job was ended: finished stages are recorded
