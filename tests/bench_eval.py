"""Scoring against lm-evaluation-harness: `python tests/bench_eval.py` (a table, then one JSON line). Two minutes;
`--smoke`: few examples, once.

Both sides get the same model, examples and tokens a pass, tokenise their prompts, and compute on one thread in fp32.
The harness is measured inside its model class (HFLM), without its reading of tasks and its statistics. Medians of
process CPU time, the two sides in turn; what they find is compared, example by example.

- hellaswag, boolq: log-likelihoods of choices, on random weights of 4 layers of width 512. The vocabulary is that of
  the tiny models, so that logits are about 2% of the arithmetic, as in a 7B model. Choices of hellaswag share a
  question; those of boolq are one token, and there the harness too reads the question once. Goal for hellaswag: 2.0
  times the harness, the same argmax, log-probabilities within 1e-4.
- gsm8k: texts of the same random weights, made to end after as many tokens as the worked answer to the same question
  has: real lengths are what a batch has to cope with. Goal: 1.5 times the harness, the same texts.
- gsm8k, tiny: the trained tiny model, whose answers to synthetic examples all have the same 16 tokens: overhead alone.
- memory: peak resident MB of scoring choices at one budget of tokens, then of ten times the examples, then of ten times
  the choices. Goal: no growth.

Examples are the real ones of tests/data, but for those of the tiny model.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks import bench_parser
from conftest import REAL_EXAMPLES
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tune_sparse.config import Protocol
from tune_sparse.data.splits import Encoded, load_test
from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Example
from tune_sparse.data.tasks import TASKS
from tune_sparse.evaluation.likelihood import log_likelihoods
from tune_sparse.evaluation.scoring import encode_test, score
from tune_sparse.models.checkpoints import load_model, load_tokenizer
from tune_sparse.models.toy_models import toy_model
from tune_sparse.training.budgets import CPU_BUDGETS

PROTOCOL = Protocol(max_tokens=1024, max_new_tokens=256, precision="float32")
BUDGETS = replace(CPU_BUDGETS, scoring_tokens=6144, generation_tokens=6144)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    repeats: int = 3
    examples: int = 20
    tiny_examples: int = 128
    tiny_steps: int | None = None
    """None: the tiny model is trained to its end."""
    memory_examples: int = 10


SMOKE = Sizes(1, 3, 4, 2, 1)


@dataclass(frozen=True)
class Case:
    """A task on a model, measured on both sides."""

    name: str
    examples: Sequence[Example]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def task(self) -> ChoiceTask | AnswerTask:
        return TASKS[self.name.split(",")[0]]

    def ours(self) -> list[Any]:
        """Log-likelihoods of the choices, or the text, of each example."""
        tests = encode_test(self.tokenizer, self.task, self.examples, PROTOCOL)
        outcomes = score(self.model, self.tokenizer, [tests], PROTOCOL, BUDGETS).outcomes
        return [list(outcome.log_likelihoods) if outcome.text is None else outcome.text for outcome in outcomes]

    def harness(self, lm: HFLM) -> list[Any]:
        """The same of the harness."""
        if isinstance(self.task, AnswerTask):
            settings = {"until": list(self.task.until), "do_sample": False, "max_gen_toks": PROTOCOL.max_new_tokens}
            requests = [(self.task.training_pair(example)[0], settings) for example in self.examples]
            return lm.generate_until(instances("generate_until", requests), disable_tqdm=True)
        pairs = [self.task.pairs(example) for example in self.examples]
        requests = [pair for choices in pairs for pair in choices]
        values = iter(lm.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True))
        return [[next(values)[0] for _ in choices] for choices in pairs]

    @property
    def batch_examples(self) -> int:
        """Examples of the harness in a pass of at most 6,144 tokens."""
        if isinstance(self.task, AnswerTask):
            texts, new = [self.task.training_pair(example)[0] for example in self.examples], PROTOCOL.max_new_tokens
        else:
            texts, new = ["".join(pair) for example in self.examples for pair in self.task.pairs(example)], 0
        return BUDGETS.scoring_tokens // (max(map(len, self.tokenizer(texts)["input_ids"])) + new)


def instances(kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0) for arguments in requests]


def cpu_seconds(compute: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = compute()
    return time.process_time() - start, found


def measured(case: Case, repeats: int) -> dict[str, Any]:
    """Both sides are warmed up by the first two examples."""
    lm = HFLM(case.model, tokenizer=case.tokenizer, batch_size=case.batch_examples, max_length=PROTOCOL.max_tokens)
    few = replace(case, examples=case.examples[:2])
    few.harness(lm), few.ours()
    turns = [(cpu_seconds(lambda: case.harness(lm)), cpu_seconds(case.ours)) for _ in range(repeats)]
    theirs, ours = (statistics.median(turn[side][0] for turn in turns) for side in (0, 1))
    (_, expected), (_, found) = turns[0]
    differing = sum(best(a) != best(b) for a, b in zip(expected, found, strict=True))
    figures = {"examples": len(case.examples), "harness_seconds": theirs, "seconds": ours, "times": theirs / ours}
    return figures | {"differing_examples": differing, "worst_log_probability": worst(expected, found)}


def best(found: Any) -> Any:
    """A text, or the index of the likeliest choice."""
    return found if isinstance(found, str) else max(range(len(found)), key=found.__getitem__)


def worst(expected: Sequence[Any], found: Sequence[Any]) -> float | None:
    """The largest difference of a log-likelihood."""
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if not isinstance(a, str)]
    return max((abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)), default=None)


def random_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


class EndsOnTime:
    """Hooks that make a model end each text after a given number of tokens, by the length of its prompt.

    All examples of a batch are at the same step: the tokens that an example sees, less the steps, are its prompt. Where
    all prompts of a batch are of one length there is no attention mask: an example sees everything. No answer is empty.
    """

    def __init__(self, model: PreTrainedModel, end: int, answer_tokens: Mapping[int, int]) -> None:
        self.end, self.answer_tokens, self.step, self.width = end, answer_tokens, 0, 0
        self.ended: Tensor
        model.model.register_forward_pre_hook(self.look, with_kwargs=True)
        model.lm_head.register_forward_hook(self.end_examples)

    def look(self, module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        examples, width = kwargs["input_ids"].shape
        self.step, self.width = (0, width) if width > 1 else (self.step + 1, self.width)
        self.ended = torch.zeros(examples, dtype=torch.bool)
        if self.step:
            mask = kwargs.get("attention_mask")
            prompts = [self.width] * examples if mask is None else (mask.flatten(1).sum(-1) - self.step).tolist()
            self.ended = torch.tensor([self.step >= self.answer_tokens[prompt] for prompt in prompts])

    def end_examples(self, module: Any, args: Any, logits: Tensor) -> Tensor:
        logits[..., self.end] = torch.where(self.ended.view(-1, *[1] * (logits.dim() - 2)), 1e4, -1e4)
        return logits


def answer_tokens(tokenizer: PreTrainedTokenizerBase, task: AnswerTask, examples: Sequence[Example]) -> dict[int, int]:
    """{tokens of a prompt: tokens of its worked answer}"""
    pairs = [task.training_pair(example) for example in examples]
    prompts, answers = (tokenizer(list(texts))["input_ids"] for texts in zip(*pairs, strict=True))
    return {len(prompt): len(answer) for prompt, answer in zip(prompts, answers, strict=True)}


def cases(sizes: Sizes) -> Iterator[Case]:
    folder = toy_model("tiny-llama", print, steps=sizes.tiny_steps)
    tiny, tokenizer = load_model(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)

    def load_examples(name: str, count: int, data_dir: Path | None = REAL_EXAMPLES) -> Sequence[Example]:
        return load_test(TASKS[name], data_dir, replace(PROTOCOL, n_test=count)).test

    for name, count in (("hellaswag", sizes.examples), ("boolq", min(sizes.examples, 12))):
        yield Case(name, load_examples(name, count), random_model(tokenizer), tokenizer)
    examples, model = load_examples("gsm8k", sizes.examples), random_model(tokenizer)
    EndsOnTime(model, tokenizer.eos_token_id, answer_tokens(tokenizer, TASKS["gsm8k"], examples))
    yield Case("gsm8k", examples, model, tokenizer)
    yield Case("gsm8k, tiny", load_examples("gsm8k", sizes.tiny_examples, None), tiny, tokenizer)


def memory(tokenizer: PreTrainedTokenizerBase, n: int) -> dict[str, float]:
    """Peak resident MB, each the most since the one before."""
    model, context = random_model(tokenizer), tuple(range(1, 101))

    def question(choices: int) -> list[Encoded]:
        return [Encoded(context, tuple(range(i + 1, i + 21))) for i in range(choices)]

    found = {}
    cases = ((f"{n} examples", n, 4), (f"{10 * n} examples", 10 * n, 4), (f"{n} examples of 40 choices", n, 40))
    for name, examples, choices in cases:
        Path("/proc/self/clear_refs").write_text("5")
        log_likelihoods(model, [question(choices)] * examples, 2048)
        status = Path("/proc/self/status").read_text()
        found[name] = int(status.split("VmHWM:")[1].split()[0]) / 1000
    return found


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sizes = SMOKE if bench_parser(__doc__).parse_args().smoke else Sizes()
    figures: dict[str, Any] = {}
    columns = ("examples", "harness_seconds", "seconds", "times", "differing_examples", "worst_log_probability")
    print(f"{'':12}" + "".join(f"{column:>23}" for column in columns))
    for case in cases(sizes):
        found = figures[case.name] = measured(case, sizes.repeats)
        print(f"{case.name:12}" + "".join(f"{cell(found[column]):>23}" for column in columns))
    figures["peak_mb"] = memory(load_tokenizer(toy_model("tiny-llama", steps=sizes.tiny_steps)), sizes.memory_examples)
    print("peak MB: " + ", ".join(f"{mb:.0f} ({name})" for name, mb in figures["peak_mb"].items()))
    print(json.dumps(figures))


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
