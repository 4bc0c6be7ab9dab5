"""Sparse-to-dense: (W⊙M + sBA)x is trained, (W⊙M + sBA)⊙M is deployed: the last mask removes what filled the zeros."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel

from trainables.deployed import Deployed
from trainables.mode import LoraTrainee
from tune_sparse.config import Protocol
from tune_sparse.lora.layer import adapt_model, lost_fraction, merged_weights, updates
from tune_sparse.models.architectures import PRUNED
from tune_sparse.pruning.masks import Masks, masked


def begin(
    model: PreTrainedModel, protocol: Protocol, masks: Masks, seed: int, modules: Sequence[str] = PRUNED
) -> LoraTrainee:
    """The update reaches every weight, the pruned ones too."""
    return LoraTrainee(adapt_model(model, protocol, None, seed, modules), masks, "sparse-to-dense", deploy)


def deploy(adapted: PeftModel, masks: Masks) -> Deployed:
    trained, update = merged_weights(adapted), updates(adapted)
    return Deployed(
        trained=trained,
        final=masked(trained, masks),
        metrics={"update_removed_fraction": lost_fraction(update, masked(update, masks))},
    )
