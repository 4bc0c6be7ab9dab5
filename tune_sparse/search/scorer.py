"""The contents of a search's worker: a model, its super-adapter taken apart, and the selection examples as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from trainables.budgets import run_budgets
from trainables.inputs import load_planned_splits
from trainables.rebuild import check_merged, pruned_by
from trainables.worker import WorkerCache
from tune_sparse.config import Protocol
from tune_sparse.data.tasks import task_named
from tune_sparse.errors import RunError
from tune_sparse.evaluation.outcomes import write_outcomes
from tune_sparse.evaluation.scoring import EvalSet, Scored, compute_outcomes, encode_test, score
from tune_sparse.evaluation.validation import validation_report, weights_sha256
from tune_sparse.files import write_json
from tune_sparse.ledger.contracts import LedgerReader
from tune_sparse.ledger.run import Run
from tune_sparse.lora.adapter_io import merge_adapter_into, read_marker
from tune_sparse.lora.rank_space import Ranks
from tune_sparse.lora.slices import Slices
from tune_sparse.models.checkpoints import prunable_weights
from tune_sparse.modes import MODES
from tune_sparse.pruning.masks import Masks, count_sparsity, mask_sha256
from tune_sparse.search.racing import Correctness
from tune_sparse.training.budgets import Budgets


@dataclass(frozen=True)
class SliceScorer:
    """Scores slices of one super-adapter, one after the other, in one model."""

    run: Run
    slices: Slices
    tokenizer: PreTrainedTokenizerBase
    masks: Masks
    tests: EvalSet
    """of the selection examples"""
    protocol: Protocol
    budgets: Budgets

    @classmethod
    def from_run(cls, run: Run, ledger: LedgerReader) -> SliceScorer:
        """Load a finished super-adapter. Raises `InputError` for one of another model, mask or examples, and where its
        merged weights are not those that it scored."""
        assert run.super_adapter is not None
        torch.set_num_threads(run.protocol.threads)
        loaded, pruned = pruned_by(run, ledger, WorkerCache())
        folder = ledger.run_folder(run.run_id) / "adapter"
        marker = read_marker(folder)
        assert marker is not None, "a super-adapter is ours, so it has a marker"
        space, masks = run.super_adapter.space, pruned.masks
        slices = Slices.from_folder(loaded.model, folder, space, marker, masks, pruned.weights)
        slices.activate(space.maximal(loaded.dims.num_layers))
        check_merged(run, ledger, slices.model)
        slices.restore()
        task, protocol = task_named(run.cell.task), run.protocol.within(loaded.dims.max_positions)
        [splits] = load_planned_splits(run, protocol)
        tests = encode_test(loaded.tokenizer, task, splits.selection, protocol, splits.shots)
        return cls(run, slices, loaded.tokenizer, masks, tests, protocol, run_budgets(run, loaded.dims))

    def parameters(self, ranks: Ranks) -> int:
        sizes = {name: layer.size for name, layer in self.slices.layers.items()}
        return self.slices.space.parameters(ranks, sizes)

    def answers(self, ranks: Ranks, stage: Sequence[int], known: Correctness) -> Iterator[tuple[int, bool]]:
        """(example, whether the slice is right) for each example of a stage that is not known."""
        self.slices.activate(ranks)
        tests = EvalSet(self.tests.task, tuple(self.tests.examples[i] for i in stage))
        done = [place for place, i in enumerate(stage) if known.knows(i)]
        for batch in compute_outcomes(self.slices.model, self.tokenizer, tests, self.protocol, done, self.budgets):
            yield from ((stage[place], outcome.is_right(tests.task.primary_metric)) for place, outcome in batch.items())

    def finish(self, ranks: Ranks, folder: Path) -> Scored:
        """Write a slice as an adapter, merge that into the pruned model, validate it and score it on test examples.

        Raises `RunError` unless the merged model is the slice, to the last bit, and passes its validation.
        """
        folder.mkdir(parents=True)
        self.slices.save(ranks, folder / "adapter")
        self.slices.activate(ranks)
        searched = self._checksums()
        self.slices.restore()
        last_mask = self.masks if MODES[self.run.cell.mode].is_pruned else None
        merge_adapter_into(self.slices.model, folder / "adapter", last_mask)
        differing = [name for name, merged in self._checksums().items() if merged != searched[name]]
        violations = [f"{name}: the merged slice must be the one that was searched" for name in differing]
        checksum = mask_sha256(self.masks)
        matrices = prunable_weights(self.slices.model)
        report = validation_report(matrices, self.masks, count_sparsity(self.masks), checksum, violations)
        write_json(folder / "validation_report.json", report)
        if not report["all_valid"]:
            raise RunError("a sub-adapter must pass its validation: " + "; ".join(report["violations"]))
        [splits] = load_planned_splits(self.run, self.protocol)
        tests = encode_test(self.tokenizer, self.tests.task, splits.test, self.protocol, splits.shots)
        scored = score(self.slices.model, self.tokenizer, [tests], self.protocol, self.budgets)
        write_outcomes(folder / "examples.parquet", scored.outcomes)
        write_json(folder / "result.json", {"ranks": ranks, "parameters": self.parameters(ranks), **scored.metrics})
        self.slices.restore()
        return scored

    def _checksums(self) -> dict[str, str]:
        """{matrix: its checksum} of the model as it is now."""
        matrices = prunable_weights(self.slices.model)
        return {name: weights_sha256({name: weight}) for name, weight in matrices.items()}
