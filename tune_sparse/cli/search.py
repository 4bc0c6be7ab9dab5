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
from tune_sparse.cli.command import FAULT, OK, add_command, add_results_dir
from tune_sparse.cli.settings import add_settings, given_flags, given_settings, parse_settings, read_yaml
from tune_sparse.cli.sweep_options import DEFAULT_PRESET, add_protocol_option
from tune_sparse.config import SweepConfig
from tune_sparse.errors import RunError, unknown_name
from tune_sparse.lora.rank_space import Space
from tune_sparse.search.config import SearchConfig

EXAMPLE = """examples:
    tune-sparse search --task gsm8k --method wanda --sparsity 0.7
    tune-sparse search --all-tasks --sparsity 0.7 --trials 50 --sampler tpe
    tune-sparse search matrix --task gsm8k --model ./my-llama --data-dir ./rows --space shears --trials 200

A space file, for --space, maps groups to modules and ranks, the largest first; 0 drops the adapter:
    qkv: {modules: [q_proj, k_proj, v_proj], ranks: [32, 16, 8]}
    down: {modules: [down_proj], ranks: [32, 16, 0]}"""

OWN_SETTINGS = ("sampling", "sampler", "trials", "objectives")


def declare(commands: Any) -> None:
    search = add_command(commands, "search", _search, "search the best sub-adapter of a super-adapter", EXAMPLE)
    search.add_argument(
        "preset", nargs="?", default=DEFAULT_PRESET, metavar="PRESET", help="of the sweep; its protocol"
    )
    tasks = search.add_mutually_exclusive_group()
    tasks.add_argument("--task", help="default: the preset's first")
    tasks.add_argument("--all-tasks", action="store_true", help="one search for each task of the preset, compared")
    search.add_argument("--model", help="default: the preset's first")
    search.add_argument("--method", default="wanda", help="pruning method (default wanda)")
    search.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros (default 0.5)")
    search.add_argument("--mode", default="sparse-to-sparse", help="of the training (default sparse-to-sparse)")
    search.add_argument("--seed", type=int, default=0, help="of the training and the sampler (default 0)")
    search.add_argument("--space", help=f"a YAML file, or of {', '.join(subadapters.PRESETS)}")
    add_settings(search, SearchConfig, OWN_SETTINGS, shows_default=True)
    search.add_argument("--no-racing", action="store_true", help="every candidate answers all selection rows")
    search.add_argument("--in-order", action="store_true", help="one candidate at a time: repeats exactly")
    search.add_argument("--data-dir", help="folder of tasks, `hub` or `synthetic`; default: the preset's")
    add_results_dir(search)
    search.add_argument("--workers", type=int, help="candidates at once; default: one per core, or per GPU")
    search.add_argument("--gpus-per-trial", type=float, help="GPUs, or a fraction of one, that a worker holds")
    add_protocol_option(search)
    search.add_argument("--dry-run", action="store_true", help="check everything and show what would be searched")
    search.add_argument("--json", action="store_true", help="print the outcome as JSON")


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
    flags |= given_flags(chosen, ("data_dir", "workers", "gpus_per_trial"))
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
            "selection_rows": plan.selection_examples,
        }
        values.append(value)
        lines.append(
            f"{plan.search_id}: {config.trials} candidates of {len(ranks)} dimensions on {value['selection_rows']} "
            f"selection rows, slices of {plan.run.run_id} ({'trained' if is_trained else 'to be trained'})"
        )
    print(json.dumps(values) if as_json else "\n".join(lines))
    return OK
