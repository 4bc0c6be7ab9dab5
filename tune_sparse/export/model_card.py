"""The README.md of a merged checkpoint: what it is, how it was made, and what it was found to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_sparse.data.tasks import tasks_named
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run

HEAD = """---
library_name: transformers
base_model: {base}
tags: [pruned, sparse, lora, tune-sparse]
---
# {title}

| | |
| --- | --- |
"""


def model_card(origin: Mapping[str, Any], report: Mapping[str, Any], run: Run | None, record: Record | None) -> str:
    """Markdown with the front matter of the Hugging Face Hub.

    `origin` has mode and base, `report` is the validation report. Without a run, as of an adapter that was merged by
    itself, nothing is said of method, data and accuracy.
    """
    rows = {"base model": origin["base"], "training mode": origin["mode"]}
    rows |= {"sparsity": f"{report['counted_sparsity']:.4f} of the pruned matrices, counted"}
    rows |= {"mask": f"SHA-256 {report['mask_sha256']}"}
    if run is not None and record is not None:
        rows |= _of_run(run, record)
    title = f"{run.cell.model}, {run.cell.task}" if run else str(origin["base"])
    table = "".join(f"| {name} | {_in_table(value)} |\n" for name, value in rows.items())
    checked = "Every masked weight is exactly 0; stock transformers computes the function that was trained and scored."
    unscored = "" if record else "\nThis checkpoint was not scored when it was merged.\n"
    return HEAD.format(base=_quoted(origin["base"]), title=title) + table + unscored + f"\n{checked}\n"


def _of_run(run: Run, record: Record) -> dict[str, Any]:
    cell, protocol, metrics = run.cell, run.protocol, record.metrics
    rows = {"pruning method": cell.method, "task": cell.task, "run": record.run_id, "seed": cell.seed}
    rows["data"] = f"{_describe_data(run)}; fingerprint {run.data_fingerprint[:16]}"
    rows["training"] = (
        f"{protocol.steps} steps of {protocol.global_batch_size} rows, learning rate {protocol.learning_rate:g}, "
        f"precision {protocol.precision}"
    )
    for name in ("accuracy", "perplexity"):
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
    return f"training rows with the fields of {', '.join(places) or run.cell.task}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _in_table(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
