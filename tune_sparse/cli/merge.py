"""merge: a trained model as one checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tune_sparse.cli.command import FAULT, OK, add_command, add_json, add_results_dir
from tune_sparse.cli.words import RUN_WORDS, models, words
from tune_sparse.errors import InputError, RunError


def declare(commands: Any) -> None:
    merge = add_command(
        commands,
        "merge",
        _merge,
        "merge a trained adapter into its model, check that the pruned weights are zero, and write a checkpoint",
        examples=(
            "merge --run torch_tiny-llama_boolq_none_s00_dense_84b51b69 --output ./merged",
            "merge --base ./pruned-model --adapter ./my-adapter --output ./merged",
        ),
        ok="the checkpoint is written and valid",
        fault="the merged model failed its check; nothing was written",
        notes=[words(*RUN_WORDS, "adapter", "results folder"), models(trains=False, downloads=False)],
    )
    subject = merge.add_argument_group("what to merge", "Give either --run, or --base with --adapter.")
    subject.add_argument("--run", metavar="RUN", help="finished run whose trained model is written")
    subject.add_argument(
        "--base",
        metavar="MODEL",
        help="model that the adapter was trained on, pruned if it was pruned; a sweep keeps no pruned model, so use "
        "--run for its runs",
    )
    subject.add_argument(
        "--adapter",
        type=Path,
        metavar="ADAPTER",
        help="folder of an adapter: RESULTS/runs/RUN/adapter, or one written by Hugging Face PEFT",
    )
    subject.add_argument(
        "--keep-zeros",
        action="store_true",
        help="with an adapter of Hugging Face PEFT: weights that are zero in --base are set to zero again after the "
        "merge, and checked (default: the adapter may change them, and no zeros of --base are checked). An adapter of "
        "a sweep has a mask of its own, which is always applied and checked",
    )
    results = merge.add_argument_group("results")
    add_results_dir(results)
    results.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUTPUT",
        help="folder to write the checkpoint to, in Hugging Face format; it must not exist yet",
    )
    add_json(results, "the result of the check")


def _merge(chosen: argparse.Namespace) -> int:
    if bool(chosen.run) == bool(chosen.base and chosen.adapter) or bool(chosen.base) != bool(chosen.adapter):
        raise InputError("merge takes --run, or --base with --adapter, got another choice. Give one of the two.")
    from trainables.process import prepare_process

    prepare_process()
    from tune_sparse.export.merge import merge_adapter, merge_run
    from tune_sparse.ledger.ledger import Ledger

    try:
        if chosen.run:
            report = merge_run(Ledger(chosen.results_dir), chosen.run, chosen.output)
        else:
            report = merge_adapter(chosen.base, chosen.adapter, chosen.output, chosen.keep_zeros)
    except RunError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return FAULT
    sparsity = f"{report['actual_sparsity']:.4f}"
    print(json.dumps(report) if chosen.json else f"{chosen.output}: sparsity {sparsity}, every masked weight is 0")
    return OK
