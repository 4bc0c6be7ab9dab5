from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from factories import answer_task, prompt_task

from tune_sparse.data.task_types import METRICS, AnswerTask, ChoiceTask, PromptTask, Task, TextTask
from tune_sparse.data.tasks import EXAMPLE, TASKS, chosen_metrics, mean_chance, task_named, tasks_named
from tune_sparse.errors import InputError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
CHOICES = {"text": ["ice", "fire", "mud", "air"], "label": ["A", "B", "C", "D"]}

# One small example a task, with the (context, continuation) pairs and the gold answer written out by hand.
GOLDEN: dict[str, tuple[dict[str, Any], list[tuple[str, str]], Any]] = {
    "boolq": (
        {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True},
        [
            ("Ice is frozen water.\nQuestion: is ice cold?\nAnswer:", " no"),
            ("Ice is frozen water.\nQuestion: is ice cold?\nAnswer:", " yes"),
        ],
        1,
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A cook [header] stirs. [title] Then",
            "ctx_b": "he [step] TURNS",
            "endings": ["stops.", " eats  bread. [substeps]", "[x] runs", "a [title] b"],
            "label": "3",
        },
        [
            ("Baking: A cook stirs.. Then He turns", " stops."),
            ("Baking: A cook stirs.. Then He turns", " eats bread. "),
            ("Baking: A cook stirs.. Then He turns", "  runs"),
            ("Baking: A cook stirs.. Then He turns", " a. b"),
        ],
        3,
    ),
    "gsm8k": (
        {"question": "What is 600 times 2?", "answer": "600 * 2 = <<600*2=1200>>1200.\n#### 1,200"},
        [("Question: What is 600 times 2?\nAnswer:", " 600 * 2 = <<600*2=1200>>1200.\n#### 1,200")],
        "1200",
    ),
    "mawps": (
        {"original_text": "Half of 5 ?", "ans": 2.5},
        [(ALPACA + "Half of 5 ?\n\n### Response:", " 2.5")],
        "2.5",
    ),
    "svamp": (
        {"Body": "Dan has 3 pens.", "Question": "How many pens?", "Answer": "3.0"},
        [(ALPACA + "Dan has 3 pens. How many pens?\n\n### Response:", " 3")],
        "3",
    ),
    "piqa": (
        {"goal": "cool water", "sol1": "heat it", "sol2": "add ice", "label": 1},
        [("Question: cool water\nAnswer:", " heat it"), ("Question: cool water\nAnswer:", " add ice")],
        1,
    ),
    "winogrande": (
        {"sentence": "Ann beat Bea as _ was fast.", "option1": "Ann", "option2": "Bea", "answer": "1"},
        [("Ann beat Bea as Ann", " was fast."), ("Ann beat Bea as Bea", " was fast.")],
        0,
    ),
    "openbookqa": (
        {"question_stem": "Snow is made of", "choices": CHOICES, "answerKey": "A"},
        [("Snow is made of", f" {text}") for text in ("ice", "fire", "mud", "air")],
        0,
    ),
    "arc_easy": (
        {"question": "What burns?", "choices": CHOICES, "answerKey": "B"},
        [("Question: What burns?\nAnswer:", f" {text}") for text in ("ice", "fire", "mud", "air")],
        1,
    ),
    "arc_challenge": (
        {"question": "What is wet?", "choices": CHOICES | {"label": ["1", "2", "3", "4"]}, "answerKey": "3"},
        [("Question: What is wet?\nAnswer:", f" {text}") for text in ("ice", "fire", "mud", "air")],
        2,
    ),
}

PROMPT_TASKS = [name for name, task in TASKS.items() if isinstance(task, PromptTask)]
CHOICE_TASKS = [name for name, task in TASKS.items() if isinstance(task, ChoiceTask)]
ANSWER_TASKS = [name for name, task in TASKS.items() if isinstance(task, AnswerTask)]
TEXT_TASKS = [name for name, task in TASKS.items() if isinstance(task, TextTask)]


def read_example(name: str) -> dict[str, Any]:
    return dict(GOLDEN[name][0]) if name in GOLDEN else {"text": "A word after a word."}


def make_pairs(task: Task, example: dict[str, Any]) -> list[tuple[str, str]]:
    if isinstance(task, ChoiceTask):
        return task.pairs(example)
    assert isinstance(task, AnswerTask)
    return [task.pair(example)]


@pytest.mark.parametrize("name", PROMPT_TASKS)
def test_the_prompt_and_the_answer_are_those_written_by_hand(name: str) -> None:
    example, pairs, gold = GOLDEN[name]
    task = prompt_task(name)
    assert make_pairs(task, example) == pairs
    assert task.gold(example) == gold
    task.check(example)


def test_every_task_is_of_one_kind_and_every_prompt_is_golden() -> None:
    assert set(GOLDEN) == set(PROMPT_TASKS) == {*CHOICE_TASKS, *ANSWER_TASKS}
    assert (len(CHOICE_TASKS), len(ANSWER_TASKS), len(TEXT_TASKS)) == (7, 3, 2)
    assert len(TASKS) == 12


@pytest.mark.parametrize("name", TASKS)
def test_a_task_keeps_its_contract(name: str) -> None:
    task, example = TASKS[name], read_example(name)
    assert task.name == name
    assert task.test_split in ("validation", "test")
    assert task.prompt_version >= 1
    assert task.num_fewshot >= 0
    assert task.fields.keys() <= example.keys()
    assert task.hub is None or task.hub.path.count("/") == 1
    task.check(example)


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_a_choice_task_keeps_its_contract(name: str) -> None:
    """The space that divides context and continuation belongs to the continuation."""
    task, example = TASKS[name], read_example(name)
    assert isinstance(task, ChoiceTask)
    pairs, gold = task.pairs(example), task.gold(example)
    assert task.chance == pytest.approx(1 / len(pairs))
    assert task.training_pair(example) == pairs[gold]
    assert len(set(pairs)) == len(pairs)
    assert task.question(example) == tuple(context + rest for context, rest in pairs)
    assert all(rest.startswith(" ") and not context.endswith(" ") for context, rest in pairs)
    assert task.yes is None or 0 <= task.yes < len(pairs) == 2


@pytest.mark.parametrize("name", ANSWER_TASKS)
def test_an_answer_task_keeps_its_contract(name: str) -> None:
    task, example = answer_task(name), read_example(name)
    prompt, answer = task.training_pair(example)
    assert task.chance == 0
    assert task.until
    assert task.question(example) == (prompt,)
    assert answer.startswith(" ")
    for extract in task.extractors.values():
        found = extract(answer)
        assert found is not None
        assert task.equal(found, task.gold(example))
        assert extract("") is None


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_text_task_keeps_its_contract(name: str) -> None:
    task = TASKS[name]
    assert isinstance(task, TextTask)
    assert task.chance is None
    assert set(task.files) == {"train", "validation", "test"}
    if len(set(task.files.values())) == 1:
        limits = [task.parts[split] for split in ("train", "validation", "test")]
        assert limits[0][0] == 0
        assert limits[-1][1] == 1
        assert [last for _, last in limits[:-1]] == [first for first, _ in limits[1:]], "or lines are lost or shared"
    else:
        assert not task.parts
        assert len(set(task.files.values())) == 3


def test_only_boolq_has_a_positive_answer() -> None:
    """F1 is of yes, the second choice."""
    positive = {name: task.yes for name, task in TASKS.items() if isinstance(task, ChoiceTask) and task.yes is not None}
    assert positive == {"boolq": 1}
    assert make_pairs(TASKS["boolq"], read_example("boolq"))[1][1] == " yes"


def test_the_text_of_wikitext_is_joined_as_in_the_pruning_literature() -> None:
    """Blank lines are empty examples: "\n\n".join(examples["text"]), as in GPTQ, SparseGPT and Wanda."""
    task = TASKS["wikitext2"]
    assert isinstance(task, TextTask)
    lines = [" \n", " = Title = \n", " \n", " A line . \n", " Another . \n"]
    assert task.joined(lines) == "\n\n = Title = \n\n\n\n\n A line . \n\n\n Another . \n"


def test_the_text_of_tinyshakespeare_is_the_file() -> None:
    task = TASKS["tinyshakespeare"]
    assert isinstance(task, TextTask)
    assert task.joined(["First Citizen:\n", "\n", "Speak"]) == "First Citizen:\n\nSpeak"


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, task in TASKS.items() for field in task.fields])
def test_a_missing_field_and_a_wrong_type_are_refused_by_name(name: str, field: str) -> None:
    example = read_example(name)
    wrong: Any = example | {field: None}
    with pytest.raises(InputError, match=f"the field '{field}' of {name} must be .+, got None"):
        TASKS[name].check(wrong)
    del example[field]
    with pytest.raises(
        InputError, match=f"an example of {name} needs the field '{field}', got {next(iter(example), 'no field')}"
    ):
        TASKS[name].check(example)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("boolq", {"answer": 1}, "the field 'answer' of boolq must be bool, got 1"),
        ("piqa", {"label": True}, "the field 'label' of piqa must be int, got True"),
        ("piqa", {"label": 2}, "the label of piqa must be one of its 2 choices, got 2"),
        ("piqa", {"label": -1}, "the label of piqa must be one of its 2 choices, got -1"),
        ("hellaswag", {"label": "4"}, "the label of hellaswag must be one of its 4 choices, got 4"),
        ("hellaswag", {"label": ""}, "an example of hellaswag has a label or choices that cannot be read"),
        ("hellaswag", {"endings": []}, "the label of hellaswag must be one of its 0 choices"),
        ("hellaswag", {"endings": [1, 2, 3, 4]}, "an example of hellaswag has a label or choices that cannot be read"),
        ("winogrande", {"answer": "3"}, "the label of winogrande must be one of its 2 choices, got 2"),
        ("winogrande", {"answer": ""}, "an example of winogrande has a label or choices that cannot be read"),
        ("winogrande", {"sentence": "no gap"}, "an example of winogrande has a label or choices that cannot be read"),
        ("arc_easy", {"answerKey": "E"}, "an example of arc_easy has a label or choices that cannot be read"),
        ("arc_easy", {"choices": {"text": ["a"]}}, "an example of arc_easy has a label or choices that cannot be read"),
        (
            "openbookqa",
            {"choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "B"},
            "the label of openbookqa must be one of its 1 choices, got 1",
        ),
        ("hellaswag", {"endings": ["a", "[x]", "c", "d"]}, "a choice of hellaswag must have a question and a text"),
        ("piqa", {"sol2": " "}, "a choice of piqa must have a question and a text, choice 1"),
        ("openbookqa", {"question_stem": ""}, "a choice of openbookqa must have a question and a text, choice 0"),
        ("winogrande", {"sentence": "Ann beat Bea as _"}, "a choice of winogrande must have a question and a text"),
        ("gsm8k", {"answer": "It is 4."}, "an example of gsm8k has a label or choices that cannot be read"),
        ("svamp", {"Answer": "four"}, "an example of svamp has a label or choices that cannot be read"),
        ("svamp", {"Answer": "nan"}, "an example of svamp"),
        ("mawps", {"ans": float("nan")}, "an example of mawps"),
    ],
)
def test_a_label_out_of_range_or_unreadable_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TASKS[name].check(read_example(name) | change)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is 1,234.\n#### 1,234.", "1234"),
        ("#### -7", "-7"),
        ("#### 3.50", "3.50"),
        ("#### 5\n#### 6", "5"),
        ("#### $5", None),
        ("The answer is 5.", None),
        ("####5", None),
        ("", None),
    ],
)
def test_gsm8k_reads_the_number_after_the_mark(text: str, answer: str | None) -> None:
    assert answer_task("gsm8k").extractors["exact_match_strict"](text) == answer


def test_gsm8k_compares_texts_without_separators_and_full_stop() -> None:
    task = answer_task("gsm8k")
    gold = task.gold({"question": "", "answer": "#### 1,234"})
    found = task.extractors["exact_match_strict"]("#### 1234.")
    assert found is not None
    assert task.equal(found, gold)
    assert not task.equal("1235", gold)


@pytest.mark.parametrize("name", ["mawps", "svamp"])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("8 - 3 = 5", "5"),
        ("It is -2.5.", "-2.5"),
        ("1,234 in all", "1234"),
        ("7.", "7."),
        ("no number", None),
        ("", None),
    ],
)
def test_word_problems_read_the_last_number(name: str, text: str, answer: str | None) -> None:
    assert answer_task(name).extractors["exact_match_flexible"](text) == answer


@pytest.mark.parametrize("name", ["mawps", "svamp"])
def test_word_problems_agree_within_a_thousandth(name: str) -> None:
    equal = answer_task(name).equal
    assert equal("2.5009", "2.5")
    assert equal("7.", "7")
    assert not equal("2.5011", "2.5")
    assert not equal("-2.5", "2.5")


@pytest.mark.parametrize(
    ("value", "text"), [(1236666.67, "1236666.67"), (2400000.0, "2400000"), (14760.87, "14760.87")]
)
def test_a_long_number_keeps_its_digits(value: float, text: str) -> None:
    for name, example in (
        ("mawps", {"original_text": "?", "ans": value}),
        ("svamp", {"Body": "", "Question": "?", "Answer": str(value)}),
    ):
        task = answer_task(name)
        assert task.gold(example) == text
        found = task.extractors["exact_match_flexible"](task.training_pair(example)[1])
        assert found is not None
        assert task.equal(found, text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 5 and then $1,234.50.", "1234.50"),
        ("#### 7\nQuestion", "7"),
        ("-3", "-3"),
        ("4 - 3", "3"),
        ("3-4", "-4"),
        ("it costs $", None),
        ("...", ".."),
        ("no number", None),
        ("", None),
    ],
)
def test_gsm8k_reads_the_last_number_where_it_is_lenient(text: str, answer: str | None) -> None:
    """tests/test_harness.py compares both readings with the harness's own on harder texts."""
    assert answer_task("gsm8k").extractors["exact_match_flexible"](text) == answer


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_judged_by_one_of_its_metrics_for_a_reason(name: str) -> None:
    task = TASKS[name]
    assert task.primary_metric in task.metrics
    assert set(task.metrics) <= set(METRICS)
    assert len(task.why_primary) > 20


def test_primary_metrics_are_chosen_by_task() -> None:
    assert chosen_metrics([]) == {}
    assert chosen_metrics([EXAMPLE, "gsm8k=exact_match_flexible", EXAMPLE]) == {
        "hellaswag": "acc",
        "gsm8k": "exact_match_flexible",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["helaswag=acc"], "unknown task 'helaswag'.*hellaswag"),
        (["hellaswag=acc_nrm"], "unknown metric of hellaswag 'acc_nrm'.*acc_norm"),
        (["winogrande=acc_norm"], "unknown metric of winogrande 'acc_norm'.*acc"),
        (["hellaswag"], "is given as TASK=METRIC, got 'hellaswag'"),
        (["hellaswag=acc", "hellaswag=acc_norm"], "hellaswag got acc and acc_norm"),
    ],
)
def test_a_wrong_choice_of_a_primary_metric_is_named(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen_metrics(texts)


@pytest.mark.parametrize("name", PROMPT_TASKS)
def test_all_real_examples_pass_and_their_own_answers_are_right(name: str, real_examples: Path) -> None:
    task, seen = prompt_task(name), {}
    for path in sorted((real_examples / name).glob("*.jsonl")):
        seen[path.stem] = 0
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            example = json.loads(line)
            task.check(example)
            if isinstance(task, AnswerTask):
                for extract in task.extractors.values():
                    found = extract(task.training_pair(example)[1])
                    assert found is not None, example
                    assert task.equal(found, task.gold(example)), example
            seen[path.stem] += 1
    assert seen.pop("train") == seen.pop(task.test_split) == 20
    assert seen in ({}, {"validation": 8})


@pytest.mark.parametrize("name", PROMPT_TASKS)
def test_real_examples_have_ids_of_their_own(name: str, real_examples: Path) -> None:
    task = prompt_task(name)
    path = real_examples / name / f"{task.test_split}.jsonl"
    examples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len({task.question_id(example) for example in examples}) == len(examples)


def test_a_task_is_found_by_name() -> None:
    assert task_named("boolq") is TASKS["boolq"]
    with pytest.raises(InputError, match=r"unknown task 'bolq'\. Did you mean 'boolq'\?"):
        task_named("bolq")


def test_a_mixture_is_named_by_its_tasks_in_order() -> None:
    assert tasks_named("boolq") == (TASKS["boolq"],)
    assert tasks_named("wikitext2") == (TASKS["wikitext2"],)
    assert tasks_named("gsm8k+mawps+svamp") == tuple(TASKS[name] for name in ("gsm8k", "mawps", "svamp"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("gsm8k+bolq", r"unknown task 'bolq'\. Did you mean 'boolq'\?"),
        ("gsm8k+", "unknown task ''"),
        ("", "unknown task ''"),
        ("gsm8k + mawps", "unknown task 'gsm8k '"),
        ("gsm8k+mawps+gsm8k", r"a mixture names each task once, got 'gsm8k\+mawps\+gsm8k'\. Remove the repeats\."),
        ("gsm8k+wikitext2", r"a mixture is of tasks with answers, got the text 'wikitext2'\. Ask for it alone\."),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(names: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tasks_named(names)


@pytest.mark.parametrize(
    ("names", "chance"),
    [("boolq", 0.5), ("gsm8k", 0.0), ("boolq+hellaswag", 0.375), ("gsm8k+mawps+svamp", 0.0), ("wikitext2", None)],
)
def test_the_chance_of_a_mixture_is_that_of_its_tasks_alike(names: str, chance: float | None) -> None:
    assert mean_chance(tasks_named(names)) == chance
