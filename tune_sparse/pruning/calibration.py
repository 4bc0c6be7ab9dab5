"""Statistics of a model on calibration examples: the inputs of its matrices block by block, and its gradients.

An example is a window of a text, or of a task's examples that lie behind one another; every token of it counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any
from typing import Protocol as Interface

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tune_sparse.data.batching import example_tokens
from tune_sparse.data.splits import Encoded
from tune_sparse.errors import InputError
from tune_sparse.models.architectures import (
    Matrix,
    architecture_named,
    list_blocks,
    list_matrices,
    read_weights,
    unfused,
)
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.float_bits import is_finite
from tune_sparse.pruning.methods import ENOUGH_TOKENS_PER_INPUT, method_named
from tune_sparse.watchdog import heartbeat

ORDER_SEED = 0
"""Of the examples that scores are calibrated on. Not a cell's seed: cells of a task are calibrated on the same ones."""

InputKey = tuple[int, int | None, str]
"""Names the input of a matrix, see `Matrix.input_key`."""

BlockArgs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block besides the hidden states: by position and by name."""


@dataclass
class InputStats:
    """Sums over the tokens that a matrix read: of squares (I,), and of products (I, I) where they are wanted."""

    wants_hessian: bool
    tokens: int = 0
    squares: Tensor | None = None
    products: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: (tokens, I)."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.tokens += len(x)
        squares = x.square().sum(dim=0)
        self.squares = squares if self.squares is None else self.squares + squares
        if self.wants_hessian:
            if self.products is None:
                self.products = x.new_zeros(x.shape[1], x.shape[1])
            self.products.addmm_(x.T, x)

    @property
    def norms(self) -> Tensor:
        """L2 norm of each input over all tokens: (I,)."""
        assert self.squares is not None
        return self.squares.sqrt()

    @property
    def dead(self) -> Tensor:
        """Which inputs are 0 for every token: (I,)."""
        assert self.squares is not None
        return self.squares == 0

    def take_hessian(self) -> Tensor:
        """2/n Σ x xᵀ of the output error: (I, I). It is given away: the sums of products are gone after that."""
        products, self.products = self.products, None
        assert products is not None
        return products.mul_(2 / self.tokens)


@dataclass(frozen=True)
class CalibrationStats:
    """Statistics that the scores use, by input and by matrix."""

    norms: dict[InputKey, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """{matrix: Σ |g| in the checkpoint's layout}, in the memory of the host"""
    outliers: tuple[float, ...] = ()
    """OWL's fraction of outliers of each block."""


class Blocks(Interface):
    """A model as a row of blocks: whole in memory, or one block at a time."""

    @property
    def matrices(self) -> Sequence[Matrix]: ...

    @property
    def count(self) -> int: ...

    def block(self, number: int) -> nn.Module:
        """A block, ready to compute."""

    def weights(self, number: int) -> Mapping[str, Tensor]:
        """Its matrices by checkpoint name; writing into one writes into the block."""

    def embed(self, ids: Tensor) -> None:
        """Compute up to the first block, which is called."""

    def whole(self) -> Any:
        """The model in memory."""


class ModelBlocks:
    """The blocks of a model in memory."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.matrices = list_matrices(model)
        self._blocks, self._weights = list_blocks(model), read_weights(model)

    @property
    def count(self) -> int:
        return len(self._blocks)

    def block(self, number: int) -> nn.Module:
        return self._blocks[number]

    def weights(self, number: int) -> Mapping[str, Tensor]:
        return {m.name: self._weights[m.name] for m in self.matrices if m.block == number}

    def embed(self, ids: Tensor) -> None:
        self.model(input_ids=ids.to(self.model.device), use_cache=False)

    def whole(self) -> Any:
        return self.model


class _ReachedError(Exception):
    """The first block was called."""


@torch.no_grad()
def first_inputs(blocks: Blocks, examples: Sequence[Encoded]) -> tuple[list[Tensor], list[BlockArgs]]:
    """Arguments of the first block for each example: hidden states (1, T, hidden), and the others."""
    hidden: list[Tensor] = []
    others: list[BlockArgs] = []

    def reached(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append(arguments[0])
        others.append((arguments[1:], named))
        raise _ReachedError

    hook = blocks.block(0).register_forward_pre_hook(reached, with_kwargs=True)
    try:
        for example in examples:
            try:
                blocks.embed(torch.tensor([example.context + example.continuation]))
            except _ReachedError:
                continue
    finally:
        hook.remove()
    return hidden, others


@torch.no_grad()
def calibrate_blockwise(
    blocks: Blocks, examples: Sequence[Encoded], wants_hessians: bool = False, sequential: bool = False
) -> Iterator[tuple[int, dict[InputKey, InputStats]]]:
    """The inputs of each block's matrices, block after block.

    With `sequential`, what the caller writes into the block's weights before it asks for the next one is what the
    next block reads, as SparseGPT and Wanda were published; else every block reads what the dense model computes.
    Raises `InputError` for an expert that no calibration example reaches.
    """
    hidden, others = first_inputs(blocks, examples)
    for number in range(blocks.count):
        block = blocks.block(number)
        matrices = [matrix for matrix in blocks.matrices if matrix.block == number]
        with recorded(block, matrices, wants_hessians) as inputs:
            _pass_on(block, hidden, others, writes=not sequential)
        for matrix in matrices:
            sums = inputs[matrix.input_key]
            if sums.squares is not None and not is_finite(sums.squares):
                raise InputError(f"activations must be finite, the input of {matrix.name} is not. Use float32.")
            if not sums.tokens:
                raise InputError(
                    f"calibration examples must reach every matrix, {matrix.name} was given no token by "
                    f"{len(examples)} examples. Give more examples."
                )
        yield number, inputs
        if sequential:
            _pass_on(block, hidden, others, writes=True)


def _pass_on(block: nn.Module, hidden: list[Tensor], others: Sequence[BlockArgs], writes: bool) -> None:
    """Compute a block on every example; what it computes takes the place of what it was given, if `writes`."""
    for number, (arguments, named) in enumerate(others):
        heartbeat()
        output = block(hidden[number], *arguments, **named)
        if writes:
            hidden[number] = output[0] if isinstance(output, tuple) else output


@contextmanager
def recorded(
    block: nn.Module, matrices: Sequence[Matrix], wants_hessians: bool
) -> Iterator[dict[InputKey, InputStats]]:
    """While it lasts, what the matrices of a block read is summed; matrices with one input share the sums."""
    inputs = {matrix.input_key: InputStats(wants_hessians) for matrix in matrices}
    hooks = []
    for source, matrix in {matrix.input_key: matrix for matrix in reversed(matrices)}.items():
        if matrix.expert is None:
            layer = block.get_submodule(matrix.layer)
            hooks.append(layer.register_forward_pre_hook(_adder(inputs[source])))
    if any(matrix.expert is not None for matrix in matrices):
        hooks.append(block.get_submodule("mlp.experts").register_forward_pre_hook(_expert_adder(inputs)))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _adder(inputs: InputStats) -> Callable[..., None]:
    def add(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.add(arguments[0])

    return add


def _expert_adder(inputs: Mapping[InputKey, InputStats]) -> Callable[..., None]:
    """Fused experts have no layers to listen at: what reaches each one is computed from what all are given."""
    by_expert: dict[int, dict[str, InputStats]] = {}
    for (_, expert, kind), sums in inputs.items():
        if expert is not None:
            by_expert.setdefault(expert, {})[kind] = sums

    def add(experts: Any, arguments: tuple[Tensor, ...]) -> None:
        hidden, chosen = arguments[:2]
        for number, sums in by_expert.items():
            tokens = hidden[(chosen == number).any(dim=-1)]
            if len(tokens):
                gate, up = F.linear(tokens, experts.gate_up_proj[number]).chunk(2, dim=-1)
                if "feed-forward" in sums:
                    sums["feed-forward"].add(tokens)
                if "channels" in sums:
                    sums["channels"].add(experts.act_fn(gate) * up)

    return add


def gradient_sums(model: Any, examples: Sequence[Encoded], matrices: Sequence[Matrix]) -> dict[str, Tensor]:
    """{matrix: Σ |g| over examples, fp32, in the checkpoint's layout}, g the gradient of an example's mean loss.

    Each gradient is added and dropped as soon as it is there: never two of a parameter at once. The sums, twice the
    bytes of a model in 16 bits, are in the memory of the host.
    """
    own = list_matrices(model)
    wanted = {matrix.name for matrix in own}
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, parameter in model.named_parameters():
        if unfused(name, parameter.data).keys() & wanted:
            sums[name] = torch.zeros(parameter.shape, dtype=torch.float32)
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_taker(sums[name])))
    try:
        with torch.enable_grad():
            for example in examples:
                example_loss(model, example).backward()
                heartbeat()
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
    parts = {part: view for name, total in sums.items() for part, view in unfused(name, total).items()}
    # A checkpoint of the bare decoder has other names than the model in memory, in the same order.
    return {matrix.name: parts[loaded.name] for matrix, loaded in zip(matrices, own, strict=True)}


def _taker(total: Tensor) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad.abs().to(total.device))
        parameter.grad = None

    return take


def example_loss(model: Any, example: Encoded) -> Tensor:
    """Mean cross-entropy of the continuation, or of the whole text where there is no context."""
    text = torch.tensor([example.context + example.continuation], device=model.device)
    logits = model(input_ids=text, use_cache=False).logits[0, :-1]
    first = max(1, len(example.context))
    return F.cross_entropy(logits[first - 1 :].float(), text[0, first:])


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, window: int) -> list[Encoded]:
    """The beginning of a text as `windows`."""
    ids: list[int] = []
    # Enough characters for the tokens, most texts being far longer; all of them where that was too few.
    for characters in (8 * tokens, len(text)):
        if len(ids) < tokens:
            ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
    return windows([ids], tokens, window)


def example_windows(examples: Sequence[Encoded], tokens: int, window: int) -> list[Encoded]:
    """Examples as `windows`, shuffled by a fixed seed, so that every task of a mixture is among them."""
    order = random.Random(ORDER_SEED).sample(examples, len(examples))
    return windows((example.context + example.continuation for example in order), tokens, window)


def windows(texts: Iterable[Sequence[int]], tokens: int, window: int) -> list[Encoded]:
    """The first `tokens` tokens of texts that lie behind one another, or all if they are fewer, cut into windows.

    Raises `InputError` where no token follows another.
    """
    ids = list(islice(chain.from_iterable(texts), tokens))
    found = [Encoded((), tuple(ids[start : start + window])) for start in range(0, len(ids), window)]
    if not found or len(found[0].continuation) < 2:
        raise InputError(f"calibration needs at least 2 tokens, got {len(ids)}. Give longer examples, or more of them.")
    return [example for example in found if len(example.continuation) > 1]


def count_tokens(examples: Sequence[Encoded]) -> int:
    return sum(map(example_tokens, examples))


def calibration_line(method: str, dims: ModelDims, tokens: int) -> str:
    """Say for a log how many tokens a method was calibrated on, and whether they are too few for its Hessians."""
    line, found = f"{method} calibrated on {tokens} tokens", tokens_per_input(dims, tokens)
    if not method_named(method).updates_weights or found >= ENOUGH_TOKENS_PER_INPUT:
        return line
    return (
        f"{line}, a warning: that is {found:.2g} for each input of the widest layer, and fewer than "
        f"{ENOUGH_TOKENS_PER_INPUT} leave its Hessian to damping. Raise calibration_tokens, or give more examples."
    )


def tokens_per_input(dims: ModelDims, tokens: int) -> float:
    """Calibration tokens for each input of the matrix that has fewest; experts share what there is evenly."""
    routed = dims.experts_per_token / dims.num_experts
    matrices = architecture_named(dims.architecture).expected(dims)
    return min(tokens * (1 if m.expert is None else routed) / m.size(dims)[1] for m in matrices)
