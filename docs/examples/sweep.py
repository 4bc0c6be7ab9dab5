"""A sweep from Python: `.venv/bin/python docs/examples/sweep.py`. Starting it again runs only what is missing."""

from pathlib import Path
from typing import Any

from analysis.read.load import cells_table
from tune_sparse.config import SweepConfig
from tune_sparse.sweep.driver import run_sweep
from tune_sparse.sweep.preparation import prepare

AXES = {
    "models": ["tiny-llama"],
    "tasks": ["boolq"],
    "methods": ["unstructured", "random"],
    "sparsities": [0, 0.5],
    "modes": ["sparse-to-sparse"],
}


def main(results_dir: str = "results/example", **changes: Any) -> None:
    """Run the sweep, then print a row for each cell. Any setting of a sweep can be changed by its name."""
    config = SweepConfig.from_names(AXES | {"results_dir": results_dir} | changes)
    outcome = run_sweep(prepare(config))
    print(f"{outcome.ran} trainings, {outcome.failed} failed, {outcome.left} left")
    cells = cells_table([Path(results_dir)])
    print(cells[["method", "sparsity", "accuracy_before_tuning", "accuracy"]].to_string(index=False))


if __name__ == "__main__":
    main()
