from __future__ import annotations

from dataclasses import replace

import pytest
from factories import done_record, make_cell, make_run
from hypothesis import given
from hypothesis import strategies as st

from tune_sparse.config import Cerebras, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.ledger.record import Record
from tune_sparse.ledger.run import Run
from tune_sparse.sweep.resources import (
    MOST_TOGETHER,
    Placement,
    Resources,
    describe_resources,
    fits,
    gpu_share,
    needed_fraction,
)

GB = 1_000_000_000
LAPTOP: Resources = {"CPU": 2, "memory": 8 * GB}
GPU_NODE: Resources = {"CPU": 16, "GPU": 4}
CS3_NODE: Resources = {"CPU": 8, "CS3_TRIAL": 3, "CS3": 2}
TORCH = make_run()
CEREBRAS = make_run(make_cell(backend="cerebras"), cerebras={"target": "csx", "release": "2.10.0"})


def placement(*nodes: Resources, **settings: object) -> Placement:
    return Placement(SweepConfig(models=("tiny",), **settings), lambda: nodes)  # type: ignore[arg-type]


def with_memory(run: Run, peak: int, total: int | None) -> Record:
    record = done_record(run)
    return replace(record, measured=record.measured | {"peak_memory_bytes": peak, "gpu_memory_bytes": total})


def test_a_trial_holds_its_threads_and_what_was_set() -> None:
    assert placement(LAPTOP).resources(TORCH) == {"CPU": 1}
    assert placement(GPU_NODE, gpus_per_trial=0.25).resources(TORCH) == {"CPU": 1, "GPU": 0.25}


def test_a_trial_of_cerebras_holds_no_cs3_while_it_prunes_and_scores() -> None:
    held = placement(CS3_NODE, gpus_per_trial=1.0, cerebras=Cerebras(scoring_gpus=0.5)).resources(CEREBRAS)
    assert held == {"CPU": 1, "CS3_TRIAL": 1, "GPU": 0.5}


def test_gpus_are_packed_by_the_memory_that_finished_runs_of_a_kind_needed() -> None:
    packed = placement(GPU_NODE, gpus_per_trial=None)
    assert packed.resources(TORCH)["GPU"] == 1, "nothing is known yet"
    packed.learn(TORCH, with_memory(TORCH, 19 * GB, 80 * GB))  # 1.2 x 19 + 1.07 of 80 GB: three fit
    assert packed.resources(make_run(make_cell(sparsity=0.9)))["GPU"] == 0.3333
    assert packed.resources(make_run(make_cell(method="sparsegpt")))["GPU"] == 1, "calibration may need more"
    packed.learn(TORCH, with_memory(TORCH, 30 * GB, 80 * GB))
    assert packed.resources(TORCH)["GPU"] == 0.5, "the most that any needed counts"
    packed.learn(TORCH, with_memory(TORCH, 10 * GB, 80 * GB))
    assert packed.resources(TORCH)["GPU"] == 0.5
    assert packed.resources(make_run(make_cell(task="gsm8k")))["GPU"] == 1, "another task may need more"


def test_what_was_reserved_counts_where_it_was_recorded() -> None:
    measured = {"gpu_memory_bytes": 80 * GB, "peak_memory_bytes": 10 * GB, "cell_peak_memory_bytes": 20 * GB}
    assert needed_fraction(measured) == pytest.approx((24 * GB + 2**30) / (80 * GB))
    reserved = needed_fraction(measured | {"cell_peak_reserved_bytes": 30 * GB})
    assert reserved == pytest.approx((36 * GB + 2**30) / (80 * GB))


def test_runs_on_a_cpu_and_failed_runs_teach_nothing() -> None:
    packed = placement(GPU_NODE, gpus_per_trial=None)
    packed.learn(TORCH, with_memory(TORCH, 19 * GB, None))
    packed.learn(TORCH, Record(TORCH.run_id, TORCH.identity, "failed"))
    packed.learn(TORCH, None)
    assert packed.resources(TORCH)["GPU"] == 1
    assert needed_fraction({}) is None


@given(st.floats(1e-3, 3.0))
def test_as_many_trials_share_a_gpu_as_fit_their_need(needed: float) -> None:
    share = gpu_share(needed)
    together = round(1 / share)
    assert fits({"GPU": share * together}, {"GPU": 1})
    assert together == 1 or together * needed <= 1
    assert together == MOST_TOGETHER or (together + 1) * needed > 1


def test_a_trial_that_ran_out_of_memory_has_the_largest_node_for_itself_once() -> None:
    crowded = placement(GPU_NODE, {"CPU": 32, "GPU": 8}, LAPTOP, gpus_per_trial=0.25)
    assert crowded.give_more(TORCH)
    assert crowded.resources(TORCH) == {"CPU": 32, "GPU": 1.0}
    assert crowded.resources(make_run(make_cell(seed=1))) == {"CPU": 1, "GPU": 0.25}
    assert not crowded.give_more(TORCH)


def test_alone_stays_where_its_hardware_is() -> None:
    crowded = placement({"CPU": 64, "GPU": 4}, CS3_NODE)
    crowded.give_more(CEREBRAS)
    assert crowded.resources(CEREBRAS) == {"CPU": 8, "CS3_TRIAL": 1}


@pytest.mark.parametrize(
    ("nodes", "run", "message"),
    [
        ((LAPTOP, LAPTOP), TORCH, r"of the backend torch needs a node with 1 CPU, 0\.5 GPU, Ray has 2 CPU; 2 CPU\."),
        ((GPU_NODE,), CEREBRAS, r"backend cerebras needs a node with 1 CPU, 1 CS3_TRIAL, Ray has 16 CPU, 4 GPU\."),
        (({"CPU": 8, "CS3_TRIAL": 3},), CEREBRAS, r"cerebras needs the Ray resource CS3, the cluster has none\."),
        ((), TORCH, "Ray has no node"),
    ],
)
def test_what_no_node_can_hold_is_refused(nodes: tuple[Resources, ...], run: Run, message: str) -> None:
    with pytest.raises(InputError, match=message):
        placement(*nodes, gpus_per_trial=0.5).check_placeable([run])


def test_what_some_node_can_hold_is_not_refused() -> None:
    placement(LAPTOP, CS3_NODE, GPU_NODE, gpus_per_trial=None).check_placeable([TORCH, CEREBRAS])


def test_a_need_split_over_two_nodes_does_not_fit() -> None:
    with pytest.raises(InputError, match="needs a node with 1 CPU, 1 GPU"):
        placement({"CPU": 1}, {"GPU": 1}, gpus_per_trial=1.0).check_placeable([TORCH])


def test_nothing_is_described_as_nothing() -> None:
    assert describe_resources({"memory": 3.0}) == "nothing"
