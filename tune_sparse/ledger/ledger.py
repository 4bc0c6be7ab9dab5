"""The ledger: what was run, proved by a finished record, found by what it was.

A results folder holds

    sweeps/<sweep_id>.json          the cells that a sweep asked for, and the run that serves each
    runs/<run_id>/                  one training: config, result, validation, outcomes, adapter
    checkpoints/<run_id>.pt         where a training stands that was not finished
    pruned_baselines/<id>.json, .parquet   metrics and outcomes of a pruned model before tuning, shared by the modes
    set_aside/                      earlier failures and discarded runs, with the reason
    lease.json                      who is writing, with a heartbeat

A run's files are written in a hidden folder that is renamed when its `result.json` is complete, so a run folder
is whole or absent. A run is done only if its `result.json` parses and says so.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tune_sparse.config import CALIBRATION_SETTINGS, SCORING, Cell, Protocol
from tune_sparse.evaluation.outcomes import Outcome, write_outcomes
from tune_sparse.files import aside, flush, read_json, write_json, write_text
from tune_sparse.identity import NUMERICS_VERSION, hash_json
from tune_sparse.lora.rank_space import SuperAdapter
from tune_sparse.pruning.methods import METHODS

Status = Literal["done", "failed", "interrupted"]


@dataclass(frozen=True)
class Run:
    """One training, described by everything that changes its result."""

    cell: Cell
    protocol: Protocol
    model_path: str
    data_dir: str | None
    model_fingerprint: str
    data_fingerprint: str
    prompt_version: str
    """of each task of a mixture"""
    calibration_fingerprint: str | None = None
    """SHA-256 of calibration text that is not the task's."""
    cerebras: Mapping[str, str] | None = None
    """target and release of what trains a cell of the backend cerebras"""
    super_adapter: SuperAdapter | None = None
    """The space that its adapters are sampled from in training; None for a cell of the matrix."""

    @property
    def is_calibrated(self) -> bool:
        return self.cell.method in METHODS and METHODS[self.cell.method].is_calibrated

    @property
    def identity(self) -> str:
        """SHA-256 of the canonical run; places on disk are left out."""
        return hash_json(self._identified())

    @property
    def run_id(self) -> str:
        kind = f"super-{self.cell.mode}" if self.super_adapter else self.cell.mode
        return readable_id(replace(self.cell, mode=kind), self.identity)

    @property
    def pruned_baseline_id(self) -> str:
        """Names the accuracy before tuning, which neither the mode nor the training changes."""
        c, p = self.cell, self.protocol
        seed = c.seed if c.method in METHODS and METHODS[c.method].is_seeded else 0
        scored = [getattr(p, name) for name in SCORING]
        inputs = (NUMERICS_VERSION, self.model_fingerprint, self.data_fingerprint, self.prompt_version)
        calibrated = (p.calibrated_by, self.calibration_fingerprint) if self.is_calibrated else ()
        identity = hash_json([c.model, c.task, c.method, c.sparsity, c.backend, seed, *scored, *inputs, *calibrated])
        return readable_id(Cell(c.model, c.task, c.method, c.sparsity, "pruned-baseline", seed, c.backend), identity)

    def _identified(self) -> dict[str, Any]:
        places = {"model_path", "data_dir"}
        if not self.is_calibrated:
            places |= {"calibration_fingerprint"}
        places |= {name for name in ("cerebras", "super_adapter") if getattr(self, name) is None}
        known = {name: value for name, value in asdict(self).items() if name not in places}
        if not self.is_calibrated:
            known["protocol"] = {k: v for k, v in known["protocol"].items() if k not in CALIBRATION_SETTINGS}
        return known | {"numerics_version": NUMERICS_VERSION}

    def as_config(self) -> dict[str, Any]:
        """What `config.yaml` and a trial hold, in the plain types that both keep."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Run:
        own = {"cell": Cell(**config["cell"]), "protocol": Protocol(**config["protocol"])}
        if config.get("super_adapter"):
            own["super_adapter"] = SuperAdapter.from_config(config["super_adapter"])
        return cls(**{**config, **own})


def readable_id(cell: Cell, identity: str) -> str:
    """`<backend>_<model>_<task>_<method>_s<NN>_<mode>_<hash8>`, for people: settings are never read back from it."""
    parts = (cell.backend, cell.model, cell.task, cell.method, f"s{cell.sparsity * 100:02g}", cell.mode, identity[:8])
    return re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(parts))


@dataclass(frozen=True)
class Record:
    """How a run ended. `metrics` repeat bit for bit on a CPU; `measured` are seconds, rates and memory."""

    run_id: str
    identity: str
    status: Status
    metrics: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    """class, message, traceback, retryable"""


@dataclass(frozen=True)
class SweepRecord:
    """What a sweep asked for: each cell with the id of the run that serves it."""

    sweep_id: str
    started: float
    config: dict[str, Any]
    cells: tuple[dict[str, Any], ...]
    """the fields of a `Cell`, with cell_id, run_id, shared_with (the cell_id that owns the run, or None), chance"""


class Ledger:
    """The runs of one results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_folder(self, run_id: str) -> Path:
        return self.folder / "runs" / run_id

    def checkpoint(self, run_id: str) -> Path:
        """Where an unfinished training is kept; it outlives the run's hidden folder."""
        return self.folder / "checkpoints" / f"{run_id}.pt"

    def hang_report(self, run_id: str) -> Path:
        """Where a worker that made no progress says where it stood; what is left of others goes as partial files go."""
        return self.folder / "checkpoints" / f".{run_id}.hang.partial"

    def record(self, run_id: str) -> Record | None:
        """How a run ended, or None if no readable record says so."""
        return _record_in(self.run_folder(run_id))

    def run(self, run_id: str) -> Run:
        """The settings of a recorded run."""
        import yaml

        return Run.from_config(yaml.safe_load((self.run_folder(run_id) / "config.yaml").read_text("utf-8")))

    def is_done(self, run_id: str) -> bool:
        return _is_done(self.run_folder(run_id))

    @contextmanager
    def writing(self, run_id: str) -> Iterator[Path]:
        """A hidden folder to write a run into; it takes the run's name if the block ends well.

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
                    if _is_done(earlier):  # it was finished since we looked, so it goes back
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
        """A run folder that holds only how the run ended: for runs that did not get further."""
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

    def pruned_baseline(self, pruned_baseline_id: str) -> dict[str, Any] | None:
        """Metrics of a pruned model before tuning, or None if no readable file has them."""
        try:
            known: dict[str, Any] = read_json(self.folder / "pruned_baselines" / f"{pruned_baseline_id}.json")
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return known

    def write_pruned_baseline(
        self, pruned_baseline_id: str, value: dict[str, Any], outcomes: Iterable[Outcome]
    ) -> None:
        """Unless another worker did, whose metrics its runs may have copied by now."""
        if self.pruned_baseline(pruned_baseline_id) is not None:
            return
        folder = self.folder / "pruned_baselines"
        folder.mkdir(parents=True, exist_ok=True)
        record, answers = folder / f"{pruned_baseline_id}.json", folder / f"{pruned_baseline_id}.parquet"
        write_outcomes(answers, outcomes)
        flush(answers)
        write_json(record, value)
        flush(record, folder)

    def searches(self) -> list[Path]:
        """The folder of every search that was started here."""
        return sorted((self.folder / "searches").glob("*"))

    def write_sweep(self, sweep: SweepRecord) -> None:
        (self.folder / "sweeps").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "sweeps" / f"{sweep.sweep_id}.json", asdict(sweep))

    def sweeps(self) -> list[SweepRecord]:
        """Every sweep that was started here and whose record can be read, the oldest first."""
        found = []
        for path in (self.folder / "sweeps").glob("*.json"):
            with suppress(json.JSONDecodeError, TypeError, UnicodeDecodeError):
                found.append(SweepRecord(**read_json(path)))
        return sorted(found, key=lambda sweep: (sweep.started, sweep.sweep_id))


def _record_in(folder: Path) -> Record | None:
    try:
        return Record(**read_json(folder / "result.json"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, TypeError, UnicodeDecodeError):
        return None


def _is_done(folder: Path) -> bool:
    record = _record_in(folder)
    return record is not None and record.status == "done"


def write_config(folder: Path, run: Run) -> None:
    import yaml

    write_text(folder / "config.yaml", yaml.safe_dump(run.as_config(), sort_keys=False))
