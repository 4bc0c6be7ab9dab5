"""rerun: a finished run repeated and compared with its record."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_json, add_results_dir, add_run, existing_folders
from tune_sparse.cli.words import RUN_WORDS, paragraph, words
from tune_sparse.errors import InputError, unknown_name


def declare(commands: Any) -> None:
    rerun = add_command(
        commands,
        "rerun",
        _rerun,
        "repeat a finished run and compare the result with the recorded one",
        examples=("rerun torch_tiny-llama_boolq_none_s00_dense_84b51b69",),
        ok="the results agree",
        fault="a number differs",
        notes=[
            words(*RUN_WORDS, "results folder"),
            paragraph(
                "All metrics and the answers to all test examples are compared: to the last bit on a CPU of the same "
                "kind with the same packages, else within a tolerance that is printed. The repetition is not stored."
            ),
        ],
    )
    add_run(rerun, "run to repeat")
    add_results_dir(rerun)
    add_json(rerun, "the comparison")


def _rerun(chosen: argparse.Namespace) -> int:
    from trainables.process import prepare_process
    from tune_sparse.ledger.ledger import Ledger

    [folder] = existing_folders([chosen.results_dir])
    ledger = Ledger(folder)
    runs = [run_id for run_id in ledger.run_ids() if ledger.is_done(run_id)]
    if chosen.run not in runs:
        raise unknown_name("finished run", chosen.run, runs)
    run = ledger.run(chosen.run)
    if run.run_id != chosen.run:
        raise InputError(
            f"the settings of {chosen.run} must be those of its record, they are of {run.run_id}. "
            "`tune-sparse audit` says more."
        )
    record = ledger.record(chosen.run)
    prepare_process(bool(record and record.environment.get("deterministic")))
    from trainables.rerun import LOSS_TOLERANCE, rerun

    found = rerun(run, ledger)
    if chosen.json:
        print(json.dumps({"run": chosen.run} | asdict(found)))
    else:
        how = (
            "to the last bit"
            if found.is_exact
            else f"accuracies within a standard error, other numbers within {LOSS_TOLERANCE:.0%}: the hardware or the "
            "versions are not those of the record"
        )
        print(f"{chosen.run}: {len(found.differences)} differences ({how})")
        print("".join(f"  {difference}\n" for difference in found.differences), end="")
        print(f"{found.answered_otherwise} of {found.examples} examples have another outcome.")
        if found.not_recorded:
            print(f"Not in the record, so not compared: {', '.join(sorted(found.not_recorded))}.")
    return FAULT if found.differences else OK
