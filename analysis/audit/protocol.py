"""The check that one comparison has one protocol."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from analysis.audit.errors import Detections, grouped
from analysis.read.results import Results, RunFiles
from tune_sparse.config import Cell
from tune_sparse.config.axes import settings_of
from tune_sparse.config.protocol import CALIBRATION_SETTINGS, UNCOMPARED_SETTINGS
from tune_sparse.ledger.choice import axes_key, requested_cells
from tune_sparse.ledger.run import Run
from tune_sparse.schedules import SCHEDULES

INPUTS = ("model_fingerprint", "data_fingerprint", "prompt_version")
Settings = tuple[tuple[str, Any], ...]
CHOSEN_AMONG = "the values to choose from"
"""A setting is chosen for each cell among those of an axis, or is the same for all."""


def protocol(results: Results) -> Detections:
    """Cells of one model and task are compared: with each other, and with their dense baseline.

    Two sweeps that have the same cells under two protocols are two comparisons. One comparison mixes protocols where
    two of its cells are never done under the same one. A choice among the values of an axis is one protocol, another
    than each value alone. Runs whose settings are not to be trusted are left to `identity`.
    """
    requested: dict[str, set[str]] = defaultdict(set)
    for cell in requested_cells(results.sweeps):
        requested[cell.run_id].add(axes_key(cell.axes))
    trusted = [e for e in results.done if e.run.identity == e.record.identity]
    done = [ComparedRun(e, axes) for e in trusted for axes in sorted(requested[e.run_id])]
    for (model, task), runs in grouped(done, lambda e: (e.cell.model, e.cell.task)).items():
        if not _is_mixed(runs):
            continue
        for name, by_value in _differing(runs).items():
            values = "; ".join(f"{value!r} in {_named(same)}" for value, same in by_value)
            yield (
                f"{model}, {task}: runs that are compared have several values of {name}: {values}. Report sweeps "
                "of one protocol (`report --sweep NAME`), or set the others aside (`discard RUN --reason WHY`)",
                [compared.files.run_id for compared in by_value[-1][1]],
            )


@dataclass(frozen=True)
class ComparedRun:
    """A run as a sweep requested it."""

    files: RunFiles
    axes: str
    """key of the sweep's axes, empty where it had none"""

    @property
    def cell(self) -> Cell:
        return self.files.run.cell

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are compared; in place of the values of axes what they were."""
        tuned = {name for axis in json.loads(self.axes or "{}") for name in settings_of(axis)}
        settings = {name: value for name, value in compared_settings(self.files.run).items() if name not in tuned}
        return settings | {CHOSEN_AMONG: self.axes or "no axis"}


def compared_settings(run: Run) -> dict[str, Any]:
    """The settings of a run's protocol that change its numbers; those of a calibration where it has one, and the
    recovery of a pruned model. Levels of one chain differ in their steps, and none is paired with a run of others."""
    unread = {*UNCOMPARED_SETTINGS, *(() if run.is_calibrated else CALIBRATION_SETTINGS)}
    unread |= set() if run.is_pruned else {"recover"}
    unread |= {"steps"} if run.is_level else set()
    return {name: value for name, value in asdict(run.protocol).items() if name not in unread}


def differing_settings(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """{setting: its two values} of the compared settings that both runs have, of their schedule, and of what they were
    made from."""
    one, other = (
        compared_settings(run)
        | SCHEDULES[run.cell.schedule].read(run.schedule_settings)
        | {name: getattr(run, name) for name in INPUTS}
        for run in (first, second)
    )
    return {name: (one[name], other[name]) for name in one if name in other and one[name] != other[name]}


def _is_mixed(runs: Iterable[ComparedRun]) -> bool:
    protocols: dict[Cell, set[Settings]] = defaultdict(set)
    for compared in runs:
        protocols[compared.cell].add(tuple(compared.settings.items()))
    kinds = {frozenset(found) for found in protocols.values()}
    return any(not _agree(first, second) for first, second in combinations(kinds, 2))


def _agree(first: frozenset[Settings], second: frozenset[Settings]) -> bool:
    """Whether two cells, each done under some protocols, are done under one and the same."""
    pairs = ((dict(a), dict(b)) for a in first for b in second)
    return any(all(a[name] == b[name] for name in a.keys() & b.keys()) for a, b in pairs)


def _differing(runs: Iterable[ComparedRun]) -> dict[str, list[tuple[Any, list[ComparedRun]]]]:
    """{setting: (value, runs), the commonest value first} of the settings that differ."""
    found: dict[str, dict[Any, list[ComparedRun]]] = defaultdict(lambda: defaultdict(list))
    for compared in runs:
        for name, value in compared.settings.items():
            found[name][value].append(compared)
    by_count = {name: sorted(by_value.items(), key=lambda item: -len(item[1])) for name, by_value in found.items()}
    return {name: by_value for name, by_value in by_count.items() if len(by_value) > 1}


def _named(runs: list[ComparedRun]) -> str:
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{runs[0].files.run_id}{more}"
