"""Sparse-to-dense: (W⊙M + sBA)x is trained, (W⊙M + sBA)⊙M is deployed: the last mask removes what filled the zeros."""

from peft import PeftModel

from trainables.deployed import Deployed
from tune_sparse.lora import lost_fraction, merged_weights, updates
from tune_sparse.masks import Masks, masked


def update_masks(masks: Masks) -> None:
    """The update reaches every weight, the pruned ones too."""


def deploy(adapted: PeftModel, masks: Masks) -> Deployed:
    trained, update = merged_weights(adapted), updates(adapted)
    return Deployed(
        trained=trained,
        final=masked(trained, masks),
        metrics={"update_removed_fraction": lost_fraction(update, masked(update, masks))},
    )
