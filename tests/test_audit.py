"""Every rule of the audit finds the error that is planted for it, and only that rule speaks."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import make_cell, make_run
from planted import (
    A_CELL,
    A_RUN,
    ANOTHER,
    DENSE,
    PLANTED,
    RANDOM_RUN,
    answers_cut,
    budgets,
    hardware,
    pruning_folder_in,
    run_folder_in,
    trained_with,
    unproven_number,
)
from sound import PROTOCOL, edit, make_cells, sound_ledger, sound_run, write_sound

from analysis.audit.audit import RULES, Audit, audit_folders
from analysis.audit.warnings import same_answers, unlike_pairs
from analysis.read.load import cells_table
from analysis.read.results import RunFiles, read_results
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, FAULT, OK
from tune_sparse.config import Cell, ScheduleSettings
from tune_sparse.files import write_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.training.budgets import CPU_BUDGETS

DOCS = Path(__file__).parents[1] / "docs" / "audit.md"


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_ledger(tmp_path_factory.mktemp("sound") / "results").folder


@pytest.fixture
def ledger(pattern: Path, tmp_path: Path) -> Ledger:
    """Nine runs of twelve cells without an error, to plant one in."""
    return Ledger(Path(shutil.copytree(pattern, tmp_path / "results")))


def audited(ledger: Ledger) -> Audit:
    other = ledger.folder.parent / "other"
    return audit_folders([ledger.folder, other] if other.exists() else [ledger.folder])


def test_every_rule_has_a_planted_error_and_a_page() -> None:
    assert set(PLANTED) == set(RULES)
    described = re.findall(r"^### `([a-z-]+)`", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert described == list(RULES)


def test_a_sound_ledger_has_no_finding(ledger: Ledger) -> None:
    found = audited(ledger)
    assert found.findings == ()
    assert found.runs == 9
    assert found.summary() == "Audit of 9 runs: no error; no warning."


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_error_is_found_by_its_rule_alone(rule: str, ledger: Ledger) -> None:
    PLANTED[rule](ledger)
    found = audited(ledger)
    assert {finding.rule for finding in found.findings} == {rule}
    assert bool(found.errors) == (RULES[rule].severity == "error")
    for finding in found.findings:
        assert finding.text
        assert finding.run_ids


def findings_text(ledger: Ledger) -> str:
    return "\n".join(audited(ledger).lines(most=100))


def test_a_run_of_another_mask_than_the_stored_one_is_an_error(ledger: Ledger) -> None:
    edit(pruning_folder_in(ledger) / "pruning.json", mask_sha256="f" * 64)
    found = audited(ledger)
    assert {finding.rule for finding in found.findings} == {"pruning"}
    assert len(found.findings) == 2, "a run of each mode"
    assert "it was trained on the mask" in found.findings[0].text


def test_a_pruning_that_cannot_be_read_is_listed(ledger: Ledger) -> None:
    (pruning_folder_in(ledger) / "masks.safetensors").unlink()
    [finding] = audited(ledger).findings
    assert finding.rule == "unreadable"
    assert "masks.safetensors must have 64 bytes, got 0" in finding.text


def test_different_prunings_of_one_identity_are_a_conflict_of_their_runs(ledger: Ledger) -> None:
    other = ledger.folder.parent / "other"
    shutil.copytree(pruning_folder_in(ledger), other / "prunings" / str(RANDOM_RUN.pruning_id))
    assert audited(ledger).findings == ()
    path = other / "prunings" / str(RANDOM_RUN.pruning_id) / "pruning.json"
    write_json(path, json.loads(path.read_text()) | {"sha256_by_file": {}})
    [finding] = audited(ledger).findings
    assert finding.rule == "conflict"
    assert "hold different prunings" in finding.text
    assert RANDOM_RUN.run_id in finding.run_ids


def test_equal_weights_of_different_settings_are_duplicates(ledger: Ledger) -> None:
    for run in (A_RUN, sound_run(replace(A_CELL, method="random"))):
        edit(run_folder_in(ledger, run) / "result.json", metrics={"weights_sha256": "e" * 64})
    expected = r"error duplicate-results.*\n  .* differ in method, and to the last bit not in their weights"
    assert re.search(expected, findings_text(ledger))


def test_equal_scores_of_different_settings_are_duplicates(ledger: Ledger) -> None:
    shutil.copy(run_folder_in(ledger, ANOTHER) / "examples.parquet", run_folder_in(ledger))
    assert "differ in mode, and to the last bit not in their scores" in findings_text(ledger)


def test_equal_losses_under_another_limit_of_test_examples_are_no_duplicates(ledger: Ledger) -> None:
    run = sound_run(A_CELL, replace(PROTOCOL, n_test=390))
    write_sound(ledger, run)
    shutil.copy(run_folder_in(ledger) / "metrics.jsonl", run_folder_in(ledger, run))
    assert "duplicate-results" not in {finding.rule for finding in audited(ledger).findings}


def test_structured_modes_that_lost_heads_must_differ(ledger: Ledger) -> None:
    kept = {"model.layers.0.self_attn.q_proj.weight": 0.9, "model.layers.0.mlp.up_proj.weight": 0.9}
    for mode in ("sparse-to-dense", "sparse-to-sparse"):
        run = sound_run(replace(A_CELL, method="structured", sparsity=0.1, mode=mode))
        write_sound(ledger, run, kept=kept, weights_sha256="e" * 64)
    assert {finding.rule for finding in audited(ledger).findings} == {"duplicate-results"}


def test_one_mask_for_two_methods_had_no_effect(ledger: Ledger) -> None:
    mask = json.loads((run_folder_in(ledger) / "result.json").read_text())["metrics"]["mask_sha256"]
    for mode in ("sparse-to-dense", "sparse-to-sparse"):
        folder = run_folder_in(ledger, sound_run(replace(A_CELL, method="random", mode=mode)))
        edit(folder / "result.json", metrics={"mask_sha256": mask})
        for name in ("sparse_config.json", "validation_report.json"):
            edit(folder / name, mask_sha256=mask)
    assert "have one and the same mask" in findings_text(ledger)


def test_a_training_that_changed_no_score_had_no_effect(ledger: Ledger) -> None:
    pruned_baseline = ledger.folder / "pruned_baselines" / f"{A_RUN.pruned_baseline_id}.parquet"
    shutil.copy(pruned_baseline, run_folder_in(ledger) / "examples.parquet")
    assert "every score is the one before tuning, to the last bit" in findings_text(ledger)


def test_a_mask_that_changed_no_score_had_no_effect(ledger: Ledger) -> None:
    runs = (sound_run(DENSE), A_RUN)
    files = [ledger.folder / "pruned_baselines" / f"{run.pruned_baseline_id}.parquet" for run in runs]
    shutil.copy(*files)
    assert "before tuning every score is the unpruned model's" in findings_text(ledger)


def test_a_cell_that_points_to_another_cells_run_has_no_run(ledger: Ledger) -> None:
    [path] = (ledger.folder / "sweeps").glob("*.json")
    cells = json.loads(path.read_text())["cells"]
    [cell] = [c for c in cells if c["run_id"] == ANOTHER.run_id]
    cell |= {"run_id": A_RUN.run_id, "shared_with": cells[0]["cell_id"]}
    edit(path, cells=cells)
    assert "which is a run of another cell" in findings_text(ledger)


def test_a_copied_run_folder_is_counted_twice(ledger: Ledger) -> None:
    shutil.copytree(run_folder_in(ledger), ledger.folder / "runs" / "copy")
    assert {finding.rule for finding in audited(ledger).findings} == {"counted-twice"}


def test_losses_that_end_early_are_no_run(ledger: Ledger) -> None:
    path = run_folder_in(ledger) / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    assert "12 steps were requested, metrics.jsonl has the losses of 10" in findings_text(ledger)


def test_a_backend_of_tests_is_foreign(ledger: Ledger) -> None:
    write_sound(ledger, sound_run(replace(A_CELL, backend="fake")))
    assert "the backend 'fake' is none of torch" in findings_text(ledger)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("result.json", "", "JSONDecodeError"),
        ("result.json", '{"run_id": "x", "identity"', "JSONDecodeError"),
        ("result.json", '{"loss": 3}', "unexpected keyword argument 'loss'"),
        ("result.json", "[]", "TypeError"),
        ("config.yaml", "a: [", "ParserError"),
        ("config.yaml", "protocol: {}\ncell: {}", "TypeError"),
        ("sparse_config.json", "{}", "it has no mask_sha256, actual_sparsity, kept_by_matrix"),
        ("validation_report.json", '{"all_valid": true}', "foreign, or of an older format"),
        ("metrics.jsonl", "{", "JSONDecodeError"),
        ("examples.parquet", "PAR1", "ArrowInvalid"),
    ],
)
def test_a_broken_file_is_listed_and_the_rest_analysed(
    name: str, content: str, reason: str, ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder_in(ledger) / name).write_text(content)
    assert main(["audit", "--results-dir", str(ledger.folder)]) == FAULT
    printed = capsys.readouterr().out
    assert re.search(rf"error unreadable.*\n  {re.escape(str(run_folder_in(ledger)))}: .*{re.escape(reason)}", printed)
    assert "Audit of 8 runs: 1 unreadable" in printed


def test_a_broken_sweep_record_is_listed(ledger: Ledger) -> None:
    (ledger.folder / "sweeps" / "half.json").write_text("{")
    assert [finding.rule for finding in audited(ledger).findings] == ["unreadable"]


def test_a_few_answers_that_are_cut_are_none(ledger: Ledger) -> None:
    edit(run_folder_in(ledger) / "result.json", metrics={"cut_fraction": 0.05})
    assert "answers-cut" not in {finding.rule for finding in audited(ledger).findings}


def test_cut_answers_are_a_warning_that_names_the_setting_and_the_share(ledger: Ledger) -> None:
    answers_cut(ledger)
    said = f"1 runs had 6% to 6% of their answers cut at max_new_tokens={PROTOCOL.max_new_tokens}"
    assert said in findings_text(ledger)


def test_examples_that_are_gone_are_a_warning(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results")
    write_sound(ledger, replace(A_RUN, data_dir="/no/such/data"))
    assert "the examples of boolq are no longer here (/no/such/data)" in findings_text(ledger)


def test_texts_have_no_answers_that_could_be_the_same(ledger: Ledger) -> None:
    PLANTED["same-answers"](ledger)
    results = read_results([ledger.folder])
    assert list(same_answers(results))
    for evidence in results.done:
        evidence.record.metrics.pop("accuracy", None)
    assert list(same_answers(results)) == []


def test_warnings_mark_a_run(ledger: Ledger) -> None:
    hardware(ledger)
    unproven_number(ledger)
    found = audited(ledger)
    assert found.rules_about(A_RUN.run_id) == "UNPROVEN-NUMBER hardware"
    assert found.rules_about("another") == ""


def test_the_command_prints_json_and_says_by_its_status_whether_there_is_a_fault(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["audit", "--results-dir", str(ledger.folder), "--json"]
    hardware(ledger)
    assert main(arguments) == OK
    unproven_number(ledger)
    capsys.readouterr()
    assert main(arguments) == FAULT
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [(f["rule"], f["severity"]) for f in findings] == [("unproven-number", "error"), ("hardware", "warning")]
    assert findings[0]["run_ids"] == [A_RUN.run_id]


def test_two_settings_of_one_cell_are_no_pair_and_two_modes_or_schedules_are() -> None:
    def run_at(every: int, **cell: Any) -> Any:
        settings = ScheduleSettings(update_every=every)
        return SimpleNamespace(run=make_run(make_cell(**cell), schedule_settings=settings))

    def every(e: RunFiles) -> int:
        return e.run.schedule_settings.update_every

    tuned = {"mode": "masked-finetuning", "schedule": "rigl"}
    points = [run_at(10, **tuned), run_at(30, **tuned)]
    assert unlike_pairs(points, every) == []
    one_shot = run_at(20, mode="masked-finetuning")
    assert len(unlike_pairs([*points, one_shot], every)) == 2
    other_mode = run_at(20)
    assert len(unlike_pairs([*points, other_mode], every)) == 0, "it differs in its schedule too"


def test_a_run_is_compared_with_its_other_mode_and_its_dense_baseline(ledger: Ledger) -> None:
    budgets(ledger)
    hardware(ledger)
    found = {finding.rule: finding for finding in audited(ledger).findings}
    assert "tiny, boolq: 2 pairs that are compared ran under different budgets" in found["budgets"].text
    assert len(found["budgets"].run_ids) == 3
    assert "slide rule: 1), 2 pairs that are compared on different ones" in found["hardware"].text


def test_budgets_that_change_no_bit_are_no_finding(ledger: Ledger) -> None:
    """A masked update keeps its effective weights where they fit, and its partner has none to keep."""
    budgets(ledger)
    other = replace(CPU_BUDGETS, activation_checkpointing=True, keeps_effective_weights=True)
    edit(run_folder_in(ledger) / "result.json", measured={"budgets": other.as_record()})
    assert audited(ledger).findings == ()


def test_a_short_dense_baseline_beside_long_pruned_runs_is_named_with_setting_values_and_runs(ledger: Ledger) -> None:
    short = trained_with(ledger, DENSE, steps=2, eval_every=2)
    [finding] = audited(ledger).errors
    assert finding.run_ids == (short.run_id,)
    assert (
        f"tiny, boolq: runs that are compared have several values of steps: 12 in {RANDOM_RUN.run_id}" in finding.text
    )
    assert f"and 7 more; 2 in {short.run_id}. Report sweeps of one protocol" in finding.text


@pytest.mark.parametrize(
    ("cell", "settings"),
    [
        (A_CELL, {"learning_rate": 0.001}),
        (replace(A_CELL, sparsity=0.6), {"n_test": 390}),
        (replace(A_CELL, mode="sparse-to-sparse"), {"lora_rank": 8}),
        (replace(A_CELL, method="random"), {"max_tokens": 1024}),
        (A_CELL, {"recover": "reconstruct"}),
    ],
)
def test_no_point_of_a_curve_and_no_mode_of_a_pair_has_a_protocol_of_its_own(
    cell: Cell, settings: dict[str, object], ledger: Ledger
) -> None:
    run = trained_with(ledger, cell, **settings)
    [finding] = [f for f in audited(ledger).findings if f.rule == "protocol"]
    assert finding.run_ids == (run.run_id,)
    assert f"several values of {next(iter(settings))}: " in finding.text


@pytest.mark.parametrize("settings", [{"threads": 2}, {"eval_every": 6}, {"calibration": "wikitext2"}])
def test_settings_that_change_no_number_of_these_runs_are_no_other_protocol(
    settings: dict[str, object], ledger: Ledger
) -> None:
    """No method of this ledger is calibrated."""
    trained_with(ledger, A_CELL, **settings)
    assert audited(ledger).errors == []


def test_a_recovered_model_has_the_dense_baseline_of_any_sweep(tmp_path: Path) -> None:
    """The run of the dense baseline is the same, whatever its sweep asked of pruned models."""
    ledger = sound_ledger(tmp_path, make_cells(sparsities=(0.0, 0.3)), replace(PROTOCOL, recover="reconstruct"))
    assert trained_with(ledger, DENSE).run_id in {cell["run_id"] for s in ledger.sweeps() for cell in s.cells}
    assert audited(ledger).errors == []
    assert cells_table([ledger.folder])["protocol_id"].nunique() == 1


def test_methods_calibrated_on_different_examples_are_not_compared(tmp_path: Path) -> None:
    ledger = sound_ledger(tmp_path, make_cells(methods=("wanda", "sparsegpt"), sparsities=(0.0, 0.3)))
    assert audited(ledger).errors == []
    trained_with(ledger, replace(A_CELL, method="wanda"), calibration="wikitext2")
    [finding] = audited(ledger).errors
    assert "several values of calibration: " in finding.text


def test_two_whole_sweeps_of_one_folder_are_two_comparisons(ledger: Ledger) -> None:
    """The second has the dense baseline and some points of the first under a protocol of its own."""
    other = replace(PROTOCOL, learning_rate=0.001)
    sound_ledger(ledger.folder, make_cells(sparsities=(0.0, 0.3)), other, started=2000.0)
    assert audited(ledger).errors == []
    assert audit_folders([ledger.folder], ["sweep2000"]).runs == 5


def test_only_the_named_sweeps_are_audited(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    write_sound(ledger, sound_run(replace(A_CELL, sparsity=0.9), model_fingerprint="0" * 64))
    [path] = (ledger.folder / "sweeps").glob("*.json")
    assert main(["audit", "--results-dir", str(ledger.folder), "--sweep", path.stem]) == OK
    assert "Audit of 9 runs" in capsys.readouterr().out
    assert main(["audit", "--results-dir", str(ledger.folder)]) == FAULT
    assert main(["audit", "--results-dir", str(ledger.folder), "--sweep", "swep"]) == BAD_INPUT
    assert "unknown sweep 'swep'. Did you mean 'sweep1000'?" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    assert main(["audit", "--results-dir", str(tmp_path / "none")]) == BAD_INPUT


def test_the_matrix_of_the_fixture_is_whole() -> None:
    assert len(make_cells()) == 12
