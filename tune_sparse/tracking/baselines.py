"""Published numbers in MLflow, in an experiment of their own, and the address where they stand beside our runs.

A published run is known by the tag `tune_sparse.published`, the hash of what it says; none has `tune_sparse.run_id`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface
from urllib.parse import quote

from tune_sparse.tracking.entries import CHOSEN_TAG, RUN_TAG
from tune_sparse.tracking.sync import EXPERIMENT, every_run, make_client

PUBLISHED_EXPERIMENT = "tune-sparse published numbers"
PUBLISHED_TAG = "tune_sparse.published"
COMPLETE_TAG = "tune_sparse.complete"
"""Without it a run was cut off in the middle of importing."""
OURS_SHOWN, PUBLISHED_SHOWN = 6, 6
"""Columns of a comparison page that a person still reads."""
HALF = 0.5


class BaselineRun(Interface):
    """Published numbers of one setting, named as our runs name it."""

    @property
    def name(self) -> str: ...
    @property
    def params(self) -> dict[str, str]: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def tags(self) -> dict[str, str]: ...
    @property
    def identity(self) -> str: ...


def track_published(runs: Sequence[BaselineRun], uri: str) -> int:
    """Bring MLflow up to date with published numbers; returns how many runs it now shows.

    What is there in full is left alone, what was cut off is logged anew, what is published no more is removed.
    """
    from mlflow.entities import Metric, Param, RunTag

    client = make_client(uri)
    found = client.get_experiment_by_name(PUBLISHED_EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(PUBLISHED_EXPERIMENT)
    wanted = {run.identity: run for run in runs}
    for old in list(every_run(client, experiment)):
        tags = old.data.tags
        if PUBLISHED_TAG in tags and (COMPLETE_TAG not in tags or wanted.pop(tags[PUBLISHED_TAG], None) is None):
            client.delete_run(old.info.run_id)
    for identity, run in wanted.items():
        tags = {PUBLISHED_TAG: identity} | {f"published.{name}": value for name, value in run.tags.items()}
        id_ = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        client.set_terminated(id_)
        client.log_batch(
            id_,
            metrics=[Metric(name, value, 0, 0) for name, value in run.metrics.items()],
            params=[Param(name, value) for name, value in run.params.items()],
            tags=[RunTag(COMPLETE_TAG, "published")],
        )
    return len({run.identity for run in runs})


@dataclass(frozen=True)
class ComparisonPage:
    """An address below that of an MLflow server, and what is on it."""

    address: str
    ours: int
    published: int


def comparison_page(uri: str) -> ComparisonPage | None:
    """Our best run of each model and task beside published numbers; None without finished runs of ours.

    Best is most accurate of those that lost half their weights or more, where there are such; a run whose setting no
    cell chose on selection examples is none of them. Published runs of our
    models come first, then Phoenix and SQFT on our tasks, then others.
    """
    client = make_client(uri)
    experiments = {name: client.get_experiment_by_name(name) for name in (EXPERIMENT, PUBLISHED_EXPERIMENT)}
    ids = {name: found.experiment_id for name, found in experiments.items() if found}
    if EXPERIMENT not in ids:
        return None
    runs = (run for run in every_run(client, ids[EXPERIMENT]) if RUN_TAG in run.data.tags)
    ours = list(_best_of_each(run for run in runs if run.data.tags.get(CHOSEN_TAG) != "false"))
    if not ours:
        return None
    ours = ours[:OURS_SHOWN]
    published = every_run(client, ids[PUBLISHED_EXPERIMENT]) if PUBLISHED_EXPERIMENT in ids else ()
    beside = sorted(published, key=lambda run: _distance(run, ours))[:PUBLISHED_SHOWN]
    shown = [run.info.run_id for run in (*ours, *beside)]
    address = f"#/compare-runs?runs={quote(json.dumps(shown))}&experiments={quote(json.dumps(list(ids.values())))}"
    return ComparisonPage(address, len(ours), len(beside))


def _best_of_each(runs: Iterable[Any]) -> Iterator[Any]:
    """By task and model."""
    best: dict[tuple[str, str], Any] = {}
    for run in runs:
        key = (run.data.params["task"], run.data.params["model"])
        if run.data.metrics.keys() & {"accuracy", "perplexity"} and (key not in best or _rank(run) > _rank(best[key])):
            best[key] = run
    yield from (best[key] for key in sorted(best))


def _rank(run: Any) -> tuple[bool, float]:
    metrics = run.data.metrics
    good = metrics["accuracy"] if "accuracy" in metrics else -metrics["perplexity"]
    return float(run.data.params["sparsity"]) >= HALF, good


def _distance(run: Any, ours: Sequence[Any]) -> tuple[Any, ...]:
    """Smaller for what is nearer to our runs; ties by name."""
    params, name = run.data.params, run.info.run_name
    named = next((place for place, source in enumerate(("Phoenix", "SQFT", "SparsePEFT")) if source in name), 3)
    return (
        not any(params.get("model", "").lower() == other.data.params["model"].lower() for other in ours),
        named if params.get("task") in {None, *(other.data.params["task"] for other in ours)} else 4,
        not any(run.data.metrics.keys() & other.data.metrics.keys() for other in ours),
        name,
    )
