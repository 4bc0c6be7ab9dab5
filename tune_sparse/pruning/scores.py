"""Scores: the importance of each weight of one matrix; the lowest are pruned first.

Scores are finite and not negative. weight: (O, I); the result has its shape. A new score is a function and an entry
in `SCORES`: methods, calibration and checks follow from the entry. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScoreInputs:
    """A score reads these besides the weight; calibration measures what the score's entry needs."""

    name: str
    """The matrix."""
    seed: int = 0
    input_norms: Tensor | None = None
    """(I,): L2 norm of each input over all calibration tokens."""
    gradients: Tensor | None = None
    """(O, I): sum over calibration examples of |g|, g the gradient of the example's loss."""


def magnitude(weight: Tensor, inputs: ScoreInputs) -> Tensor:
    """|w| (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs()


def random(weight: Tensor, inputs: ScoreInputs) -> Tensor:
    """Uniform in [0, 1), the same for one (seed, matrix name) on every machine and in any order of the matrices."""
    from tune_sparse.pruning.seeded import seeded_uniform

    return seeded_uniform(weight.shape, f"{inputs.seed}/{inputs.name}").to(weight.device)


def gradient(weight: Tensor, inputs: ScoreInputs) -> Tensor:
    """Σ |g| over the calibration examples."""
    assert inputs.gradients is not None
    return inputs.gradients


def taylor(weight: Tensor, inputs: ScoreInputs) -> Tensor:
    """Σ |w g| over the calibration examples: the first-order change of each loss if the weight were 0
    (Molchanov et al. 2017, arXiv:1611.06440, eq. 7)."""
    assert inputs.gradients is not None
    return weight.abs() * inputs.gradients


def wanda(weight: Tensor, inputs: ScoreInputs) -> Tensor:
    """|w| ‖x‖ (Sun et al. 2023, arXiv:2306.11695, eq. 1)."""
    assert inputs.input_norms is not None
    return weight.abs() * inputs.input_norms


@dataclass(frozen=True)
class Needs:
    """Needs of a score besides the weight and its name."""

    seed: bool = False
    input_norms: bool = False
    """Calibration: the L2 norm of each input."""
    gradients: bool = False
    """Calibration: sums of |gradient| for each weight."""
    hessian: bool = False
    """Calibration: the Hessian of the layer's output error, by which the kept weights are updated."""


@dataclass(frozen=True)
class Score:
    """An entry of the table."""

    compute: Callable[[Tensor, ScoreInputs], Tensor] | None
    """None where `sparsegpt` scores column by column, as it updates the weights."""
    needs: Needs = Needs()
    about: str = ""
    """For a help: which weights go."""
    by_row: bool = False
    """Scores compare within an output row: each row loses the same number of weights."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """{allocation or pattern that makes no sense with this score: why}"""


SCORES = {
    "magnitude": Score(magnitude, about="prunes the smallest weights |w|"),
    "random": Score(random, Needs(seed=True), "prunes weights at random"),
    "gradient": Score(gradient, Needs(gradients=True), "prunes the weights with the smallest gradients |g|"),
    "taylor": Score(taylor, Needs(gradients=True), "prunes the smallest products of weight and gradient |w g|"),
    "wanda": Score(
        wanda,
        Needs(input_norms=True),
        "prunes the smallest products of weight and norm of its inputs |w| ‖x‖, in each row of a matrix",
        by_row=True,
        refuses={"global": "Wanda's scores compare within an output row, not between layers"},
    ),
    "sparsegpt": Score(
        None,
        Needs(hessian=True),
        "prunes what changes the outputs of a layer least, and adjusts the kept weights",
        refuses={
            "global": "SparseGPT's errors compare within one layer, whose weights it updates",
            "structured": "SparseGPT spreads the error of single weights over their row, a removed channel has no "
            "row left",
        },
    ),
}
