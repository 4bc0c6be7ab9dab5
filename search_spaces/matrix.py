"""The matrix of the study: its axes, its presets, and the cells they span.

A preset is a mapping of the names of `tune_sparse.config.SweepConfig`; whatever it does not name keeps
the default written there.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

PILOT_SPARSITIES = (0.0, 0.5, 0.9)

# Models that are several gigabytes are named by hub id and the revision that was meant.
LLAMA_7B = "huggyllama/llama-7b@4782ad278652c7c71b72204d462d6d01eaaf7549"
MISTRAL_7B_V01 = "mistralai/Mistral-7B-v0.1@27d67f1b5f57dc0953326b2601d68371d40ea8da"
MIXTRAL_8X7B = "mistralai/Mixtral-8x7B-v0.1@fc7ac94680e38d7348cfa806e51218e6273104b0"
LLAMA_3_8B = "meta-llama/Meta-Llama-3-8B@8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"
MISTRAL_7B_V03 = "mistralai/Mistral-7B-v0.3@caa1feb0e54d415e2df31207e5f4e273e33509b1"
SMOLLM2_135M = "HuggingFaceTB/SmolLM2-135M@93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
SMOLLM2_360M = "HuggingFaceTB/SmolLM2-360M@f8027fd0eaeea54caa13c31d31b9fdc459c38b49"
OPT_125M = "facebook/opt-125m@27dcfa74d334bc871f3234de431e71c6eeba5dd6"
OPT_350M = "facebook/opt-350m@08ab08cc4b72ff5593870b5d527cf4230323703c"
OPT_1B3 = "facebook/opt-1.3b@3f5c25d0bc631cb57ac65913f76e22c2dfb61d62"

PHOENIX_TASKS = (
    "gsm8k",
    "mawps",
    "svamp",
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)

TOY_MODELS = ("tiny-llama", "tiny-mistral", "tiny-gpt2", "tiny-opt")
TOY = {
    "models": TOY_MODELS[:2],
    "data_dir": "synthetic",
    "steps": 70,
    "learning_rate": 3e-3,
    "final_learning_rate": 3e-4,
    "warmup_fraction": 0.1,
    "global_batch_size": 16,
    "max_tokens": 256,
    "max_new_tokens": 40,
    "precision": "float32",
    "n_train": 2000,
    "n_selection": 64,
    "n_test": 200,
    "eval_every": 35,
    "calibration_tokens": 4096,
    "calibration_window": 256,
}
SHAKESPEARE = {
    "models": ("shakespeare-gpt2",),
    "tasks": ("tinyshakespeare",),
    "methods": ("unstructured",),
    "sparsities": (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9),
    "modes": ("masked-finetuning",),
    "schedules": ("gradual",),
    "train_also": ("bias", "norm", "embeddings", "head"),
    "steps": 2000,
    "global_batch_size": 12,
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-4,
    "warmup_steps": 100,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "max_tokens": 64,
    "max_new_tokens": 32,
    "precision": "float32",
    "eval_every": 250,
    "effective_rank_side": 1024,
}
"""nanoGPT's training on a CPU, its model pruned while it learns."""

PRESETS: dict[str, dict[str, Any]] = {
    "toy": TOY,
    "smoke": TOY | {"models": ("tiny-llama",), "tasks": ("boolq", "gsm8k"), "sparsities": (0.0, 0.5)},
    "toy-seeds": TOY | {"methods": ("unstructured",), "sparsities": (0.0, 0.5, 0.7), "seeds": (0, 1, 2)},
    "dst": TOY
    | {
        "methods": ("unstructured",),
        "sparsities": (0.0, 0.5, 0.75, 0.9),
        "modes": ("masked-finetuning",),
        "schedules": ("one-shot", "gradual", "set", "rigl"),
        "seeds": (0, 1, 2),
        # The rate of toy is LoRA's: all weights lose accuracy by it.
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "update_every": 5,
    },
    "shakespeare": SHAKESPEARE,
    "shakespeare-124m": SHAKESPEARE
    | {
        "models": ("shakespeare-gpt2-124m",),
        "seeds": (0, 1, 2),
        "steps": 1200,
        "global_batch_size": 16,
        "learning_rate": 5e-4,
        "final_learning_rate": 5e-5,
        "max_tokens": 512,
        "precision": "bfloat16",
        "n_selection": None,
        "eval_every": 100,
        "gpus_per_trial": None,
    },
    "prune-and-tune": {
        "models": (OPT_125M, OPT_350M, OPT_1B3),
        "tasks": ("wikitext2",),
        "methods": ("unstructured", "sparsegpt", "wanda"),
        "sparsities": (0.0, 0.1, 0.3, 0.5, 0.7, 0.8),
        "modes": ("masked-finetuning",),
        "schedules": ("one-shot", "iterative"),
        "steps": 100,
        "global_batch_size": 16,
        "learning_rate": 2e-5,
        "final_learning_rate": 0.0,
        "warmup_steps": 2,
        "weight_decay": 2e-4,
        "max_tokens": 2048,
        "precision": "float32",
        "calibration": "wikitext2",
        "calibration_order": "sequential",
        "gpus_per_trial": None,
    },
    # Real models that a laptop trains; at this size boolq and gsm8k stay at chance.
    "smollm": {
        "models": (SMOLLM2_135M, SMOLLM2_360M),
        "tasks": ("arc_easy", "piqa", "hellaswag"),
        "methods": ("unstructured", "structured", "random", "wanda"),
        "sparsities": (0.0, 0.3, 0.5, 0.7),
        "steps": 100,
        "global_batch_size": 16,
        "max_tokens": 512,
        "n_test": 500,
    },
    "matrix": {"models": (LLAMA_7B, MISTRAL_7B_V01), "gpus_per_trial": None},
    "mixtral": {"models": (MIXTRAL_8X7B,), "gpus_per_trial": None},
    "phoenix": {"models": (LLAMA_3_8B, MISTRAL_7B_V03), "tasks": PHOENIX_TASKS, "gpus_per_trial": None},
}
ABOUT = {
    "toy": "2 toy models and generated examples; a sweep trains 330 times, minutes on a laptop",
    "smoke": "a first try; a sweep trains 14 times",
    "toy-seeds": "a part of toy with three seeds, the fewest by which modes are judged; a sweep trains 90 times",
    "dst": "masks that change while the toy models' weights are trained, in place of LoRA, with three seeds; a sweep "
    "trains 234 times",
    "shakespeare": "a small GPT-2 that learns TinyShakespeare from scratch, byte by byte, and is pruned while it does; "
    "give --data-dir; a sweep trains 7 times, minutes each on one CPU core",
    "shakespeare-124m": "the same at the size of GPT-2, with three seeds, for a GPU; a sweep trains 21 times",
    "prune-and-tune": "OPT-125m, -350m and -1.3b on WikiText-2, pruned at once or level after level, then tuned in "
    "equally many steps, for GPUs; the accuracy before tuning is that without; a sweep trains 183 times",
    "smollm": "SmolLM2-135M and -360M on arc_easy, piqa and hellaswag, for a laptop or a GPU; a sweep trains 150 times",
    "matrix": "LLaMA-7B and Mistral-7B, for GPUs; a sweep trains 330 times",
    "mixtral": "Mixtral 8x7B; only `sweep mixtral --dry-run` works, as Mixtral models cannot be trained yet",
    "phoenix": "Llama-3-8B and Mistral-7B on the 10 tasks of the paper Phoenix (doi 10.1145/3731599.3767395), for "
    "GPUs; a sweep trains 1100 times",
}
"""The presets in the words of a help."""
ABOUT["NAME-pilot"] = "as any other preset NAME, but with the sparsities 0, 0.5 and 0.9, whatever that has"
PRESETS |= {f"{name}-pilot": axes | {"sparsities": PILOT_SPARSITIES} for name, axes in PRESETS.items()}
PRESETS["pilot"], ABOUT["pilot"] = PRESETS["toy-pilot"], "another name for toy-pilot"


def cells(axes: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of `axes`, the first axis varying slowest, as {axis: value}."""
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
