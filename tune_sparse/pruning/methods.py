"""The pruning methods by name: a score, an allocation over the layers, a pattern.

`unstructured`, `structured` and `random` are the methods of the matrix. Every other name is
SCORE[-ALLOCATION][-PATTERN], what is left out being uniform and element-wise: `wanda`, `wanda-owl`, `taylor-2:4`,
`magnitude-global`, `wanda-structured`. What makes no sense is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import product

from tune_sparse.errors import InputError, unknown_name
from tune_sparse.pruning.scores import SCORES, Needs
from tune_sparse.schedules import ONE_SHOT, SCHEDULES

ALLOCATIONS = {
    "uniform": "prunes the same fraction of every matrix",
    "global": "prunes the lowest scores of the whole model: more in some layers than in others",
    "owl": "prunes less in layers with many outliers (OWL: Outlier Weighed Layerwise sparsity)",
    "erk": "prunes less of small matrices: as many are kept of each as it has inputs and outputs, times a factor (ERK: "
    "Erdős-Rényi kernel)",
}
GROUPS = {"2:4": (2, 4), "4:8": (4, 8)}
"""{pattern: (weights kept, of so many neighbours in a row)}"""
PATTERNS = {
    "element-wise": "prunes single weights",
    "structured": "prunes whole attention heads and feed-forward channels",
    **{
        name: f"keeps {kept} of every {size} neighbouring weights, so the only sparsity above 0 is "
        f"{1 - kept / size:g}, and others are refused"
        for name, (kept, size) in GROUPS.items()
    },
}
ENOUGH_TOKENS_PER_INPUT = 2
"""Calibration tokens for each input of a matrix below which a Hessian is damping for the most part: SparseGPT's error
was .0635 at a quarter of a token for each input, .0250 at two."""
TOLERANCE = 0.01
"""The actual sparsity may be this far from the target sparsity."""
OWN_NAMES = {
    ("magnitude", "uniform", "element-wise"): "unstructured",
    ("magnitude", "uniform", "structured"): "structured",
}


@dataclass(frozen=True)
class Method:
    """score: importance of each weight. allocation: how many go in each layer. pattern: which ones."""

    score: str
    allocation: str
    pattern: str

    @property
    def needs(self) -> Needs:
        """The needs of its score, and OWL's norms of the inputs."""
        needs = SCORES[self.score].needs
        return replace(needs, input_norms=True) if self.allocation == "owl" else needs

    @property
    def updates_weights(self) -> bool:
        """Kept weights change, by the Hessian of the layer's output on calibration examples."""
        return self.needs.hessian

    @property
    def is_calibrated(self) -> bool:
        return self.needs.input_norms or self.needs.gradients or self.needs.hessian

    @property
    def is_stored(self) -> bool:
        """A pruning is made once and then read: measured ones differ in their last bits between machines, and a draw
        of random numbers takes long. Magnitudes alone give the same masks everywhere."""
        return self.is_calibrated or self.needs.seed

    @property
    def fixed_sparsity(self) -> float | None:
        """The only sparsity that a pattern of groups has."""
        kept, group = GROUPS.get(self.pattern, (0, 0))
        return 1 - kept / group if group else None

    def check_sparsity(self, name: str, sparsity: float) -> None:
        """Raise `InputError` for a sparsity that the pattern cannot have; 0 is the dense model."""
        fixed = self.fixed_sparsity
        if fixed is not None and sparsity not in (0.0, fixed):
            raise InputError(
                f"the sparsity of {name} is {fixed:g}, got {sparsity:g}. Give {fixed:g}, or another method."
            )


def nonsense(score: str, allocation: str, pattern: str) -> str | None:
    """Why a combination is refused, or None if it makes sense."""
    if allocation != "uniform" and pattern == "structured":
        return "structured pruning takes as much from every block, so that the smaller model is one that loads"
    if allocation != "uniform" and pattern in GROUPS:
        return f"{pattern} fixes the sparsity of every row, which leaves nothing to allocate"
    refused = SCORES[score].refuses
    return refused.get(allocation) or refused.get(pattern)


def _plain_name(score: str, allocation: str, pattern: str) -> str:
    return "-".join([score, *(part for part in (allocation, pattern) if part not in ("uniform", "element-wise"))])


def methods_from_scores(scores: Iterable[str]) -> dict[str, Method]:
    """{name: method} of every combination of these scores that makes sense."""
    return {
        OWN_NAMES.get(parts) or _plain_name(*parts): Method(*parts)
        for parts in product(scores, ALLOCATIONS, PATTERNS)
        if not nonsense(*parts)
    }


METHODS = methods_from_scores(SCORES)


def method_named(name: str) -> Method:
    """The method called `name`. Raises `InputError` for a combination that makes no sense, or an unknown name."""
    if name in METHODS:
        return METHODS[name]
    for parts in product(SCORES, ALLOCATIONS, PATTERNS):
        if name == _plain_name(*parts):
            if reason := nonsense(*parts):
                raise InputError(f"a method must make sense, got {name!r}: {reason}. Choose another combination.")
            raise InputError(f"a method has one name, got {name!r}, which is called {OWN_NAMES[parts]!r}. Write that.")
    raise unknown_name("method", name, METHODS)


def check_schedule(name: str, schedule: str, backends: Collection[str] = ()) -> None:
    """Raise `InputError` for a method whose masks a schedule cannot make or keep, somewhere that a sweep trains."""
    if reason := _unfollowable(method_named(name), schedule, backends):
        raise InputError(
            f"a method must suit its schedule, got {name!r} with {schedule!r}: {reason}. Sweep one without the other."
        )


def _unfollowable(method: Method, schedule: str, backends: Collection[str]) -> str | None:
    facts = SCHEDULES[schedule]
    if method.fixed_sparsity is not None and schedule != ONE_SHOT and not facts.grows:
        return f"{method.pattern} has one sparsity, and there are others on the way"
    if method.pattern != "element-wise" and facts.planner:
        return f"its updates change single weights, so that masks would not stay {method.pattern}"
    if facts.starts_dense and method.needs != Needs():
        return "its updates know the weights alone, so that only magnitude can score them"
    if facts.starts_dense and method.allocation == "global" and "cerebras" in backends:
        return "on the backend cerebras an update knows one matrix alone, and cannot compare those of the whole model"
    return None
