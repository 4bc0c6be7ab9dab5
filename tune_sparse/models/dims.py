"""Sizes of a decoder, under the names of Hugging Face's configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a decoder, from its config."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Channels of a feed-forward part."""
    vocab_size: int
    sliding_window: int | None
    max_positions: int
    """The longest text, in tokens, that the model was made for."""
    num_experts: int = 1
    """Feed-forward parts of a block."""
    experts_per_token: int = 1
    """Feed-forward parts that compute a token."""
    tied_embeddings: bool = False
    """The head is the embedding."""
    architecture: str = "LlamaForCausalLM"
    """The model class, a key of `ARCHITECTURES`."""
    embedding_size: int | None = None
    """Where embeddings are narrower than the model: OPT projects them."""

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelDims:
        """Read the sizes from a config; a size that it leaves out has the default of its own class."""
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=_intermediate_size(config),
            vocab_size=config.vocab_size,
            sliding_window=getattr(config, "sliding_window", None),
            max_positions=config.max_position_embeddings,
            num_experts=getattr(config, "num_local_experts", None) or 1,
            experts_per_token=getattr(config, "num_experts_per_tok", None) or 1,
            tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
            architecture=(config.architectures or [cls.architecture])[0],
            embedding_size=getattr(config, "word_embed_proj_dim", None),
        )

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def query_rows(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_rows(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads


def _intermediate_size(config: PretrainedConfig) -> int:
    """Each class has its own word for it, and GPT-2 a default: 4 hidden sizes."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return 4 * config.hidden_size
