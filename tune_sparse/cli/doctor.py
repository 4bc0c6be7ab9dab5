"""doctor: checks this machine, a Ray cluster, the Cerebras environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_results_dir

if TYPE_CHECKING:
    from tune_sparse.doctor import Check

EXAMPLE = """examples:
    tune-sparse doctor
    tune-sparse doctor --ray --models tiny-llama --results-dir /shared/results
    tune-sparse doctor --cerebras

exit status: 0 all is well, 1 something has to be fixed."""


def declare(commands: Any) -> None:
    doctor = add_command(commands, "doctor", _doctor, "check this machine, each fault with its fix", EXAMPLE)
    doctor.add_argument("--ray", action="store_true", help="the Ray cluster at RAY_ADDRESS too, node by node")
    doctor.add_argument(
        "--cerebras", action="store_true", help="the Cerebras environment, its cluster, csctl, the disk"
    )
    doctor.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="which each Ray node must see")
    add_results_dir(doctor)
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")


def _doctor(chosen: argparse.Namespace) -> int:
    checks = []
    for check in _checks(chosen):
        checks.append(check)
        if not chosen.json:
            print(f"{'ok  ' if check.is_well else 'FAIL'} {check.what}: {check.found}", flush=True)
            if check.fix:
                print(f"     {check.fix}", flush=True)
    if chosen.json:
        print(json.dumps([vars(check) for check in checks]))
    return OK if all(check.is_well for check in checks) else FAULT


def _checks(chosen: argparse.Namespace) -> Iterator[Check]:
    """Examine the Cerebras side alone where that is asked for: a user node may be no place for trials."""
    from tune_sparse.doctor import cerebras as of_cerebras
    from tune_sparse.doctor import machine as of_machine
    from tune_sparse.doctor import ray as of_ray

    if chosen.ray or not chosen.cerebras:
        yield from of_machine.examine(chosen.results_dir)
    if chosen.ray:
        yield from of_ray.examine(chosen.results_dir, chosen.models)
    if chosen.cerebras:
        yield from of_cerebras.examine()
