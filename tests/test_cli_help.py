"""Every help explains every option, says its default and exit status, and shows commands that parse."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import fields
from typing import Any

import pytest

from analysis.baselines.published import COLUMNS
from search_spaces import matrix, subadapters
from tune_sparse.cli import main, parser, parsers
from tune_sparse.cli.command import BAD_INPUT
from tune_sparse.cli.sweep import GROUPS
from tune_sparse.cli.sweep_options import sweep_config
from tune_sparse.cli.words import (
    BASELINE_COLUMNS,
    SCHEDULE_SETTINGS,
    TOY_MODELS,
    WIDTH,
    WORDS,
    methods,
    models,
    presets,
    schedules,
    settings,
    table,
    tasks,
)
from tune_sparse.config import BACKENDS, BudgetOptions, Cerebras, EarlyStopping, Protocol, ScheduleSettings, SweepConfig
from tune_sparse.config.options import describe_option, option, value_text
from tune_sparse.data.tasks import TASKS
from tune_sparse.models import toy_models
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import ALLOCATIONS, METHODS, PATTERNS
from tune_sparse.pruning.scores import SCORES
from tune_sparse.schedules import SCHEDULES

COMMANDS = parsers()[1]
each_command = pytest.mark.parametrize("name", COMMANDS)
ALTERNATIVES = {
    "evaluate": {"model", "run"},
    "merge": {"run", "base", "adapter"},
    "discard": {"run", "prunings"},
}
"""Options of which one or the other must be given, so that none has a default."""
USED_BY_PREPARE = {"help", "preset", "config", "models", "tasks", "data_dir"}


def options(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in command._actions}


def section(text: str, heading: str) -> list[str]:
    """The lines under a heading of a help."""
    found = re.search(rf"^{heading}:\n((?:    .*\n?)+)", text, flags=re.MULTILINE)
    assert found, heading
    return found[1].splitlines()


def test_there_are_helps_to_check() -> None:
    assert len(COMMANDS) == 19
    assert sum(len(options(command)) for command in COMMANDS.values()) >= 130


@each_command
def test_every_option_is_explained(name: str) -> None:
    for action in options(COMMANDS[name]).values():
        assert action.help
        assert not action.help.lower().startswith(("of ", "what ", "see "))
        assert "rows" not in action.help.replace("rows and columns", "")
        if action.nargs != 0:
            metavar = str(action.metavar)
            assert action.choices or metavar == metavar.upper() != "NONE"
            needed = action.required or action.dest in ALTERNATIVES.get(name, ())
            assert needed or "(default: " in action.help
            assert "(default: )" not in action.help


@each_command
def test_a_help_has_a_sentence_examples_that_parse_and_the_exit_status(name: str) -> None:
    command = COMMANDS[name]
    text = command.format_help()
    assert command.description
    assert command.description[0].isupper()
    assert command.description.endswith(".")
    shown = section(text, "examples")
    for line in shown:
        program, *arguments = shlex.split(line)
        assert (program, arguments[0]) == ("tune-sparse", name)
        parser().parse_args(arguments)
    assert [line.split()[0] for line in section(text, "exit status") if line[4] != " "] == ["0", "1", "2"]


def test_a_yes_or_no_takes_a_value_where_its_help_says_so() -> None:
    chosen = parser().parse_args(
        ["sweep", "--automount", "false", "--disable-version-check", "true", "--deterministic"]
    )
    config = sweep_config(chosen)
    assert (config.cerebras.automount, config.cerebras.disable_version_check, config.deterministic) == (
        False,
        True,
        True,
    )


@each_command
def test_a_help_fits_its_width_whatever_the_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, COMMANDS[name].format_help().splitlines())) <= WIDTH


@each_command
def test_the_words_of_the_project_are_explained_where_they_are_used(name: str) -> None:
    text = COMMANDS[name].format_help()
    explained = "\n".join(section(text, "words")) if "\nwords:\n" in text else ""
    used = re.sub(r"`[^`]*`", "", text)
    for word in ("super-adapter", "sub-adapter", "trial", "cell", "audit", "MLflow", "candidate", "Ray", "CS-3"):
        is_used = re.search(rf"(?<![-\w]){word}s?(?![-\w])", used)
        is_command = word == name or (word in {"trial"} and name == "search")
        assert not is_used or is_command or f"    {word} " in explained, word


def test_every_word_is_used() -> None:
    helps = "\n".join(command.format_help() for command in COMMANDS.values())
    assert [word for word in WORDS if f"    {word} " not in helps] == []


def test_prepare_and_throughput_show_only_what_they_use() -> None:
    assert set(options(COMMANDS["prepare"])) == USED_BY_PREPARE
    unused = {"workers", "max_retries", "hang_seconds", "tracking_uri", "seeds", "cs3", "scoring_gpus"}
    assert unused.isdisjoint(options(COMMANDS["throughput"]))
    assert unused <= set(options(COMMANDS["sweep"]))


def test_a_sweep_has_an_option_for_each_setting_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    declared = [f.name for kind in (SweepConfig, BudgetOptions, Cerebras, EarlyStopping) for f in fields(kind)]
    kinds = {"protocol", "budgets", "cerebras", "schedule_settings", "early_stopping", "axes"}
    assert sorted(grouped) == sorted(set(declared) - {"preset"} - kinds)
    titles = {group.title for group in COMMANDS["sweep"]._action_groups}
    assert set(GROUPS) <= titles


def test_every_entry_of_a_table_says_what_it_is() -> None:
    assert all(task.about for task in TASKS.values())
    assert all(mode.about for mode in MODES.values())
    assert all(schedule.about for schedule in SCHEDULES.values())
    assert all(score.about for score in SCORES.values())
    assert all([*ALLOCATIONS.values(), *PATTERNS.values()])
    assert set(matrix.ABOUT) == {name for name in matrix.PRESETS if not name.endswith("-pilot")} | {"NAME-pilot"}
    assert set(subadapters.ABOUT) == set(subadapters.PRESETS)
    assert set(TOY_MODELS) == set(toy_models.TOY_MODELS)


def test_the_lists_of_a_help_are_complete() -> None:
    assert [name for name in TASKS if f"    {name} " not in tasks()] == []
    assert [name for name in matrix.ABOUT if f"    {name} " not in presets()] == []
    assert set(METHODS) <= set(re.split(r"[,\s]+", methods()))
    assert [f.name for f in fields(Protocol) if f"    {f.name} " not in settings()] == []
    assert [f.name for f in fields(ScheduleSettings) if f"    {f.name} " not in settings(SCHEDULE_SETTINGS)] == []
    assert [name for name in SCHEDULES if f"    {name} " not in schedules()] == []
    assert set(BACKENDS) <= set(SweepConfig.__dataclass_fields__["backend"].metadata["choices"])


def test_the_columns_of_published_numbers_are_all_listed() -> None:
    assert ", ".join(BASELINE_COLUMNS).split(", ") == list(COLUMNS)


def test_a_preset_shows_all_that_it_sets() -> None:
    text = " ".join(presets().split())
    assert "smoke a first try; a sweep trains 14 times. Sets what toy sets, but models=tiny-llama, tasks=boolq" in text
    for name in ("toy", "matrix", "mixtral", "phoenix"):
        assert [key for key, value in matrix.PRESETS[name].items() if f"{key}={value_text(value)}" not in text] == []


def test_a_model_says_whether_the_command_makes_it() -> None:
    made, needed = models(trains=True, downloads=True), models(trains=False, downloads=False)
    assert " ".join(made.split()).count("if missing") == 2
    assert " ".join(needed.split()).count("by `tune-sparse prepare`") == 2


def test_a_task_shows_its_dataset_fields_and_scored_split() -> None:
    text = " ".join(tasks(["gsm8k"]).split())
    assert "openai/gsm8k (configuration main); fields question, answer; test examples: test" in text
    assert "none on the Hub; fields original_text, ans" in " ".join(tasks(["mawps"]).split())


def test_some_settings_are_shown_under_their_headings_with_the_text_of_a_command() -> None:
    text = settings(["lora_rank", "precision"], texts={"lora_rank": "its own text"})
    assert re.findall(r"^settings for --set, (.+):$", text, flags=re.MULTILINE) == ["LoRA adapters", "sequences"]
    assert "    lora_rank  its own text\n" in text
    assert settings(["lora_rank", "precision"], "scoring").count("settings for --set") == 1


@each_command
def test_one_metavar_has_one_meaning(name: str) -> None:
    declared = options(COMMANDS[name])
    expected = {"results_dir": "RESULTS", "data_dir": "DATA", "adapter": "ADAPTER", "output": "OUTPUT"}
    for dest, metavar in expected.items():
        assert dest not in declared or declared[dest].metavar == metavar
    assert all(action.metavar != "DIR" for action in declared.values())


@pytest.mark.parametrize(
    ("default", "more", "text"),
    [
        (3, {}, "number of things (default: 3)"),
        (False, {}, "number of things (default: false)"),
        ((0.5, 0.7), {}, "number of things (default: 0.5 0.7)"),
        (None, {"unset": "all of them"}, "number of things (default: none, all of them)"),
        ((), {"unset": "none"}, "number of things (default: none)"),
        ("a", {"choices": ("a", "b")}, "number of things: a or b (default: a)"),
        ("a", {"choices": {"a": "one", "b": "two"}}, "number of things (a: one; b: two) (default: a)"),
    ],
)
def test_a_default_and_choices_are_read_from_the_field(default: Any, more: dict[str, Any], text: str) -> None:
    made = option("number of things", default, **more)
    assert describe_option(made) == text


def test_a_table_is_aligned() -> None:
    assert table("kinds", {"a": "one", "long": "two"}) == "kinds:\n    a     one\n    long  two"
    assert table("kinds", {"a": "word " * 40}).splitlines()[2].startswith("       word")


def test_an_unknown_command_offers_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=str(BAD_INPUT)):
        main(["sweeep", "--workers", "2"])
    assert "tune-sparse: error: unknown command 'sweeep'. Did you mean 'sweep'" in capsys.readouterr().err


def test_the_version_and_every_command_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"tune-sparse \d+\.\d+\.\d+\n", capsys.readouterr().out)
    text = parser().format_help()
    assert max(map(len, text.splitlines())) <= WIDTH
    listed = re.findall(r"^    ([a-z]+) +[A-Z]", text, flags=re.MULTILINE)
    assert listed == list(COMMANDS)
    for line in section(text, "examples"):
        parser().parse_args(shlex.split(line, comments=True)[1:])
