"""What records of masks cost: `python tests/bench_dynamics.py` (a few lines, then one JSON line; `--smoke`: a small
model). Two threads, wall time, medians.

RigL on a Llama of random weights at half sparsity, each step of 1,024 tokens: seconds of a step, of the gradient norms
of zeros before an update and of the record after it, of effective ranks besides, and the first two as a share of the
hundred steps that lie between updates by default. Goal: at most 1%. Bytes a weight: of the histories that stay on the
device, and of those on the host after five updates. Goal: at most a quarter on the device.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from bench_lora import small_llama
from benchmarks import bench_parser
from factories import make_cell, make_run

from trainables import masked_finetuning
from trainables.dynamics import Dynamics
from trainables.mask_schedule import MaskSchedule
from tune_sparse.config import Protocol, ScheduleSettings
from tune_sparse.data.splits import Encoded
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.training.loop import fit

FULL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
SMOKE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
EXAMPLES, TOKENS, UPDATES, INTERVAL = 16, 64, 5, 100


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def scheduled_run(steps: int, side: int) -> Run:
    protocol = Protocol(steps=steps, warmup_steps=0, global_batch_size=EXAMPLES, precision="float32")
    settings = ScheduleSettings(update_every=1, update_to=1.0, effective_rank_side=side)
    run = make_run(make_cell(mode="masked-finetuning", schedule="rigl"))
    return replace(run, protocol=protocol, schedule_settings=settings)


def measure(sizes: dict[str, int]) -> dict[str, float]:
    model, masks = small_llama(torch.float32, torch.device("cpu"), False, **sizes)
    run = scheduled_run(UPDATES + 1, side=0)
    trained = masked_finetuning.setup("masked-finetuning", model, run.protocol, masks, MaskSchedule.from_run(run))
    weights = {name: model.get_parameter(name) for name in masks}
    length = TOKENS if sizes is FULL else 8
    examples = [Encoded(tuple(range(i, i + length - 2)), (i, i + 1)) for i in range(EXAMPLES)]
    optimizer = trained.optimizer(run.protocol)
    dynamics = Dynamics(run, run.updates, 1, lambda line: None)
    dynamics.record(0, None, trained.masks, weights)
    seen: list[float] = []
    recorded: list[float] = []
    hooks = Timed(trained, optimizer, dynamics, weights, run, seen, recorded)
    steps = [step.seconds for step in fit(model, optimizer, examples, run.protocol, 0, hooks=hooks)]
    step = statistics.median(steps) - statistics.median(seen) - statistics.median(recorded)
    ranks = Dynamics(scheduled_run(UPDATES + 1, side=4096), run.updates, 1, lambda line: None)
    with_ranks = seconds_of(lambda: ranks.record(0, None, trained.masks, weights))
    without = statistics.median(recorded)
    share = (without + statistics.median(seen)) / (INTERVAL * step)
    found = {"weights": sum(weight.numel() for weight in weights.values()), "step_seconds": step, "share": share}
    found |= {"gradients_seconds": statistics.median(seen), "record_seconds": without}
    return found | {"ranks_seconds": with_ranks - without} | history_bytes(dynamics, trained.masks)


class Timed(masked_finetuning.MaskedSteps):
    """Steps of which each ends with an update and a record, timed."""

    def __init__(
        self,
        trained: masked_finetuning.MaskedFinetuning,
        optimizer: torch.optim.Optimizer,
        dynamics: Dynamics,
        weights: dict[str, Any],
        run: Run,
        seen: list[float],
        recorded: list[float],
    ) -> None:
        super().__init__(weights, trained.current, optimizer, trained.schedule)
        self.trained, self.dynamics, self.own, self.seen, self.recorded = trained, dynamics, weights, seen, recorded
        self.updates = {update.step: update for update in run.updates}

    def clip(self, step: int, parameters: list[torch.Tensor], max_norm: float) -> None:
        self.seen.append(seconds_of(lambda: self.dynamics.see_gradients(self.own, self.trained.masks)))
        super().clip(step, parameters, max_norm)

    def after(self, step: int) -> None:
        super().after(step)
        update = self.updates.get(step)
        record = lambda: self.dynamics.record(step, update, self.trained.masks, self.own)  # noqa: E731
        self.recorded.append(seconds_of(record))


def history_bytes(dynamics: Dynamics, masks: BitMasks) -> dict[str, float]:
    weights = sum(mask.numel() for mask in masks.values())
    histories = dynamics.state()["histories"].values()
    device = sum(kept.nbytes + revived.nbytes for kept, revived, _ in histories)
    host = sum(digit.nbytes for _, _, digits in histories for digit in digits)
    return {"device_bytes_a_weight": device / weights, "host_bytes_a_weight": host / weights}


def main() -> None:
    smoke = bench_parser(__doc__).parse_args().smoke
    torch.set_num_threads(2)
    found = measure(SMOKE if smoke else FULL)
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    print(f"goals: share at most 0.01, {'met' if found['share'] <= 0.01 else 'missed'}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
