"""The audit: every rule on every record. Nothing suspicious is dropped, all of it is named.

An error makes the results untrustworthy (exit status 1). A warning is true of results that may be sound; it is marked
wherever a number of that run is shown. docs/audit.md says for each rule what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from analysis.audit import errors, warnings
from analysis.audit.errors import Detections
from analysis.audit.protocol import protocol
from analysis.read.results import Results, read_results

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """check: yields what it finds. meaning: what is wrong, in a few words."""

    severity: Severity
    meaning: str
    check: Callable[[Results], Detections]


RULES: dict[str, Rule] = {
    "unreadable": Rule("error", "a file is no record", errors.unreadable),
    "identity": Rule("error", "settings and record do not belong together", errors.identity),
    "checksum": Rule("error", "a mask is not the one that was trained", errors.checksum),
    "pruning": Rule("error", "a stored pruning is not the one that was trained on", errors.pruning),
    "duplicate-results": Rule(
        "error", "different settings with results identical to the last bit", errors.duplicate_results
    ),
    "no-effect": Rule("error", "a mode or mask changed nothing", errors.no_effect),
    "off-target": Rule("error", "the actual sparsity is not the target sparsity", errors.off_target),
    "zeros-lost": Rule("error", "masked weights are not 0", errors.zeros_lost),
    "mixed-versions": Rule(
        "error", "code, data, prompts or models differ between compared runs", errors.mixed_versions
    ),
    "protocol": Rule("error", "one comparison mixes protocols", protocol),
    "overlap": Rule("error", "scored questions were trained on", errors.overlap),
    "counted-twice": Rule("error", "one run is counted more than once", errors.counted_twice),
    "unproven-number": Rule("error", "a number that no run stands behind", errors.unproven_number),
    "measured-elsewhere": Rule("error", "a rate that another backend measured", errors.measured_elsewhere),
    "conflict": Rule("error", "folders disagree on a run or a pruning", errors.conflict),
    "at-chance": Rule("warning", "no better than guessing", warnings.at_chance),
    "constant-prediction": Rule("warning", "one answer is given almost always", warnings.constant_prediction),
    "same-answers": Rule("warning", "different runs predict the same", warnings.same_answers),
    "modes-coincide": Rule("warning", "both modes are one training here", warnings.modes_alike),
    "answers-cut": Rule("warning", "answers were cut at max_new_tokens", warnings.answers_cut),
    "few-examples": Rule("warning", "too few examples for small differences", warnings.few_examples),
    "few-steps": Rule("warning", "throughput from too few steps", warnings.few_steps),
    "dead-neurons": Rule("warning", "most outputs or inputs have no weight left", warnings.dead_neurons),
    "few-calibration-tokens": Rule(
        "warning", "SparseGPT was calibrated on too few tokens", warnings.few_calibration_tokens
    ),
    "missing": Rule("warning", "a cell without a finished run", warnings.missing),
    "pruning-gone": Rule("warning", "a run that cannot be merged any more", warnings.pruning_gone),
    "hardware": Rule("warning", "hardware changed within what is compared", warnings.hardware),
    "budgets": Rule("warning", "compared pairs ran under different budgets", warnings.budgets),
    "uncommitted": Rule("warning", "code that is in no commit", warnings.uncommitted),
    "unchecked": Rule("warning", "something could not be checked", warnings.unchecked),
    "imported": Rule("warning", "a number that was imported, not run", warnings.imported),
}


@dataclass(frozen=True)
class AuditFinding:
    """One thing that a rule found: the evidence in words, and the runs it is about."""

    rule: str
    severity: Severity
    text: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """Everything that was found, errors first."""

    findings: tuple[AuditFinding, ...]
    runs: int

    @property
    def errors(self) -> list[AuditFinding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def rules_about(self, run_id: str) -> str:
        """The rules that speak of a run, errors in capitals: what marks its numbers."""
        rules = dict.fromkeys(f.rule.upper() if f.severity == "error" else f.rule for f in self.by_run.get(run_id, ()))
        return " ".join(rules)

    @cached_property
    def by_run(self) -> dict[str, list[AuditFinding]]:
        found: dict[str, list[AuditFinding]] = {}
        for finding in self.findings:
            for run_id in finding.run_ids:
                found.setdefault(run_id, []).append(finding)
        return found

    def summary(self) -> str:
        """One line."""
        counts = Counter((finding.severity, finding.rule) for finding in self.findings)
        named_errors, named_warnings = (
            ", ".join(f"{count} {rule}" for (kind, rule), count in counts.items() if kind == severity)
            for severity in ("error", "warning")
        )
        warned = f"warnings: {named_warnings}" if named_warnings else "no warning"
        return f"Audit of {self.runs} runs: {named_errors or 'no error'}; {warned}."

    def lines(self, most: int = 5, severities: Sequence[Severity] = ("error", "warning")) -> list[str]:
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
        AuditFinding(name, rule.severity, text, tuple(run_ids))
        for name, rule in RULES.items()
        for text, run_ids in rule.check(results)
    ]
    return Audit(tuple(findings), len(results.done))


def audit_folders(
    folders: Sequence[Path],
    sweep_ids: Sequence[str] | None = None,
    primary_metrics: Mapping[str, str] = MappingProxyType({}),
) -> Audit:
    return audit(read_results(folders, sweep_ids, primary_metrics))
