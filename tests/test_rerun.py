"""A finished run is repeated to the last bit, and what differs from its record is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import done_record, finished, make_run, tiny_run, write_run
from safetensors.torch import load_file, save_file
from sound import edit

from trainables.rerun import compared, same_bits
from trainables.worker import WorkerCache
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, FAULT, OK
from tune_sparse.errors import InputError
from tune_sparse.evaluation.outcomes import Outcome
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run

OUTCOMES = [Outcome("boolq", str(i), "0", "0", True) for i in range(4)]


@pytest.fixture
def recorded(llama: Path, tmp_path: Path) -> tuple[Run, Ledger]:
    run, ledger = tiny_run(llama), Ledger(tmp_path / "results")
    assert finished(run, ledger, WorkerCache()).status == "done"
    return run, ledger


@pytest.fixture
def rerun(recorded: tuple[Run, Ledger]) -> Callable[..., int]:
    run, ledger = recorded
    return lambda *more: main(["rerun", run.run_id, "--results-dir", str(ledger.folder), *more])


def contents(ledger: Ledger) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in ledger.folder.rglob("*") if path.is_file()}


def test_a_run_repeats_to_the_last_bit_and_its_record_is_left_alone(
    rerun: Callable[..., int], recorded: tuple[Run, Ledger], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(recorded[1])
    assert rerun() == OK
    assert contents(recorded[1]) == before
    printed = capsys.readouterr().out
    assert f"{recorded[0].run_id}: 0 differences (to the last bit)" in printed
    assert "0 of 8 examples have another outcome." in printed


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_repetition_computes_as_its_record_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    run, ledger, seen = make_run(), Ledger(tmp_path), list[bool]()

    def prepare(deterministic: bool) -> None:
        seen.append(deterministic)
        raise InputError("that is enough")

    write_run(ledger, run, replace(done_record(run), environment={"deterministic": deterministic}))
    monkeypatch.setattr("trainables.process.prepare_process", prepare)
    assert main(["rerun", run.run_id, "--results-dir", str(tmp_path)]) == BAD_INPUT
    assert seen == [deterministic]


def test_what_differs_is_named(
    rerun: Callable[..., int], recorded: tuple[Run, Ledger], capsys: pytest.CaptureFixture[str]
) -> None:
    run, ledger = recorded
    edit(ledger.run_folder(run.run_id) / "result.json", metrics={"eval_loss": 0.125})
    assert rerun("--json") == FAULT
    found = json.loads(capsys.readouterr().out)
    assert found["is_exact"]
    assert [text.split(",")[0] for text in found["differences"]] == ["eval_loss: 0.125"]


def test_other_weights_cannot_be_repeated(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    run, ledger = tiny_run(model), Ledger(tmp_path / "results")
    finished(run, ledger, WorkerCache())
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert main(["rerun", run.run_id, "--results-dir", str(ledger.folder)]) == BAD_INPUT
    assert f"{run.run_id} cannot be repeated here: " in capsys.readouterr().err


def test_settings_that_are_not_the_records_are_refused(
    rerun: Callable[..., int], recorded: tuple[Run, Ledger], capsys: pytest.CaptureFixture[str]
) -> None:
    run, ledger = recorded
    path = ledger.run_folder(run.run_id) / "config.yaml"
    path.write_text(path.read_text().replace("lora_rank: 4", "lora_rank: 8"))
    assert rerun() == BAD_INPUT
    assert "must be those of its record" in capsys.readouterr().err


def test_an_unknown_run_offers_the_closest(recorded: tuple[Run, Ledger], capsys: pytest.CaptureFixture[str]) -> None:
    run, ledger = recorded
    assert main(["rerun", run.run_id[:-1], "--results-dir", str(ledger.folder)]) == BAD_INPUT
    assert f"Did you mean '{run.run_id}'?" in capsys.readouterr().err


def differences(is_exact: bool, outcomes: list[Outcome] = OUTCOMES, **repeated: Any) -> list[str]:
    """Names of what differs between a record (accuracy 0.75 +- 0.03) and its repetition."""
    record = done_record(make_run(), weights_sha256="a")
    again = replace(record, metrics=record.metrics | repeated)
    return [text.split(":")[0] for text in compared(record, again, OUTCOMES, outcomes, is_exact).differences]


def test_on_the_same_hardware_every_bit_counts() -> None:
    assert differences(True) == []
    assert differences(True, eval_loss=0.5 + 1e-17) == []  # the same double
    assert differences(True, eval_loss=0.5 + 1e-15) == ["eval_loss"]
    assert differences(True, weights_sha256="b") == ["weights_sha256"]
    assert differences(True, inference_flops={"2048": 2_001}) == [
        *("inference_flops.1024", "inference_flops.2048", "inference_flops.4096", "inference_flops.8192"),
    ]


def test_elsewhere_numbers_agree_within_the_tolerance() -> None:
    assert differences(False, eval_loss=0.505, accuracy=0.77, weights_sha256="b") == []
    assert differences(False, eval_loss=0.515) == ["eval_loss"]
    assert differences(False, accuracy=0.79) == ["accuracy"]
    assert differences(False, train_loss=None) == ["train_loss"]


def test_other_outcomes_are_counted_and_are_a_difference_where_bits_count() -> None:
    turned = [replace(OUTCOMES[0], predicted="1", acc=False), *OUTCOMES[1:]]
    assert differences(True, turned) == ["outcomes"]
    assert differences(False, turned) == []
    record = done_record(make_run())
    assert compared(record, record, OUTCOMES, turned, False).answered_otherwise == 1
    assert compared(record, record, OUTCOMES, OUTCOMES[1:], False).answered_otherwise == 1


def test_what_the_record_lacks_is_not_compared() -> None:
    record = done_record(make_run())
    again = replace(record, metrics=record.metrics | {"weights_sha256": "a"})
    assert compared(record, again, OUTCOMES, OUTCOMES, True).not_recorded == ("weights_sha256",)


def test_another_machine_need_not_give_the_same_bits() -> None:
    assert not same_bits({"hardware": "abacus", "packages": {}})
