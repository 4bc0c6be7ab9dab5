"""Schedules on Cerebras: the section and the counts that its algorithms are told, and that they do with them what
trainings here do."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from safetensors.torch import load_file, save_file

from trainables.mask_schedule import MaskSchedule
from tune_sparse.cerebras.environment import SiteEnvironment
from tune_sparse.cerebras.sparsity import ChangingMasks, sparsity_section
from tune_sparse.config import ScheduleSettings
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.schedules import SCHEDULES

LOSS_TOLERANCE = 5e-3
SETTINGS = {
    "gradual": ScheduleSettings(gradual_updates=5),
    "set": ScheduleSettings(update_every=3),
    "rigl": ScheduleSettings(update_every=3),
    "iterative": ScheduleSettings(levels=(0.5,)),
}


def scheduled_run(folder: Path, schedule: str, **changes: Any) -> Run:
    names = {"mode": "masked-finetuning", "schedule": schedule, "steps": 20, "learning_rate": 1e-3}
    return replace(tiny_run(folder, **{**names, **changes}), schedule_settings=SETTINGS[schedule])


def losses(ledger: Ledger, run: Run) -> torch.Tensor:
    lines = (ledger.run_folder(run.run_id) / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([line["train_loss"] for line in map(json.loads, lines) if "train_loss" in line])


@pytest.mark.modelzoo
@pytest.mark.parametrize("schedule", list(SETTINGS))
def test_a_cell_trains_there_as_it_does_here(
    llama: Path, environment: SiteEnvironment, schedule: str, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path)
    here = scheduled_run(llama, schedule)
    there = scheduled_run(llama, schedule, backend="cerebras")
    there = replace(there, cerebras={"target": "cpu", "release": environment.release})
    for run in (here, there):
        record = finished(run, ledger)
        assert record.status == "done", record.error
    expected, found = losses(ledger, here), losses(ledger, there)
    print(schedule, ((found - expected) / expected).abs())
    if here.updates:
        folders = [ledger.run_folder(run.run_id) for run in (here, there)]
        ours, theirs = (load_file(folder / "masks.safetensors") for folder in folders)
        differ = sum(int((ours[n] ^ theirs[n]).to(torch.int32).ne(0).sum()) for n in ours)
        print(differ, sum(t.numel() for t in ours.values()))
