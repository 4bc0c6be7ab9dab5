"""The budgets of a card: the largest with which a cell fits, by the formula of its memory."""

from __future__ import annotations

from dataclasses import replace

from tune_sparse.config import BudgetOptions, Protocol
from tune_sparse.errors import TooLargeError
from tune_sparse.evaluation.memory import GIB, CellMemory
from tune_sparse.models.dims import ModelDims
from tune_sparse.modes import DENSE, MODES
from tune_sparse.training.budgets import Budgets, fixed_micro_batch_tokens

NO_OPTIONS = BudgetOptions()
CONTEXT_BYTES = 1 * GIB
"""A process takes so much of a GPU before it allocates anything: the context, and the kernels of its libraries."""
MARGIN = 0.05
"""Of what a trial may use, left to fragments and to the workspaces of matrix products."""

MICRO_BATCH_TOKENS = (8192, 4096, 2048, 1024)
"""Budgets that are tried, the largest first. More tokens than that compute no faster: the products are large enough,
and what is rebuilt once a micro-batch is less than a sixth of its time."""
WORTHWHILE_TOKENS = 4096
"""Where so many tokens fit only with checkpointing, it costs less than smaller micro-batches would."""
SCORING_TOKENS = (32768, 16384, 8192, 4096, 2048, 1024)
GENERATION_TOKENS, GENERATION_STEP = 131_072, 1024


def usable(card_bytes: int, share: float = 1.0) -> int:
    """What a trial with a share of a card can fill with tensors: less the context, and a margin."""
    return max(0, int((card_bytes * share - CONTEXT_BYTES) * (1 - MARGIN)))


def least_card_bytes(cell: CellMemory, options: BudgetOptions = NO_OPTIONS) -> int:
    """Memory of the smallest card that holds a cell."""
    return round(cell.peak(smallest_budgets(cell, options)) / (1 - MARGIN)) + CONTEXT_BYTES


def budgets_for(
    card_bytes: int,
    share: float,
    cell: CellMemory,
    options: BudgetOptions = NO_OPTIONS,
) -> Budgets:
    """The largest sensible budgets of a cell on a card, from its total memory and the trial's share of it.

    options: what a user set of them. Raises `TooLargeError`, which says what would fit, where the smallest do not.
    """
    fixed = fixed_micro_batch_tokens(cell.protocol, options)
    options = replace(options, micro_batch_tokens=fixed or options.micro_batch_tokens)
    found = _largest_budgets(cell, usable(card_bytes, share), options)
    if found is None:
        raise TooLargeError(_refusal(cell, card_bytes, share, options))
    return found


def scoring_budgets(card_bytes: int, share: float, dims: ModelDims, protocol: Protocol) -> Budgets:
    """As `budgets_for`, of a model that is scored, and neither pruned nor trained."""
    cell, room = CellMemory(dims, DENSE, "none", protocol), usable(card_bytes, share)
    least = smallest_budgets(cell)
    if (needed := cell.weights + cell.scoring(least)) > room:
        raise TooLargeError(
            f"a device must hold a model to score it: in {protocol.precision} {needed / 1e9:.1f} GB, it has room for "
            f"{room / 1e9:.1f}. Take a larger card, or hide it with CUDA_VISIBLE_DEVICES= to score on the CPU."
        )
    return _with_passes(least, cell, room + cell.masks)  # it has none


def smallest_budgets(cell: CellMemory, options: BudgetOptions = NO_OPTIONS) -> Budgets:
    """One example of the longest at a time, where a user set nothing else."""
    return Budgets(cell.longest, cell.longest, cell.longest, True, False).changed_by(options)


def _largest_budgets(cell: CellMemory, room: int, options: BudgetOptions) -> Budgets | None:
    least = smallest_budgets(cell, options)
    if cell.peak(least) > room:
        return None
    fitting = (trial for trial in _trainings(cell, options) if cell.stages(trial)["train"] <= room)
    return _with_passes(next(fitting, least), cell, room).changed_by(options)


def _with_passes(budgets: Budgets, cell: CellMemory, room: int) -> Budgets:
    """With the largest passes of scoring, and of writing answers, that have room."""
    passes = (replace(smallest_budgets(cell), scoring_tokens=tokens) for tokens in SCORING_TOKENS)
    scoring = (trial.scoring_tokens for trial in passes if cell.scores_within(trial, room))
    kept = cell.weights + cell.masks
    generation = (room - kept) // cell.generation_bytes // GENERATION_STEP * GENERATION_STEP
    return replace(
        budgets,
        scoring_tokens=max(next(scoring, 0), cell.longest),
        generation_tokens=max(min(generation, GENERATION_TOKENS), cell.longest),
    )


def _trainings(cell: CellMemory, options: BudgetOptions) -> list[Budgets]:
    """Budgets of a training by preference: without checkpointing where the micro-batch stays worthwhile, and W_eff kept
    where it has room."""
    sizes = [tokens for tokens in MICRO_BATCH_TOKENS if tokens >= cell.longest] or [cell.longest]
    plain = [tokens for tokens in sizes if tokens >= WORTHWHILE_TOKENS] or sizes[:1]
    trials = (
        Budgets(tokens, cell.longest, cell.longest, checkpointing, keeps)
        for checkpointing, chosen in ((False, plain), (True, sizes))
        for tokens in chosen
        for keeps in ((True, False) if cell.masks_update else (False,))
    )
    return [trial.changed_by(options) for trial in trials]


def _refusal(cell: CellMemory, card_bytes: int, share: float, options: BudgetOptions) -> str:
    stages, needed = cell.stages(smallest_budgets(cell, options)), least_card_bytes(cell, options)
    stage = max(stages, key=stages.__getitem__)
    part = f", {share:g} of a card of {card_bytes / 1e9:.1f}" if share < 1 else ""
    return (
        f"a device must hold a cell: {cell.mode} with {cell.method} in {cell.protocol.precision} needs "
        f"{needed / 1e9:.1f} GB (stage {stage}), it has {card_bytes * share / 1e9:.1f} GB{part}. "
        f"{_fixes(cell, card_bytes, share, options)}"
    )


def _fixes(cell: CellMemory, card_bytes: int, share: float, options: BudgetOptions) -> str:
    """The settings of which one alone would make the cell fit."""
    protocol, room = cell.protocol, usable(card_bytes, share)
    tokens, window = protocol.calibration_tokens, cell.calibration_window
    changes = {
        "set precision=bfloat16": replace(protocol, precision="bfloat16"),
        **{f"set max_tokens={n}": replace(protocol, max_tokens=n) for n in (1024, 512) if n < cell.longest},
        **{f"set calibration_tokens={n}": replace(protocol, calibration_tokens=n) for n in (65536,) if n < tokens},
        **{f"set calibration_window={n}": replace(protocol, calibration_window=n) for n in (512,) if n < window},
    }
    found = ["leave the budgets to the program"] if options != NO_OPTIONS and _fits(cell, room) else []
    found += ["raise --gpus-per-trial"] if share < 1 and _fits(cell, usable(card_bytes)) else []
    for text, changed in changes.items():
        if changed != protocol and changed.max_new_tokens < changed.max_tokens:
            found += [text] if _fits(replace(cell, protocol=changed), room) else []
    if not MODES[cell.mode].has_adapter:
        found.append(f"leave out the mode {cell.mode}")
    text = ", or ".join(found) or "take a larger card"
    return f"{text[0].upper()}{text[1:]}."


def _fits(cell: CellMemory, room: int) -> bool:
    return cell.peak(smallest_budgets(cell)) <= room
