#!/bin/bash
# A sweep or search on the nodes of a Slurm allocation; when its time is up it goes back into the queue and resumes.
#   sbatch cluster/slurm.sh sweep matrix --data-dir hub --results-dir /shared/results
#SBATCH --job-name=tune-sparse
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tune-sparse-%j.log
# shellcheck disable=SC2034
set -euo pipefail
LIMIT=${LIMIT:-705m} # a quarter of an hour less than --time

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on() { srun --nodes=1 --ntasks=1 --overlap --cpus-per-task="$SLURM_CPUS_ON_NODE" --nodelist="$1" "${@:2}"; }
again() { scontrol requeue "$SLURM_JOB_ID"; }

cd "$SLURM_SUBMIT_DIR"
source cluster/allocation.sh
run_on_ray "$@"
