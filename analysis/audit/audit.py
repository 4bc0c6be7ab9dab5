"""Can these results be trusted? Every rule on every record; nothing suspicious is dropped, all of it is named.

A fault makes the results untrustworthy (exit status 1). A notice is true of results that may be sound; it is marked
wherever a number of that run is shown. docs/audit.md says for each rule what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from analysis.audit import errors, warnings
from analysis.audit.errors import Found
from analysis.read.results import Results, read_results

Severity = Literal["fault", "notice"]


@dataclass(frozen=True)
class Rule:
    """check: yields what it finds. meaning: what is wrong, in a few words."""

    severity: Severity
    meaning: str
    check: Callable[[Results], Found]


RULES: dict[str, Rule] = {
    "unreadable": Rule("fault", "a file is no record", errors.unreadable),
    "identity": Rule("fault", "settings and record do not belong together", errors.identity),
    "checksum": Rule("fault", "a mask is not the one that was trained", errors.checksum),
    "twins": Rule("fault", "different settings with results identical to the last bit", errors.twins),
    "no-effect": Rule("fault", "a mode or mask changed nothing", errors.no_effect),
    "off-target": Rule("fault", "the sparsity is not the one that was asked", errors.off_target),
    "zeros-lost": Rule("fault", "masked weights are not 0", errors.zeros_lost),
    "mixed-versions": Rule("fault", "code, data, prompts or models differ between compared runs", errors.mixed),
    "overlap": Rule("fault", "scored questions were trained on", errors.overlap),
    "counted-twice": Rule("fault", "one run is counted more than once", errors.counted_twice),
    "no-run": Rule("fault", "a number that no run stands behind", errors.no_run),
    "conflict": Rule("fault", "folders disagree on a run", errors.conflict),
    "at-chance": Rule("notice", "no better than guessing", warnings.at_chance),
    "one-answer": Rule("notice", "one answer is given almost always", warnings.one_answer),
    "same-answers": Rule("notice", "different runs predict the same", warnings.same_answers),
    "modes-coincide": Rule("notice", "both modes are one training here", warnings.modes_alike),
    "few-examples": Rule("notice", "too few examples for small differences", warnings.few_examples),
    "few-steps": Rule("notice", "throughput from too few steps", warnings.few_steps),
    "missing": Rule("notice", "a cell without a finished run", warnings.missing),
    "hardware": Rule("notice", "hardware changed within what is compared", warnings.hardware),
    "uncommitted": Rule("notice", "code that is in no commit", warnings.uncommitted),
    "unchecked": Rule("notice", "something could not be checked", warnings.unchecked),
    "imported": Rule("notice", "a number that was imported, not run", warnings.imported),
}


@dataclass(frozen=True)
class Finding:
    """What a rule found: the evidence in words, and the runs it is about."""

    rule: str
    severity: Severity
    text: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """Everything that was found, faults first."""

    findings: tuple[Finding, ...]
    runs: int

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "fault"]

    def rules_that_mark(self, run_id: str) -> str:
        """The rules that speak of a run, faults in capitals: what marks its numbers."""
        rules = dict.fromkeys(f.rule.upper() if f.severity == "fault" else f.rule for f in self.by_run.get(run_id, ()))
        return " ".join(rules)

    @cached_property
    def by_run(self) -> dict[str, list[Finding]]:
        found: dict[str, list[Finding]] = {}
        for finding in self.findings:
            for run_id in finding.run_ids:
                found.setdefault(run_id, []).append(finding)
        return found

    def summary(self) -> str:
        """One line."""
        counts = Counter((finding.severity, finding.rule) for finding in self.findings)
        faults, notices = (
            ", ".join(f"{count} {rule}" for (kind, rule), count in counts.items() if kind == severity)
            for severity in ("fault", "notice")
        )
        return (
            f"Audit of {self.runs} runs: {faults or 'no fault'}; {'notices: ' + notices if notices else 'no notice'}."
        )

    def lines(self, most: int = 5, severities: Sequence[Severity] = ("fault", "notice")) -> list[str]:
        """A heading for each rule that found something, and its first `most` findings."""
        lines = []
        for name, rule in RULES.items():
            found = [finding for finding in self.findings if finding.rule == name and rule.severity in severities]
            if found:
                lines += [f"{rule.severity} {name}: {rule.meaning}", *(f"  {finding.text}" for finding in found[:most])]
            if len(found) > most:
                lines.append(f"  and {len(found) - most} more")
        return lines


def audit(results: Results) -> Audit:
    """Every rule on what the folders hold."""
    findings = [
        Finding(name, rule.severity, text, tuple(run_ids))
        for name, rule in RULES.items()
        for text, run_ids in rule.check(results)
    ]
    return Audit(tuple(findings), len(results.done))


def audit_folders(folders: Sequence[Path], sweep_ids: Sequence[str] | None = None) -> Audit:
    return audit(read_results(folders, sweep_ids))
