#!/bin/bash
# A sweep or search on the nodes of a PBS allocation (as on ALCF Polaris); when its time is up it is submitted again.
#   qsub -A MINE -v PROJECT=MINE,ARGUMENTS="sweep matrix --data-dir hub --results-dir /shared/results" cluster/pbs.sh
# ARGUMENTS are separated by spaces and hold no comma, which qsub takes for the end of a value.
#PBS -N tune-sparse
#PBS -l select=2:system=polaris
#PBS -l place=scatter
#PBS -l walltime=03:00:00
#PBS -l filesystems=home:eagle
#PBS -q preemptable
#PBS -r y
#PBS -k doe
#PBS -j oe
# shellcheck disable=SC2034
set -euo pipefail
: "${PROJECT:?is charged, give it with -v}" "${ARGUMENTS:?of tune-sparse, give them with -v}"
LIMIT=${LIMIT:-165m} # a quarter of an hour less than walltime

mapfile -t nodes < <(uniq "$PBS_NODEFILE")
on() { mpiexec -n 1 --ppn 1 --hosts "$1" "${@:2}"; }
again() { qsub -A "$PROJECT" -v "PROJECT=$PROJECT,ARGUMENTS=$ARGUMENTS,LIMIT=$LIMIT" cluster/pbs.sh; }

cd "$PBS_O_WORKDIR"
source cluster/allocation.sh
read -ra arguments <<< "$ARGUMENTS"
run_on_ray "${arguments[@]}"
