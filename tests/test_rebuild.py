"""What was deployed can be made again from its parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import finished, tiny_run
from plain_masks import make_masks, masked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainables.pruning_stage import Pruner
from trainables.rebuild import deployed_by
from trainables.rerun import rerun
from trainables.worker import WorkerCache
from tune_sparse.data.splits import load_splits
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.evaluation.outcomes import read_outcomes
from tune_sparse.evaluation.scoring import encode_test, score
from tune_sparse.evaluation.validation import weights_sha256
from tune_sparse.export.merge import merge_run
from tune_sparse.files import read_json, write_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.lora.adapter_io import load_last_mask, merge_adapter_into
from tune_sparse.models.checkpoints import check_checkpoint, load_model, prunable_weights, write_weights_into
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.pruning.masks import mask_sha256

DENSE = {"method": "none", "sparsity": 0.0}


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("dense", DENSE),
        ("sparse-to-dense", {}),
        ("sparse-to-sparse", {}),
        ("sparse-to-sparse", {"method": "wanda"}),
        ("sparse-to-dense", {"method": "sparsegpt"}),
        ("masked-finetuning", {"learning_rate": 1e-3}),
    ],
)
def test_a_rebuilt_run_answers_as_its_record_says(
    mode: str, changes: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    run, ledger = tiny_run(llama, mode=mode, **changes), Ledger(tmp_path)
    assert finished(run, ledger, WorkerCache()).status == "done"
    recorded = read_outcomes(ledger.run_folder(run.run_id) / "examples.parquet")
    loaded, _ = deployed_by(run, ledger, WorkerCache())
    task = TASKS["boolq"]
    tests = encode_test(loaded.tokenizer, task, load_splits(task, None, run.protocol).test, run.protocol)
    assert list(score(loaded.model, loaded.tokenizer, [tests], run.protocol).outcomes) == recorded


@pytest.fixture(scope="module")
def pair(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Path]:
    """A finished sparsegpt run, its counterpart in the other mode, which is not run, and their results folder."""
    run, folder = tiny_run(llama, method="sparsegpt"), tmp_path_factory.mktemp("pair")
    assert finished(run, Ledger(folder), WorkerCache()).status == "done"
    return run, replace(run, cell=replace(run.cell, mode="sparse-to-dense")), folder


@pytest.fixture
def results(pair: tuple[Run, Run, Path], tmp_path: Path) -> Ledger:
    """A copy of the pair's results folder, to break something in."""
    return Ledger(Path(shutil.copytree(pair[2], tmp_path / "results")))


def pruning_of(run: Run, ledger: Ledger) -> Path:
    return ledger.pruning_folder(str(run.pruning_id))


def test_of_two_workers_that_prune_the_slower_one_takes_the_masks_of_the_faster(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ledger, worker = tiny_run(llama, method="wanda"), Ledger(tmp_path), WorkerCache()
    make_into = Pruner.make_into

    def made_late(pruner: Pruner, run: Run, *inputs: Any) -> BitMasks:
        masks = make_into(pruner, run, *inputs)
        other = BitMasks.pack((name, ~mask) for name, mask in masks.items())
        ledger.write_pruning(run, other, None, {})
        return masks

    monkeypatch.setattr(Pruner, "make_into", made_late)
    loaded = worker.model(run)
    pruned = worker.pruner.prune_into(run, loaded, worker.examples(run, loaded).train, ledger)
    for name, weight in prunable_weights(loaded.model).items():
        assert torch.equal(weight, loaded.dense_weights[name] * pruned.masks[name])
        assert weight.any()


class TestStoredPruning:
    @pytest.fixture(autouse=True)
    def _made_once(self, pair: tuple[Run, Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """The pruning was made; whoever makes it again fails."""
        monkeypatch.setattr(Pruner, "make_into", None)

    def test_the_other_mode_reads_the_bits_that_the_first_one_made(
        self, pair: tuple[Run, Run, Path], results: Ledger
    ) -> None:
        run, other, _ = pair
        before = {path: path.read_bytes() for path in pruning_of(run, results).iterdir()}
        record = finished(other, results, WorkerCache())
        first = results.record(run.run_id)
        assert first is not None
        assert record.status == "done", record.error
        assert record.metrics["mask_sha256"] == first.metrics["mask_sha256"]
        assert {path: path.read_bytes() for path in pruning_of(run, results).iterdir()} == before

    def test_a_run_is_rebuilt_from_it(self, pair: tuple[Run, Run, Path], results: Ledger) -> None:
        run, _, _ = pair
        loaded, masks = deployed_by(run, results, WorkerCache())
        record = results.record(run.run_id)
        assert record is not None
        assert weights_sha256(prunable_weights(loaded.model)) == record.metrics["weights_sha256"]
        assert mask_sha256(masks) == record.metrics["mask_sha256"]

    def test_another_attention_kernel_merges_the_weights_that_were_scored(
        self, pair: tuple[Run, Run, Path], results: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, _, _ = pair
        from_config = AutoModelForCausalLM.from_config
        eager = {"attn_implementation": "eager"}
        monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda config, **k: from_config(config, **k | eager))
        loaded, _ = deployed_by(run, results, WorkerCache())
        assert loaded.model.config._attn_implementation == "eager"

    def test_one_that_is_gone_is_refused_not_made_again(self, pair: tuple[Run, Run, Path], results: Ledger) -> None:
        run, _, _ = pair
        shutil.rmtree(pruning_of(run, results))
        gone = f"{run.run_id} was trained on a stored pruning, {pruning_of(run, results)} is missing"
        with pytest.raises(InputError, match=gone):
            deployed_by(run, results, WorkerCache())
        with pytest.raises(InputError, match=gone):
            merge_run(results, run.run_id, results.folder / "merged")
        assert not (results.folder / "merged").exists()
        with pytest.raises(InputError, match=gone):
            rerun(run, results)

    def test_a_flipped_bit_ends_a_run_before_it_computes(self, pair: tuple[Run, Run, Path], results: Ledger) -> None:
        run, other, _ = pair
        path = pruning_of(run, results) / "weights.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(NotReadyError, match=r"weights\.safetensors must have the checksum"):
            finished(other, results, WorkerCache())
        assert results.record(other.run_id) is None
        with pytest.raises(NotReadyError, match=r"weights\.safetensors must have the checksum"):
            deployed_by(run, results, WorkerCache())

    def test_another_pruning_of_the_same_identity_is_refused(
        self, pair: tuple[Run, Run, Path], results: Ledger
    ) -> None:
        run, _, _ = pair
        shutil.rmtree(pruning_of(run, results))
        mask = {name: weight != 0 for name, weight in prunable_weights(WorkerCache().model(run).model).items()}
        results.write_pruning(run, BitMasks.pack(mask.items()), None, {})
        with pytest.raises(InputError, match=r"the mask of .+ must come out as it was trained, .+ and the prunings of"):
            deployed_by(run, results, WorkerCache())

    def test_a_repetition_reads_it(self, pair: tuple[Run, Run, Path], results: Ledger) -> None:
        found = rerun(pair[0], results)
        assert found.is_exact
        assert found.differences == ()
        assert pruning_of(pair[0], results).is_dir(), "only the scratch folder goes"


def test_merged_weights_that_come_out_otherwise_are_refused(pair: tuple[Run, Run, Path], results: Ledger) -> None:
    run, _, _ = pair
    path = results.run_folder(run.run_id) / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    record = results.record(run.run_id)
    assert record is not None
    recorded = record.metrics["weights_sha256"][:12]
    with pytest.raises(
        InputError, match=f"the merged weights of {run.run_id} must be those that it scored, {recorded}, got"
    ):
        deployed_by(run, results, WorkerCache())


def test_masks_that_come_out_otherwise_are_refused(llama: Path, tmp_path: Path) -> None:
    run, ledger = tiny_run(llama), Ledger(tmp_path)
    finished(run, ledger, WorkerCache())
    path = ledger.run_folder(run.run_id) / "result.json"
    record = read_json(path)
    write_json(path, record | {"metrics": record["metrics"] | {"mask_sha256": "0" * 64}})
    with pytest.raises(InputError, match=r"the mask of .+ must come out as it was trained, 000000000000, got"):
        deployed_by(run, ledger, WorkerCache())


@pytest.mark.parametrize("mode", ["sparse-to-dense", "sparse-to-sparse"])
def test_an_adapter_is_merged_into_the_pruned_checkpoint_as_its_mode_deploys_it(
    mode: str, llama: Path, tmp_path: Path
) -> None:
    run, ledger = tiny_run(llama, mode=mode), Ledger(tmp_path)
    finished(run, ledger, WorkerCache())
    expected = prunable_weights(deployed_by(run, ledger, WorkerCache())[0].model)
    model, adapter = load_model(llama, torch.float32, torch.device("cpu")), ledger.run_folder(run.run_id) / "adapter"
    weights = prunable_weights(model)
    masks = make_masks("unstructured", weights, check_checkpoint(str(llama)).dims, 0.5, seed=0)
    write_weights_into(model, masked(weights, masks))
    merge_adapter_into(model, adapter, load_last_mask(model, adapter))
    for name, weight in prunable_weights(model).items():
        assert torch.equal(weight, expected[name])
