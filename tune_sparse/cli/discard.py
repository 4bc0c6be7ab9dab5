"""discard: a run set aside, or the prunings of sweeps removed."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tune_sparse.cli.command import OK, add_command, add_results_dir
from tune_sparse.cli.words import RUN_WORDS, paragraph, words
from tune_sparse.errors import InputError, unknown_name

if TYPE_CHECKING:
    from tune_sparse.ledger.ledger import Ledger


def declare(commands: Any) -> None:
    discard = add_command(
        commands,
        "discard",
        _discard,
        "move a run out of the results, so that the next sweep that needs it runs it again; or remove stored prunings",
        examples=(
            'discard torch_tiny-llama_boolq_none_s00_dense_84b51b69 --reason "wrong tokenizer"',
            'discard --prunings 3f2a1b4c5d6e --reason "merged all that we need"',
        ),
        fault="the disk is full",
        notes=[
            words(*RUN_WORDS, "results folder"),
            paragraph(
                "A run is not deleted: its folder goes to RESULTS/set_aside, with your reason. No table or figure "
                "shows it any more."
            ),
            paragraph(
                "Prunings are deleted, for the room that they take; what they were goes to RESULTS/set_aside. Those "
                "of runs that failed or are not finished are kept, whichever sweep requested them. Finished runs keep "
                "their numbers, but `merge --run`, `evaluate --run`, `rerun` and `search` refuse them from then on."
            ),
        ],
    )
    discard.add_argument("run", nargs="?", metavar="RUN", help="run to set aside")
    discard.add_argument(
        "--prunings",
        nargs="+",
        metavar="SWEEP",
        help="remove the stored prunings of these sweeps: names of files in RESULTS/sweeps, without .json",
    )
    discard.add_argument("--reason", required=True, metavar="TEXT", help="why this is discarded; recorded with it")
    add_results_dir(discard)


def _discard(chosen: argparse.Namespace) -> int:
    from tune_sparse.ledger.lease import check_not_locked
    from tune_sparse.ledger.ledger import Ledger

    if bool(chosen.run) == bool(chosen.prunings):
        raise InputError("discard takes a run or --prunings, got both or neither. Give one of the two.")
    check_not_locked(chosen.results_dir)
    ledger = Ledger(chosen.results_dir)
    if chosen.prunings:
        return _discard_prunings(ledger, chosen.prunings, chosen.reason)
    if chosen.run not in ledger.run_ids():
        raise unknown_name("run", chosen.run, ledger.run_ids())
    print(f"set aside: {ledger.set_aside(chosen.run, chosen.reason)}")
    return OK


def _discard_prunings(ledger: Ledger, sweep_ids: Iterable[str], reason: str) -> int:
    wanted, needed = _prunings(ledger, sweep_ids)
    stored = {name: _bytes(ledger, name) for name in sorted(wanted) if ledger.pruning_folder(name).is_dir()}
    going = {name: size for name, size in stored.items() if name not in needed}
    done = [run_id for run_id in ledger.run_ids() if ledger.is_done(run_id) and ledger.run(run_id).pruning_id in going]
    print(f"{len(going)} prunings of {sum(going.values()) / 1e9:.2f} GB are removed: {', '.join(going) or 'none'}")
    if len(going) < len(stored):
        print(f"{len(stored) - len(going)} are kept, since runs that are not finished, or failed, need them")
    if done:
        print(f"{len(done)} finished runs cannot be merged, evaluated or repeated any more: {', '.join(done)}")
    for name in going:
        ledger.discard_pruning(name, reason)
    return OK


def _prunings(ledger: Ledger, sweep_ids: Iterable[str]) -> tuple[set[str], set[str]]:
    """(prunings of these sweeps, prunings that unfinished runs of any sweep need)."""
    sweeps = {sweep.sweep_id: sweep for sweep in ledger.sweeps()}
    for name in sweep_ids:
        if name not in sweeps:
            raise unknown_name("sweep", name, sweeps)
    wanted = [cell for name in sweep_ids for cell in sweeps[name].cells]
    unfinished = [c for sweep in sweeps.values() for c in sweep.cells if not ledger.is_done(c["run_id"])]
    return _pruning_ids(wanted), _pruning_ids(unfinished)


def _pruning_ids(cells: Iterable[Mapping[str, Any]]) -> set[str]:
    return {cell["pruning_id"] for cell in cells if cell.get("pruning_id")}  # sweeps of earlier versions have none


def _bytes(ledger: Ledger, pruning_id: str) -> int:
    return sum(path.stat().st_size for path in ledger.pruning_folder(pruning_id).iterdir())
