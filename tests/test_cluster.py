"""Files by which machines are obtained: each is checked as far as a machine without Slurm, PBS or Kubernetes can."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tune_sparse.cli import parser
from tune_sparse.errors import InputError
from tune_sparse.sweep.nodes import check_head

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
SWEEP = ["sweep", "smoke", "--results-dir", "a folder"]

# Programs of a site, as far as our scripts see them. Each writes its name and arguments to $CALLS.
SAYS = '#!/bin/bash\necho "${0##*/} $*" >> "$CALLS"\n'
STANDS_IN = {
    "scontrol": SAYS + '[ "$1" = requeue ] || printf "node1\\nnode2\\n"\n',
    "srun": SAYS + 'while [[ "$1" == --* ]]; do shift; done; exec "$@"\n',
    "mpiexec": SAYS + 'shift 6; exec "$@"\n',
    "qsub": SAYS,
    "ray": SAYS + '[ "$1" = start ] && exec sleep 60\nexit 0\n',
    "python": SAYS
    + 'until [ "$(grep -c "^ray start" "$CALLS")" -ge "$3" ]; do sleep 0.05; done\n',  # tune_sparse.sweep.nodes
    "tune-sparse": SAYS + 'exec bash -c "$TUNE_SPARSE_DOES"\n',
}


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on two nodes, on a site whose programs stand in."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STANDS_IN.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    nodefile = tmp_path / "nodes"
    nodefile.write_text("node1\nnode1\nnode2\n")
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "TUNE_SPARSE_ENV": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_ON_NODE": "4",
        "PBS_O_WORKDIR": str(tmp_path),
        "PBS_NODEFILE": str(nodefile),
        "PROJECT": "mine",
        "ARGUMENTS": "sweep smoke --results-dir results",
    }


def run_script(name: str, site: dict[str, str], does: str, limit: str = "60") -> tuple[int, list[str]]:
    """Exit status of a script whose sweep `does` that, and what it called."""
    arguments = SWEEP if name == "slurm.sh" else []
    environment = site | {"TUNE_SPARSE_DOES": does, "LIMIT": limit}
    ended = subprocess.run(["bash", CLUSTER / name, *arguments], env=environment, timeout=60, capture_output=True)
    return ended.returncode, Path(site["CALLS"]).read_text().splitlines()


@pytest.mark.parametrize("name", ["slurm.sh", "pbs.sh"])
class TestAllocation:
    def test_each_node_joins_the_head_and_the_sweep_runs_once(self, name: str, site: dict[str, str]) -> None:
        status, calls = run_script(name, site, "exit 0")
        assert status == 0
        [head, worker] = [call for call in calls if call.startswith("ray start")]
        address = head.split("--node-ip-address=")[1].split()[0] + ":6379"
        assert "--head" in head
        assert "--dashboard-host=127.0.0.1" in head
        assert f"--address={address}" in worker
        requested = SWEEP if name == "slurm.sh" else site["ARGUMENTS"].split()
        assert calls[-1] == f"tune-sparse {' '.join(requested)}"
        assert sum(call.startswith("tune-sparse") for call in calls) == 1

    @pytest.mark.parametrize("status", [1, 2])
    def test_a_fault_is_the_status_of_the_job_and_is_not_tried_again(
        self, name: str, status: int, site: dict[str, str]
    ) -> None:
        found, calls = run_script(name, site, f"exit {status}")
        assert found == status
        assert calls[-1].startswith("tune-sparse")

    def test_when_time_is_up_the_sweep_is_stopped_and_the_job_queued_again(
        self, name: str, site: dict[str, str]
    ) -> None:
        stopped = Path(site["CALLS"]).with_name("stopped")
        status, calls = run_script(name, site, f"trap 'touch {stopped}; exit 1' TERM; sleep 50 & wait", limit="1")
        assert status == 0
        assert stopped.exists()
        again = {
            "slurm.sh": "scontrol requeue 17",
            "pbs.sh": f"qsub -A mine -v PROJECT=mine,ARGUMENTS={site['ARGUMENTS']},LIMIT=1 cluster/pbs.sh",
        }
        assert calls[-1] == again[name]

    def test_no_ray_outlives_the_job(self, name: str, site: dict[str, str]) -> None:
        run_script(name, site, "exit 1")
        left = subprocess.run(["pgrep", "-f", f"{site['TUNE_SPARSE_ENV']}/bin/ray"], capture_output=True, text=True)
        assert left.stdout == ""

    @pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
    def test_shellcheck_finds_nothing(self, name: str, site: dict[str, str]) -> None:
        found = subprocess.run(["shellcheck", "-x", f"cluster/{name}"], cwd=ROOT, capture_output=True, text=True)
        assert found.stdout == ""


def test_pbs_says_what_it_needs(site: dict[str, str]) -> None:
    del site["PROJECT"]
    ended = subprocess.run(["bash", CLUSTER / "pbs.sh"], env=site, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "PROJECT: is charged, give it with -v" in ended.stderr


def test_ray_accepts_the_file_of_hosts() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTER / "ssh.yaml").read_text()))
    validate_config(config)
    assert all(
        "RAY_AUTH_MODE=token" in config[name][-1] for name in ("head_start_ray_commands", "worker_start_ray_commands")
    )


def test_the_kubernetes_job_runs_a_command_of_ours_with_a_token() -> None:
    job: dict[str, Any] = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    program, *arguments = job["spec"]["entrypoint"].split()
    assert program == "tune-sparse"
    parser().parse_args(arguments)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {"results"}


def test_the_versions_of_ray_are_one() -> None:
    job: dict[str, Any] = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}" in (CLUSTER / "constraints.txt").read_text()


def test_a_node_that_does_not_join_is_said(tmp_path: Path) -> None:
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "tune_sparse.sweep.nodes", "2", "0.1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert "the allocation needs 2 Ray nodes, 0 joined in 0.1 s" in ended.stderr


def test_a_head_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        for written in (address, f"ray://{address}"):
            with pytest.raises(InputError, match=f"a Ray head that runs, at {written} nobody answers"):
                check_head(written)
        closed.listen()
        check_head(address)
    check_head("auto")
