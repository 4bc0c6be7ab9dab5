"""Dense: (W + sBA)x is trained, W + sBA is deployed."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel

from trainables.deployed import Deployed
from trainables.mode import LoraTrainee
from tune_sparse.config import Protocol
from tune_sparse.lora.layer import adapt_model, merged_weights
from tune_sparse.models.architectures import PRUNED
from tune_sparse.pruning.masks import Masks


def begin(
    model: PreTrainedModel, protocol: Protocol, masks: Masks, seed: int, modules: Sequence[str] = PRUNED
) -> LoraTrainee:
    """The update reaches every weight."""
    return LoraTrainee(adapt_model(model, protocol, None, seed, modules), masks, "dense", deploy)


def deploy(adapted: PeftModel, masks: Masks) -> Deployed:
    return Deployed(trained=merged_weights(adapted))
