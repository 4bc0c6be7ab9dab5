"""Sparse-to-sparse: (W⊙M + s(BA)⊙M)x is trained, and the same weight is deployed: the zeros stay zero."""

from peft import PeftModel

from trainables.deployed import Deployed
from tune_sparse.lora import merged_weights
from tune_sparse.masks import Masks


def update_masks(masks: Masks) -> Masks:
    """The update reaches only kept weights."""
    return masks


def deploy(adapted: PeftModel, masks: Masks) -> Deployed:
    return Deployed(trained=merged_weights(adapted))
