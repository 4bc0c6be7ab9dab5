"""A space of sub-adapters: which modules share a rank, which ranks there are, and what a choice of them costs.

A configuration gives a rank to every dimension, a (layer, group) named "l<layer>.<group>"; a matrix of a checkpoint
belongs to the group that has its module, in its layer. Importing this loads no torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tune_sparse.errors import InputError, unknown_name
from tune_sparse.models.architectures import matrix_named

Ranks = dict[str, int]
"""A configuration: {dimension: active rank}."""
SAMPLINGS = {
    "uniform": "every rank with the same probability",
    "sandwich": "the largest ranks, the smallest ranks and random ranks in turn",
}


@dataclass(frozen=True)
class Group:
    """Modules that have one rank in a layer, and the ranks to choose from, the largest first."""

    name: str
    modules: tuple[str, ...]
    """Last parts of names: q_proj, ..."""
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.modules:
            raise InputError(f"a group needs modules, {self.name!r} has none. Name q_proj, say.")
        if not self.ranks:
            raise InputError(f"a group needs ranks to choose from, {self.name!r} has none. Give 32, 24, 16, say.")
        if min(self.ranks) < 0 or list(self.ranks) != sorted(set(self.ranks), reverse=True):
            raise InputError(
                f"the ranks of a group must be different, at least 0, and the largest first, {self.name!r} has "
                f"{list(self.ranks)}. Sort them."
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise InputError(f"a group's name must be letters, digits, - and _, got {self.name!r}. Rename it.")


@dataclass(frozen=True)
class Space:
    """Groups of modules, every layer with the same choices."""

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise InputError("a space needs at least one group, got none. Name q_proj, k_proj, v_proj as `qkv`, say.")
        for kind, names in (("name", [g.name for g in self.groups]), ("module", self.modules)):
            repeated = sorted({name for name in names if list(names).count(name) > 1})
            if repeated:
                raise InputError(f"no {kind} may be in two groups of a space, got {', '.join(repeated)}. Remove one.")
        if not self.largest:
            raise InputError("a space needs a rank above 0, got only 0. Add ranks.")

    @classmethod
    def from_groups(cls, groups: Mapping[str, Mapping[str, Any]]) -> Space:
        """From {group: {"modules": ..., "ranks": ...}}, as the presets and a YAML file have it."""
        try:
            return cls(tuple(Group(n, tuple(g["modules"]), tuple(map(int, g["ranks"]))) for n, g in groups.items()))
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"a space maps each group to its modules and ranks, got {groups!r} ({error!r}). "
                "Write `up: {modules: [up_proj], ranks: [32, 16]}`, say."
            ) from error

    @classmethod
    def uniform(cls, modules: Iterable[str], rank: int) -> Space:
        """One configuration: every module at the same rank, as plain LoRA."""
        return cls((Group("all", tuple(modules), (rank,)),))

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(module for group in self.groups for module in group.modules)

    @property
    def largest(self) -> int:
        return max(rank for group in self.groups for rank in group.ranks)

    def dimensions(self, layers: int) -> dict[str, tuple[int, ...]]:
        """{dimension: its ranks}, layer after layer."""
        return {f"l{layer:02}.{g.name}": g.ranks for layer in range(layers) for g in self.groups}

    def maximal(self, layers: int) -> Ranks:
        return {name: ranks[0] for name, ranks in self.dimensions(layers).items()}

    def heuristic(self, layers: int) -> Ranks:
        """The middle rank, index (n - 1) // 2, of every dimension (Shears, arXiv:2404.10934)."""
        return {name: ranks[(len(ranks) - 1) // 2] for name, ranks in self.dimensions(layers).items()}

    def minimal(self, layers: int) -> Ranks:
        return {name: ranks[-1] for name, ranks in self.dimensions(layers).items()}

    def sample_ranks(self, layers: int, step: int, seed: int, sampling: str) -> Ranks:
        """The configuration that an optimizer step trains, from the step and the seed alone.

        uniform: each rank alike. sandwich: the largest, the smallest and a sampled one in turn (Yu & Huang 2019,
        arXiv:1903.05134, who take all three in one step).
        """
        if sampling == "sandwich" and step % 3 < 2:
            return self.minimal(layers) if step % 3 else self.maximal(layers)
        rng = random.Random(f"{seed}/ranks/{step}")
        return {name: rng.choice(ranks) for name, ranks in self.dimensions(layers).items()}

    def active_rank(self, matrix: str, ranks: Ranks) -> int:
        """The active rank of a matrix, by its name in the checkpoint; 0 for one without an adapter."""
        found = matrix_named(matrix)
        assert found is not None, matrix
        group = next((g.name for g in self.groups if found.module in g.modules), None)
        return ranks[f"l{found.block:02}.{group}"] if group else 0

    def parameters(self, ranks: Ranks, sizes: Mapping[str, tuple[int, int]]) -> int:
        """Weights of the adapters, R (I + O) of a matrix. sizes: {matrix: (O, I)}."""
        return sum(self.active_rank(name, ranks) * sum(size) for name, size in sizes.items())


@dataclass(frozen=True)
class SuperAdapter:
    """A LoRA training in which every optimizer step trains a slice that is sampled from a space."""

    space: Space
    sampling: str = "uniform"

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise unknown_name("sampling", self.sampling, SAMPLINGS)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SuperAdapter:
        groups = {group["name"]: group for group in config["space"]["groups"]}
        return cls(Space.from_groups(groups), config["sampling"])

    def as_config(self) -> dict[str, Any]:
        return asdict(self)


def check_space(space: Space, modules: Iterable[str], rank: int) -> None:
    """Raise `InputError` for a module that the model lacks, or a rank above the super-adapter's."""
    modules = set(modules)
    for group in space.groups:
        for module in group.modules:
            if module not in modules:
                raise unknown_name(f"module of the group {group.name!r}", module, modules)
        if group.ranks[0] > rank:
            raise InputError(
                f"no rank of a space may be above the super-adapter's, {rank}, the group {group.name!r} has "
                f"{group.ranks[0]}. Raise lora_rank, or lower the rank."
            )
