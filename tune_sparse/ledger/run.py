"""The identity of a run: everything that changes its result, and the ids that follow from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tune_sparse.config import BudgetOptions, Cell, Protocol, ScheduleSettings
from tune_sparse.config.protocol import CALIBRATION_SETTINGS, SCORING
from tune_sparse.files import write_text
from tune_sparse.identity import NUMERICS_VERSION, hash_json
from tune_sparse.lora.rank_space import SuperAdapter
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import METHODS
from tune_sparse.schedules import ONE_SHOT, SCHEDULES, Update
from tune_sparse.training.budgets import fixed_micro_batch_tokens


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
    budgets: BudgetOptions = BudgetOptions()
    """What its user set of the budgets. Only with dropout a micro-batch changes more than the order of additions."""
    schedule_settings: ScheduleSettings = ScheduleSettings()

    @property
    def is_pruned(self) -> bool:
        return self.cell.method in METHODS and self.cell.sparsity > 0

    @property
    def is_recovered(self) -> bool:
        """Its pruned weights are recovered before they are trained or scored."""
        return self.is_pruned and self.protocol.recover != "none"

    @property
    def is_calibrated(self) -> bool:
        is_scored = self.cell.method in METHODS and METHODS[self.cell.method].is_calibrated
        return is_scored or self.is_recovered

    @property
    def updates_weights(self) -> bool:
        """Weights that its mask keeps are not the dense ones."""
        is_updated = self.cell.method in METHODS and METHODS[self.cell.method].updates_weights
        return self.cell.sparsity > 0 and (is_updated or self.is_recovered)

    @property
    def updates(self) -> list[Update]:
        """The updates of its masks while it trains, in their order."""
        return SCHEDULES[self.cell.schedule].plan(self.schedule_settings, self.cell.sparsity, self.protocol.steps)

    @property
    def starting_sparsity(self) -> float:
        """Of the masks that its training begins with."""
        return 0.0 if SCHEDULES[self.cell.schedule].starts_dense else self.cell.sparsity

    @property
    def draw_seed(self) -> int:
        """Seed of what a training draws: A's start, the order of examples, dropout. Below 2**32.

        Cells of one seed do not share their luck; the modes of a pair do, and so do backends and a super-adapter.
        """
        c = self.cell
        return int(hash_json([self.model_fingerprint, c.task, c.method, c.sparsity, c.seed])[:8], 16)

    @property
    def identity(self) -> str:
        """SHA-256 of the canonical run; places on disk and budgets are left out."""
        return hash_json(self._identified())

    @property
    def run_id(self) -> str:
        kind = f"super-{self.cell.mode}" if self.super_adapter else self.cell.mode
        return readable_id(replace(self.cell, mode=kind), self.identity)

    @property
    def pruned_baseline_id(self) -> str:
        """Names the accuracy before tuning, which neither the mode nor the training changes."""
        c, p = self.cell, self.protocol
        if SCHEDULES[c.schedule].starts_dense:
            return replace(self, cell=replace(c, method="none", sparsity=0.0, schedule=ONE_SHOT)).pruned_baseline_id
        seed = c.seed if c.method in METHODS and METHODS[c.method].needs.seed else 0
        scored = [getattr(p, name) for name in SCORING]
        inputs = (NUMERICS_VERSION, self.model_fingerprint, self.data_fingerprint, self.prompt_version)
        pruned = [p.calibrated_by, self.calibration_fingerprint] if self.is_calibrated else []
        pruned += [p.recover] if self.is_recovered else []
        identity = hash_json([c.model, c.task, c.method, c.sparsity, c.backend, seed, *scored, *inputs, *pruned])
        return readable_id(Cell(c.model, c.task, c.method, c.sparsity, "pruned-baseline", seed, c.backend), identity)

    @property
    def pruning_settings(self) -> dict[str, Any] | None:
        """Everything that decides a stored pruning: neither mode, nor training, nor budgets. None where a method's
        prunings are not stored."""
        c, method = self.cell, METHODS.get(self.cell.method)
        if method is None or not c.sparsity or not (method.is_stored or self.is_recovered):
            return None
        settings = {"model": c.model, "method": c.method, "sparsity": c.sparsity, "precision": self.protocol.precision}
        settings |= {"model_fingerprint": self.model_fingerprint, "numerics_version": NUMERICS_VERSION}
        settings |= {"seed": c.seed} if method.needs.seed else {}
        settings |= {"recover": self.protocol.recover} if self.is_recovered else {}
        return settings | (self._calibration if self.is_calibrated else {})

    @property
    def _calibration(self) -> dict[str, Any]:
        """Everything that decides what scores are calibrated on; a text is the same for every task."""
        p = self.protocol
        settings = p.calibrated_by | {"threads": p.threads}
        if p.calibration != "task":
            return settings | {"calibration_fingerprint": self.calibration_fingerprint}
        settings |= {"task": self.cell.task, "data_fingerprint": self.data_fingerprint}
        return settings | {"prompt_version": self.prompt_version, "max_tokens": p.max_tokens, "n_train": p.n_train}

    @property
    def pruning_id(self) -> str | None:
        """Names the stored pruning: `<model>_<calibrated on>_<method>_s<NN>_<hash8>`."""
        settings = self.pruning_settings
        if settings is None:
            return None
        source = settings.get("task") or settings.get("calibration") or "uncalibrated"
        parts = (self.cell.model, source, self.cell.method, f"s{self.cell.sparsity * 100:02g}")
        return _readable(*parts, hash_json(settings)[:8])

    def _identified(self) -> dict[str, Any]:
        places = {"model_path", "data_dir", "budgets"}
        if not self.is_calibrated:
            places |= {"calibration_fingerprint"}
        places |= {name for name in ("cerebras", "super_adapter") if getattr(self, name) is None}
        known = {name: value for name, value in asdict(self).items() if name not in places}
        if not self.is_calibrated:
            known["protocol"] = {k: v for k, v in known["protocol"].items() if k not in CALIBRATION_SETTINGS}
        if not self.is_recovered:
            del known["protocol"]["recover"]
        if also := known["protocol"].pop("train_also"):
            known["protocol"]["train_also"] = sorted(also)
        known["schedule_settings"] = SCHEDULES[self.cell.schedule].read(self.schedule_settings)
        if self.cell.schedule == ONE_SHOT:
            del known["schedule_settings"], known["cell"]["schedule"]
        if numerics := MODES[self.cell.mode].numerics:
            known["mode_numerics"] = numerics
        if tokens := fixed_micro_batch_tokens(self.protocol, self.budgets):
            known["micro_batch_tokens"] = tokens
        return known | {"numerics_version": NUMERICS_VERSION}

    def as_config(self) -> dict[str, Any]:
        """Return the settings that `config.yaml` and a trial hold, in the plain types that both keep."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Run:
        protocol = dict(config["protocol"])
        protocol["train_also"] = tuple(protocol.get("train_also", ()))
        own: dict[str, Any] = {"cell": Cell(**config["cell"]), "protocol": Protocol(**protocol)}
        own["budgets"] = BudgetOptions(**config.get("budgets", {}))
        given: Mapping[str, Any] = config.get("schedule_settings", {})
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        own["schedule_settings"] = ScheduleSettings(**settings)
        if config.get("super_adapter"):
            own["super_adapter"] = SuperAdapter.from_config(config["super_adapter"])
        return cls(**{**config, **own})


def readable_id(cell: Cell, identity: str) -> str:
    """`<backend>_<model>_<task>_<method>_s<NN>_<mode>[-<schedule>]_<hash8>`, for people: settings are never read back
    from it."""
    sparsity = f"s{cell.sparsity * 100:02g}"
    parts = (cell.backend, cell.model, cell.task, cell.method, sparsity, cell.trained_by, identity[:8])
    return _readable(*parts)


def _readable(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(parts))


def write_config(folder: Path, run: Run) -> None:
    import yaml

    write_text(folder / "config.yaml", yaml.safe_dump(run.as_config(), sort_keys=False))


def read_config(folder: Path) -> Run:
    """Read the settings of the run that a folder holds."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Run.from_config(yaml.load((folder / "config.yaml").read_text("utf-8"), Loader=loader))
