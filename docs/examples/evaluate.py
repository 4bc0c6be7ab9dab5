"""A checkpoint scored on a task: `.venv/bin/python docs/examples/evaluate.py`.

`.venv/bin/tune-sparse evaluate` does the same and keeps what it found; here each step can be looked at.
"""

import torch

from tune_sparse.config import Protocol
from tune_sparse.data.splits import load_test
from tune_sparse.data.tasks import TASKS
from tune_sparse.evaluation.scoring import encode_test, score
from tune_sparse.models.checkpoints import find_folder, load_model, load_tokenizer


def main(model: str = "tiny-llama", task: str = "boolq", n_test: int = 200) -> None:
    """Score on the synthetic examples of a task; give `load_test` a folder of your own for real ones."""
    folder = find_folder(model)
    loaded, tokenizer = load_model(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)
    protocol = Protocol(n_test=n_test, max_tokens=256, max_new_tokens=40, precision="float32")
    examples = load_test(TASKS[task], None, protocol).test
    scored = score(loaded, tokenizer, [encode_test(tokenizer, TASKS[task], examples, protocol)], protocol)
    for outcome in scored.outcomes[:3]:
        print(outcome.id, "gold", outcome.gold, "predicted", outcome.predicted, outcome.log_likelihoods)
    print({name: value for name, value in scored.metrics.items() if "accuracy" in name})


if __name__ == "__main__":
    main()
