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


AGAIN = "It is tried again."
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
        r"ApplianceVersionError|Client software is (?:on semantic )?version|you must install \S+ of the client"
        r"|server version is out of date",
        "the release of the environment does not go with that of the cluster",
        "Set CEREBRAS_VENV to an environment of the cluster's release, or try --disable-version-check true.",
    ),
    Failure(
        r"ClusterJobCancelledByCsctl|canceled-by-csctl",
        "somebody cancelled the job with csctl",
        "Ask who did; with --retry-failed the same sweep trains it again.",
    ),
    Failure(
        r"ApplianceCompilationError",
        "the compiler refused the graph",
        "The log says at which stage; try a smaller global_batch_size, or the mode sparse-to-dense.",
    ),
    Failure(
        r"ApplianceRuntimeJobTimeoutError|Appliance job timer time out",
        "the job took longer than its limit",
        "It is the site's own: train fewer steps, or ask there.",
    ),
    Failure(r"ApplianceNanError", "the loss or the gradients are not finite", "Lower learning_rate."),
    Failure(
        r"ClusterJobScheduleError",
        "the cluster cannot hold the job",
        "Lower --num-csx or --num-workers-per-csx; `csctl get cluster` shows what there is.",
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
    Failure(r"\bAssertionError\b", "the Cerebras software asserts what does not hold", "The log says what."),
)
"""They would come again in the same way."""
PASSING = (
    Failure(
        r"replica\(s\) failed, first failed pods: \[(?P<what>\S+?)\]",
        "the appliance lost {what}, a part of the job",
        AGAIN,
    ),
    Failure(r"Appliance(?:Deadlock|Stall)Error", "the appliance came to a standstill", AGAIN),
    Failure(r"ApplianceRuntimeServerError", "a server of the appliance crashed", AGAIN),
    Failure(r"ApplianceServiceInterrupted", "a service of the appliance was interrupted", AGAIN),
    Failure(r"ClusterJobInitError", "the appliance could not begin the job", AGAIN),
    Failure(r"Deadline Exceeded|StatusCode\.DEADLINE_EXCEEDED", "the appliance did not answer in time", AGAIN),
    Failure(r"Socket closed", "the connection to the appliance was closed", AGAIN),
    Failure(r"StatusCode\.UNAVAILABLE", "the appliance was unavailable", AGAIN),
    Failure(r"Connection reset by peer", "the connection to the appliance was reset", AGAIN),
    Failure(r"WS_RT_GRPC_RELATED_ERROR", "the wafer's runtime lost a connection", AGAIN),
    Failure(r"[Hh][Tt][Tt][Pp]/?2?.{0,40}\b502\b", "a gateway answered 502", AGAIN),
    Failure(r"Failed to connect to cluster", "the cluster could not be reached", AGAIN),
    Failure(r"StatusCode\.INTERNAL", "the appliance had an internal error", AGAIN),
    Failure(r"\bAppliance(?P<what>\w+)(?:Error|Exception)\b", "the appliance failed: {what}", AGAIN),
)
"""Another try may go well. Model Zoo's own restarts give up on no more than compile errors, csctl and assertions."""
TRACEBACK = "Traceback (most recent call last):"
CHAINED = ("direct cause of the following exception:", "another exception occurred:")
LAST_LINES = 40
"""Of a log without a traceback, so many lines are what it ended with."""


def classify_failure(log: Path, returncode: int) -> Exception:
    """The error of a program that ended with `returncode`, by its log: an `ApplianceError` may be tried again, a
    `DiskFullError` when there is room, a `RunError` never."""
    text = read_tail(log)
    for message in DISK_FULL:
        if message in text:
            return DiskFullError(f"{message}. Free some, and start the sweep again. See {log}")
    last = last_words(text)
    for kind, failures in ((RunError, LASTING), (ApplianceError, PASSING)):
        for failure in failures:
            if found := re.search(failure.pattern, last):
                what = (found.groupdict().get("what") or "").strip("`")
                return kind(f"{failure.cause.format(what=what)}. {failure.fix} See {log}")
    if returncode < 0:
        return ApplianceError(f"the training was killed by signal {-returncode}, possibly out of memory. See {log}")
    lines = [line for line in text.splitlines() if line.strip()]
    return RunError(f"the training ended with status {returncode}: {lines[-1] if lines else 'nothing said'}. See {log}")


def last_words(text: str) -> str:
    """Return what a log ended with: the last traceback with those that it followed from, and the client's errors.

    What the client met before and got over is not in it.
    """
    before, *tracebacks = text.split(TRACEBACK)
    if not tracebacks:
        return "\n".join(text.splitlines()[-LAST_LINES:])
    first = len(tracebacks) - 1
    while first and tracebacks[first - 1].rstrip().endswith(CHAINED):
        first -= 1
    earlier = "".join([before, *tracebacks[:first]])
    errors = [line for line in earlier.splitlines()[-LAST_LINES:] if " ERROR:" in line]
    return "\n".join([*errors, *tracebacks[first:]])


def read_tail(log: Path) -> str:
    """The end of a log, or nothing where there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
