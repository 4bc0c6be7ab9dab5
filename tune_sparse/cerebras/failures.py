"""Turn the log of a failed training into an error that a user can act on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tune_sparse.errors import DISK_FULL, RunError

LOG_TAIL_BYTES = 2**18


class ApplianceError(ConnectionError):
    """The appliance or the way to it failed: another try may go well."""


class DiskFullError(OSError):
    """A disk or a quota is full: nothing goes well until there is room."""


@dataclass(frozen=True)
class Failure:
    """A line of a log, what it means, and what to do."""

    pattern: str
    cause: str
    fix: str


LASTING = (
    Failure(
        r"does not yet support `(?P<what>\S+?)[(`]",
        "the compiler has no operation {what}",
        "Leave out the model or the mode that needs it.",
    ),
    Failure(
        r"mgmt_address has no default value|csconfig file \S+ was not found",
        "no Cerebras cluster is known on this machine",
        "Start the sweep on a user node of the CS-3, or set --cerebras-target cpu.",
    ),
    Failure(
        r"union_tag_invalid|validation errors? for|Extra inputs are not permitted",
        "Model Zoo refused the configuration",
        "Compare the release of the environment with that of the checkout, `tune-sparse doctor --cerebras`.",
    ),
    Failure(
        r"No module named '(?P<what>[^']+)'",
        "the Cerebras environment lacks the module {what}",
        "Fix CEREBRAS_VENV or MODELZOO; `tune-sparse doctor --cerebras` shows what they hold.",
    ),
    Failure(
        r"(?:Missing|Unexpected) key\(s\) in state_dict|size mismatch for (?P<what>\S+):",
        "the converted checkpoint does not fit the model",
        "Remove the conversions in the cache and start again.",
    ),
    Failure(
        r"[Vv]ersion mismatch|[Ii]ncompatible.{0,40}version|is not compatible with.{0,40}(?:server|cluster)",
        "the release of the environment is not that of the cluster",
        "Set CEREBRAS_VENV to the environment of the cluster's release.",
    ),
)
"""They would come again in the same way."""
PASSING = (
    Failure(r"StatusCode\.UNAVAILABLE", "the appliance was unavailable", "It is tried again."),
    Failure(r"Connection reset by peer", "the connection to the appliance was reset", "It is tried again."),
    Failure(r"ApplianceDeadlockError", "the appliance came to a standstill", "It is tried again."),
    Failure(r"WS_RT_GRPC_RELATED_ERROR", "the wafer's runtime lost a connection", "It is tried again."),
    Failure(r"[Hh][Tt][Tt][Pp]/?2?.{0,40}\b502\b", "a gateway answered 502", "It is tried again."),
    Failure(r"Socket closed", "the connection to the appliance was closed", "It is tried again."),
    Failure(r"Failed to connect to cluster", "the cluster could not be reached", "It is tried again."),
)
"""Another try may go well."""


def classify_failure(log: Path, returncode: int) -> Exception:
    """The error of a program that ended with `returncode`, by its log: an `ApplianceError` may be tried again, a
    `DiskFullError` when there is room, a `RunError` never."""
    text = read_tail(log)
    for message in DISK_FULL:
        if message in text:
            return DiskFullError(f"{message}. Free some, and start the sweep again. See {log}")
    for kind, failures in ((RunError, LASTING), (ApplianceError, PASSING)):
        for failure in failures:
            if found := re.search(failure.pattern, text):
                what = (found.groupdict().get("what") or "").strip("`")
                return kind(f"{failure.cause.format(what=what)}. {failure.fix} See {log}")
    if returncode < 0:
        return ApplianceError(f"the training was killed by signal {-returncode}, possibly out of memory. See {log}")
    lines = [line for line in text.splitlines() if line.strip()]
    return RunError(f"the training ended with status {returncode}: {lines[-1] if lines else 'nothing said'}. See {log}")


def read_tail(log: Path) -> str:
    """The end of a log, or nothing where there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
