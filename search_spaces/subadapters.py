"""Spaces of LoRA sub-adapters: groups of modules that share a rank in every layer, and the ranks to choose from.

A preset maps names of `tune_sparse.lora.rank_space.Group` to its modules and ranks. The super-adapter's own rank is the
protocol's `lora_rank`; a group without a choice keeps its only rank in every layer.
"""

from typing import Any

QKV = ("q_proj", "k_proj", "v_proj")

PRESETS: dict[str, dict[str, Any]] = {
    # Shears (Munoz et al. 2024, arXiv:2404.10934)
    "shears": {
        "qkv": {"modules": QKV, "ranks": (32, 24, 16)},
        "up": {"modules": ("up_proj",), "ranks": (32, 24, 16)},
        "down": {"modules": ("down_proj",), "ranks": (32, 24, 16)},
    },
    # SQFT (Munoz et al. 2024, arXiv:2410.03750): only the attention is searched
    "sqft": {
        "qkv": {"modules": QKV, "ranks": (32, 28, 24, 20, 16)},
        "up": {"modules": ("up_proj",), "ranks": (32,)},
        "down": {"modules": ("down_proj",), "ranks": (32,)},
    },
    # Our reading of Phoenix (doi 10.1145/3731599.3767395), whose text we could not read: every linear layer of a
    # block has an adapter, and the ranks are those of Shears.
    "phoenix": {
        "qkv": {"modules": QKV, "ranks": (32, 24, 16)},
        "o": {"modules": ("o_proj",), "ranks": (32, 24, 16)},
        "gate": {"modules": ("gate_proj",), "ranks": (32, 24, 16)},
        "up": {"modules": ("up_proj",), "ranks": (32, 24, 16)},
        "down": {"modules": ("down_proj",), "ranks": (32, 24, 16)},
    },
    # The toy models keep most of their accuracy at small ranks, so their space reaches lower.
    "toy": {
        "qkv": {"modules": QKV, "ranks": (32, 16, 8, 4)},
        "up": {"modules": ("up_proj",), "ranks": (32, 16, 8, 4)},
        "down": {"modules": ("down_proj",), "ranks": (32, 16, 8, 4)},
    },
    # As toy, and a rank of 0 drops the adapters of a group in a layer.
    "wide": {
        "qkv": {"modules": QKV, "ranks": (32, 16, 8, 4, 0)},
        "up": {"modules": ("up_proj",), "ranks": (32, 16, 8, 4, 0)},
        "down": {"modules": ("down_proj",), "ranks": (32, 16, 8, 4, 0)},
    },
}

ABOUT = {
    "shears": "3 groups, q k v together, up, down: ranks 32, 24 and 16, as in the paper Shears (arXiv 2404.10934)",
    "sqft": "the groups of shears: q k v with ranks 32, 28, 24, 20 and 16, up and down always 32, as in the paper SQFT "
    "(arXiv 2410.03750)",
    "phoenix": "5 groups, q k v together, o, gate, up, down: ranks 32, 24 and 16; a guess at the paper Phoenix (doi "
    "10.1145/3731599.3767395), whose text the authors of this program could not read",
    "toy": "the groups of shears: ranks 32, 16, 8 and 4, for toy models",
    "wide": "the groups of shears: ranks 32, 16, 8, 4 and 0, where 0 leaves the adapter out",
}
"""The presets in the words of a help."""

PROTOCOL = {"lora_rank": 32, "lora_alpha": 64.0}
"""Settings of a super-adapter: s = 2 at every active rank."""
TOY_PROTOCOL = {"n_selection": 400}
"""Accuracies of candidates differ by points: so many examples tell them apart."""
