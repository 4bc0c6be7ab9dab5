"""doctor: checks this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command
from tune_sparse.errors import InputError


def add_commands(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "check this machine, each fault with its fix",
        "example:\n    tune-sparse doctor --cerebras",
    )
    doctor.add_argument(
        "--cerebras", action="store_true", help="the Cerebras environment, the cluster, csctl, the disk"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(chosen: argparse.Namespace) -> int:
    if not chosen.cerebras:
        raise InputError("doctor checks what is asked for, got nothing. Give --cerebras.")
    from tune_sparse.cerebras.doctor import examine

    findings = list(examine())
    if chosen.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.is_well else 'MEND'} {finding.what}: {finding.found}")
            if finding.fix:
                print(f"     {finding.fix}")
    return OK if all(finding.is_well for finding in findings) else FAULT
