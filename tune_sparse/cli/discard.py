"""discard: a run set aside."""

from __future__ import annotations

import argparse
from typing import Any

from tune_sparse.cli.command import OK, add_command, add_results_dir
from tune_sparse.errors import unknown_name


def declare(commands: Any) -> None:
    discard = add_command(commands, "discard", _discard, "set a run aside, kept with the reason; a sweep runs it again")
    discard.add_argument("run", help="its folder's name under runs/")
    discard.add_argument("--reason", required=True)
    add_results_dir(discard)


def _discard(chosen: argparse.Namespace) -> int:
    from tune_sparse.ledger.lease import check_not_locked
    from tune_sparse.ledger.ledger import Ledger

    check_not_locked(chosen.results_dir)
    ledger = Ledger(chosen.results_dir)
    if chosen.run not in ledger.run_ids():
        raise unknown_name("run", chosen.run, ledger.run_ids())
    print(f"set aside: {ledger.set_aside(chosen.run, chosen.reason)}")
    return OK
