"""The fine-tuning modes and their facts. Nobody else asks a mode for its name.

W⊙M is the pruned weight, s(BA) the update of an adapter.

| mode | computes in training | merged and scored |
| --- | --- | --- |
| dense | (W + sBA)x | W + sBA |
| sparse-to-dense | (W⊙M + sBA)x | (W⊙M + sBA)⊙M |
| sparse-to-sparse | (W⊙M + s(BA)⊙M)x | the same weight |
| masked-finetuning | Wx, gradients masked in every step | the same weight |
"""

from __future__ import annotations

from dataclasses import dataclass

DENSE = "dense"
"""The mode of an adapter that says nothing of itself, and of every LoRA training without zeros."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """The facts of a fine-tuning mode."""

    about: str
    """For a help."""
    is_pruned: bool = True
    """It fine-tunes a pruned model, and keeps its zeros to the end."""
    has_adapter: bool = True
    """It trains LoRA adapters on frozen weights, or else the weights themselves."""
    masks_update: bool = False
    """The update of its adapters is masked in training."""
    masks_at_merge: bool = False
    """Training fills zeros, which a last mask restores after the merge."""
    numerics: int = 0
    """Raised by hand when the trained numbers of this mode alone change; part of the identity of its runs."""


MODES = {
    DENSE: Mode(about="LoRA on the unpruned model; only sparsity 0 is allowed with it", is_pruned=False),
    "sparse-to-dense": Mode(
        about="LoRA on the pruned model; pruned weights are set to zero again after training", masks_at_merge=True
    ),
    "sparse-to-sparse": Mode(
        about="LoRA on the pruned model; pruned weights stay zero in every step of the training", masks_update=True
    ),
    "masked-finetuning": Mode(
        about="no LoRA: all kept weights of the pruned model are trained, pruned ones stay zero",
        has_adapter=False,
        numerics=1,
    ),
}
ADAPTER_MODES = tuple(name for name, mode in MODES.items() if mode.has_adapter)
SPARSE_ADAPTER_MODES = tuple(name for name in ADAPTER_MODES if MODES[name].is_pruned)
"""The two that the matrix compares: masked after training, and masked in training."""


def dense_mode(mode: str) -> str:
    """The mode of its trainings at sparsity 0, the dense baseline of its curves.

    Without zeros all LoRA modes train the same; a mode that trains the weights themselves has a baseline of its own.
    """
    return DENSE if MODES[mode].has_adapter else mode
