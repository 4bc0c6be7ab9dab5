"""The Ray Tune trainable of a search: one trial is one candidate, one step is one stage of its examples. The worker
holds the super-adapter, and a candidate is a slice of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from trainables.process import prepare_process
from tune_sparse.errors import InputError
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.search.journal import Candidate, Candidates
from tune_sparse.search.racing import Correctness
from tune_sparse.watchdog import watchdog


class CandidateTrainable(tune.Trainable):
    """Scores `config["trial"]`: the `run` of a super-adapter, the `results_dir` of its ledger, `ranks`, and `stages`
    of examples. A result has the correctness so far; the last one is `done`. A worker ends after `hang_seconds`
    without progress, and computes only `deterministic` algorithms where that is set.

    With a `folder`, the candidate is instead finished there: written, merged, validated and scored on test examples.
    """

    def setup(self, config: dict[str, Any]) -> None:
        prepare_process(config["trial"]["deterministic"])
        self._scorer: Any = None
        self._begin(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config["trial"])
        return True

    def _begin(self, trial: Mapping[str, Any]) -> None:
        from tune_sparse.search.scorer import SliceScorer

        run, results_dir = Run.from_config(trial["run"]), Path(trial["results_dir"])
        if self._scorer is None or self._scorer.run.run_id != run.run_id:
            self._scorer = SliceScorer.from_run(run, Ledger(results_dir))
        self._trial, self._stages = trial, list(trial["stages"])
        dump = Ledger(results_dir).hang_report(f"{run.run_id}.{os.getpid()}")
        self._watchdog = partial(watchdog, dump, trial["hang_seconds"])
        self._candidates = Candidates(results_dir, run.run_id)
        ranks = trial["ranks"]
        known = self._candidates.read(ranks)
        if known is None or known.error:
            nothing = str(Correctness(len(self._scorer.tests.examples)))
            known = Candidate(ranks, self._scorer.parameters(ranks), nothing)
        self._candidate = known

    def step(self) -> dict[str, Any]:
        with self._watchdog():
            return self._stage()

    def _stage(self) -> dict[str, Any]:
        if self._trial.get("folder"):
            self._scorer.finish(self._trial["ranks"], Path(self._trial["folder"]))
            return {"done": True}
        before = Correctness.from_text(self._candidate.correctness).count
        error = self._answer(self._stages.pop(0)) if self._stages else None
        correctness = Correctness.from_text(self._candidate.correctness)
        return {
            "correctness": str(correctness),
            "error": error,
            "answered": correctness.count - before,
            "done": error is not None or not self._stages,
        }

    def _answer(self, stage: Sequence[int]) -> str | None:
        """Answer what is not known of a stage, and keep it; returns the error of a candidate that cannot be scored."""
        from trainables.failures import describe_error, is_infrastructure

        correctness, started = Correctness.from_text(self._candidate.correctness), time.perf_counter()
        if all(correctness.knows(i) for i in stage):
            return None
        try:
            correctness = correctness.adding(self._scorer.answers(self._trial["ranks"], stage, correctness))
        except Exception as error:
            if is_infrastructure(error) or isinstance(error, InputError):
                raise
            self._candidate = replace(self._candidate, error=describe_error(error, retryable=False))
            self._candidates.write(self._candidate)
            return f"{type(error).__name__}: {error}"
        seconds = self._candidate.seconds + time.perf_counter() - started
        self._candidate = replace(self._candidate, correctness=str(correctness), seconds=seconds, error=None)
        self._candidates.write(self._candidate)
        return None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: what was answered is in the ledger."""

    def load_checkpoint(self, checkpoint: str | None) -> None:
        """Nothing was saved."""
