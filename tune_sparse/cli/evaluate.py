"""evaluate: score a checkpoint, with an adapter or without, or a finished run, on any tasks."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces.matrix import TOY_MODELS
from tune_sparse.cli.command import FAULT, OK, add_command, add_json, add_results_dir, existing_folders
from tune_sparse.cli.settings import DATA_DIR, add_set, add_settings, given_settings, parse_settings
from tune_sparse.cli.words import RUN_WORDS, files, metrics, models, paragraph, settings, tasks, words
from tune_sparse.config import SYNTHETIC, BudgetOptions, Protocol
from tune_sparse.config.options import converted
from tune_sparse.config.protocol import SCORING
from tune_sparse.data.task_types import METRICS, Task
from tune_sparse.data.tasks import TASKS, tasks_named
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.evaluation.scored_as import ScoredAs, read_scored_as, scoring_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune_sparse.evaluation.evaluations import Evaluation
    from tune_sparse.evaluation.outcomes import Outcome
    from tune_sparse.training.budgets import Budgets

JUDGED_BY = ("chance_accuracy", "majority_fraction", "most_frequent_fraction", "truncated_fraction", "cut_fraction")
BUDGETS = ("scoring_tokens", "generation_tokens")
BUDGET_TEXTS = {
    name: f"{BudgetOptions.__dataclass_fields__[name].metadata['help']} (default: with --run, that of the run; with "
    "--model, from the memory of the GPU, 8192 on a CPU)"
    for name in BUDGETS
}


def declare(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "score a model or a finished run on tasks, and store the scores in the results folder",
        examples=(
            "evaluate --model ./my-llama --tasks boolq gsm8k --data-dir ./examples",
            "evaluate --model ./my-llama --adapter ./my-adapter --tasks wikitext2 --data-dir hub",
            "evaluate --run torch_tiny-llama_boolq_none_s00_dense_84b51b69",
        ),
        ok="all tasks are scored",
        fault="with --run alone: an answer differs from the one that the run recorded",
        notes=[
            words(*RUN_WORDS, "adapter", "example", "results folder"),
            paragraph(
                "The scores are in RESULTS/evaluations; `tune-sparse report` does not show them. A --run that is "
                "scored without --tasks, --data-dir and --set is compared with its record, answer by answer, by either "
                "evaluator."
            ),
            models(trains=False, downloads=False),
            tasks(),
            metrics(),
            files(),
            paragraph("train.jsonl is needed here only where num_fewshot is above 0."),
            _settings_text(),
        ],
    )
    subject = evaluate.add_argument_group("what to score").add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="MODEL", help="model to score, see below")
    subject.add_argument("--run", metavar="RUN", help="finished run whose trained model is scored")
    scoring = evaluate.add_argument_group("how it is scored")
    scoring.add_argument(
        "--adapter",
        type=Path,
        metavar="ADAPTER",
        help="adapter to merge into the --model first, which must be the model that it was trained on, pruned if it "
        "was pruned: the folder RESULTS/runs/RUN/adapter of a sweep, or one written by Hugging Face PEFT (default: "
        "none)",
    )
    scoring.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks to score on, listed below; must be given with most models (default: with --run, its task; with a "
        "merged model, that of its run)",
    )
    scoring.add_argument(
        "--data-dir",
        type=Path,
        metavar="DATA",
        help=f"{DATA_DIR}; must be given with most models (default: with --run, its source; with a merged model, that "
        "of its run; with a toy model, synthetic)",
    )
    scoring.add_argument(
        "--evaluator",
        default="tune-sparse",
        metavar="NAME",
        help="tune-sparse, the scorer of this program; or lm-eval, the scorer lm-evaluation-harness by EleutherAI, "
        "with the same examples and settings. lm-eval needs `pip install 'tune-sparse[harness]'` and has all tasks "
        "but mawps, svamp, wikitext2 and tinyshakespeare (default: tune-sparse)",
    )
    add_settings(scoring, BudgetOptions, BUDGETS, BUDGET_TEXTS)
    add_set(scoring, "settings of scoring, listed below")
    results = evaluate.add_argument_group("results")
    add_results_dir(results)
    add_json(results, "the scores")


def _settings_text() -> str:
    few_shot = " and ".join(f"{task.num_fewshot} for {name}" for name, task in TASKS.items() if task.num_fewshot)
    texts = {"num_fewshot": f"solved examples in the prompt of each test example (default: {few_shot}, 0 for others)"}
    return f"{settings(SCORING, 'scoring', texts)}\n\n" + paragraph(
        "These defaults are for --model. With --run, a setting that you do not change is that of the run; precision "
        "and threads are the run's whatever you set. A model of `tune-sparse merge --run` is scored as its run was, "
        "and a toy model by the preset toy, unless you set something else; the settings are printed. On other tasks "
        "than its run's, a merged model has the precision and threads of the run and otherwise these defaults."
    )


@dataclass(frozen=True)
class Subject:
    """A model or run to score, and how it is scored."""

    name: str
    fingerprint: str
    tasks: list[str]
    data_dir: Path | None
    protocol: Callable[[Task], Protocol]
    """the settings of a task"""
    load_model: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    budgets: Budgets
    recorded: dict[str, Outcome]
    """{id of a question: what a finished run said to it}"""
    scored_as: ScoredAs | None = None
    """what the model says of its scoring"""
    given: Mapping[str, Any] = field(default_factory=dict)
    """the settings that the user gave"""

    def notes(self, task: Task, folder: Path | None) -> list[str]:
        """The settings of a task, where the model says how it is scored. folder: of the examples; None: synthetic."""
        used = scoring_settings(self.protocol(task))
        return [self.scored_as.note(task, used, self.given, str(folder or SYNTHETIC))] if self.scored_as else []

    def notes_after(self, evaluation: Evaluation) -> list[str]:
        task, known = evaluation.key.task, self.scored_as
        has_others = known and known.has_other_examples(task, (outcome.id for outcome in evaluation.outcomes))
        return [f"{task}: the test examples are not those of {known.origin}"] if known and has_others else []


def _evaluate(chosen: argparse.Namespace) -> int:
    from trainables.process import prepare_process

    prepare_process()
    from tune_sparse.data.sources import examples_folder
    from tune_sparse.data.splits import load_test
    from tune_sparse.evaluation.evaluations import EvaluationKey, evaluate

    subject = _run(chosen) if chosen.run else _checkpoint(chosen)
    tasks = [task for name in subject.tasks for task in tasks_named(name)]
    folder = examples_folder(subject.data_dir, subject.tasks)
    planned = []
    for task in tasks:
        protocol = subject.protocol(task)
        splits = load_test(task, folder, protocol)
        key = EvaluationKey.from_protocol(subject.name, subject.fingerprint, task, splits, protocol, chosen.evaluator)
        planned.append((key, task, splits, protocol))
    notes = {task.name: subject.notes(task, folder) for task in tasks}
    for note in [] if chosen.json else chain(*notes.values()):
        print(note, flush=True)
    budgets = subject.budgets.changed_by(BudgetOptions(**given_settings(chosen, BudgetOptions, BUDGETS)))
    done = [evaluate(*what, subject.load_model, chosen.results_dir, budgets) for what in planned]
    differing = {evaluation.key.task: _differing(evaluation, subject.recorded) for evaluation in done}
    others = {evaluation.key.task: subject.notes_after(evaluation) for evaluation in done}
    if chosen.json:
        said = [{"notes": notes[e.key.task] + others[e.key.task]} for e in done]
        print(json.dumps([_as_json(e, differing[e.key.task]) | more for e, more in zip(done, said, strict=True)]))
    else:
        for evaluation in done:
            print("\n".join([_result_lines(evaluation, differing[evaluation.key.task]), *others[evaluation.key.task]]))
    return FAULT if any(differing.values()) else OK


def _checkpoint(chosen: argparse.Namespace) -> Subject:
    from tune_sparse.models.checkpoints import check_checkpoint, fingerprint_of_files

    checkpoint, settings = check_checkpoint(chosen.model), _settings(chosen.set)
    fingerprint, scored_as = checkpoint.fingerprint, read_scored_as(chosen.model, checkpoint.path)
    if chosen.adapter and chosen.model not in TOY_MODELS:
        scored_as = None  # with an adapter it is no longer the model of its run
    tasks = chosen.tasks or list(scored_as.tasks if scored_as else ())
    if not tasks:
        raise InputError("evaluate needs tasks, got none. Give --tasks.")
    if chosen.adapter:
        files = sorted(path for path in existing_folders([chosen.adapter])[0].iterdir() if path.is_file())
        if not any(path.name == "adapter_config.json" for path in files):
            raise InputError(f"an adapter folder needs adapter_config.json, {chosen.adapter} has none. Fix --adapter.")
        fingerprint += fingerprint_of_files(files)

    def protocol(task: Task) -> Protocol:
        own = scored_as.settings_of(task) if scored_as else {"num_fewshot": task.num_fewshot}
        return Protocol(**own | settings).within(checkpoint.dims.max_positions)

    loading = protocol(tasks_named(tasks[0])[0])  # precision and threads are the same for every task

    def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        import torch

        from trainables.hardware import device
        from tune_sparse.lora.adapter_io import load_last_mask, merge_adapter_into
        from tune_sparse.models.checkpoints import load_model, load_tokenizer

        torch.set_num_threads(loading.threads)
        model = load_model(checkpoint.path, getattr(torch, loading.precision), device())
        if chosen.adapter:
            merge_adapter_into(model, chosen.adapter, load_last_mask(model, chosen.adapter))
        return model, load_tokenizer(checkpoint.path)

    from trainables.budgets import fitting_budgets

    budgets = fitting_budgets(loading, checkpoint.dims)
    data_dir = chosen.data_dir or (Path(scored_as.data_dir) if scored_as else None)
    return Subject(
        checkpoint.name, fingerprint, tasks, data_dir, protocol, load_model, budgets, {}, scored_as, settings
    )


def _run(chosen: argparse.Namespace) -> Subject:
    from tune_sparse.evaluation.outcomes import read_outcomes
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.models.checkpoints import check_checkpoint
    from tune_sparse.training.budgets import Budgets

    [folder] = existing_folders([chosen.results_dir])
    ledger = Ledger(folder)
    runs = [run_id for run_id in ledger.run_ids() if ledger.is_done(run_id)]
    if chosen.run not in runs:
        raise unknown_name("finished run", chosen.run, runs)
    if chosen.adapter:
        raise InputError(f"a run has an adapter of its own, got --adapter {chosen.adapter}. Leave it out.")
    run, record, settings = ledger.run(chosen.run), ledger.record(chosen.run), _settings(chosen.set)
    assert record is not None
    context = check_checkpoint(run.model_path).dims.max_positions

    def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        import torch

        from trainables.rebuild import deployed_by
        from trainables.worker import WorkerCache

        torch.set_num_threads(run.protocol.threads)
        loaded, _ = deployed_by(run, ledger, WorkerCache())
        return loaded.model, loaded.tokenizer

    asks_the_same = not settings and not chosen.tasks and not chosen.data_dir
    outcomes = read_outcomes(ledger.run_folder(chosen.run) / "examples.parquet") if asks_the_same else []
    return Subject(
        chosen.run,
        run.identity,
        chosen.tasks or [run.cell.task],
        chosen.data_dir or (Path(run.data_dir) if run.data_dir else SYNTHETIC),
        lambda task: replace(run.protocol, **settings).within(context),
        load_model,
        Budgets.from_record(record.measured["budgets"]),
        {outcome.id: outcome for outcome in outcomes},
    )


def _settings(texts: list[str]) -> dict[str, Any]:
    declared = {f.name: f for f in fields(Protocol) if f.name in SCORING}
    settings = parse_settings(texts)
    for name in settings:
        if name not in declared:
            raise unknown_name("setting of scoring", name, declared)
    return {name: converted(Protocol, declared[name], value) for name, value in settings.items()}


def _differing(evaluation: Evaluation, recorded: dict[str, Outcome]) -> int:
    """Examples that a finished run had answered otherwise, or windows whose likelihood differs by a thousandth."""
    known = [(recorded[outcome.id], outcome) for outcome in evaluation.outcomes if outcome.id in recorded]
    metric = evaluation.metrics["primary_metric"]
    if metric != "perplexity":
        return sum(before.is_right(metric) != now.is_right(metric) for before, now in known)
    pairs = [(before.log_likelihoods[0], now.log_likelihoods[0]) for before, now in known]
    return sum(not math.isclose(before, now, rel_tol=1e-3) for before, now in pairs)


def _as_json(evaluation: Evaluation, differing: int) -> dict[str, Any]:
    described = {name: getattr(evaluation.key, name) for name in ("model", "task", "evaluator", "settings")}
    return described | evaluation.metrics | {"differ_from_record": differing, "folder": str(evaluation.folder)}


def _result_lines(evaluation: Evaluation, differing: int) -> str:
    """A line each metric with its standard error, the primary one first, and one of what one needs to judge them."""
    key, values = evaluation.key, {name: v for name, v in evaluation.metrics.items() if v is not None}
    primary = values["primary_metric"]
    scores = sorted(
        (name for name in (*METRICS, "f1", "bits_per_byte") if name in values), key=lambda name: name != primary
    )
    lines = [f"{key.model}, {key.task}, {key.settings['num_fewshot']}-shot, by {key.evaluator}:"]
    for name in scores:
        around = f" +- {values[f'{name}_stderr']:.4f}" if f"{name}_stderr" in values else ""
        lines.append(f"  {name:22}{values[name]:.4f}{around}{'  primary' if name == primary else ''}")
    others = (f"{name} {values[name]:.4g}" for name in JUDGED_BY if name in values)
    lines.append("  " + ", ".join([f"n_examples {values['n_examples']}", *others]))
    if values.get("cut_fraction"):
        limit = key.settings["max_new_tokens"]
        lines.append(
            f"  {values['cut_fraction']:.1%} of the answers were cut at max_new_tokens={limit}: raise it by --set"
        )
    if differing:
        lines.append(f"  {differing} examples differ from the run's record")
    return "\n".join(lines)
