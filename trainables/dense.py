"""Dense: (W + sBA)x is trained, W + sBA is deployed."""

from peft import PeftModel

from trainables.deployed import Deployed
from tune_sparse.lora import merged_weights
from tune_sparse.masks import Masks


def update_masks(masks: Masks) -> None:
    """The update reaches every weight."""


def deploy(adapted: PeftModel, masks: Masks) -> Deployed:
    return Deployed(trained=merged_weights(adapted))
