"""Sparse-to-sparse: (W⊙M + s(BA)⊙M)x is trained, and the same weight is deployed: the zeros stay zero."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel

from trainables.deployed import Deployed
from trainables.trainee import LoraTrainee
from tune_sparse.config import Protocol
from tune_sparse.lora import adapt_model, merged_weights
from tune_sparse.masks import Masks
from tune_sparse.models import PRUNED


def begin(
    model: PreTrainedModel, protocol: Protocol, masks: Masks, seed: int, modules: Sequence[str] = PRUNED
) -> LoraTrainee:
    """The update reaches only kept weights."""
    return LoraTrainee(adapt_model(model, protocol, masks, seed, modules), masks, "sparse-to-sparse", deploy)


def deploy(adapted: PeftModel, masks: Masks) -> Deployed:
    return Deployed(trained=merged_weights(adapted))
