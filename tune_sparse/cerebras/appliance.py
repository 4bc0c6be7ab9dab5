"""The appliance's own queue of jobs, through its `csctl`."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = 20.0
"""One question may take so long: a controller that is down must not hold a sweep."""
TRIES = 2
ENDED = {"SUCCEEDED", "FAILED", "CANCELLED"}
LABEL = "tune_sparse"


@dataclass(frozen=True)
class Cancelled:
    """The jobs of a label that were cancelled."""

    jobs: tuple[str, ...] = ()
    problem: str | None = None
    """Why it is not known that none is left, if it is not."""


class ApplianceUnreachableError(Exception):
    """`csctl` is missing, failed, or did not answer in time."""


def job_label(results: str, run: str) -> str:
    """The label that a run's jobs carry: at most 63 characters, as the appliance wants."""
    return f"{LABEL}={results[:16]}-{run[:16]}"


def name_label(run_id: str) -> str:
    """A label for people: the end of a run's name, which has its hash."""
    return f"name={run_id[-58:].strip('._-')}"


def jobs_with(label: str) -> list[str]:
    """Names of the jobs, waiting or running, whose labels begin with `label`. Raises `ApplianceUnreachableError`."""
    return [job for job, labels in _unfinished(_csctl(["get", "jobs"])) if any(x.startswith(label) for x in labels)]


def cancel(label: str) -> Cancelled:
    """Cancel the jobs whose labels begin with `label`. A controller that does not answer is asked once more."""
    cancelled: list[str] = []
    problem: str | None = None
    for _ in range(TRIES):
        try:
            for job in jobs_with(label):
                _csctl(["cancel", "job", job])
                cancelled.append(job)
            return Cancelled(tuple(dict.fromkeys(cancelled)))
        except ApplianceUnreachableError as error:
            problem = str(error)
    return Cancelled(tuple(dict.fromkeys(cancelled)), problem)


def versions() -> list[str]:
    """Every version that `csctl version` names: of the cluster's servers and of itself."""
    return re.findall(r"\b\d+\.\d+(?:\.\d+)*\b", _csctl(["version"]))


def _unfinished(table: str) -> list[tuple[str, list[str]]]:
    """(job, its labels) of each line of `csctl get jobs`; columns differ from release to release."""
    rows = (re.split(r"[\s,]+", line.strip()) for line in table.splitlines())
    return [(row[0], row[1:]) for row in rows if row[0].startswith("wsjob-") and not ENDED & set(row)]


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
        raise ApplianceUnreachableError(
            f"`{command}` failed with status {answer.returncode}: {lines[-1] if lines else ''}"
        )
    return answer.stdout
