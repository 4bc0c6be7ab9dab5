"""The contracts of a ledger: workers write runs into a `RunStore`, analysis and tracking read a `LedgerReader`.

A results folder (`Ledger`) is both. Several folders merged can only be read; a remote one can only be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tune_sparse.evaluation.outcomes import Outcome
from tune_sparse.ledger.prunings import StoredPruning
from tune_sparse.ledger.record import Record, SweepRecord
from tune_sparse.ledger.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from tune_sparse.pruning.bit_masks import BitMasks


class RunStore(Protocol):
    """Takes in runs, and keeps what a worker needs to train one."""

    @property
    def folder(self) -> Path:
        """The folder that this worker writes to: the results folder, or one of its own that goes with the run."""

    def checkpoint(self, run_id: str) -> Path:
        """Return the checkpoint of an unfinished training; it outlives the run's hidden folder."""

    def hang_report(self, run_id: str) -> Path:
        """Return the file in which the watchdog says where a worker stood that made no progress."""

    def writing(self, run_id: str) -> AbstractContextManager[Path]:
        """Lend a hidden folder to write a run into; it takes the run's name if the block ends well."""

    def pruned_baseline(self, baseline_id: str) -> dict[str, Any] | None:
        """Read the metrics of a pruned model before tuning; None if no readable file has them."""

    def write_pruned_baseline(self, baseline_id: str, value: dict[str, Any], outcomes: Iterable[Outcome]) -> None:
        """Keep the metrics of a pruned model before tuning, unless another worker did."""

    def finished(self, run_id: str) -> Path:
        """Return a folder with all files of a run that is done, to be read. Raises `NotReadyError` for another run."""

    def pruning(self, run: Run) -> StoredPruning | None:
        """Return the stored pruning that a run trains on; None if nobody made it yet, or its method stores none.

        Raises `NotReadyError` for one that is not whole.
        """

    def write_pruning(
        self, run: Run, masks: BitMasks, weights: Mapping[str, Tensor] | None, provenance: Mapping[str, Any]
    ) -> None:
        """Keep the pruning that a run trains on, unless another worker did: `pruning` then returns that one.

        weights: {matrix: its pruned weight} of a method that updates weights, else None. provenance: see
        `StoredPruning`.
        """


class LedgerReader(Protocol):
    """Finds finished runs, and the sweeps and searches that requested them."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The results folders. What describes all of them is kept in the first."""

    def run_ids(self) -> list[str]:
        """Name every run that has a folder, however it ended."""

    def run_folder(self, run_id: str) -> Path:
        """Return the folder of a run, which exists if the run has ended."""

    def record(self, run_id: str) -> Record | None:
        """Read how a run ended; None if no readable record says so."""

    def run(self, run_id: str) -> Run:
        """Read the settings of a recorded run."""

    def pruning(self, run: Run) -> StoredPruning | None:
        """Return the stored pruning that a recorded run was trained on, from where that run lies.

        None if it is gone, or the method stores none. Raises `NotReadyError` for one that is not whole.
        """

    def is_done(self, run_id: str) -> bool:
        """Say whether a record has the run as done."""

    def sweeps(self) -> list[SweepRecord]:
        """Read every sweep record that can be read, the oldest first."""

    def searches(self) -> list[Path]:
        """Return the folder of every search that was started."""
