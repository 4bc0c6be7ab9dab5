"""search: the best sub-adapter of a super-adapter."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from search_spaces import subadapters
from search_spaces.matrix import PRESETS
from tune_sparse.cli.command import FAULT, OK, add_command, add_json, add_results_dir
from tune_sparse.cli.settings import (
    DATA_DIR,
    add_set,
    add_settings,
    given_flags,
    given_settings,
    parse_settings,
    read_yaml,
)
from tune_sparse.cli.sweep_options import BUDGETS, add_preset
from tune_sparse.cli.words import (
    RUN_WORDS,
    SETTINGS_IN_USE,
    files,
    methods,
    models,
    modes,
    paragraph,
    presets,
    settings,
    spaces,
    tasks,
    words,
)
from tune_sparse.config import BudgetOptions, SweepConfig
from tune_sparse.data.task_types import PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import RunError, unknown_name
from tune_sparse.lora.rank_space import Space
from tune_sparse.modes import ADAPTER_MODES
from tune_sparse.search.config import SearchConfig

EXAMPLES = (
    "search --task gsm8k --method wanda --sparsity 0.7",
    "search --all-tasks --sparsity 0.7 --trials 50 --sampler tpe",
    "search matrix --task gsm8k --model ./my-llama --data-dir ./examples --space sqft",
)
SPACE_FILE = """a file for --space names groups of matrices that share a rank in each layer, and the ranks to
choose from, the largest first; rank 0 leaves the adapter out:
    qkv: {modules: [q_proj, k_proj, v_proj], ranks: [32, 16, 8]}
    down: {modules: [down_proj], ranks: [32, 16, 0]}"""
OUTCOME = paragraph(
    "The super-adapter is trained as a run, and reused if that run is finished. The best sub-adapters are those that "
    "no other beats in all objectives on the selection examples. The winner is the smallest of them that is about as "
    "accurate as the most accurate one. At the end it is scored on the test examples, beside the middle ranks "
    "(`heuristic`), the largest ranks and a plain LoRA adapter of its size. The search and its report are in "
    "RESULTS/searches/SEARCH (a name that is printed), with the winner in winner/adapter, in the format of Hugging "
    "Face PEFT; it belongs to the pruned model, which is not kept. An interrupted search goes on when the same command "
    "is given again."
)
PRESET_NOTE = (
    "A search takes its model (the first), its task (the first, or with --all-tasks each), data_dir, gpus_per_trial "
    "and settings from the preset, while --method, --sparsity, --mode and --seed keep the defaults shown. It sets "
    "lora_rank=32 and lora_alpha=64 itself, and with toy, smoke and their pilots n_selection=400; --set changes these, "
    "too."
)
TEXTS = {
    "lora_rank": "rank of the super-adapter, at least the largest rank of the space (default: 32)",
    "lora_alpha": "LoRA alpha: the update of an adapter is scaled by lora_alpha / lora_rank, at all ranks of the "
    "space alike (default: 64.0)",
}

OWN_SETTINGS = ("sampling", "sampler", "trials", "objectives")


def declare(commands: Any) -> None:
    search = add_command(
        commands,
        "search",
        _search,
        "prune a model, train one adapter that works at many ranks, and search for the best ranks of its matrices",
        examples=EXAMPLES,
        ok="every search is complete, or with --dry-run, was shown",
        fault="a search failed or was interrupted; with --dry-run, a model or examples are not there yet",
        notes=[
            words(
                *("sparsity", "example", "calibration", "adapter", "super-adapter", "sub-adapter", "candidate"),
                *(*RUN_WORDS, "results folder"),
            ),
            OUTCOME,
            models(trains=True, downloads=False),
            tasks([name for name, task in TASKS.items() if isinstance(task, PromptTask)]),
            files(),
            methods(),
            modes(ADAPTER_MODES),
            spaces(),
            SPACE_FILE,
            presets(f"{PRESET_NOTE} {SETTINGS_IN_USE}"),
            settings(texts=TEXTS),
        ],
    )
    add_preset(search)
    _add_model_into(search.add_argument_group("what to prune and train"))
    _add_search_into(search.add_argument_group("how to search"))
    _add_places_into(search.add_argument_group("how it runs"))
    add_settings(search.add_argument_group("memory"), BudgetOptions, BUDGETS)
    results = search.add_argument_group("results")
    add_results_dir(results)
    add_json(results, "the best sub-adapters and their scores")


def _add_model_into(group: Any) -> None:
    tasks = group.add_mutually_exclusive_group()
    tasks.add_argument(
        "--task",
        metavar="TASK",
        help="task to train and score on, just one of those below (default: the preset's first)",
    )
    tasks.add_argument(
        "--all-tasks", action="store_true", help="search for each task of the preset, and write a table of all results"
    )
    group.add_argument("--model", metavar="MODEL", help="model to prune and train (default: the preset's first)")
    group.add_argument(
        "--method", default="wanda", metavar="METHOD", help="pruning method, listed below (default: wanda)"
    )
    group.add_argument(
        "--sparsity",
        type=float,
        default=0.5,
        metavar="FRACTION",
        help="fraction of weights to set to zero in all linear layers but the embeddings and the output layer "
        "(default: 0.5)",
    )
    group.add_argument(
        "--mode",
        default="sparse-to-sparse",
        metavar="MODE",
        help="training mode, listed below (default: sparse-to-sparse)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of training and search (default: 0)")
    group.add_argument("--data-dir", metavar="DATA", help=f"{DATA_DIR} (default: the preset's)")
    add_set(group, "settings of training and scoring, listed below")


def _add_search_into(group: Any) -> None:
    group.add_argument(
        "--space",
        metavar="NAME",
        help="search space, listed below, or the path of a YAML file (default: toy with synthetic examples, or else "
        "shears)",
    )
    add_settings(group, SearchConfig, OWN_SETTINGS)
    group.add_argument(
        "--no-racing",
        action="store_true",
        help="score every candidate on all selection examples (default: stop one early when others are clearly better)",
    )
    group.add_argument(
        "--in-order",
        action="store_true",
        help="score one candidate after the other, so that the same seed repeats the search exactly",
    )


def _add_places_into(group: Any) -> None:
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of candidates that are scored at the same time (default: as many as CPU cores and GPUs can hold)",
    )
    group.add_argument(
        "--gpus-per-trial",
        type=float,
        metavar="GPUS",
        help="GPUs that a trial holds, which is here the training or the scoring of one candidate: 1, a fraction to "
        "share a GPU, or 0 for the CPU (default: the preset's gpus_per_trial, which may be `none`, see below; or else "
        "0)",
    )
    add_settings(group, SweepConfig, ("deterministic",))
    group.add_argument("--dry-run", action="store_true", help="check all input and show what would be searched")


def search_config(chosen: argparse.Namespace, task: str | None = None) -> SearchConfig:
    """The preset with what a search adds, then the flags, then --set: later ones win."""
    if chosen.preset not in PRESETS:
        raise unknown_name("preset", chosen.preset, PRESETS)
    preset: dict[str, Any] = PRESETS[chosen.preset] | subadapters.PROTOCOL
    is_toy = preset.get("data_dir") == "synthetic"
    if is_toy:
        preset |= subadapters.TOY_PROTOCOL
    flags = {
        "models": chosen.model or preset["models"][0],
        "tasks": task or chosen.task or preset_tasks(chosen.preset)[0],
        "methods": chosen.method,
        "sparsities": chosen.sparsity,
        "modes": chosen.mode,
        "seeds": chosen.seed,
        "results_dir": chosen.results_dir,
    }
    flags |= given_flags(chosen, ("data_dir", "workers", "gpus_per_trial", "deterministic", *BUDGETS))
    name = chosen.space or ("toy" if is_toy else "shears")
    return SearchConfig(
        sweep=SweepConfig.from_names(preset | flags | parse_settings(chosen.set)),
        space=space_named(name),
        space_name=name,
        **given_settings(chosen, SearchConfig, OWN_SETTINGS),
        is_racing=not chosen.no_racing,
        in_order=chosen.in_order,
    )


def preset_tasks(preset: str) -> tuple[str, ...]:
    return tuple(PRESETS[preset].get("tasks", SweepConfig.__dataclass_fields__["tasks"].default))


def space_named(name: str) -> Any:
    """A preset, or what a YAML file says."""
    if name in subadapters.PRESETS:
        return Space.from_groups(subadapters.PRESETS[name])
    path = Path(name)
    if not path.is_file():
        raise unknown_name("space", name, subadapters.PRESETS)
    return Space.from_groups(read_yaml("--space", path))


def _search(chosen: argparse.Namespace) -> int:
    if chosen.preset not in PRESETS:
        raise unknown_name("preset", chosen.preset, PRESETS)
    tasks = preset_tasks(chosen.preset) if chosen.all_tasks else (None,)
    configs = [search_config(chosen, task) for task in tasks]
    if chosen.dry_run:
        return _dry_run(configs, chosen.json)
    from analysis.report.search_report import write_search_report, write_search_table
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.search.driver import run_search
    from tune_sparse.search.plan import prepare_search
    from tune_sparse.tracking.background import track_search
    from tune_sparse.tracking.sync import tracking_uri

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tune_sparse").setLevel(logging.INFO)
    found = []
    uri = tracking_uri(configs[0].sweep)
    for config in configs:
        try:
            found.append(run_search(prepare_search(config)))
        except RunError as error:
            print(f"tune-sparse: {error}", file=sys.stderr)
            return FAULT
        if found[-1].get("stopped"):
            print(f"tune-sparse: {found[-1]['stopped']}. The same command goes on.", file=sys.stderr)
            return FAULT
        lines = write_search_report(config.sweep.results_dir, found[-1]["search_id"])
        track_search(Ledger(config.sweep.results_dir), uri, found[-1]["search_id"])
        if not chosen.json:
            print("\n".join(lines))
    if len(found) > 1:
        lines = write_search_table(chosen.results_dir, [one["search_id"] for one in found])
        if not chosen.json:
            print("\n".join(lines))
    if chosen.json:
        print(json.dumps(found if chosen.all_tasks else found[0]))
    return OK


def _dry_run(configs: list[SearchConfig], as_json: bool) -> int:
    from tune_sparse.errors import NotReadyError
    from tune_sparse.ledger.ledger import Ledger
    from tune_sparse.search.plan import plan_search

    values, lines = list[dict[str, Any]](), []
    for config in configs:
        try:
            plan = plan_search(config)
        except NotReadyError as error:
            values.append({"task": config.sweep.tasks[0], "not_ready": str(error)})
            lines.append(f"{config.sweep.tasks[0]}: not ready to run: {error}")
            continue
        ranks = plan.space.dimensions(plan.dims.num_layers)
        is_trained = Ledger(config.sweep.results_dir).is_done(plan.run.run_id)
        value = {
            "search_id": plan.search_id,
            "super_adapter_run": plan.run.run_id,
            "super_adapter_is_trained": is_trained,
            "dimensions": len(ranks),
            "trials": config.trials,
            "selection_examples": plan.selection_examples,
        }
        values.append(value)
        lines.append(
            f"{plan.search_id}: {config.trials} candidates of {len(ranks)} dimensions on {value['selection_examples']} "
            f"selection examples, slices of {plan.run.run_id} ({'trained' if is_trained else 'to be trained'})"
        )
    print(json.dumps(values) if as_json else "\n".join(lines))
    return FAULT if any("not_ready" in value for value in values) else OK
