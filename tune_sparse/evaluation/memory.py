"""The memory of a cell, stage by stage, from sizes alone: before anything is loaded, and without the device.

Bytes of live tensors on the device. One copy of the weights lies there from load to score (docs/scale.md); all else of
the size of the model is streamed through it one matrix at a time. An allocator needs a margin above that.
Factors that say "counted" are the tensors of this code, of transformers' classes under SDPA attention and of autograd,
counted over models of several widths (tests/test_memory.py counts them again).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tune_sparse.config import Protocol
from tune_sparse.models.architectures import adapter_weights, architecture_named, matrix_sizes
from tune_sparse.models.architectures import pruned_weights as prunable_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.other_weights import all_weights, count_other_weights
from tune_sparse.modes import MODES
from tune_sparse.pruning.masks import structured_counts
from tune_sparse.pruning.methods import METHODS, Method
from tune_sparse.pruning.reconstruction import HELD_OUT_EVERY, SOLVED_AT_ONCE
from tune_sparse.pruning.scores import SCORES
from tune_sparse.schedules import ONE_SHOT, SCHEDULES
from tune_sparse.training.budgets import Budgets
from tune_sparse.training.cross_entropy import CHUNK_LOGITS

GIB = 1 << 30
CPU_PROCESS_BYTES, GPU_PROCESS_BYTES = GIB // 2, 3 * GIB
"""A worker's own memory on its host: Python, torch and its libraries, and with CUDA the driver's share."""

FLOAT, ADAMW_STATES = 4, 4
"""Bytes of a float32; a trained weight is kept with its gradient and both moments."""
PASS_LOGITS = 1 << 25
"""Logits that one pass without gradients holds at once, at most."""
LOGIT_BYTES, PASS_LOGIT_BYTES = 10, 8
"""A logit takes so much in training: itself and its softmax in float32, and that in the precision of the weights; and
in a pass without gradients: counted."""
SCORE_BYTES, ROW_SCORE_BYTES = 12, 16
"""A weight being scored and cut takes so much besides itself: counted; scores compared by row are sorted."""
UPDATED_BYTES = 14
"""A weight that SparseGPT updates takes so much besides itself: counted."""
SOLUTION_BYTES, SOLVING_BYTES = 5, 28
"""A weight's place in a mask and in a solution; and what it takes while its row is solved: counted."""
FACTOR_COPIES = 3
"""Of a Hessian while it is factorised, besides its sums: counted."""
MASK_UPDATE_BYTES = 20
"""A weight that is dropped and grown takes so much besides itself and its moments: counted."""
MASK_HISTORIES = 3
"""Bits of a weight that is trained itself, beside its mask: the mask that it began with, that of the last record, and
whether it ever revived."""
MASK_BYTES = 2
"""A weight's place in a mask, and in a comparison."""
VALIDATE_BYTES = 6
CHILD_PROCESS_BYTES, CPU_CHILD_COPIES, CHILD_COPIES = GIB, 3, 2
"""A child of Cerebras, and copies of the weights in float32 in one that trains on the CPU, and in another. Seen of a
135M model: 2.1 to 2.3 GB where it trains, 1.7 where it lowers; of a toy model 0.8, which is the process."""
PROBE_TOKENS = 2048
"""Tokens whose logits are compared before and after a merge that is exact: both, each once more while it is made."""


@dataclass(frozen=True)
class CellMemory:
    """A cell's memory: its model, how it is pruned and trained, and the precision of its weights."""

    dims: ModelDims
    mode: str
    method: str
    protocol: Protocol
    sparsity: float = 0.0
    schedule: str = ONE_SHOT

    def stages(self, budgets: Budgets) -> dict[str, int]:
        """{stage: the most bytes of live tensors on the device in it}, in the order of the stages."""
        kept = self.weights + self.masks
        return {
            "load": self.weights + self.largest * self.element,
            "prune": kept + self.pruning,
            "train": self.masks + self.training(budgets),
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
    def trains_smaller(self) -> bool:
        """Training is without masked heads and channels, as plain LoRA."""
        method, protocol = METHODS.get(self.method), self.protocol
        is_structured = method is not None and method.pattern == "structured"
        is_structured = is_structured and architecture_named(self.dims.architecture).heads_shrink
        return is_structured and MODES[self.mode].masks_update and protocol.may_train_smaller

    @property
    def in_training(self) -> CellMemory:
        """The same on the model that is trained, with the heads and channels that are left."""
        if not self.trains_smaller:
            return self
        dims = self.dims
        groups, channels = structured_counts(dims, self.sparsity)
        kv_heads = dims.num_kv_heads - groups
        heads, channels = kv_heads * dims.heads_per_group, dims.intermediate_size - channels
        return replace(self, dims=replace(dims, num_kv_heads=kv_heads, num_heads=heads, intermediate_size=channels))

    @property
    def masks_update(self) -> bool:
        """Its adapters build effective weights in training."""
        return MODES[self.mode].masks_update and not self.trains_smaller

    # Pruning

    @property
    def pruning(self) -> int:
        """Scores of one matrix, and what calibration keeps for them: never more than a block of statistics."""
        method = METHODS.get(self.method)
        if method is None:  # the dense baseline
            return 0
        return max(self._masking(method), self.recovering if self.protocol.recover != "none" else 0)

    def _masking(self, method: Method) -> int:
        scoring = self.largest * (ROW_SCORE_BYTES if SCORES[method.score].by_row else SCORE_BYTES)
        calibrating = self.calibrated_activations if method.is_calibrated else 0
        if method.needs.gradients:
            return max(scoring, self.gradients)
        if method.updates_weights:
            return calibrating + self.hessians + max(self.largest_hessian * FACTOR_COPIES, self.updating)
        return calibrating + scoring

    @property
    def recovering(self) -> int:
        """A block's pruned weights; sums of its inputs; one matrix with its dense weight, mask and solution, and the
        rows that are solved together; and what passes through the blocks, a part of it twice."""
        block = self.prunable // self.dims.num_layers * self.element
        solving = self.largest * (self.element + SOLUTION_BYTES) + min(self.largest, SOLVED_AT_ONCE) * SOLVING_BYTES
        return block + self.hessians + solving + self.calibrated_activations * (HELD_OUT_EVERY + 1) // HELD_OUT_EVERY

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
        """What a block reads, or in its place what it wrote, and the sines and cosines of the positions, for every
        calibration token; and one window within the block."""
        kept = (self.dims.hidden_size + 2 * self.dims.head_dim) * self.element
        return self.protocol.calibration_tokens * kept + self.calibration_window * self.pass_bytes

    @property
    def calibration_window(self) -> int:
        """Tokens of the longest window that calibration reads."""
        protocol = self.protocol
        return min(protocol.calibration_window, protocol.calibration_tokens, self.dims.max_positions)

    @property
    def gradients(self) -> int:
        """One window through the whole model and back, and the gradient of one matrix on its way to the host."""
        logits, window = self.dims.vocab_size * (self.element + FLOAT) * 2, self.calibration_window
        return window * (self.saved_bytes + self.backward_bytes + logits) + self.largest * (self.element + FLOAT)

    # Training

    def training(self, budgets: Budgets) -> int:
        """Everything beside the masks: a step, or what comes between two steps."""
        return max(self.step(budgets), self.selection_loss(budgets), self.mask_update)

    @property
    def mask_update(self) -> int:
        """What is trained, its new masks beside the old ones, and a matrix that is dropped and grown."""
        if MODES[self.mode].has_adapter:
            return 0
        return self.weights + self.trained + self.masks + self.largest * MASK_UPDATE_BYTES

    def step(self, budgets: Budgets) -> int:
        """The model, what is trained with its AdamW states, W_eff, activations, logits."""
        cell, tokens = self.in_training, budgets.micro_batch_tokens
        activations = tokens * cell.activation_bytes(budgets.activation_checkpointing)
        logits = LOGIT_BYTES * cell.logits_at_once(tokens)
        beside = cell.effective_weights(budgets) + activations + logits + cell.packed_masks(tokens)
        return cell.weights + cell.trained + beside

    def selection_loss(self, budgets: Budgets) -> int:
        """The model, what is trained without its gradients, and a pass."""
        cell, tokens = self.in_training, budgets.scoring_tokens
        states = cell.trained - FLOAT * (cell.trainable + cell.also)
        built = cell.effective_weights(replace(budgets, keeps_effective_weights=False))
        return cell.weights + states + built + cell.likelihoods(tokens) + cell.packed_masks(tokens)

    def logits_at_once(self, tokens: int) -> int:
        """Logits of a step that are held together; a head that is trained wants all of them."""
        head = {"head", "embeddings"} if self.dims.tied_embeddings else {"head"}
        whole = tokens * self.dims.vocab_size
        return whole if head & set(self.protocol.train_also) else min(CHUNK_LOGITS, whole)

    @property
    def also(self) -> int:
        """Weights that are trained beside the pruned matrices or their adapters."""
        return count_other_weights(self.dims, self.protocol.train_also)

    @property
    def trainable(self) -> int:
        """Weights of pruned matrices or adapters that are trained."""
        return adapter_weights(self.dims, self.protocol.lora_rank) if MODES[self.mode].has_adapter else self.prunable

    @property
    def trained(self) -> int:
        """Adapters in float32 with gradients and moments; or the prunable weights themselves, made float32 in place of
        their own precision, and once more in bfloat16, which autocast keeps from forward to backward. What is trained
        beside them is copied to float32, and keeps gradient and moments."""
        also = (FLOAT * ADAMW_STATES - self._shared_with_copies) * self.also
        if MODES[self.mode].has_adapter:
            return FLOAT * ADAMW_STATES * self.trainable + also
        widened = FLOAT * ADAMW_STATES - self.element
        cast = self.element if self.element != FLOAT else 0
        beside = self.largest * (self.element + 1) + MASK_HISTORIES * self.masks
        return (widened + cast) * self.trainable + beside + also

    @property
    def _shared_with_copies(self) -> int:
        """Bytes of a weight of the model that is its own float32 copy."""
        return FLOAT if self.element == FLOAT else 0

    def effective_weights(self, budgets: Budgets) -> int:
        """One matrix and its mask as numbers, or all that are kept for the step; plain LoRA builds none."""
        if not self.masks_update:
            return 0
        kept = self.prunable if budgets.keeps_effective_weights else 0
        return (2 * self.largest + kept) * self.element

    def packed_masks(self, tokens: int) -> int:
        """Which token of a packed sequence attends to which, as bools and as numbers."""
        return tokens * self.longest * (1 + self.element) if self.protocol.packing else 0

    def activation_bytes(self, checkpointing: bool) -> int:
        """Of each token in a training step. With checkpointing a block keeps what it reads, and one block is whole."""
        kept = self.saved_bytes // self.dims.num_layers
        inputs = self.dims.num_layers * self.dims.hidden_size * self.element
        blocks, one = (inputs, kept) if checkpointing else (self.saved_bytes, 0)
        return blocks + max(one + self.backward_bytes, self.norm_bytes)

    @property
    def saved_bytes(self) -> int:
        """What autograd saves of a token in all blocks: counted.

        In the precision of the weights: both normed inputs, queries, attention's output, keys, values, what the
        feed-forward part keeps of its channels, and A x of each matrix; both inputs of the norms, and their means and
        scales, which RMS norms keep in float32; and a number of each head in float32.
        """
        d, entry = self.dims, architecture_named(self.dims.architecture)
        channels = entry.saved_channels * d.intermediate_size * d.experts_per_token
        adapted = MODES[self.mode].has_adapter and not self.masks_update
        factors = len(entry.layers) * self.protocol.lora_rank if adapted else 0
        own = 2 * d.hidden_size + 2 * d.query_rows + 2 * d.key_rows + channels + factors
        norms = (2 * d.hidden_size + 2 * entry.vectors_of_norm) * (
            FLOAT if entry.vectors_of_norm == 1 else self.element
        )
        return d.num_layers * (own * self.element + norms + FLOAT * d.num_heads)

    @property
    def backward_bytes(self) -> int:
        """Gradients of a token within a block, beside what was saved: counted."""
        d = self.dims
        channels = architecture_named(d.architecture).backward_channels * d.intermediate_size * d.experts_per_token
        return (3 * d.hidden_size + 3 * d.key_rows + int(channels)) * self.element

    @property
    def norm_bytes(self) -> int:
        """The last norm of a token and its gradients, in float32: counted."""
        return self.dims.hidden_size * (4 * FLOAT + self.element)

    # Scoring

    @property
    def merging(self) -> int:
        """One matrix, dense and merged and its mask as bools and as numbers, with the trained weights still there."""
        trained = self.trainable * (FLOAT if MODES[self.mode].has_adapter else FLOAT - self.element)
        trained += (FLOAT - self._shared_with_copies) * self.also
        probe = PROBE_TOKENS * self.dims.vocab_size * 4 * self.element
        return trained + max(self.largest * (3 * self.element + MASK_BYTES), probe)

    def scoring(self, budgets: Budgets) -> int:
        """The larger of a pass for likelihoods and of a batch of answers."""
        return max(self.likelihoods(budgets.scoring_tokens), budgets.generation_tokens * self.generation_bytes)

    def scores_within(self, budgets: Budgets, room: int) -> bool:
        """Whether passes without gradients fit, also those of a training."""
        stages = self.stages(budgets)
        return max(stages["score"], self.masks + self.selection_loss(budgets)) <= room

    def likelihoods(self, tokens: int) -> int:
        """A pass over texts, and the logits that are read."""
        return tokens * self.pass_bytes + PASS_LOGIT_BYTES * min(PASS_LOGITS, tokens * self.dims.vocab_size)

    @property
    def pass_bytes(self) -> int:
        """Of a token within a block, without gradients: counted."""
        d = self.dims
        channels = architecture_named(d.architecture).passed_channels * d.intermediate_size * d.experts_per_token
        return (4 * d.hidden_size + 3 * d.key_rows + channels) * self.element

    @property
    def generation_bytes(self) -> int:
        """Of a token of prompt or answer: its keys and values in every layer, and the pass that reads the prompt."""
        return self.cache_bytes + self.pass_bytes

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a token in every layer."""
        return 2 * self.dims.num_layers * self.dims.key_rows * self.element

    # Beside the device

    @property
    def steps_at_zero(self) -> int:
        """The step since which each weight is zero, on the host: a bit for each binary digit of a step."""
        changes = SCHEDULES[self.schedule].planner is not None
        return self.protocol.steps.bit_length() * self.masks if changes else 0

    def host_bytes(self, budgets: Budgets, on_gpu: bool) -> int:
        """What a trial takes of its host's memory: a process; one float32 sum of gradients where a method wants it, or
        the history of masks that change; and without a GPU everything else. Pages of the mapped checkpoint do not
        count: they can be dropped."""
        method = METHODS.get(self.method)
        beside = FLOAT * self.prunable if method and method.needs.gradients else self.steps_at_zero
        return beside + (GPU_PROCESS_BYTES if on_gpu else CPU_PROCESS_BYTES + self.peak(budgets))

    def cerebras_host_bytes(self, budgets: Budgets, on_gpu: bool, target: str) -> int:
        """The same of a trial that Cerebras trains, which takes the first loss and no step, and of its child. What a
        step on the CPU target takes there for activations is left out."""
        widened = 0 if MODES[self.mode].has_adapter else (FLOAT - self.element) * self.trainable
        first_loss = self.masks + self.weights + widened + self.likelihoods(budgets.scoring_tokens)
        device = max((self.stages(budgets) | {"train": first_loss}).values())
        weights = FLOAT * all_weights(self.dims)
        child = CHILD_COPIES * weights
        if target == "cpu":
            child = CPU_CHILD_COPIES * weights + FLOAT * (ADAMW_STATES - 1) * self.trainable
        return child + CHILD_PROCESS_BYTES + (GPU_PROCESS_BYTES if on_gpu else CPU_PROCESS_BYTES + device)

    @property
    def checkpoint_bytes(self) -> int:
        """An unfinished training on disk: what is trained and both moments, and masks with their history, the new one
        beside the old for a moment."""
        history = 0 if MODES[self.mode].has_adapter else 2 * self.masks
        history += self.masks + self.steps_at_zero if self.steps_at_zero else 0
        return 2 * (3 * FLOAT * (self.trainable + self.also) + history)
