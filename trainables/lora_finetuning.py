"""Sparse-to-sparse: (W⊙M + s(BA)⊙M)x is trained, and the same weight is deployed: the zeros stay zero."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel

from trainables.deployed import Deployed
from trainables.mode import LoraTrainee
from tune_sparse.config import Protocol
from tune_sparse.lora.layer import adapt_model, merged_weights
from tune_sparse.models.checkpoints import PRUNED
from tune_sparse.pruning.masks import Masks


def begin(
    model: PreTrainedModel, protocol: Protocol, masks: Masks, seed: int, modules: Sequence[str] = PRUNED
) -> LoraTrainee:
    """The update reaches only kept weights."""
    return LoraTrainee(adapt_model(model, protocol, masks, seed, modules), masks, "sparse-to-sparse", deploy)


def deploy(adapted: PeftModel, masks: Masks) -> Deployed:
    return Deployed(trained=merged_weights(adapted))
