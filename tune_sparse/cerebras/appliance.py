"""The appliance's own queue of jobs, through its `csctl`.

A job carries the label of its results folder and one of its own run. Nothing is concluded from an answer that was not
understood: then it is not known which jobs are left.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SECONDS = 120.0
"""One question may take so long: ALCF's guide says that a list of jobs can take over a minute."""
TRIES = 2
ENDED = {"SUCCEEDED", "FAILED", "CANCELLED"}
RESULTS_KEY, RUN_KEY = "tune_sparse", "tune_sparse_run"
"""Keys of the labels of a results folder and of one run in it: `csctl get jobs -l` finds whole labels only."""
NEEDED_COLUMNS = ("NAME", "PHASE", "LABELS")
NAMESPACE_COLUMNS = ("SESSION", "NAMESPACE")


@dataclass(frozen=True)
class ApplianceJob:
    """A job as `csctl` lists it."""

    name: str
    phase: str
    labels: tuple[str, ...]
    """as KEY=VALUE"""
    namespace: str = ""
    """also called session; empty where the list has none"""


@dataclass(frozen=True)
class Cancelled:
    """The unfinished jobs of a label that were found, and those of them that `csctl` said it cancelled."""

    found: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    problem: str | None = None
    """why it is not known that none is left, if it is not"""

    def summary(self) -> str:
        if self.problem is not None:
            return f"{len(self.found)} jobs found, {len(self.jobs)} cancelled, others may be left: {self.problem}"
        return f"{len(self.found)} jobs found and cancelled" if self.found else "no unfinished job found"


class ApplianceUnreachableError(Exception):
    """`csctl` is missing, failed, did not answer in time, or said what is not understood."""


def results_label(results: str) -> str:
    """Return the label of every job of a results folder. results: its hash."""
    return f"{RESULTS_KEY}={results[:16]}"


def run_label(results: str, run: str) -> str:
    """Return the label of a run's own jobs: at most 63 characters in its value, as the appliance wants."""
    return f"{RUN_KEY}={results[:16]}-{run[:16]}"


def name_label(run_id: str) -> str:
    """Return a label for people: the end of a run's name, which has its hash."""
    return f"name={run_id[-58:].strip('._-')}"


def unfinished_jobs(label: str | None = None) -> list[ApplianceJob]:
    """List the jobs, waiting or running, that have `label`, or any label of this program where it is None.

    Raises `ApplianceUnreachableError` where the answer is missing or not understood.
    """
    jobs = [job for job in _listed(label) if job.phase not in ENDED]
    if label is not None:
        return [job for job in jobs if label in job.labels]
    return [job for job in jobs if any(text.startswith(f"{RESULTS_KEY}=") for text in job.labels)]


def cancel(label: str) -> Cancelled:
    """Cancel the unfinished jobs that have `label`. What went wrong is tried once more."""
    found: dict[str, None] = {}
    cancelled: dict[str, None] = {}
    problem: str | None = None
    for _ in range(TRIES):
        problem = None
        try:
            for job in unfinished_jobs(label):
                found[job.name] = None
                _csctl(["cancel", "job", job.name, *(["--namespace", job.namespace] if job.namespace else [])])
                cancelled[job.name] = None
            break
        except ApplianceUnreachableError as error:
            problem = str(error)
    return Cancelled(tuple(found), tuple(cancelled), problem)


def controller_version() -> str:
    """Return what `csctl --version` says, on one line."""
    return " ".join(_csctl(["--version"]).split())


def _listed(label: str | None) -> list[ApplianceJob]:
    """As JSON where `csctl` can, which tells the labels apart from everything else, else from its table."""
    wanted = ["-l", label] if label is not None else []
    try:
        return list(jobs_of_json(_csctl(["get", "jobs", "-o", "json", *wanted])))
    except (_UnknownOptionError, ValueError):
        return list(jobs_of_table(_csctl(["get", "jobs"])))


def jobs_of_json(text: str) -> Iterator[ApplianceJob]:
    """Read a JobList, or the several that a long list comes in. Raises `ValueError` where it is none."""
    decoder, left = json.JSONDecoder(), text.strip()
    if not left:
        raise ValueError("an empty answer is no list of jobs")
    while left:
        value, end = decoder.raw_decode(left)
        if not isinstance(value, Mapping) or not value.keys() <= {"items"}:
            raise ValueError("a list of jobs must be an object with `items`")
        yield from map(_job_of_json, value.get("items", ()))
        left = left[end:].lstrip()


def _job_of_json(item: Mapping[str, Any]) -> ApplianceJob:
    try:
        meta, status = item["meta"], item["status"]
        labels = tuple(f"{key}={value}" for key, value in meta.get("labels", {}).items())
        name, namespace = _named(meta["name"], meta.get("namespace", ""))
        return ApplianceJob(name, str(status["phase"]), labels, namespace)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"a job without {error}") from error


def jobs_of_table(text: str) -> Iterator[ApplianceJob]:
    """Read a table by the names in its header, whose columns differ from release to release.

    Raises `ApplianceUnreachableError` where a column or a name is missing.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    header = next((n for n, line in enumerate(lines) if set(NEEDED_COLUMNS) <= set(line.split())), None)
    if header is None:
        shown = lines[0] if lines else "nothing"
        raise ApplianceUnreachableError(
            f"the list of jobs must have the columns {', '.join(NEEDED_COLUMNS)}, `csctl get jobs` printed: {shown}"
        )
    columns = [(found.start(), found[0]) for found in re.finditer(r"\S+", lines[header])]
    for line in lines[header + 1 :]:
        cells = _cells(line, columns)
        namespace = next((cells[name] for name in NAMESPACE_COLUMNS if cells.get(name)), "")
        name, namespace = _named(cells.get("NAME", ""), namespace)
        if not name.startswith("wsjob-") or not cells.get("PHASE", "").isupper():
            raise ApplianceUnreachableError(f"a line of `csctl get jobs` has no job and phase: {line.strip()}")
        yield ApplianceJob(name, cells["PHASE"], tuple(filter(None, cells.get("LABELS", "").split(","))), namespace)


def _cells(line: str, columns: Sequence[tuple[int, str]]) -> dict[str, str]:
    """{column: cell} of a line: a word belongs to the last column that begins at or before it. A cell may be empty."""
    cells: dict[str, list[str]] = {}
    for word in re.finditer(r"\S+", line):
        _, column = max((c for c in columns if c[0] <= word.start()), default=columns[0])
        cells.setdefault(column, []).append(word[0])
    return {column: " ".join(words) for column, words in cells.items()}


def _named(name: str, namespace: str) -> tuple[str, str]:
    """(name, namespace) of a job, whose name may begin with the namespace."""
    before, slash, last = name.rpartition("/")
    return (last, before) if slash else (name, namespace)


class _UnknownOptionError(ApplianceUnreachableError):
    """This `csctl` is too old for an option."""


def _csctl(arguments: Sequence[str]) -> str:
    program = shutil.which("csctl")
    if program is None:
        raise ApplianceUnreachableError("csctl is not on PATH: it is on the user nodes of a CS-3")
    command = " ".join(["csctl", *arguments])
    try:
        answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ApplianceUnreachableError(f"`{command}` did not answer in {SECONDS:g} s") from error
    except OSError as error:
        raise ApplianceUnreachableError(f"`{command}` cannot be run: {error}") from error
    if answer.returncode:
        lines = (answer.stderr or answer.stdout).strip().splitlines()
        kind = _UnknownOptionError if _has_unknown_option(lines) else ApplianceUnreachableError
        raise kind(f"`{command}` failed with status {answer.returncode}: {lines[-1] if lines else ''}")
    return answer.stdout


def _has_unknown_option(lines: Iterable[str]) -> bool:
    return any(re.search(r"unknown (?:shorthand )?flag", line) for line in lines)
