"""Checks of a Ray cluster: `python -m tune_sparse.doctor.ray RESULTS MODEL...` asks each node.

It is a process of its own, because Ray tries for minutes where it is refused, and because what is defined in a main
program is sent to the nodes as it is: they need nothing of this project to say that they lack it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tune_sparse.doctor import Check, check
from tune_sparse.doctor.machine import existing, installed
from tune_sparse.net import check_listening

ASK_SECONDS, NODE_SECONDS = 120, 60
CLOCK_SECONDS = 10.0
"""More than this and a sweep on another node may be taken for dead (tune_sparse.ledger.lease)."""
RESOURCES = ("CPU", "GPU", "CS3", "CS3_TRIAL")


def examine(results_dir: Path, models: Sequence[str]) -> Iterator[Check]:
    """Check that the cluster lets us in, then each of its nodes."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        fix = "Set RAY_ADDRESS to HOST:PORT of the head."
        yield Check("Ray", False, "RAY_ADDRESS is not set: a sweep starts Ray on this machine", fix)
        return
    try:
        check_listening(address)
    except (OSError, ValueError) as error:
        fix = "Fix RAY_ADDRESS, start the head with `ray start --head`, or open its port to this machine."
        yield Check("Ray", False, f"nobody answers at {address}: {error}", fix)
        return
    answer = _ask(results_dir, models)
    if isinstance(answer, Check):
        yield answer
        return
    yield Check("Ray", True, f"{address} lets us in: {len(answer)} nodes")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        fix = "Start the head and everything else with RAY_AUTH_MODE=token: docs/security.md."
        yield Check("token", False, f"anybody who reaches {address} may run programs there", fix)
    for node in answer:
        yield from check_node(node)


def _ask(results_dir: Path, models: Sequence[str]) -> list[dict[str, Any]] | Check:
    """Ask each node; returns the answers, or why none could be asked."""
    command = [sys.executable, "-m", "tune_sparse.doctor.ray", str(results_dir.resolve()), *models]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS)
    except subprocess.TimeoutExpired:
        return Check("Ray", False, f"no answer in {ASK_SECONDS} s", "See the head's log, and its firewall.")
    if completed.returncode == 0:
        return list(json.loads(completed.stdout.splitlines()[-1]))
    if "uthentica" in completed.stderr or "token" in completed.stderr:
        fix = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of the head."
        return Check("token", False, "the cluster refuses us: its token is another one, or we have none", fix)
    lines = [line for line in completed.stderr.splitlines() if line.strip()] or ["nothing"]
    return Check("Ray", False, f"it refuses us: {lines[-1]}", "Use the Python and Ray of the head.")


def check_node(node: dict[str, Any]) -> Iterator[Check]:
    """Check what `ask_nodes` heard from a node."""
    name = f"node {node['address']}"
    amounts = node["resources"]
    held = ", ".join(f"{amounts[kind]:g} {kind}" for kind in RESOURCES if amounts.get(kind))
    memory = f"{amounts.get('memory', 0) / 1e9:.0f} GB"
    if "facts" not in node:
        yield Check(name, False, f"{held}, {memory}: {node['error']}", "See its raylet.log, or take it out.")
        return
    facts = node["facts"]
    yield Check(name, True, f"{facts['host']}: {held or 'no CPU for trials'}, {memory}")
    is_same = facts["python"] == platform.python_version()
    yield check(
        f"{name}, Python",
        is_same,
        facts["python"] if is_same else f"{facts['python']}, here {platform.python_version()}",
        "Use one environment on all nodes.",
    )
    ours, theirs = installed(), facts["packages"]
    differing = [f"{n} {theirs.get(n) or 'missing'} (here {ours[n]})" for n in ours if theirs.get(n) != ours[n]]
    differing.sort(key=lambda text: not text.startswith(("ray ", "torch ")))
    same = f"{len(ours)} as here"
    yield check(
        f"{name}, packages", not differing, "; ".join(differing[:5]) or same, "Use one environment on all nodes."
    )
    yield check(
        f"{name}, results",
        facts["sees_results"],
        "seen" if facts["sees_results"] else "the results folder of this machine is not there, or not writable",
        "Give a --results-dir that all nodes share.",
    )
    for model, why in facts["models"].items():
        fix = "Put it where all nodes see it, or `tune-sparse prepare` there; TUNE_SPARSE_CACHE is the place."
        yield check(f"{name}, {model}", not why, why or "seen", fix)
    off = facts["clock_seconds"]
    fix = "Synchronise the clocks (chrony, ntp)."
    yield check(f"{name}, clock", abs(off) <= CLOCK_SECONDS, f"{off:+.1f} s from here", fix)


def look(packages: Sequence[str], probe: str, models: Sequence[str]) -> dict[str, Any]:
    """Describe the node that this runs on. It is sent there as it stands."""
    import os
    import platform
    import socket
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def missing(model: str) -> str:
        try:
            from tune_sparse.models.checkpoints import find_folder

            find_folder(model)
        except Exception as error:
            return str(error)
        return ""

    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: found(name) for name in packages},
        "sees_results": os.access(probe, os.W_OK),
        "models": {model: missing(model) for model in models},
    }


def clock() -> float:
    """Seconds since the epoch, there."""
    return time.time()


def ask_nodes(results_dir: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """{address, resources, facts or error} of each node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(logging_level="ERROR", log_to_driver=False)
    probe = existing(results_dir) / f".doctor.{uuid.uuid4().hex}"
    probe.touch()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        answers = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = ray.remote(num_cpus=0, scheduling_strategy=there)
            answers.append((node, ask(look).remote(sorted(installed()), str(probe), list(models)), ask(clock)))
        return [_answer(*answer) for answer in answers]
    finally:
        probe.unlink()
        ray.shutdown()


def _answer(node: dict[str, Any], facts: Any, its_clock: Any) -> dict[str, Any]:
    import ray

    known = {"address": node["NodeManagerAddress"], "resources": node["Resources"]}
    try:
        answer = ray.get(facts, timeout=NODE_SECONDS)
        sent = time.time()
        there = ray.get(its_clock.remote(), timeout=NODE_SECONDS)
    except ray.exceptions.RayError as error:
        return known | {"error": str(error).partition("\n")[0] or type(error).__name__}
    return known | {"facts": answer | {"clock_seconds": there - (sent + time.time()) / 2}}


if __name__ == "__main__":
    print(json.dumps(ask_nodes(Path(sys.argv[1]), sys.argv[2:])))
