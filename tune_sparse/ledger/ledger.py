"""The ledger: what was run, proved by a finished record, found by what it was.

A results folder holds

    sweeps/<sweep_id>.json          the cells that a sweep requested, and the run that serves each
    runs/<run_id>/                  one training: config, result, validation, outcomes, adapter
    checkpoints/<run_id>.pt         where a training stands that was not finished
    rungs.jsonl                     what trainings that may be stopped early reached, in order of arrival
    pruned_baselines/<id>.json, .parquet   metrics and outcomes of a pruned model before tuning, shared by the modes
    prunings/<pruning_id>/          masks, and the kept weights where a method updates them, made once and then read
    tunings/<tune_id>/              a search over trainings: its trials and the best of them
    set_aside/                      earlier failures and discarded runs, with the reason
    lease.json                      who is writing, with a heartbeat

A run's files are written in a hidden folder that is renamed when its `result.json` is complete, so a run folder
is whole or absent. A run is done only if its `result.json` parses and says so.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_sparse.errors import NotReadyError
from tune_sparse.evaluation.outcomes import Outcome, write_outcomes
from tune_sparse.files import aside, flush, read_json, write_json
from tune_sparse.ledger.prunings import DESCRIPTION, StoredPruning, read_pruning
from tune_sparse.ledger.record import Record, SweepRecord, is_done, read_record, readable_sweeps
from tune_sparse.ledger.run import Run, read_config, write_config

if TYPE_CHECKING:
    from torch import Tensor

    from tune_sparse.pruning.bit_masks import BitMasks


class Ledger:
    """One results folder: a `RunStore` for workers, a `LedgerReader` for everyone else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder,)

    def run_ids(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "runs").glob("[!.]*"))

    def run_folder(self, run_id: str) -> Path:
        return self.folder / "runs" / run_id

    def checkpoint(self, run_id: str) -> Path:
        return self.folder / "checkpoints" / f"{run_id}.pt"

    def hang_report(self, run_id: str) -> Path:
        # Its name is that of a partial file, so that reports that nobody read go as partial files go.
        return self.folder / "checkpoints" / f".{run_id}.hang.partial"

    def record(self, run_id: str) -> Record | None:
        return read_record(self.run_folder(run_id))

    def run(self, run_id: str) -> Run:
        return read_config(self.run_folder(run_id))

    def is_done(self, run_id: str) -> bool:
        return is_done(self.run_folder(run_id))

    def finished(self, run_id: str) -> Path:
        if not self.is_done(run_id):
            raise NotReadyError(f"a run that others begin from must be done, {run_id} is not. Start its sweep again.")
        return self.run_folder(run_id)

    @contextmanager
    def writing(self, run_id: str) -> Iterator[Path]:
        """Lend a hidden folder to write a run into; it takes the run's name if the block ends well.

        A folder that is already there is set aside, unless it is done: then the new one is dropped, since the
        same run was finished by someone else meanwhile. A folder without a record is dropped too.
        """
        partial = aside(self.run_folder(run_id))
        partial.mkdir(parents=True)
        try:
            yield partial
            if (partial / "result.json").exists():
                flush(*partial.rglob("*"), partial)
                self._name(partial, run_id)
                flush(partial.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _name(self, folder: Path, run_id: str) -> None:
        """Give a run its name unless a finished one has it. A worker that was cut off may do this at the same time as
        the one that replaced it: only one can rename a folder to a name that is free."""
        final = self.run_folder(run_id)
        while not self.is_done(run_id):
            with suppress(FileNotFoundError):  # the other one was faster
                if final.exists():
                    earlier = self.set_aside(run_id, "tried again")
                    if is_done(earlier):  # it was finished since we looked, so it goes back
                        folder = earlier
            try:
                folder.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                (final / "set_aside.json").unlink(missing_ok=True)
                return

    def write_record(self, run: Run, record: Record) -> None:
        """Write a run folder that holds only how the run ended: for runs that did not get further."""
        with self.writing(run.run_id) as folder:
            write_config(folder, run)
            write_json(folder / "result.json", asdict(record))

    def set_aside(self, run_id: str, reason: str) -> Path:
        """Move a run out of the results, kept and explained; nothing is deleted."""
        folder = self.run_folder(run_id)
        write_json(folder / "set_aside.json", {"reason": reason, "at": time.time()})
        target = self.folder / "set_aside" / f"{run_id}_{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return target

    def running(self) -> set[str]:
        """Runs that are being written, or were when their writer was killed."""
        names = (path.name for path in (self.folder / "runs").glob(".*.partial"))
        return {name[1:].rsplit(".", 2)[0] for name in names}

    def remove_partial(self) -> None:
        """Remove what killed writers left. Only the owner of its lease may."""
        for path in (self.folder / "checkpoints").glob("[!.]*.pt"):
            if self.is_done(path.stem):  # saved by a worker that did not know that it was replaced
                path.unlink()
        for path in (*self.folder.glob(".*.partial"), *self.folder.glob("*/.*.partial")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def pruned_baseline(self, baseline_id: str) -> dict[str, Any] | None:
        try:
            known: dict[str, Any] = read_json(self.folder / "pruned_baselines" / f"{baseline_id}.json")
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return known

    def write_pruned_baseline(self, baseline_id: str, value: dict[str, Any], outcomes: Iterable[Outcome]) -> None:
        # The runs of a worker that was faster may have copied its metrics by now, so these stay.
        if self.pruned_baseline(baseline_id) is not None:
            return
        folder = self.folder / "pruned_baselines"
        folder.mkdir(parents=True, exist_ok=True)
        metrics, predictions = folder / f"{baseline_id}.json", folder / f"{baseline_id}.parquet"
        write_outcomes(predictions, outcomes)
        flush(predictions)
        write_json(metrics, value)
        flush(metrics, folder)

    def pruning(self, run: Run) -> StoredPruning | None:
        return read_pruning(self.pruning_folder(run.pruning_id), run.pruning_settings) if run.pruning_id else None

    def write_pruning(
        self, run: Run, masks: BitMasks, weights: Mapping[str, Tensor] | None, provenance: Mapping[str, Any]
    ) -> None:
        from tune_sparse.ledger.pruning_io import write_pruning

        assert run.pruning_id is not None
        assert run.pruning_settings is not None
        write_pruning(self.pruning_folder(run.pruning_id), run.pruning_settings, masks, weights, provenance)

    def pruning_folder(self, pruning_id: str) -> Path:
        return self.folder / "prunings" / pruning_id

    def discard_pruning(self, pruning_id: str, reason: str) -> None:
        """Remove a pruning for the room that it takes; what it was is set aside with the reason."""
        folder = self.pruning_folder(pruning_id)
        target = self.folder / "set_aside" / f"{pruning_id}_{time.time_ns()}"
        target.mkdir(parents=True)
        with suppress(FileNotFoundError):
            shutil.copy(folder / DESCRIPTION, target)
        write_json(target / "set_aside.json", {"reason": reason, "at": time.time()})
        gone = aside(folder)
        folder.rename(gone)
        shutil.rmtree(gone)

    def searches(self) -> list[Path]:
        return sorted((self.folder / "searches").glob("*"))

    def write_sweep(self, sweep: SweepRecord) -> None:
        (self.folder / "sweeps").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "sweeps" / f"{sweep.sweep_id}.json", asdict(sweep))

    def sweeps(self) -> list[SweepRecord]:
        found = readable_sweeps(self.folder / "sweeps")
        return sorted(found, key=lambda sweep: (sweep.started, sweep.sweep_id))
