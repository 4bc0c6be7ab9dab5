"""The searcher alone, and in the real Tune on an emulated mixed cluster."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import tune

from tune_sparse.sweep.ray_session import capacity, run_trials
from tune_sparse.sweep.resources import Resources
from tune_sparse.sweep.scheduler import ResourceQueue
from tune_sparse.sweep.sources import Listed
from tune_sparse.sweep.tune_parts import Stop

CS3_TRIAL: Resources = {"CPU": 1, "CS3_TRIAL": 1}
GPU_TRIAL: Resources = {"CPU": 1, "GPU": 1}
CLUSTER: Resources = {"CPU": 16, "GPU": 4, "CS3_TRIAL": 2}


def trials(queue: str, count: int, held: Resources) -> list[dict[str, Any]]:
    return [{"name": f"{queue} {n}", "resources": held} for n in range(count)]


def listed(queues: Mapping[str, Iterable[Any]]) -> dict[str, Listed]:
    return {name: Listed(items) for name, items in queues.items()}


def resource_queue(total: Resources = CLUSTER, cs3: int = 240, gpu: int = 120, **options: Any) -> ResourceQueue:
    queues = {"cerebras": trials("cs3", cs3, CS3_TRIAL), "torch": trials("gpu", gpu, GPU_TRIAL)}
    return ResourceQueue(listed(queues), dict, lambda: total, **options)


def handed_out(source: ResourceQueue, ids: str) -> list[str | None]:
    answers = [source.suggest(trial_id) for trial_id in ids]
    return [answer["trial"]["name"] if isinstance(answer, dict) else answer for answer in answers]


def test_every_kind_of_hardware_is_busy_from_the_start_and_one_more_of_each_waits() -> None:
    names = handed_out(resource_queue(), "abcdefghij")
    assert names == ["cs3 0", "gpu 0", "cs3 1", "gpu 1", "gpu 2", "gpu 3", "cs3 2", "gpu 4", None, None]


def test_lanes_that_share_what_is_scarce_have_equal_parts_of_it() -> None:
    queues = {"cerebras": trials("cs3", 9, {"CPU": 1, "CS3_TRIAL": 1}), "torch": trials("cpu", 9, {"CPU": 1})}
    source = ResourceQueue(listed(queues), dict, lambda: {"CPU": 4, "CS3_TRIAL": 4})
    assert handed_out(source, "abcd") == ["cs3 0", "cpu 0", "cs3 1", "cpu 1"]


def test_what_ends_is_followed_by_the_next_of_its_lane() -> None:
    source = resource_queue()
    handed_out(source, "abcdefgh")
    source.on_trial_complete("a")
    assert handed_out(source, "ij") == ["cs3 3", None], "cs3 2 takes the place, the next waits"
    source.on_trial_complete("b", error=True)
    assert handed_out(source, "kl") == ["gpu 5", None]


def test_a_lane_alone_has_none_waiting() -> None:
    assert handed_out(resource_queue(cs3=0), "abcde") == ["gpu 0", "gpu 1", "gpu 2", "gpu 3", None]


def test_a_limit_counts_trials() -> None:
    assert handed_out(resource_queue(cs3=0, limit=3), "abcd") == ["gpu 0", "gpu 1", "gpu 2", None]


def test_it_ends_when_the_last_trial_has_ended_and_none_is_tried_again() -> None:
    source = resource_queue(cs3=0, gpu=1)
    assert handed_out(source, "ab") == ["gpu 0", None], "it may still have to be tried again"
    source.on_trial_complete("a", error=True)
    source.requeue("torch", {"name": "gpu 0", "resources": GPU_TRIAL})
    assert handed_out(source, "c") == ["gpu 0"]
    source.on_trial_complete("c")
    assert handed_out(source, "d") == [ResourceQueue.FINISHED]


def test_a_retry_comes_after_the_others_of_its_lane_and_does_not_wait_for_another_lane() -> None:
    source = resource_queue({"CPU": 2, "GPU": 1, "CS3_TRIAL": 1}, cs3=2, gpu=9)
    assert handed_out(source, "abcde") == ["cs3 0", "gpu 0", "cs3 1", "gpu 1", None]
    source.on_trial_complete("a", error=True)
    source.requeue("cerebras", {"name": "cs3 0", "resources": CS3_TRIAL})
    assert handed_out(source, "fg") == ["cs3 0", None]


def test_a_stop_ends_it_whatever_is_left() -> None:
    stop = Stop()
    source = resource_queue(stop=stop)
    stop.because("the user said so")
    assert handed_out(source, "a") == [ResourceQueue.FINISHED]


def test_what_waits_blocks_nothing_and_has_its_turn_before_what_lies_behind_it() -> None:
    done: set[str] = set()
    queue = [{"name": name, "resources": {"CPU": 1}} for name in ("first", "after first", "other", "another")]
    ready = Listed(queue, lambda item: item["name"] != "after first" or "first" in done)
    source = ResourceQueue({"torch": ready}, dict, lambda: {"CPU": 2})
    assert handed_out(source, "abc") == ["first", "other", None]
    done.add("first")
    source.on_trial_complete("a")
    assert handed_out(source, "d") == ["after first"]
    source.on_trial_complete("b")
    assert handed_out(source, "e") == ["another"]


def test_what_never_may_begin_is_never_waited_for() -> None:
    queue = [{"name": name, "resources": {"CPU": 1}} for name in ("first", "after first")]
    source = ResourceQueue({"torch": Listed(queue, lambda item: item["name"] == "first")}, dict, lambda: {"CPU": 2})
    assert handed_out(source, "ab") == ["first", None], "it may still have to be tried again"
    source.on_trial_complete("a", error=True)
    assert handed_out(source, "c") == [ResourceQueue.FINISHED]


def test_a_node_that_joins_is_used_and_one_that_left_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tune_sparse.sweep.scheduler.LOOK_SECONDS", -1.0)
    total: Resources = {"CPU": 8, "GPU": 1}
    source = resource_queue(total, cs3=0, gpu=9)
    assert handed_out(source, "ab") == ["gpu 0", None]
    total["GPU"] = 2
    assert handed_out(source, "c") == ["gpu 1"]
    total["GPU"] = 0
    source.on_trial_complete("a", error=True)
    source.on_trial_complete("c", error=True)
    with caplog.at_level(logging.WARNING):
        assert handed_out(source, "de") == [None, None]
    assert [record.message for record in caplog.records] == ["waiting for a node with 1 CPU, 1 GPU"]
    total["GPU"] = 1
    assert handed_out(source, "f") == ["gpu 2"]


def test_what_a_trial_holds_is_decided_when_it_is_its_turn() -> None:
    share = {"GPU": 1.0}
    queue = Listed(trials("gpu", 9, GPU_TRIAL))
    source = ResourceQueue({"torch": queue}, lambda trial: trial | {"resources": dict(share)}, lambda: {"GPU": 1.0})
    assert handed_out(source, "ab") == ["gpu 0", None]
    source.on_trial_complete("a")
    share["GPU"] = 0.3333
    assert handed_out(source, "cdef") == ["gpu 1", "gpu 2", "gpu 3", None]


@given(
    needs=st.lists(st.tuples(st.sampled_from(["cerebras", "torch"]), st.integers(1, 4)), max_size=30),
    ends=st.lists(st.integers(0, 5), max_size=60),
)
def test_no_trial_is_lost_repeated_or_out_of_order_and_few_wait(needs: list[tuple[str, int]], ends: list[int]) -> None:
    queues: dict[str, list[dict[str, Any]]] = {"cerebras": [], "torch": []}
    for number, (queue, cpus) in enumerate(needs):
        queues[queue].append({"number": number, "resources": {"CPU": cpus}})
    source = ResourceQueue(listed(queues), dict, lambda: {"CPU": 5})
    live: dict[str, dict[str, Any]] = {}
    seen: list[int] = []
    order = iter(ends)
    for turn in range(10_000):
        answer = source.suggest(str(turn))
        if answer == ResourceQueue.FINISHED:
            break
        if answer is not None:
            live[str(turn)] = answer["trial"]
            seen.append(answer["trial"]["number"])
            assert len(live) <= 5 + 2, "one more of each queue"
        else:
            ended = list(live)[next(order, 0) % len(live)]
            del live[ended]
            source.on_trial_complete(ended)
    assert sorted(seen) == list(range(len(needs)))
    for queue in queues.values():
        of_queue = [trial["number"] for trial in queue]
        assert [number for number in seen if number in of_queue] == of_queue


def sleeping() -> type[tune.Trainable]:
    """A class that Ray sends to its workers by value: these cannot import this file."""

    class Sleep(tune.Trainable):
        """Writes when it began and ended."""

        def setup(self, config: dict[str, Any]) -> None:
            self.config = config

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.config = new_config
            return True

        def step(self) -> dict[str, Any]:
            began = time.time()
            time.sleep(0.2)
            trial = self.config["trial"]
            (Path(trial["folder"]) / trial["name"]).write_text(f"{began} {time.time()} {os.getpid()}")
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

    return Sleep


@pytest.mark.xdist_group("machine")
def test_tune_keeps_both_kinds_busy_though_all_cells_of_one_come_first(tmp_path: Path, local_ray: None) -> None:
    place = {"folder": str(tmp_path)}
    queues = {
        "cerebras": [trial | place for trial in trials("cs3", 24, {"CS3_TRIAL": 1})],
        "torch": [trial | place for trial in trials("gpu", 12, {"GPU": 1})],
    }
    run_trials(sleeping(), ResourceQueue(listed(queues), dict, capacity), tune.Callback())
    spans = {path.name: tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir()}
    assert len(spans) == 36
    assert len({pid for *_, pid in spans.values()}) <= 6, "workers stay warm"
    last_of_gpu = max(ended for name, (_, ended, _) in spans.items() if name.startswith("gpu"))
    last_of_cs3 = max(ended for name, (_, ended, _) in spans.items() if name.startswith("cs3"))
    assert last_of_gpu < last_of_cs3, "twelve beside twenty-four end sooner, unless they had to wait"
    for kind in ("cs3", "gpu"):
        own = sorted(span for name, span in spans.items() if name.startswith(kind))
        assert all(later[0] >= earlier[1] for earlier, later in pairwise(own)), "one token, one trial"
