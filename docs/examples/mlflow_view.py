"""The runs of sweep.py in MLflow: `.venv/bin/python docs/examples/mlflow_view.py`, or `.venv/bin/tune-sparse ui`."""

from pathlib import Path

import mlflow

from tune_sparse.tracking.sync import EXPERIMENT, default_uri


def main(results_dir: str = "results/example") -> None:
    """Print every training that MLflow has of a results folder. A sweep tracks itself."""
    mlflow.set_tracking_uri(default_uri(Path(results_dir)))
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT])
    trainings = runs[runs["metrics.accuracy"].notna()]
    print(trainings[["params.method", "params.sparsity", "metrics.accuracy"]].to_string(index=False))


if __name__ == "__main__":
    main()
