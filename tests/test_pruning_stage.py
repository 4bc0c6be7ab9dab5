"""Recovery in the pruning stage of a cell: made once, stored, and read back by every mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from factories import finished, tiny_run
from torch import Tensor

from trainables.loaded import LoadedModel
from trainables.pruning_stage import Pruner
from trainables.rebuild import deployed_by
from trainables.worker import WorkerCache
from tune_sparse.config import SweepConfig
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.sweep.plan import make_plan

CALIBRATED = {"calibration_tokens": 1536, "calibration_window": 64, "n_train": 32}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


@torch.no_grad()
def predictions(loaded: LoadedModel, examples: list[Encoded]) -> Tensor:
    """Log-probabilities of every next token: (tokens, vocabulary)."""
    texts = (torch.tensor([[*example.context, *example.continuation]]) for example in examples)
    return torch.cat([loaded.model(text).logits[0] for text in texts]).log_softmax(dim=-1)


def divergence(found: Tensor, dense: Tensor) -> float:
    return float(F.kl_div(found, dense, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("method", ["unstructured", "sparsegpt"])
def test_a_recovered_model_predicts_more_like_the_dense_one_by_the_same_mask(
    method: str, llama: Path, ledger: Ledger
) -> None:
    worker = WorkerCache()
    plain = tiny_run(llama, method=method, sparsity=0.7, n_selection=32, **CALIBRATED)
    run = replace(plain, protocol=replace(plain.protocol, recover="reconstruct"))
    loaded = worker.model(plain)
    examples = worker.examples(plain, loaded)
    dense = predictions(loaded, examples.selection)
    pruned = worker.pruner.prune_into(plain, loaded, examples.train, ledger)
    before = divergence(predictions(loaded, examples.selection), dense)
    loaded.dense_weights.restore_into(loaded.model)
    recovered = worker.pruner.prune_into(run, loaded, examples.train, ledger)
    assert divergence(predictions(loaded, examples.selection), dense) < before
    assert recovered.checksum == pruned.checksum
    own = prunable_weights(loaded.model)
    assert all(not own[name][~recovered.masks[name]].any() for name in own)
    described = recovered.sparse_config(run)
    assert described["recover"] == "reconstruct"
    assert [block["block"] for block in described["recovery"]] == list(range(loaded.dims.num_layers))
    assert plain.protocol.recover == "none"
    assert pruned.sparse_config(plain)["recovery"] == []


def test_every_mode_reads_the_recovery_that_is_stored(
    llama: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = ("sparse-to-dense", "sparse-to-sparse")
    runs = [tiny_run(llama, mode=mode, recover="reconstruct", **CALIBRATED) for mode in modes]
    first = finished(runs[0], ledger)
    assert runs[0].pruning_id == runs[1].pruning_id is not None
    stored = ledger.pruning(runs[1])
    assert stored is not None
    assert stored.has_weights
    monkeypatch.setattr(Pruner, "make_into", None)
    second = finished(runs[1], ledger)
    for record in (first, second):
        assert record.status == "done", record.error
    assert first.metrics["mask_sha256"] == second.metrics["mask_sha256"]
    assert first.metrics["accuracy_before_tuning"] == second.metrics["accuracy_before_tuning"]
    deployed, masks = deployed_by(runs[1], ledger, WorkerCache())
    merged: dict[str, Tensor] = prunable_weights(deployed.model)
    assert all(not merged[name][~masks[name]].any() for name in merged)
    described = read_json(ledger.run_folder(runs[1].run_id) / "sparse_config.json")
    assert described["recovery"] == stored.provenance["recovery"]


def test_too_few_windows_are_refused_before_anything_is_pruned(
    llama: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = WorkerCache()
    run = tiny_run(llama, method="sparsegpt", recover="reconstruct", **CALIBRATED | {"calibration_tokens": 192})
    loaded = worker.model(run)
    monkeypatch.setattr(Pruner, "make_into", None)
    with pytest.raises(InputError, match=r"recovery needs 4 calibration windows, .* got 3"):
        worker.pruner.prune_into(run, loaded, worker.examples(run, loaded).train, ledger)
    names = {"models": str(llama), "tasks": "boolq", "data_dir": "synthetic", "methods": "random"}
    settings = {"recover": "reconstruct", "calibration_tokens": 193, "calibration_window": 64}
    with pytest.raises(InputError, match=r"recovery needs 4 calibration windows, .* got 3"):
        make_plan(SweepConfig.from_names(names | settings))


def test_structured_pruning_has_nothing_to_recover() -> None:
    from tune_sparse.pruning.reconstruction import check_recoverable

    check_recoverable("structured", "none")
    check_recoverable("wanda-2:4", "reconstruct")
    with pytest.raises(InputError, match=r"recover=reconstruct solves .*, got wanda-structured: .*Set recover=none"):
        check_recoverable("wanda-structured", "reconstruct")
