"""The result of a search over trainings: its trials, the best of them, and only then their test scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tune_sparse.config.options import value_text
from tune_sparse.evaluation.metrics import score_name
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.search.journal import Journal
from tune_sparse.search.tuning_config import OBJECTIVES
from tune_sparse.search.tuning_plan import TunePlan
from tune_sparse.search.tuning_trial import Trial


def result_of(plan: TunePlan, ledger: LedgerReader, journal: Journal[Trial]) -> dict[str, Any]:
    """Everything that a search found. The best are chosen by what the sampler was told, which no test example changes;
    every finished run has test scores, and those of the best alone are read here."""
    objectives = plan.config.objectives
    trials = journal.suggestions
    best = best_of({trial.number: trial.values for trial in trials if trial.values}, objectives)
    return {
        "tune_id": plan.tune_id,
        **plan.settings,
        "trials": [_row(trial) for trial in trials],
        "best": best,
        "test": {str(number): _test(ledger, trials[number]) for number in best},
    }


def best_of(values: Mapping[int, Mapping[str, float]], objectives: Sequence[str]) -> list[int]:
    """The trials that no other beats in every objective: of one objective the best, the first of equals."""
    signs = [1 if OBJECTIVES[name].mode == "min" else -1 for name in objectives]
    costs = {n: tuple(s * found[o] for s, o in zip(signs, objectives, strict=True)) for n, found in values.items()}
    first = {cost: number for number, cost in reversed(costs.items())}
    front = [number for cost, number in first.items() if not any(_dominates(other, cost) for other in first)]
    return sorted(front, key=costs.__getitem__)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _row(trial: Trial) -> dict[str, Any]:
    found = {"number": trial.number, "state": trial.state or "open", "run_id": trial.run_id}
    return found | {"settings": trial.point, "values": trial.values, "stopped": trial.stopped, "error": trial.error}


def _test(ledger: LedgerReader, trial: Trial) -> dict[str, Any]:
    assert trial.run_id is not None
    record = ledger.record(trial.run_id)
    assert record is not None
    name = score_name(record.metrics)
    return {"metric": record.metrics["primary_metric"], "score": record.metrics[name]}


def result_lines(found: Mapping[str, Any]) -> list[str]:
    """A search for the terminal: the trials, the best first; then the test scores of the best."""
    states = [trial["state"] for trial in found["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"{len(states)} trials: {counts}."]
    order = sorted(found["trials"], key=lambda trial: (trial["values"] or {}).get("loss", float("inf")))
    lines += [_line(trial, trial["number"] in found["best"]) for trial in order]
    for number, test in found["test"].items():
        run_id = found["trials"][int(number)]["run_id"]
        lines.append(
            f"trial {number} on test examples, looked at only now: {test['metric']} {test['score']:.4f} {run_id}"
        )
    lines.append("Chosen on selection examples. Lower losses were picked among many, so the best one's is optimistic.")
    return lines


def _line(trial: Mapping[str, Any], is_best: bool) -> str:
    settings = " ".join(f"{name}={value_text(value)}" for name, value in trial["settings"].items())
    if trial["values"]:
        became = " ".join(f"{name} {value:.4g}" for name, value in trial["values"].items())
    elif trial["stopped"]:
        became = f"stopped at step {trial['stopped']['step']}"
    else:
        became = trial["state"] + (f": {trial['error']}" if trial["error"] else "")
    return f"{'*' if is_best else ' '} {trial['number']:3}  {became:32}  {settings}"
