"""A CS-3 as a Ray resource: an actor has it while a training runs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from trainables.cerebras_backend import CerebrasTraining, TrainingJob, launch
from tune_sparse.cerebras.guard import Ended, SupervisedProcess
from tune_sparse.config import CS3, Cerebras


class _JobActor:
    """Runs a job where a CS-3 can be reached. When it goes, the guard ends the training and cancels its job."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._process: SupervisedProcess | None = None

    def ended(self) -> Ended | None:
        if self._process is None:
            self._process = launch(self._job)
        return self._process.ended()


class QueuedJob:
    """A training that begins when a CS-3 is free."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        # Outside of the trial's own resources, which it keeps all the while.
        options = {"num_cpus": 0, "resources": {CS3: 1}, "scheduling_strategy": "DEFAULT"}
        self._actor: Any = ray.remote(**options)(_JobActor).remote(job)
        self._answer: Any = None

    def ended(self) -> Ended | None:
        if self._answer is None:
            self._answer = self._actor.ended.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return None
        answer, self._answer = self._answer, None
        try:
            return ray.get(answer)
        except ray.exceptions.RayActorError as error:
            raise ConnectionError(f"the process that holds the CS-3 was lost: {error}") from error

    def stop(self) -> None:
        (self._job.folder / "stop").touch()
        ray.kill(self._actor)


def on_cs3(settings: Mapping[str, Any]) -> CerebrasTraining:
    """The training stage of a trial of the backend cerebras."""
    return CerebrasTraining(Cerebras(**settings), QueuedJob)
