"""The cache that a worker keeps between cells."""

from __future__ import annotations

import gc
from typing import Any

from trainables.loaded import Examples, LoadedModel, encode, load
from trainables.pruning_stage import Pruner
from tune_sparse.ledger.run import Run


class WorkerCache:
    """One model, the tokens of its tasks, and what calibration measured on it."""

    def __init__(self) -> None:
        self.loads = 0
        self._key: tuple[str, str] | None = None
        self._loaded: LoadedModel | None = None
        self._trains_also = False
        self._examples: dict[tuple[Any, ...], Examples] = {}
        self.pruner = Pruner()

    def model(self, run: Run) -> LoadedModel:
        """Return the run's model with its dense weights, read again over what an earlier run left.

        It is made anew only if the worker keeps another one. Raises as `load`.
        """
        key = (run.model_fingerprint, run.protocol.precision)
        if self._loaded is None or self._key != key:
            self.clear()
            self._key, self._loaded = key, load(run)
            self.loads += 1
        elif self._trains_also:
            self._loaded.dense_weights.restore_all_into(self._loaded.model)
        else:
            self._loaded.dense_weights.restore_into(self._loaded.model)
        self._trains_also = bool(run.protocol.train_also)
        return self._loaded

    def examples(self, run: Run, loaded: LoadedModel) -> Examples:
        """Return the examples of the run's task, encoded once."""
        key = (run.cell.task, run.data_fingerprint, run.prompt_version, run.protocol)
        if key not in self._examples:
            self._examples[key] = encode(run, loaded)
        return self._examples[key]

    def clear(self) -> None:
        """Forget the model: it may have been left half-changed, or another one is wanted."""
        self._loaded, self._examples, self.pruner = None, {}, Pruner()
        gc.collect()
