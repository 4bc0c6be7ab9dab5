from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tune_sparse.config import Protocol
from tune_sparse.data import synthetic
from tune_sparse.data.splits import load_splits
from tune_sparse.data.synthetic import SYNTHETIC_TASKS, synthetic_examples
from tune_sparse.data.task_types import ChoiceTask, Example, PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError
from tune_sparse.models import toy_models
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.toy_models import TOY_MODELS, toy_model, toy_tokenizer, train_toy_models

SPLITS = [(name, split) for name in SYNTHETIC_TASKS for split in ("base", "train", TASKS[name].test_split)]


def prompt_task(name: str) -> PromptTask:
    task = TASKS[name]
    assert isinstance(task, PromptTask)
    return task


def make_prompt(name: str, example: Example) -> str:
    return prompt_task(name).training_pair(example)[0]


def list_splits(task_name: str) -> list[str]:
    return [split for name, split in SPLITS if name == task_name]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return toy_tokenizer()


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_examples_have_the_schema_and_the_size(name: str, split: str) -> None:
    examples = synthetic_examples(name, split)
    assert len(examples) == {"base": 6000, "train": 2200}.get(split, 400)
    for example in examples:
        TASKS[name].check(example)


def test_hellaswag_examples_have_every_field_of_the_original() -> None:
    for example in synthetic_examples("hellaswag", "validation"):
        assert list(example) == [
            *("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings"),
            *("source_id", "split", "split_type", "label"),
        ]
        assert example["ctx"] == f"{example['ctx_a']} {example['ctx_b']}"
        assert len(set(example["endings"])) == 4


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_no_prompt_is_repeated_within_or_across_splits(name: str) -> None:
    prompts = [make_prompt(name, example) for split in list_splits(name) for example in synthetic_examples(name, split)]
    assert len(set(prompts)) == len(prompts) == 8600


def facts_asked(name: str, text: str) -> tuple[str, ...]:
    """What carries the answer, read back from the prompt: without names of people, goods and asked attributes."""
    words = text.replace(".", "").replace("Question: ", "").split()
    if name == "boolq":
        return tuple(text.split("\n")[0].split())
    if name == "hellaswag":
        return (words[0], *words[2:6], "before" if "Before" in words else "then")
    signs = {verb: sign for sign, verbs in synthetic.CHANGES.items() for verb in verbs}
    return tuple(signs.get(word, word) for word in words if word in signs or word.isdigit())


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_no_two_splits_share_what_carries_the_answer(name: str) -> None:
    facts = [
        {facts_asked(name, make_prompt(name, example)) for example in synthetic_examples(name, split)}
        for split in list_splits(name)
    ]
    assert all(len(f) > 200 for f in facts)
    assert sum(map(len, facts)) == len(set.union(*facts))


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_examples_load_as_splits_of_the_study(name: str) -> None:
    splits = load_splits(TASKS[name], None, Protocol(n_train=2000, n_selection=64, n_test=200))
    assert [len(examples) for examples in (splits.train, splits.selection, splits.test)] == [2000, 64, 200]


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_gold_labels_are_balanced(name: str, split: str) -> None:
    task = prompt_task(name)
    counts = Counter(task.gold(example) for example in synthetic_examples(name, split))
    if isinstance(task, ChoiceTask):
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(counts) == round(1 / task.chance)
    else:
        assert max(counts.values()) < 0.1 * counts.total()


@pytest.mark.parametrize("name", ["boolq", "hellaswag"])
def test_answers_cannot_be_guessed_without_the_context(name: str) -> None:
    """A guesser that knows how often each answer was right in train stays near chance."""
    seen: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for example in synthetic_examples(name, "train"):
        for number, key in enumerate(blind_keys(name, example)):
            seen[key] += 1
            right[key] += number == prompt_task(name).gold(example)
    examples = synthetic_examples(name, "validation")
    hits = 0
    for example in examples:
        rates = [right[key] / seen[key] for key in blind_keys(name, example)]
        hits += rates.index(max(rates)) == prompt_task(name).gold(example)
    assert abs(hits / len(examples) - prompt_task(name).chance) < 0.1


def blind_keys(name: str, example: Example) -> list[str]:
    """The choices as seen without the context."""
    if name == "boolq":
        return [f"{example['question'].split()[-1]} {answer}" for answer in ("no", "yes")]
    return [ending.split()[0] for ending in example["endings"]]


def test_boolq_answers_follow_from_the_passage() -> None:
    for example in synthetic_examples("boolq", "validation"):
        animal, value = example["question"].split()[2], example["question"].split()[-1]
        words = example["passage"].replace(".", "").split()
        assert animal in words
        assert (value in words) == example["answer"]


def test_hellaswag_gold_ending_is_the_neighbor_in_the_order_of_steps() -> None:
    for example in synthetic_examples("hellaswag", "validation"):
        order = list(synthetic.ACTIVITIES[example["activity_label"]])
        words = example["ctx_a"].rstrip(".").split()
        if example["ctx_b"].startswith("before"):
            order.reverse()
        due = order[order.index(words[1]) + 1]
        assert example["endings"][int(example["label"])] == f"{due} the {words[-1]}."
        assert sum(ending.startswith(due) for ending in example["endings"]) == 1


def test_gsm8k_answers_are_right_by_the_words_of_the_question() -> None:
    gains = {"buys", "finds", "gets", "picks"}
    for example in synthetic_examples("gsm8k", "test"):
        words = example["question"].replace(".", "").split()
        start, first, second = (number for number, word in enumerate(words) if word.isdigit())
        value = int(words[start])
        lines = []
        for at in (first, second):
            change = int(words[at]) if words[at - 1] in gains else -int(words[at])
            lines.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {value + change}.")
            value += change
        assert example["answer"] == "\n".join([*lines, f"#### {value}"])
        assert prompt_task("gsm8k").gold(example) == str(value)


def test_examples_are_the_same_on_every_machine() -> None:
    """Where this fails on purpose, raise GENERATOR_VERSION and write the new hash here."""
    examples = [synthetic_examples(name, split) for name, split in SPLITS]
    digest = hashlib.sha256(json.dumps([examples, synthetic.open_questions()]).encode()).hexdigest()
    assert (synthetic.GENERATOR_VERSION, digest[:16]) == (1, "4a8edd9649279b70")


def test_examples_are_fresh_and_a_caller_may_change_them() -> None:
    first = synthetic_examples("hellaswag", "train")
    first[0]["endings"][0] = "changed"
    first.pop()
    assert len(synthetic_examples("hellaswag", "train")) == 2200
    assert synthetic_examples("hellaswag", "train")[0]["endings"][0] != "changed"


def test_unknown_names_are_refused_with_the_closest() -> None:
    with pytest.raises(InputError, match=r"unknown split of boolq 'tran'\. Did you mean 'train'"):
        synthetic_examples("boolq", "tran")
    with pytest.raises(InputError, match=r"unknown split of gsm8k 'validation'.*Known: base, test, train"):
        synthetic_examples("gsm8k", "validation")
    with pytest.raises(InputError, match=r"unknown synthetic task 'piqa'"):
        synthetic_examples("piqa", "train")
    with pytest.raises(InputError, match=r"unknown toy model 'tiny-lama'\. Did you mean 'tiny-llama'"):
        toy_model("tiny-lama")


@pytest.mark.parametrize(
    "text",
    ["The red cow eats hay.", " two  spaces , and\n\n\ttabs ", "naïve Straße 東京 🦙🏽 \u200d \x00", "don 't  ."],
)
def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_adds_no_tokens_and_ends_with_its_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert 256 < len(tokenizer) <= 768


@pytest.mark.parametrize(("name", "most"), [("boolq", 30), ("hellaswag", 30), ("gsm8k", 45)])
def test_examples_are_short_in_tokens(tokenizer: PreTrainedTokenizerBase, name: str, most: int) -> None:
    texts = [
        "".join(prompt_task(name).training_pair(example))
        for example in synthetic_examples(name, TASKS[name].test_split)
    ]
    assert max(map(len, tokenizer(texts)["input_ids"])) <= most


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding all base texts takes seconds."""
    pairs = {name: examples[:100] for name, examples in toy_models._base_pairs().items()}
    monkeypatch.setattr(toy_models, "_base_pairs", lambda: pairs)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("name", TOY_MODELS)
def test_a_checkpoint_repeats_and_loads_as_its_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    for part in ("first", "second"):
        monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path / part))
        torch.manual_seed(len(folders))
        expected = torch.random.get_rng_state()
        folders.append(toy_model(name, steps=2))
        assert torch.equal(torch.random.get_rng_state(), expected), "training must leave the caller's seed alone"
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert folders[0].name == folders[1].name

    model = AutoModelForCausalLM.from_pretrained(folders[0])
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert type(model) is toy_models.CLASSES[name.removeprefix("tiny-")][1]
    assert getattr(model.config, "sliding_window", None) == (32 if name == "tiny-mistral" else None)
    assert model.config.num_attention_heads == 8
    assert ModelDims.from_config(model.config).num_kv_heads == (4 if name in TOY_MODELS[:2] else 8)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.config.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer(" naïve  東京 .")["input_ids"]) == " naïve  東京 ."


@pytest.mark.usefixtures("few_pairs")
def test_a_model_is_trained_once_and_nothing_is_left_beside_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    folder = toy_model("tiny-llama", lines.append, steps=1)
    assert [line.split(":")[0] for line in lines] == ["tiny-llama", "tiny-llama"]
    assert list((cache / "models").iterdir()) == [folder]
    monkeypatch.setattr(toy_models, "_trained", None)
    assert toy_model("tiny-llama", steps=1) == folder
    assert train_toy_models(["tiny-llama"], steps=1) == [folder]


@pytest.mark.usefixtures("few_pairs")
def test_a_killed_save_leaves_no_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*args: object) -> None:
        raise Killed

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        toy_model("tiny-llama", steps=1)
    assert list((cache / "models").iterdir()) == []


@pytest.mark.usefixtures("few_pairs")
def test_of_two_trainings_at_once_the_first_saved_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = toy_models._trained

    def beaten(*args: object) -> object:
        monkeypatch.setattr(toy_models, "_trained", train)
        winner = toy_model("tiny-llama", steps=1)
        (winner / "winner").touch()
        return train(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(toy_models, "_trained", beaten)
    folder = toy_model("tiny-llama", steps=1)
    assert (folder / "winner").exists()
    assert list((cache / "models").iterdir()) == [folder]


@pytest.mark.slow
def test_missing_models_are_trained_side_by_side(cache: Path) -> None:
    lines: list[str] = []
    folders = train_toy_models(TOY_MODELS, lines.append, steps=1)
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == list(TOY_MODELS)
    assert all((folder / "model.safetensors").exists() for folder in folders)
    assert len(lines) == 1 + len(TOY_MODELS)


def test_a_changed_recipe_has_a_folder_of_its_own() -> None:
    recipes = [*toy_models.RECIPES.values(), toy_models._recipe("tiny-llama", 7)]
    assert len({recipe.hash8 for recipe in recipes}) == len(recipes)
