"""The memory of a cell, stage by stage, from sizes alone: before anything is loaded, and without the device.

Bytes of live tensors on the device. One copy of the weights lies there from load to score (docs/scale.md); all else of
the size of the model is streamed through it one matrix at a time. An allocator needs a margin above it, see `usable`.
Factors that say "counted" are the tensors of this code, of transformers' Llama under SDPA attention and of autograd,
counted over models of several widths (tests/test_memory.py counts them again).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tune_sparse.config import BudgetOptions, Protocol
from tune_sparse.errors import TooLargeError
from tune_sparse.models.architectures import adapter_weights, all_weights, architecture_named, matrix_sizes
from tune_sparse.models.architectures import pruned_weights as prunable_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.modes import DENSE, MODES
from tune_sparse.pruning.methods import METHODS
from tune_sparse.pruning.scores import SCORES
from tune_sparse.training.budgets import Budgets, fixed_micro_batch_tokens
from tune_sparse.training.cross_entropy import CHUNK_LOGITS

GIB = 1 << 30
NO_OPTIONS = BudgetOptions()
CONTEXT_BYTES = 1 * GIB
"""A process takes so much of a GPU before it allocates anything: the context, and the kernels of its libraries."""
CPU_PROCESS_BYTES, GPU_PROCESS_BYTES = GIB // 2, 3 * GIB
"""A worker's own memory on its host: Python, torch and its libraries, and with CUDA the driver's share."""
MARGIN = 0.05
"""Of what a trial may use, left to fragments and to the workspaces of matrix products."""

FLOAT, ADAMW_STATES = 4, 4
"""Bytes of a float32; a trained weight is kept with its gradient and both moments."""
PASS_LOGITS_BYTES = 1 << 27
"""The logits in float32 that one scoring pass holds at once."""
LOGITS_COPIES = 4
"""Logits, their softmax and its gradient, in float32 and in the precision of the weights: counted."""
SCORE_BYTES, ROW_SCORE_BYTES = 12, 16
"""A weight being scored and cut takes so much besides itself: counted; scores compared by row are sorted."""
UPDATED_BYTES = 14
"""A weight that SparseGPT updates takes so much besides itself: counted."""
FACTOR_COPIES = 3
"""Of a Hessian while it is factorised, besides its sums: counted."""
MERGE_BYTES = 16
"""A weight being merged: the dense one, the merged one, its mask, and the update before and after it was rounded."""
VALIDATE_BYTES = 6
PROBE_TOKENS = 2048
"""Tokens whose logits are compared before and after the merge: both, one of them being put together, and in float32."""

MICRO_BATCH_TOKENS = (8192, 4096, 2048, 1024)
"""Budgets that are tried, the largest first. More tokens than that compute no faster: the products are large enough,
and what is rebuilt once a micro-batch is less than a sixth of its time."""
WORTHWHILE_TOKENS = 4096
"""Where so many tokens fit only with checkpointing, it costs less than smaller micro-batches would."""
SCORING_TOKENS = (32768, 16384, 8192, 4096, 2048, 1024)
GENERATION_TOKENS, GENERATION_STEP = 131_072, 1024


@dataclass(frozen=True)
class CellMemory:
    """A cell's memory: its model, how it is pruned and trained, and the precision of its weights."""

    dims: ModelDims
    mode: str
    method: str
    protocol: Protocol

    def stages(self, budgets: Budgets) -> dict[str, int]:
        """{stage: the most bytes of live tensors on the device in it}, in the order of the stages."""
        kept = self.weights + self.masks
        return {
            "load": self.weights + self.largest * self.element,
            "prune": kept + self.pruning,
            "train": kept + self.training(budgets),
            "merge": kept + self.merging,
            "score": kept + self.scoring(budgets),
            "validate": kept + self.largest * (self.element + VALIDATE_BYTES),
        }

    def peak(self, budgets: Budgets) -> int:
        return max(self.stages(budgets).values())

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return self.protocol.weight_bytes

    @property
    def weights(self) -> int:
        """The one copy."""
        return self.element * all_weights(self.dims)

    @property
    def prunable(self) -> int:
        return prunable_weights(self.dims)

    @property
    def masks(self) -> int:
        """As bits."""
        return -(-self.prunable // 8)

    @property
    def largest(self) -> int:
        """Weights of the largest matrix."""
        return max(rows * columns for rows, columns in matrix_sizes(self.dims).values())

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return min(self.protocol.max_tokens, self.dims.max_positions)

    @property
    def masks_update(self) -> bool:
        return MODES[self.mode].masks_update

    # Pruning

    @property
    def pruning(self) -> int:
        """Scores of one matrix, and what calibration keeps for them: never more than a block of statistics."""
        method = METHODS.get(self.method)
        if method is None:  # the dense baseline
            return 0
        scoring = self.largest * (ROW_SCORE_BYTES if SCORES[method.score].by_row else SCORE_BYTES)
        calibrating = self.calibrated_activations if method.is_calibrated else 0
        if method.needs.gradients:
            return max(scoring, self.gradients)
        if method.updates_weights:
            return calibrating + self.hessians + max(self.largest_hessian * FACTOR_COPIES, self.updating)
        return calibrating + scoring

    @property
    def updating(self) -> int:
        return self.largest * (self.element + UPDATED_BYTES)

    @property
    def _input_widths(self) -> list[int]:
        """Inputs of the matrices of one block; matrices that read the same one share it."""
        matrices = architecture_named(self.dims.architecture).expected(self.dims)
        inputs = {matrix.input_key: matrix.size(self.dims)[1] for matrix in matrices if matrix.block == 0}
        return list(inputs.values())

    @property
    def hessians(self) -> int:
        """Sums of one block in float32."""
        return FLOAT * sum(width**2 for width in self._input_widths)

    @property
    def largest_hessian(self) -> int:
        return FLOAT * max(self._input_widths) ** 2

    @property
    def calibrated_activations(self) -> int:
        """What a block reads and what it writes, for every calibration example, and one example within the block."""
        protocol = self.protocol
        tokens = self.longest if protocol.calibration == "task" else protocol.calibration_tokens
        tokens = min(tokens, self.dims.max_positions)
        kept = 2 * protocol.calibration_examples * self.dims.hidden_size * self.element
        return tokens * (kept + self.pass_bytes)

    @property
    def gradients(self) -> int:
        """One example through the whole model and back, and the gradient of one matrix on its way to the host."""
        logits = self.dims.vocab_size * (self.element + FLOAT) * 2
        return self.longest * (self.saved_bytes + self.backward_bytes + logits) + self.largest * (self.element + FLOAT)

    # Training

    def training(self, budgets: Budgets) -> int:
        """Everything beside weights and masks: what is trained with its AdamW states, W_eff, activations, logits."""
        activations = budgets.micro_batch_tokens * self.activation_bytes(budgets.activation_checkpointing)
        logits = LOGITS_COPIES * FLOAT * min(CHUNK_LOGITS, budgets.micro_batch_tokens * self.dims.vocab_size)
        return self.trained + self.effective_weights(budgets) + activations + logits + self.packed_masks(budgets)

    @property
    def trained(self) -> int:
        """Adapters in float32 with gradients and moments; or the prunable weights themselves, made float32 in place of
        their own precision, and once more in bfloat16, which autocast keeps from forward to backward."""
        if MODES[self.mode].has_adapter:
            return FLOAT * ADAMW_STATES * adapter_weights(self.dims, self.protocol.lora_rank)
        widened = FLOAT * ADAMW_STATES - self.element
        cast = self.element if self.element != FLOAT else 0
        return (widened + cast) * self.prunable + self.largest * (self.element + 1)

    def effective_weights(self, budgets: Budgets) -> int:
        """One matrix and its mask as numbers, or every matrix where they are kept for the step."""
        if not MODES[self.mode].has_adapter:
            return 0
        keeps = self.masks_update and budgets.keeps_effective_weights
        return 2 * self.largest * self.element + (self.prunable * self.element if keeps else 0)

    def packed_masks(self, budgets: Budgets) -> int:
        """Which token of a packed sequence attends to which, as bools and as numbers."""
        return budgets.micro_batch_tokens * self.longest * (1 + self.element) if self.protocol.packing else 0

    def activation_bytes(self, checkpointing: bool) -> int:
        """Of each token in a training step. With checkpointing a block keeps what it reads, and one block is whole."""
        kept = self.saved_bytes // self.dims.num_layers
        inputs = self.dims.num_layers * self.dims.hidden_size * self.element
        blocks, one = (inputs, kept) if checkpointing else (self.saved_bytes, 0)
        return blocks + max(one + self.backward_bytes, self.norm_bytes)

    @property
    def saved_bytes(self) -> int:
        """What autograd saves of a token in all blocks: counted.

        In the precision of the weights: both normed inputs, queries, attention's output, keys, values, gate, up, its
        activation, their product, and A x of each matrix; in float32: both inputs of the norms, and three numbers.
        """
        d = self.dims
        channels = 4 * d.intermediate_size * d.experts_per_token
        factors = 7 * self.protocol.lora_rank if MODES[self.mode].has_adapter and not self.masks_update else 0
        own = 2 * d.hidden_size + 2 * d.query_rows + 2 * d.key_rows + channels + factors
        return d.num_layers * (own * self.element + FLOAT * (2 * d.hidden_size + d.num_heads + 2))

    @property
    def backward_bytes(self) -> int:
        """Gradients of a token within a block, beside what was saved: counted."""
        d = self.dims
        return (3 * d.hidden_size + 3 * d.key_rows + 3 * d.intermediate_size * d.experts_per_token // 2) * self.element

    @property
    def norm_bytes(self) -> int:
        """The last norm of a token and its gradients, in float32: counted."""
        return self.dims.hidden_size * (4 * FLOAT + self.element)

    # Scoring

    @property
    def merging(self) -> int:
        """One matrix, with the trained weights still there."""
        trained = adapter_weights(self.dims, self.protocol.lora_rank) * FLOAT
        if not MODES[self.mode].has_adapter:
            trained = (FLOAT - self.element) * self.prunable
        probe = PROBE_TOKENS * self.dims.vocab_size * 3 * (self.element + FLOAT)
        return trained + max(self.largest * MERGE_BYTES, probe)

    def scoring(self, budgets: Budgets) -> int:
        """The larger of a pass for likelihoods and of a batch of answers."""
        likelihoods = budgets.scoring_tokens * self.pass_bytes + LOGITS_COPIES * PASS_LOGITS_BYTES
        return max(likelihoods, budgets.generation_tokens * self.generation_bytes)

    @property
    def pass_bytes(self) -> int:
        """Of a token within a block, without gradients: counted."""
        d = self.dims
        return (4 * d.hidden_size + 3 * d.key_rows + 3 * d.intermediate_size * d.experts_per_token) * self.element

    @property
    def generation_bytes(self) -> int:
        """Of a token of prompt or answer: its keys and values in every layer, and the pass that reads the prompt."""
        return self.cache_bytes + self.pass_bytes

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a token in every layer."""
        return 2 * self.dims.num_layers * self.dims.key_rows * self.element

    # Beside the device

    def host_bytes(self, budgets: Budgets, on_gpu: bool) -> int:
        """What a trial takes of its host's memory: a process, one float32 sum of gradients where a method wants it, and
        without a GPU everything else. Pages of the mapped checkpoint do not count: they can be dropped."""
        method = METHODS.get(self.method)
        gradients = FLOAT * self.prunable if method and method.needs.gradients else 0
        return gradients + (GPU_PROCESS_BYTES if on_gpu else CPU_PROCESS_BYTES + self.peak(budgets))

    @property
    def checkpoint_bytes(self) -> int:
        """An unfinished training on disk: what is trained and both moments, the new one beside the old for a moment."""
        trained = adapter_weights(self.dims, self.protocol.lora_rank)
        return 2 * 3 * FLOAT * (trained if MODES[self.mode].has_adapter else self.prunable)


def usable(card_bytes: int, share: float = 1.0) -> int:
    """What a trial with a share of a card can fill with tensors: less the context, and a margin."""
    return max(0, int((card_bytes * share - CONTEXT_BYTES) * (1 - MARGIN)))


def least_card_bytes(cell: CellMemory, options: BudgetOptions = NO_OPTIONS) -> int:
    """Memory of the smallest card that holds a cell."""
    return round(cell.peak(smallest_budgets(cell, options)) / (1 - MARGIN)) + CONTEXT_BYTES


def budgets_for(
    card_bytes: int,
    share: float,
    dims: ModelDims,
    mode: str,
    method: str,
    protocol: Protocol,
    options: BudgetOptions = NO_OPTIONS,
) -> Budgets:
    """The largest sensible budgets of a cell on a card, from its total memory and the trial's share of it.

    options: what a user set of them. Raises `TooLargeError`, which says what would fit, where the smallest do not.
    """
    cell = CellMemory(dims, mode, method, protocol)
    fixed = fixed_micro_batch_tokens(protocol, options)
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
    kept = cell.weights + cell.masks
    passes = (replace(smallest_budgets(cell), scoring_tokens=tokens) for tokens in SCORING_TOKENS)
    scoring = (trial.scoring_tokens for trial in passes if kept + cell.scoring(trial) <= room)
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
    changes = {
        "set precision=bfloat16": replace(protocol, precision="bfloat16"),
        **{f"set max_tokens={n}": replace(protocol, max_tokens=n) for n in (1024, 512) if n < cell.longest},
        "set calibration_examples=32": replace(protocol, calibration_examples=32),
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
