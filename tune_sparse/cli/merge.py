"""merge: a trained model as one checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_results_dir
from tune_sparse.errors import InputError, RunError


def declare(commands: Any) -> None:
    merge = add_command(
        commands,
        "merge",
        _merge,
        "write a trained model as a Hugging Face checkpoint, its zeros kept and checked",
        "examples:\n    tune-sparse merge --run RUN --output merged\n"
        "    tune-sparse merge --base pruned-model --adapter adapter --output merged",
    )
    merge.add_argument("--run", help="a finished run: its folder's name under runs/")
    add_results_dir(merge)
    merge.add_argument("--base", metavar="MODEL", help="the model that the adapter was trained on, already pruned")
    merge.add_argument("--adapter", type=Path, metavar="DIR", help="of this program or of stock PEFT")
    merge.add_argument("--keep-zeros", action="store_true", help="an adapter of stock PEFT must not fill zeros")
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    merge.add_argument("--json", action="store_true", help="print the validation report as JSON")


def _merge(chosen: argparse.Namespace) -> int:
    if bool(chosen.run) == bool(chosen.base and chosen.adapter) or bool(chosen.base) != bool(chosen.adapter):
        raise InputError("merge takes --run, or --base with --adapter, got another choice. Give one of the two.")
    from tune_sparse.export.merge import merge_adapter, merge_run
    from tune_sparse.ledger.ledger import Ledger

    try:
        if chosen.run:
            report = merge_run(Ledger(chosen.results_dir), chosen.run, chosen.output)
        else:
            report = merge_adapter(chosen.base, chosen.adapter, chosen.output, chosen.keep_zeros)
    except RunError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    sparsity = f"{report['actual_sparsity']:.4f}"
    print(json.dumps(report) if chosen.json else f"{chosen.output}: sparsity {sparsity}, every masked weight is 0")
    return OK
