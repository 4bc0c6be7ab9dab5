"""Results without shared storage: a worker that does not see the results folder works on its own disk, and each of its
runs arrives whole at the driver, through Ray, before the trial is done. Prunings are fetched from the driver, and kept
on the node."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from tune_sparse.errors import InputError
from tune_sparse.evaluation.outcomes import Outcome
from tune_sparse.files import aside, cache_dir, replace_folder
from tune_sparse.identity import hash_json
from tune_sparse.ledger.contracts import RunStore
from tune_sparse.ledger.lease import is_locked_with
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.prunings import DESCRIPTION, StoredPruning, file_sha256, read_pruning, take_free_name
from tune_sparse.ledger.run import Run
from tune_sparse.pruning.bit_masks import BitMasks
from tune_sparse.watchdog import heartbeat

PIECE_BYTES = 16 * 2**20
"""A file is sent in pieces of this size: neither end holds more of it in memory."""
KEPT_SECONDS = 7 * 24 * 3600.0
"""A node keeps a pruning or a run that it fetched for so long after its last use: longer than any run that reads it."""


@dataclass(frozen=True)
class Upload:
    """A run or a pruning that is being sent, in a hidden folder."""

    name: str
    folder: Path
    digests: dict[str, Any] = field(default_factory=dict)
    """{file: SHA-256 so far}"""


class LedgerServer:
    """Takes in runs on the driver's node, and answers what workers ask of the ledger. It dies with the driver."""

    def __init__(self, results_dir: Path, token: str) -> None:
        self._ledger, self._token = Ledger(results_dir), token
        self._uploads: dict[str, Upload] = {}

    def sees_the_folder(self) -> bool:
        return is_locked_with(self._ledger.folder, self._token)

    def begin(self, run_id: str) -> str:
        """Expect a run; returns the name of its upload. What an earlier worker sent of it goes."""
        for name in [name for name, upload in self._uploads.items() if upload.name == run_id]:
            self.give_up(name)
        return self._expect(run_id, self._ledger.run_folder(run_id))

    def begin_pruning(self, pruning_id: str) -> str:
        """Expect a pruning; returns the name of its upload. Several workers may send one: the first wins."""
        return self._expect(pruning_id, self._ledger.pruning_folder(pruning_id))

    def _expect(self, name: str, final: Path) -> str:
        folder = aside(final)
        folder.mkdir(parents=True)
        self._uploads[folder.name] = Upload(name, folder)
        return folder.name

    def take(self, name: str, file: str, piece: bytes) -> None:
        """Append a piece to a file."""
        upload = self._expected(name)
        path = upload.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(piece)
        upload.digests.setdefault(file, hashlib.sha256()).update(piece)

    def finish(self, name: str, sent: Mapping[str, str]) -> None:
        """Give an upload the run's name, if it is all there: {file: SHA-256} as it was sent."""
        upload = self._arrived(name, sent)
        with self._ledger.writing(upload.name) as folder:
            replace_folder(upload.folder, folder)
        del self._uploads[name]

    def finish_pruning(self, name: str, sent: Mapping[str, str]) -> None:
        """Give an upload the pruning's name, unless another worker was faster. sent: as `finish`."""
        upload = self._arrived(name, sent)
        take_free_name(upload.folder, self._ledger.pruning_folder(upload.name))
        self.give_up(name)

    def _arrived(self, name: str, sent: Mapping[str, str]) -> Upload:
        upload = self._expected(name)
        found = {file: digest.hexdigest() for file, digest in upload.digests.items()}
        differing = sorted(file for file in found.keys() | sent.keys() if found.get(file) != sent.get(file))
        if differing or not self.sees_the_folder():
            self.give_up(name)
            why = f"{', '.join(differing)} did not" if differing else "another process holds the results folder now"
            raise ConnectionError(f"the files of {upload.name} must arrive as they were sent: {why}")
        return upload

    def give_up(self, name: str) -> None:
        """Forget what was sent of a run or a pruning."""
        if name in self._uploads:
            shutil.rmtree(self._uploads.pop(name).folder, ignore_errors=True)

    def done(self, run_ids: Iterable[str]) -> set[str]:
        """Those of `run_ids` that are done."""
        return {run_id for run_id in run_ids if self._ledger.is_done(run_id)}

    def pruning(self, run: Run) -> StoredPruning | None:
        """As the ledger's, verified before any of it is sent."""
        stored = self._ledger.pruning(run)
        if stored is not None:
            stored.verify()
        return stored

    def finished(self, run_id: str) -> dict[str, str]:
        """{file: SHA-256} of a run that is done. Raises as the ledger's."""
        folder = self._ledger.finished(run_id)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}

    def piece(self, file: str, start: int) -> bytes:
        """`PIECE_BYTES` of a file of the results folder, from byte `start` on; less at its end."""
        with (self._ledger.folder / file).open("rb") as stream:
            stream.seek(start)
            return stream.read(PIECE_BYTES)

    def pruned_baseline(self, baseline_id: str) -> dict[str, Any] | None:
        return self._ledger.pruned_baseline(baseline_id)

    def write_pruned_baseline(self, baseline_id: str, value: dict[str, Any], outcomes: list[Outcome]) -> None:
        self._ledger.write_pruned_baseline(baseline_id, value, outcomes)

    def _expected(self, name: str) -> Upload:
        if name not in self._uploads:
            raise ConnectionError(f"{name} is expected no more: another worker sends this run")
        return self._uploads[name]


@contextmanager
def serve_ledger(results_dir: Path, token: str) -> Iterator[None]:
    """Run a ledger server for the results folder that is locked with `token`, on this node of the cluster.

    Raises `InputError` where this node's Ray does not see the folder.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": _actor_name(token), "num_cpus": 0, "scheduling_strategy": here}
    server: Any = ray.remote(**options)(LedgerServer).remote(results_dir, token)
    try:
        if not ray.get(server.sees_the_folder.remote()):
            raise InputError(
                f"the Ray node that a sweep is started on must see its results folder, {socket.gethostname()} does "
                f"not see {results_dir}. Give a --results-dir that it sees."
            )
        yield
    finally:
        ray.kill(server)


def _actor_name(token: str) -> str:
    return f"tune-sparse-ledger-{token}"


def connect_ledger(results_dir: Path, token: str) -> RunStore:
    """Return the ledger that the driver has locked with `token`, as this worker reaches it.

    Raises `ConnectionError` where it neither sees the folder nor finds a ledger server.
    """
    if is_locked_with(results_dir, token):
        return Ledger(results_dir)
    try:
        return RemoteLedger(ray.get_actor(_actor_name(token)))
    except ValueError as error:
        raise ConnectionError(
            f"a worker must see the results folder of its sweep or find the driver's ledger server, "
            f"{socket.gethostname()} does not see {results_dir} and finds none. Start the sweep again."
        ) from error


class RemoteLedger:
    """A `RunStore` for a worker that does not see the results folder: files are written on this node, and sent when
    whole. Records cannot be read from it."""

    def __init__(self, server: Any) -> None:
        node = cache_dir() / "remote" / socket.gethostname()
        self._server, self._local = server, Ledger(own_folder(node))
        self._checkpoints, self._prunings, self._runs = node / "checkpoints", node / "prunings", node / "runs"
        kept = {path.stem: path for path in self._checkpoints.glob("*.pt")}
        for run_id in self._ask(server.done, list(kept)) if kept else ():
            kept[run_id].unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        return self._local.folder

    def checkpoint(self, run_id: str) -> Path:
        """On this node: a training that was cut short goes on from it only here."""
        return self._checkpoints / f"{run_id}.pt"

    def hang_report(self, run_id: str) -> Path:
        return self._local.hang_report(run_id)

    @contextmanager
    def writing(self, run_id: str) -> Iterator[Path]:
        """Lend a folder as the ledger does; the driver has the run when the block has ended well."""
        name = self._ask(self._server.begin, run_id)
        try:
            with self._local.writing(run_id) as folder:
                yield folder
            finished = self._local.run_folder(run_id)
            if finished.is_dir():
                self._ask(self._server.finish, name, self._sent(name, finished))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(ConnectionError):
                self._ask(self._server.give_up, name)

    def _sent(self, name: str, folder: Path) -> dict[str, str]:
        """{file: SHA-256} of a run, once every file has been taken in."""
        digests = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            file, digest = path.relative_to(folder).as_posix(), hashlib.sha256()
            for piece in read_pieces(path):
                digest.update(piece)
                self._ask(self._server.take, name, file, piece)
                heartbeat()
            digests[file] = digest.hexdigest()
        return digests

    def pruning(self, run: Run) -> StoredPruning | None:
        """Fetch a pruning from the driver, once a node. What this node has under other checksums is another one."""
        if run.pruning_id is None:
            return None
        there: StoredPruning | None = self._ask(self._server.pruning, run)
        if there is None:
            return None
        here = self._kept(there)
        if not here.exists():
            _remove_unused(self._prunings)
            self._fetch(there.folder.relative_to(there.folder.parents[1]), [*there.bytes_by_file, DESCRIPTION], here)
        try:
            kept = read_pruning(here, run.pruning_settings)
        except InputError:
            shutil.rmtree(here, ignore_errors=True)  # the next try fetches it again
            raise
        os.utime(here)
        return kept

    def write_pruning(
        self, run: Run, masks: BitMasks, weights: Mapping[str, Tensor] | None, provenance: Mapping[str, Any]
    ) -> None:
        self._local.write_pruning(run, masks, weights, provenance)
        own = self._local.pruning(run)
        assert own is not None
        name = self._ask(self._server.begin_pruning, run.pruning_id)
        try:
            self._ask(self._server.finish_pruning, name, self._sent(name, own.folder))
            self._prunings.mkdir(parents=True, exist_ok=True)
            take_free_name(own.folder, self._kept(own))
        finally:
            shutil.rmtree(own.folder, ignore_errors=True)
            with suppress(ConnectionError):
                self._ask(self._server.give_up, name)

    def _kept(self, pruning: StoredPruning) -> Path:
        """The place of a pruning on this node: prunings of one identity that differ have two."""
        return self._prunings / f"{pruning.folder.name}_{hash_json(pruning.sha256_by_file)[:8]}"

    def finished(self, run_id: str) -> Path:
        """Fetch a run from the driver, once a node."""
        there: dict[str, str] = self._ask(self._server.finished, run_id)
        here = self._runs / f"{run_id}_{hash_json(there)[:8]}"
        if not here.exists():
            _remove_unused(self._runs)
            self._fetch(Path("runs", run_id), there, here)
        os.utime(here)
        return here

    def _fetch(self, folder: Path, files: Iterable[str], here: Path) -> None:
        """Fetch files of a folder, named within the results folder; `here` appears when all are there."""
        partial = aside(here)
        try:
            for file in files:
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                with (partial / file).open("wb") as stream:
                    while piece := self._ask(self._server.piece, str(folder / file), stream.tell()):
                        stream.write(piece)
                        heartbeat()
            take_free_name(partial, here)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def pruned_baseline(self, baseline_id: str) -> dict[str, Any] | None:
        known: dict[str, Any] | None = self._ask(self._server.pruned_baseline, baseline_id)
        return known

    def write_pruned_baseline(self, baseline_id: str, value: dict[str, Any], outcomes: Iterable[Outcome]) -> None:
        self._ask(self._server.write_pruned_baseline, baseline_id, value, list(outcomes))

    def _ask(self, method: Any, *arguments: Any) -> Any:
        try:
            return ray.get(method.remote(*arguments))
        except ray.exceptions.RayActorError as error:
            raise ConnectionError(
                f"a worker must reach the driver of its sweep, {socket.gethostname()} lost it ({type(error).__name__})"
            ) from error


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, `PIECE_BYTES` at a time; an empty file is one empty piece."""
    with path.open("rb") as stream:
        yield stream.read(PIECE_BYTES)
        while piece := stream.read(PIECE_BYTES):
            yield piece


def _remove_unused(fetched: Path) -> None:
    """Make room on a node: prunings, or runs, that no worker asked for in `KEPT_SECONDS` go."""
    for path in fetched.glob("*"):
        with suppress(FileNotFoundError):  # another worker was faster
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def own_folder(node: Path) -> Path:
    """This process's folder on a node. What processes left there that were killed goes."""
    for path in (node / "workers").glob("*"):
        if _is_left(path):
            shutil.rmtree(path, ignore_errors=True)
    me = psutil.Process()
    folder = node / "workers" / f"{me.pid}-{me.create_time()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_left(folder: Path) -> bool:
    pid, _, started = folder.name.partition("-")
    try:
        return psutil.Process(int(pid)).create_time() != float(started)
    except psutil.NoSuchProcess:
        return True


def check_visible(results_dir: Path, token: str, needs: str, of_node: Callable[[Mapping[str, float]], bool]) -> None:
    """Raise `InputError` where a node of the cluster does not see the results folder, which `needs` says.

    of_node: whether a node with these resources matters.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and of_node(node["Resources"])]
    pending = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look: Any = ray.remote(num_cpus=0, scheduling_strategy=there)(is_locked_with)
        pending[node["NodeManagerHostname"] + " " + node["NodeManagerAddress"]] = look.remote(results_dir, token)
    blind = [name for name, answer in pending.items() if not ray.get(answer)]
    if blind:
        raise InputError(
            f"{needs} a results folder that all its nodes see, {results_dir} is not seen by {', '.join(blind)}. "
            "Give a --results-dir on shared storage."
        )
