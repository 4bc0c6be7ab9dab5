"""A pruned checkpoint recovered into another one: one block in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tune_sparse.data.splits import Encoded
from tune_sparse.pruning.mask_io import MaskFile
from tune_sparse.pruning.reconstruction import BlockRecovery, reconstruct_into
from tune_sparse.pruning.streaming import OpenCheckpoint, PrunedCheckpoint, StreamedBlocks, open_checkpoint


def recover_checkpoint(
    dense: OpenCheckpoint, pruned: Path, masks: Path, examples: Sequence[Encoded], folder: Path, is_mdl: bool = False
) -> list[BlockRecovery]:
    """Write `folder`, the pruned checkpoint with the weights that its masks keep recovered. is_mdl: as a `model.mdl`.

    Raises as `reconstruct_into`; then no folder is left.
    """
    recovery = []
    blocks = StreamedBlocks(open_checkpoint(str(pruned)), dense.dtype)
    with PrunedCheckpoint(dense, folder, is_mdl) as recovered:
        for found in reconstruct_into(blocks, dense.prunable.weights, MaskFile(masks), examples):
            for name, weight in blocks.weights(found.block).items():
                recovered.write(name, weight)
            recovery.append(found)
        recovered.done()
    return recovery
