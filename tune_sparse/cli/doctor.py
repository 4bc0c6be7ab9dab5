"""doctor: checks this machine, a Ray cluster, the Cerebras environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_json, add_results_dir
from tune_sparse.cli.words import models, words

if TYPE_CHECKING:
    from tune_sparse.doctor import Check


def declare(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "check the installation and the hardware, and suggest a fix for each problem",
        examples=(
            "doctor",
            "doctor --ray --models tiny-llama --results-dir /shared/results",
            "doctor --cerebras",
        ),
        ok="no problem was found",
        fault="a problem was found",
        notes=[words("results folder", "Ray", "trial"), models(trains=False, downloads=False)],
    )
    doctor.add_argument(
        "--ray",
        action="store_true",
        help="check every node of the running Ray cluster, too; it is a problem if RAY_ADDRESS is not set",
    )
    doctor.add_argument(
        "--cerebras",
        action="store_true",
        help="check the Cerebras software, the access to a Cerebras cluster, and your disk quota as the program "
        "`quota` reports it; the other checks of this machine are then made only if --ray is given, as the machine "
        "with that access need not run trials",
    )
    doctor.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="with --ray: check that every node has these models; none is trained or downloaded (default: none)",
    )
    add_results_dir(doctor, "results folder; it must be writable with 2 GB free, and with --ray every node must see it")
    add_json(doctor, "the checks")


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
