"""The check that one comparison has one protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from itertools import combinations
from typing import Any

from analysis.audit.errors import Detections, grouped
from analysis.read.results import Results, RunFiles
from tune_sparse.config import Cell
from tune_sparse.config.protocol import CALIBRATION_SETTINGS, UNCOMPARED_SETTINGS
from tune_sparse.ledger.run import Run
from tune_sparse.schedules import SCHEDULES

INPUTS = ("model_fingerprint", "data_fingerprint", "prompt_version")
Settings = tuple[tuple[str, Any], ...]


def protocol(results: Results) -> Detections:
    """Cells of one model and task are compared: with each other, and with their dense baseline.

    Two sweeps that have the same cells under two protocols are two comparisons. One comparison mixes protocols where
    two of its cells are never done under the same one. Runs whose settings are not to be trusted are left to
    `identity`.
    """
    requested = {cell["run_id"] for sweep in results.sweeps for cell in sweep.cells}
    done = [e for e in results.done if e.run_id in requested and e.run.identity == e.record.identity]
    for (model, task), runs in grouped(done, lambda e: (e.run.cell.model, e.run.cell.task)).items():
        if not _is_mixed(runs):
            continue
        for name, by_value in _differing(runs).items():
            values = "; ".join(f"{value!r} in {_named(same)}" for value, same in by_value)
            yield (
                f"{model}, {task}: runs that are compared have several values of {name}: {values}. Report sweeps "
                "of one protocol (`report --sweep NAME`), or set the others aside (`discard RUN --reason WHY`)",
                [e.run_id for e in by_value[-1][1]],
            )


def compared_settings(run: Run) -> dict[str, Any]:
    """The settings of a run's protocol that change its numbers; those of a calibration where it has one, and the
    recovery of a pruned model."""
    unread = {*UNCOMPARED_SETTINGS, *(() if run.is_calibrated else CALIBRATION_SETTINGS)}
    unread |= set() if run.is_pruned else {"recover"}
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


def _is_mixed(runs: Iterable[RunFiles]) -> bool:
    protocols: dict[Cell, set[Settings]] = defaultdict(set)
    for e in runs:
        protocols[e.run.cell].add(tuple(compared_settings(e.run).items()))
    kinds = {frozenset(found) for found in protocols.values()}
    return any(not _agree(first, second) for first, second in combinations(kinds, 2))


def _agree(first: frozenset[Settings], second: frozenset[Settings]) -> bool:
    """Whether two cells, each done under some protocols, are done under one and the same."""
    pairs = ((dict(a), dict(b)) for a in first for b in second)
    return any(all(a[name] == b[name] for name in a.keys() & b.keys()) for a, b in pairs)


def _differing(runs: Iterable[RunFiles]) -> dict[str, list[tuple[Any, list[RunFiles]]]]:
    """{setting: (value, runs), the commonest value first} of the settings that differ."""
    found: dict[str, dict[Any, list[RunFiles]]] = defaultdict(lambda: defaultdict(list))
    for e in runs:
        for name, value in compared_settings(e.run).items():
            found[name][value].append(e)
    by_count = {name: sorted(by_value.items(), key=lambda item: -len(item[1])) for name, by_value in found.items()}
    return {name: by_value for name, by_value in by_count.items() if len(by_value) > 1}


def _named(runs: list[RunFiles]) -> str:
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{runs[0].run_id}{more}"
