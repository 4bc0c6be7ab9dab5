"""How a cell is trained and scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tune_sparse.config.options import option, rule
from tune_sparse.errors import unknown_name

PRECISIONS = ("float32", "bfloat16")
MASKED_LORA_IMPLS = {
    "effective-weight": "adds the masked product to W first, whatever the mask",
    "auto": "the same, but where whole attention heads and feed-forward channels are pruned it trains a smaller model "
    "without them",
}
CALIBRATIONS = {
    "task": "training examples of the task, one after the other",
    "wikitext2": "the training text of that task in --data-dir, so not with synthetic; `tune-sparse prepare "
    "--tasks wikitext2 --data-dir hub` downloads it",
}
PUBLISHED = "published"
PUBLISHED_CALIBRATION = {
    "calibration": "wikitext2",
    "calibration_tokens": 128 * 2048,
    "calibration_window": 2048,
    "calibration_order": "sequential",
}
"""As SparseGPT and Wanda were published, but for the text: theirs is of C4."""
PUBLISHED_MEANING = (
    "what the authors of sparsegpt and wanda did, whatever the other calibration settings say: 128 sequences of 2,048 "
    "tokens of plain text, sequential; the text is that of wikitext2, theirs is of C4"
)
CALIBRATION_ORDERS = {
    "dense": "the unpruned model, once",
    "sequential": "layer after layer, with all earlier layers pruned already",
}

OTHER_WEIGHTS = {
    "bias": "biases of the pruned layers",
    "norm": "scales and shifts of the norms",
    "embeddings": "of tokens and of positions; with a tied head they are the head too",
    "head": "the output layer; tied, it is the embeddings too",
}
"""Weights of a model that are not pruned, by kind."""
RECOVERIES = {
    "none": "no recovery",
    "reconstruct": "layer after layer, the weights that are kept are solved for what the unpruned layer computes; not "
    "for structured methods",
}


def in_order(kinds: Iterable[str]) -> tuple[str, ...]:
    """Kinds of weights in the one order in which records and axes have them."""
    return tuple(sorted(kinds))


@dataclass(frozen=True)
class Protocol:
    """How a cell is trained and scored. Each field changes numbers, so all are part of a run's identity.

    The defaults are the protocol of the 7B matrix.
    """

    steps: int = option("optimizer steps of a training", 200, heading="training")
    global_batch_size: int = option("examples in each optimizer step", 256)
    learning_rate: float = option("highest learning rate of AdamW, from which a cosine schedule decays", 3e-4)
    final_learning_rate: float = option("learning rate at the end of the cosine schedule", 3e-5)
    warmup_fraction: float = option("fraction of the steps in which the learning rate rises linearly", 0.03)
    warmup_steps: int | None = option(
        "the same as a number of steps, which wins", None, unset="so the fraction decides"
    )
    weight_decay: float = option("weight decay of AdamW", 0.1)
    beta1: float = option("beta1 of AdamW: decay of its mean of gradients", 0.9)
    beta2: float = option("beta2 of AdamW: decay of its mean of squared gradients", 0.95)
    max_grad_norm: float = option("norm to which gradients are clipped", 1.0)
    train_also: tuple[str, ...] = option(
        "weights that are trained beside the pruned layers or their adapters, in float32; those of bias and norm "
        "without weight decay",
        (),
        unset="nothing",
        choices=OTHER_WEIGHTS,
    )
    lora_rank: int = option("rank of the LoRA adapters", 16, heading="LoRA adapters")
    lora_alpha: float = option("LoRA alpha: the update of an adapter is scaled by lora_alpha / lora_rank", 32.0)
    lora_dropout: float = option("dropout probability on the input of the adapters", 0.0)
    masked_lora_impl: str = option(
        "how mode sparse-to-sparse computes with W + mask * (B A): the pruned weight W, and the product of the two "
        "matrices of an adapter in which pruned places are zero",
        "auto",
        choices=MASKED_LORA_IMPLS,
    )
    train_on_prompt: bool = option(
        "compute the loss on the tokens of prompt and answer, instead of the answer alone", False, heading="sequences"
    )
    packing: bool = option("put several examples into one sequence; none attends to another", False)
    precision: str = option("data type of the model's weights", "bfloat16", choices=PRECISIONS)
    max_tokens: int = option(
        "largest number of tokens of a sequence, or the context of the model if that is less; a longer example loses "
        "the beginning of its prompt, and the pieces of a text have as many tokens",
        2048,
    )
    max_new_tokens: int = option("largest number of tokens of a generated answer", 256, heading="scoring")
    num_fewshot: int = option(
        "solved examples in the prompt of each test example; the prompts of the training have none", 0
    )
    n_train: int | None = option(
        "number of training examples of each task", None, unset="all", heading="examples and evaluation"
    )
    n_selection: int | None = option(
        "number of selection examples: the loss is measured on them during training, and `tune-sparse search` "
        "compares on them. They come from the validation split if the test examples do not, or else from the training "
        "split, and are then not trained on. `none` takes the whole validation split, or a tenth of the training split",
        256,
    )
    n_test: int | None = option("number of test examples of each task", None, unset="all")
    eval_every: int = option("steps between two measurements of the loss on the selection examples", 50)
    threads: int = option("CPU threads of a run; another number can change the last bits of a result", 1)
    calibration: str = option(
        "examples on which the methods that need calibration measure the model",
        "task",
        choices=CALIBRATIONS | {PUBLISHED: PUBLISHED_MEANING},
        heading="calibration, for the methods that need it",
    )
    calibration_tokens: int = option(
        "number of tokens to calibrate on, or all there are if they are fewer; sparsegpt wants at least two for each "
        "input of a layer",
        128 * 2048,
    )
    calibration_window: int = option(
        "tokens that the model reads at once in calibration, or its context if that is less", 2048
    )
    calibration_order: str = option(
        "the model whose activations are measured",
        "dense",
        choices=CALIBRATION_ORDERS,
    )
    recover: str = option(
        "recovery of a pruned model before it is trained, on the calibration examples",
        "none",
        choices=RECOVERIES,
        heading="recovery after pruning",
    )

    def __post_init__(self) -> None:
        counted = (
            "steps",
            "global_batch_size",
            "lora_rank",
            "max_new_tokens",
            "eval_every",
            "threads",
        )
        for name in counted:
            rule(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name), "Give a larger number.")
        for name in ("max_tokens", "calibration_tokens", "calibration_window"):
            rule(getattr(self, name) >= 2, f"{name} must be at least 2", getattr(self, name), "Give a larger number.")
        rule(
            self.max_new_tokens < self.max_tokens,
            f"max_new_tokens must leave room for a prompt in max_tokens = {self.max_tokens}",
            self.max_new_tokens,
            "Lower it.",
        )
        rule(self.num_fewshot >= 0, "num_fewshot must be at least 0", self.num_fewshot, "Give 0 or more.")
        for name in ("n_train", "n_selection", "n_test"):
            value = getattr(self, name)
            rule(value is None or value >= 1, f"{name} must be at least 1 or none", value, "Give more examples.")
        for name in ("learning_rate", "lora_alpha", "max_grad_norm"):
            rule(getattr(self, name) > 0, f"{name} must be above 0", getattr(self, name), "Give a positive number.")
        rule(
            0 <= self.final_learning_rate <= self.learning_rate,
            "final_learning_rate must be between 0 and learning_rate",
            self.final_learning_rate,
            "Lower it.",
        )
        rule(self.weight_decay >= 0, "weight_decay must be at least 0", self.weight_decay, "Give 0 or more.")
        for name in ("beta1", "beta2", "lora_dropout", "warmup_fraction"):
            rule(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name), "Give a fraction.")
        rule(
            0 <= self.warmup < self.steps,
            f"the warm-up must be shorter than the training of {self.steps} steps",
            self.warmup,
            "Lower warmup_steps or raise steps.",
        )
        for name in self.train_also:
            if name not in OTHER_WEIGHTS:
                raise unknown_name("kind of weights in train_also", name, OTHER_WEIGHTS)
        rule(
            len(set(self.train_also)) == len(self.train_also),
            "train_also must not repeat a kind",
            self.train_also,
            "Remove the repeats.",
        )
        object.__setattr__(self, "train_also", in_order(self.train_also))
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.masked_lora_impl not in MASKED_LORA_IMPLS:
            raise unknown_name("masked_lora_impl", self.masked_lora_impl, MASKED_LORA_IMPLS)
        if self.calibration not in CALIBRATIONS:
            raise unknown_name("calibration", self.calibration, CALIBRATIONS)
        if self.calibration_order not in CALIBRATION_ORDERS:
            raise unknown_name("calibration_order", self.calibration_order, CALIBRATION_ORDERS)
        if self.recover not in RECOVERIES:
            raise unknown_name("recover", self.recover, RECOVERIES)

    @property
    def calibrated_by(self) -> dict[str, Any]:
        """The settings that decide calibrated scores besides the examples: part of the identity of calibrated runs."""
        return {name: getattr(self, name) for name in CALIBRATION_SETTINGS}

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight of the model."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def may_train_smaller(self) -> bool:
        """Masked updates may be trained without what structured masks cut out; biases would be cut with their rows."""
        return self.masked_lora_impl == "auto" and "bias" not in self.train_also

    def within(self, max_positions: int) -> Protocol:
        """For a model whose context may be shorter than `max_tokens`. Raises `InputError` if no prompt would fit."""
        return replace(self, max_tokens=min(self.max_tokens, max_positions))

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return round(self.warmup_fraction * self.steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def pack_to(self) -> int | None:
        """Tokens of a packed sequence; None without packing."""
        return self.max_tokens if self.packing else None


def without_published(names: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings by name, `calibration=published` replaced by the settings that it stands for."""
    return {**names, **PUBLISHED_CALIBRATION} if names.get("calibration") == PUBLISHED else names


SCORING = ("precision", "max_tokens", "max_new_tokens", "num_fewshot", "n_test", "threads")
"""The settings of a `Protocol` that scoring reads."""
UNCOMPARED_SETTINGS = ("eval_every", "threads", "masked_lora_impl")
"""Those that change no number, or like budgets the order of additions alone: runs that differ in them are compared."""
CALIBRATION_SETTINGS = tuple(f.name for f in fields(Protocol) if f.name.startswith("calibration"))
