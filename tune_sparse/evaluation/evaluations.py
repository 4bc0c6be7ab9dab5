"""One model scored on one task: kept, resumed after a stop, found again by what it was.

A results folder holds `evaluations/<model>_<task>_<hash8>/` with `config.yaml`, `result.json` and `examples.parquet`.
While it is being scored, `outcomes.jsonl` grows by a batch at a time; `result.json` comes last.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from tune_sparse.config import Protocol
from tune_sparse.config.protocol import SCORING
from tune_sparse.data.splits import Splits
from tune_sparse.data.task_types import Task, TextTask
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.evaluation.metrics import Metrics, compute_metrics
from tune_sparse.evaluation.outcomes import Outcome, read_outcomes, write_outcomes
from tune_sparse.files import read_json, write_json, write_lines, write_text
from tune_sparse.identity import NUMERICS_VERSION, hash_json
from tune_sparse.training.budgets import CPU_BUDGETS, Budgets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVALUATORS = ("tune-sparse", "lm-eval")


@dataclass(frozen=True)
class EvaluationKey:
    """Everything that changes the numbers: the model, the task and its examples, the evaluator and its settings."""

    model: str
    fingerprint: str
    """of the weights and of the adapter, or the identity of the run that made them"""
    task: str
    data_fingerprint: str
    prompt_version: int
    evaluator: str
    settings: dict[str, Any]
    numerics_version: int = NUMERICS_VERSION

    @classmethod
    def from_protocol(
        cls, model: str, fingerprint: str, task: Task, splits: Splits, protocol: Protocol, evaluator: str
    ) -> EvaluationKey:
        """Raises `InputError` for an unknown evaluator, or one that has not this task."""
        if evaluator not in EVALUATORS:
            raise unknown_name("evaluator", evaluator, EVALUATORS)
        if evaluator == "lm-eval":
            from tune_sparse.evaluation.harness import check_harness

            check_harness(task)
        settings = {name: getattr(protocol, name) for name in SCORING}
        version = task.prompt_version
        return cls(model, fingerprint, task.name, splits.fingerprint, version, evaluator, settings)

    @property
    def name(self) -> str:
        """For people: settings are never read back from it."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", f"{self.model}_{self.task}_{hash_json(asdict(self))[:8]}")


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    key: EvaluationKey
    folder: Path
    metrics: Metrics

    @property
    def outcomes(self) -> list[Outcome]:
        return read_outcomes(self.folder / "examples.parquet")


LoadModel = Callable[[], tuple["PreTrainedModel", "PreTrainedTokenizerBase"]]
"""Loads what is scored, when it is needed."""


def evaluate(
    key: EvaluationKey,
    task: Task,
    splits: Splits,
    protocol: Protocol,
    load_model: LoadModel,
    results_dir: Path,
    budgets: Budgets = CPU_BUDGETS,
) -> Evaluation:
    """Score a model on a task's test examples, or find that this was done.

    A scoring that was stopped goes on after its last whole batch, and under the same budgets ends with the
    same numbers.
    Raises `InputError` while another process scores the same, `RunError` if the model computes NaN.
    """
    folder = results_dir / "evaluations" / key.name
    with _alone(folder):
        if not (folder / "result.json").exists():
            _evaluate_into(folder, key, task, splits, protocol, load_model, budgets)
    return Evaluation(key, folder, read_json(folder / "result.json")["metrics"])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"one process at a time scores a model, another one is at {folder}. Wait for it.") from error


def _evaluate_into(
    folder: Path,
    key: EvaluationKey,
    task: Task,
    splits: Splits,
    protocol: Protocol,
    load_model: LoadModel,
    budgets: Budgets,
) -> None:
    import yaml

    write_text(folder / "config.yaml", yaml.safe_dump(asdict(key), sort_keys=False))
    from tune_sparse.evaluation.scoring import text_bytes_per_token

    model, tokenizer = load_model()
    started = time.perf_counter()
    if key.evaluator == "lm-eval":
        from tune_sparse.evaluation.harness import harness_outcomes

        outcomes, resumed = harness_outcomes(model, tokenizer, task, splits.test, splits.shots, protocol, budgets), 0
    else:
        outcomes, resumed = _score_on(folder, model, tokenizer, task, splits, protocol, budgets)
    seconds = time.perf_counter() - started
    ratio = text_bytes_per_token(tokenizer, splits.test) if isinstance(task, TextTask) else None
    metrics = compute_metrics(task, outcomes, ratio)
    write_outcomes(folder / "examples.parquet", outcomes)
    measured = {
        "examples_per_second": (len(outcomes) - resumed) / seconds,
        "examples_known_before": resumed,
        "budgets": budgets.as_record(),
    }
    write_json(folder / "result.json", {"metrics": metrics, "measured": measured})
    (folder / "outcomes.jsonl").unlink(missing_ok=True)


def _score_on(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    splits: Splits,
    protocol: Protocol,
    budgets: Budgets,
) -> tuple[list[Outcome], int]:
    """All outcomes in order, and how many were known before."""
    from tune_sparse.evaluation.scoring import compute_outcomes, encode_test

    tests = encode_test(tokenizer, task, splits.test, protocol, splits.shots)
    path = folder / "outcomes.jsonl"
    outcomes = _known(path)
    resumed = len(outcomes)
    write_lines(path, ([i, asdict(outcome)] for i, outcome in outcomes.items()))
    with path.open("a", encoding="utf-8") as lines:
        for batch in compute_outcomes(model, tokenizer, tests, protocol, frozenset(outcomes), budgets):
            outcomes |= batch
            lines.writelines(json.dumps([i, asdict(outcome)]) + "\n" for i, outcome in batch.items())
            lines.flush()
    return [outcomes[i] for i in range(len(tests.examples))], resumed


def _known(path: Path) -> dict[int, Outcome]:
    """Read what a stopped scoring wrote; the last line may be torn."""
    known = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            i, values = json.loads(line)
        except ValueError:
            continue
        known[i] = Outcome(**values | {"log_likelihoods": tuple(values["log_likelihoods"])})
    return known
