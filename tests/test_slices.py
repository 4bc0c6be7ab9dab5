"""Slices of a super-adapter: trained, deployed, written, and loaded again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from factories import TINY_PROTOCOL, finished, make_run, tiny_run, write_boolq
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from trainables.pipeline import run_cell
from trainables.rebuild import pruned_by
from trainables.worker import WorkerCache
from tune_sparse.errors import InputError, RunError
from tune_sparse.evaluation.scoring import score
from tune_sparse.files import read_json
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.lora.adapter_io import load_adapter, merge_adapter_into, read_marker
from tune_sparse.lora.layer import adapt_model, sparse_lora_layers
from tune_sparse.lora.rank_space import Ranks, Space, SuperAdapter
from tune_sparse.lora.slices import count_layers, set_ranks_into
from tune_sparse.models.checkpoints import load_model, prunable_weights, write_weights_into
from tune_sparse.pruning.masks import Masks
from tune_sparse.search.racing import Correctness
from tune_sparse.search.scorer import SliceScorer

SPACE = Space.from_groups(
    {
        "qkv": {"modules": ["q_proj", "k_proj", "v_proj"], "ranks": [4, 2, 1, 0]},
        "up": {"modules": ["up_proj"], "ranks": [4, 3, 2]},
        "down": {"modules": ["down_proj"], "ranks": [4, 2]},
    }
)
MODES = ("dense", "sparse-to-dense", "sparse-to-sparse")


def super_run(model: Path, data_dir: Path, mode: str, **changes: object) -> Run:
    pruned = {"method": "none", "sparsity": 0.0} if mode == "dense" else {}
    run = tiny_run(model, data_dir, mode=mode, steps=6, **pruned | changes)
    return replace(run, super_adapter=SuperAdapter(SPACE))


@dataclass
class Trained:
    run: Run
    ledger: Ledger
    scorer: SliceScorer

    def sample(self, seed: int) -> Ranks:
        return SPACE.sample_ranks(count_layers(self.scorer.slices.model), 0, seed, "uniform")


@pytest.fixture(scope="module", params=MODES)
def trained(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("super")
    run, ledger = super_run(llama, write_boolq(folder / "data"), request.param), Ledger(folder / "results")
    record = finished(run, ledger)
    assert record.status == "done", record.error
    return Trained(run, ledger, SliceScorer.from_run(run, ledger))


def test_a_slice_scores_exactly_as_the_same_sub_adapter_loaded_alone(trained: Trained, tmp_path: Path) -> None:
    scorer, ranks = trained.scorer, trained.sample(1)
    scorer.slices.activate(trained.sample(2))
    scorer.slices.activate(ranks)
    weights = {name: weight.clone() for name, weight in prunable_weights(scorer.slices.model).items()}
    sliced = score(scorer.slices.model, scorer.tokenizer, [scorer.tests], scorer.protocol)
    scorer.slices.save(ranks, tmp_path / "adapter")
    loaded, pruned = pruned_by(trained.run, trained.ledger, WorkerCache())
    merge_adapter_into(loaded.model, tmp_path / "adapter", None if trained.run.cell.mode == "dense" else pruned.masks)
    for name, weight in prunable_weights(loaded.model).items():
        assert torch.equal(weight, weights[name]), name
    assert score(loaded.model, scorer.tokenizer, [scorer.tests], scorer.protocol) == sliced


def test_the_maximal_slice_is_what_the_super_adapter_deployed(trained: Trained) -> None:
    scorer = trained.scorer
    scorer.slices.activate(SPACE.maximal(count_layers(scorer.slices.model)))
    loaded, pruned = pruned_by(trained.run, trained.ledger, WorkerCache())
    adapter = trained.ledger.run_folder(trained.run.run_id) / "adapter"
    merge_adapter_into(loaded.model, adapter, None if trained.run.cell.mode == "dense" else pruned.masks)
    mine = prunable_weights(scorer.slices.model)
    assert all(torch.equal(weight, mine[name]) for name, weight in prunable_weights(loaded.model).items())


def test_a_slice_keeps_the_zeros_and_its_scaling_in_stock_peft(trained: Trained, tmp_path: Path) -> None:
    scorer, ranks = trained.scorer, trained.sample(3) | {"l00.qkv": 0}
    scorer.slices.save(ranks, tmp_path / "adapter")
    model = load_model(Path(trained.run.model_path), torch.float32, torch.device("cpu"))
    stock = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    seen = 0
    for name, module in stock.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            rank = SPACE.active_rank(f"{name}.weight", ranks)
            assert module.r["default"] == rank
            assert module.scaling["default"] == TINY_PROTOCOL.lora_alpha / TINY_PROTOCOL.lora_rank
            assert torch.equal(module.lora_A["default"].weight, scorer.slices.layers[f"{name}.weight"].A[:rank])
            seen += 1
    wanted = [name for name in scorer.slices.layers if SPACE.active_rank(name, ranks)]
    assert seen == len(wanted) < len(scorer.slices.layers)
    if trained.run.cell.mode != "dense":
        scorer.slices.activate(ranks)
        for name, weight in prunable_weights(scorer.slices.model).items():
            assert not weight[~scorer.masks[name]].any()


def test_a_finished_slice_is_written_validated_and_scored(trained: Trained, tmp_path: Path) -> None:
    ranks = trained.sample(4)
    scored = trained.scorer.finish(ranks, tmp_path / "winner")
    known = read_json(tmp_path / "winner" / "result.json")
    assert known["ranks"] == ranks
    assert known["accuracy"] == scored.metrics["accuracy"]
    assert known["parameters"] == trained.scorer.parameters(ranks)
    assert read_json(tmp_path / "winner" / "validation_report.json")["all_valid"]
    before = score_all(trained.scorer, ranks)
    assert before == score_all(trained.scorer, ranks), "finishing leaves the model ready for the next slice"


def score_all(scorer: SliceScorer, ranks: Ranks) -> dict[int, bool]:
    everything = list(range(len(scorer.tests.examples)))
    return dict(scorer.answers(ranks, everything, Correctness(len(everything))))


def test_stages_answer_what_is_not_known_and_the_same_as_at_once(trained: Trained) -> None:
    scorer, ranks = trained.scorer, trained.sample(5)
    whole = score_all(scorer, ranks)
    known = Correctness(len(whole)).adding([(1, True)])
    parts = dict(scorer.answers(ranks, [1, 3], known)) | dict(scorer.answers(ranks, [0, 2], known))
    assert parts == {i: whole[i] for i in (0, 2, 3)}


def test_a_candidate_that_computes_nan_fails(trained: Trained) -> None:
    slices, ranks = trained.scorer.slices, SPACE.maximal(count_layers(trained.scorer.slices.model))
    layer = next(iter(slices.layers.values()))
    slices.activate(dict.fromkeys(ranks, 0))
    kept = layer.A[3].clone()
    layer.A[3] = math.nan
    try:
        with pytest.raises(RunError, match="log-likelihoods must be finite"):
            score_all(trained.scorer, ranks)
        slices.activate(dict.fromkeys(ranks, 0))
        assert score_all(trained.scorer, ranks | {"l00.qkv": 2}), "a slice without that row is sound"
    finally:
        layer.A[3] = kept
        slices.activate(dict.fromkeys(ranks, 0))


@pytest.mark.parametrize("impl", ["effective-weight", "plain"])
def test_an_active_rank_computes_as_an_adapter_of_that_rank(llama: Path, impl: str) -> None:
    model = load_model(llama, torch.float32, torch.device("cpu"))
    masks: Masks = {name: torch.rand_like(w) > 0.5 for name, w in prunable_weights(model).items()}
    write_weights_into(model, {name: w * masks[name] for name, w in prunable_weights(model).items()})
    protocol = replace(TINY_PROTOCOL, masked_lora_impl="auto" if impl == "plain" else impl)
    adapted = adapt_model(model, protocol, None if impl == "plain" else masks, 0, SPACE.modules)
    layers = dict(sparse_lora_layers(adapted))
    assert {name.split(".")[-2] for name in layers} == set(SPACE.modules)
    for layer in layers.values():
        layer.lora_B["default"].weight.data.normal_()
    ids = torch.arange(1, 9)[None]
    for rank in (0, 2):
        set_ranks_into(adapted, SPACE, dict.fromkeys(SPACE.dimensions(count_layers(adapted)), rank))
        adapted.zero_grad()
        outputs = model(input_ids=ids).logits
        outputs.square().mean().backward()
        gradients = {name: layer.lora_A["default"].weight.grad for name, layer in layers.items()}
        assert all(g is not None and not g[rank:].any() for g in gradients.values())
        assert all(g is not None and g[:rank].any(dim=1).all() for g in gradients.values())
        assert torch.allclose(outputs, merged_outputs(llama, layers, masks, ids), atol=1e-4)


def merged_outputs(llama: Path, layers: dict[str, object], masks: Masks, ids: Tensor) -> Tensor:
    model = load_model(llama, torch.float32, torch.device("cpu"))
    own = prunable_weights(model)
    merged = {name: layer.merged_weight().clone() for name, layer in layers.items()}  # type: ignore[attr-defined]
    write_weights_into(model, {name: w * masks[name] for name, w in own.items()} | merged)
    return model(input_ids=ids).logits


def killed(run: Run, ledger: Ledger, after: int) -> Iterator[object]:
    steps = run_cell(run, ledger, WorkerCache())
    for _ in range(after):
        next(steps)
    steps.close()
    yield


def test_a_super_adapter_goes_on_as_if_it_had_not_been_killed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.training.CHECKPOINT_SECONDS", 0.0)
    run = super_run(llama, write_boolq(tmp_path / "data"), "sparse-to-sparse")
    whole, cut = Ledger(tmp_path / "whole"), Ledger(tmp_path / "cut")
    finished(run, whole)
    (cut.folder / "checkpoints").mkdir(parents=True)
    list(killed(run, cut, 3))
    assert cut.checkpoint(run.run_id).exists()
    finished(run, cut)
    assert "goes on after step" in (cut.run_folder(run.run_id) / "train.log").read_text()
    a, b = (adapter_tensors(ledger, run) for ledger in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def adapter_tensors(ledger: Ledger, run: Run) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(ledger.run_folder(run.run_id) / "adapter" / "adapter_model.safetensors")


def test_ranks_are_drawn_once_a_step_also_with_activation_checkpointing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = super_run(llama, write_boolq(tmp_path / "data"), "sparse-to-sparse", micro_batch_size=2)
    steps: list[int] = []
    draw = Space.sample_ranks
    monkeypatch.setattr(
        Space, "sample_ranks", lambda self, layers, step, *rest: steps.append(step) or draw(self, layers, step, *rest)
    )
    plain, recomputed = Ledger(tmp_path / "plain"), Ledger(tmp_path / "recomputed")
    again = replace(run, protocol=replace(run.protocol, activation_checkpointing=True))
    finished(run, plain)
    finished(again, recomputed)
    assert steps == [*range(6), *range(6)]
    a, b = adapter_tensors(plain, run), adapter_tensors(recomputed, again)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_a_super_adapter_is_another_run_and_other_runs_keep_their_names() -> None:
    plain = make_run()
    uniform, sandwich = (replace(plain, super_adapter=SuperAdapter(SPACE, s)) for s in ("uniform", "sandwich"))
    other = replace(plain, super_adapter=SuperAdapter(Space.uniform(["up_proj"], 4)))
    assert len({run.identity for run in (plain, uniform, sandwich, other)}) == 4
    assert "super_adapter" not in plain._identified()
    assert "_super-sparse-to-dense_" in uniform.run_id
    assert Run.from_config(uniform.as_config()) == uniform
    assert Run.from_config(plain.as_config()) == plain
    old = {name: value for name, value in plain.as_config().items() if name != "super_adapter"}
    assert Run.from_config(old) == plain


def test_a_super_adapter_of_another_mask_is_refused(trained: Trained) -> None:
    if trained.run.cell.mode == "dense":
        pytest.skip("the mode dense has no mask")
    adapter = trained.ledger.run_folder(trained.run.run_id) / "adapter"
    assert read_marker(adapter) is not None
    model: PreTrainedModel = load_model(Path(trained.run.model_path), torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match="belongs to the mask"):
        load_adapter(model, adapter)
