"""Checkpoints on network file systems: two folders of this disk, one of which is said to lie on a network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from tune_sparse.errors import InputError
from tune_sparse.models import local_copy
from tune_sparse.models.local_copy import file_system, is_on_network, local_weight_files


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the kernel's list of mounts says to be NFS."""
    place = tmp_path / "net work"
    place.mkdir()
    mounts = tmp_path / "mounts"
    escaped = str(place.resolve()).replace(" ", "\\040")
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/home {escaped} nfs4 rw 0 0\n")
    monkeypatch.setattr(local_copy, "MOUNTS", mounts)
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path / "cache"))
    return place


@pytest.fixture
def remote(mount: Path, llama: Path) -> Path:
    return Path(shutil.copytree(llama, mount / "model"))


def test_the_file_system_is_that_of_the_innermost_mount(mount: Path, tmp_path: Path) -> None:
    assert file_system(mount / "model") == "nfs4"
    assert file_system(tmp_path) == "ext4"


@pytest.mark.parametrize("kind", ["lustre", "gpfs", "cifs", "nfs", "fuse.sshfs", "fuse"])
def test_network_file_systems_are_known(kind: str, mount: Path, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(f"something / {kind} rw 0 0\n")
    assert is_on_network(mount)


@pytest.mark.parametrize("kind", ["ext4", "overlay", "tmpfs", "fuseblk", "fuse.fuse-overlayfs"])
def test_local_file_systems_are_known(kind: str, mount: Path, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(f"something / {kind} rw 0 0\n")
    assert not is_on_network(mount)


def test_weights_on_a_network_are_copied_once(remote: Path, tmp_path: Path) -> None:
    [copy] = local_weight_files(remote)
    assert tmp_path / "cache" in copy.parents
    assert copy.read_bytes() == (remote / copy.name).read_bytes()
    made = copy.stat()
    assert local_weight_files(remote) == [copy]
    assert copy.stat().st_ino == made.st_ino
    assert not [path for path in copy.parent.parent.iterdir() if path.name.startswith(".")]


def test_a_worker_waits_for_the_copy_of_another(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [copy] = local_weight_files(remote)
    beats: list[None] = []
    monkeypatch.setattr(local_copy, "PATIENCE_SECONDS", 0.01)
    lock = FileLock(f"{copy.parent}.lock")
    lock.acquire()

    def let_go() -> None:
        beats.append(None)
        lock.release()

    monkeypatch.setattr(local_copy, "heartbeat", let_go)
    assert local_weight_files(remote) == [copy]
    assert len(beats) == 1


def test_changed_weights_are_copied_again(remote: Path) -> None:
    [copy] = local_weight_files(remote)
    weights = load_file(remote / copy.name)
    weights["model.norm.weight"] += 1
    save_file(weights, remote / copy.name)
    assert local_weight_files(remote) == [copy]
    assert copy.read_bytes() == (remote / copy.name).read_bytes()


def test_local_weights_stay_where_they_are(llama: Path, mount: Path) -> None:
    assert local_weight_files(llama) == [llama / "model.safetensors"]


def test_a_cache_on_a_network_is_not_filled(remote: Path, mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(mount / "cache"))
    assert local_weight_files(remote) == [remote / "model.safetensors"]


def test_a_disk_without_room_is_named_before_the_copy(
    remote: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(remote / "model.safetensors", 100 << 20)
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(small_disk))
    with pytest.raises(InputError, match=r"a local copy of weights needs room for what it writes, about 0\.10 GB"):
        local_weight_files(remote)
