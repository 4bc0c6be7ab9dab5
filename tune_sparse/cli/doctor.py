"""doctor: checks this machine, a Ray cluster, the Cerebras environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import DEFAULT_RESULTS, FAULT, OK, add_command

if TYPE_CHECKING:
    from tune_sparse.doctor.finding import Finding

EXAMPLE = """examples:
    tune-sparse doctor
    tune-sparse doctor --ray --models tiny-llama --results-dir /shared/results
    tune-sparse doctor --cerebras

exit status: 0 all is well, 1 something has to be fixed."""


def add_commands(commands: Any) -> None:
    doctor = add_command(commands, "doctor", _doctor, "check this machine, each fault with its fix", EXAMPLE)
    doctor.add_argument("--ray", action="store_true", help="the Ray cluster at RAY_ADDRESS too, node by node")
    doctor.add_argument(
        "--cerebras", action="store_true", help="the Cerebras environment, its cluster, csctl, the disk"
    )
    doctor.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="which each Ray node must see")
    doctor.add_argument("--results-dir", type=Path, default=DEFAULT_RESULTS)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(chosen: argparse.Namespace) -> int:
    findings = []
    for finding in _findings(chosen):
        findings.append(finding)
        if not chosen.json:
            print(f"{'ok  ' if finding.is_well else 'FAIL'} {finding.what}: {finding.found}", flush=True)
            if finding.fix:
                print(f"     {finding.fix}", flush=True)
    if chosen.json:
        print(json.dumps([vars(finding) for finding in findings]))
    return OK if all(finding.is_well for finding in findings) else FAULT


def _findings(chosen: argparse.Namespace) -> Iterator[Finding]:
    """Of the Cerebras side alone where that is asked for: a user node may be no place for trials."""
    from tune_sparse.doctor import cerebras as of_cerebras
    from tune_sparse.doctor import machine as of_machine
    from tune_sparse.doctor import ray as of_ray

    if chosen.ray or not chosen.cerebras:
        yield from of_machine.examine(chosen.results_dir)
    if chosen.ray:
        yield from of_ray.examine(chosen.results_dir, chosen.models)
    if chosen.cerebras:
        yield from of_cerebras.examine()
