"""discard: a run set aside."""

from __future__ import annotations

import argparse
from typing import Any

from tune_sparse.cli.command import OK, add_command, add_results_dir, add_run
from tune_sparse.cli.words import RUN_WORDS, paragraph, words
from tune_sparse.errors import unknown_name


def declare(commands: Any) -> None:
    discard = add_command(
        commands,
        "discard",
        _discard,
        "move a run out of the results, so that the next sweep that needs it runs it again",
        examples=('discard torch_tiny-llama_boolq_none_s00_dense_84b51b69 --reason "wrong tokenizer"',),
        fault="the disk is full",
        notes=[
            words(*RUN_WORDS, "results folder"),
            paragraph(
                "Nothing is deleted: the run's folder goes to RESULTS/set_aside, with your reason. No table or figure "
                "shows it any more."
            ),
        ],
    )
    add_run(discard, "run to set aside")
    discard.add_argument("--reason", required=True, metavar="TEXT", help="why the run is set aside; recorded with it")
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
