"""Published sizes of models and tasks, for a forecast before checkpoint or examples are there: assumed, not read."""

from __future__ import annotations

from tune_sparse.evaluation.seconds import TaskSizes
from tune_sparse.models.dims import ModelDims

LLAMA_7B = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 2048)
LLAMA_2_7B = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 4096)
LLAMA_3_8B = ModelDims(4096, 32, 32, 8, 128, 14336, 128256, None, 8192)
MISTRAL_7B = ModelDims(4096, 32, 32, 8, 128, 14336, 32000, 4096, 32768, architecture="MistralForCausalLM")
MISTRAL_7B_V03 = ModelDims(4096, 32, 32, 8, 128, 14336, 32768, None, 32768, architecture="MistralForCausalLM")
MIXTRAL_8X7B = ModelDims(4096, 32, 32, 8, 128, 14336, 32000, None, 32768, 8, 2, architecture="MixtralForCausalLM")
OPT = "OPTForCausalLM"
OPT_125M = ModelDims(768, 12, 12, 12, 64, 3072, 50272, None, 2048, 1, 1, True, OPT, 768)
OPT_350M = ModelDims(1024, 24, 16, 16, 64, 4096, 50272, None, 2048, 1, 1, True, OPT, 512)
OPT_1B3 = ModelDims(2048, 24, 32, 32, 64, 8192, 50272, None, 2048, 1, 1, True, OPT, 2048)

MODELS = {
    "llama-7b": LLAMA_7B,
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama-3-8b": LLAMA_3_8B,
    "mistral-7b-v0.1": MISTRAL_7B,
    "mistral-7b-v0.3": MISTRAL_7B_V03,
    "mixtral-8x7b-v0.1": MIXTRAL_8X7B,
    "opt-125m": OPT_125M,
    "opt-350m": OPT_350M,
    "opt-1.3b": OPT_1B3,
}
"""{short name of a model, in lower case: its sizes}, as its config on the Hugging Face Hub has them."""
TASKS = {
    "boolq": TaskSizes(153.0, 3270, 155.0),
    "hellaswag": TaskSizes(84.0, 10_042, 150.0),
    "gsm8k": TaskSizes(181.0, 1319, 75.0, is_generated=True),
}
"""{task: its sizes}: examples of the scored split, and mean tokens of real examples under Llama's tokenizer."""


def published_dims(short_name: str) -> ModelDims | None:
    return MODELS.get(short_name.lower())


def published_sizes(tasks: list[str]) -> TaskSizes | None:
    """A task, or a mixture, which is trained on all and scored on each; None where one is not published."""
    found = [TASKS[task] for task in tasks if task in TASKS]
    if len(found) < len(tasks):
        return None
    tested = sum(sizes.test_examples for sizes in found)
    return TaskSizes(
        sum(sizes.train_tokens for sizes in found) / len(found),
        tested,
        sum(sizes.test_examples * sizes.test_tokens for sizes in found) / tested,
        any(sizes.is_generated for sizes in found),
    )
