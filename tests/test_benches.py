"""Every benchmark starts and ends, with its smallest setting: `make bench` runs them one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
BENCHES = sorted(path.name for path in TESTS.glob("bench_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES)
def test_a_benchmark_ends_with_a_line_of_json(bench: str, own_cache: Path, tmp_path: Path) -> None:
    environment = os.environ | {"BENCH_DIR": str(tmp_path), "PYTHONPATH": str(TESTS.parent)}
    run = subprocess.run(
        [sys.executable, TESTS / bench, "--smoke"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1])


def test_masked_layers_are_compared_with_those_of_peft(recwarn: pytest.WarningsRecorder) -> None:
    """Once adapters of peft were put into the model before ours, which found nothing left to adapt."""
    from bench_lora import CONTENDERS, SMOKE, check_layers, contender, peft_model, small_llama
    from peft.tuners.lora.layer import Linear as PeftLinear

    from tune_sparse.config import Protocol
    from tune_sparse.lora.layer import adapt_model

    for name in CONTENDERS:
        contender(name, torch.float32, torch.device("cpu"), **SMOKE.model)
    model, masks = small_llama(torch.float32, torch.device("cpu"), False, **SMOKE.model)
    peft_model(model, PeftLinear, True)
    with pytest.raises(AssertionError):
        check_layers("ours", adapt_model(model, Protocol(), masks, seed=0), masks)


def test_there_are_benchmarks_to_run() -> None:
    assert len(BENCHES) >= 8


@pytest.mark.slow
def test_texts_end_on_time_where_all_prompts_are_of_one_length(llama: Path) -> None:
    """Without an attention mask, which transformers leaves out then, as with one."""
    pytest.importorskip("lm_eval")
    from bench_eval import EndsOnTime

    from tune_sparse.models.checkpoints import load_model

    model = load_model(llama, torch.float32, torch.device("cpu"))
    EndsOnTime(model, 0, {3: 5})
    ids = torch.tensor([[11, 12, 13], [21, 22, 23]])
    for attended in (None, torch.ones_like(ids)):
        settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=attended, **settings)
        assert (made[:, 3:] == 0).int().argmax(1).tolist() == [5, 5]
