"""EleutherAI's lm-evaluation-harness as a second evaluator: its own task files, prompts, scoring and metrics, on
examples that lie here, without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tune_sparse.config import Protocol
from tune_sparse.data.task_types import ChoiceTask, Example, PromptTask, Task
from tune_sparse.errors import InputError
from tune_sparse.evaluation.outcomes import Outcome
from tune_sparse.files import write_lines
from tune_sparse.training.budgets import CPU_BUDGETS, Budgets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOT_FOUND = "[invalid]"
"""The harness's answer where its regular expression finds none."""
TASK_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}
"""The harness's own file of each task that both have."""


def harness_outcomes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    shots: Sequence[Example],
    protocol: Protocol,
    budgets: Budgets = CPU_BUDGETS,
) -> list[Outcome]:
    """The outcome of each example as the harness scores it; `shots` is the pool of its few-shot examples.

    Raises `InputError` for a task that the harness has not, or where it is not installed.
    """
    check_harness(task)
    assert isinstance(task, PromptTask)
    samples = harness_samples(model, tokenizer, task, examples, shots, protocol, budgets)
    by_filter: dict[str, dict[int, Any]] = {sample["filter"]: {} for sample in samples}
    for sample in samples:
        by_filter[sample["filter"]][sample["doc_id"]] = sample
    return [
        _outcome(task, example, {name: found[i] for name, found in by_filter.items()})
        for i, example in enumerate(examples)
    ]


def check_harness(task: Task) -> None:
    """Raise `InputError` unless the harness can score `task` here."""
    if task.name not in TASK_FILES:
        raise InputError(
            f"the harness has {', '.join(TASK_FILES)}, got {task.name!r}. Leave out --evaluator for this task."
        )
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the evaluator lm-eval needs lm-evaluation-harness, which is not installed. "
            'Run `pip install "tune-sparse[harness]"`.'
        ) from error


def harness_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PromptTask,
    examples: Sequence[Example],
    shots: Sequence[Example],
    protocol: Protocol,
    budgets: Budgets = CPU_BUDGETS,
) -> list[dict[str, Any]]:
    """The harness's log of every example: prompt, continuations, answers, metrics."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokens = budgets.scoring_tokens if isinstance(task, ChoiceTask) else budgets.generation_tokens
    datasets.disable_progress_bars()
    with TemporaryDirectory() as folder, _stopping_at_end_of_text(model, tokenizer):
        _write_task(Path(folder), task, examples, shots)
        evaluated = simple_evaluate(
            HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=max(1, tokens // protocol.max_tokens),
                max_length=protocol.max_tokens,
            ),
            tasks=[task.name],
            num_fewshot=protocol.num_fewshot,
            gen_kwargs=None if isinstance(task, ChoiceTask) else {"max_gen_toks": protocol.max_new_tokens},
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    return evaluated["samples"][task.name]


@contextmanager
def _stopping_at_end_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """The harness leaves it to the model's settings where a text ends."""
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before


def _write_task(folder: Path, task: PromptTask, examples: Sequence[Example], shots: Sequence[Example]) -> None:
    """The harness's task file with our examples in place of the Hub's."""
    import lm_eval.tasks
    import yaml

    files = {task.test_split: examples, "train": shots or examples[:1]}
    for split, content in files.items():
        write_lines(folder / f"{split}.jsonl", map(_as_on_the_hub, content))
    stock = Path(lm_eval.tasks.__file__).parent / TASK_FILES[task.name]
    described = {
        "include": str(stock),
        "task": task.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in files},
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")


def _as_on_the_hub(example: Example) -> Mapping[str, Any]:
    """The harness reads BoolQ from SuperGLUE, where the answer is a label."""
    return {**example, "label": int(example["answer"])} if isinstance(example.get("answer"), bool) else example


def _outcome(task: PromptTask, example: Example, by_filter: Mapping[str, Mapping[str, Any]]) -> Outcome:
    if isinstance(task, ChoiceTask):
        [sample] = by_filter.values()
        values = tuple(float(value) for ((value, _),) in sample["resps"])
        best = max(range(len(values)), key=values.__getitem__)
        norm = bool(sample["acc_norm"]) if task.has_normalised_accuracy else None
        return Outcome(
            task.name,
            task.question_id(example),
            str(task.gold(example)),
            str(best),
            acc=bool(sample["acc"]),
            acc_norm=norm,
            log_likelihoods=values,
        )
    strict, flexible = by_filter["strict-match"], by_filter["flexible-extract"]
    return Outcome(
        task.name,
        task.question_id(example),
        task.gold(example),
        None if strict["filtered_resps"][0] == NOT_FOUND else strict["filtered_resps"][0],
        exact_match_strict=bool(strict["exact_match"]),
        exact_match_flexible=bool(flexible["exact_match"]),
        text=strict["resps"][0][0],
    )
