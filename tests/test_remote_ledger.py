"""Runs of workers that do not see the results folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from factories import done_record, finished, make_cell, make_run, tiny_run, write_run
from patience import held_sweep
from ray_head import PATIENCE_SECONDS, Head, blind_node, ray_head, wait_until

from trainables import remote_ledger
from trainables.remote_ledger import (
    LedgerServer,
    RemoteLedger,
    check_visible,
    connect_ledger,
    own_folder,
    read_pieces,
    serve_ledger,
)
from tune_sparse.config import CS3
from tune_sparse.errors import InputError, NotReadyError
from tune_sparse.ledger.lease import FolderLease
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.pruning_io import read_masks
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.sweep.driver import gathered

pytestmark = pytest.mark.xdist_group("machine")

RUN = make_run()


def sha256(*pieces: bytes) -> str:
    return hashlib.sha256(b"".join(pieces)).hexdigest()


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[FolderLease]:
    """A results folder and its lease."""
    folder = tmp_path / "results"
    folder.mkdir()
    with FolderLease(folder) as own:
        yield own


@pytest.fixture
def ledger(lease: FolderLease) -> Ledger:
    return Ledger(lease.path.parent)


class TestLedgerServer:
    @pytest.fixture
    def server(self, lease: FolderLease) -> LedgerServer:
        return LedgerServer(lease.path.parent, lease.token)

    def test_a_run_has_its_name_once_all_of_it_has_arrived(self, server: LedgerServer, ledger: Ledger) -> None:
        name = server.begin("run")
        server.take(name, "adapter/weights", b"ab")
        server.take(name, "adapter/weights", b"c")
        server.take(name, "result.json", b"{}")
        assert not ledger.run_folder("run").exists()
        assert ledger.running() == {"run"}
        server.finish(name, {"adapter/weights": sha256(b"abc"), "result.json": sha256(b"{}")})
        assert (ledger.run_folder("run") / "adapter" / "weights").read_bytes() == b"abc"
        assert ledger.running() == set()

    @pytest.mark.parametrize(
        "sent", [{"result.json": sha256(b"{")}, {}, {"result.json": sha256(b"{}"), "lost": sha256(b"")}]
    )
    def test_what_arrives_otherwise_than_it_was_sent_is_dropped(
        self, server: LedgerServer, ledger: Ledger, sent: dict[str, str]
    ) -> None:
        name = server.begin("run")
        server.take(name, "result.json", b"{}")
        with pytest.raises(ConnectionError, match=r"must arrive as they were sent: (result\.json|lost) did"):
            server.finish(name, sent)
        assert list((ledger.folder / "runs").iterdir()) == []

    def test_a_second_worker_with_the_run_ends_the_first_ones_sending(
        self, server: LedgerServer, ledger: Ledger
    ) -> None:
        first = server.begin("run")
        server.take(first, "result.json", b"first")
        second = server.begin("run")
        with pytest.raises(ConnectionError, match="is expected no more: another worker sends this run"):
            server.take(first, "result.json", b"more")
        server.take(second, "result.json", b"{}")
        server.finish(second, {"result.json": sha256(b"{}")})
        assert (ledger.run_folder("run") / "result.json").read_bytes() == b"{}"
        assert len(list((ledger.folder / "runs").iterdir())) == 1

    def test_nothing_is_written_into_a_folder_that_another_sweep_took_over(
        self, lease: FolderLease, ledger: Ledger
    ) -> None:
        server = LedgerServer(ledger.folder, "a token of before")
        name = server.begin("run")
        with pytest.raises(ConnectionError, match="another process holds the results folder now"):
            server.finish(name, {})
        assert list((ledger.folder / "runs").iterdir()) == []

    def test_it_knows_what_is_done(self, server: LedgerServer, ledger: Ledger) -> None:
        write_run(ledger, RUN, done_record(RUN))
        assert server.done([RUN.run_id, "other"]) == {RUN.run_id}


def test_pieces_are_bounded_and_make_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_ledger, "PIECE_BYTES", 4)
    for content, pieces in ((b"", [b""]), (b"abcd", [b"abcd"]), (b"abcdef", [b"abcd", b"ef"])):
        (tmp_path / "file").write_bytes(content)
        assert list(read_pieces(tmp_path / "file")) == pieces


def test_what_a_killed_process_left_on_its_node_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        other = tmp_path / "workers" / f"{living.pid}-{psutil.Process(living.pid).create_time()}"
        killed = [tmp_path / "workers" / name for name in ("99999999-1.5", f"{os.getpid()}-1.5")]
        for folder in (other, *killed):
            folder.mkdir(parents=True)
        mine = own_folder(tmp_path)
        assert sorted(tmp_path.glob("workers/*")) == sorted([mine, other])
        living.communicate(b"\n")


@pytest.fixture
def remote(lease: FolderLease, local_ray: None) -> Iterator[RemoteLedger]:
    """The ledger as a worker reaches it that does not see the folder."""
    folder = lease.path.parent
    with serve_ledger(folder, lease.token):
        found = connect_ledger(folder.with_name("elsewhere"), lease.token)
        assert isinstance(found, RemoteLedger)
        yield found


def write(ledger: Ledger, adapter: bytes = b"", error: Exception | None = None) -> None:
    """A run, which may end in an error."""
    with ledger.writing("run") as folder:
        (folder / "result.json").write_text("{}")
        (folder / "adapter").write_bytes(adapter)
        if error:
            raise error


PRUNED, CPU = make_run(make_cell(method="wanda")), torch.device("cpu")


def masks(seed: int) -> BitMasks:
    return BitMasks.pack([("w", torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.5)])


class TestRemoteLedger:
    def test_a_worker_that_sees_the_folder_uses_it(self, lease: FolderLease, ledger: Ledger) -> None:
        found = connect_ledger(ledger.folder, lease.token)
        assert type(found) is Ledger
        assert found.folder == ledger.folder

    def test_a_run_arrives_as_it_was_written(
        self, remote: RemoteLedger, ledger: Ledger, llama: Path, tmp_path: Path
    ) -> None:
        run, here = tiny_run(llama), Ledger(tmp_path / "here")
        assert finished(run, remote).metrics == finished(run, here).metrics
        names = [
            {path.relative_to(place.folder / kind) for path in (place.folder / kind).rglob("*")}
            for place in (ledger, here)
            for kind in ("runs", "pruned_baselines")
        ]
        assert names[:2] == names[2:]
        assert ledger.record(run.run_id).metrics == here.record(run.run_id).metrics  # type: ignore[union-attr]
        for file in ("examples.parquet", "adapter/adapter_model.safetensors", "metrics.jsonl", "config.yaml"):
            assert (ledger.run_folder(run.run_id) / file).read_bytes() == (
                here.run_folder(run.run_id) / file
            ).read_bytes()
        assert not remote.folder.exists(), "nothing stays on the worker's node"

    def test_what_is_known_of_a_pruned_model_is_asked_for(self, remote: RemoteLedger, ledger: Ledger) -> None:
        assert remote.pruned_baseline("id") is None
        ledger.write_pruned_baseline("id", {"metrics": {"accuracy": 0.5}}, [])
        assert remote.pruned_baseline("id") == {"metrics": {"accuracy": 0.5}}

    def test_a_pruning_is_sent_once_and_fetched_once_a_node(
        self, remote: RemoteLedger, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert remote.pruning(PRUNED) is None
        ledger.write_pruning(PRUNED, masks(0), None, {})
        remote.write_pruning(PRUNED, masks(1), None, {})  # it comes too late
        found, there = remote.pruning(PRUNED), ledger.pruning(PRUNED)
        assert found is not None
        assert there is not None
        assert found.folder != there.folder
        assert read_masks(found, CPU).sha256 == masks(0).sha256 == there.mask_sha256
        monkeypatch.setattr(RemoteLedger, "_fetch", None)
        assert remote.pruning(PRUNED) == found

    def test_a_worker_reads_the_pruning_that_it_made_from_its_own_disk(
        self, remote: RemoteLedger, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(RemoteLedger, "_fetch", None)
        run = make_run(make_cell(method="wanda", sparsity=0.25))
        remote.write_pruning(run, masks(2), None, {})
        found, there = remote.pruning(run), ledger.pruning(run)
        assert found is not None
        assert there is not None
        assert found.sha256_by_file == there.sha256_by_file
        assert [path.name for path in (ledger.folder / "prunings").iterdir()] == [run.pruning_id]

    def test_a_pruning_that_is_not_whole_is_not_sent(self, remote: RemoteLedger, ledger: Ledger) -> None:
        ledger.write_pruning(PRUNED, masks(0), None, {})
        path = ledger.pruning_folder(str(PRUNED.pruning_id)) / "masks.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(NotReadyError, match=f"must be whole, {path.parent} is not: masks.safetensors must have"):
            remote.pruning(PRUNED)

    def test_a_copy_that_a_node_has_cut_short_is_fetched_again(self, remote: RemoteLedger, ledger: Ledger) -> None:
        ledger.write_pruning(PRUNED, masks(0), None, {})
        found = remote.pruning(PRUNED)
        assert found is not None
        (found.folder / "masks.safetensors").unlink()
        with pytest.raises(NotReadyError, match=r"masks\.safetensors"):
            remote.pruning(PRUNED)
        assert remote.pruning(PRUNED) == found

    def test_prunings_that_were_long_not_used_go_from_a_node(self, remote: RemoteLedger, ledger: Ledger) -> None:
        first, second = PRUNED, make_run(make_cell(method="wanda", sparsity=0.75))
        for run in (first, second):
            ledger.write_pruning(run, masks(0), None, {})
        old = remote.pruning(first)
        assert old is not None
        os.utime(old.folder, (1, 1))
        assert remote.pruning(second) is not None
        assert not old.folder.exists()

    def test_a_run_that_ends_in_an_error_leaves_nothing(self, remote: RemoteLedger, ledger: Ledger) -> None:
        with pytest.raises(RuntimeError, match="boom"):
            write(remote, error=RuntimeError("boom"))
        assert list((ledger.folder / "runs").iterdir()) == []
        assert not remote.folder.exists()

    def test_a_run_is_shown_as_running_from_its_start(self, remote: RemoteLedger, ledger: Ledger) -> None:
        with remote.writing("run"):
            assert ledger.running() == {"run"}

    def test_a_full_disk_at_the_driver_is_said(self, lease: FolderLease, local_ray: None, small_disk: Path) -> None:
        with FolderLease(small_disk) as own, serve_ledger(small_disk, own.token):
            remote = RemoteLedger(remote_ledger.ray.get_actor(remote_ledger._actor_name(own.token)))
            with pytest.raises(OSError, match="No space left on device"):
                write(remote, adapter=bytes(70 << 20))
            assert list((small_disk / "runs").iterdir()) == []

    def test_a_checkpoint_outlives_its_worker_and_goes_once_the_run_is_done(
        self, remote: RemoteLedger, lease: FolderLease, ledger: Ledger
    ) -> None:
        for run_id in (RUN.run_id, "other"):
            remote.checkpoint(run_id).parent.mkdir(parents=True, exist_ok=True)
            remote.checkpoint(run_id).write_bytes(b"steps")
        write_run(ledger, RUN, done_record(RUN))
        again = connect_ledger(ledger.folder.with_name("elsewhere"), lease.token)
        assert not again.checkpoint(RUN.run_id).exists()
        assert again.checkpoint("other").read_bytes() == b"steps"

    def test_a_driver_that_is_gone_is_an_infrastructure_error(self, remote: RemoteLedger) -> None:
        remote_ledger.ray.kill(remote._server)  # it may answer for a moment
        with pytest.raises(ConnectionError, match=r"must reach the driver of its sweep, .+ lost it"):
            wait_until(lambda: remote.pruned_baseline("id") is not None)

    def test_without_a_ledger_server_and_without_the_folder_it_says_so(
        self, lease: FolderLease, local_ray: None
    ) -> None:
        with pytest.raises(ConnectionError, match=r"does not see .+elsewhere and finds none"):
            connect_ledger(lease.path.parent.with_name("elsewhere"), lease.token)

    def test_a_ledger_server_that_does_not_see_the_folder_refuses(self, local_ray: None, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=f"does not see {tmp_path}"), serve_ledger(tmp_path, "token"):
            raise AssertionError("it was opened")


class TestRefusal:
    """Before anything is trained, of what needs a folder that nodes see."""

    def test_nodes_that_matter_must_see_the_folder(self, lease: FolderLease, local_ray: None, tmp_path: Path) -> None:
        check_visible(lease.path.parent, lease.token, "a search needs", lambda resources: True)
        check_visible(tmp_path / "elsewhere", lease.token, "a search needs", lambda resources: "TPU" in resources)
        with pytest.raises(InputError, match=r"a search needs a results folder that all its nodes see, .+ is not"):
            check_visible(tmp_path / "elsewhere", lease.token, "a search needs", lambda resources: CS3 in resources)

    def test_the_backend_cerebras_needs_it_on_the_nodes_of_the_cs3(
        self, lease: FolderLease, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "this one")
        on_cerebras = make_run(cerebras={"target": "cpu", "release": "2.10.0"})
        with gathered(Ledger(lease.path.parent), lease.token, [RUN, on_cerebras]):
            pass
        with (
            pytest.raises(InputError, match="the backend cerebras needs a results folder that all its nodes see"),
            gathered(Ledger(tmp_path), lease.token, [RUN, on_cerebras]),
        ):
            raise AssertionError("it began")


TUNE_SPARSE = (sys.executable, "-m", "tune_sparse")


@dataclass
class Site:
    """A cluster whose second node does not see the results folder."""

    head: Head
    results: Path
    cache: Path
    """of the second node"""
    sweep: list[str]

    def start(self, *arguments: str, program: Sequence[str] = TUNE_SPARSE) -> subprocess.Popen[str]:
        command = [*program, *self.sweep, "--results-dir", str(self.results), *arguments]
        environment = self.head.driver_environment
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, out + err

    def training(self) -> list[Path]:
        """Losses of runs that are trained on the second node."""
        curves = self.cache.glob("remote/*/workers/*/runs/.*/metrics.jsonl")
        return [path for path in curves if path.stat().st_size]

    def sending(self) -> list[Path]:
        """Finished runs that lie on the second node."""
        return list(self.cache.glob("remote/*/workers/*/runs/[!.]*"))


FEW = ["--no-report", "--tasks", "boolq", "--methods", "random"]


@pytest.fixture(params=[0])
def site(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Iterator[Site]:
    """The parameter: how many trials the driver's own node runs at once. All others run on the second node."""
    results, cache = tmp_path / "results", tmp_path / "cache"
    results.mkdir()
    with ray_head(num_cpus=request.param) as head, blind_node(head, results, cache, 2 - request.param):
        yield Site(head, results, cache, ["sweep", "smoke", "--data-dir", "synthetic", "--models", str(llama), *FEW])


def tree(results: Path) -> set[str]:
    """Every file of runs and of pruned models."""
    kinds = (results / "runs", results / "pruned_baselines")
    return {path.relative_to(results).as_posix() for kind in kinds for path in kind.rglob("*")}


def records(results: Path) -> dict[str, Any]:
    ledger = Ledger(results)
    found = {path.name: ledger.record(path.name) for path in (results / "runs").iterdir()}
    return {name: (record.identity, record.status, record.metrics) for name, record in found.items() if record}


def processes(name: str) -> list[psutil.Process]:
    """Actors of our Ray with `name` in their titles."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if re.match(f"ray::.*{name}", " ".join(process.cmdline()))]


@pytest.mark.slow
class TestCluster:
    @pytest.mark.parametrize("site", [0, 1], indirect=True, ids=["driver-computes-nothing", "driver-computes-too"])
    def test_a_sweep_without_shared_storage_ends_as_one_with_it(self, site: Site, tmp_path: Path) -> None:
        status, printed = site.run()
        assert status == 0, printed
        shared = tmp_path / "shared"
        alone = subprocess.run([*TUNE_SPARSE, *site.sweep, "--results-dir", shared], capture_output=True, text=True)
        assert alone.returncode == 0, alone.stdout + alone.stderr
        assert len(records(shared)) == 3
        assert records(site.results) == records(shared)
        assert tree(site.results) == tree(shared)
        assert list(site.cache.glob("remote/*/workers")), "some runs were trained where the folder is not seen"
        assert list(site.cache.glob("remote/*/workers/*")) == []

    @pytest.mark.parametrize("who", ["worker", "driver"])
    def test_what_is_killed_while_a_run_is_sent_leaves_nothing_and_the_run_runs_again(
        self, site: Site, who: str, tmp_path: Path
    ) -> None:
        few, hold = ["--sparsities", "0.5", "--set", "steps=300"], tmp_path / "hold"
        hold.touch()
        process = site.start(*few, program=held_sweep(hold, 0))
        wait_until(lambda: len(site.training()) == 2)  # they ask no more until they send
        [server] = processes("LedgerServer")
        server.suspend()
        hold.unlink()
        wait_until(lambda: len(site.sending()) == 2)
        assert records(site.results) == {}
        assert len(list((site.results / "runs").glob(".*.partial"))) == 2
        if who == "worker":
            for worker in processes("Trainable"):
                worker.kill()
            server.resume()
        else:
            process.kill()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        if who == "worker":
            assert process.returncode == 0, out + err
            assert err.count("to be tried again") == 2
        else:
            assert records(site.results) == {}
            with suppress(psutil.NoSuchProcess):  # Ray ends it with the driver
                server.resume()
            status, printed = site.run(*few)
            assert status == 0, printed
        assert [status for _, status, _ in records(site.results).values()] == ["done"] * 2
        assert list(site.results.glob("*/.*.partial")) == []
        assert site.sending() == []

    def test_a_search_is_refused_before_it_starts(self, site: Site, llama: Path) -> None:
        site.sweep = ["search", "--model", str(llama), "--task", "boolq", "--trials", "2", "--data-dir", "synthetic"]
        status, printed = site.run()
        assert status == 2
        assert f"a search needs a results folder that all its nodes see, {site.results} is not seen by" in printed
        assert "Traceback" not in printed
        assert not (site.results / "runs").exists()

    def test_a_node_without_the_model_refuses_the_run_before_it_trains(self, llama: Path, tmp_path: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(llama, model)
        few = ["--models", str(model), "--data-dir", "synthetic", *FEW, "--sparsities", "0", "--max-retries", "0"]
        with ray_head(num_cpus=0) as head, blind_node(head, model, tmp_path / "cache", 1):
            site = Site(head, tmp_path / "results", tmp_path / "cache", ["sweep", "smoke", *few])
            status, printed = site.run()
        assert status == 1
        message = f"a run needs the model {model}, on every node; {socket.gethostname()} says: "
        assert message in printed, printed
        [run_id] = records(site.results)
        record = Ledger(site.results).record(run_id)
        assert record is not None
        assert record.error is not None
        assert (record.error["class"], record.error["retryable"]) == ("NotReadyError", True)
        assert message in record.error["message"]


def test_a_run_that_another_begins_from_is_fetched_once_a_node(
    remote: RemoteLedger, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(make_cell(mode="masked-finetuning"))
    with pytest.raises(NotReadyError, match=f"must be done, {run.run_id} is not"):
        remote.finished(run.run_id)
    there = write_run(ledger, run, done_record(run))
    here = remote.finished(run.run_id)
    assert here != there
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (here, there)]
    assert names[0] == names[1]
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names[0])
    monkeypatch.setattr(RemoteLedger, "_fetch", None)
    assert remote.finished(run.run_id) == here
