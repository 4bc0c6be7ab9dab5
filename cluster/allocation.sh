# shellcheck shell=bash disable=SC2154
# Ray on the nodes of an allocation, one tune-sparse command on it, and an end to both. For slurm.sh and pbs.sh, which say
#   nodes            the hosts of the allocation, this one first
#   on HOST ...      runs a command there, in the foreground, until it is killed
#   again            puts this job into the queue once more
# and then call      run_on_ray sweep ...
# LIMIT is how long the command may take before the job goes back into the queue, as `timeout` writes it.

NODES_SECONDS=${NODES_SECONDS:-300} # a node that has not joined by then is missing

run_on_ray() {
    export PATH="${TUNE_SPARSE_ENV:-$PWD/.venv}/bin:$PATH" RAY_AUTH_MODE=token RAY_ADDRESS
    ray get-auth-token --generate > /dev/null
    RAY_ADDRESS="${RAY_NODE_IP:-$(hostname --ip-address | cut -d' ' -f1)}:${RAY_PORT:-6379}"
    trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT

    on "${nodes[0]}" ray start --head --block --disable-usage-stats --dashboard-host=127.0.0.1 \
        --node-ip-address="${RAY_ADDRESS%:*}" --port="${RAY_ADDRESS##*:}" > ray_head.log 2>&1 &
    python -m tune_sparse.sweep.nodes 1 "$NODES_SECONDS"
    for node in "${nodes[@]:1}"; do
        on "$node" ray start --block --disable-usage-stats --address="$RAY_ADDRESS" > "ray_$node.log" 2>&1 &
    done
    python -m tune_sparse.sweep.nodes "${#nodes[@]}" "$NODES_SECONDS"

    local status=0
    timeout --signal=TERM "$LIMIT" tune-sparse "$@" || status=$?
    if [ "$status" -eq 124 ]; then # of timeout: the sweep was stopped cleanly, and resumes
        again
        return 0
    fi
    return "$status"
}
