"""MLflow as a view of the ledger: it can be down, be late, or be rebuilt, and never has a run twice.

One parent run a sweep, one child a training, found by the tags `tune_sparse.sweep_id` and `tune_sparse.run_id`. A run
of MLflow is whole once it has ended: one that is still RUNNING was cut off while it was logged.

Several results folders may be shown in one store at once. A folder has one writer, the sweep that has locked it.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tune_sparse.config import SweepConfig
from tune_sparse.ledger.choice import chosen_runs
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.record import SweepRecord
from tune_sparse.net import check_address, check_listening
from tune_sparse.tracking.entries import (
    CANDIDATE_TAG,
    CHOSEN_TAG,
    RECORD_TAG,
    RUN_TAG,
    SEARCH_TAG,
    SWEEP_TAG,
    Entry,
    candidate_entries,
    record_hash,
    run_entry,
    search_entry,
    search_hash,
    sweep_entry,
)

EXPERIMENT = "tune-sparse"
PARENT_TAG = "mlflow.parentRunId"
PAGE_RUNS = 500


def tracking_uri(config: SweepConfig) -> str:
    """Take the address of the configuration, else MLFLOW_TRACKING_URI, else SQLite in the results folder."""
    return chosen_uri(config.tracking_uri, config.results_dir)


def chosen_uri(uri: str | None, results_dir: Path) -> str:
    """`uri`, or else MLFLOW_TRACKING_URI, or else SQLite in the results folder. Raises `InputError` for a password."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    check_address("tracking_uri", uri or "")
    check_address("MLFLOW_TRACKING_URI", named or "")
    return uri or named or default_uri(results_dir)


def default_uri(results_dir: Path) -> str:
    return f"sqlite:///{results_dir.resolve() / 'mlflow.db'}"


def make_client(uri: str) -> Any:
    """Make a client of one store that says nothing while it makes its tables, and reports to nobody else."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def every_run(client: Any, experiment: str) -> Iterator[Any]:
    """Yield the runs of an experiment that are not deleted, each once whatever is added meanwhile."""
    seen, token = set[str](), None
    while True:
        page = client.search_runs([experiment], max_results=PAGE_RUNS, page_token=token)
        yield from (run for run in page if run.info.run_id not in seen)
        seen |= {run.info.run_id for run in page}
        token = page.token
        if not token:
            return


Key = tuple[str, str]
"""A tag and its value: what of the ledger a run of MLflow shows."""
KINDS = (SWEEP_TAG, RUN_TAG, SEARCH_TAG, CANDIDATE_TAG)
T = TypeVar("T")


@dataclass(frozen=True)
class TrackedRun:
    """A run of MLflow."""

    id_: str
    key: Key
    record: str | None
    is_whole: bool
    parent: str | None
    chosen: str | None = None
    """whether a cell of a sweep with axes chose it, as the tag says"""

    @classmethod
    def from_mlflow(cls, run: Any) -> TrackedRun:
        tags = run.data.tags
        key = next(((tag, tags[tag]) for tag in KINDS if tag in tags), ("", ""))
        is_whole, parent = run.info.status != "RUNNING", tags.get(PARENT_TAG)
        return cls(run.info.run_id, key, tags.get(RECORD_TAG), is_whole, parent, tags.get(CHOSEN_TAG))


class Tracker:
    """Shows a ledger in one MLflow store. What is already there in full is left alone.

    What is missing is logged first, then `_tidy` removes what must not stay: so nothing is lost where this is cut off.
    """

    def __init__(self, ledger: LedgerReader, uri: str, client: Any = None) -> None:
        self._ledger, self._client = ledger, client or make_client(uri)
        self._experiment = self._experiment_id(_artifact_location(ledger, uri))
        self._below: dict[str, str] = {}
        """{run_id: the sweep that it is shown below}"""
        self._wanted: dict[Key, str | None] = {}
        """{what was looked at: the hash of its record, None where it has none}"""
        self._read()

    def _experiment_id(self, artifact_location: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                return str(self._client.create_experiment(EXPERIMENT, artifact_location))
            except MlflowException:  # the sweep of another results folder has just made it
                found = self._client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _read(self) -> None:
        self._shown = defaultdict[Key, list[TrackedRun]](list)
        for run in every_run(self._client, self._experiment):
            one = TrackedRun.from_mlflow(run)
            self._shown[one.key].append(one)
        self._whole = {
            (key, one.record): one
            for key, all_ in self._shown.items()
            for one in sorted(all_, key=lambda one: one.id_, reverse=True)  # of equal ones the smallest id stays
            if one.is_whole
        }
        self._parents = {one.id_ for one in self._whole.values() if one.key[0] == SWEEP_TAG}
        self._has_written = False

    def fill(self, work: Callable[[Tracker], T]) -> T:
        """Return what `work` returns, once what must not stay is removed. Raises what MLflow raises."""
        self._wanted.clear()
        done = work(self)
        self._tidy()
        return done

    def fill_ledger(self) -> int:
        """Show everything in the ledger; returns how many recorded runs are now shown."""
        sweeps = self._ledger.sweeps()
        recorded = {run_id for sweep in sweeps for run_id in self.fill_sweep(sweep)}
        for folder in self._ledger.searches():
            self.fill_search(folder)
        self.mark_chosen()
        return len(recorded)

    def mark_chosen(self) -> None:
        """Tag what is shown of sweeps with axes: whether a cell chose it. The choice may change with every run."""
        for run_id, is_chosen in chosen_runs(self._ledger).items():
            record = self._ledger.record(run_id)
            shown = self._whole.get(((RUN_TAG, run_id), record_hash(record))) if record else None
            if shown is not None and shown.chosen != str(is_chosen).lower():
                self._client.set_tag(shown.id_, CHOSEN_TAG, str(is_chosen).lower())
                self._has_written = True

    def fill_sweep(self, sweep: SweepRecord) -> list[str]:
        """Show a sweep as a parent run, with a child for each training that has a record; returns these."""
        self._show((SWEEP_TAG, sweep.sweep_id), sweep.sweep_id, lambda: sweep_entry(sweep))
        runs = dict.fromkeys(cell["run_id"] for cell in sweep.cells)
        for run_id in runs:
            self._below.setdefault(run_id, sweep.sweep_id)
        return [run_id for run_id in runs if self.fill_run(run_id)]

    def fill_run(self, run_id: str) -> bool:
        """Show a training below the first sweep that has it. Returns whether it has a record."""
        record = self._ledger.record(run_id)
        if record is None:
            self._wanted[RUN_TAG, run_id] = None
            return False
        parent = self._find_parent(run_id)
        self._show((RUN_TAG, run_id), record_hash(record), lambda: run_entry(self._ledger, record), parent)
        return True

    def _find_parent(self, run_id: str) -> str:
        sweep = self._below[run_id]
        return self._whole[(SWEEP_TAG, sweep), sweep].id_

    def fill_search(self, folder: Path) -> None:
        """Show a search that has a result as a parent run, with a child for each candidate."""
        found = search_hash(folder)
        if found is not None:
            self._show((SEARCH_TAG, folder.name), found, lambda: search_entry(folder), None, candidate_entries(folder))

    def _show(
        self,
        key: Key,
        record: str,
        entry: Callable[[], Entry],
        parent: str | None = None,
        children: Iterable[Entry] = (),
    ) -> None:
        self._wanted[key] = record
        shown = self._whole.get((key, record))
        if shown is None:
            id_ = self._log(entry(), parent, children)
            self._whole[key, record] = TrackedRun(id_, key, record, is_whole=True, parent=parent)
            self._parents |= {id_} if key[0] == SWEEP_TAG else set()
            self._has_written = True
        elif parent and shown.parent not in self._parents:  # its sweep was removed, and is logged anew
            self._client.set_tag(shown.id_, PARENT_TAG, parent)
            self._has_written = True

    def _log(self, entry: Entry, parent: str | None = None, children: Iterable[Entry] = ()) -> str:
        """Make a run of MLflow, ended when all of it is there; returns its id. Calls are commits: few."""
        from mlflow.entities import Metric, Param

        started, ended = (int(1000 * at) if at else None for at in (entry.started, entry.ended))
        tags = entry.tags | ({PARENT_TAG: parent} if parent else {})
        id_ = str(self._client.create_run(self._experiment, started, tags, entry.name).info.run_id)
        metrics = [Metric(name, value, ended or started, step) for name, value, step in entry.points]
        self._client.log_batch(id_, metrics, [Param(name, str(value)) for name, value in entry.params.items()])
        for path in entry.files:
            self._client.log_artifact(id_, str(path))
        for child in children:
            self._log(child, id_)
        self._client.set_terminated(id_, entry.status, ended)
        return id_

    def _tidy(self) -> None:
        """Remove, of what was looked at, what was cut off, has changed, or was logged twice."""
        if self._has_written:  # a request whose answer was lost may have been served twice
            self._read()
        gone = set[str]()
        for key, record in self._wanted.items():
            kept = self._whole.get((key, record)) if record else None
            gone |= {one.id_ for one in self._shown[key] if one != kept}
        for id_ in (*gone, *self._orphans(gone)):
            self._client.delete_run(id_)

    def _orphans(self, gone: set[str]) -> list[str]:
        """The candidates of searches that were removed."""
        left = {one.id_ for all_ in self._shown.values() for one in all_} - gone
        candidates = [one for (tag, _), all_ in self._shown.items() if tag == CANDIDATE_TAG for one in all_]
        lost = {one.parent for one in candidates if one.parent} - left
        removed = {parent for parent in lost if parent in gone or not self._is_there(parent)}
        return [one.id_ for one in candidates if one.parent in removed]

    def _is_there(self, id_: str) -> bool:
        """Say whether a run was made while the others were read, for another results folder."""
        return bool(self._client.search_runs([self._experiment], f"attributes.run_id = '{id_}'"))


def _artifact_location(ledger: LedgerReader, uri: str) -> str | None:
    """Beside the ledger; None where a server keeps the files of its experiments."""
    return None if uri.startswith("http") else (ledger.folders[0] / "mlartifacts").resolve().as_uri()


def track_ledger(ledger: LedgerReader, uri: str) -> int:
    """Bring MLflow up to date with the whole ledger; returns how many recorded runs it now shows.

    Raises `OSError` if the store does not answer, or refuses.
    """
    from mlflow.exceptions import MlflowException

    check_listening(uri)
    try:
        return Tracker(ledger, uri).fill(Tracker.fill_ledger)
    except (MlflowException, ImportError) as error:  # a database needs its driver
        raise ConnectionError(str(error).partition("\n")[0]) from error
