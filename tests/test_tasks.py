from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tune_sparse.errors import InputError
from tune_sparse.tasks import TASKS, task_named

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
CHOICES = {"text": ["ice", "fire", "mud", "air"], "label": ["A", "B", "C", "D"]}

# One small row a task, with the (context, continuation) pairs and the gold answer written out by hand.
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

REAL_ROWS = {
    "boolq": 2765,
    "hellaswag": 2582,
    "gsm8k": 8492,
    "mawps": 1903,
    "svamp": 800,
    "piqa": 3838,
    "winogrande": 3267,
    "openbookqa": 3000,
    "arc_easy": 4946,
    "arc_challenge": 2226,
}


def row_of(name: str) -> dict[str, Any]:
    return dict(GOLDEN[name][0])


@pytest.mark.parametrize("name", TASKS)
def test_the_prompt_and_the_answer_are_those_written_by_hand(name: str) -> None:
    row, pairs, gold = GOLDEN[name]
    assert TASKS[name].pairs(row) == pairs
    assert TASKS[name].gold(row) == gold
    TASKS[name].check(row)


def harness_pairs(name: str, row: dict[str, Any]) -> tuple[list[tuple[str, str]], Any]:
    """A choice row as lm-evaluation-harness 0.4.13 asks it, from the task's own YAML and functions."""
    from importlib import import_module

    import yaml
    from jinja2 import Template

    root = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    file = {
        "boolq": "super_glue/boolq/default.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml",
        "piqa": "piqa/piqa.yaml",
        "openbookqa": "openbookqa/openbookqa.yaml",
        "arc_easy": "arc/arc_easy.yaml",
        "arc_challenge": "arc/arc_easy.yaml",
    }
    if name == "winogrande":
        functions = import_module("lm_eval.tasks.winogrande.preprocess_winogrande")
        contexts, target = functions.doc_to_choice(row), functions.doc_to_target(row)
        return [(context, f" {target}") for context in contexts], functions.doc_to_text(row)
    text = (root / file[name]).read_text().replace("!function ", "")
    config = yaml.safe_load(text)
    if name == "hellaswag":
        clean = import_module("lm_eval.tasks.hellaswag.utils").preprocess
        context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return [(context, f" {clean(ending)}") for ending in row["endings"]], int(row["label"])
    asked = config["doc_to_text"]
    context = Template(asked, keep_trailing_newline=True).render(row) if "{{" in asked else row[asked]
    if name == "boolq":
        return [(context, f" {choice}") for choice in config["doc_to_choice"]], int(row["answer"])
    if name == "piqa":
        return [(context, f" {row[solution]}") for solution in ("sol1", "sol2")], row["label"]
    labels = row["choices"]["label"]
    return [(context, f" {text}") for text in row["choices"]["text"]], labels.index(row["answerKey"].lstrip())


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.kind == "choice"])
def test_real_rows_are_asked_as_the_harness_asks_them(name: str, shared_data: Path) -> None:
    file = shared_data / name / f"{TASKS[name].test_split}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:50]]
    assert len(rows) == 50
    for row in rows:
        assert (TASKS[name].pairs(row), TASKS[name].gold(row)) == harness_pairs(name, row)


def test_every_task_has_a_golden_prompt() -> None:
    assert set(GOLDEN) == set(TASKS)
    assert len(TASKS) == 10


@pytest.mark.parametrize("name", TASKS)
def test_a_task_keeps_its_contract(name: str) -> None:
    task, row = TASKS[name], row_of(name)
    pairs, gold = task.pairs(row), task.gold(row)
    assert task.name == name
    assert task.test_split in ("validation", "test")
    assert task.prompt_version >= 1
    assert task.fields.keys() <= row.keys()
    if task.kind == "choice":
        assert task.chance == pytest.approx(1 / len(pairs))
        assert task.training_pair(row) == pairs[gold]
        assert len(set(pairs)) == len(pairs)
    else:
        assert task.chance == 0
        assert task.until
        assert task.training_pair(row) == pairs[0]
        answer = task.extract(pairs[0][1])
        assert answer is not None
        assert task.equal(answer, gold)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, task in TASKS.items() for field in task.fields])
def test_a_missing_field_and_a_wrong_type_are_refused_by_name(name: str, field: str) -> None:
    row = row_of(name)
    wrong: Any = row | {field: None}
    with pytest.raises(InputError, match=f"the field '{field}' of {name} must be .+, got None"):
        TASKS[name].check(wrong)
    del row[field]
    with pytest.raises(InputError, match=f"a row of {name} needs the field '{field}', got {next(iter(row))}"):
        TASKS[name].check(row)


@pytest.mark.parametrize("value", [[], "text", 5, None])
def test_a_row_that_is_not_an_object_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="a row of boolq must be an object with question, passage, answer, got"):
        TASKS["boolq"].check(value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("boolq", {"answer": 1}, "the field 'answer' of boolq must be bool, got 1"),
        ("piqa", {"label": True}, "the field 'label' of piqa must be int, got True"),
        ("piqa", {"label": 2}, "the label of piqa must be one of its 2 choices, got 2"),
        ("piqa", {"label": -1}, "the label of piqa must be one of its 2 choices, got -1"),
        ("hellaswag", {"label": "4"}, "the label of hellaswag must be one of its 4 choices, got 4"),
        ("hellaswag", {"label": ""}, "a row of hellaswag has a label or choices that cannot be read"),
        ("hellaswag", {"endings": []}, "the label of hellaswag must be one of its 0 choices"),
        ("hellaswag", {"endings": [1, 2, 3, 4]}, "a row of hellaswag has a label or choices that cannot be read"),
        ("winogrande", {"answer": "3"}, "the label of winogrande must be one of its 2 choices, got 2"),
        ("winogrande", {"answer": ""}, "a row of winogrande has a label or choices that cannot be read"),
        ("winogrande", {"sentence": "no gap"}, "a row of winogrande has a label or choices that cannot be read"),
        ("arc_easy", {"answerKey": "E"}, "a row of arc_easy has a label or choices that cannot be read"),
        ("arc_easy", {"choices": {"text": ["a"]}}, "a row of arc_easy has a label or choices that cannot be read"),
        (
            "openbookqa",
            {"choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "B"},
            "the label of openbookqa must be one of its 1 choices, got 1",
        ),
        ("gsm8k", {"answer": "It is 4."}, "a row of gsm8k has a label or choices that cannot be read"),
        ("svamp", {"Answer": "four"}, "a row of svamp has a label or choices that cannot be read"),
        ("svamp", {"Answer": "nan"}, "a row of svamp"),
        ("mawps", {"ans": float("nan")}, "a row of mawps"),
    ],
)
def test_a_label_out_of_range_or_unreadable_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TASKS[name].check(row_of(name) | change)


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
    assert TASKS["gsm8k"].extract(text) == answer


def test_gsm8k_compares_texts_without_separators_and_full_stop() -> None:
    task = TASKS["gsm8k"]
    gold = task.gold({"question": "", "answer": "#### 1,234"})
    found = task.extract("#### 1234.")
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
    assert TASKS[name].extract(text) == answer


@pytest.mark.parametrize("name", ["mawps", "svamp"])
def test_word_problems_agree_within_a_thousandth(name: str) -> None:
    equal = TASKS[name].equal
    assert equal("2.5009", "2.5")
    assert equal("7.", "7")
    assert not equal("2.5011", "2.5")
    assert not equal("-2.5", "2.5")


@pytest.mark.parametrize(
    ("value", "text"), [(1236666.67, "1236666.67"), (2400000.0, "2400000"), (14760.87, "14760.87")]
)
def test_a_long_number_keeps_its_digits(value: float, text: str) -> None:
    for name, row in (
        ("mawps", {"original_text": "?", "ans": value}),
        ("svamp", {"Body": "", "Question": "?", "Answer": str(value)}),
    ):
        task = TASKS[name]
        assert task.gold(row) == text
        found = task.extract(task.training_pair(row)[1])
        assert found is not None
        assert task.equal(found, text)


@pytest.mark.parametrize("name", TASKS)
def test_all_real_rows_pass_and_their_own_answers_are_right(name: str, shared_data: Path) -> None:
    task, seen = TASKS[name], 0
    for path in sorted((shared_data / name).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            task.check(row)
            if task.kind == "generate":
                found = task.extract(task.training_pair(row)[1])
                assert found is not None, row
                assert task.equal(found, task.gold(row)), row
            seen += 1
    assert seen == REAL_ROWS[name]


def test_a_task_is_found_by_name() -> None:
    assert task_named("boolq") is TASKS["boolq"]
    with pytest.raises(InputError, match=r"unknown task 'bolq'\. Did you mean 'boolq'\?"):
        task_named("bolq")
