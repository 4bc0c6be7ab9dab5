"""Small synthetic tasks in the schema of BoolQ, HellaSwag and GSM8K, for a machine without data or network.

Each task is enumerated as puzzles: all that decides the right answer, without the words around it. The hash of a
puzzle assigns it to one split, so that a model cannot have met a test answer, however its sentence was phrased.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import Any

from tune_sparse.data.task_types import Example
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import unknown_name

GENERATOR_VERSION = 1
"""Raised with every change of the examples: the toy models are trained anew, runs on old examples stay apart."""

BASE_SHARE, TRAIN_SHARE = 0.5, 0.35
"""Fractions of the puzzles; the scored split has the rest."""

SPLIT_SIZES = {"base": 6000, "train": 2200, "scored": 400}

Puzzle = tuple[Any, ...]


@dataclass(frozen=True)
class Generator:
    """The generator of one task's examples. An example is drawn for each puzzle in turn, until there are enough."""

    puzzles: Callable[[], Iterator[Puzzle]]
    """Every puzzle, once, in a fixed order."""
    example: Callable[[Puzzle, random.Random, int], Example]
    """An example that asks the puzzle; the number counts the examples, to balance the gold labels."""
    prompt: Callable[[Example], Any]
    """The part that no two examples may have in common."""


def synthetic_examples(task_name: str, split: str) -> list[Example]:
    """Examples of a split: "base" (pool of the base training), "train", or the split that the task is scored on."""
    if task_name not in GENERATORS:
        raise unknown_name("synthetic task", task_name, GENERATORS)
    scored = TASKS[task_name].test_split
    if split not in ("base", "train", scored):
        raise unknown_name(f"split of {task_name}", split, ("base", "train", scored))
    return copy.deepcopy(_examples(task_name, "scored" if split == scored else split))


@cache
def _examples(task_name: str, kind: str) -> list[Example]:
    generator = GENERATORS[task_name]
    rng = random.Random(f"{task_name} {kind} {GENERATOR_VERSION}")
    puzzles = [p for p in generator.puzzles() if _assign_split(task_name, p) == kind]
    examples: dict[Any, Example] = {}
    while len(examples) < SPLIT_SIZES[kind]:
        rng.shuffle(puzzles)
        for puzzle in puzzles[: SPLIT_SIZES[kind] - len(examples)]:
            example = generator.example(puzzle, rng, len(examples))
            examples.setdefault(generator.prompt(example), example)
    shuffled = list(examples.values())
    rng.shuffle(shuffled)
    return shuffled


def _assign_split(task_name: str, puzzle: Puzzle) -> str:
    digest = hashlib.sha256(f"{task_name} {puzzle}".encode()).digest()
    position = int.from_bytes(digest[:4], "big") / 2**32
    return "base" if position < BASE_SHARE else "train" if position < BASE_SHARE + TRAIN_SHARE else "scored"


# Yes or no: what a sentence says of an animal.

ANIMALS = ("cow", "dog", "cat", "pig", "hen", "fox", "bear", "goat", "horse", "duck")
ATTRIBUTES = {
    "color": ("red", "blue", "green", "white", "black", "brown"),
    "place": ("barn", "field", "house", "river", "street", "garden"),
    "mood": ("happy", "sad", "angry", "calm", "shy", "brave"),
    "food": ("hay", "corn", "grass", "fish", "bread", "fruit"),
}
PASSAGES = {
    ("color", "place", "mood"): "The {color} {animal} is in the {place}. It is {mood}.",
    ("color", "place", "food"): "The {color} {animal} in the {place} eats {food}.",
    ("color", "mood", "food"): "The {color} {animal} is {mood} and eats {food}.",
    ("place", "mood", "food"): "The {animal} in the {place} is {mood} and eats {food}.",
}
QUESTIONS = {
    "color": "is the {animal} {value}",
    "place": "is the {animal} in the {value}",
    "mood": "is the {animal} {value}",
    "food": "does the {animal} eat {value}",
}
OPEN_QUESTIONS = {
    "color": "what color is the {animal}",
    "place": "where is the {animal}",
    "mood": "what mood is the {animal} in",
    "food": "what does the {animal} eat",
}


def _animal_puzzles() -> Iterator[Puzzle]:
    """(animal, its attributes in the passage, their values)"""
    for animal, shown in product(ANIMALS, PASSAGES):
        for values in product(*(ATTRIBUTES[name] for name in shown)):
            yield animal, shown, values


def _passage(puzzle: Puzzle) -> tuple[str, dict[str, str]]:
    animal, shown, values = puzzle
    facts = dict(zip(shown, values, strict=True))
    return PASSAGES[shown].format(animal=animal, **facts), facts


def _boolq_example(puzzle: Puzzle, rng: random.Random, number: int) -> Example:
    passage, facts = _passage(puzzle)
    name = rng.choice(list(facts))
    answer = number % 2 == 0
    value = facts[name] if answer else rng.choice([v for v in ATTRIBUTES[name] if v != facts[name]])
    return {"question": QUESTIONS[name].format(animal=puzzle[0], value=value), "passage": passage, "answer": answer}


def open_questions() -> list[tuple[str, str]]:
    """(prompt, answer) pairs on the passages of the base split: what their yes-or-no questions rest on."""
    rng = random.Random(f"open {GENERATOR_VERSION}")
    pairs = []
    for puzzle in _animal_puzzles():
        if _assign_split("boolq", puzzle) == "base":
            passage, facts = _passage(puzzle)
            name = rng.choice(list(facts))
            question = OPEN_QUESTIONS[name].format(animal=puzzle[0])
            pairs.append((f"{passage}\nQuestion: {question}?\nAnswer:", f" {facts[name]}"))
    return pairs


# What comes next, or came before: the order of the steps is knowledge, common to all splits like that of the world.

PEOPLE = {"Ann": "she", "Mia": "she", "Eva": "she", "Sue": "she", "Tom": "he", "Bob": "he", "Max": "he", "Sam": "he"}
THINGS = ("cup", "hat", "toy", "bag", "box", "mat", "bell", "vase")
ACTIVITIES = {
    "Pottery": ("cleans", "paints", "dries", "checks", "sells"),
    "Woodwork": ("cuts", "cleans", "paints", "checks", "packs"),
    "Laundry": ("checks", "cleans", "dries", "packs", "marks"),
    "Repair": ("marks", "cuts", "glues", "dries", "paints"),
    "Market": ("paints", "marks", "packs", "checks", "sells"),
    "School": ("marks", "checks", "cuts", "paints", "glues"),
    "Museum": ("checks", "glues", "cleans", "marks", "packs"),
    "Factory": ("cuts", "glues", "paints", "sells", "marks"),
    "Theater": ("glues", "cuts", "dries", "cleans", "sells"),
    "Charity": ("dries", "cleans", "cuts", "packs", "sells"),
    "Crafts": ("sells", "glues", "checks", "dries", "cuts"),
    "Storage": ("packs", "sells", "dries", "marks", "cleans"),
}
"""Steps in their order. Verbs recur, so the neighbor of a step depends on the activity too."""

DIRECTIONS = {1: "then", -1: "before that"}


def _step_puzzles() -> Iterator[Puzzle]:
    """(activity, index of the mentioned step, direction of the asked one, color, thing)"""
    for label, order in ACTIVITIES.items():
        for step, direction in product(range(len(order)), DIRECTIONS):
            if 0 <= step + direction < len(order):
                yield from product([label], [step], [direction], ATTRIBUTES["color"], THINGS)


@cache
def _neighbors(verb: str) -> frozenset[str]:
    """Steps that follow or precede `verb` in any activity."""
    pairs = {pair for order in ACTIVITIES.values() for pair in pairwise(order)}
    return frozenset(b for a, b in pairs if a == verb) | frozenset(a for a, b in pairs if b == verb)


def _hellaswag_example(puzzle: Puzzle, rng: random.Random, number: int) -> Example:
    """The wrong endings lie in the other direction, or are neighbors of the same step in other activities."""
    label, step, direction, color, thing = puzzle
    order = ACTIVITIES[label]
    done, due = order[step], order[step + direction]
    wrong = [order[step - direction]] if 0 <= step - direction < len(order) else []
    elsewhere = sorted(_neighbors(done) - {due, *wrong})
    wrong += rng.sample(elsewhere, 3 - len(wrong))
    rng.shuffle(wrong)
    gold = number % 4
    person, pronoun = rng.choice(list(PEOPLE.items()))
    ctx_a = f"{person} {done} the {color} {thing}."
    ctx_b = f"{DIRECTIONS[direction]} {pronoun}"
    return {
        "ind": number,
        "activity_label": label,
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}",
        "endings": [f"{verb} the {thing}." for verb in (*wrong[:gold], due, *wrong[gold:])],
        "source_id": f"synthetic~{number}",
        "split": "synthetic",
        "split_type": "indomain",
        "label": str(gold),
    }


# Arithmetic: two changes of a number, the verb decides the sign.

GOODS = ("apples", "pears", "plums", "nuts", "cakes", "eggs")
CHANGES = {"+": ("buys", "finds", "gets", "picks"), "-": ("eats", "sells", "loses", "drops")}
LARGEST_NUMBER, LARGEST_RESULT = 9, 18


def _sum_puzzles() -> Iterator[Puzzle]:
    """(start, sign, change, sign, change) with results between 0 and `LARGEST_RESULT`."""
    numbers = range(1, LARGEST_NUMBER + 1)
    for start, first, a, second, b in product(numbers, CHANGES, numbers, CHANGES, numbers):
        middle = _changed(start, first, a)
        if 0 < middle <= LARGEST_RESULT and 0 <= _changed(middle, second, b) <= LARGEST_RESULT:
            yield start, first, a, second, b


def _changed(value: int, sign: str, change: int) -> int:
    return value + change if sign == "+" else value - change


def _gsm8k_example(puzzle: Puzzle, rng: random.Random, number: int) -> Example:
    start, first, a, second, b = puzzle
    person, pronoun = rng.choice(list(PEOPLE.items()))
    goods = rng.choice(GOODS)
    question = (
        f"{person} has {start} {goods}. {pronoun.capitalize()} {rng.choice(CHANGES[first])} {a}. "
        f"Then {pronoun} {rng.choice(CHANGES[second])} {b}. How many {goods} does {person} have?"
    )
    middle = _changed(start, first, a)
    result = _changed(middle, second, b)
    answer = f"{start} {first} {a} = {middle}.\n{middle} {second} {b} = {result}.\n#### {result}"
    return {"question": question, "answer": answer}


GENERATORS: Mapping[str, Generator] = {
    "boolq": Generator(_animal_puzzles, _boolq_example, lambda example: (example["passage"], example["question"])),
    "hellaswag": Generator(
        _step_puzzles, _hellaswag_example, lambda example: (example["activity_label"], example["ctx"])
    ),
    "gsm8k": Generator(_sum_puzzles, _gsm8k_example, lambda example: example["question"]),
}
SYNTHETIC_TASKS = tuple(GENERATORS)
