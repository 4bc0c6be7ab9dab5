"""A checkpoint pruned and checked: `.venv/bin/python docs/examples/prune.py`."""

from pathlib import Path

from tune_sparse.evaluation.validation import checkpoint_report
from tune_sparse.pruning.mask_io import MaskFile
from tune_sparse.pruning.prune_checkpoint import Request, run
from tune_sparse.pruning.streaming import open_checkpoint


def main(model: str = "tiny-llama", out: str = "masks") -> None:
    """Write the mask of half of the weights and the checkpoint without them, then compare the two."""
    folder = run(Request(model, methods=["unstructured"], sparsities=[0.5], out=Path(out), checkpoints=True))
    masks = MaskFile(folder / "masks_sparsity50_unstructured.safetensors")
    pruned = open_checkpoint(str(folder / "checkpoint_sparsity50_unstructured"))
    expected = [matrix.name for matrix in pruned.prunable.matrices]
    report = checkpoint_report(pruned.tensors, masks, expected, sparsity=0.5)
    print("valid" if report["all_valid"] else report["violations"])


if __name__ == "__main__":
    main()
