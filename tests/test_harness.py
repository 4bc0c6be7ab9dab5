"""Agreement with lm-evaluation-harness itself, example by example: the oracle of every prompt, number and verdict."""

from __future__ import annotations

import copy
import random
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import answer_task, prompt_task
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tune_sparse.config import Protocol
from tune_sparse.data.splits import Encoded, load_splits
from tune_sparse.data.synthetic import SYNTHETIC_TASKS
from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Example, PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError
from tune_sparse.evaluation import harness, scoring
from tune_sparse.evaluation.harness import TASK_FILES, check_harness, harness_outcomes, harness_samples
from tune_sparse.evaluation.outcomes import Outcome
from tune_sparse.evaluation.scoring import EvalSet, encode_test, few_shot_prefixes, score
from tune_sparse.models.architectures import TRAINED
from tune_sparse.models.checkpoints import load_model, load_tokenizer

lm_eval = pytest.importorskip("lm_eval")

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

PROTOCOL = Protocol(max_tokens=512, max_new_tokens=12, precision="float32", n_test=4, n_selection=4)
TOLERANCE = 1e-4
"""Between orders of summation in fp32, summed over a continuation: the bound of the issue."""


def loaded(folder: Path) -> Loaded:
    return load_model(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)


@pytest.fixture(autouse=True)
def no_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness lists the packages of the machine in each run, which takes a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def llama_loaded(llama: Path) -> Loaded:
    return loaded(llama)


@pytest.fixture(scope="module")
def mistral_loaded(mistral: Path) -> Loaded:
    return loaded(mistral)


def asked_by_the_harness(samples: Sequence[dict[str, Any]], count: int) -> list[list[tuple[str, str]]]:
    """(context, continuation) of each choice of each example; (prompt, "") where an answer is generated."""
    by_example = {sample["doc_id"]: sample["arguments"] for sample in samples}
    return [[(text, rest if isinstance(rest, str) else "") for text, rest in by_example[i]] for i in range(count)]


def asked_by_us(
    task: PromptTask, examples: Sequence[Example], shots: Sequence[Example], protocol: Protocol
) -> list[list[tuple[str, str]]]:
    prefixes = few_shot_prefixes(task, examples, shots, protocol.num_fewshot)
    pairs = [
        task.pairs(example) if isinstance(task, ChoiceTask) else [(task.training_pair(example)[0], "")]
        for example in examples
    ]
    return [[(prefix + text, rest) for text, rest in example] for example, prefix in zip(pairs, prefixes, strict=True)]


def verdict(outcome: Outcome) -> Outcome:
    """What must be the same to the letter. The harness shows answers before it has cleaned them."""
    shown = outcome.predicted if outcome.text is None else None
    return replace(outcome, predicted=shown, log_likelihoods=(), truncated=None, cut=None)


def assert_agreement(
    loaded: Loaded, name: str, data_dir: Path | None, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> tuple[Outcome, ...]:
    """Of prompts, continuations, log-likelihoods and verdicts; returns our outcomes."""
    task, splits = prompt_task(name), load_splits(TASKS[name], data_dir, protocol)
    examples, shots = splits.test, splits.shots
    samples = harness_samples(*loaded, task, examples, shots, protocol)
    assert asked_by_the_harness(samples, len(examples)) == asked_by_us(task, examples, shots, protocol)
    if isinstance(task, AnswerTask):
        assert {tuple(settings["until"]) for s in samples for _, settings in s["arguments"]} == {task.until}
    monkeypatch.setattr(harness, "harness_samples", lambda *_: samples)
    theirs = harness_outcomes(*loaded, task, examples, shots, protocol)
    ours = score(*loaded, [encode_test(loaded[1], task, examples, protocol, shots)], protocol).outcomes
    assert len(ours) == len(theirs) == len(examples) == protocol.n_test
    for our, their in zip(ours, theirs, strict=True):
        assert our.log_likelihoods == pytest.approx(their.log_likelihoods, abs=TOLERANCE)
        assert verdict(our) == verdict(their)
    return ours


@pytest.mark.parametrize("num_fewshot", [0, 2])
@pytest.mark.parametrize("name", TASK_FILES)
def test_real_examples_are_asked_and_judged_alike(
    name: str, num_fewshot: int, llama_loaded: Loaded, real_examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_agreement(llama_loaded, name, real_examples, replace(PROTOCOL, num_fewshot=num_fewshot), monkeypatch)


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "gsm8k"])
def test_real_examples_are_judged_alike_with_a_sliding_window(
    name: str, mistral_loaded: Loaded, real_examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_agreement(mistral_loaded, name, real_examples, replace(PROTOCOL, num_fewshot=1), monkeypatch)


def test_gsm8k_is_asked_with_its_own_number_of_shots(
    llama_loaded: Loaded, real_examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = replace(PROTOCOL, num_fewshot=TASKS["gsm8k"].num_fewshot, max_tokens=2048, n_test=2)
    assert_agreement(llama_loaded, "gsm8k", real_examples, protocol, monkeypatch)


@pytest.mark.parametrize(("model", "num_fewshot"), [("llama_loaded", 0), ("llama_loaded", 2), ("mistral_loaded", 2)])
@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_synthetic_examples_are_prompted_and_judged_alike(
    name: str, model: str, num_fewshot: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = replace(PROTOCOL, num_fewshot=num_fewshot, n_test=8)
    assert_agreement(request.getfixturevalue(model), name, None, protocol, monkeypatch)


@pytest.mark.parametrize("name", ["boolq", "hellaswag", "gsm8k"])
@pytest.mark.parametrize("architecture", TRAINED)
def test_every_class_is_scored_alike(
    architecture: str, name: str, architecture_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synthetic examples are short: the positions of GPT-2 and OPT end at 128."""
    protocol = replace(PROTOCOL, max_tokens=128)
    assert_agreement(loaded(architecture_folders[architecture]), name, None, protocol, monkeypatch)


@pytest.mark.parametrize(("name", "max_tokens"), [("boolq", 16), ("hellaswag", 14), ("gsm8k", 40)])
def test_prompts_beyond_the_context_are_cut_alike(
    name: str, max_tokens: int, llama_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = replace(PROTOCOL, num_fewshot=1, max_tokens=max_tokens)
    outcomes = assert_agreement(llama_loaded, name, None, protocol, monkeypatch)
    assert all(outcome.truncated for outcome in outcomes)


@pytest.mark.parametrize("name", ["hellaswag", "gsm8k"])
def test_a_tokenizer_that_begins_texts_with_a_token_is_heeded_alike(
    name: str, llama_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of LLaMA; the other side of padding must not matter."""
    model, plain = llama_loaded
    tokenizer = copy.deepcopy(plain)
    tokenizer.bos_token, tokenizer.padding_side = plain.convert_ids_to_tokens(1), "left"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 1)]
    )
    assert tokenizer("a")["input_ids"] == [1, *plain("a")["input_ids"]]
    begun = assert_agreement((model, tokenizer), name, None, PROTOCOL, monkeypatch)
    examples = load_splits(TASKS[name], None, PROTOCOL).test
    assert begun != score(model, plain, [encode_test(plain, TASKS[name], examples, PROTOCOL)], PROTOCOL).outcomes


def test_answers_end_alike_at_the_end_of_text(llama_loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end-of-text token is a word that the model writes in the middle of an answer."""
    model, plain = llama_loaded
    examples = load_splits(TASKS["gsm8k"], None, PROTOCOL).test
    wholes = score(model, plain, [encode_test(plain, TASKS["gsm8k"], examples, PROTOCOL)], PROTOCOL).outcomes
    ids = [token for outcome in wholes for token in plain(outcome.text)["input_ids"][2:]]
    tokenizer = copy.deepcopy(plain)
    tokenizer.eos_token = plain.convert_ids_to_tokens(next(i for i in ids if len(plain.decode(i)) > 4))
    ended = assert_agreement((model, tokenizer), "gsm8k", None, PROTOCOL, monkeypatch)
    lengths = [(len(whole.text or ""), len(end.text or "")) for whole, end in zip(wholes, ended, strict=True)]
    assert any(0 < end < whole for whole, end in lengths)


# Verdicts on answers and numbers that a tiny model would never give.

NUMBERS = ["18", "1200", "-7", "3.5", "70000"]
TEXTS = [
    " 9 * 2 = 18.\n#### 18",
    "#### 18.",
    "#### 18 \n#### 19",
    "####18",
    "#### $18",
    "#### 1,200",
    "#### 1,200.",
    "#### 1,2,00",
    "#### 1200.00",
    "It is $1,200.",
    "1200 - 7",
    "#### -7",
    "#### - 7",
    "minus -7.",
    "10-7",
    "#### 3.5",
    "#### 3.50",
    "$3.5",
    "#### .5",
    "#### 70000 eggs",
    "70,000 in all, or 70.000",
    "#### ,",
    "#### -",
    "$",
    "$.,",
    "....",
    "no number",
    "",
    " ",
    "٣",
]


def test_answers_are_read_and_compared_alike(llama_loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text as the answer to a question with every number."""
    from lm_eval.models.huggingface import HFLM

    task = answer_task("gsm8k")
    cases = [(number, text) for number in NUMBERS for text in TEXTS]
    examples = [{"question": f"{i}?", "answer": f"so\n#### {number}"} for i, (number, _) in enumerate(cases)]
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [cases[r.doc_id][1] for r in requests])
    theirs = harness_outcomes(*llama_loaded, task, examples, (), PROTOCOL)
    strict = [task.extractors["exact_match_strict"](text) for _, text in cases]
    assert [o.exact_match_strict for o in theirs] == [
        found is not None and task.equal(found, number) for found, (number, _) in zip(strict, cases, strict=True)
    ]
    flexible = [task.extractors["exact_match_flexible"](text) for _, text in cases]
    assert [o.exact_match_flexible for o in theirs] == [
        found is not None and task.equal(found, number) for found, (number, _) in zip(flexible, cases, strict=True)
    ]
    assert 5 < sum(bool(o.exact_match_strict) for o in theirs) < sum(bool(o.exact_match_flexible) for o in theirs)
    assert [o.gold for o in theirs] == [number for number, _ in cases]
    assert [o.text for o in theirs] == [text for _, text in cases]
    assert [o.predicted is None for o in theirs] == [found is None for found in strict]


@pytest.mark.parametrize("name", ["boolq", "hellaswag"])
def test_numbers_are_judged_alike(name: str, llama_loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-likelihoods of few values, so that there are ties, with and without the lengths."""
    from lm_eval.models.huggingface import HFLM

    protocol = replace(PROTOCOL, n_test=100)
    task, examples = prompt_task(name), load_splits(TASKS[name], None, protocol).test
    tests = encode_test(llama_loaded[1], task, examples, protocol)
    rng = random.Random(name)
    values = [[-float(rng.randrange(15, 18)) for _ in example.encoded] for example in tests.examples]
    monkeypatch.setattr(
        HFLM, "loglikelihood", lambda self, requests, **_: [(values[r.doc_id][r.idx], False) for r in requests]
    )
    theirs = harness_outcomes(*llama_loaded, task, examples, (), protocol)
    monkeypatch.setattr(scoring, "log_likelihoods", known(tests, values))
    ours = score(*llama_loaded, [tests], protocol).outcomes
    assert [replace(our, truncated=None) for our in ours] == theirs
    assert len({(o.acc, o.acc_norm) for o in ours}) == (4 if name == "hellaswag" else 2)


def known(tests: EvalSet, values: Sequence[Sequence[float]]) -> Any:
    by_question = {example.encoded: own for example, own in zip(tests.examples, values, strict=True)}

    def log_likelihoods(model: Any, questions: Sequence[tuple[Encoded, ...]], limit: int) -> list[Sequence[float]]:
        return [by_question[question] for question in questions]

    return log_likelihoods


# What the two say of a task without any example.


@pytest.mark.parametrize("name", TASK_FILES)
def test_shots_and_normalised_accuracy_are_those_of_the_task_file(name: str) -> None:
    folder = Path(lm_eval.__file__).parent / "tasks"
    text = (folder / TASK_FILES[name]).read_text()
    if include := re.search(r"^include: (\S+)", text, re.MULTILINE):
        text += (folder / TASK_FILES[name]).with_name(include[1]).read_text()
    task, shots = prompt_task(name), re.search(r"^num_fewshot: (\d+)", text, re.MULTILINE)
    assert task.num_fewshot == (int(shots[1]) if shots else 0)
    if isinstance(task, ChoiceTask):
        assert task.has_normalised_accuracy == ("metric: acc_norm" in text)


def test_the_harness_has_every_task_but_those_it_lacks() -> None:
    assert TASKS.keys() - TASK_FILES.keys() == {"mawps", "svamp", "wikitext2", "tinyshakespeare"}
    assert TASK_FILES.keys() < TASKS.keys()
    for name in TASK_FILES:
        check_harness(TASKS[name])


@pytest.mark.parametrize("name", sorted(TASKS.keys() - TASK_FILES.keys()))
def test_a_task_that_the_harness_lacks_is_refused_by_name(name: str) -> None:
    message = rf"the harness has boolq, hellaswag, .*, got '{name}'\. Leave out --evaluator for this task\."
    with pytest.raises(InputError, match=message):
        check_harness(TASKS[name])


def test_without_the_harness_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r'not installed\. Run `pip install "tune-sparse\[harness\]"`\.'):
        check_harness(TASKS["boolq"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_was(fails: bool, llama_loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness generates up to what the model's settings call the end of a text."""
    model, tokenizer = llama_loaded
    seen = []

    def evaluated(*given: Any, **named: Any) -> dict[str, Any]:
        seen.append(model.generation_config.eos_token_id)
        if fails:
            raise RuntimeError("the harness broke")
        return {"samples": {"boolq": []}}

    monkeypatch.setattr(model.generation_config, "eos_token_id", 17)
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluated)
    examples = load_splits(TASKS["boolq"], None, PROTOCOL).test
    with pytest.raises(RuntimeError, match="broke") if fails else nullcontext():
        harness_samples(model, tokenizer, prompt_task("boolq"), examples, (), PROTOCOL)
    assert seen == [tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == 17
