"""Pictures of a search: the front, accuracy over trials, chosen ranks, importance of the dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from analysis.report.style import COLOURS
from tune_sparse.config import FLOPS_TOKENS
from tune_sparse.files import atomic_file

SearchRecord = Mapping[str, Any]


def draw_search(found: SearchRecord, folder: Path) -> None:
    """Draw all pictures of one search into its folder, as PNG files."""
    pictures: dict[str, Callable[[Axes, SearchRecord], None]] = {
        "pareto_front": draw_front,
        "accuracy_over_trials": draw_trials,
        "ranks": draw_ranks,
        "importance": draw_importance,
    }
    for name, draw in pictures.items():
        figure, axis = plt.subplots(figsize=(5.0, 3.4), layout="constrained")
        draw(axis, found)
        with atomic_file(folder / f"{name}.png") as partial:
            figure.savefig(partial, dpi=150, format="png")
        plt.close(figure)


def draw_front(axis: Axes, found: SearchRecord) -> None:
    """Accuracy on selection examples over the share of the maximal's parameters."""
    for state, colour, label in (("stopped", "0.8", "stopped early (estimated)"), ("done", COLOURS[5], "scored")):
        trials = [t for t in found["trials"] if t["state"] == state]
        axis.scatter([_share(t, found) for t in trials], [t["accuracy"] for t in trials], s=9, c=colour, label=label)
    front = found["result"]["front"]
    axis.plot([p["parameters_fraction"] for p in front], [p["accuracy"] for p in front], "-o", ms=4, c=COLOURS[0])
    winner = next(p for p in front if p["ranks"] == found["result"]["winner"])
    axis.plot(winner["parameters_fraction"], winner["accuracy"], "*", ms=13, c=COLOURS[1], label="winner")
    axis.set_xlabel("parameters / those of the maximal")
    axis.set_ylabel("accuracy on selection examples")
    axis.legend(fontsize=7)


def _share(trial: Mapping[str, Any], found: SearchRecord) -> float:
    maximal = max(p["parameters"] / p["parameters_fraction"] for p in found["result"]["front"])
    per_parameter = 2 * FLOPS_TOKENS if "inference_flops" in found["config"]["objectives"] else 1
    return float(trial["cost"] / per_parameter / maximal)


def draw_trials(axis: Axes, found: SearchRecord) -> None:
    """Accuracy of each suggestion, and the best so far."""
    scored = [t for t in found["trials"] if t["state"] in ("done", "stopped")]
    best, so_far = [], 0.0
    for trial in scored:
        so_far = max(so_far, trial["accuracy"]) if trial["state"] == "done" else so_far
        best.append(so_far)
    numbers = [t["number"] for t in scored]
    axis.scatter(numbers, [t["accuracy"] for t in scored], s=9, color=COLOURS[5])
    axis.step(numbers, best, where="post", color=COLOURS[0], label="best so far")
    axis.set_xlabel(f"suggestion of {found['config']['sampler']}")
    axis.set_ylabel("accuracy on selection examples")
    axis.legend(fontsize=7)


def draw_ranks(axis: Axes, found: SearchRecord) -> None:
    """The winner's rank in each layer and group."""
    winner = found["result"]["winner"]
    layers, groups = (list(dict.fromkeys(name.split(".", 1)[part] for name in winner)) for part in (0, 1))
    ranks = [[winner[f"{layer}.{group}"] for layer in layers] for group in groups]
    largest = max(max(choices) for choices in found["config"]["dimensions"].values())
    axis.imshow(ranks, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    for y, row in enumerate(ranks):
        for x, rank in enumerate(row):
            if len(layers) <= 16:
                axis.text(x, y, str(rank), ha="center", va="center", color="w" if rank < 0.7 * largest else "k")
    axis.set_xticks(range(len(layers)), layers, fontsize=7)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_title("ranks of the winner", fontsize=9)


def draw_importance(axis: Axes, found: SearchRecord) -> None:
    """How much of the variance of the accuracy each dimension explains (fANOVA, Hutter et al. 2014, by Optuna)."""
    shares = importances(found)
    names = list(shares)[:20][::-1]
    axis.barh(names, [shares[name] for name in names], color=COLOURS[0])
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("importance for the accuracy")


def importances(found: SearchRecord) -> dict[str, float]:
    """{dimension: its importance}, the largest first; none where the accuracies do not differ."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    scored = [t for t in found["trials"] if t["state"] in ("done", "stopped")]
    distinct = {str(t["ranks"]): t for t in scored}.values()
    if len({t["accuracy"] for t in distinct}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    choices = found["config"]["dimensions"].items()
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(tuple(ranks)) for name, ranks in choices if len(ranks) > 1
    }
    study = optuna.create_study(direction="maximize")
    for trial in distinct:
        params = {name: trial["ranks"][name] for name in distributions}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=trial["accuracy"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found_shares: dict[str, float] = optuna.importance.get_param_importances(study)
    return found_shares
