"""The README.md of a merged checkpoint: its origin, how it was made, and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_sparse.config.options import value_text
from tune_sparse.data.task_types import METRICS
from tune_sparse.data.tasks import tasks_named
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.schedules import ONE_SHOT, SCHEDULES

TAGS = ("pruned", "sparse", "lora", "tune-sparse")
CHECKED = "Every masked weight is exactly 0; stock transformers computes the function that was trained and scored."
UNSCORED = "This checkpoint was not scored when it was merged."


def model_card(origin: Mapping[str, Any], report: Mapping[str, Any], run: Run | None, record: Record | None) -> str:
    """Markdown with the front matter of the Hugging Face Hub.

    `origin` has mode and base, `report` is the validation report. Without a run, as of an adapter that was merged by
    itself, nothing is said of method, data and accuracy.
    """
    from huggingface_hub import ModelCard, ModelCardData

    rows = {"base model": origin["base"], "training mode": origin["mode"]}
    rows |= {"sparsity": f"{report['actual_sparsity']:.4f} of the pruned matrices, counted"}
    rows |= {"mask": f"SHA-256 {report['mask_sha256']}"}
    if run is not None and record is not None:
        rows |= _rows_about_run(run, record)
    title = f"{run.cell.model}, {run.cell.task}" if run else str(origin["base"])
    table = [f"| {name} | {_in_table(value)} |" for name, value in rows.items()]
    data = ModelCardData(library_name="transformers", base_model=str(origin["base"]), tags=list(TAGS))
    sentences = [CHECKED] if record else [UNSCORED, CHECKED]
    page = [f"# {title}", "\n".join(["| | |", "| --- | --- |", *table]), *sentences]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(page))) + "\n"


def _rows_about_run(run: Run, record: Record) -> dict[str, Any]:
    cell, protocol, metrics = run.cell, run.protocol, record.metrics
    rows = {"pruning method": cell.method, "task": cell.task, "run": record.run_id, "seed": cell.seed}
    rows["data"] = f"{_describe_data(run)}; fingerprint {run.data_fingerprint[:16]}"
    if cell.schedule != ONE_SHOT:
        read = SCHEDULES[cell.schedule].read(run.schedule_settings).items()
        rows["schedule"] = f"{cell.schedule}: {', '.join(f'{name} {value_text(value)}' for name, value in read)}"
    rows["training"] = (
        f"{protocol.steps} steps of {protocol.global_batch_size} examples, learning rate {protocol.learning_rate:g}, "
        f"precision {protocol.precision}"
    )
    rows["primary metric"] = metrics.get("primary_metric", "not recorded")
    for name in ("accuracy", *METRICS):
        if name in metrics:
            error = metrics.get(f"{name}_stderr")
            spread = f" ± {error:.2g} (standard error)" if error else ""
            rows[name] = f"{metrics[name]:.4g}{spread}, {metrics.get('n_examples', 'all')} examples"
            rows[f"{name} before tuning"] = _number(metrics.get(f"{name}_before_tuning"))
    rows["few-shot examples"] = protocol.num_fewshot
    rows["chance accuracy"] = _number(metrics.get("chance_accuracy"))
    return rows


def _describe_data(run: Run) -> str:
    if run.data_dir is None:
        return "synthetic examples"
    places = (f"{task.hub.path} of the Hugging Face Hub" for task in tasks_named(run.cell.task) if task.hub)
    return f"training examples with the fields of {', '.join(places) or run.cell.task}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _in_table(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
